import pytest
import torch
from conftest import build_tiny_pipeline
from torch import nn

import lrqdit
from lrqdit.calibration.steps import MAX_CALLS, MAX_ROWS, Call, Step, StepRecorder, recorded_steps


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
    assert torch.equal(call.run(model), model(x - 1, 3.0)["sample"][0])
    assert Call.record((x,), {"options": object()}) is None
    assert Call.record((x, {1: x}), {}) is None


def record(model, loop, scheduler=None, seed=0, is_held_out=lambda: False):
    recorder = StepRecorder(seed, is_held_out)
    with recorded_steps({"model": model}, scheduler, {"model": recorder}), torch.no_grad():
        loop()
    assert not model._forward_hooks and not {"step", "set_timesteps"} & set(vars(scheduler or object))
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
    assert "step" not in vars(pipeline.scheduler)
