"""Pipelines: found, checked and loaded; run one picture at a time; written whole or not at all.

Only safetensors and JSON are read. A picture depends on its own prompt and seed alone: the noise comes from a generator
on the CPU, and every picture is a batch of its own.
"""

import json
import math
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from lrqdit.errors import ConfigError, LrqditError, ModelError, first_line
from lrqdit.fitting.reports import CalibrationReport
from lrqdit.models import PIPELINE_COMPONENTS, registry
from lrqdit.packed import files
from lrqdit.packed.linear import DTYPES as STORED_DTYPES
from lrqdit.packed.size import measure_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_folder(source: str | Path) -> Path:
    """The checked local folder of a pipeline; a hub id is downloaded into the hub's cache first.

    Args:
        source: a pipeline folder, or a hub id of the form ``owner/name``.

    Raises:
        CheckpointError: if the folder is not a pipeline, or incomplete or damaged.
        ModelError: if ``source`` is neither, or the download fails.
    """
    folder = Path(source)
    if not folder.exists():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(source)):
            raise ModelError(f"{source} is neither an existing folder nor a hub id of the form owner/name")
        try:
            folder = Path(DiffusionPipeline.download(str(source), use_safetensors=True))
        except Exception as error:  # the hub client and diffusers raise many kinds
            raise ModelError(
                f"{source} is no folder here and cannot be had from the hub: {first_line(error)}"
            ) from error
    files.check_pipeline_folder(folder)
    return folder


def load_pipeline(
    source: str | Path, dtype: torch.dtype | str | None = None, device: str | torch.device | None = None
) -> DiffusionPipeline:
    """Load a pipeline, original or quantized, from safetensors files only.

    Args:
        source: a pipeline folder or a hub id.
        dtype: of its float tensors, or a key of :data:`DTYPES`; float32 on a CPU and bfloat16 elsewhere if None.
        device: a CUDA device if there is one, else the CPU, if None.

    Raises:
        CheckpointError: if the folder is not a complete pipeline.
        ModelError: if diffusers cannot load it.
        ConfigError: for an unknown dtype or device.
    """
    device, dtype = parse_device(device), _parse_dtype(dtype)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    folder = find_folder(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch_dtype's new name is unknown to older diffusers
            pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
        return pipeline.to(device)
    except LrqditError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds
        raise ModelError(f"{source} cannot be loaded: {first_line(error)}") from error


def denoisers(pipeline: DiffusionPipeline) -> nn.ModuleDict:
    """The pipeline's modules that quantization concerns, by name."""
    return nn.ModuleDict(registry.denoisers(pipeline))


def denoiser_file_bytes(folder: Path) -> int:
    """Bytes on disk of the denoisers' weight files in a pipeline folder."""
    return sum(files.weight_file_bytes(Path(folder) / name) for name in PIPELINE_COMPONENTS)


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The float dtype that most elements of each component's weight files have."""
    found = {}
    for part in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        elements: Counter[str] = Counter()
        for _, dtype, shape in files.tensor_headers(part):
            elements[dtype] += math.prod(shape)
        known = [STORED_DTYPES[name] for name, _ in elements.most_common() if STORED_DTYPES[name] in DTYPES.values()]
        if known:
            found[part.name] = known[0]
    return found


def save_quantized(pipeline: DiffusionPipeline, report: CalibrationReport, source: Path, out: Path) -> None:
    """Write a quantized pipeline with its calibration report, whole or not at all.

    Components are first cast back to the dtype of their files in ``source`` where that is narrower, so that running in
    float32 does not make the copy larger. ``report`` then gets the sizes of what is stored.

    Args:
        pipeline: quantized in place; its dtypes may change.
        report: of its quantization; its ``size`` and ``bytes_before`` are updated.
        source: the folder the pipeline was loaded from.
        out: the folder to write; its content, if any, is replaced.
    """
    for name, dtype in stored_dtypes(source).items():
        module = getattr(pipeline, name, None)
        if isinstance(module, nn.Module) and dtype.itemsize < getattr(module, "dtype", dtype).itemsize:
            module.to(dtype)
    report.size, report.bytes_before = measure_size(denoisers(pipeline)), denoiser_file_bytes(source)

    def write(folder: Path) -> None:
        pipeline.save_pretrained(folder)
        (folder / files.REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")

    files.write_folder_atomically(out, write)


def check_output_folder(folder: Path, is_overwritten: bool) -> None:
    """Raise unless a pipeline may be written to ``folder``: it is missing or empty, or a pipeline to be overwritten."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; name a folder to write")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not is_overwritten:
        raise ConfigError(f"{folder} exists and is not empty; name another folder or pass --overwrite")
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder} is not a pipeline folder, so it is not overwritten; remove it yourself")


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
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
