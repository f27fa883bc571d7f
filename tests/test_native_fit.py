"""Native fitting: the very bytes of the numpy reference, on every instruction set and for any number of threads."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_codebook import CASES, SCOPES, make_degenerate, make_gaussian

from lrqdit import native
from lrqdit.config import WEIGHT_BITS
from lrqdit.errors import ConfigError, NumericalError
from lrqdit.kernels import ops
from lrqdit.numerics import codebook, rotation
from lrqdit.numerics import tokens as activation
from lrqdit.numerics.packing import pack

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason="lrqdit was installed without its native library")
KINDS = [*CASES, ("twin_log", 8)]


def get_bytes(weight: torch.Tensor, bits: int, kind: str, scope: str, importance: torch.Tensor | None) -> dict:
    levels = codebook.fit(weight, bits, kind, scope=scope, importance=importance)
    codes = levels.encode(weight)
    tensors = {"table": levels.table, "row_scale": levels.row_scale, "codes": codes, "packed": pack(codes, bits)}
    return {name: (tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in tensors.items()}


def check_same(*arguments) -> None:
    found = get_bytes(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", None)
        expected = get_bytes(*arguments)
    assert [name for name in found if found[name] != expected[name]] == []


def instruction_sets() -> list[str]:
    if native.LIBRARY is None:
        return []
    return [name for name, missing in native.instruction_sets(native.LIBRARY).items() if not missing]


def random_importance(in_features: int) -> torch.Tensor:
    return torch.rand(in_features, generator=torch.Generator().manual_seed(3)).square()


@pytest.fixture
def restored():
    """The instruction set and the number of threads as they were, afterwards."""
    name, threads = native.LIBRARY.lrq_isa().decode(), torch.get_num_threads()
    yield
    native.use(name)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("has_importance", [False, True])
@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_degenerate_weights(kind, bits, has_importance):
    for weight in make_degenerate().values():
        importance = random_importance(weight.shape[1]) if has_importance else None
        for scope in SCOPES:
            check_same(weight, bits, kind, scope, importance)


@st.composite
def draw_weights(draw):
    """Rows of different magnitude and law, some zero, some of one sign, of any shape."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    weight = make_gaussian(rows, columns, draw(st.integers(0, 1000)))
    exponents = draw(st.lists(st.integers(-30, 30), min_size=rows, max_size=rows))
    weight *= torch.tensor([10.0**e for e in exponents])[:, None]
    weight[:, draw(st.integers(0, columns - 1))] *= draw(st.sampled_from((1.0, 0.0, 40.0)))
    weight[draw(st.integers(0, rows - 1))] *= draw(st.sampled_from((1.0, 0.0)))
    chosen = draw(st.integers(0, rows - 1))
    weight[chosen] = draw(st.sampled_from((torch.abs, torch.neg, torch.round)))(weight[chosen].abs())
    return weight


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(draw_weights(), st.sampled_from(KINDS), st.sampled_from(SCOPES), st.booleans())
def test_any_weight(weight, choice, scope, has_importance):
    kind, bits = choice
    check_same(weight, bits, kind, scope, random_importance(weight.shape[1]) if has_importance else None)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (130, 33), (257, 700), (17, 1152), (9, 12288), (20000, 3)])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_shapes(bits, shape):
    """Several blocks and parts, whole vectors and rests."""
    check_same(make_gaussian(*shape), bits, "twin_log", "layer", None)
    check_same(make_gaussian(*shape).to(torch.bfloat16), bits, "uniform", "layer", random_importance(shape[1]))


@pytest.mark.parametrize("name", instruction_sets())
def test_instruction_sets_and_threads(name, restored):
    weight, importance = make_gaussian(150, 1000), random_importance(1000)
    weight[7], weight[9] = 0, weight[9].abs()
    native.use(name)
    for threads, (kind, bits) in itertools.product(
        (1, 2), [("twin_log", 4), ("lloyd_max", 3), ("uniform", 2), ("twin_log", 6)]
    ):
        torch.set_num_threads(threads)
        check_same(weight, bits, kind, "layer", importance)
        check_same(weight[:20], bits, kind, "row", None)
    check_same(weight, 8, "twin_log", "layer", None)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(WEIGHT_BITS), st.integers(1, 4), st.booleans(), st.integers(0, 1000))
def test_encode_with_any_table(bits, rows, has_tables, seed):
    """Ties, values beyond the outer levels, infinite quotients, rows of scale 0."""
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randperm(256, generator=generator)[: 2**bits].sort().values - 128 for _ in range(rows)]
    table = torch.stack(tables)[: rows if has_tables else 1].to(torch.int8)
    scale = torch.tensor([1.0, 2.0**-140, 3e38, 0.0])[:rows]
    levels = codebook.Codebook("twin_log", bits, table, scale)
    weight = (torch.arange(-270, 271) / 2 * scale[:, None]).nan_to_num_()
    weight = torch.cat([weight, torch.tensor([[3e38, -3e38, 0.0, -0.0]]).repeat(rows, 1)], 1)
    found = levels.encode(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", None)
        assert torch.equal(found, levels.encode(weight))


@pytest.mark.parametrize("kind", ["none", "hadamard", "block_hadamard", "outlier"])
@pytest.mark.parametrize("is_smoothed", [False, True])
def test_fold(kind, is_smoothed):
    """Butterflies add in another order than matrix products: float rounding, nothing more."""
    parts, signs = rotation.build(96, kind, 1)
    scale = torch.ones(96) if signs is None else signs
    scale = (scale * (random_importance(96) + 0.5)).half() if is_smoothed else scale.half()
    transform = activation.InputTransform(parts, None, scale)
    weight = make_gaussian(21, 96).to(torch.bfloat16)
    folded = ops.fold(transform, weight)
    assert folded.dtype == torch.float32 and folded.is_contiguous()
    torch.testing.assert_close(folded, (weight / scale.float()) @ parts.matrix(), rtol=1e-5, atol=1e-5)


def test_apply_transform_is_a_sound_operator():
    for kind in ("none", "hadamard"):
        built, _ = rotation.build(48, kind, 1)
        x, transform = make_gaussian(5, 48), ops.TransformArgs(None, torch.ones(48).half(), kind, built.factors)
        torch.library.opcheck(ops.apply_transform, (x, *transform))
        expected = ops.reference_apply_transform(x, transform)
        torch.testing.assert_close(ops.apply_transform(x, *transform), expected, rtol=1e-5, atol=1e-5)


def test_errors_are_the_same():
    weight = make_gaussian(4, 8)
    weight[1, 2] = torch.nan
    with pytest.raises(NumericalError, match="NaN or Inf"):
        codebook.fit(weight, 4)
    with pytest.raises(ConfigError, match="code 200 does not fit 3 bits"):
        pack(torch.tensor([[1, 200], [0, 3]], dtype=torch.uint8), 3)
    assert pack(torch.zeros(0, 5, dtype=torch.uint8), 4).shape == (0, 1, 128)
