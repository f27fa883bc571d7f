import copy
import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch
from conftest import build_tiny_pipeline
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, PixArtAlphaPipeline
from PIL import Image
from torch import nn

import lrqdit
from lrqdit.calibration.steps import MAX_CALLS, MAX_ROWS, Call, Step, StepRecorder, recorded_steps, watched_scheduler
from lrqdit.errors import ModelError
from lrqdit.integrations.generation import call_pipeline


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, factor=2.0, options=None):
        return {"number": 3, "sample": (self.linear(x) * factor,), "options": options}


class Scheduler:
    def set_timesteps(self, count):
        self.count = count

    def step(self, model_output, t):
        return model_output + t


def test_a_call_runs_again():
    model, x = Double(), random(2, 3)
    call = Call.record((x,), {"factor": 3.0, "options": {"pair": (None, [x, "text", True])}})
    x.add_(1)  # what is kept is a copy
    output, echoed = call.run(model)
    assert torch.equal(output, model(x - 1, 3.0)["sample"][0]) and torch.equal(echoed, x - 1)
    assert Call.record((x,), {"options": object()}) is None
    assert Call.record((x, {1: x}), {}) is None


def record(model, loop, scheduler=None, seed=0, is_held_out=lambda: False):
    recorder = StepRecorder(seed, is_held_out)
    with recorded_steps({"model": model}, scheduler, {"model": recorder}), torch.no_grad():
        loop()
    assert not model._forward_hooks and (scheduler is None or type(scheduler) is Scheduler)
    return recorder.steps()


