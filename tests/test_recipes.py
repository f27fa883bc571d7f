"""Every block of docs/RECIPES.md runs, on tiny models."""

import re
import shlex
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from test_cli import succeed
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import lrqdit

TEXT = (Path(__file__).parents[1] / "docs" / "RECIPES.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)
PRELUDE = re.findall(r"```python\n(.*?)```", SECTIONS[0], re.DOTALL)[0]
BLOCKS = [
    (section.splitlines()[0], index, language, code)
    for section in SECTIONS[1:]
    for index, (language, code) in enumerate(re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL))
]
# a machine without a GPU, small videos, and no wait for a compiler
REPLACED = {
    "fullgraph=True": 'fullgraph=True, backend="eager"',
    "torch.compile(pipe.transformer)": 'torch.compile(pipe.transformer, backend="eager")',
    '"cuda"': '"cpu"',
    "cpu_offload()": 'cpu_offload(device="cpu")',
    "480": "32",
    "832": "32",
    "81": "5",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the recipes name."""
    folder = tmp_path_factory.mktemp("recipes")
    pipeline = tiny.flux().to(torch.bfloat16)
    pipeline.save_pretrained(folder / "MODEL")
    save_file(pipeline.transformer.state_dict(), folder / "transformer.safetensors")
    lrqdit.quantize(pipeline, "w4a8", is_calibrated=False, show_progress=False)
    pipeline.save_pretrained(folder / "quantized")
    tiny.flux_controlnet().to(torch.bfloat16).save_pretrained(folder / "CONTROLNET")
    save_ip_adapter(folder, pipeline.transformer)
    for name, seed in (("lora", 1), ("other-lora", 2)):
        save_lora(folder / name, seed)
    two = tiny.wan(transformer_2=tiny.wan_transformer(), boundary_ratio=0.9)
    two.to(torch.bfloat16).save_pretrained(folder / "WAN")
    (folder / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photos" / "house.png")
    return folder


def save_lora(folder: Path, seed: int) -> None:
    model = tiny.flux_transformer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        targets = ["to_q", "to_k", "to_v", "ff.net.0.proj", "proj_mlp"]
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    diffusers.FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(model))


def save_ip_adapter(folder: Path, transformer) -> None:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    CLIPVisionModelWithProjection(vision).to(torch.bfloat16).save_pretrained(folder / "CLIP")
    CLIPImageProcessor(crop_size=32, size=32).save_pretrained(folder / "CLIP")
    adapter = {f"{part}.{name}": t for part, state in tiny.ip_adapter(transformer).items() for name, t in state.items()}
    (folder / "IP-ADAPTER").mkdir()
    save_file(adapter, folder / "IP-ADAPTER" / "ip_adapter.safetensors")


@pytest.mark.parametrize("title, index, language, code", BLOCKS, ids=[f"{b[0][4:30]}-{b[1]}" for b in BLOCKS])
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself
def test_a_recipe(title, index, language, code, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    tiny.make_flux_small(monkeypatch)
    if language == "sh":
        for line in code.splitlines():
            command, *arguments = shlex.split(line)
            assert command == "lrqdit"
            succeed(*arguments, "--device", "cpu")
        return
    assert language == "python"
    for text, other in REPLACED.items():
        code = code.replace(text, other)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`?torch_dtype", FutureWarning)  # its new name is unknown to older diffusers
        for kind in (ResourceWarning, DeprecationWarning, UserWarning):  # of torch.compile and PEFT about themselves
            warnings.simplefilter("ignore", kind)
        exec(PRELUDE + code, found := {})
    pipe = found.get("pipe")
    assert isinstance(pipe, diffusers.DiffusionPipeline)
    assert any(isinstance(layer, lrqdit.QuantLinear) for layer in pipe.transformer.modules())


def test_the_recipes_are_about_five_lines():
    lengths = {f"{title}-{index}": len(code.strip().splitlines()) for title, index, _, code in BLOCKS}
    assert max(lengths.values()) <= 9, lengths
