import json

import pytest
import torch
from tiny_transformers import build_model, run
from torch import nn

import lrqdit
from lrqdit.calibration.observer import Observer, Sampling
from lrqdit.models.registry import MODELS, Pointwise, as_linear, linear_layers
from lrqdit.models.spec import ModelSpec
from lrqdit.packed.linear import QuantLinear
from lrqdit.packed.pointwise import QuantPointwise

FAST = {"show_progress": False, "calibration_tokens": 64}


class Pair(nn.Module):
    """A 1 x 1 convolution, and the linear layer of the same weights, which is given the channels last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = nn.Conv2d(32, 48, 1), nn.Linear(32, 48)
        with torch.no_grad():
            self.linear.weight.copy_(self.conv.weight[:, :, 0, 0])
            self.linear.bias.copy_(self.conv.bias)

    def forward(self, x):
        return self.conv(x), self.linear(x.movedim(1, -1)).movedim(-1, 1)


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setitem(MODELS, "Pair", ModelSpec("conv|linear"))


def pixels(seed=1):
    return torch.randn(2, 32, 5, 7, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", ["w4a8", "w3a4", "w4a16", "w8a8"])
def test_the_same_as_a_linear_layer(named, preset):
    model = Pair()
    lrqdit.quantize(model, preset, is_calibrated=False, show_progress=False)
    assert type(model.conv) is QuantPointwise and type(model.linear) is QuantLinear
    assert torch.equal(model.conv.packed, model.linear.packed)
    conv, linear = model(pixels())
    torch.testing.assert_close(conv, linear)
    assert conv.shape == (2, 48, 5, 7) and model.conv.out_channels == 48
    assert torch.equal(model.conv(pixels()[0]), model.conv(pixels()[:1])[0])  # without a batch


def test_calibrated_as_well_as_a_linear_layer(named):
    model = Pair()
    with torch.no_grad():
        exact = model(pixels(9))
        lrqdit.quantize(model, "w3a8", forward_loop=lambda m: [m(pixels(seed)) for seed in (1, 2, 3)], **FAST)
        conv, linear = ((y - x).norm() / x.norm() for y, x in zip(model(pixels(9)), exact, strict=True))
    assert 0.8 * linear < conv < 1.25 * linear and linear < 0.2


def test_to_dense_and_gradients(named):
    model = Pair()
    lrqdit.quantize(model, "w8a16", is_calibrated=False, show_progress=False)
    dense, x = model.conv.to_linear(), pixels().requires_grad_()
    assert type(dense) is nn.Conv2d
    torch.testing.assert_close(dense(x), model.conv(x), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(model.conv(x).sum(), x)
    (expected,) = torch.autograd.grad(dense(x).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_what_is_observed_is_the_same(named):
    model = Pair()
    observer = Observer(model, ("conv", "linear"), Sampling(64, 0, moment_bytes=1 << 20, gradient_every=1))
    with observer, torch.no_grad():
        model(pixels())
    conv, linear = (group.stats for group in observer.groups())
    zero = torch.zeros(32)
    torch.testing.assert_close(conv.second_moment(zero), linear.second_moment(zero))
    # random projections of two outputs differ, of equal size
    assert conv.gradient_energy("conv") == pytest.approx(linear.gradient_energy("linear"), rel=0.3)


def test_saved_and_loaded(named, tmp_path):
    model = Pair()
    lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
    lrqdit.save_checkpoint(model, tmp_path)
    layers = json.loads((tmp_path / "config.json").read_text())["layers"]
    assert layers["conv"]["channel_axis"] == -3 and "channel_axis" not in layers["linear"]
    loaded = lrqdit.load_checkpoint(Pair(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded(pixels()), model(pixels()), strict=True))


def test_only_named_convolutions_count():
    assert set(linear_layers(Pair())) == {"linear"}
    assert isinstance(as_linear(nn.Conv2d(4, 8, 1)), Pointwise)
    others = (
        nn.Conv2d(4, 8, 3),
        nn.Conv2d(4, 8, 1, stride=2),
        nn.Conv2d(4, 8, 1, groups=2),
        nn.Conv2d(4, 8, 1, padding=1),
    )
    assert not any(isinstance(as_linear(layer), Pointwise) for layer in (*others, nn.Conv1d(4, 8, 1)))


def test_an_unfinished_run_of_sana_continues(tmp_path):
    digests = []
    for _ in range(2):  # the second reads what the first kept
        model = build_model("SanaTransformer2DModel")
        with torch.no_grad():
            lrqdit.quantize(model, "w4a8", forward_loop=run, resume_folder=tmp_path, **FAST)
            digests.append(run(model))
    assert torch.equal(*digests)
    packed = [name for name, layer in model.named_modules() if isinstance(layer, QuantPointwise)]
    assert len(packed) == 4 and all("ff.conv_" in name for name in packed)


def test_measured_sensitivity_puts_convolutions_back():
    model = build_model("SanaTransformer2DModel")
    with torch.no_grad():
        lrqdit.quantize(model, "w4a8", forward_loop=run, sensitivity="measured", **FAST)
        assert run(model).isfinite().all()
