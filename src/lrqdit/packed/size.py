"""Honest bits: everything a quantized model stores, divided by the number of its parameters."""

from dataclasses import asdict, dataclass

from torch import nn

from lrqdit.packed.checkpoint import stored_tensors
from lrqdit.packed.format import is_no_matrix
from lrqdit.packed.linear import QuantLinear


@dataclass(frozen=True)
class SizeReport:
    """Storage of a model in bits per original parameter.

    Args:
        parameters: parameters of the original model: every weight and bias, low-bit or kept.
        size_bytes: bytes of the state dict, as a checkpoint stores it.
        code_bits, side_bits, kept_bits: what packed codes (padding included), the quantized layers' tables, scales,
            biases and input transforms, and everything outside quantized layers add to ``true_bits``.
        low_bit_share: share of the parameters that lies in layers below 8 bits.
        unpacked_share: share of the parameters in weights that stay as they are because they are no matrices.
    """

    parameters: int
    size_bytes: int
    code_bits: float
    side_bits: float
    kept_bits: float
    low_bit_share: float
    unpacked_share: float = 0.0

    @property
    def true_bits(self) -> float:
        """Average bits per parameter over the whole model."""
        return 8 * self.size_bytes / self.parameters

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "true_bits": self.true_bits}


def measure_size(module: nn.Module) -> SizeReport:
    """Count what ``module.state_dict()`` stores, quantized layers and all others together."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantLinear)}
    parameters = low_bit = unpacked = code_bytes = side_bytes = kept_bytes = 0
    for layer in layers.values():
        # a bias that only centring created is storage, not a parameter of the original
        weights = layer.in_features * layer.out_features
        parameters += weights + (layer.out_features if layer.format.has_original_bias else 0)
        low_bit += weights if layer.format.weight_bits < 8 else 0
    for key, tensor in stored_tensors(module.state_dict()).items():
        owner, _, leaf = key.rpartition(".")
        size = tensor.numel() * tensor.element_size()
        if owner not in layers:
            parameters += tensor.numel()
            kept_bytes += size
            unpacked += tensor.numel() if is_no_matrix(tensor.shape) else 0
        elif leaf == "packed":
            code_bytes += size
        else:
            side_bytes += size
    parameters = max(1, parameters)
    return SizeReport(
        parameters=parameters,
        size_bytes=code_bytes + side_bytes + kept_bytes,
        code_bits=8 * code_bytes / parameters,
        side_bits=8 * side_bytes / parameters,
        kept_bits=8 * kept_bytes / parameters,
        low_bit_share=low_bit / parameters,
        unpacked_share=unpacked / parameters,
    )
