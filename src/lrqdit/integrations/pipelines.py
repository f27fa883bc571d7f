"""Pipelines: found, checked and loaded; run one picture at a time; written whole or not at all.

Only safetensors and JSON are read. A picture depends on its own prompt and seed alone: the noise comes from a generator
on the CPU, and every picture is a batch of its own.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from lrqdit.errors import ConfigError, LrqditError, ModelError, first_line
from lrqdit.fitting.reports import CalibrationReport
from lrqdit.models import denoiser_names, registry
from lrqdit.packed import files
from lrqdit.packed.linear import DTYPES as STORED_DTYPES
from lrqdit.packed.size import measure_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_folder(source: str | Path, variant: str | None = None) -> Path:
    """The checked local folder of a pipeline; a hub id is downloaded into the hub's cache first.

    Args:
        source: a pipeline folder, or a hub id of the form ``owner/name``.
        variant: of the weight files to download, such as ``fp16``.

    Raises:
        CheckpointError: if the folder is not a pipeline, or incomplete or damaged.
        ModelError: if ``source`` is neither, or the download fails.
    """
    folder = Path(source)
    if not folder.exists():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(source)):
            raise ModelError(f"{source} is neither an existing folder nor a hub id of the form owner/name")
        try:
            folder = Path(DiffusionPipeline.download(str(source), use_safetensors=True, variant=variant))
        except Exception as error:  # the hub client and diffusers raise many kinds
            raise ModelError(
                f"{source} is no folder here and cannot be had from the hub: {first_line(error)}"
            ) from error
    files.check_pipeline_folder(folder)
    return folder


def load_pipeline(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    variant: str | None = None,
    **components: nn.Module,
) -> DiffusionPipeline:
    """Load a pipeline, original or quantized, from safetensors files only.

    Args:
        source: a pipeline folder or a hub id.
        dtype: of its float tensors, or a key of :data:`DTYPES`; see :func:`default_dtype` if None.
        device: a CUDA device if there is one, else the CPU, if None.
        variant: of the weight files, such as ``fp16``; the only one that a denoiser's folder has if None.
        components: to use instead of those of the folder.

    Raises:
        CheckpointError: if the folder is not a complete pipeline.
        ModelError: if diffusers cannot load it.
        ConfigError: for an unknown dtype or device.
    """
    device, dtype = parse_device(device), parse_dtype(dtype)
    folder = find_folder(source, variant)
    variant = variant or _only_variant(folder)
    dtype = dtype or default_dtype(stored_dtypes(folder, variant), device)
    # the base class loads optional components from the folder even where others are passed
    kind = getattr(diffusers, str(files.read_json(folder / "model_index.json").get("_class_name")), DiffusionPipeline)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch_dtype's new name is unknown to older diffusers
            pipeline = (kind if components else DiffusionPipeline).from_pretrained(
                folder, torch_dtype=dtype, variant=variant, use_safetensors=True, **components
            )
        return pipeline.to(device)
    except LrqditError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds
        raise ModelError(f"{source} cannot be loaded: {first_line(error)}") from error


def default_dtype(stored: Mapping[str, torch.dtype], device: torch.device) -> torch.dtype:
    """The dtype that a model runs in if none is asked for.

    The one that its denoiser is stored in; bfloat16 for float8, and for float32 on anything but a CPU; float32 for
    float16 on a CPU.

    Args:
        stored: by name of the component, see :func:`stored_dtypes`.
        device: where it will run.
    """
    first = sorted(stored, key=lambda name: "transformer" not in name)
    found = stored[first[0]] if first else torch.float32
    if found.itemsize == 1:
        return torch.bfloat16
    if device.type == "cpu":
        return torch.float32 if found == torch.float16 else found
    return found if found.itemsize == 2 else torch.bfloat16


def _only_variant(folder: Path) -> str | None:
    """The variant of a pipeline whose denoiser is there in no other."""
    for name in stored_denoisers(folder):
        found = {files.variant_of(path) for path in files.weight_files(folder / name)}
        if len(found) == 1:
            return found.pop()
    return None


def denoisers(pipeline: DiffusionPipeline) -> nn.ModuleDict:
    """The pipeline's modules that quantization concerns, by name."""
    return nn.ModuleDict(registry.denoisers(pipeline))


