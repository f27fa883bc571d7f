import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrqdit.errors import RotationError
from lrqdit.numerics import rotation
from lrqdit.numerics.hadamard import hadamard_matrix
from lrqdit.numerics.rotation import ROTATIONS, build, zigzag_permutation
from lrqdit.numerics.shapes import check_factors, kronecker_factors

TRANSFORMER_WIDTHS = [
    *(64, 96, 192, 288, 384, 864, 1024, 1152, 1408, 1536, 1920, 2048, 2240, 2304, 2432, 2816, 3072, 3360, 3840),
    *(4096, 4608, 5120, 5600, 6144, 7680, 8960, 9728, 10240, 12288, 13824, 15360),
]
# Widths with a DCT factor (7, 99, 188, 1250, 1400, 2039) and with two overlapping products (2053, 4099).
ODD_WIDTHS = [1, 2, 3, 7, 99, 188, 1250, 1400, 2039, 2053, 4099]
SALIENT = torch.tensor([245.0, 60.0, 40.0, 30.0, 25.0, 20.0])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def activations(tokens, in_features, seed=0):
    return torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(seed))


def salient_activations(tokens, in_features, seed=0, scales=SALIENT / 4):
    x = activations(tokens, in_features, seed)
    channels = torch.randperm(in_features, generator=torch.Generator().manual_seed(99))[: len(scales)]
    x[:, channels] *= scales
    return x


def make(*arguments, **named):
    """The rotation alone."""
    return build(*arguments, **named)[0]


@functools.cache
def built(in_features, kind, seed=0):
    absmax = activations(64, in_features).abs().amax(0) if kind == "outlier" else None
    return make(in_features, kind, seed, channel_absmax=absmax)


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def quantization_error(x):
    scale = x.abs().amax(-1, keepdim=True) / 7
    return relative_error((x / scale).round() * scale, x) ** 2


@pytest.mark.parametrize("order", [1, 2, *range(4, 201, 4), 420, 500, 1400])
def test_hadamard_matrix_has_orthogonal_rows_of_signs(order):
    if order == 188:
        pytest.skip("no construction")
    matrix = hadamard_matrix(order)
    assert matrix.dtype == torch.int8
    assert set(matrix.unique().tolist()) <= {-1, 1}
    assert torch.equal(matrix.float() @ matrix.float().T, order * torch.eye(order))


def test_hadamard_matrix_is_a_copy():
    hadamard_matrix(12).zero_()
    assert hadamard_matrix(12).abs().min() == 1


@pytest.mark.parametrize("order", [0, -4, 3, 6, 188, 2.0, "4"])
def test_orders_without_a_construction_are_refused(order):
    with pytest.raises(RotationError, match="kronecker_factors"):
        hadamard_matrix(order)


@pytest.mark.parametrize("in_features", TRANSFORMER_WIDTHS)
def test_transformer_widths_are_products_of_small_hadamard_orders(in_features):
    factors = kronecker_factors(in_features)
    assert math.prod(factors) == in_features
    assert all(0 < factor <= 128 for factor in factors)


@pytest.mark.parametrize(
    ("in_features", "factors"),
    [(1, ()), (7, (-7,)), (99, (-99,)), (188, (-47, 4)), (1152, (12, 12, 8)), (1250, (-625, 2)), (2053, (32, 64))],
)
def test_kronecker_factors_are_fixed(in_features, factors):
    assert kronecker_factors(in_features) == factors


def test_a_huge_prime_width_is_covered_by_two_overlapping_products():
    covered = math.prod(kronecker_factors(1_000_003))
    assert 500_002 <= covered < 1_000_003


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("in_features", TRANSFORMER_WIDTHS + ODD_WIDTHS)
def test_rotation_is_orthogonal(in_features, kind):
    if kind == "outlier" and in_features in (2039, 2053, 4099):
        pytest.skip("a prime above 128")
    made, x = built(in_features, kind), activations(3, in_features, 1)
    y = made.apply(x)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert relative_error(made.apply_transpose(y), x) < 1e-5
    assert relative_error(made.apply(made.apply_transpose(x)), x) < 1e-5


