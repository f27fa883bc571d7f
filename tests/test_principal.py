import copy

import pytest
import torch
from conftest import dense, linear_format
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fit import fit, observe, random
from torch import nn

from lrqdit import native
from lrqdit.calibration.statistics import ActivationStats
from lrqdit.config import QuantizationConfig
from lrqdit.errors import CheckpointError, ConfigError
from lrqdit.fitting.layer import FittedInput, quantize_linear
from lrqdit.fitting.transform import choose_transform
from lrqdit.kernels import ops, principal
from lrqdit.kernels.cpu import LayerCalls
from lrqdit.numerics import rotation
from lrqdit.numerics.principal import LowRank, find_directions, outlet, split
from lrqdit.numerics.tokens import InputTransform
from lrqdit.packed.format import LinearFormat
from lrqdit.packed.linear import QuantLinear

WIDTH = 96
FAST = {"rotation": "hadamard", "smoothing": "never"}


def tokens(count=400, width=WIDTH, rank=4, seed=0):
    """Tokens that hold nearly all of their energy in a few directions."""
    basis = torch.linalg.qr(random(width, rank, seed=50)).Q
    return 6 * random(count, rank, seed=seed + 1) @ basis.T + 0.3 * random(count, width, seed=seed + 2)


def stats_of(x):
    stats = ActivationStats(x.shape[-1], 256, seed=0, has_moment=True)
    stats.update(x)
    return stats


def quantized(weight, x, bias=None, preset="w4a4", **changes):
    config = QuantizationConfig.from_name(preset, **{**FAST, **changes})
    transform, report = choose_transform({"layer": weight}, stats_of(x), config, config.weight_bits, 4)
    layer = quantize_linear("layer", dense(weight, bias), FittedInput(transform, 4), config.weight_bits, config)
    return layer, report


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 70), st.integers(1, 40), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_parts_add_up_exactly(width, out_features, rank, has_offset, has_scale, seed):
    """For any directions, far from orthonormal ones too: x^ W^T = (x^ - p U^T)(W - C^T U^T)^T + p C."""
    rank = min(rank, width)
    plain, _ = rotation.build(width, "hadamard", seed)
    offset = random(width, seed=seed).half() if has_offset else None
    scale = random(width, seed=seed + 1).abs().add(0.2).half() if has_scale else None
    u = LowRank.round(torch.linalg.qr(random(width, rank, seed=seed + 2)).Q.T * 1.1)
    transform = InputTransform(plain, offset, scale, principal=u)
    x, weight = random(9, width, seed=seed + 3), random(out_features, width, seed=seed + 4)
    p = transform.smooth(x) @ u.values.T
    c = outlet(transform.unsmooth(weight), u)
    whole = transform.smooth(x) @ transform.unsmooth(weight).T
    folded = ops.fold(transform, weight)
    torch.testing.assert_close(transform.apply(x) @ folded.T + p @ c, whole, rtol=1e-3, atol=1e-3)
    unfolded = ops.unfold(transform, folded, LowRank(c, torch.ones(rank)))
    torch.testing.assert_close(unfolded, weight, rtol=1e-3, atol=1e-3)
    left, coordinates = split(x, u, offset, scale)
    torch.testing.assert_close(coordinates, p, rtol=1e-3, atol=1e-3)
    without = InputTransform(plain, offset, scale)
    torch.testing.assert_close(without.apply(left), transform.apply(x), rtol=1e-3, atol=1e-3)


def test_the_leading_directions_are_found():
    basis = torch.linalg.qr(random(60, 60)).Q
    moment = basis @ torch.diag(0.8 ** torch.arange(60)) @ basis.T
    found = find_directions(lambda columns: moment @ columns, 60, 5, seed=0).values
    held = float(((found @ moment) * found).sum())
    assert held == pytest.approx(float((0.8 ** torch.arange(5)).sum()), rel=0.01)
    torch.testing.assert_close(found @ found.T, torch.eye(5), atol=0.02, rtol=0)
    again = find_directions(lambda columns: moment @ columns, 60, 5, seed=0)
    assert torch.equal(again.codes, LowRank.round(found).codes)


