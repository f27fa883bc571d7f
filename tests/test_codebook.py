"""Codebooks: nearest levels, exact code counts, errors near the known limits, and nothing that depends on the scale."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrqdit.errors import ConfigError, NumericalError
from lrqdit.numerics.codebook import CODEBOOKS, Codebook, fit, relative_error

SCOPES = ("layer", "row")
CASES = [(kind, bits) for kind in CODEBOOKS for bits in (2, 3, 4, 5, 6) if kind != "nf4" or bits == 4]
# Relative squared error on Gaussian rows of 1152: the paper's quantizer, and the best any scalar quantizer can do.
TARGETS = {2: 0.1185, 3: 0.0355, 4: 0.0100, 5: 0.0027, 6: 0.0007}


def make_gaussian(out_features: int = 256, in_features: int = 1152, seed: int = 0) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def make_degenerate() -> dict[str, torch.Tensor]:
    normal = make_gaussian(6, 96)
    outlier, zero_row, constant_row, one_sign_row = (normal.clone() for _ in range(4))
    outlier[2, 5], zero_row[3], constant_row[1], one_sign_row[4] = 1e6, 0, -0.3, normal[4].abs()
    return {
        "zeros": torch.zeros(4, 64),
        "zero_row": zero_row,
        "constant": torch.full((3, 64), 0.7),
        "constant_rows": torch.tensor([[0.5], [-2.0], [3e-5]]).repeat(1, 40),
        "constant_row": constant_row,
        "positive": normal.abs() + 0.01,
        "negative": -normal.abs(),
        "one_sign_row": one_sign_row,
        "nonpositive_with_zeros": -normal.abs() * (normal > 0),
        "single_column": normal[:, :1],
        "single_element": torch.tensor([[-3.0]]),
        "one_nonzero": torch.eye(5, 70),
        "outlier": outlier,
        "denormal": normal * 1e-40,
        "tiny": normal * 1e-30,
        "huge": normal * 1e30,
        "mixed": normal * torch.tensor([1e-30, 1e-10, 1.0, 1e10, 1e30, 0.0])[:, None],
        "two_values": torch.tensor([-1.0, 1.0]).repeat(4, 20),
        "sparse": normal * (normal.abs() > 1.5),
    }


def get_bytes(codebook: Codebook, weight: torch.Tensor) -> tuple[bytes, bytes, bytes]:
    tensors = codebook.table, codebook.row_scale, codebook.encode(weight)
    return tuple(tensor.numpy().tobytes() for tensor in tensors)


@st.composite
def draw_codebooks(draw: st.DrawFn) -> tuple[Codebook, torch.Tensor]:
    bits, rows, tables = draw(st.sampled_from((2, 3, 4, 5, 6))), draw(st.integers(1, 4)), draw(st.booleans())
    levels = st.lists(st.integers(-127, 127), min_size=2**bits, max_size=2**bits, unique=True).map(sorted)
    table = torch.tensor([draw(levels) for _ in range(rows if tables else 1)], dtype=torch.int8)
    scale = st.floats(2.0**-20, 2.0**10, width=32)
    row_scale = torch.tensor([draw(scale) for _ in range(rows)], dtype=torch.float32)
    units = st.lists(st.floats(-200, 200, width=32), min_size=5, max_size=5)
    weight = torch.tensor([draw(units) for _ in range(rows)]) * row_scale[:, None]
    return Codebook("twin_log", bits, table, row_scale), weight


@settings(deadline=None, max_examples=150)
@given(draw_codebooks())
def test_encode_picks_the_nearest_level(case: tuple[Codebook, torch.Tensor]) -> None:
    codebook, weight = case
    codes = codebook.encode(weight)
    levels = codebook.row_scale.double()[:, None] * codebook.table.double()
    distances = (weight.double()[:, :, None] - levels[:, None, :]).abs()
    chosen = distances.gather(2, codes.long()[:, :, None])[:, :, 0]
    # w / row_scale is rounded to float32: at a tie either neighbour may win.
    assert (chosen <= distances.amin(2) + 2e-7 * weight.double().abs()).all()
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**codebook.bits
    assert torch.equal(codebook.decode(codes), codebook.levels().gather(1, codes.long()))


@pytest.mark.parametrize("table", [[[-3, -1, 1, 3]], [[-3, -1, 1, 3], [-4, 0, 2, 6]]])
def test_ties_go_up(table: list[list[int]]) -> None:
    codebook = Codebook("uniform", 2, torch.tensor(table, dtype=torch.int8), torch.tensor([0.5, 2.0]))
    midpoints = (codebook.levels()[:, 1:] + codebook.levels()[:, :-1]) / 2
    assert codebook.encode(midpoints).tolist() == [[1, 2, 3], [1, 2, 3]]
    assert codebook.encode(midpoints - 1e-6).tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_form(kind: str, bits: int, scope: str) -> None:
    weight = make_gaussian(40, 100 << bits).to(torch.bfloat16)
    codebook = fit(weight, bits, kind, scope=scope)
    codes = codebook.encode(weight)
    tables = 40 if kind == "minmax" or (scope == "row" and kind in ("twin_log", "lloyd_max")) else 1
    assert codebook.table.shape == (tables, 2**bits) and codebook.table.dtype == torch.int8
    assert codebook.row_scale.shape == (40,) and codebook.row_scale.dtype == torch.float32
    assert codebook.levels().shape == (40, 2**bits)
    assert (codebook.table.int().diff() > 0).all()
    assert codes.shape == weight.shape and int(codes.max()) == 2**bits - 1
    quantized = codebook.quantize(weight)
    assert quantized.dtype == torch.float32
    assert max(len(row.unique()) for row in quantized) == 2**bits
    expected = (weight.float() - quantized).double().square().sum() / weight.double().square().sum()
    assert relative_error(weight, codebook) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_eight_bits_are_uniform(kind: str) -> None:
    weight = make_gaussian(40, 200)
    codebook = fit(weight, 8, kind)
    assert codebook.table.tolist() == [list(range(-128, 128))]
    assert torch.allclose(codebook.row_scale, weight.abs().amax(1) / 127, rtol=1e-6)
    codes = codebook.encode(torch.cat([weight, -weight, 100 * weight], 1))
    assert int(codes.min()) == 1 and int(codes.max()) == 255
    assert relative_error(weight, codebook) < 1e-4


@pytest.mark.parametrize("bits", TARGETS)
def test_gaussian_targets_at_any_scale(bits: int) -> None:
    weight = make_gaussian()
    errors = {scale: relative_error(weight * scale, fit(weight * scale, bits)) for scale in (1, 1e-6, 1e-3, 0.03, 1e3)}
    assert max(errors.values()) <= TARGETS[bits]
    assert max(errors.values()) == pytest.approx(min(errors.values()), rel=1e-6)
    limit = relative_error(weight, fit(weight, bits, "lloyd_max"))
    assert limit <= errors[1] * (1 + 1e-4) and errors[1] < (1.035 if bits < 5 else 1.08) * limit


@pytest.mark.parametrize("bits", TARGETS)
def test_a_table_per_row_fits_better(bits: int) -> None:
    weight = make_gaussian()
    layer, row = (relative_error(weight, fit(weight, bits, scope=scope)) for scope in SCOPES)
    assert (0.94 if bits < 5 else 0.9) * layer < row < layer


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_twin_log_beats_uniform(bits: int) -> None:
    generator = np.random.default_rng(0)
    for weight in (make_gaussian(), torch.from_numpy(generator.standard_t(4, (128, 1152))).float()):
        errors = {kind: relative_error(weight, fit(weight, bits, kind)) for kind in ("twin_log", "uniform", "minmax")}
        assert errors["twin_log"] < errors["uniform"] < errors["minmax"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("kind", "bits"), CASES)
def test_powers_of_two_change_nothing(kind: str, bits: int, scope: str) -> None:
    weight = make_gaussian(24, 160)
    reference = fit(weight, bits, kind, scope=scope)
    for exponent in (-60, -1, 40):
        scaled = weight * 2.0**exponent
        codebook = fit(scaled, bits, kind, scope=scope)
        assert torch.equal(codebook.table, reference.table)
        assert torch.equal(codebook.row_scale, reference.row_scale * 2.0**exponent)
        assert torch.equal(codebook.encode(scaled), reference.encode(weight))
        assert relative_error(scaled, codebook) == relative_error(weight, reference)


@pytest.mark.parametrize("bits", (2, 3, 4, 5, 6))
def test_levels_are_a_geometric_ladder(bits: int) -> None:
    """At 3 and 4 bits, one shift makes each half's levels geometric, up to the rounding to int8."""
    table = fit(make_gaussian(), bits).table[0].double()
    count = 2 ** (bits - 1)
    for half in (table[count:], -table[:count].flip(0)):
        assert half[0] > 0 and half[-1] >= 124
        if bits > 2:
            etas = torch.linspace(5, 500, 2000)[:, None].double()
            ratio = (half[-1] + etas) / (half[0] + etas)
            ladder = (half[0] + etas) * ratio ** (torch.arange(count) / (count - 1)) - etas
            assert float((ladder - half).abs().amax(1).min()) < 1.5


