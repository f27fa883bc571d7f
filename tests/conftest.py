"""Fixtures that several test files share: a complete text-to-image pipeline of random weights, small enough to run in
milliseconds."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lrqdit.packed.format import LinearFormat

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before anything imports Triton

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel  # noqa: E402
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel  # noqa: E402

# two workers run side by side, so each has one thread; scripts/check_long asks for more (0: as many as torch takes)
if threads := int(os.environ.get("LRQDIT_TEST_THREADS", "1")):
    torch.set_num_threads(threads)


def linear_format(in_features: int, out_features: int, weight_bits: int, activation_bits: int, **rest) -> LinearFormat:
    """The format of a layer, from its values side by side as a checkpoint has them."""
    values = {"in_features": in_features, "out_features": out_features, "weight_bits": weight_bits}
    return LinearFormat.from_dict({**values, "activation_bits": activation_bits, **rest})


def dense(weight: torch.Tensor, bias: torch.Tensor | None = None) -> SimpleNamespace:
    """A linear layer as far as fitting goes."""
    return SimpleNamespace(weight=weight, bias=bias)


def build_tiny_pipeline(seed: int = 0) -> PixArtAlphaPipeline:
    """PixArt with two blocks of width 48, pictures of 32 x 32 pixels, and the classes of the embedded demo model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            cross_attention_dim=48,
            caption_channels=32,
            in_channels=4,
            out_channels=4,
            sample_size=8,
            patch_size=2,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            mid_block_add_attention=False,
            sample_size=32,
        )
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=384,
                d_model=32,
                d_kv=16,
                d_ff=48,
                num_layers=1,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                tie_word_embeddings=False,
                tokenizer_class="ByT5Tokenizer",
            )
        )
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="v_prediction"
    )
    return PixArtAlphaPipeline(ByT5Tokenizer(), text_encoder.eval(), vae.eval(), transformer.eval(), scheduler)


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline (float32); read it, or copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    build_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of_pipeline(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that a test may damage."""
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "copy"))


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Change keys of a JSON file in place; None removes a key."""

    def edit(path: Path, **changes: object) -> None:
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit
