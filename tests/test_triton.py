"""The Triton kernels against the torch reference: on a GPU if there is one, else in Triton's interpreter."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ops import NO_TRANSFORM, random, random_weight, transform_arguments

import lrqdit
from lrqdit.errors import ConfigError
from lrqdit.kernels import gpu, ops
from lrqdit.kernels.ops import Rounding, Tokens, TransformArgs
from lrqdit.numerics import rotation
from lrqdit.numerics.tokens import normal_lookup
from lrqdit.packed.dummy import random_layer
from lrqdit.packed.linear import QuantLinear

pytest.importorskip("triton", reason="Triton is not installed")

from lrqdit.kernels import (
    triton_gemm,  # noqa: E402
    triton_prologue,  # noqa: E402
)
from lrqdit.kernels.triton_gemm import Plan  # noqa: E402

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL_PLANS = (
    Plan("fused", 16, 16, 32, 4, 2),
    Plan("decoded", 16, 16, 32, 4, 2),
    Plan("decoded", 16, 16, 32, 4, 2, True),
    Plan("float", 16, 16, 32, 4, 2),
)
TRELLIS = [(bits, "trellis") for bits in (2, 3, 4, 5)]
SHAPES = {4: (4096, 3072, 3072), 3: (300, 1152, 4608), 2: (1, 1152, 1152), 8: (77, 4096, 96), 5: (90, 640, 192)}
SHAPES[6] = 16, 1152, 4608
gpu_only = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")]


def move(record):
    """A record of arguments on the device."""
    return type(record)(*(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in record))


def rounded(y, dtype):
    """y float32 in another dtype; Triton's interpreter cuts bfloat16 off where a device rounds it."""
    if dtype == torch.bfloat16 and not HAS_GPU:
        y = (y.view(torch.int32) & -65536).view(torch.float32)
    return y.to(dtype)


def check_codes(x, transform, bits, clip):
    """Steps to float rounding, codes exact but where the reference is within float rounding of a tie."""
    codes, scale = triton_prologue.quantize_tokens(x.to(DEVICE), move(transform), Rounding(bits, clip))
    expected_codes, expected_scale = ops.reference_quantize_tokens(x, transform, Rounding(bits, clip))
    assert codes.dtype == torch.int8 and codes.shape == x.shape and codes.is_contiguous()
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=3e-6, atol=0)
    difference = codes.cpu().int() - expected_codes.int()
    assert difference.abs().max() <= 1
    exact = ops.reference_apply_transform(x, transform) / expected_scale[:, None]
    distance_to_tie = (exact - exact.floor() - 0.5).abs()
    assert (distance_to_tie[difference != 0] < 2e-4).all()
    if bits == 8:
        normal, _ = triton_prologue.quantize_tokens(x.to(DEVICE), move(transform), Rounding(4, clip, "normal"))
        assert torch.equal(normal.cpu(), normal_lookup()[codes.cpu().int() + 128])


@pytest.mark.parametrize(
    ("kind", "width", "factors"),
    [
        ("none", 24, ()),
        ("none", 37, ()),
        ("hadamard", 1, ()),
        ("hadamard", 24, (24,)),
        ("hadamard", 96, (12, 8)),
        ("hadamard", 96, (8, 12)),
        ("hadamard", 1152, (12, 12, 8)),
        ("hadamard", 1152, (36, 32)),
        ("hadamard", 4608, (12, 12, 32)),
        ("hadamard", 512, (512,)),
        ("hadamard", 67, (-67,)),
        ("hadamard", 60, (-3, 20)),
        ("hadamard", 70, (64,)),  # two overlapping rotations: by torch
        ("hadamard", 344, (2, 172)),  # a factor above 128: by torch
        ("block_hadamard", 96, (32,)),
        ("outlier", 96, (96,)),
        ("outlier", 45, (15,)),
    ],
)
def test_rotations(kind, width, factors):
    built, _ = rotation.build(width, kind, 1, channel_absmax=random(width).abs())
    block1, block2 = built.block1, built.block2
    if kind == "outlier" and factors != built.factors:
        block1, block2 = (torch.linalg.qr(random(*factors, *factors, seed=s)).Q.contiguous() for s in (5, 6))
    permutation = None if built.permutation is None else built.permutation.int()
    offset, scale = random(width, seed=1).half(), torch.exp(random(width, seed=2)).half()
    arguments = TransformArgs(offset, scale, kind, factors, block1, permutation, block2)
    x = random(3, width) * torch.tensor([[1.0], [1e-4], [300.0]])
    check_codes(x, arguments, 8, 0.9)
    y = triton_prologue.transform_tokens(x.to(DEVICE), move(arguments)).cpu()
    expected = ops.reference_apply_transform(x, arguments)
    assert ((y - expected).abs().amax(1) <= 1e-6 * expected.abs().amax(1)).all()


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_activation_bits(bits, clip):
    check_codes(random(5, 40), NO_TRANSFORM, bits, clip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("has_offset", "has_scale"), [(True, False), (False, True)])
