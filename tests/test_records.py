"""Calibration with pictures: records of prompts and files, in Python and by the command line."""

import functools
import inspect
import json
import logging
import re
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from diffusers.pipelines.wan import pipeline_wan_i2v, pipeline_wan_video2video
from PIL import Image
from test_cli import fail, picture_size, succeed

import lrqdit
from lrqdit.errors import ConfigError, ModelError
from lrqdit.integrations import records
from lrqdit.integrations.records import picture_arguments, read_records

KONTEXT = {**tiny.FLUX_CALL, "max_area": 1024, "_auto_resize": False}
PIPELINES = {  # name: how to build it, its call, its pictures
    "FluxImg2ImgPipeline": (tiny.flux, {}, tiny.FLUX_CALL, ["image"]),
    "FluxInpaintPipeline": (tiny.flux, {}, tiny.FLUX_CALL, ["image", "mask_image"]),
    "FluxKontextPipeline": (tiny.flux, {}, KONTEXT, ["image"]),
    "FluxControlNetPipeline": (tiny.flux, {"controlnet": tiny.flux_controlnet}, tiny.FLUX_CALL, ["control_image"]),
    "StableDiffusion3Img2ImgPipeline": (tiny.sd3, {}, tiny.SD3_CALL, ["image"]),
    "WanImageToVideoPipeline": (
        tiny.wan, {"transformer": lambda: tiny.wan_transformer(12)}, tiny.WAN_CALL, ["image"],
    ),
    "LTXImageToVideoPipeline": (tiny.ltx, {}, tiny.LTX_CALL, ["image"]),
    "CogVideoXImageToVideoPipeline": (tiny.cogvideox, {"in_channels": lambda: 8}, tiny.COGVIDEOX_CALL, ["image"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def plain_texts(monkeypatch):
    """Wan's image-to-video pipeline cleans its texts by a package that is not needed here."""
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=str), raising=False)


def build(name: str) -> tuple[Any, dict[str, Any], list[str]]:
    make, parts, call, pictures = PIPELINES[name]
    return make(getattr(diffusers, name), **{key: part() for key, part in parts.items()}), call, pictures


def noise(seed: int, size: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def pictures(tmp_path):
    """Four files, and their paths relative to the folder."""
    (tmp_path / "photos").mkdir()
    for seed in range(4):
        noise(seed).save(tmp_path / "photos" / f"{seed}.png")
    return [f"photos/{seed}.png" for seed in range(4)]


def write(tmp_path, *records) -> Any:
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(["# a comment", "", *map(json.dumps, records)]), encoding="utf-8")
    return file


@pytest.fixture
def calls(monkeypatch):
    """What pipelines are called with."""
    seen: list[dict[str, Any]] = []

    def watch(kind):
        plain = kind.__call__

        @functools.wraps(plain)
        def call(self, **keywords):
            seen.append(keywords)
            return plain(self, **keywords)

        monkeypatch.setattr(kind, "__call__", call)
        return seen

    return watch


@pytest.mark.parametrize("name", PIPELINES)
def test_every_record_brings_its_own_pictures(name, tmp_path, pictures, calls):
    pipeline, call, names = build(name)
    given = [{"prompt": f"number {i}", **dict.fromkeys(names, path), "seed": i} for i, path in enumerate(pictures)]
    seen = calls(type(pipeline))
    found = lrqdit.observe(
        pipeline, prompts=read_records(write(tmp_path, *given)), steps=3, arguments=call, show_progress=False
    )
    assert [keywords["prompt"] for keywords in seen] == [f"number {i}" for i in range(4)]
    for index, keywords in enumerate(seen):
        assert keywords["generator"].initial_seed() == index and "seed" not in keywords
        assert all(np.array_equal(keywords[key], noise(index)) for key in names)
    # the statistics are those of the pictures
    same = [{"prompt": f"number {i}", **dict.fromkeys(names, noise(0)), "seed": i} for i in range(4)]
    other = lrqdit.observe(pipeline, prompts=same, steps=3, arguments=call, show_progress=False)
    maxima = [[group.stats.channel_maximum for group in one["transformer"].groups] for one in (found, other)]
    assert any(not np.array_equal(a, b) for a, b in zip(*maxima, strict=True))


@pytest.mark.parametrize("name", PIPELINES)
def test_quantized_with_pictures_it_makes_nearly_the_same(name, pictures, tmp_path):
    pipeline, call, names = build(name)
    prompts = [{"prompt": "a fox", **{key: tmp_path / path for key in names}} for path in pictures]

    def run():
        given = {"prompt": "a dog", "output_type": "latent", "num_inference_steps": 4, **call}
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        return pipeline(**given, **dict.fromkeys(names, noise(9)), generator=generator, return_dict=False)[0]

    exact = run()
    lrqdit.quantize(pipeline, "w4a8", prompts=prompts, steps=4, arguments=call, show_progress=False)
    assert 0 < float((run() - exact).norm() / exact.norm()) < 0.15


@pytest.mark.parametrize("name", sorted(set(PIPELINES) - {"FluxKontextPipeline"}))
def test_a_missing_picture_is_refused_before_anything_runs(name):
    pipeline, call, names = build(name)
    pipeline.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    pipeline.vae.register_forward_pre_hook(lambda *_: pytest.fail("the decoder ran"))
    pattern = f"{name} needs {names[0]}: give every record a picture .*--calibration FILE"
    with pytest.raises(ModelError, match=pattern):
        lrqdit.quantize(pipeline, "w4a8", steps=2, arguments=call, show_progress=False)
    with pytest.raises(ModelError, match=r"prompts\[1\]: .* needs"):
        prompts = [{"prompt": "a", **dict.fromkeys(names, noise(0))}, "b"]
        lrqdit.quantize(pipeline, "w4a8", prompts=prompts, steps=2, arguments=call, show_progress=False)


@pytest.mark.parametrize("is_given", [False, True])
def test_a_pipeline_that_can_do_without_pictures_says_what_it_is_calibrated_for(is_given, caplog):
    pipeline, call, _ = build("FluxKontextPipeline")
    prompts = [{"prompt": "a fox", "image": noise(0)}] if is_given else ["a fox"]
    with caplog.at_level(logging.WARNING, "lrqdit"):
        lrqdit.quantize(pipeline, "w4a8", prompts=prompts, steps=2, arguments=call, show_progress=False)
    found = [record.getMessage() for record in caplog.records if "text to image only" in record.getMessage()]
    assert len(found) == (0 if is_given else 1) and all("(image)" in text for text in found)


def test_a_class_that_passes_its_keywords_on_takes_the_same():
    class Mine(diffusers.FluxImg2ImgPipeline):
        def __call__(self, *arguments, **keywords):
            return super().__call__(*arguments, **keywords)

    pipeline = tiny.flux(Mine)
    with pytest.raises(ModelError, match="Mine needs image"):
        lrqdit.observe(pipeline, prompts=["a"], steps=2, arguments=tiny.FLUX_CALL, show_progress=False)
    prompts = [{"prompt": "a", "image": noise(0)}]
    assert lrqdit.observe(pipeline, prompts=prompts, steps=2, arguments=tiny.FLUX_CALL, show_progress=False)


def test_a_pipeline_of_texts_is_warned_of_nothing(caplog):
    with caplog.at_level(logging.WARNING, "lrqdit"):
        lrqdit.observe(tiny.flux(), prompts=["a"], steps=2, arguments=tiny.FLUX_CALL, show_progress=False)
    assert "text to image only" not in caplog.text


def all_pipelines() -> list[Any]:
    """Classes of pipelines with a transformer."""
    found = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")]
    kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)]
    return [kind for kind in kinds if "transformer" in inspect.signature(kind.__init__).parameters]


