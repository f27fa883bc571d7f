"""lrqdit as a quantization backend of diffusers, registered when the package is imported.

``from_pretrained`` then reads folders that ``save_pretrained`` wrote, and quantizes on load without calibration::

    import lrqdit
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    DiffusionPipeline.from_pretrained("quantized-folder")
    DiffusionPipeline.from_pretrained(
        "any-folder",
        quantization_config=PipelineQuantizationConfig(quant_mapping={"transformer": lrqdit.LRQDiTConfig("w4a8")}),
    )
"""

# pyright: reportIncompatibleMethodOverride=false
# diffusers' base class states no results of its methods, or too narrow ones
import copy
import enum
import functools
import importlib
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from lrqdit.config import QuantizationConfig
from lrqdit.errors import CheckpointError, ConfigError, ModelError
from lrqdit.integrations import cards
from lrqdit.integrations.float8 import from_float8
from lrqdit.integrations.loading import make_dense, take_part
from lrqdit.kernels import cpu_attention as attention
from lrqdit.models.registry import KEPT, Treatment, plan
from lrqdit.packed import checkpoint
from lrqdit.packed.files import check_safetensors
from lrqdit.packed.format import (
    FORMAT_NAME,
    FORMAT_NAME_WITH_ADVICE,
    FORMAT_NAMES,
    FORMAT_VERSION,
    check_version,
)
from lrqdit.packed.linear import MARKER, QuantLinear


class QuantizationMethod(str, enum.Enum):
    """What diffusers asks for as ``quant_method``."""

    LRQDIT = FORMAT_NAME


class LRQDiTConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of diffusers for this backend.

    Args:
        preset: such as ``"w4a8"``, for quantization on load; together with settings as keywords
            (``mode="paper"``, ``seed=1``, ...; see :class:`lrqdit.QuantizationConfig`).
        settings, layers, format_version, quant_method: as read from a ``config.json``; not for users.
    """

    quant_method: Any  # diffusers' enumeration has its own backends alone

    def __init__(
        self,
        preset: str | None = None,
        *,
        settings: dict[str, Any] | None = None,
        layers: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = FORMAT_NAME,
        **changes: Any,
    ) -> None:
        if (preset is None) == (settings is None):
            raise ConfigError("LRQDiTConfig: pass a preset such as 'w4a8', and settings as keywords beside it")
        check_version(format_version)
        if quant_method not in FORMAT_NAMES:
            raise ConfigError(f"quant_method={quant_method!r} is not {FORMAT_NAME!r}")
        if not isinstance(settings or {}, dict) or not isinstance(layers or {}, dict):
            raise CheckpointError(
                "quantization_config: settings and layers must be JSON objects; copy the folder again"
            )
        if settings is not None and changes:
            raise CheckpointError(f"quantization_config has unknown keys: {', '.join(sorted(changes))}")
        config = (
            QuantizationConfig.from_name(preset, **changes) if preset else QuantizationConfig.from_dict(settings or {})
        )
        if preset is not None and config.average_bits is not None:
            raise ConfigError(
                "LRQDiTConfig: average_bits needs calibration; load the pipeline and call lrqdit.quantize"
            )
        self.quant_method = QuantizationMethod.LRQDIT
        self.format_version = format_version
        self.settings = config.to_dict()
        self.layers = layers or {}

    @property
    def quantization(self) -> QuantizationConfig:
        return QuantizationConfig.from_dict(self.settings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe values."""
        values = copy.deepcopy(self.__dict__)
        return {**values, "quant_method": FORMAT_NAME_WITH_ADVICE}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class LRQDiTQuantizer(DiffusersQuantizer):
    """Loads packed layers as they are; quantizes float layers one by one as diffusers reads them."""

    quantization_config: LRQDiTConfig
    requires_calibration = False
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: LRQDiTConfig, **kwargs: Any) -> None:
        # a copy: the layers are recorded in it, and a user may load two models with one configuration
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.config = quantization_config.quantization
        if kwargs.get("pre_quantized") and not quantization_config.layers:
            raise CheckpointError("the checkpoint's quantization_config lists no layers; copy the folder again")
        self.pre_quantized = bool(quantization_config.layers)  # from_single_file does not say
        self._dtype: torch.dtype | None = None
        self._plan: dict[str, Treatment] = {}  # of layers that are still to come
        self._layers: dict[str, QuantLinear] = {}  # that are being loaded

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def supports_parallel_loading(self) -> bool:
        return self.pre_quantized

    def get_cuda_warm_up_factor(self) -> int:
        return 16 // self.config.weight_bits

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self._dtype = torch_dtype
        return torch_dtype

    def update_device_map(self, device_map: Any) -> Any:
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "a model cannot be quantized while a part of it is loaded to the disk; load it without that, save it, "
                "and load the quantized folder with this device_map"
            )
        return device_map

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._header = {}
        for file in checkpoint_files:
            if str(file).endswith(".safetensors"):
                self._header |= check_safetensors(Path(file))
            elif self.pre_quantized:
                raise CheckpointError(
                    f"{file} is not a safetensors file; lrqdit reads its weights from no other format"
                )
        return [*loaded_keys, *(f"{name}.{MARKER}" for name in self.quantization_config.layers)]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Of one file: add what no file holds, the layers' markers and their copies of a shared input transform; make
        float8 tensors those that they stand for."""
        for name, layer in self._layers.items():
            if f"{name}.packed" in state_dict:
                state_dict[f"{name}.{MARKER}"] = torch.zeros(1, dtype=self._dtype or torch.float32)
            if (owner := layer.format.input_from) is not None:
                keys = layer.format.input.buffers()
                layer.copy_transform({k: state_dict[f"{owner}.{k}"] for k in keys if f"{owner}.{k}" in state_dict})
        return state_dict if self.pre_quantized else from_float8(state_dict, self._dtype or torch.bfloat16)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        return checkpoint.stored_tensors(state_dict), {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            with torch.device("meta"):
                checkpoint.allocate_layers(model, self.quantization_config.layers, torch.float32, "meta")
            self._layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
            checkpoint.check_dtypes(model, self._header)
            missing = sorted(set(checkpoint.stored_tensors(model.state_dict())) - set(self._header))
            if missing:
                raise CheckpointError(
                    f"the checkpoint of {type(model).__name__} lacks {len(missing)} tensors, the first is {missing[0]}"
                    "; it is incomplete or belongs to another model"
                )
            return
        self._plan = {name: t for name, t in plan(model, self.config).items() if t != KEPT}

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        return owner in self._plan and leaf in ("weight", "bias")

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Hold a layer's parts until all have come, then replace it by its quantized form."""
        # diffusers has cast param_value to the model's dtype; the state dict still has the original
        original = state_dict.get(param_name, param_value)
        if (quantized := take_part(model, param_name, original, self._plan, self.config)) is not None:
            quantized.answer_dtype(param_value.dtype)
            model.set_submodule(param_name.rpartition(".")[0], quantized.to(target_device))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._plan:
            raise CheckpointError(
                f"the weight of {next(iter(self._plan))} did not come: the checkpoint lacks it, or "
                "offload_state_dict=True keeps it in a file; copy the folder again, or leave that out"
            )
        if any(layer.packed.is_meta and not hasattr(layer, "_hf_hook") for layer in self._layers.values()):
            raise ConfigError(
                "offload_state_dict=True without a part of the model on the disk loads nothing in diffusers; leave it "
                "out: files are mapped into memory anyway"
            )
        checkpoint.finish_layers(model)
        attention.start()
        if self._dtype is None:  # the dtype of the layers that are stored as they were
            dtypes = {p.dtype for n, p in model.named_parameters() if p.is_floating_point() and not n.endswith(MARKER)}
            for layer in self._layers.values() if len(dtypes) == 1 else ():
                layer.answer_dtype(next(iter(dtypes)), layer.packed.device)
        self._layers = {}
        attach(model, self.config, self)
        return model

    def _dequantize(self, model: Any) -> nn.Module:
        make_dense(model)
        vars(model).pop("fuse_lora", None)
        model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if "quantization" not in k})
        model.quantization_method = None
        return model