def test_input_dtypes(dtype, has_offset, has_scale):
    arguments = transform_arguments("hadamard", 48)
    arguments = arguments._replace(input_offset=None) if not has_offset else arguments
    arguments = arguments._replace(input_scale=None) if not has_scale else arguments
    check_codes(random(4, 48).to(dtype), arguments, 8, 1.0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("kind", list(rotation.ROTATIONS))
def test_special_tokens(kind):
    arguments = transform_arguments(kind, 48)._replace(input_offset=None, input_scale=None)
    x = random(6, 48)
    x[1], x[2, 3], x[3, 5], x[4], x[5] = 0, float("nan"), float("inf"), x[4] * 1e-41, x[5] * 1e37
    codes, scale = triton_prologue.quantize_tokens(x.to(DEVICE), move(arguments), Rounding(8, 1.0))
    expected_codes, expected = ops.reference_quantize_tokens(x, arguments, Rounding(8, 1.0))
    assert scale[1] == 0 and not codes[1].any()
    assert torch.equal(scale.isfinite().cpu(), expected.isfinite())
    assert scale[2].isnan()
    for token in (0, 5):
        torch.testing.assert_close(scale[token].cpu(), expected[token], rtol=3e-6, atol=0)
        assert (codes[token].cpu().int() - expected_codes[token].int()).abs().max() <= 1
    assert scale[4] < 1e-38 and not codes[4].any()


def test_strided_and_empty_inputs():
    x, arguments = random(48, 5), transform_arguments("hadamard", 48)
    check_codes(x.t(), arguments, 8, 1.0)
    check_codes(random(3, 60)[:, :48], arguments, 8, 1.0)
    codes, scale = triton_prologue.quantize_tokens(random(0, 48).to(DEVICE), move(arguments), Rounding(8, 1.0))
    assert codes.shape == (0, 48) and scale.shape == (0,)


def test_a_box_beyond_the_shared_memory_is_rotated_by_torch(monkeypatch):
    launch = triton_prologue._launch

    def refuse(x, transform, axes, *rest):
        if any(axis.factors for axis in axes):
            raise triton_prologue.OutOfResources(300_000, 232_448, "shared memory")
        return launch(x, transform, axes, *rest)

    monkeypatch.setattr(triton_prologue, "_launch", refuse)
    monkeypatch.setattr(triton_prologue, "_too_large", set())
    check_codes(random(3, 48), transform_arguments("hadamard", 48), 8, 1.0)
    assert len(triton_prologue._too_large) == 1


@pytest.mark.parametrize(
    ("width", "factors", "box"),
    [
        (3072, (12, 256), (16, 16, 16)),
        (12288, (12, 32, 32), (16, 32, 32)),
        (12288, (24, 16, 32), (32, 16, 32)),
        (15360, (20, 24, 32), (32, 32, 32)),
    ],
)
def test_boxes_of_wide_tokens(width, factors, box):
    axes = triton_prologue.plan_rotation("hadamard", factors, width)
    assert triton_prologue._padded_box(axes) == box


@pytest.mark.parametrize(("bits", "rows"), [*itertools.product((2, 3, 4, 5, 6), "1N"), (8, "1"), *TRELLIS])
@pytest.mark.parametrize("plan", SMALL_PLANS, ids=lambda plan: plan.path + "-tma" * plan.tma)
def test_quantized_linear_is_exact(bits, rows, plan):
    for tokens, out_features, in_features in ((1, 16, 16), (5, 33, 20), (17, 18, 48)):
        if plan.tma and HAS_GPU and not triton_gemm._has_tma(DEVICE):
            continue
        weight, _ = random_weight(out_features, in_features, bits, rows, has_bias=in_features != 20)
        codes = torch.randint(-128, 128, (tokens, in_features), generator=torch.Generator().manual_seed(9))
        codes, scale = codes.to(torch.int8), random(tokens, seed=3).abs() * 0.01
        tokens = Tokens(codes, scale)
        expected = ops.reference_quantized_linear(tokens, weight, torch.float32)
        for dtype in DTYPES:
            y = triton_gemm.multiply(plan, move(tokens), move(weight), dtype)
            assert y.dtype == dtype and torch.equal(y.cpu(), rounded(expected, dtype))


@pytest.mark.parametrize("plan", triton_gemm.FEW_TOKENS + triton_gemm.SOME_TOKENS + triton_gemm.MANY_TOKENS, ids=repr)
def test_every_plan(plan):
    """Large enough for more than one block in every direction, and odd."""
    tokens, out_features, in_features = (40, 88, 560) if plan.block_m <= 64 else (136, 264, 144)
    weight, _ = random_weight(out_features, in_features, 4, "1")
    codes = torch.randint(-128, 128, (tokens, in_features), generator=torch.Generator().manual_seed(9)).to(torch.int8)
    x = Tokens(codes, random(tokens, seed=3).abs())
    if HAS_GPU and triton_gemm._milliseconds(
        lambda p: triton_gemm.multiply(p, move(x), move(weight), torch.float32), plan
    ) == float("inf"):
        pytest.skip("this device cannot run the plan")
    y = triton_gemm.multiply(plan, move(x), move(weight), torch.float32)
    assert torch.equal(y.cpu(), ops.reference_quantized_linear(x, weight, torch.float32))


def test_long_sums_are_exact():
    weight, _ = random_weight(16, 5000, 8, "1")
    weight[0].zero_()  # codes 0 stand for -128
    tokens = Tokens(torch.full((2, 5000), -128, dtype=torch.int8), torch.ones(2))
    expected = ops.reference_quantized_linear(tokens, weight, torch.float32)
    for plan in (Plan("fused", 16, 16, 512, 4, 2), Plan("float", 16, 16, 512, 4, 2)):
        y = triton_gemm.multiply(plan, move(tokens), move(weight), torch.float32)
        assert torch.equal(y.cpu(), expected)


@pytest.mark.parametrize(("bits", "rows"), [(2, "N"), (3, "1"), (4, "N"), (5, "N"), (6, "1"), (8, "1"), *TRELLIS])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_weight_only_linear(bits, rows, x_dtype):
    weight, _ = random_weight(19, 48, bits, rows)
    for tokens, arguments in ((1, NO_TRANSFORM), (33, NO_TRANSFORM), (6, transform_arguments("hadamard", 48))):
        x = random(tokens, 48).to(x_dtype)
        expected = ops.reference_weight_only_linear(x, arguments, weight, torch.float32)
        size = expected.abs().max()
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
            y = triton_gemm.weight_only_linear(x.to(DEVICE), move(arguments), move(weight), dtype)
            assert y.dtype == dtype and ((y.cpu().float() - expected).abs().max() / size) < tolerance


def test_no_tokens():
    weight, _ = random_weight(19, 24, 4, "1")
    tokens = Tokens(torch.empty(0, 24, dtype=torch.int8), torch.empty(0))
    y = triton_gemm.quantized_linear(move(tokens), move(weight), torch.float16)
    assert y.shape == (0, 19) and y.dtype == torch.float16
    y = triton_gemm.weight_only_linear(random(0, 24).to(DEVICE), NO_TRANSFORM, move(weight), torch.float32)
    assert y.shape == (0, 19)


def test_tuning_takes_the_fastest_plan_once(monkeypatch):
    times = dict(zip(triton_gemm.MANY_TOKENS, [5.0, 4.0, 1.0, 7.0, 8.0, 2.0, float("inf"), 9.0], strict=True))
    asked = []

    def measure(run, plan):
        asked.append(plan)
        return times[plan]

    monkeypatch.setattr(triton_gemm, "choices", {})
    monkeypatch.setattr(triton_gemm, "_milliseconds", measure)
    monkeypatch.setattr(triton_gemm, "_has_tma", lambda device: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    key = ("quantized", torch.device("cuda"), 4096)
    fastest = Plan("fused", 128, 128, 128, 8, 3)  # the faster one needs TMA
    assert triton_gemm.tune(key, triton_gemm.MANY_TOKENS, None) == fastest
    count = len(asked)
    assert triton_gemm.tune(key, triton_gemm.MANY_TOKENS, None) == fastest and len(asked) == count
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    other = ("quantized", torch.device("cuda"), 8192)
    assert triton_gemm.tune(other, triton_gemm.MANY_TOKENS, None) == triton_gemm.MANY_TOKENS[0]
    assert other not in triton_gemm.choices


def test_choice_of_kernels(monkeypatch):
    choose, device = gpu.choose_kernels.__wrapped__, torch.device("cuda")
    monkeypatch.delenv(gpu.OVERRIDE, raising=False)
    for capability, kernels in (((7, 5), "reference"), ((8, 0), "triton"), ((9, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert choose(device).kernels == kernels
    monkeypatch.setenv(gpu.OVERRIDE, "reference")
    assert choose(device).kernels == "reference"
    monkeypatch.setenv(gpu.OVERRIDE, "cuda")
    with pytest.raises(ConfigError, match="LRQDIT_GPU_KERNELS='cuda'"):
        choose(device)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv(gpu.OVERRIDE, "triton")
    with pytest.raises(ConfigError, match="not installed"):
        choose(device)
    monkeypatch.delenv(gpu.OVERRIDE)
    assert "pip install triton" in choose(device).reason


def test_registered_operators_reach_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    weight, _ = random_weight(19, 48, 4, "1")
    x, arguments = random(3, 48), transform_arguments("hadamard", 48)
    for kernels in gpu.KERNELS:
        monkeypatch.setattr(gpu, "choose_kernels", lambda device, kernels=kernels: gpu.Choice(kernels, ""))
        x, arguments, weight = x.to(DEVICE), move(arguments), move(weight)
        tokens = Tokens(*gpu._make_operator("quantize_tokens")(x, arguments, Rounding(8, 1.0)))
        y = gpu._make_operator("quantized_linear")(tokens, weight, torch.float32)
        z = gpu._make_operator("weight_only_linear")(x, arguments, weight, torch.float32)
        assert (y - z).abs().max() < 0.02 * z.abs().max()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_kernels_compile_without_a_device(tmp_path):
    """To machine code of Hopper, using its tensor cores."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(lrqdit.__file__).parents[1]), *sys.path])
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all("wgmma.mma_async" in instructions for instructions in found.values()), found


class TestOnDevice:
    pytestmark = gpu_only

    def test_a_layer_agrees_with_the_reference(self):
        for bits, shape in SHAPES.items():
            tokens, in_features, out_features = shape
            layer = random_layer(in_features, out_features, bits, 8, DEVICE)
            x = torch.randn(tokens, in_features, device=DEVICE, dtype=torch.bfloat16)
            arguments = layer.arguments()
            codes, scale, _ = arguments.quantize_tokens(x)
            expected_codes, expected_scale = ops.reference_quantize_tokens(x, *arguments[:2])
            torch.testing.assert_close(scale, expected_scale, rtol=3e-6, atol=0)
            assert (codes.int() - expected_codes.int()).abs().max() <= 1
            assert (codes != expected_codes).float().mean() < 1e-3
            tokens = Tokens(codes, scale)
            y = arguments.quantized_linear(tokens, torch.bfloat16)
            assert torch.equal(y, ops.reference_quantized_linear(tokens, arguments.weight, torch.bfloat16))

    @pytest.mark.parametrize("activation_bits", [8, 16])
    def test_compile_without_graph_breaks(self, activation_bits):
        model = self._model(activation_bits)
        x = torch.randn(64, 1152, device=DEVICE, dtype=torch.bfloat16)
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected)
            compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")  # with CUDA graphs
            for _ in range(3):
                torch.testing.assert_close(compiled(x).clone(), expected)

    @pytest.mark.parametrize("activation_bits", [8, 16])
    @pytest.mark.parametrize("tokens", [1, 64, 2048])
    def test_cuda_graph(self, activation_bits, tokens):
        model, x = self._model(activation_bits), torch.randn(tokens, 1152, device=DEVICE, dtype=torch.bfloat16)
        with torch.no_grad():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                model(x)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(x)
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.testing.assert_close(y, model(x))

    def test_no_synchronization(self):
        model, x = self._model(8), torch.randn(256, 1152, device=DEVICE, dtype=torch.bfloat16)
        with torch.no_grad():
            model(x)
            torch.cuda.set_sync_debug_mode("error")
            try:
                model(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @staticmethod
    def _model(activation_bits) -> torch.nn.Sequential:
        layers: list[QuantLinear] = [random_layer(1152, 1152, 4, activation_bits, DEVICE) for _ in range(2)]
        return torch.nn.Sequential(*layers)