@pytest.mark.parametrize("kind", all_pipelines(), ids=lambda kind: kind.__name__)
def test_pictures_are_told_by_the_names_of_arguments(kind):
    """Arguments whose type is a picture's are found, and of the others only masks and tensors of pixels."""
    pipeline = object.__new__(kind)
    found = picture_arguments(pipeline)
    for name, parameter in inspect.signature(kind.__call__).parameters.items():
        is_typed = re.search(r"PipelineImageInput|Image\.Image|ImageInput", str(parameter.annotation)) is not None
        if is_typed and not re.search("ip_adapter|conditions|latents|controls", name):
            assert name in found
        if name in found:
            assert is_typed or re.search("Tensor|Any|_empty|ndarray", str(parameter.annotation)), parameter


def test_a_list_gives_several_pictures(tmp_path, pictures, calls):
    pipeline = tiny.flux(diffusers.FluxKontextPipeline)
    seen = calls(diffusers.FluxKontextPipeline)
    record = {"prompt": "a fox", "image": pictures[:1], "negative_prompt": "a dog", "true_cfg_scale": 2.0}
    lrqdit.observe(
        pipeline, prompts=read_records(write(tmp_path, record)), steps=2, arguments=KONTEXT, show_progress=False
    )
    assert [type(value) for value in seen[0]["image"]] == [Image.Image]
    assert seen[0]["negative_prompt"] == "a dog" and seen[0]["true_cfg_scale"] == 2.0


