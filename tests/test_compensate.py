import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lrqdit.calibration.statistics import ActivationStats
from lrqdit.fitting import compensate
from lrqdit.numerics import codebook, rotation
from lrqdit.numerics.tokens import InputTransform, dequantize_tokens, quantize_tokens

DAMPING = 0.03


def plain_transform(width, clip=1.0):
    return InputTransform(rotation.Rotation("none", width), None, None, clip)


def correlated(count, width, seed=0):
    """Tokens with a decaying spectrum, as activations have; every seed draws from the same law."""
    basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(99))).Q
    spectrum = torch.arange(1, width + 1).float() ** -0.7
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * spectrum @ basis


def observe(tokens, held_out=None):
    stats = ActivationStats(tokens.shape[1], 256, seed=0, has_moment=True)
    stats.update(tokens)
    if held_out is not None:
        stats.update(held_out, is_held_out=True)
    return stats


def round_weight(weight, levels, tokens, bits, transform=None, held_out=None, damping=DAMPING):
    transform = transform or plain_transform(weight.shape[1])
    curvature = compensate.measure_curvature(transform, observe(tokens, held_out), bits, damping)
    return compensate.round_weight(weight, levels, curvature)


def output_error(codes, levels, weight, tokens, bits, clip=1.0):
    seen = tokens if bits == 16 else dequantize_tokens(*quantize_tokens(tokens, bits, clip))
    return float((F.linear(seen, levels.decode(codes)) - F.linear(tokens, weight)).square().sum())


def setting(width=64, out=96, bits=3, count=640):
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(1))
    return weight, codebook.fit(weight, bits), correlated(count, width)


@pytest.mark.parametrize("bits", [8, 16])
def test_compensation_wins_on_fresh_tokens(bits):
    weight, levels, tokens = setting()
    book, codes, errors = round_weight(weight, levels, tokens, bits, held_out=correlated(200, 64, seed=7))
    assert set(errors) == {"nearest", "gptq"} and errors["nearest"] == 1.0 and errors["gptq"] < 0.7
    fresh = correlated(2000, 64, seed=5)
    plain = output_error(levels.encode(weight), levels, weight, fresh, bits)
    assert output_error(codes, book, weight, fresh, bits) < 0.7 * plain


def test_wide_layers_are_factored_in_parts(monkeypatch):
    """Parts of 24 of 64 columns compensate less than the whole, and still far better than rounding plainly."""
    weight, levels, tokens = setting()
    _, _, whole = round_weight(weight, levels, tokens, 16, held_out=correlated(200, 64, seed=7))
    monkeypatch.setattr(compensate, "MAX_FACTORED", 24)
    curvature = compensate.measure_curvature(plain_transform(64), observe(tokens), 16, DAMPING)
    assert (curvature.upper[:22, 22:] == 0).all() and (curvature.upper[:21, 21] != 0).any()
    _, _, parts = round_weight(weight, levels, tokens, 16, held_out=correlated(200, 64, seed=7))
    assert whole["gptq"] < parts["gptq"] < 0.85


def test_hessian_is_that_of_the_transformed_tokens():
    """Centred, scaled and rotated on both sides, at any width."""
    tokens = correlated(500, 48) + 3
    scale = torch.linspace(0.5, 2, 48).half()
    plain, _ = rotation.build(48, "hadamard", 1)
    transform = InputTransform(plain, tokens.mean(0).half(), scale, 1.0)
    found = compensate.measure_curvature(transform, observe(tokens), 16, DAMPING)
    x = transform.apply(tokens).double()
    expected = x.T @ x / len(x)
    expected.diagonal().add_(DAMPING * expected.diagonal().mean())
    torch.testing.assert_close(found.hessian, expected / expected.diagonal().mean(), rtol=1e-4, atol=1e-5)
    rebuilt = (found.upper.double().T @ found.upper.double()).inverse()
    torch.testing.assert_close(rebuilt, found.hessian[found.order][:, found.order], rtol=1e-3, atol=1e-4)


def test_coarse_activations_damp():
    tokens = correlated(500, 64) @ torch.diag(torch.arange(1, 65).float() ** -0.5)
    fine, coarse = (
        compensate.measure_curvature(plain_transform(64), observe(tokens), bits, 1e-6).hessian for bits in (8, 4)
    )
    assert torch.linalg.cond(coarse) < 0.5 * torch.linalg.cond(fine)


def test_rows_keep_their_length():
    """<w, v> = <w, w> in the metric H: rounding to centroids would shrink every row."""
    weight, levels, tokens = setting(bits=2)
    curvature = compensate.measure_curvature(plain_transform(64), observe(tokens), 8, DAMPING)
    book, codes, errors = compensate.round_weight(weight, levels, curvature)
    assert errors["gptq"] < 1
    image = weight.double() @ curvature.hessian
    torch.testing.assert_close((image * book.decode(codes)).sum(1), (image * weight).sum(1))


def test_held_out_tokens_decide():
    """Fewer tokens than channels: the Hessian is that of the sample, and plain rounding is better elsewhere."""
    weight, levels, _ = setting()
    generator = torch.Generator().manual_seed(3)
    few, others = torch.randn(24, 64, generator=generator), torch.randn(200, 64, generator=generator)
    book, codes, errors = round_weight(weight, levels, few, 8, held_out=others, damping=1e-3)
    assert errors["gptq"] > 1
    assert book is levels and torch.equal(codes, levels.encode(weight))


@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_scale_of_the_tokens(scale):
    weight, levels, tokens = setting(count=160)
    _, codes, errors = round_weight(weight, levels, tokens * scale, 8)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 8
    assert errors["gptq"] < 1


def test_nothing_to_compensate():
    assert compensate.measure_curvature(plain_transform(8), observe(torch.zeros(20, 8)), 8, DAMPING) is None
    without = ActivationStats(8, 16, seed=0)
    without.update(torch.randn(20, 8))
    assert compensate.measure_curvature(plain_transform(8), without, 8, DAMPING) is None


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(1, 40), out=st.integers(1, 20), bits=st.sampled_from([2, 3, 4, 5, 6]), seed=st.integers(0, 99),
    empty=st.booleans(),
)  # fmt: skip
def test_any_shape(width, out, bits, seed, empty):
    generator = torch.Generator().manual_seed(seed)
    weight, tokens = torch.randn(out, width, generator=generator), torch.randn(50, width, generator=generator)
    if empty:
        weight[0], tokens[:, 0] = 0, 0
    if not tokens.any():
        assert compensate.measure_curvature(plain_transform(width), observe(tokens), 4, DAMPING) is None
        return
    book, codes, errors = round_weight(weight, codebook.fit(weight, bits), tokens, 4)
    assert codes.shape == weight.shape and int(codes.max()) < 1 << bits
    assert torch.isfinite(book.decode(codes)).all() and min(errors.values()) <= 1


def test_blocks_do_not_change_the_result(monkeypatch):
    weight, levels, tokens = setting()
    _, whole, _ = round_weight(weight, levels, tokens, 8)
    monkeypatch.setattr(compensate, "COLUMNS_PER_BLOCK", 16)
    _, parts, _ = round_weight(weight, levels, tokens, 8)
    assert (whole != parts).float().mean() < 0.01  # the order of float32 sums moves a tie here and there


def test_threads_do_not_change_the_result():
    weight, levels, tokens = setting(width=96, out=160)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(round_weight(weight, levels, tokens, 4))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][1], found[1][1]) and found[0][2] == found[1][2]
    assert torch.equal(found[0][0].row_scale, found[1][0].row_scale)
