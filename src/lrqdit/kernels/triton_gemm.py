"""Triton kernels of the products: int8 codes, or float activations, times packed weights, with scales and bias.

A plan is one way to do a product, and the plans of a shape are timed once, on its first call (:func:`tune`):

===========  =========================================================================================================
``fused``    packed codes are decoded in registers, tile by tile, right before the tensor cores use them
``decoded``  one kernel decodes the whole weight into an int8 scratch, then a plain int8 GEMM: for many tokens
``int_mm``   as ``decoded`` with the vendor's GEMM (``torch._int_mm``) and the scales in a kernel of their own
``float``    as ``decoded`` with float16 tensor cores, for devices whose int8 is slow; the sums are still exact
===========  =========================================================================================================

All of them give the same bits. The scratch comes from torch's caching allocator at each call and goes back right after
the launch: the layers of a stream share it in stream order, and a CUDA graph keeps its own.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from lrqdit.kernels.ops import Tokens, TransformArgs, WeightArgs
from lrqdit.kernels.triton_prologue import transform_tokens
from lrqdit.numerics.shapes import TILE

GROUP_M = 8  # blocks of tokens that share a weight tile in the L2 cache
DECODE_BLOCK = 64, 128
SCALE_BLOCK = 16, 256
TIMED_RUNS = 5


@dataclass(frozen=True)
class Plan:
    """A path and the launch of its GEMM; ``tma``: load tiles by the tensor memory accelerator (Hopper and later)."""

    path: str
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False


# Each list begins with a plan that fits every device; it is used where nothing can be timed.
FEW_TOKENS = (
    Plan("fused", 16, 32, 256, 4, 3),
    Plan("fused", 16, 16, 512, 4, 3),
    Plan("fused", 16, 64, 128, 4, 4),
)
SOME_TOKENS = (
    Plan("fused", 64, 64, 128, 4, 3),
    Plan("fused", 32, 64, 256, 4, 3),
    Plan("fused", 64, 128, 128, 4, 3),
    Plan("decoded", 64, 64, 128, 4, 4),
    Plan("decoded", 64, 128, 128, 4, 4, True),
)
MANY_TOKENS = (
    Plan("decoded", 128, 128, 64, 8, 3),
    Plan("decoded", 128, 256, 128, 8, 3),
    Plan("decoded", 128, 256, 128, 8, 4, True),
    Plan("decoded", 128, 128, 128, 4, 4, True),
    Plan("decoded", 256, 128, 128, 8, 4, True),
    Plan("fused", 128, 128, 128, 8, 3),
    Plan("int_mm", 0, 0, 0, 0, 0),
    Plan("float", 128, 128, 64, 8, 3),
)
WEIGHT_ONLY_FEW = (
    Plan("fused", 16, 32, 128, 4, 3),
    Plan("fused", 16, 16, 256, 4, 3),
    Plan("fused", 16, 64, 64, 4, 3),
)
WEIGHT_ONLY_MANY = (
    Plan("fused", 64, 64, 64, 4, 3),
    Plan("fused", 128, 64, 64, 4, 3),
    Plan("fused", 128, 128, 64, 8, 3),
)

choices: dict[tuple, Plan] = {}  # what was chosen, by (operator, device, tokens rounded up, N, K, bits, coding, dtype)


def quantized_linear(tokens: Tokens, weight: WeightArgs, out_dtype: torch.dtype) -> Tensor:
    """``lrqdit::quantized_linear``: codes int8 (tokens, K), scale float32 (tokens,) -> (tokens, N)."""
    codes = tokens.codes.contiguous()
    count, in_features = codes.shape
    if count == 0:
        return codes.new_empty(0, weight.out_features, dtype=out_dtype)
    plans = FEW_TOKENS if count <= 16 else SOME_TOKENS if count <= 512 else MANY_TOKENS
    key = ("quantized", codes.device, _rounded_up(count), *_describe(weight, in_features), out_dtype)

    def run(plan: Plan) -> Tensor:
        return multiply(plan, Tokens(codes, tokens.scale), weight, out_dtype)

    return run(tune(key, plans, run))


def weight_only_linear(x: Tensor, transform: TransformArgs, weight: WeightArgs, out_dtype: torch.dtype) -> Tensor:
    """``lrqdit::weight_only_linear``: x (tokens, K), any float dtype -> (tokens, N)."""
    is_plain = transform.rotation == "none" and transform.input_offset is None and transform.input_scale is None
    x = (x if is_plain and x.dtype != torch.float64 else transform_tokens(x, transform)).contiguous()
    count, in_features = x.shape
    if count == 0:
        return x.new_empty(0, weight.out_features, dtype=out_dtype)
    plans = WEIGHT_ONLY_FEW if count <= 32 else WEIGHT_ONLY_MANY
    key = ("weight_only", x.device, _rounded_up(count), *_describe(weight, in_features), x.dtype, out_dtype)

    def run(plan: Plan) -> Tensor:
        return multiply_float(plan, x, weight, out_dtype)

    return run(tune(key, plans, run))


def _describe(weight: WeightArgs, in_features: int) -> tuple:
    """What of a weight decides which plan is fastest."""
    coding = None if weight.table is None else (weight.table.shape[0] > 1, weight.is_trellis)
    return weight.out_features, in_features, weight.bits, coding


def tune(key: tuple, plans: tuple[Plan, ...], run: Callable[[Plan], Tensor]) -> Plan:
    """The fastest plan of a shape. The first call times them all (and waits for the device); later ones look it up.

    Where nothing can be timed, inside a CUDA graph's capture or in Triton's interpreter, it is the first plan.
    """
    if (chosen := choices.get(key)) is not None:
        return chosen
    device = key[1]
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return plans[0]
    usable = [plan for plan in plans if not plan.tma or _has_tma(device)]
    choices[key] = min(usable, key=functools.partial(_milliseconds, run))
    return choices[key]


def _milliseconds(run: Callable[[Plan], Tensor], plan: Plan) -> float:
    try:
        run(plan)
    except (TritonError, RuntimeError):  # too much shared memory, or a shape _int_mm refuses
        return float("inf")
    times = []
    for _ in range(TIMED_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(plan)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[TIMED_RUNS // 2]


@functools.cache
def _has_tma(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def multiply(plan: Plan, tokens: Tokens, weight: WeightArgs, out_dtype: torch.dtype) -> Tensor:
    """:func:`quantized_linear` by one plan, whatever the shape; codes contiguous, at least one token."""
    codes, scale, (packed, table, row_scale, bias, bits) = tokens.codes, tokens.scale, weight
    (count, in_features), out_features = codes.shape, weight.out_features
    out = codes.new_empty(count, out_features, dtype=out_dtype)
    w = packed if plan.path == "fused" else decode(weight)
    if plan.path == "int_mm":
        sums = torch._int_mm(codes, w[:, :in_features].t())
        block_m, block_n = SCALE_BLOCK
        _scale_kernel[(triton.cdiv(count, block_m), triton.cdiv(out_features, block_n))](
            sums, scale, row_scale, bias, out, count, out_features, block_m, block_n, enable_fp_fusion=False
        )
        return out
    # a tile's rows must start at multiples of 16 bytes
    use_tma = plan.tma and in_features % 16 == 0
    if use_tma:
        codes = TensorDescriptor.from_tensor(codes, [plan.block_m, plan.block_k])
        w = TensorDescriptor.from_tensor(w, [plan.block_n, plan.block_k])
    grid = (triton.cdiv(count, plan.block_m) * triton.cdiv(out_features, plan.block_n),)
    _gemm_kernel[grid](
        codes, scale, w, table, row_scale, bias, out, count, out_features, in_features, packed.shape[1],
        bits if plan.path == "fused" else 0, _table_stride(table), weight.is_trellis, use_tma,
        plan.path == "float", plan.block_m, plan.block_n, plan.block_k, GROUP_M,
        num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def multiply_float(plan: Plan, x: Tensor, weight: WeightArgs, out_dtype: torch.dtype) -> Tensor:
    """:func:`weight_only_linear` of the transformed x by one plan; x contiguous, at least one token."""
    packed, table, row_scale, bias, bits = weight
    (count, in_features), out_features = x.shape, weight.out_features
    out = x.new_empty(count, out_features, dtype=out_dtype)
    # bfloat16 parts that together hold x: all of it for 16-bit x, 24 bits for a float32 result, else 16 bits
    parts = {torch.bfloat16: 1, torch.float16: 2}.get(x.dtype, 3 if out_dtype == torch.float32 else 2)
    products = tl.bfloat16 if x.is_cuda else tl.float32  # the interpreter multiplies no bfloat16
    grid = (triton.cdiv(count, plan.block_m) * triton.cdiv(out_features, plan.block_n),)
    _weight_only_kernel[grid](
        x, packed, table, row_scale, bias, out, count, out_features, in_features, packed.shape[1],
        bits, _table_stride(table), weight.is_trellis, parts, products,
        plan.block_m, plan.block_n, plan.block_k, GROUP_M,
        num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def decode(weight: WeightArgs) -> Tensor:
    """The whole weight: int8 (out_features, in_features rounded up to 16), table[0] in the columns beyond."""
    packed, table, out_features, in_tiles = weight.packed, weight.table, weight.out_features, weight.packed.shape[1]
    decoded = packed.new_empty(out_features, in_tiles * TILE, dtype=torch.int8)
    block_n, block_k = DECODE_BLOCK
    grid = (triton.cdiv(out_features, block_n), triton.cdiv(in_tiles * TILE, block_k))
    _decode_kernel[grid](
        packed, table, decoded, out_features, in_tiles, weight.bits, _table_stride(table), weight.is_trellis,
        block_n, block_k,
        enable_fp_fusion=False,
    )  # fmt: skip
    return decoded


def _table_stride(table: Tensor | None) -> int:
    """Bytes from one row's table to the next: 0 if all rows share one."""
    return 0 if table is None or table.shape[0] == 1 else table.shape[1]