def attach(model: Any, config: QuantizationConfig, quantizer: LRQDiTQuantizer | None = None) -> None:
    """Leave on a quantized diffusers model what its ``save_pretrained`` reads."""
    values = checkpoint.format_config(model, config.to_dict())
    if quantizer is None:
        quantizer = LRQDiTQuantizer(LRQDiTConfig(**values))
    quantizer.quantization_config.layers = values["layers"]
    model.hf_quantizer = quantizer
    model.quantization_method = QuantizationMethod.LRQDIT
    # diffusers forbids .to(dtype), .half() and .float() on a model with is_quantized; integer tensors survive them
    model.is_quantized = False
    if hasattr(model, "fuse_lora"):
        model.fuse_lora = _refuse_fusing
    # every process has loaded the same, and no backend of DistributedDataParallel broadcasts 16-bit integers
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    model._ddp_params_and_buffers_to_ignore = [
        f"{name}{below}.{key}"
        for name, layer in layers.items()
        for below in ("", ".base_layer")
        for key in layer.tensors()
    ]
    if _answer_weights not in model._state_dict_hooks.values():
        model._register_state_dict_hook(_answer_weights)
    model.register_to_config(quantization_config=quantizer.quantization_config)
    cards.install()


def _refuse_fusing(*arguments: Any, **keywords: Any) -> None:
    """What ``fuse_lora`` of a quantized model is; diffusers' own would fail in the middle."""
    raise ModelError(
        "the weights of quantized layers cannot be changed: merge adapters for good with lrqdit.fuse_lora(pipe), or "
        "keep them beside the weights"
    )


class _StateDict(OrderedDict[str, Any]):
    """A state dict in which ``<layer>.weight`` of a quantized layer is found, though not listed: loaders of LoRA files
    ask for its shape."""

    def __init__(self, values: Mapping[str, Any], module: nn.Module) -> None:
        super().__init__(values)
        self.__dict__.update(vars(values))  # its _metadata
        self._module = module

    def __missing__(self, key: str) -> Any:
        owner, _, leaf = key.rpartition(".")
        try:
            layer = self._module.get_submodule(owner)
        except AttributeError:
            raise KeyError(key) from None
        if leaf not in ("weight", "bias") or not isinstance(getattr(layer, "base_layer", layer), QuantLinear):
            raise KeyError(key)
        return getattr(layer, leaf)

    def __reduce__(self) -> tuple:  # copies and pickles are plain
        return OrderedDict, (list(self.items()),)


def _answer_weights(module: nn.Module, state_dict: Any, prefix: str, metadata: Any) -> Any:
    return _StateDict(state_dict, module) if prefix == "" else None


def check_not_quantized(model: nn.Module, name: str) -> None:
    """Raise if a model has quantized layers, ours or another backend's."""
    if any(isinstance(layer, QuantLinear) for layer in model.modules()):
        raise ModelError(f"{name} is quantized already; load the original model and quantize that")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{name} is quantized by another backend; load the original model and quantize that, or call its "
            "dequantize() first"
        )


def _name_plain_cpu() -> None:
    """diffusers' sequential offloading calls a CPU ``cpu:0``; accelerate makes plain tensors of parameters there."""
    try:
        hooks: Any = importlib.import_module("accelerate.hooks")
    except ImportError:
        return
    plain = hooks.set_module_tensor_to_device

    @functools.wraps(plain)
    def set_tensor(module: nn.Module, tensor_name: str, device: Any, *rest: Any, **keywords: Any) -> None:
        is_cpu = isinstance(device, torch.device) and device.type == "cpu"
        plain(module, tensor_name, torch.device("cpu") if is_cpu else device, *rest, **keywords)

    hooks.set_module_tensor_to_device = set_tensor


_name_plain_cpu()
for method in FORMAT_NAMES:  # typed by the entries they have
    AUTO_QUANTIZER_MAPPING[method] = LRQDiTQuantizer  # pyright: ignore[reportArgumentType]
    AUTO_QUANTIZATION_CONFIG_MAPPING[method] = LRQDiTConfig  # pyright: ignore[reportArgumentType]
if "lrqdit.integrations.transformers" in sys.modules:
    sys.modules["lrqdit.integrations.transformers"].use_config(LRQDiTConfig)