@settings(max_examples=40, deadline=None)
@given(in_features=st.integers(1, 600), kind=st.sampled_from(list(ROTATIONS)), seed=st.integers(0, 2**40))
def test_every_small_width_gives_an_orthogonal_matrix(in_features, kind, seed):
    if kind == "outlier" and in_features > 128 and all(in_features % d for d in range(2, 129)):
        in_features -= 1
    made = make(in_features, kind, seed, channel_absmax=activations(8, in_features, 3).abs().amax(0))
    matrix = made.matrix()
    assert torch.allclose(matrix @ matrix.T, torch.eye(in_features), atol=5e-6)
    x = activations(2, in_features, 4)
    assert torch.allclose(made.apply(x), x @ matrix, atol=1e-4)
    assert torch.allclose(made.apply_transpose(x), x @ matrix.T, atol=1e-4)
    if kind == "hadamard" and in_features > 1:
        assert matrix.abs().max() <= math.sqrt(2 / in_features) * 1.0001


def test_hadamard_matches_a_kronecker_product():
    made = make(1152, "hadamard", 5)
    twelve = hadamard_matrix(12).double()
    expected = torch.kron(torch.kron(twelve, twelve), hadamard_matrix(8).double()) / math.sqrt(1152)
    assert torch.allclose(made.matrix().double(), expected, atol=1e-7)


def test_block_hadamard_stays_within_its_blocks():
    made = make(384, "block_hadamard")
    inside = torch.block_diag(*[torch.ones(128, 128)] * 3)
    assert made.factors == (128,)
    assert torch.allclose(made.matrix().abs(), inside / math.sqrt(128), atol=1e-7)


def test_outlier_matches_its_dense_factors():
    made = built(288, "outlier")
    copies = 288 // made.factors[0]
    first, second = torch.block_diag(*[made.block1] * copies), torch.block_diag(*[made.block2] * copies)
    assert torch.allclose(made.matrix(), first @ torch.eye(288)[:, made.permutation] @ second, atol=1e-5)


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("in_features", [99, 384, 1152])
def test_folding_leaves_the_layer_unchanged(in_features, kind):
    made = built(in_features, kind)
    x, weight = activations(5, in_features, 1), activations(7, in_features, 2)
    assert relative_error(made.apply(x) @ made.apply(weight).T, x @ weight.T) < 1e-5


@pytest.mark.parametrize("in_features", [192, 1152, 2053, 2304])
def test_one_outlier_of_245_is_spread_over_the_channels(in_features):
    x = activations(16, in_features)
    x[:, 5] = 245.0
    kinds = ["hadamard"] if in_features == 2053 else ["hadamard", "outlier"]
    for kind in kinds:
        made = make(in_features, kind, channel_absmax=x.abs().amax(0))
        assert made.apply(x).abs().max() < 5 * 245 / math.sqrt(in_features) + 5


def test_rotation_lowers_the_quantization_error():
    x, calibration = salient_activations(64, 1152, 1), salient_activations(64, 1152, 2)
    plain = quantization_error(x)
    full = quantization_error(make(1152, "hadamard").apply(x))
    fitted = quantization_error(make(1152, "outlier", channel_absmax=calibration.abs().amax(0)).apply(x))
    sampled = quantization_error(make(1152, "outlier", sample=calibration).apply(x))
    assert full < plain
    assert fitted < plain
    assert sampled < plain


@pytest.mark.parametrize("kind", ["hadamard", "block_hadamard"])
def test_signs_depend_on_the_seed_alone(kind):
    torch.manual_seed(1)
    _, first = build(1152, kind, 3)
    torch.manual_seed(2)
    _, second = build(1152, kind, 3)
    assert torch.equal(first, second)
    assert first.dtype == torch.float32
    assert not torch.equal(first, build(1152, kind, 4)[1])
    assert set(first.tolist()) == {-1.0, 1.0}
    assert abs(float(first.mean())) < 0.15


