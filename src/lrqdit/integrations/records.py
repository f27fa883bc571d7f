"""What a pipeline is calibrated with: records of a prompt and further arguments, pictures among them.

A record is a prompt, or a dictionary of arguments of the pipeline's call with a ``prompt``, such as ``{"prompt": "make
it snow", "image": "house.png", "seed": 3}``. A text under an argument that takes pictures is the path of one; a list of
paths gives several. Files are opened when their record runs.
"""

import importlib.util
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import load_image, load_video
from PIL import Image, ImageSequence

from lrqdit.errors import ConfigError, ModelError, first_line
from lrqdit.models.registry import call_parameters, denoisers

Record = dict[str, Any]
# arguments that take pictures, by their names; masks of texts are none
PICTURE = re.compile(r"(?!.*(attention|embeds|padding|atom|render))((\w+_)?(images?|video|mask)|image_reference)")
# pipelines that make something from a picture say so in their names; of the others, and of these, some can do without
TAKES_PICTURES = re.compile(
    r"Img2Img|I2I|I2V|(Image|Video)(To|2)(Image|Video|World)|Inpaint|Edit|Control|Fill|Refiner|Layered|VisualCloze"
)
CAN_DO_WITHOUT = re.compile(r"TI2VA|EasyAnimate|FiboEdit|JoyImage|LongMultiPrompt")
NEEDED = ("image", "video", "mask_image", "control_image", "control_video", "control_mask")
_LOG = logging.getLogger("lrqdit")


def read_records(path: Path) -> list[Record]:
    """The records of a file: one JSON object per line, or one prompt per line, without empty lines and # comments.

    Paths of pictures are relative to the file.

    Raises:
        ConfigError: if the file cannot be read or has no record, or a line is not an object with a prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts file {path} cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not numbered:
        raise ConfigError(f"prompts file {path} has no prompt; write one per line")
    if not numbered[0][1].startswith("{"):
        return [{"prompt": line} for _, line in numbered]
    records: list[Record] = []
    for number, line in numbered:
        where = f"{path}, line {number}"
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where} is not JSON: {error}; write one whole object per line") from None
        records.append(_with_paths(found, where, path.parent))
    return records


def check_records(
    pipeline: DiffusionPipeline, prompts: Iterable[str | Mapping[str, Any]], arguments: Mapping[str, Any] | None
) -> list[Record]:
    """The records of prompts, checked against the pipeline's call before anything runs.

    Args:
        pipeline: that will run them.
        prompts: texts or records.
        arguments: of every call, beside the records' own.

    Raises:
        ConfigError: if there is none, one has no prompt, or a picture is missing or cannot be read.
        ModelError: if the pipeline lacks an argument of a record, or needs one that is not given.
    """
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        raise ConfigError(f"prompts={prompts!r} is not a list; pass several, as in prompts=['a red fox', 'a ship']")
    records = [
        {"prompt": found} if isinstance(found, str) else _with_paths(found, f"prompts[{index}]")
        for index, found in enumerate(prompts)
    ]
    if not records:
        raise ConfigError("quantize: the list of calibration prompts is empty; pass at least one, better 32")
    kind, accepted = type(pipeline).__name__, call_parameters(pipeline)
    if "prompt" not in accepted:
        raise ModelError(f"{kind} takes no prompt; pass quantize a forward_loop that runs it")
    pictures = picture_arguments(pipeline)
    for index, record in enumerate(records):
        given = {name for name, value in {**(arguments or {}), **record}.items() if value is not None}
        for name in sorted(record.keys() - accepted.keys() - {"seed"}):
            takes = f"the pictures it takes are {', '.join(pictures)}" if pictures else "it takes no pictures"
            raise ModelError(f"prompts[{index}]: {kind} takes no {name}; {takes}")
        for name, alternatives in _needed(pipeline).items():
            if not given & alternatives:
                what = "a picture or a list of them" if is_picture(name) else "its value"
                example = f'{{"prompt": "a fox", "{name}": "fox.png"}}'
                raise ModelError(
                    f"prompts[{index}]: {kind} needs {name}: give every record {what} under that name, as in "
                    f"prompts=[{example}], or a line {example} of the file of lrqdit quantize --calibration FILE or "
                    "evaluate --prompts FILE; lrqdit generate takes --image"
                )
    return records


def warn_without_pictures(pipeline: DiffusionPipeline, records: Iterable[Record], arguments: Mapping[str, Any]) -> None:
    """Warn if a pipeline that can take pictures is given none."""
    optional = picture_arguments(pipeline)
    if optional and not any(found.get(name) is not None for found in (arguments, *records) for name in optional):
        _LOG.warning(
            "%s is calibrated for text to image only; give records pictures (%s) if you will use it with some",
            type(pipeline).__name__, ", ".join(optional),
        )  # fmt: skip


def picture_arguments(pipeline: DiffusionPipeline) -> list[str]:
    """The arguments of a pipeline's call that take pictures, but for those of IP-Adapters."""
    return [name for name in call_parameters(pipeline) if is_picture(name) and "ip_adapter" not in name]