def test_qwen_image_edit(monkeypatch, tmp_path, pictures, calls):
    pipeline = tiny.qwen_image_edit(monkeypatch)
    with pytest.raises(ModelError, match="QwenImageEditPipeline needs image"):
        lrqdit.quantize(pipeline, prompts=["make it snow"], show_progress=False)

    def draw():
        pipeline.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        return pipeline(prompt="make it rain", image=noise(9), **call).images

    exact, seen = draw(), calls(diffusers.QwenImageEditPipeline)
    prompts = read_records(write(tmp_path, *({"prompt": "make it snow", "image": path} for path in pictures)))
    lrqdit.quantize(pipeline, "w4a8", prompts=prompts, steps=4, show_progress=False)
    assert all(np.array_equal(call["image"], noise(index)) for index, call in enumerate(seen)) and len(seen) == 4
    assert 0 < float((draw() - exact).norm() / exact.norm()) < 0.15


@pytest.mark.parametrize("is_one_file", [True, False])
def test_a_video_is_a_file_or_a_list_of_frames(is_one_file, tmp_path, calls, monkeypatch):
    frames = [noise(i) for i in range(5)]
    for index, frame in enumerate(frames):
        frame.save(tmp_path / f"{index}.png")
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(pipeline_wan_video2video, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    pipeline = tiny.wan(diffusers.WanVideoToVideoPipeline)
    seen = calls(diffusers.WanVideoToVideoPipeline)
    video = "clip.gif" if is_one_file else [f"{index}.png" for index in range(5)]
    call = {"height": 32, "width": 32, "max_sequence_length": 16}
    file = write(tmp_path, {"prompt": "a fox", "video": video})
    lrqdit.observe(pipeline, prompts=read_records(file), steps=3, arguments=call, show_progress=False)
    found = seen[0]["video"]
    assert [(frame.mode, frame.size) for frame in found] == [("RGB", (32, 32))] * 5
    if not is_one_file:  # a GIF has 256 colours
        assert all(np.array_equal(one, two) for one, two in zip(found, frames, strict=True))
    with pytest.raises(ModelError, match="WanVideoToVideoPipeline needs video"):
        lrqdit.observe(pipeline, prompts=["a fox"], steps=3, arguments=call, show_progress=False)


def test_a_video_that_needs_another_package_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"")
    monkeypatch.setattr(records.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="clip.mp4' needs imageio .* or give a list of frames"):
        read_records(write(tmp_path, {"prompt": "a", "video": "clip.mp4"}))


@pytest.mark.parametrize(
    "lines, message",
    [
        ([{"image": "photos/0.png"}], "line 3 is neither a text nor a record with a text under prompt"),
        ([{"prompt": 3}], "line 3 is neither"),
        ([["a fox"]], "line 3 is neither"),
        ([{"prompt": "a", "image": "photos/9.png"}], "image='photos/9.png' cannot be read as a picture"),
        ([{"prompt": "a", "image": "records.jsonl"}], "cannot be read as a picture"),
        ([{"prompt": "a", "seed": "three"}], "seed='three' is not a whole number"),
        ([{"prompt": "a"}, "b"], "line 4 is neither"),
    ],
)
def test_bad_records_are_named(lines, message, tmp_path, pictures):
    file = write(tmp_path, *lines)
    if not isinstance(lines[0], dict):
        file.write_text('{"prompt": "a"}\n\n["a fox"]')
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_records(file)