# The three bugs of the released code.


def test_a_half_counts_its_own_entries_only() -> None:
    """Released code: entries of the other sign sit at magnitude 1 and decide the range of weights below 1."""
    weight = make_gaussian(64) * 0.02
    narrow = torch.where(weight < 0, weight * 0.25, weight)
    for scope in SCOPES:
        codebook = fit(narrow, 3, scope=scope)
        levels = codebook.levels()
        # Each half has the levels of a half Gaussian of its own width.
        assert (levels[:, -1] / 0.02 - 2.15).abs().max() < 0.75
        assert (levels[:, 0] / -0.005 - 2.15).abs().max() < 0.75
        assert relative_error(narrow, codebook) < TARGETS[3]
        for half in (narrow.clamp(min=0), narrow.clamp(max=0)):
            error = ((codebook.quantize(narrow) - narrow) * (half != 0)).square().sum() / half.square().sum()
            assert float(error) < 0.037
    # And the other half's values may change without changing this one's ladder.
    shapes = []
    for factor in (1.0, 0.5):
        changed = torch.where(weight < 0, weight * factor, weight)
        half = fit(changed, 3).table[0, 4:].double()
        shapes.append(half / half[-1])
    assert torch.allclose(*shapes, atol=0.02)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bits", (2, 3, 4, 5))