def is_picture(name: str) -> bool:
    """Whether an argument of a pipeline's call takes pictures, by its name."""
    return PICTURE.fullmatch(name) is not None


def _needed(pipeline: DiffusionPipeline) -> dict[str, set[str]]:
    """Arguments without which a pipeline cannot run, and what may be given instead of each.

    Those without a default, the pictures of pipelines that start from some, and that of an IP-Adapter that is loaded.
    """
    accepted = call_parameters(pipeline)
    needed = [
        name
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    names = [kind.__name__ for kind in type(pipeline).__mro__ if issubclass(kind, DiffusionPipeline)]
    if any(TAKES_PICTURES.search(name) and not CAN_DO_WITHOUT.search(name) for name in names):
        needed += [name for name in NEEDED if name in accepted and name not in needed]
    found = {name: {name, f"{name}_latents", f"{name}_embeds"} for name in needed if name != "prompt"}
    if any(getattr(model, "encoder_hid_proj", None) is not None for model in denoisers(pipeline).values()):
        found["ip_adapter_image"] = {"ip_adapter_image", "ip_adapter_image_embeds"}
    if "image" in found and "video" in found:
        found["image"] |= found.pop("video")
    return found


def _with_paths(record: Mapping[str, Any], where: str, folder: Path | None = None) -> Record:
    """A record whose texts under pictures' names are paths, each of a file that can be read."""
    if not isinstance(record, Mapping) or not isinstance(record.get("prompt"), str):
        raise ConfigError(f"{where} is neither a text nor a record with a text under prompt")
    if not isinstance(record.get("seed", 0), int):
        raise ConfigError(f"{where}: seed={record['seed']!r} is not a whole number")

    def find(value: Any, name: str) -> Any:
        if isinstance(value, list | tuple):
            return [find(part, name) for part in value]
        if not isinstance(value, str | Path):
            return value
        path = (folder / value) if folder else Path(value)
        try:
            if not _is_video(name, path):
                with Image.open(path):
                    pass
            elif not path.is_file():
                raise FileNotFoundError("no such file")
        except OSError as error:
            raise ConfigError(
                f"{where}: {name}={str(value)!r} cannot be read as a picture: {first_line(error)}"
            ) from error
        if _is_video(name, path) and path.suffix.lower() != ".gif" and importlib.util.find_spec("imageio") is None:
            raise ConfigError(
                f"{where}: {name}={str(value)!r} needs imageio to be read; pip install imageio imageio-ffmpeg, or give "
                "a list of frames"
            )
        return path.absolute()

    return {name: find(value, name) if is_picture(name) else value for name, value in record.items()}


def _is_video(name: str, path: Path) -> bool:
    """Whether a file is a whole video, not one of its frames."""
    return "video" in name and path.suffix.lower() in (".gif", ".mp4", ".webm", ".mov", ".avi", ".mkv")


def load_pictures(pipeline: DiffusionPipeline, record: Mapping[str, Any]) -> Record:
    """The arguments of a record with the pictures that its paths name: RGB, or RGBA for a decoder of four channels."""
    config = getattr(getattr(pipeline, "vae", None), "config", None)
    has_alpha = 4 in (getattr(config, "input_channels", None), getattr(config, "in_channels", None))

    def load(value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [load(part, name) for part in value]
        if not isinstance(value, Path):
            return value
        if _is_video(name, value):
            if value.suffix.lower() != ".gif":
                return load_video(str(value))
            with Image.open(value) as video:
                return [frame.convert("RGB") for frame in ImageSequence.Iterator(video)]
        return load_image(str(value), (lambda picture: picture.convert("RGBA")) if has_alpha else None)

    return {name: load(value, name) for name, value in record.items()}


def batches(records: Sequence[Record], size: int) -> list[Sequence[Record]]:
    """Records that run together.

    Raises:
        ConfigError: if some have arguments of their own, which a batch does not.
    """
    if size > 1 and (own := {name for record in records for name in record} - {"prompt", "seed"}):
        raise ConfigError(f"batch_size={size}: records with {', '.join(sorted(own))} run one at a time; pass 1")
    return [records[start : start + size] for start in range(0, len(records), size)]
