import pytest
import torch
from torch import nn

from lrqdit.calibration.moments import PROJECTIONS, SecondMoment, project_gradient
from lrqdit.calibration.observer import Observer, Sampling, count_pictures


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Attention of pictures as sequences (batch, tokens, 6), a residual, and a layer that text alone reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v, self.text = (
            nn.Linear(6, 8),
            nn.Linear(6, 8),
            nn.Linear(6, 40, bias=False),
            nn.Linear(3, 8),
        )
        self.out = nn.Linear(40, 6)

    def forward(self, x, text):
        weights = torch.softmax(self.q(x) @ (self.k(x) + self.text(text)).transpose(1, 2), -1)
        return (x + self.out(weights @ self.v(x)).mul_(0.5),)


def observe(module, calls, **arguments):
    names = tuple(name for name, layer in module.named_modules() if isinstance(layer, nn.Linear))
    observer = Observer(module, names, Sampling(64, 0, moment_bytes=1 << 20, **arguments))
    with observer, torch.no_grad():
        for call in calls:
            module(*call)
    return {name: group.stats for group in observer.groups() for name in group.names}


def calls(count=5, seed=0):
    return [(3 + random(2, 7, 6, seed=seed + i), random(2, 7, 3, seed=seed + 50 + i)) for i in range(count)]


@pytest.mark.parametrize("offset", [0.0, 2.0, -40.0])
def test_moment_about_any_offset(offset):
    x, w = random(3000, 5).double() + 30, random(3000, seed=1).double()
    shift = x.mean(0).float()
    moment = SecondMoment(shift)
    for part, weights in zip(x.split(700), w.split(700), strict=True):
        moment.add((part - weights[:, None] * shift).float(), weights)
    target = torch.full((5,), offset)
    rows = x - w[:, None] * target
    torch.testing.assert_close(moment.about(target), rows.T @ rows / 3000, rtol=1e-4, atol=1e-2)
    again = SecondMoment.from_tensors(moment.to_tensors("m"), "m")
    assert torch.equal(again.about(target), moment.about(target)) and SecondMoment.from_tensors({}, "m") is None


def test_projection_keeps_the_moment_in_the_mean():
    """Signs, not a choice of rows: E[(P M)^T (P M)] = M^T M."""
    gradient, x, shift = random(1, 9, 100), random(1, 9, 4, seed=1), torch.zeros(4)
    exact = gradient[0].T @ x[0]
    generator, total = torch.Generator().manual_seed(0), torch.zeros(4, 4)
    for _ in range(400):
        rows, weights = project_gradient(gradient, x, shift, generator)
        assert rows.shape == (PROJECTIONS, 4) and weights.shape == (PROJECTIONS,)
        total += rows.T @ rows
    torch.testing.assert_close(total / 400, exact.T @ exact, rtol=0.1, atol=3.0)


def test_output_moment_is_that_of_the_weight_gradients():
    module, inputs = Block(), calls()
    stats = observe(module, inputs, gradient_every=1)
    generator = torch.Generator().manual_seed(0)
    expected = {"out": torch.zeros(40, 40), "text": torch.zeros(3, 3)}
    rows = dict.fromkeys(expected, 0)
    offsets = {name: stats[name].channel_mean for name in expected}
    for x, text in inputs:
        projection = torch.randn(x.shape, generator=generator)
        for picture in range(2):  # a gradient of its own for each
            y = module(x[picture : picture + 1], text[picture : picture + 1])[0]
            module.zero_grad()
            (y * projection[picture]).sum().backward()
            for name in expected:
                layer = module.get_submodule(name)
                matrix = layer.weight.grad - torch.outer(layer.bias.grad, offsets[name])
                expected[name] += matrix.T @ matrix
                rows[name] += len(matrix)
    for name in expected:
        found = stats[name].output_moment(offsets[name])
        torch.testing.assert_close(found.float(), expected[name] / rows[name], rtol=1e-4, atol=1e-6)


def test_the_model_is_as_before():
    module = Block()
    module.k.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    with torch.no_grad():
        expected = module(*calls()[0])[0]
    stats = observe(module, calls(), gradient_every=2)
    assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == before
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not module._forward_hooks and not module.q._forward_hooks
    assert torch.equal(module(*calls()[0])[0], expected)
    plain = observe(module, calls())
    zero = torch.zeros(6)
    assert stats["q"].token_count == plain["q"].token_count == 5 * 14  # what is run again is not counted
    assert torch.equal(stats["q"].second_moment(zero), plain["q"].second_moment(zero))
    assert stats["q"].output_moment(zero) is not None and plain["q"].output_moment(zero) is None
    again = observe(module, calls(), gradient_every=2)
    assert torch.equal(again["q"].output_moment(zero), stats["q"].output_moment(zero))


def test_held_out_calls_are_not_differentiated():
    half = observe(Block(), calls()[:1] + calls()[2:3], gradient_every=1)
    stats = observe(Block(), calls()[:4], held_out_every=2, gradient_every=1)
    zero = torch.zeros(6)
    torch.testing.assert_close(stats["q"].output_moment(zero), half["q"].output_moment(zero))


