import pytest
import torch
import torch.nn.functional as F

from lrqdit import codebook, compensate, rotation
from lrqdit.activation import InputTransform, dequantize_tokens, quantize_tokens


def plain_transform(width, clip=1.0):
    return InputTransform(rotation.Rotation("none", width), None, None, clip)


def correlated(count, width, seed=0):
    """Tokens with a decaying spectrum, as activations have; every seed draws from the same law."""
    basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(99))).Q
    spectrum = torch.arange(1, width + 1).float() ** -0.7
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * spectrum @ basis


def output_error(codes, levels, weight, tokens, bits, clip=1.0):
    seen = tokens if bits == 16 else dequantize_tokens(*quantize_tokens(tokens, bits, clip))
    return float((F.linear(seen, levels.decode(codes)) - F.linear(tokens, weight)).square().sum())


def setting(width=64, out=96, bits=3, count=640):
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(1))
    return weight, codebook.fit(weight, bits), correlated(count, width)


@pytest.mark.parametrize("bits", [8, 16])
def test_compensation_wins_on_fresh_tokens(bits):
    weight, levels, tokens = setting()
    codes, errors = compensate.round_weight(weight, levels, plain_transform(64), tokens, bits)
    assert set(errors) == {"nearest", "gptq"} and errors["nearest"] == 1.0 and errors["gptq"] < 0.7
    fresh = correlated(2000, 64, seed=5)
    plain = output_error(levels.encode(weight), levels, weight, fresh, bits)
    assert output_error(codes, levels, weight, fresh, bits) < 0.7 * plain


def test_wiener_target_wins_with_coarse_activations():
    weight, levels, tokens = setting()
    transform = plain_transform(64, clip=0.8)
    codes, errors = compensate.round_weight(weight, levels, transform, tokens, 4)
    assert errors["wiener"] < errors["gptq"] < 1
    fresh = correlated(2000, 64, seed=5)
    plain = output_error(levels.encode(weight), levels, weight, fresh, 4, 0.8)
    assert output_error(codes, levels, weight, fresh, 4, 0.8) < 0.9 * plain


def test_white_tokens_keep_plain_rounding():
    weight, levels, _ = setting()
    few = torch.randn(
        40, 64, generator=torch.Generator().manual_seed(3)
    )  # fewer tokens than channels: it would overfit
    codes, errors = compensate.round_weight(weight, levels, plain_transform(64), few, 8)
    assert errors["gptq"] > 1
    assert torch.equal(codes, levels.encode(weight))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_scale_of_the_tokens(scale):
    weight, levels, tokens = setting(count=160)
    codes, errors = compensate.round_weight(weight, levels, plain_transform(64), tokens * scale, 8)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 8
    assert all(error >= 0 for error in errors.values())
    if scale == 0:
        assert torch.equal(codes, levels.encode(weight))


def test_wide_layers_are_compensated_in_parts(monkeypatch):
    weight, levels, tokens = setting()
    monkeypatch.setattr(compensate, "MAX_HESSIAN_WIDTH", 24)
    _, errors = compensate.round_weight(weight, levels, plain_transform(64), tokens, 8)
    assert errors["gptq"] < 1


def test_blocks_do_not_change_the_result(monkeypatch):
    weight, levels, tokens = setting()
    whole, _ = compensate.round_weight(weight, levels, plain_transform(64), tokens, 8)
    monkeypatch.setattr(compensate, "COLUMNS_PER_BLOCK", 16)
    parts, _ = compensate.round_weight(weight, levels, plain_transform(64), tokens, 8)
    assert (whole != parts).float().mean() < 0.01  # the order of float32 sums moves a tie here and there


def test_threads_do_not_change_the_result():
    weight, levels, tokens = setting(width=96, out=160)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(compensate.round_weight(weight, levels, plain_transform(96), tokens, 4))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
