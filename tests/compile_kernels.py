"""Compile the Triton kernels to machine code without a device; prints the tensor core instructions of each as JSON.

Run: python tests/compile_kernels.py [CAPABILITY ...], such as 80 90 100 120; 90 if none is given. test_triton.py runs
it in a process of its own because there Triton interprets.
"""

import json
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from lrqdit.kernels import triton_gemm, triton_prologue

INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


def build(capability, kernel, pointers, numbers, constants):
    """PTX of a kernel; a number of 1 is a constant, as Triton makes it at a call."""
    types = {**pointers, **{name: kind for name, kind in numbers.items() if kind != 1}}
    constants = {**constants, **{name: 1 for name, kind in numbers.items() if kind == 1}}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: constants.get(name) for name in kernel.arg_names if name not in types}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
    source = ASTSource(kernel, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


def build_all(capability):
    """Yield name and PTX of every kernel; the ones named `single` for one token and one input tile."""
    names = ("tokens", "out_features", "in_features", "in_tiles")
    many, single = dict.fromkeys(names, "i32"), dict.fromkeys(names, 1)
    outputs = {"row_scale": "*fp32", "bias": "*fp32", "out": "*bf16"}
    gemm, weight = triton_gemm._gemm_kernel, {"weight": "*u8", "table": "*i8"}
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 8, "BITS": 3, "TABLE_STRIDE": 8, "TRELLIS": False}
    options = {**blocks, "USE_TMA": False, "FLOAT_PRODUCTS": False}
    for name, sizes in (("gemm", many), ("gemm, single", {**single, "out_features": "i32"}), ("gemm, 1 x 1", single)):
        arguments = {"a": "*i8", "scale": "*fp32", **weight, **outputs}
        yield name, build(capability, gemm, arguments, sizes, options)
        yield f"{name}, trellis", build(capability, gemm, arguments, sizes, {**options, "TRELLIS": True})
    decoded = {"a": "*i8", "scale": "*fp32", "weight": "*i8", **outputs}
    yield "float", build(capability, gemm, decoded, many, {**options, "BITS": 0, "FLOAT_PRODUCTS": True})
    if capability >= 90:
        tiles = {"a": "tensordesc<i8[64,64]>", "weight": "tensordesc<i8[64,64]>"}
        yield "tma", build(capability, gemm, {**decoded, **tiles}, many, {**options, "BITS": 0, "USE_TMA": True})
    parts = {**blocks, "PARTS": 2, "PRODUCTS": triton_gemm.tl.bfloat16}
    floats = {"x": "*fp32", "packed": "*u8", "table": "*i8", **outputs}
    for name, sizes in (("weight-only", many), ("weight-only, single", {**single, "out_features": "i32"})):
        yield name, build(capability, triton_gemm._weight_only_kernel, floats, sizes, parts)
    token = {"x": "*bf16", "offset": "*fp16", "scale": "*fp16", "out": "*i8", "steps": "*fp32"}
    token |= {"matrix_a": "*fp32", "matrix_b": "*fp32", "matrix_c": "*fp32"}
    box = {"A": 12, "B": 16, "C": 16, "PAD_A": 16, "PAD_B": 16, "PAD_C": 16, "KIND_A": 1, "KIND_B": 1, "KIND_C": 2}
    for name, kind in (("tokens", "i32"), ("tokens, single", 1)):
        sizes = {"tokens": kind, "row_stride": kind, "norm": "fp32", "clip_ratio": "fp32"}
        yield name, build(capability, triton_prologue._tokens_kernel, token, sizes, {**box, "LARGEST": 127})


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:] or ["90"]):
        print(json.dumps({name: [i for i in INSTRUCTIONS if i in ptx] for name, ptx in build_all(capability)}))
