"""What a quantized folder holds, from file headers and ``config.json`` alone: no weight is loaded."""

import math
from pathlib import Path
from typing import Any

from lrqdit.errors import CheckpointError
from lrqdit.models import denoiser_names
from lrqdit.packed import files
from lrqdit.packed.format import DTYPE_BYTES, FORMAT_NAMES, LinearFormat, check_version, is_no_matrix


def describe_folder(folder: str | Path) -> dict[str, Any]:
    """Describe a quantized pipeline or a single quantized model.

    Args:
        folder: of a pipeline, of a diffusers model, or written by :func:`lrqdit.save_checkpoint`.

    Returns:
        ``layers``, one dictionary per quantized layer; ``totals`` over all quantized models of the folder, with their
        true bits and file sizes; ``preset`` and ``settings``.

    Raises:
        CheckpointError: if a file is missing or damaged, nothing is quantized, or the files do not hold what the
            configuration claims.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; pass the folder of a quantized pipeline or model")
    parts = [folder]
    if (folder / "model_index.json").exists():
        index = files.check_pipeline_folder(folder)
        parts = [folder / name for name in denoiser_names(index)]
    found = [(part, config) for part in parts if (config := _quantization_config(part)) is not None]
    if not found:
        raise CheckpointError(f"{folder} holds no model quantized by lrqdit; write one with `lrqdit quantize`")
    report = files.read_json(folder / files.REPORT_FILE) if (folder / files.REPORT_FILE).exists() else {}
    reasons = {name: group for group in report.get("layers", []) for name in group["names"]}
    layers, parameters, unpacked, tensor_bytes = [], 0, 0, 0
    for part, config in found:
        described, count, whole, size = _describe_model(part, config["layers"], reasons)
        layers, parameters, unpacked = layers + described, parameters + count, unpacked + whole
        tensor_bytes += size
    settings = found[0][1]["settings"]
    totals = {
        "parameters": parameters,
        "unpacked_share": unpacked / max(1, parameters),
        "tensor_bytes": tensor_bytes,
        "file_bytes": sum(files.weight_file_bytes(part) for part, _ in found),
        "true_bits": 8 * tensor_bytes / max(1, parameters),
        "claimed_true_bits": report.get("size", {}).get("true_bits"),
    }
    preset = f"w{settings.get('weight_bits')}a{settings.get('activation_bits')}"
    return {"folder": str(folder), "preset": preset, "settings": settings, "totals": totals, "layers": layers}


def _quantization_config(part: Path) -> dict[str, Any] | None:
    """The configuration of a quantized model's folder, or None if it is not quantized by this package."""
    config = files.read_json(part / files.CONFIG_FILE)
    config = config.get("quantization_config") or config
    if config.get("quant_method") not in FORMAT_NAMES:
        return None
    check_version(config.get("format_version"))
    for key in ("layers", "settings"):
        if not isinstance(config.get(key), dict):
            raise CheckpointError(f"{part / files.CONFIG_FILE} has no {key!r}; copy it again")
    return config


def _describe_model(
    part: Path, formats: dict[str, dict[str, Any]], reasons: dict[str, dict[str, Any]]
) -> tuple[list[dict[str, Any]], int, int, int]:
    """Layers, original parameters, those of weights that are no matrices, and bytes of tensors of one model; checks
    every packed tensor against its format."""
    files.check_model_folder(part)
    headers = {name: (dtype, tuple(shape)) for name, dtype, shape in files.tensor_headers(part)}
    layers, parameters = [], 0
    others = dict(headers)
    for name, values in formats.items():
        layout = LinearFormat.from_dict(values)
        for leaf, (shape, dtype) in layout.buffers().items():
            if headers.get(f"{name}.{leaf}") != (dtype, shape):
                raise CheckpointError(
                    f"{part}: {name}.{leaf} should be {dtype} {list(shape)} by {files.CONFIG_FILE}, "
                    f"but the files hold {headers.get(f'{name}.{leaf}', 'no such tensor')}; copy the folder again"
                )
            del others[f"{name}.{leaf}"]
        parameters += layout.in_features * layout.out_features + (
            layout.out_features if layout.has_original_bias else 0
        )
        reason = reasons.get(name, {})
        layers.append({
            "name": name,
            "out_features": layout.out_features,
            "in_features": layout.in_features,
            "weight_bits": layout.weight_bits,
            "activation_bits": layout.input.activation_bits,
            "codebook": layout.codebook,
            "table_rows": layout.table_rows,
            "rotation": layout.input.rotation,
            "clip": layout.input.clip,
            "size_bytes": layout.size_bytes,
            "input_from": layout.input_from,
            "rms": reason.get("rms"),
            "error": reason.get("error"),
            "gain": reason.get("gain"),
        })  # fmt: skip
    parameters += sum(math.prod(shape) for _, shape in others.values())
    unpacked = sum(math.prod(shape) for _, shape in others.values() if is_no_matrix(shape))
    return layers, parameters, unpacked, sum(math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in headers.values())