def test_a_model_without_derivatives_is_said():
    class Stubborn(Block):
        def forward(self, x, text):
            if torch.is_grad_enabled():
                raise RuntimeError("aten::magic has no derivative\nand more")
            return super().forward(x, text)

    module = Stubborn()
    with pytest.warns(UserWarning, match=r"Stubborn cannot be differentiated here \(aten::magic has no derivative\)"):
        stats = observe(module, calls(), gradient_every=1)
    assert stats["q"].output_moment(torch.zeros(6)) is None
    assert stats["q"].second_moment(torch.zeros(6)) is not None
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    ("calls_a_step", "expected"),
    [(1, [1, 3, 5, 7, 9, 11]), (2, [1, 2, 5, 6, 9, 10]), (3, [1, 3, 5, 7, 9, 11]), (4, [1, 3, 4, 6, 9, 11])],
)
def test_guidance_in_several_calls(calls_a_step, expected, monkeypatch):
    """Every second call; of two calls a step, the first and the second by turns."""
    seen, calls_seen = [], 0
    monkeypatch.setattr(Observer, "_run_back", lambda self, module, x, y: seen.append(calls_seen))
    observer = Observer(module := Block(), ("q",), Sampling(16, 0, moment_bytes=1 << 20, gradient_every=2))
    with observer, torch.no_grad():
        for call in calls(12):
            module(*call)
            calls_seen += 1
            if calls_seen % calls_a_step == 0:
                observer.end_step()
    assert seen == expected


class Arranged(nn.Module):
    """One layer that is given the tokens of two pictures as ``arrange`` has them."""

    def __init__(self, arrange, arrange_back):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(6, 8)
        self.arrange, self.arrange_back = arrange, arrange_back

    def forward(self, x):
        return self.arrange_back(self.layer(self.arrange(x)))


@pytest.mark.parametrize(
    ("arrange", "arrange_back"),
    [
        (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),  # tokens first, as ERNIE-Image has them
        (lambda x: x.reshape(-1, 3, 6), lambda y: y.reshape(2, 6, 8)),  # parts of each picture, as Latte has them
        (lambda x: x[:, None], lambda y: y[:, 0]),
    ],
)
def test_pictures_are_told_from_tokens(arrange, arrange_back):
    inputs = [(random(2, 6, 6, seed=seed),) for seed in range(4)]
    plain = observe(Arranged(lambda x: x, lambda y: y), inputs, gradient_every=1)["layer"]
    other = observe(Arranged(arrange, arrange_back), inputs, gradient_every=1)["layer"]
    zero = torch.zeros(6)
    torch.testing.assert_close(other.output_moment(zero), plain.output_moment(zero))
    assert other.gradient_energy("layer") == pytest.approx(plain.gradient_energy("layer"))


def test_mixed_tokens_of_several_pictures():
    """Experts get the tokens of all pictures as rows: as many pictures as the call has, in one matrix."""
    inputs = [(random(2, 6, 6, seed=seed),) for seed in range(400)]
    plain = observe(Arranged(lambda x: x, lambda y: y), inputs, gradient_every=1)["layer"]
    mixed = observe(Arranged(lambda x: x.flatten(0, 1), lambda y: y.reshape(2, 6, 8)), inputs, gradient_every=1)[
        "layer"
    ]
    assert mixed.gradient_energy("layer") == pytest.approx(plain.gradient_energy("layer"), rel=0.1)


def test_one_token_of_each_picture():
    inputs = [(random(5, 6, seed=seed),) for seed in range(4)]
    rows = observe(Arranged(lambda x: x, lambda y: y), inputs, gradient_every=1)["layer"]
    tokens = observe(Arranged(lambda x: x[:, None], lambda y: y[:, 0]), inputs, gradient_every=1)["layer"]
    torch.testing.assert_close(rows.output_moment(torch.zeros(6)), tokens.output_moment(torch.zeros(6)))


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ((torch.zeros(3), torch.zeros(2, 5, 4)), 2),
        ((torch.zeros(3, 4, dtype=torch.int64), [torch.zeros(5, 4)] * 3), 3),
        ((), 1),
        (("text", None), 1),
    ],
)
def test_count_pictures(arguments, count):
    assert count_pictures(arguments, {}) == count_pictures((), dict(enumerate(arguments))) == count


def test_all_outputs_count():
    class Two(Block):
        def forward(self, x, text):
            return super().forward(x, text)[0], None, {"sound": self.text(text), "step": torch.tensor(3)}

    stats = observe(Two(), calls(), gradient_every=1)
    apart = observe(Block(), calls(), gradient_every=1)
    assert stats["text"].gradient_energy("text") > 1.5 * apart["text"].gradient_energy("text")
    assert stats["out"].gradient_energy("out") == pytest.approx(apart["out"].gradient_energy("out"), rel=0.5)


class Checkpointed(Block):
    """As a diffusers model with gradient checkpointing, its block called with keywords."""

    _supports_gradient_checkpointing = True
    is_gradient_checkpointing, function, can_run_again = False, None, True

    def enable_gradient_checkpointing(self, function):
        self.function, self.is_gradient_checkpointing = function, True

    def disable_gradient_checkpointing(self):
        self.function, self.is_gradient_checkpointing = None, False

    def forward(self, x, text):
        block = super().forward
        if self.function is None or not torch.is_grad_enabled():
            return block(x, text)
        if not self.can_run_again:
            raise TypeError("no checkpoints here")
        return self.function(block, x, text=text)


@pytest.mark.parametrize("can_run_again", [True, False])
def test_checkpoints_with_keywords_or_none(can_run_again):
    module, plain = Checkpointed(), observe(Block(), calls(), gradient_every=1)
    module.can_run_again = can_run_again
    stats = observe(module, calls(), gradient_every=1)
    assert not module.is_gradient_checkpointing
    for name in ("q", "text", "out"):
        assert stats[name].gradient_energy(name) == pytest.approx(plain[name].gradient_energy(name))
