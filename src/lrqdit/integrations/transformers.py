"""lrqdit as a quantization backend of transformers, for a pipeline's text encoders.

Registered when both packages are imported. A text encoder quantized by :func:`lrqdit.quantize` is then saved and loaded
with its pipeline, and one is quantized while it loads by the ``quantization_config`` that a transformer takes, too.
"""

# pyright: reportIncompatibleMethodOverride=false
# transformers' base class states no results of its methods, or too narrow ones
import copy
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from lrqdit.errors import CheckpointError, ModelError
from lrqdit.integrations.loading import make_dense, take_part
from lrqdit.kernels import cpu_attention as attention
from lrqdit.models.registry import KEPT, Treatment, plan
from lrqdit.packed import checkpoint
from lrqdit.packed.files import check_safetensors
from lrqdit.packed.format import FORMAT_NAMES
from lrqdit.packed.linear import MARKER, QuantLinear


class LRQDiTHfQuantizer(HfQuantizer):
    """Loads packed layers as they are; quantizes float layers one by one as transformers reads them."""

    quantization_config: Any  # an LRQDiTConfig, which is diffusers'

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        # a copy: the layers are recorded in it, and a user may load two models with one configuration
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.config = quantization_config.quantization
        if self.pre_quantized and not quantization_config.layers:
            raise CheckpointError("the checkpoint's quantization_config lists no layers; copy the folder again")
        self.plan: dict[str, Treatment] = {}  # of layers that are still to come
        self._dtype: torch.dtype = torch.float32

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        self._dtype = dtype or torch.float32
        return dtype

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ModelError(
                "a text encoder with lrqdit's layers cannot be loaded onto the disk; load it to the CPU, and call "
                "enable_sequential_cpu_offload or enable_group_offload of the pipeline"
            )
        return device_map

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self.plan = {name: t for name, t in plan(model, self.config).items() if t != KEPT}
            return
        layers = self.quantization_config.layers
        with torch.device("meta"):
            checkpoint.allocate_layers(model, layers, self._dtype, "meta")
        quantized = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
        for layer in quantized:  # no parameter meanwhile: no file holds it, and it would be reported as missing
            vars(layer)[MARKER] = layer._parameters.pop(MARKER)
        wanted = Counter(leaf for layer in quantized for leaf in layer.format.buffers())
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            header = {key for file in checkpoint_files for key in check_safetensors(Path(file))}
            found = Counter(key.rpartition(".")[2] for key in header)  # a layer's name in the file may be another
            if short := [leaf for leaf in wanted if found[leaf] < wanted[leaf]]:
                raise CheckpointError(
                    f"the checkpoint of {type(model).__name__} lacks {wanted[short[0]] - found[short[0]]} of its "
                    f"{short[0]} tensors; it is incomplete or belongs to another model"
                )
        elif checkpoint_files:
            raise CheckpointError(
                f"{checkpoint_files[0]} is not a safetensors file; lrqdit reads its weights from no other format"
            )

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        return owner in self.plan and leaf in ("weight", "bias")

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.plan:
            raise CheckpointError(f"the checkpoint lacks the weight of {next(iter(self.plan))}; copy it again")
        for layer in model.modules():
            if isinstance(layer, QuantLinear) and MARKER in vars(layer):
                del vars(layer)[MARKER]
                layer.answer_dtype(self._dtype, layer.packed.device)
        checkpoint.finish_layers(model)
        attention.start()
        attach(model, self.config, self)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return checkpoint.stored_tensors(model.state_dict()), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> nn.Module:
        make_dense(model, lambda layer: layer if dtype is None else layer.to(dtype))
        return model


class _Quantize(ConversionOps):
    """Holds a layer's parts until all have come, then replaces it by its quantized form."""

    def __init__(self, quantizer: LRQDiTHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module, full_layer_name: str,
        missing_keys: set[str] | None = None, **kwargs: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        quantizer, value = self.quantizer, next(iter(input_dict.values()))
        value = value[0] if isinstance(value, list) else value
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        if (quantized := take_part(model, full_layer_name, value, quantizer.plan, quantizer.config)) is not None:
            quantized.answer_dtype(quantizer._dtype)
            model.set_submodule(full_layer_name.rpartition(".")[0], quantized.to(value.device))
        return {}


def attach(model: Any, config: Any, quantizer: LRQDiTHfQuantizer | None = None) -> None:
    """Leave on a quantized transformers model what its ``save_pretrained`` reads."""
    from lrqdit.integrations.diffusers import LRQDiTConfig

    values = checkpoint.format_config(model, config.to_dict())
    if quantizer is None:
        quantizer = LRQDiTHfQuantizer(LRQDiTConfig(**values), pre_quantized=True)
    quantizer.quantization_config.layers = values["layers"]
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config


class _Config:
    """Reads a ``quantization_config``; diffusers is not imported before there is one."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], **kwargs: Any) -> Any:
        from lrqdit.integrations.diffusers import LRQDiTConfig

        return LRQDiTConfig.from_dict(values, **kwargs)


def use_config(kind: Any) -> None:
    """Read configurations as this class; diffusers asks for the same one in both libraries."""
    for name in FORMAT_NAMES:
        AUTO_QUANTIZATION_CONFIG_MAPPING[name] = kind


for method in FORMAT_NAMES:  # typed by the entries they have
    AUTO_QUANTIZER_MAPPING[method] = LRQDiTHfQuantizer  # pyright: ignore[reportArgumentType]
use_config(getattr(sys.modules.get("lrqdit.integrations.diffusers"), "LRQDiTConfig", _Config))
