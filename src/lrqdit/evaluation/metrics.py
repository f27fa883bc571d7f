"""How far a quantized pipeline's pictures are from the original's, on the same prompts and the same noise.

Every metric compares two :class:`~lrqdit.integrations.generation.Sample` objects; a video counts as its frames. To
add one: a function and an entry in :data:`METRICS`.
"""

import hashlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from lrqdit.errors import ModelError
from lrqdit.integrations.generation import Sample

PSNR_OF_EQUAL_PICTURES = 100.0
_LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"


def psnr(reference: Sample, candidate: Sample) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(1 / MSE) of pixels in [0, 1]; 100 for equal pictures."""
    _check_pictures(reference, candidate)
    value = peak_signal_noise_ratio(_pixels(candidate), _pixels(reference), data_range=1.0)
    return min(float(value), PSNR_OF_EQUAL_PICTURES)


def ssim(reference: Sample, candidate: Sample) -> float:
    """Structural similarity (Wang et al. 2004): a Gaussian window of 11 pixels, sigma 1.5; 1 for equal pictures."""
    _check_pictures(reference, candidate)
    value = structural_similarity_index_measure(_pixels(candidate), _pixels(reference), data_range=1.0)
    return float(value)  # type: ignore[arg-type]


def lpips(reference: Sample, candidate: Sample) -> float | None:
    """Learned perceptual distance (Zhang et al. 2018, AlexNet); None if :func:`missing_for_lpips` says why not."""
    if missing_for_lpips() is not None:
        return None
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    return float(
        learned_perceptual_image_patch_similarity(_pixels(candidate), _pixels(reference), "alex", normalize=True)
    )


def latent_error(reference: Sample, candidate: Sample) -> float:
    """||z' - z|| / ||z|| of the latents after the last denoising step; 0 for equal ones."""
    _check_shapes("latents", tuple(reference.latents.shape), tuple(candidate.latents.shape))
    a, b = reference.latents.double().numpy(), candidate.latents.double().numpy()
    return float(np.linalg.norm(b - a) / max(float(np.linalg.norm(a)), 1e-30))


METRICS: dict[str, Callable[[Sample, Sample], float | None]] = {
    "psnr": psnr,
    "ssim": ssim,
    "lpips": lpips,
    "latent_error": latent_error,
}


def missing_for_lpips() -> str | None:
    """What LPIPS lacks on this machine, or None. Nothing is ever downloaded for it."""
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    path = Path(torch.hub.get_dir()) / "checkpoints" / _LPIPS_BACKBONE
    if not path.is_file():
        return f"the AlexNet weights are not at {path} and are not downloaded"
    expected = _LPIPS_BACKBONE.rsplit("-", 1)[1].removesuffix(".pth")
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(expected):
        return f"{path} is damaged: its SHA-256 does not begin with {expected}"
    return None


def compare(references: Sequence[Sample], candidates: Sequence[Sample]) -> dict[str, Any]:
    """Measure every metric on every pair.

    Args:
        references: of the original model.
        candidates: of the quantized one, with the same prompts and seeds.

    Returns:
        ``metrics``, the mean of each metric (None where it cannot be computed); ``notes``, why not; ``pictures``, the
        values of each pair.

    Raises:
        ModelError: if the pictures differ in size or number: the models are not of one kind.
    """
    _check_shapes("pictures", (len(references),), (len(candidates),))
    pictures = [
        {"prompt": a.prompt, "seed": a.seed, **{name: _finite(metric(a, b)) for name, metric in METRICS.items()}}
        for a, b in zip(references, candidates, strict=True)
    ]
    means: dict[str, float | None] = {}
    for name in METRICS:
        values = [picture[name] for picture in pictures if picture[name] is not None]
        means[name] = math.fsum(values) / len(values) if values else None
    missing = missing_for_lpips()
    return {"metrics": means, "notes": {"lpips": missing} if missing else {}, "pictures": pictures}


def _pixels(sample: Sample) -> Tensor:
    """The frames as float32 (frames, 3, height, width) in [0, 1]."""
    arrays = [np.array(frame.convert("RGB"), dtype=np.float32) for frame in sample.frames]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def _check_pictures(reference: Sample, candidate: Sample) -> None:
    a, b = ((len(sample.frames), *sample.picture.size) for sample in (reference, candidate))
    _check_shapes("pictures", a, b)


def _check_shapes(what: str, reference: tuple[int, ...], candidate: tuple[int, ...]) -> None:
    if reference != candidate:
        raise ModelError(
            f"{what} of shapes {reference} and {candidate} cannot be compared; pass two models of one kind"
        )


def _finite(value: float | None) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if value is not None and math.isfinite(value) else None