def stored_denoisers(folder: Path) -> list[str]:
    """The components of a pipeline folder that denoise."""
    return denoiser_names(files.read_json(Path(folder) / files.INDEX_FILE))


def denoiser_file_bytes(folder: Path, variant: str | None = None) -> int:
    """Bytes on disk of the denoisers' weight files in a pipeline folder, or of a single model's."""
    if not (Path(folder) / files.INDEX_FILE).exists():
        return files.weight_file_bytes(folder, variant)
    return sum(files.weight_file_bytes(Path(folder) / name, variant) for name in stored_denoisers(folder))


def stored_dtypes(folder: Path, variant: str | None = None) -> dict[str, torch.dtype]:
    """The float dtype that most elements of each component's weight files have."""
    parts = sorted(path for path in Path(folder).iterdir() if path.is_dir())
    found = {part.name: most_frequent_dtype(files.tensor_headers(part, variant)) for part in parts}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


def most_frequent_dtype(headers: Iterable[tuple[str, str, list[int]]]) -> torch.dtype | None:
    """The float dtype that most elements have of tensors given by name, safetensors dtype and shape."""
    elements: Counter[torch.dtype] = Counter()
    for _, name, shape in headers:
        dtype = STORED_DTYPES[name]
        if dtype in DTYPES.values() or (dtype.is_floating_point and dtype.itemsize == 1):
            elements[dtype] += math.prod(shape)
    return elements.most_common(1)[0][0] if elements else None


def save_quantized(pipeline: DiffusionPipeline, report: CalibrationReport, source: Path, out: Path) -> None:
    """Write a pipeline quantized from a folder; see :func:`write_quantized`."""
    write_quantized(pipeline, report, stored_dtypes(source), denoiser_file_bytes(source), out)


def write_quantized(
    target: DiffusionPipeline | nn.Module, report: CalibrationReport, dtypes: Mapping[str, torch.dtype],
    bytes_before: int, out: Path,
) -> None:  # fmt: skip
    """Write a quantized pipeline, or a diffusers model, with its calibration report, whole or not at all.

    Components are first cast back to the dtype of their files where that is narrower, so that running in float32 does
    not make the copy larger. ``report`` then gets the sizes of what is stored.

    Args:
        target: quantized in place; its dtypes may change.
        report: of its quantization; its ``size`` and ``bytes_before`` are updated.
        dtypes: of the files it was loaded from, by name of the component, or by a model's class; float8 counts as
            bfloat16.
        bytes_before: of the denoisers' files.
        out: the folder to write; its content, if any, is replaced.
    """
    for name, dtype in dtypes.items():
        module = target if isinstance(target, nn.Module) else getattr(target, name, None)
        dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
        if isinstance(module, nn.Module) and dtype.itemsize < getattr(module, "dtype", dtype).itemsize:
            module.to(dtype)
    report.size = measure_size(target if isinstance(target, nn.Module) else denoisers(target))
    report.bytes_before = bytes_before

    def write(folder: Path) -> None:
        cast(Any, target).save_pretrained(folder)  # diffusers' models are not declared as such here
        (folder / files.REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")

    files.write_folder_atomically(out, write)


def check_output_folder(folder: Path, is_overwritten: bool) -> None:
    """Raise unless a model may be written to ``folder``: it is missing or empty, or holds one to be overwritten."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; name a folder to write")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not is_overwritten:
        raise ConfigError(f"{folder} exists and is not empty; name another folder or pass --overwrite")
    config = folder / files.CONFIG_FILE
    is_model = config.is_file() and "_class_name" in files.read_json(config)
    if not is_model and not (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder} is not a pipeline folder, so it is not overwritten; remove it yourself")


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of a name, one of :data:`DTYPES`."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} is not supported; use one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    return dtype


def parse_device(device: str | torch.device | None) -> torch.device:
    """The device of a name; a CUDA device if there is one, else the CPU, if None."""
    try:
        parsed = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is not a device: {first_line(error)}") from error
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={str(device)!r}: this PyTorch sees no CUDA device; use cpu")
    return parsed