def test_every_call_is_a_step_without_a_scheduler():
    model = Double()
    inputs = [random(1, 3, seed=seed) for seed in range(40)]
    steps = record(model, lambda: [model(x) for x in inputs])
    assert len(steps) == MAX_CALLS and all(len(step.calls) == 1 and not step.weights for step in steps)
    found = [next(i for i, x in enumerate(inputs) if torch.equal(x, step.calls[0].tensors[0])) for step in steps]
    assert len(set(found)) == MAX_CALLS and max(found) >= MAX_CALLS  # chosen over everything, not the first ones
    rows = record(model, lambda: [model(random(6, 3)) for _ in range(9)])
    assert len(rows) == -(-MAX_ROWS // 6)


@pytest.mark.parametrize("is_batched", [True, False])
def test_guidance_is_found(is_batched):
    """Conditional and unconditional in one batch, or in two calls; a fourth channel the scheduler does not see."""
    model, scheduler, shown = Double(), Scheduler(), []

    def loop():
        for run in range(3):
            scheduler.set_timesteps(5)
            for t in range(5):
                x = random(4, 3, seed=10 * run + t)
                parts = [x] if is_batched else [x[:2], x[2:]]
                u, c = torch.cat([model(part)["sample"][0] for part in parts]).chunk(2)
                given = (u + 3.0 * (c - u))[:, :2]
                scheduler.step(given, t)
                shown.append(given)

    steps = record(model, loop, scheduler)
    assert len(steps) == 4 if not is_batched else 6  # the last two of each run, as many runs as the limit allows
    for step in steps:
        assert step.weights == pytest.approx((-2.0, 3.0)) and step.shape == (2, 2)
        output = step.run(model)
        assert any(torch.allclose(output, given, atol=1e-5) for i, given in enumerate(shown) if i % 5 >= 3)


def test_further_outputs_count_by_their_mean_square():
    class Two(Double):
        def forward(self, x):
            return self.linear(x), None, self.linear(x[:1])[:, :1] + 1

    model, scheduler = Two(), Scheduler()

    def loop():
        scheduler.set_timesteps(2)
        for t in range(2):
            scheduler.step(2 * model(random(4, 3, seed=t))[0], t)

    for step in record(model, loop, scheduler):
        picture, _, sound = model(step.calls[0].tensors[0])
        output = step.run(model).detach()
        torch.testing.assert_close(output[:12], 2 * picture.flatten())
        assert float(output[12:].square().mean()) == pytest.approx(12 * float(sound.detach().square().mean()))


def test_what_is_no_combination_is_kept_as_it_is():
    model, scheduler = Double(), Scheduler()

    def loop():
        scheduler.set_timesteps(1)
        model(random(4, 3))
        scheduler.step(random(2, 3, seed=1).exp(), 0)
        model(random(4, 3))
        scheduler.step(random(3, 7), 0)

    for step in record(model, loop, scheduler):
        assert step.weights == () and step.run(model).shape == (12,)


def test_held_out_runs_come_first():
    model, scheduler, state = Double(), Scheduler(), {"is_held_out": False}

    def loop():
        for run in range(30):
            scheduler.set_timesteps(1)
            state["is_held_out"] = run in (11, 20)
            scheduler.step(model(torch.full((1, 3), float(run)))["sample"][0], 0)

    steps = record(model, loop, scheduler, is_held_out=lambda: state["is_held_out"])
    assert {float(step.calls[0].tensors[0][0, 0]) for step in steps[:2]} == {11.0, 20.0}


def test_calls_without_steps_are_bounded():
    model, scheduler = Double(), Scheduler()
    recorder = StepRecorder(0, lambda: False)
    with recorded_steps({"model": model}, scheduler, {"model": recorder}), torch.no_grad():
        for _ in range(100):
            model(random(1, 3))
            assert len(recorder._calls) <= MAX_CALLS
    assert all(isinstance(step, Step) for step in recorder.steps())


def test_a_pipeline():
    pipeline = build_tiny_pipeline()
    prompts = ["a fox", "a boat"]
    found = lrqdit.observe(pipeline, prompts=prompts, steps=4, guidance_scale=4.0, show_progress=False)["transformer"]
    assert len(found.steps) == 4
    for step in found.steps:
        (call,) = step.calls
        assert step.weights == pytest.approx((-3.0, 4.0), abs=1e-3) and step.shape == (1, 4, 8, 8)
        assert (
            call.tensors[call.structure["list"][1]["dict"]["timestep"]["tensor"]].max() <= 500
        )  # the last two of four
    assert type(pipeline.scheduler) is DPMSolverMultistepScheduler


class Watch:
    """What :func:`watched_scheduler` tells of a scheduler."""

    def __init__(self, scheduler):
        self.steps, self.starts = [], 0
        self.context = watched_scheduler(scheduler, lambda *step: self.steps.append(step), self.start)

    def start(self):
        self.starts += 1


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_watched_scheduler_and_its_copies(kind):
    scheduler, x = kind(), torch.zeros(1, 2, 4, 4)
    names = "step", "set_timesteps"
    signatures = [inspect.signature(getattr(scheduler, name)) for name in names]
    outer, inner = Watch(scheduler), Watch(scheduler)
    with outer.context, inner.context:
        assert [inspect.signature(getattr(scheduler, name)) for name in names] == signatures
        assert isinstance(scheduler, kind) and repr(scheduler) == repr(kind())
        scheduler.set_timesteps(3)
        first, second = copy.deepcopy(scheduler), copy.deepcopy(scheduler)
        for stepped in (scheduler, first, scheduler):
            result = stepped.step(x + 1, stepped.timesteps[0], sample=x, return_dict=False)
        second.step(model_output=x, timestep=second.timesteps[0], sample=x)
        assert (scheduler.step_index, first.step_index, second.step_index) == (2, 1, 1)
        for protocol in (0, 2, pickle.HIGHEST_PROTOCOL):
            assert type(pickle.loads(pickle.dumps(first, protocol))) is kind
    for watch in (outer, inner):
        assert [stepped for stepped, _, _ in watch.steps] == [scheduler, first, scheduler, second]
        assert watch.starts == 1 and watch.steps[2][2] is result and torch.equal(watch.steps[2][1], x + 1)
    assert type(scheduler) is kind
    for left in (scheduler, first, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        left.set_timesteps(2)
        left.step(x, left.timesteps[0], sample=x)
    assert len(outer.steps) == len(inner.steps) == 4 and outer.starts == inner.starts == 1
    with pytest.raises(ZeroDivisionError), watched_scheduler(scheduler, print):
        raise ZeroDivisionError
    assert type(scheduler) is kind
    with watched_scheduler(None, print):
        pass


class Sounding(PixArtAlphaPipeline):
    """A pipeline with a copy of its scheduler for something else, as those have that make sound, too."""

    def __call__(self, prompt, generator=None, num_inference_steps=2, output_type="pil"):
        x = torch.randn(1, 4, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        other = copy.deepcopy(self.scheduler)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(x, t, x).prev_sample
            other.step(x[:, :1], t, x[:, :1])
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))], x=x)


def test_the_latents_are_those_of_the_pipelines_own_scheduler():
    pipeline = Sounding(**build_tiny_pipeline().components)
    output, latents = call_pipeline(pipeline, ["a"], [0], {"num_inference_steps": 3, "height": None})
    assert latents.shape == (1, 4) and torch.equal(latents, output.x)
    with pytest.raises(ModelError, match="Sounding takes no guidance_scale"):
        call_pipeline(pipeline, ["a"], [0], {"guidance_scale": 3.0})
    with pytest.raises(ModelError, match=r"Sounding refuses its input \(num_inference_steps='many'\)"):
        call_pipeline(pipeline, ["a"], [0], {"num_inference_steps": "many"})
    with pytest.raises(ModelError, match="Sounding took no step"):
        call_pipeline(pipeline, ["a"], [0], {"num_inference_steps": 0})