def test_there_are_never_more_codes_than_bits_allow(bits: int, scope: str) -> None:
    """Released code: the negative half has 2**(bits - 1) + 1 levels, nine at 3 bits."""
    weight = make_gaussian(64, 600)
    codebook = fit(weight, bits, scope=scope)
    assert ((codebook.table < 0).sum(1) == 2 ** (bits - 1)).all()
    assert int(codebook.encode(weight * 10).max()) < 2**bits
    assert max(len(row.unique()) for row in codebook.quantize(weight * 10)) <= 2**bits


def test_the_shift_is_relative_to_the_row() -> None:
    """Released code: one absolute shift, so that rows of other magnitudes are quantized worse."""
    weight = make_gaussian(64)
    magnitudes = torch.logspace(-6, 3, 64)[:, None]
    for scope in SCOPES:
        codebook = fit(weight * magnitudes, 4, scope=scope)
        quantized = codebook.quantize(weight * magnitudes) / magnitudes
        errors = (quantized - weight).square().sum(1) / weight.square().sum(1)
        assert float(errors.max()) < 0.0125


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("kind", "bits"), [*CASES, ("twin_log", 8)])
def test_degenerate_weights(kind: str, bits: int, scope: str) -> None:
    for name, weight in make_degenerate().items():
        codebook = fit(weight, bits, kind, scope=scope)
        quantized, error = codebook.quantize(weight), relative_error(weight, codebook)
        assert torch.isfinite(codebook.row_scale).all() and (codebook.row_scale >= 0).all(), name
        assert torch.isfinite(quantized).all() and 0 <= error <= 1, name
        assert (codebook.table.int().diff() > 0).all() or kind == "lloyd_max", name
        zero_rows = (weight == 0).all(1)
        assert not quantized[zero_rows].any() and not codebook.row_scale[zero_rows].any(), name
        if name in ("constant", "constant_rows", "single_column", "single_element", "two_values") and kind != "minmax":
            assert error < 1e-8 or bits == 8, name
        if name == "outlier" and kind != "uniform":
            assert error < 1e-6 or bits == 8, name


def test_a_constant_row_among_others_is_exact() -> None:
    weight = make_degenerate()["constant_row"]
    assert torch.allclose(fit(weight, 3).quantize(weight)[1], weight[1], rtol=1e-5)


@pytest.mark.parametrize("bits", (2, 3, 4, 5, 6))
def test_zero_rows_do_not_change_the_table(bits: int) -> None:
    weight = make_gaussian(64, 300)
    mixed = torch.cat([torch.zeros(100, 300), weight, torch.zeros(100, 300)])
    alone, among = fit(weight, bits), fit(mixed, bits)
    assert (alone.table.int() - among.table.int()).abs().max() <= 1
    assert relative_error(mixed, among) == pytest.approx(relative_error(weight, alone), rel=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["twin_log", "uniform", "lloyd_max"])
def test_importance_weighs_columns(kind: str, scope: str) -> None:
    weight = make_gaussian(64, 256)
    weight[:, ::4] *= 0.3
    importance = torch.ones(256)
    importance[::4] = 50.0
    plain, weighted = (fit(weight, 3, kind, scope=scope, importance=given) for given in (None, importance))
    assert relative_error(weight, weighted, importance) < 0.9 * relative_error(weight, plain, importance)
    assert relative_error(weight, plain) < relative_error(weight, weighted)
    for same in (torch.ones(256), torch.zeros(256), torch.full((256,), 2.0**-70)):
        assert get_bytes(fit(weight, 3, kind, scope=scope, importance=same), weight) == get_bytes(plain, weight)