@pytest.mark.parametrize("kind", ["none", "outlier"])
def test_other_kinds_have_no_signs(kind):
    assert build(96, kind)[1] is None


def test_building_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    build(96, "outlier", channel_absmax=torch.ones(96))
    build(96, "hadamard")
    assert torch.equal(state, torch.get_rng_state())


@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(1, 40), block=st.integers(1, 40), seed=st.integers(0, 1000))
def test_zigzag_deals_every_round_evenly(blocks, block, seed):
    magnitudes = activations(1, blocks * block, seed)[0].abs()
    permutation = zigzag_permutation(magnitudes, block)
    assert torch.equal(permutation.sort().values, torch.arange(blocks * block))
    ranks = magnitudes.argsort(descending=True, stable=True).argsort()[permutation].reshape(blocks, block)
    assert torch.equal(ranks // blocks, torch.arange(block).expand(blocks, block))
    sums = ranks.float().sum(1)
    assert sums.max() - sums.min() <= (blocks - 1 if block % 2 else 0)


@pytest.mark.parametrize("kind", ["hadamard", "outlier"])
@pytest.mark.parametrize(("tokens", "in_features"), [(1, 1152), (257, 1152), (5, 128), (1023, 96), (33, 1250)])
def test_bits_do_not_depend_on_the_number_of_threads(tokens, in_features, kind):
    x, made = activations(tokens, in_features), built(in_features, kind)
    single = made.apply(x), made.apply_transpose(x)
    torch.set_num_threads(2)
    assert torch.equal(single[0], made.apply(x))
    assert torch.equal(single[1], made.apply_transpose(x))


@pytest.mark.parametrize("argument", ["channel_absmax", "sample"])
def test_the_fit_does_not_depend_on_the_number_of_threads(argument):
    calibration = salient_activations(50, 1152)
    given = {argument: calibration.abs().amax(0) if argument == "channel_absmax" else calibration}
    single = make(1152, "outlier", 1, **given)
    torch.set_num_threads(2)
    double = make(1152, "outlier", 1, **given)
    assert torch.get_num_threads() == 2
    assert all(torch.equal(getattr(single, n), getattr(double, n)) for n in ("block1", "block2", "permutation"))
    assert not torch.equal(single.block1, make(1152, "outlier", 2, **given).block1)


def test_a_fit_to_equal_magnitudes_needs_no_rotation():
    made = make(256, "outlier", channel_absmax=torch.zeros(256))
    assert torch.equal(made.matrix().abs().sum(0), torch.ones(256))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_every_floating_dtype_is_rotated_in_float32(kind, dtype):
    made, x = built(96, kind), activations(4, 96).to(dtype).reshape(2, 2, 96)
    assert made.apply(x).dtype == torch.float32
    assert torch.equal(made.apply(x), made.apply(x.float()))
    assert made.apply(x).shape == x.shape


@pytest.mark.parametrize("kind", ROTATIONS)
def test_views_vectors_and_no_tokens_at_all(kind):
    made, x = built(96, kind), activations(96, 6)
    assert torch.equal(made.apply(x.T), made.apply(x.T.contiguous()))
    assert made.apply(x[:, 0]).shape == (96,)
    assert made.apply(torch.zeros(2, 0, 96)).shape == (2, 0, 96)


def test_apply_leaves_its_input_alone_and_passes_gradients():
    for in_features in (96, 2053):
        with torch.inference_mode():
            built(in_features, "hadamard").apply(torch.ones(1, in_features))
        x = activations(2, in_features).requires_grad_()
        before = x.detach().clone()
        y = built(in_features, "hadamard").apply(x)
        y.sum().backward()
        assert torch.equal(x.detach(), before)
        assert torch.allclose(x.grad, built(in_features, "hadamard").apply_transpose(torch.ones_like(x)), atol=1e-4)


def test_default_dtype_does_not_matter():
    expected = make(99, "outlier", channel_absmax=torch.arange(99.0)).matrix()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = make(99, "outlier", channel_absmax=torch.arange(99.0, dtype=torch.float32))
        assert torch.equal(made.matrix(), expected)
        assert make(2053, "hadamard").apply(torch.ones(2053)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((96, "fourier"), {}, "'none', 'hadamard', 'block_hadamard', 'outlier'"),
        ((0, "hadamard"), {}, "in_features=0"),
        ((-3, "none"), {}, "in_features=-3"),
        ((96.0, "hadamard"), {}, "in_features=96.0"),
        ((True, "hadamard"), {}, "in_features=True"),
        ((96, "hadamard", -1), {}, "seed=-1"),
        ((96, "hadamard", 2**63), {}, "seed="),
        ((96, "outlier"), {"channel_absmax": torch.ones(95)}, r"\(95,\)"),
        ((96, "outlier"), {"channel_absmax": torch.ones(1, 96)}, r"\(1, 96\)"),
        ((96, "outlier"), {"channel_absmax": torch.full((96,), math.nan)}, "finite"),
        ((96, "outlier"), {"channel_absmax": torch.full((96,), math.inf)}, "finite"),
        ((96, "outlier"), {"channel_absmax": -torch.ones(96)}, "at least 0"),
        ((96, "outlier"), {"sample": torch.ones(96)}, "tokens"),
        ((96, "outlier"), {"sample": torch.ones(0, 96)}, "tokens"),
        ((96, "outlier"), {"sample": torch.full((2, 96), math.nan)}, "finite"),
        ((131, "outlier"), {"channel_absmax": torch.ones(131)}, "use kind='hadamard'"),
    ],
)
def test_build_refuses_bad_arguments(arguments, keywords, message):
    with pytest.raises(RotationError, match=message):
        build(*arguments, **keywords)


