"""Float8 checkpoints: plain ones, and scaled ones such as ComfyUI's, with a weight's scale in a tensor beside it.

Who ignores the scales loads weights that are wrong by a factor each.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lrqdit.errors import CheckpointError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".scale_weight", ".weight_scale")  # of a float8 weight: ComfyUI's first names, and the later ones
BESIDE_SCALES = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")  # of inputs, and marks


def has_scales(names: Iterable[str]) -> bool:
    """Whether some weights are stored in float8 with a scale beside them, by the names of a model's tensors."""
    return any(name.endswith(SCALES) for name in names)


def from_float8(state: dict[str, Tensor], dtype: torch.dtype, where: str = "the checkpoint") -> dict[str, Tensor]:
    """A state dict whose float8 tensors are in another dtype, multiplied by their scales; itself if it has neither.

    Args:
        state: tensors by name. A scale is that of a whole weight, or there is one for each of its rows.
        dtype: of what was float8.
        where: for messages.

    Raises:
        CheckpointError: for a scale beside anything but a float8 weight, such as one of 4 bits, or of another shape.
    """
    if not has_scales(state) and not any(tensor.dtype in FLOAT8 for tensor in state.values()):
        return state
    found: dict[str, Tensor] = {}
    scales = {
        name.removesuffix(suffix) + ".weight": name for name in state for suffix in SCALES if name.endswith(suffix)
    }
    for name, tensor in state.items():
        if name in scales:
            scale = state[scales[name]].float()
            if tensor.dtype not in FLOAT8 or scale.numel() not in (1, len(tensor)) or f"{scales[name]}_2" in state:
                raise CheckpointError(
                    f"{where}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)} with a scale of shape "
                    f"{tuple(scale.shape)}; only float8 weights with one scale, or one for each row, are read; "
                    "quantize the original model"
                )
            by_row = scale.reshape(-1, *([1] * (tensor.ndim - 1)))
            found[name] = (tensor.float() * by_row).to(dtype)
        elif not name.endswith((*SCALES, *BESIDE_SCALES)):
            found[name] = tensor.to(dtype) if tensor.dtype in FLOAT8 else tensor
    if missing := sorted(set(scales) - set(state)):
        raise CheckpointError(
            f"{where}: {scales[missing[0]]} is the scale of no weight; it is in a format that is not read"
        )
    return found
