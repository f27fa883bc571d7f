"""Where a model to quantize comes from: a pipeline, a diffusers model by itself, or one file of weights and a config.

A file is safetensors, in diffusers' names or in those of the original code and of ComfyUI, or GGUF. Its weights are
made plain float tensors: GGUF's blocks and scaled float8 ones are multiplied out.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights  # pyright: ignore[reportMissingTypeStubs]
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from lrqdit.errors import CheckpointError, LrqditError, ModelError, first_line
from lrqdit.integrations import pipelines
from lrqdit.integrations.float8 import from_float8, has_scales
from lrqdit.packed import files


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        folder: of the pipeline, or of the model's ``config.json`` if there is no pipeline.
        weights: the denoiser's file or folder, if it is not that of ``folder``.
        variant: of the weight files in ``folder``.
    """

    folder: Path
    weights: Path | None = None
    variant: str | None = None

    @property
    def is_pipeline(self) -> bool:
        return (self.folder / "model_index.json").is_file()

    @property
    def component(self) -> str:
        """The name of the denoiser that ``weights`` are of."""
        return next(iter(pipelines.stored_denoisers(self.folder)), "transformer")

    @property
    def model_folder(self) -> Path:
        """Where the denoiser's ``config.json`` is."""
        return self.folder / self.component if self.is_pipeline else self.folder

    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """The float dtype that most elements of each component, or of the model by itself, are stored in."""
        found = pipelines.stored_dtypes(self.folder, self.variant) if self.is_pipeline else {}
        if not self.is_pipeline or self.weights is not None:
            name = self.component if self.is_pipeline else _model_class(self.folder).__name__
            dtype = pipelines.most_frequent_dtype(_headers(self.weights or self.folder, self.variant))
            found[name] = dtype or torch.bfloat16  # GGUF
        return found

    def file_bytes(self) -> int:
        """Bytes of the denoiser's weight files."""
        if self.weights is not None and self.weights.is_file():
            return self.weights.stat().st_size
        return pipelines.denoiser_file_bytes(self.weights or self.folder, self.variant)

    def load(
        self, dtype: torch.dtype | str | None = None, device: str | torch.device | None = None
    ) -> DiffusionPipeline | nn.Module:
        """The pipeline, or the model where there is none.

        Args:
            dtype, device: as for :func:`lrqdit.integrations.pipelines.load_pipeline`.

        Raises:
            CheckpointError: if a file is damaged, or in a format that cannot be read.
            ModelError: if diffusers cannot load it.
        """
        device = pipelines.parse_device(device)
        parsed = pipelines.parse_dtype(dtype) or pipelines.default_dtype(self.stored_dtypes(), device)
        is_scaled = has_scales(name for name, *_ in _headers(self.weights or self.model_folder, self.variant))
        if self.is_pipeline and self.weights is None and not is_scaled:
            return pipelines.load_pipeline(self.folder, parsed, device, self.variant)
        model = load_model(self.weights or self.model_folder, self.model_folder, parsed, self.variant)
        if not self.is_pipeline:
            return model.to(device)
        return pipelines.load_pipeline(self.folder, parsed, device, self.variant, **{self.component: model})


def find_source(model: str | Path, config: str | Path | None = None, variant: str | None = None) -> Source:
    """Where a model comes from.

    Args:
        model: a pipeline's folder or hub id, a diffusers model's folder, or a file of weights.
        config: the pipeline's folder or hub id, or the folder of a diffusers model's ``config.json``, that a file or
            a model's folder belongs to.
        variant: of the weight files, such as ``fp16``.

    Raises:
        CheckpointError: if a folder is incomplete or damaged.
        ModelError: if there is no such folder or file, or a file comes without ``config``.
    """
    path = Path(model)
    is_pipeline = (path / "model_index.json").is_file()
    is_model = path.is_file() or ((path / files.CONFIG_FILE).is_file() and not is_pipeline)
    if not is_model:
        if config is not None:
            raise ModelError(f"{model} is a whole pipeline; leave out --config, which a single file or model needs")
        return Source(pipelines.find_folder(path if path.exists() else model, variant), None, variant)
    if path.is_file() and config is None:
        raise ModelError(f"{path} is a file of weights; pass --config with the folder or hub id of its pipeline")
    if path.is_dir():
        files.check_model_folder(path)
    if config is None:
        return Source(path, None, variant)
    is_pipeline = (Path(config) / "model_index.json").is_file()
    if (Path(config) / files.CONFIG_FILE).is_file() and not is_pipeline:
        return Source(Path(config), path, variant)
    return Source(pipelines.find_folder(config, variant), path, variant)


def load_model(weights: Path, folder: Path, dtype: torch.dtype, variant: str | None = None) -> nn.Module:
    """A diffusers model from its folder or a file.

    Args:
        weights: a folder or a file.
        folder: of the model's ``config.json``.
        dtype: of its float tensors.
        variant: of the weight files.
    """
    kind = _model_class(folder)
    try:
        if weights.is_dir() and not has_scales(name for name, *_ in _headers(weights, variant)):
            return kind.from_pretrained(weights, torch_dtype=dtype, variant=variant, use_safetensors=True)
        state = read_state(weights, dtype, variant)
        with init_empty_weights():
            model = kind.from_config(kind.load_config(str(folder)))
        if state.keys() == model.state_dict().keys():
            kept = set(kind._keep_in_fp32_modules or ())  # as from_pretrained has it
            cast = {n: t.to(torch.float32 if kept & set(n.split(".")) else dtype) for n, t in state.items()}
            model.load_state_dict(cast, assign=True)
            return model.eval()
        if not hasattr(kind, "from_single_file"):
            raise ModelError(f"diffusers reads no single files of {kind.__name__}; pass a folder in its own format")
        return kind.from_single_file(state, config=str(folder), torch_dtype=dtype)
    except LrqditError:
        raise
    except Exception as error:  # diffusers, safetensors and torch raise many kinds
        raise ModelError(f"{weights} cannot be loaded as {kind.__name__}: {first_line(error)}") from error


def read_state(path: Path, dtype: torch.dtype, variant: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file or of a model's folder, with scales (to ``dtype``) and GGUF's blocks multiplied out.

    Raises:
        CheckpointError: if a file is damaged, or neither safetensors nor GGUF.
    """
    if path.is_dir():
        found = {name: t for file in files.weight_files(path, variant) for name, t in load_file(file).items()}
        return from_float8(found, dtype, str(path))
    if path.suffix == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise CheckpointError(f"{path}: GGUF needs the package gguf; pip install gguf")
        from diffusers.models.model_loading_utils import load_gguf_checkpoint
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        return {name: dequantize_gguf_tensor(t).to(dtype) for name, t in load_gguf_checkpoint(str(path)).items()}
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is neither .safetensors nor .gguf; convert it to safetensors, pickles are not read"
        )
    files.check_safetensors(path)
    return from_float8(load_file(path), dtype, str(path))


def _model_class(folder: Path) -> Any:
    """The class in a diffusers model's ``config.json``."""
    name = files.read_json(folder / files.CONFIG_FILE).get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin):
        raise ModelError(f"{folder / files.CONFIG_FILE} names no model class of diffusers (_class_name is {name!r})")
    return kind


def _headers(weights: Path, variant: str | None) -> list[tuple[str, str, list[int]]]:
    """Name, dtype and shape of a model's tensors; nothing for GGUF."""
    if weights.is_dir():
        return list(files.tensor_headers(weights, variant))
    if weights.suffix != ".safetensors":
        return []
    return [(name, entry["dtype"], entry["shape"]) for name, entry in files.check_safetensors(weights).items()]
