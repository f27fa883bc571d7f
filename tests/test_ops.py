import itertools

import pytest
import torch

from lrqdit.kernels import ops
from lrqdit.kernels.ops import Rounding, Tokens, TransformArgs, WeightArgs
from lrqdit.numerics import rotation
from lrqdit.numerics.packing import pack
from lrqdit.numerics.tokens import InputTransform, quantize_tokens

NO_TRANSFORM = TransformArgs()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weight(out_features, in_features, bits, table_rows, seed=0, has_bias=True):
    """A weight for the operators, and the dense int8 weight it stands for."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=generator).to(torch.uint8)
    table = None
    if bits == 8:
        dense = [[int(c) - 128 for c in row] for row in codes]
    elif table_rows == "trellis":
        table = torch.randint(-127, 128, (1, 2 << bits), generator=generator).to(torch.int8)
        path = [[0] * in_features] * 6 + codes.tolist()
        dense = [
            [
                int(table[0, 2 * (c[0] ^ (c[1] ^ c[6]) & 1) + ((c[2] ^ c[4]) & 1)])
                for c in zip(*path[n : n + 7][::-1], strict=True)
            ]
            for n in range(out_features)
        ]
    else:
        rows = {"1": 1, "N": out_features}[table_rows]
        table = torch.randint(-127, 128, (rows, 1 << bits), generator=generator).to(torch.int8)
        dense = [[int(table[i % rows if rows > 1 else 0, int(c)]) for c in row] for i, row in enumerate(codes)]
    row_scale = torch.rand(out_features, generator=generator) + 0.1
    bias = torch.randn(out_features, generator=generator) if has_bias else None
    return WeightArgs(pack(codes, bits), table, row_scale, bias, bits), torch.tensor(dense, dtype=torch.int64)


def transform_arguments(kind, width):
    built, _ = rotation.build(width, kind, 1, channel_absmax=random(width).abs())
    offset, scale = random(width, seed=1).half(), torch.exp(random(width, seed=2)).half()
    permutation = None if built.permutation is None else built.permutation.int()
    return TransformArgs(offset, scale, kind, built.factors, built.block1, permutation, built.block2)


@pytest.mark.parametrize("kind", list(rotation.ROTATIONS))
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_opcheck_quantize_tokens(kind, bits):
    arguments = (random(5, 24), *transform_arguments(kind, 24), bits, 0.9)
    torch.library.opcheck(torch.ops.lrqdit.quantize_tokens.default, arguments)


def test_opcheck_quantize_tokens_of_a_transposed_view():
    x = random(24, 5).t()
    torch.library.opcheck(torch.ops.lrqdit.quantize_tokens.default, (x, *NO_TRANSFORM, 8, 1.0))
    codes, _ = ops.quantize_tokens(x, *NO_TRANSFORM, 8, 1.0)
    assert codes.is_contiguous()
    assert torch.equal(codes, ops.quantize_tokens(x.contiguous(), *NO_TRANSFORM, 8, 1.0)[0])


@pytest.mark.parametrize(("bits", "rows"), [(3, "N"), (4, "1"), (4, "trellis"), (5, "trellis"), (6, "1"), (8, "1")])
def test_opcheck_products(bits, rows):
    weight, _ = random_weight(20, 24, bits, rows)
    codes = torch.randint(-128, 128, (5, 24)).to(torch.int8)
    torch.library.opcheck(torch.ops.lrqdit.quantized_linear.default, (codes, torch.rand(5), *weight, torch.bfloat16))
    arguments = (random(5, 24), *transform_arguments("hadamard", 24), *weight, torch.float32)
    torch.library.opcheck(torch.ops.lrqdit.weight_only_linear.default, arguments)


@pytest.mark.parametrize(("bits", "rows"), [*itertools.product([2, 3, 4, 5, 6], "1N"), (8, "1")])
@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 33, 20), (3, 7, 13), (17, 1, 5), (0, 16, 24)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_quantized_linear_is_exact(bits, rows, shape, has_bias):
    tokens, out_features, in_features = shape
    weight, dense = random_weight(out_features, in_features, bits, rows, has_bias=has_bias)
    codes = torch.randint(-128, 128, (tokens, in_features), generator=torch.Generator().manual_seed(9)).to(torch.int8)
    scale = torch.rand(tokens, generator=torch.Generator().manual_seed(10))
    whole = (codes.long() @ dense.T).to(torch.float32)  # below 2^24 here, so exact
    expected = whole * weight[2] * scale[:, None]
    if has_bias:
        expected = expected + weight[3]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = ops.quantized_linear(codes, scale, *weight, dtype)
        assert y.dtype == dtype and y.shape == (tokens, out_features)
        assert torch.equal(y, expected.to(dtype))


@pytest.mark.parametrize(("bits", "rows"), [(2, "1"), (3, "N"), (4, "1"), (5, "1"), (6, "N"), (8, "1")])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_weight_only_linear(bits, rows, tokens):
    weight, dense = random_weight(19, 24, bits, rows)
    x, arguments = random(tokens, 24), transform_arguments("hadamard", 24)
    y = ops.weight_only_linear(x, *arguments, *weight, torch.float32)
    matrix = arguments.build_rotation(24).matrix().double()
    rotated = ((x.double() - arguments[0].double()) * arguments[1].double()) @ matrix
    expected = rotated @ (dense.double() * weight[2].double()[:, None]).T + weight[3].double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-3)


def test_long_products_are_exact():
    """K = 5000 products of extreme codes: 5000 * 128 * 128 needs 27 bits."""
    a = torch.full((3, 5000), -128, dtype=torch.int8)
    b = torch.full((4, 5000), -128, dtype=torch.int8)
    a[1], b[2] = 127, torch.arange(5000).remainder(255).sub(127).to(torch.int8)
    expected = (a.long() @ b.long().T).int()
    assert torch.equal(ops.integer_matmul(a, b), expected)


def test_integer_product_by_floats():
    """The path of devices other than the CPU."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (3, 5000), generator=generator).to(torch.int8)
    b = torch.randint(-128, 128, (4, 5000), generator=generator).to(torch.int8)
    a[0], b[0] = -128, -128
    expected = (a.long() @ b.long().T).int()
    assert torch.equal(ops.float_integer_matmul(a, b), expected)
    assert expected[0, 0] == 5000 * 2**14