def test_importance_of_zero_everywhere_that_matters() -> None:
    weight = torch.zeros(2, 8)
    weight[:, 0] = 1.0
    importance = torch.ones(8)
    importance[0] = 0
    codebook = fit(weight, 4, importance=importance)
    assert torch.isfinite(codebook.quantize(weight)).all()
    assert relative_error(weight, codebook, importance) >= 0


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["twin_log", "lloyd_max", "minmax"])
def test_threads_do_not_change_a_bit(kind: str, scope: str) -> None:
    weight, importance = make_gaussian(300, 1152), make_gaussian(1, 1152)[0].square()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            codebook = fit(weight, 3, kind, scope=scope, importance=importance)
            results.append((*get_bytes(codebook, weight), relative_error(weight, codebook, importance)))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


def test_rows_are_fitted_alone() -> None:
    """With a table per row, a row's table and scale do not depend on its neighbours."""
    weight = make_gaussian(150, 100)
    together = fit(weight, 3, scope="row")
    for row in (0, 127, 128, 149):
        alone = fit(weight[row : row + 1], 3, scope="row")
        assert torch.equal(alone.table[0], together.table[row])
        assert torch.equal(alone.row_scale[0], together.row_scale[row])


def test_nf4_levels() -> None:
    """The published NF4 levels, times 127."""
    above = (0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1)
    below = (-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911)
    assert fit(make_gaussian(8, 64), 4, "nf4").table.tolist() == [[round(127 * level) for level in below + above]]


def test_minmax_is_round_to_nearest() -> None:
    weight = make_gaussian(32, 100) + 0.5
    codebook = fit(weight, 4, "minmax")
    step = (weight.amax(1) - weight.amin(1)) / 15
    assert torch.allclose(codebook.row_scale, step, rtol=1e-6)
    zero_point = (-weight.amin(1) / step).round()
    codes = (weight / step[:, None] + zero_point[:, None]).round().clamp(0, 15)
    expected = (codes - zero_point[:, None]) * step[:, None]
    assert torch.allclose(codebook.quantize(weight), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(dtype: torch.dtype) -> None:
    weight = make_gaussian(16, 64).to(dtype)
    same = weight.float().t().contiguous().t().requires_grad_()
    assert get_bytes(fit(weight, 4), weight) == get_bytes(fit(same, 4), same)


def test_encode_takes_any_number_of_columns() -> None:
    weight = make_gaussian(16, 64)
    for scope in SCOPES:
        codebook = fit(weight, 4, scope=scope)
        columns = [codebook.encode(weight[:, column : column + 1]) for column in range(64)]
        assert torch.equal(torch.cat(columns, 1), codebook.encode(weight))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, ("codebook.fit", "bits=7", "2, 3, 4, 5, 6, 8")),
        ({"kind": "log"}, ("codebook.fit", "kind='log'", "twin_log")),
        ({"scope": "group"}, ("codebook.fit", "scope='group'", "layer")),
        ({"kind": "nf4", "bits": 3}, ("nf4", "3-bit", "bits=4")),
        ({"importance": torch.ones(3)}, ("importance", "(3,)", "(8,)")),
        ({"weight": torch.ones(8)}, ("weight", "(8,)", "matrix")),
        ({"weight": torch.ones(0, 8)}, ("weight", "(0, 8)", "nonempty")),
        ({"weight": torch.ones(4, 8, dtype=torch.int32)}, ("weight", "int32", "floating-point")),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        fit(**{"weight": torch.ones(4, 8), "bits": 4, **options})
    assert all(word in str(error.value) for word in words)


def test_numbers_that_are_not_finite() -> None:
    for value, bits in itertools.product((torch.nan, torch.inf, -torch.inf), (4, 8)):
        weight = make_gaussian(4, 8)
        weight[2, 3] = value
        with pytest.raises(NumericalError, match="NaN or Inf"):
            fit(weight, bits)
    for value in (torch.nan, torch.inf, -1.0):
        with pytest.raises(NumericalError, match="importance"):
            fit(make_gaussian(4, 8), 4, importance=torch.tensor([1.0] * 7 + [value]))


def test_rows_that_do_not_fit() -> None:
    codebook = fit(make_gaussian(4, 8), 4)
    for call in (codebook.encode, codebook.decode, codebook.quantize):
        with pytest.raises(ConfigError, match=r"\(4, columns\)"):
            call(torch.zeros(5, 8))