def test_it_is_chosen_where_few_directions_hold_the_tokens():
    x, weight = tokens(), random(48, WIDTH, seed=9)
    layer, report = quantized(weight, x)
    assert report.principal_rank == layer.format.input.principal_rank == 3  # a sixteenth of the narrower side
    assert report.error == report.candidates["hadamard+principal"] < 0.75 * report.candidates["hadamard"]
    flat, plain = quantized(weight, random(400, WIDTH))
    assert flat.format.input.principal_rank == plain.principal_rank == 0 and "principal" not in flat.state_dict()
    assert quantized(weight, x, principal_rank=0)[1].principal_rank == 0
    assert fit(weight, x)[0].format.input.principal_rank == 0  # 8-bit tokens do not need it
    config = QuantizationConfig.from_name("w4a4", **FAST)
    _, report = choose_transform({"layer": weight}, observe(x), config, 4, 4)
    assert report.principal_rank == 0  # no second moment


def test_the_layer_is_better_and_says_what_it_computes():
    x, weight, bias = tokens(seed=20), random(64, WIDTH, seed=9), random(64, seed=8)
    y = nn.functional.linear(x, weight, bias)
    layer, _ = quantized(weight, tokens(), bias)
    plain, _ = quantized(weight, tokens(), bias, principal_rank=0)
    error, plain_error = (float((q(x) - y).norm() / y.norm()) for q in (layer, plain))
    assert error < 0.6 * plain_error
    fine, _ = quantized(weight, tokens(), bias, preset="w8a4")
    assert float((fine.dequantize() - weight).norm() / weight.norm()) < 0.02
    for q in (layer, fine):
        dense = q.to_linear().requires_grad_(False)
        exact, shown = nn.functional.linear(x, q.dequantize(), bias), dense(x)
        torch.testing.assert_close(shown.mean(0), exact.mean(0), atol=0.05, rtol=0.05)
        assert float((q(x) - shown).norm() / shown.norm()) < 0.1  # what rounding the tokens does


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_every_dtype_and_few_rows(dtype, rows):
    weight = random(64, WIDTH, seed=9)
    layer, _ = quantized(weight, tokens())
    x = tokens(rows, seed=30)
    y, exact = layer(x.to(dtype)), layer(x)
    assert y.dtype == dtype and y.shape == (rows, 64)
    assert float((y.float() - exact).norm() / exact.norm()) < 0.03
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(layer(x.to(dtype)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_shared_inputs_are_split_once(monkeypatch):
    layer, _ = quantized(random(64, WIDTH, seed=9), tokens())
    other = QuantLinear(LinearFormat.from_dict({**layer.format.to_dict(), "input_from": "q"}))
    other.load_state_dict({k: v for k, v in layer.state_dict().items() if k in other.state_dict()})
    assert "principal" not in other.state_dict() and "outlet" in other.state_dict()
    other.share_input(layer)
    calls = []
    monkeypatch.setattr(principal, "split", lambda *a: calls.append(1) or split(*a))
    x = tokens(40, seed=30)
    with torch.no_grad():
        assert torch.equal(layer(x), other(x)) and len(calls) == 1


def test_compiled_copied_and_loaded():
    layer, _ = quantized(random(64, WIDTH, seed=9), tokens())
    x = tokens(40, seed=30)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        loaded = QuantLinear(LinearFormat.from_dict(layer.format.to_dict()))
        loaded.load_state_dict(layer.state_dict())
        assert torch.equal(loaded(x), expected) and torch.equal(copy.deepcopy(layer)(x), expected)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, layer.dequantize().sum(0).expand(40, -1))


@pytest.mark.parametrize("change", [{"principal_rank": -1}, {"principal_rank": 65}, {"activation_bits": 16}])
def test_impossible_formats(change):
    values = {"in_features": 96, "out_features": 64, "weight_bits": 4, "activation_bits": 4, "principal_rank": 3}
    LinearFormat.from_dict(values)
    with pytest.raises(CheckpointError):
        LinearFormat.from_dict({**values, **change})


def test_bad_ranks_are_refused():
    for rank in (-1, 300, 1.5, True):
        with pytest.raises(ConfigError, match="principal_rank"):
            QuantizationConfig.from_name("w4a4", principal_rank=rank)


def bfloat16_layer(width, out_features, rank, activation_bits=8):
    """A layer of random weights and directions, and tokens for it."""
    form = linear_format(
        width, out_features, 8, activation_bits, table_rows=0, principal_rank=rank, has_offset=True, has_scale=True
    )
    layer = QuantLinear(form, torch.bfloat16)
    transform = InputTransform(
        rotation.Rotation("none", width, ()), random(width, seed=1).half(), random(width, seed=2).abs().add(0.5).half(),
        principal=LowRank.round(torch.linalg.qr(random(width, rank, seed=3)).Q.T),
    )  # fmt: skip
    codes = torch.randint(0, 256, (out_features, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    scale, bias = random(out_features, seed=5).abs() * 1e-3, random(out_features, seed=6)
    layer.fill(codes, None, scale, bias, transform, LowRank.round(random(rank, out_features, seed=7)))
    return layer


needs_pairs = pytest.mark.skipif(
    native.LIBRARY is None or not native.LIBRARY.lrq_has_pairs(), reason="no kernels that multiply bfloat16"
)


@needs_pairs
@pytest.mark.parametrize(
    "rows, width, out_features, rank",
    [
        (1, 48, 33, 2),
        (3, 100, 52, 1),
        (5, 33, 17, 5),
        (8, 96, 48, 24),
        (9, 288, 144, 17),
        (70, 160, 100, 32),
        (300, 96, 64, 7),
    ],
)
def test_kernels_take_it_out_as_exactly_as_torch(monkeypatch, rows, width, out_features, rank):
    layer, x = bfloat16_layer(width, out_features, rank), (4 * random(rows, width, seed=8)).bfloat16()
    offset = layer.input_transform.input_offset.double()
    truth = (x.double() - offset) @ layer.dequantize().double().T + layer.folded_bias.double()

    def error(y):
        return float((y.double() - truth).norm() / truth.norm())

    calls = layer.calls_for(x, torch.bfloat16)
    assert isinstance(calls, principal.KernelCalls)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(layer(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    whole = calls.quantize_tokens(x)
    assert torch.equal(calls.quantized_linear(whole, torch.bfloat16), found[0])
    p = whole.coordinates
    exact = layer.input_transform.smooth(x.float()) @ layer.input_transform.principal.values.T
    assert float((p[:, :rank].float() - exact).norm() / exact.norm()) < 0.01
    assert not p[:, rank:].any()
    monkeypatch.setattr(principal, "kernels_take", lambda *_: False)
    by_torch = layer(x)
    assert error(found[0]) < 1.25 * error(by_torch) < 0.01  # both are roundings of bfloat16
    # what torch took out can be added by a kernel, too
    by_split = layer.calls_for(x, torch.bfloat16).quantize_tokens(x)
    assert error(calls.quantized_linear(by_split, torch.bfloat16)) < 1.25 * error(by_torch)


@needs_pairs
def test_layers_that_share_an_input_share_its_coordinates(monkeypatch):
    first, second, x = bfloat16_layer(96, 48, 6), bfloat16_layer(96, 80, 6), random(20, 96, seed=9).bfloat16()
    alone = first(x), second(x)
    second.share_input(first)
    calls = []
    original = LayerCalls.linear
    monkeypatch.setattr(LayerCalls, "linear", lambda *a, **k: calls.append(1) or original(*a, **k))
    with torch.no_grad():
        assert torch.equal(first(x), alone[0]) and torch.equal(second(x), alone[1]) and len(calls) == 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(first(x), alone[0])


@needs_pairs
def test_other_dtypes_and_ranks_are_left_to_torch():
    x = random(6, 96)
    wide = bfloat16_layer(96, 48, 33)
    for layer, tokens_of in (
        (bfloat16_layer(96, 48, 6), x),
        (bfloat16_layer(96, 48, 6), x.half()),
        (wide, x.bfloat16()),
    ):
        assert isinstance(layer.calls_for(tokens_of, tokens_of.dtype), principal.TorchCalls)
        truth = (x.double() - layer.input_transform.input_offset.double()) @ layer.dequantize().double().T
        found = layer(tokens_of).double() - layer.folded_bias.double()
        assert float((found - truth).norm() / truth.norm()) < 0.05