def _rounded_up(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()


@triton.jit
def _load_codes(packed, column, k, first_tile, out_features, in_tiles, BITS: tl.constexpr, WHOLE: tl.constexpr):
    """int32 (n, BLOCK_K): codes of output channels ``column`` (n, 1), 0 below channel 0; see lrqdit/packing.py.

    Without WHOLE only their lowest bits are right.
    """
    TILE_BYTES: tl.constexpr = 32 * BITS
    tile = first_tile + k // 16
    # whole tiles are stored, so bounds by tile keep sixteen inputs together in one load
    mask = (column >= 0) & (column < (out_features + 15) // 16 * 16) & (tile < in_tiles)
    start = packed + ((column // 16).to(tl.int64) * in_tiles + tile) * TILE_BYTES
    position = column % 4
    lane = column % 16 // 4 * 16 + k % 16
    if BITS == 8:
        return tl.load(start + position * 64 + lane, mask=mask, other=0).to(tl.int32)
    LOW: tl.constexpr = 4 if BITS >= 4 else 2  # so many bits lie in the planes at the tile's begin
    if LOW == 4:
        code = tl.load(start + position // 2 * 64 + lane, mask=mask, other=0).to(tl.int32) >> position % 2 * 4 & 15
    else:
        code = tl.load(start + lane, mask=mask, other=0).to(tl.int32) >> position * 2 & 3
    if WHOLE:
        if BITS % 2 == 1:
            high = tl.load(start + LOW * 32 + position * 8 + lane // 8, mask=mask, other=0).to(tl.int32)
            code |= (high >> lane % 8 & 1) << LOW
        elif BITS == 6:
            high = tl.load(start + LOW * 32 + lane, mask=mask, other=0).to(tl.int32)
            code |= (high >> position * 2 & 3) << LOW
    return code


@triton.jit
def _load_weight(
    packed, table, n, first_tile, out_features, in_tiles,
    BITS: tl.constexpr, TABLE_STRIDE: tl.constexpr, TRELLIS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """int8 (n, BLOCK_K): decoded weights of output channels n and of the input tiles from first_tile on."""
    k = tl.arange(0, BLOCK_K)[None, :]
    column = n[:, None]
    code = _load_codes(packed, column, k, first_tile, out_features, in_tiles, BITS, True)
    if table is None:
        return (code - 128).to(tl.int8)
    if TRELLIS:  # see lrqdit/trellis.py
        flips = _load_codes(packed, column - 1, k, first_tile, out_features, in_tiles, BITS, False)
        flips ^= _load_codes(packed, column - 6, k, first_tile, out_features, in_tiles, BITS, False)
        parity = _load_codes(packed, column - 2, k, first_tile, out_features, in_tiles, BITS, False)
        parity ^= _load_codes(packed, column - 4, k, first_tile, out_features, in_tiles, BITS, False)
        return tl.load(table + (code ^ flips & 1) * 2 + (parity & 1))
    if TABLE_STRIDE == 0:
        return tl.load(table + code)
    return tl.load(table + tl.minimum(column, out_features - 1) * TABLE_STRIDE + code)


@triton.jit
def _block(tokens, out_features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First token and first output channel of this program: GROUP blocks of tokens, then the next channels."""
    program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    first = program // (GROUP * blocks_n) * GROUP
    size = tl.minimum(blocks_m - first, GROUP)
    inside = program % (GROUP * blocks_n)
    return (first + inside % size) * BLOCK_M, inside // size * BLOCK_N


@triton.jit
def _store(out, y, bias, m, n, tokens, out_features):
    """Add the bias, if there is one, and store y float32 (m, n) in the output's dtype."""
    if bias is not None:
        y += tl.load(bias + n, mask=n < out_features, other=0.0)[None, :]
    offsets = m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=(m < tokens)[:, None] & (n < out_features)[None, :])


@triton.jit
def _decode_kernel(
    packed, table, weight, out_features, in_tiles,
    BITS: tl.constexpr, TABLE_STRIDE: tl.constexpr, TRELLIS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    first_tile = tl.program_id(1) * (BLOCK_K // 16)
    values = _load_weight(packed, table, n, first_tile, out_features, in_tiles, BITS, TABLE_STRIDE, TRELLIS, BLOCK_K)
    offsets = n.to(tl.int64)[:, None] * (in_tiles * 16) + k[None, :]
    tl.store(weight + offsets, values, mask=(n < out_features)[:, None] & (k < in_tiles * 16)[None, :])


@triton.jit
def _gemm_kernel(
    a, scale, weight, table, row_scale, bias, out, tokens, out_features, in_features, in_tiles,
    BITS: tl.constexpr, TABLE_STRIDE: tl.constexpr, TRELLIS: tl.constexpr, USE_TMA: tl.constexpr,
    FLOAT_PRODUCTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """BITS = 0: weight is int8 (out_features, 16 in_tiles). With USE_TMA a and weight are tensor descriptors."""
    first_m, first_n = _block(tokens, out_features, BLOCK_M, BLOCK_N, GROUP)
    m, n, k = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if not USE_TMA:
        a_rows = a + m.to(tl.int64)[:, None] * in_features + k[None, :]
        if BITS == 0:
            weight_rows = weight + n.to(tl.int64)[:, None] * (in_tiles * 16) + k[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for step in range(0, tl.cdiv(in_features, BLOCK_K)):
        start = step * BLOCK_K
        if USE_TMA:
            x = a.load([first_m, start])
            w = weight.load([first_n, start])
        else:
            # codes beyond K are 0, so the weights there may be anything
            x = tl.load(a_rows + start, mask=(m < tokens)[:, None] & (k < in_features - start)[None, :], other=0)
            if BITS == 0:
                inside = (n < out_features)[:, None] & (k < in_tiles * 16 - start)[None, :]
                w = tl.load(weight_rows + start, mask=inside, other=0)
            else:
                first_tile = step * (BLOCK_K // 16)
                w = _load_weight(
                    weight, table, n, first_tile, out_features, in_tiles, BITS, TABLE_STRIDE, TRELLIS, BLOCK_K
                )
        if FLOAT_PRODUCTS:
            # |x w| <= 2^14, so 1024 of them are exact in float32
            tl.static_assert(BLOCK_K <= 1024)
            products = tl.dot(x.to(tl.float16), tl.trans(w.to(tl.float16)))
            sums += products.to(tl.int32)
        else:
            sums = tl.dot(x, tl.trans(w), sums)
    y = sums.to(tl.float32) * tl.load(row_scale + n, mask=n < out_features, other=0.0)[None, :]
    y *= tl.load(scale + m, mask=m < tokens, other=0.0)[:, None]
    _store(out, y, bias, m, n, tokens, out_features)


@triton.jit
def _scale_kernel(
    sums, scale, row_scale, bias, out, tokens, out_features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < tokens)[:, None] & (n < out_features)[None, :]
    y = tl.load(sums + m.to(tl.int64)[:, None] * out_features + n[None, :], mask=inside, other=0).to(tl.float32)
    y *= tl.load(row_scale + n, mask=n < out_features, other=0.0)[None, :]
    y *= tl.load(scale + m, mask=m < tokens, other=0.0)[:, None]
    _store(out, y, bias, m, n, tokens, out_features)


@triton.jit
def _weight_only_kernel(
    x, packed, table, row_scale, bias, out, tokens, out_features, in_features, in_tiles,
    BITS: tl.constexpr, TABLE_STRIDE: tl.constexpr, TRELLIS: tl.constexpr, PARTS: tl.constexpr,
    PRODUCTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """int8 weights are exact in bfloat16; x is the sum of PARTS bfloat16 values."""
    first_m, first_n = _block(tokens, out_features, BLOCK_M, BLOCK_N, GROUP)
    m, n, k = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x_rows = x + m.to(tl.int64)[:, None] * in_features + k[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(in_features, BLOCK_K)):
        start = step * BLOCK_K
        inside = (m < tokens)[:, None] & (k < in_features - start)[None, :]
        rest = tl.load(x_rows + start, mask=inside, other=0.0).to(tl.float32)
        first_tile = step * (BLOCK_K // 16)
        w = _load_weight(packed, table, n, first_tile, out_features, in_tiles, BITS, TABLE_STRIDE, TRELLIS, BLOCK_K)
        w = tl.trans(w.to(tl.float32).to(PRODUCTS))
        for _ in tl.static_range(PARTS):
            part = rest.to(tl.bfloat16)
            y = tl.dot(part.to(PRODUCTS), w, y)
            rest -= part.to(tl.float32)
    y *= tl.load(row_scale + n, mask=n < out_features, other=0.0)[None, :]
    _store(out, y, bias, m, n, tokens, out_features)