def test_apply_refuses_bad_tensors():
    made = make(96, "hadamard")
    for operation in (made.apply, made.apply_transpose):
        with pytest.raises(RotationError, match="in_features=96"):
            operation(torch.ones(2, 95))
        with pytest.raises(RotationError, match="in_features=96"):
            operation(torch.tensor(1.0))
        with pytest.raises(RotationError, match="floating"):
            operation(torch.ones(2, 96, dtype=torch.int32))


@pytest.mark.parametrize(
    ("kind", "in_features", "factors"),
    [
        ("fourier", 96, (96,)),
        ("hadamard", 0, ()),
        ("hadamard", 96, (48,)[:0]),
        ("hadamard", 96, (6, 16)),
        ("hadamard", 96, (96, 0)),
        ("hadamard", 96, (12, 8.0)),
        ("hadamard", 96, (40,)),
        ("hadamard", 96, (192,)),
        ("hadamard", 8192, (8192,)),
        ("block_hadamard", 96, (64,)),
        ("block_hadamard", 96, (-32,)),
        ("block_hadamard", 96, (3,)),
        ("none", 96, (96,)),
        ("outlier", 96, (96, 1)),
        ("outlier", 512, (256,)),
    ],
)
def test_factors_that_do_not_fit_are_refused(kind, in_features, factors):
    with pytest.raises(RotationError):
        check_factors(kind, in_features, factors)


def test_the_table_of_the_module_names_every_kind():
    assert all(f"`{kind}`" in (rotation.__doc__ or "") for kind in ROTATIONS)


def test_outlier_without_magnitudes_is_orthogonal_and_mixes():
    made = make(96, "outlier")
    matrix = made.matrix()
    assert torch.allclose(matrix @ matrix.T, torch.eye(96), atol=1e-5)
    assert float(matrix.abs().max()) < 0.9