def test_other_bad_records(tmp_path):
    (tmp_path / "half.jsonl").write_text('{"prompt": "a"}\n{"prompt": ')
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        read_records(tmp_path / "half.jsonl")
    with pytest.raises(ModelError, match=r"prompts\[0\]: FluxPipeline takes no image; it takes no pictures"):
        lrqdit.quantize(tiny.flux(), prompts=[{"prompt": "a", "image": noise(0)}], show_progress=False)
    with pytest.raises(ModelError, match=r"takes no picture; the pictures it takes are image, mask_image"):
        prompts = [{"prompt": "a", "picture": noise(0), "image": noise(0), "mask_image": noise(0)}]
        lrqdit.quantize(tiny.flux(diffusers.FluxInpaintPipeline), prompts=prompts, show_progress=False)
    with pytest.raises(ConfigError, match="records with height run one at a time"):
        lrqdit.observe(tiny.flux(), prompts=[{"prompt": "a", "height": 32}] * 2, batch_size=2, show_progress=False)


def test_batches_several_pictures_a_prompt_other_sizes_and_callbacks():
    pipeline, seen = tiny.flux(), []
    call = {
        **tiny.FLUX_CALL, "num_images_per_prompt": 2,
        "callback_on_step_end": lambda _pipeline, step, _time, values: seen.append(step) or values,
    }  # fmt: skip
    lrqdit.observe(pipeline, prompts=["a", "b", "c"], steps=2, arguments=call, batch_size=2, show_progress=False)
    assert seen == [0, 1, 0, 1]
    sizes = [{"prompt": "a", "height": 32, "width": 48}, {"prompt": "b", "height": 48, "width": 16}]
    report = lrqdit.quantize(
        pipeline, "w4a8", prompts=sizes, steps=2, arguments={"max_sequence_length": 16}, show_progress=False
    )
    assert report.groups


def resumed(pipeline, folder, caplog, **keywords) -> bool:
    """Whether a run reused the calibration in its folder."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lrqdit"):
        lrqdit.quantize(pipeline, "w4a8", steps=2, resume_folder=folder, show_progress=False, **keywords)
    return "starts again" not in caplog.text


def test_a_run_resumes_with_the_same_pictures_alone(tmp_path, pictures, caplog):
    def run(arguments):
        prompts = [{"prompt": "a", "image": tmp_path / pictures[0]}]
        pipeline = tiny.flux(diffusers.FluxImg2ImgPipeline)
        return resumed(pipeline, tmp_path / "run", caplog, prompts=prompts, arguments={**tiny.FLUX_CALL, **arguments})

    latents = torch.zeros(1, 64, 16)
    assert run({}) and run({})
    noise(7).save(tmp_path / pictures[0])
    assert not run({})
    assert not run({"latents": latents}) and run({"latents": latents.clone()})
    latents[0, 32, 8] = 1e-3
    assert not run({"latents": latents})


def test_pictures_among_arguments_are_compared(tmp_path, caplog):
    def run(picture):
        pipeline = tiny.flux(diffusers.FluxImg2ImgPipeline)
        call = {**tiny.FLUX_CALL, "image": picture}
        return resumed(pipeline, tmp_path / "run", caplog, prompts=["a"], arguments=call)

    changed = noise(0)
    changed.putpixel((16, 16), (1, 2, 3))
    assert run(noise(0)) and run(noise(0)) and not run(changed)
    with pytest.raises(ConfigError, match="resume_folder: arguments holds a function, which cannot be compared"):
        call = {**tiny.FLUX_CALL, "callback_on_step_end": lambda *values: values[-1]}
        resumed(tiny.flux(), tmp_path / "run", caplog, prompts=["a"], arguments=call)


def test_the_command_line_takes_records(tmp_path, pictures):
    tiny.flux(diffusers.FluxImg2ImgPipeline).save_pretrained(tmp_path / "model")
    command = ["quantize", tmp_path / "model", "--steps", 2, "--device", "cpu", "--out", tmp_path / "out"]
    assert "needs image" in fail(*command)
    call = {**tiny.FLUX_CALL, "strength": 1.0}
    file = write(tmp_path, *({"prompt": "a fox", "image": path, **call} for path in pictures[:2]))
    summary = json.loads(succeed(*command, "--calibration", file, "--json"))
    assert summary["true_bits"] < 8
    compared = ["evaluate", tmp_path / "model", tmp_path / "out", "--prompts", file, "--out", tmp_path / "report"]
    assert json.loads(succeed(*compared, "--steps", 2, "--json"))["images"] == 2
    shown = ["generate", tmp_path / "out", "a fox", "--image", tmp_path / pictures[0], "--out", tmp_path / "a.png"]
    succeed(*shown, "--steps", 2, "--height", 32, "--width", 32)
    assert picture_size(tmp_path / "a.png") == (32, 32)
