"""What people use beside a quantized transformer: step caches, attention backends, ControlNet, IP-Adapter, PAG."""

from typing import Any

import diffusers
import pytest
import tiny_pipelines as tiny
import torch
from diffusers.hooks import apply_first_block_cache

import lrqdit
from lrqdit.errors import ModelError
from lrqdit.packed.linear import QuantLinear

STEPS = 6


def run(pipeline, **arguments: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    call = {**tiny.FLUX_CALL, "num_inference_steps": STEPS, "output_type": "latent", **arguments}
    return pipeline("a fox", generator=torch.Generator().manual_seed(3), return_dict=False, **call)[0]


def calibrate(pipeline, preset: str = "w4a8", prompts: Any = ("a fox", "a dog"), **settings: Any) -> Any:
    return lrqdit.quantize(
        pipeline, preset, prompts=list(prompts), steps=STEPS, arguments=tiny.FLUX_CALL, show_progress=False, **settings
    )


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


CACHES = {
    "FirstBlockCache": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.5),
    "PyramidAttentionBroadcast": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "FasterCache": lambda pipe: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1000),
        current_timestep_callback=lambda: pipe.current_timestep, is_guidance_distilled=True, tensor_format="BCHW",
    ),
    "TaylorSeer": lambda pipe: diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, sensitivity", [*((name, "gradient") for name in CACHES), ("FirstBlockCache", "measured")]
)
def test_a_step_cache_is_off_during_calibration_alone(name, sensitivity):
    plain, cached = (
        tiny.flux(transformer=tiny.flux_transformer(2, 2)),
        tiny.flux(transformer=tiny.flux_transformer(2, 2)),
    )
    cached.transformer.load_state_dict(plain.transformer.state_dict())
    config = CACHES[name](cached)
    cached.transformer.enable_cache(config)
    calibrate(plain, sensitivity=sensitivity)
    calibrate(cached, sensitivity=sensitivity)
    assert cached.transformer._cache_config is config
    one, two = state(plain.transformer), state(cached.transformer)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    # on again, in the new layers: the same as switched on after quantization
    plain.transformer.enable_cache(CACHES[name](plain))
    with_cache = run(plain)
    assert torch.equal(run(cached), with_cache)
    cached.transformer.disable_cache()
    assert not torch.equal(run(cached), with_cache)


def test_a_step_cache_stays_when_quantization_fails():
    pipeline = tiny.flux()
    pipeline.transformer.enable_cache(CACHES["FirstBlockCache"](pipeline))
    with pytest.raises(RuntimeError, match="on purpose"):
        lrqdit.quantize(pipeline, forward_loop=lambda _: (_ for _ in ()).throw(RuntimeError("on purpose")))
    assert pipeline.transformer.is_cache_enabled and run(pipeline).isfinite().all()


def test_a_step_cache_applied_by_hand_is_named():
    pipeline = tiny.flux()
    apply_first_block_cache(pipeline.transformer, diffusers.FirstBlockCacheConfig(threshold=0.5))
    with pytest.raises(ModelError, match="has a step cache .* load the model again, and use model.enable_cache"):
        calibrate(pipeline)


def test_attention_backends():
    pipeline = tiny.flux()
    pipeline.transformer.set_attention_backend("_native_math")
    exact = run(pipeline)
    calibrate(pipeline)
    found = run(pipeline)
    assert 0 < relative(found, exact) < 0.15
    pipeline.transformer.set_attention_backend("native")
    assert relative(run(pipeline), found) < 1e-2
    pipeline.transformer.reset_attention_backend()
    assert relative(run(pipeline), found) < 1e-2


def noise(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself
def test_a_control_net_beside_it(tmp_path):
    pipeline = tiny.flux(diffusers.FluxControlNetPipeline, controlnet=tiny.flux_controlnet())
    exact = run(pipeline, control_image=noise(0), controlnet_conditioning_scale=0.5)
    other = run(pipeline, control_image=noise(1), controlnet_conditioning_scale=0.5)
    prompts = [{"prompt": "a fox", "control_image": noise(0), "controlnet_conditioning_scale": 0.5}]
    calibrate(pipeline, prompts=prompts)
    assert not any(isinstance(layer, QuantLinear) for layer in pipeline.controlnet.modules())
    found = run(pipeline, control_image=noise(0), controlnet_conditioning_scale=0.5)
    assert 0 < relative(found, exact) < min(0.15, relative(other, exact))
    # the transformer alone is taken on into another pipeline
    text_to_image = diffusers.FluxPipeline.from_pipe(pipeline)
    assert text_to_image.transformer is pipeline.transformer and run(text_to_image).isfinite().all()
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.FluxControlNetPipeline.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, control_image=noise(0), controlnet_conditioning_scale=0.5), found)


def test_from_pipe_shares_the_quantized_transformer():
    pipeline = tiny.flux()
    calibrate(pipeline)
    found = run(pipeline)
    other = diffusers.FluxImg2ImgPipeline.from_pipe(pipeline)
    assert run(other, image=noise(0), strength=0.5).isfinite().all()
    assert torch.equal(run(diffusers.FluxPipeline.from_pipe(other)), found)


def load_ip_adapter(pipeline) -> None:
    """One of random weights, as load_ip_adapter leaves it."""
    pipeline.transformer._load_ip_adapter_weights([tiny.ip_adapter(pipeline.transformer)])


EMBEDS = {
    "ip_adapter_image_embeds": [torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(8))],
    "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 32)],
}


@pytest.mark.parametrize("is_first", [True, False])
def test_an_ip_adapter_before_and_after(is_first, tmp_path):
    exact = tiny.flux()
    plain = run(exact)
    load_ip_adapter(exact)
    wanted = run(exact, **EMBEDS)
    assert relative(wanted, plain) > 0.01
    pipeline = tiny.flux()
    if is_first:
        load_ip_adapter(pipeline)
        with pytest.raises(ModelError, match="FluxPipeline needs ip_adapter_image"):
            calibrate(pipeline)
        calibrate(pipeline, prompts=[{"prompt": text, **EMBEDS} for text in ("a fox", "a dog")])
    else:
        calibrate(pipeline)
        load_ip_adapter(pipeline)
    found = run(pipeline, **EMBEDS)
    assert relative(found, wanted) < 0.15
    layers = [name for name, layer in pipeline.transformer.named_modules() if isinstance(layer, QuantLinear)]
    assert layers and not any("ip" in name.split(".")[-2:] or "encoder_hid_proj" in name for name in layers)
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.FluxPipeline.from_pretrained(tmp_path)
    load_ip_adapter(loaded)
    assert torch.equal(run(loaded, **EMBEDS), found)


def test_perturbed_attention_guidance():
    pipeline = tiny.sd3(diffusers.StableDiffusion3PAGPipeline, pag_applied_layers=["blocks.1"])
    call = {**tiny.SD3_CALL, "num_inference_steps": STEPS, "output_type": "latent", "pag_scale": 0.7}

    def draw() -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline("a fox", generator=torch.Generator().manual_seed(3), return_dict=False, **call)[0]

    exact = draw()
    arguments = {**tiny.SD3_CALL, "pag_scale": 0.7}
    lrqdit.quantize(pipeline, prompts=["a fox", "a dog"], steps=STEPS, arguments=arguments, show_progress=False)
    assert 0 < relative(draw(), exact) < 0.15
