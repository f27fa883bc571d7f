import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrqdit.kernels import ops
from lrqdit.numerics import rotation
from lrqdit.numerics.tokens import (
    CLIP_RATIOS,
    NORMAL_LEVELS,
    SMOOTHING_RANGE,
    TOKEN_LEVELS,
    InputTransform,
    dequantize_tokens,
    quantize_tokens,
    smoothing_vector,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build_transform(kind, width, is_centred, is_smoothed):
    built, signs = rotation.build(width, kind, 3, channel_absmax=random(width, seed=4).abs() + 0.1)
    scale = torch.exp(random(width, seed=5)) if is_smoothed else torch.ones(width)
    scale = scale if signs is None else scale * signs
    offset = (30 * random(width, seed=6)).half() if is_centred else None
    return InputTransform(built, offset, scale.half() if is_smoothed or signs is not None else None)


@pytest.mark.parametrize("kind", list(rotation.ROTATIONS))
@pytest.mark.parametrize(("is_centred", "is_smoothed"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("width", [96, 99])
def test_transform_changes_nothing(kind, width, is_centred, is_smoothed):
    transform = build_transform(kind, width, is_centred, is_smoothed)
    x, weight, bias = random(11, width), random(17, width, seed=1), random(17, seed=2)
    assert transform.in_features == width
    shift = torch.zeros(17).double()
    if is_centred:
        shift = weight.double() @ transform.input_offset.double()
    y = transform.apply(x).double() @ ops.fold(transform, weight).double().T + bias.double() + shift
    expected = x.double() @ weight.double().T + bias.double()
    # float32 rounding of x~ and W~, whose products are of the size |x - mu| |W|
    size = (x.double() - (transform.input_offset.double() if is_centred else 0)).norm() * weight.double().norm()
    assert (y - expected).norm() < 1e-6 * size
    assert transform.apply(x.bfloat16()).dtype == torch.float32
    # rounding happens in the basis of W / m
    m = 1 if transform.input_scale is None else transform.input_scale.float()
    error = (ops.unfold(transform, ops.fold(transform, weight)) - weight) / m
    assert error.norm() < 1e-6 * (weight / m).norm()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.sampled_from([4, 6, 8]), st.floats(0.4, 1.0), st.integers(0, 2**31))
def test_quantize_tokens_properties(tokens, channels, bits, clip, seed):
    x = random(tokens, channels, seed=seed) * torch.exp(5 * random(tokens, 1, seed=seed + 1))
    x[0] = 0
    codes, scale = quantize_tokens(x.clone(), bits, clip)
    largest = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (tokens,)
    assert int(codes.min()) >= -largest - 1 and int(codes.max()) <= largest
    assert scale[0] == 0 and not codes[0].any()
    torch.testing.assert_close(scale, x.abs().amax(1) * clip / largest, rtol=1e-6, atol=0)
    decoded = dequantize_tokens(codes, scale)
    inside = x.abs() <= (clip * x.abs().amax(1, keepdim=True))
    error = (decoded - x).abs()
    assert (error <= scale[:, None] * (0.5 + 1e-3))[inside].all()
    for index in range(tokens):  # a token's codes depend on that token alone
        alone, step = quantize_tokens(x[index : index + 1].clone(), bits, clip)
        assert torch.equal(alone[0], codes[index]) and step[0] == scale[index]


def test_clip_saturates():
    x = torch.tensor([[4.0, -4.0, 1.1, 0.0]])
    codes, scale = quantize_tokens(x, 4, 0.5)
    assert scale[0] == pytest.approx(2 / 7)
    assert codes[0].tolist() == [7, -8, 4, 0]  # 14, -14 and 3.85 steps
    assert quantize_tokens(x, 4, 1.0)[0][0].tolist() == [7, -7, 2, 0]


def test_normal_levels_are_the_nearest():
    steps = torch.arange(-127, 128).float()[None]
    codes, scale = quantize_tokens(steps, 4, 1.0, "normal")
    assert scale[0] == 1
    levels = [sign * level for level in NORMAL_LEVELS for sign in (-1, 1)]
    assert sorted(set(codes[0].tolist())) == sorted(levels)
    nearest = [min(levels, key=lambda v: (abs(v - x), -abs(v), -v)) for x in range(-127, 128)]
    assert codes[0].tolist() == nearest
    zeros, scale = quantize_tokens(torch.zeros(1, 4), 4, 0.8, "normal")
    assert not dequantize_tokens(zeros, scale).any()


def test_normal_levels_fit_gaussian_tokens():
    x = random(400, 1152)

    def error(clip, levels):
        return float((dequantize_tokens(*quantize_tokens(x, 4, clip, levels)) - x).square().mean())

    best = {levels: min(error(clip, levels) for clip in CLIP_RATIOS) for levels in TOKEN_LEVELS}
    assert best["normal"] < 0.0100 < 0.0118 < best["uniform"]  # Lloyd-Max is .0095


def test_tiny_tokens_stay_finite():
    x = torch.full((1, 4), 1e-42)
    codes, scale = quantize_tokens(x, 8)
    assert torch.isfinite(dequantize_tokens(codes, scale)).all() and not codes.any()


def test_empty_tokens():
    codes, scale = quantize_tokens(torch.zeros(0, 5), 4)
    assert codes.shape == (0, 5) and scale.shape == (0,)


def test_smoothing_vector():
    a, w = torch.tensor([4.0, 1.0, 0.25]), torch.tensor([1.0, 1.0, 1.0])
    m = smoothing_vector(a, w, 0.5)
    assert m.dtype == torch.float16
    torch.testing.assert_close(m.float(), torch.tensor([0.5, 1.0, 2.0]))
    # the exponent belongs to the weights
    torch.testing.assert_close(smoothing_vector(a, w, 0.75).float(), a**-0.25, rtol=1e-3, atol=0)
    torch.testing.assert_close(smoothing_vector(w, a, 0.75).float(), a**0.75, rtol=1e-3, atol=0)


def test_smoothing_vector_with_dead_channels():
    m = smoothing_vector(torch.tensor([0.0, 4.0, 1.0, 0.25]), torch.tensor([1.0, 1.0, 1.0, 0.0]), 0.5).float()
    assert m[0] == 1 and m[3] == 1  # no activation, no weight
    assert math.isclose(float(m[1] * m[2]), 1, rel_tol=1e-3) and m[2] > m[1]
    assert torch.equal(smoothing_vector(torch.zeros(3), torch.ones(3), 0.5), torch.ones(3, dtype=torch.float16))


def test_smoothing_vector_is_bounded():
    m = smoothing_vector(torch.tensor([1e20, 1.0, 1e-20]), torch.ones(3), 0.5)
    assert torch.isfinite(m).all() and m.max() == SMOOTHING_RANGE and m.min() == 1 / SMOOTHING_RANGE