def test_decode_of_eight_bits():
    codes = torch.arange(256).view(16, 16).to(torch.uint8)
    decoded = ops.decode_weight(WeightArgs(pack(codes, 8), None, torch.ones(16), None, 8), 16)
    assert decoded.dtype == torch.int8 and torch.equal(decoded.int(), codes.int() - 128)


def test_decode_of_many_rows(monkeypatch):
    weight, dense = random_weight(40, 16, 3, "N")
    monkeypatch.setattr(ops, "CHUNK_ELEMENTS", 1)
    assert torch.equal(ops.decode_weight(weight, 16).long(), dense)


@pytest.mark.parametrize(
    ("bits", "rows"), [(b, r) for b in (2, 3, 4, 5) for r in ("1", "trellis")] + [(6, "1")], ids=str
)
@pytest.mark.parametrize("in_features", [16, 41])
def test_decode_in_parts(bits, rows, in_features, monkeypatch):
    """A path goes on from one part to the next."""
    monkeypatch.setattr(ops, "CHUNK_ELEMENTS", 16 * in_features)
    weight, dense = random_weight(150, in_features, bits, rows)
    decoded = ops.decode_weight(weight, in_features)
    assert decoded.is_contiguous() and torch.equal(decoded.long(), dense)


@pytest.mark.parametrize("kind", list(rotation.ROTATIONS))
def test_parts_give_the_bits_of_the_whole(kind, monkeypatch):
    x, (weight, _) = random(75, 96), random_weight(150, 96, 4, "1")
    results = []
    for size in (1, 1 << 30):
        monkeypatch.setattr(ops, "CHUNK_ELEMENTS", size)
        transform = transform_arguments(kind, 96)
        tokens = Tokens(*ops.reference_quantize_tokens(x, transform, Rounding(8, 0.9)))
        y = ops.reference_quantized_linear(tokens, weight, torch.bfloat16)
        results.append((ops.reference_apply_transform(x, transform), tokens.codes, tokens.scale, y))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", list(rotation.ROTATIONS))
@pytest.mark.parametrize("shape", [(75, 96), (5, 96), (40, 1152), (33, 4222), (0, 24)])
def test_the_operators_are_the_transform_and_the_rounding(kind, shape):
    x, arguments = random(*shape), transform_arguments(kind, shape[1])
    before = x.clone()
    expected = InputTransform(arguments.build_rotation(shape[1]), *arguments[:2]).apply(x)
    assert torch.equal(ops.reference_apply_transform(x, arguments), expected)
    for bits, levels in ((8, "uniform"), (4, "uniform"), (4, "normal")):
        if shape[0]:
            codes, scale = ops.reference_quantize_tokens(x, arguments, Rounding(bits, 0.9, levels))
            assert all(map(torch.equal, (codes, scale), quantize_tokens(expected, bits, 0.9, levels)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    x, (weight, _) = random(200, 1152), random_weight(150, 1152, 3, "trellis")

    def compute():
        rounding = Rounding(4, 0.9, "normal")
        tokens = Tokens(*ops.reference_quantize_tokens(x, transform_arguments("hadamard", 1152), rounding))
        return *tokens[:2], ops.reference_quantized_linear(tokens, weight, torch.bfloat16)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = compute()
        torch.set_num_threads(threads)
        assert all(map(torch.equal, compute(), expected))
    finally:
        torch.set_num_threads(before)
