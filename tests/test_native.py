"""The native CPU kernels against the torch reference, on every instruction set this CPU has."""

import ctypes
import gc
import itertools
import os
import re
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import linear_format
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import lrqdit
from lrqdit import native
from lrqdit.config import TRELLIS_BITS, WEIGHT_BITS
from lrqdit.errors import KernelError
from lrqdit.kernels import cpu as kernels
from lrqdit.kernels import cpu_attention as attention
from lrqdit.kernels import ops
from lrqdit.kernels.ops import Rounding, Tokens, TransformArgs, WeightArgs
from lrqdit.numerics import codebook, rotation, trellis
from lrqdit.numerics.packing import pack
from lrqdit.numerics.shapes import BUTTERFLY_COST, packed_shape
from lrqdit.numerics.tokens import InputTransform, normal_lookup
from lrqdit.packed.linear import QuantLinear

if native.LIBRARY is None:
    pytest.skip(f"no native kernels to test: {native.WHY_REFERENCE}", allow_module_level=True)

ISAS = [name for name, missing in native.instruction_sets(native.LIBRARY).items() if not missing]
NO_TRANSFORM = TransformArgs()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def restore():
    isa, threads = native.LIBRARY.lrq_isa().decode(), torch.get_num_threads()
    yield
    native.use(isa)
    torch.set_num_threads(threads)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_codes(*shape, seed=0):
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def random_weight(out_features, in_features, bits, has_row_tables, has_bias=True, seed=0, is_trellis=False):
    """A weight for the operators."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=generator).to(torch.uint8)
    is_trellis = is_trellis and bits in TRELLIS_BITS
    rows = out_features if has_row_tables and not is_trellis else 1
    table = None
    if bits < 8:
        table = torch.randint(-128, 128, (rows, (2 if is_trellis else 1) << bits), generator=generator).to(torch.int8)
    row_scale = torch.rand(out_features, generator=generator) * 0.01 + 0.001
    bias = random(out_features, seed=seed) if has_bias else None
    return WeightArgs(pack(codes, bits), table, row_scale, bias, bits)


def transform_arguments(kind, width, seed=0):
    built, _ = rotation.build(width, kind, seed, channel_absmax=random(width, seed=seed).abs())
    offset, scale = random(width, seed=seed + 1).half(), torch.exp(random(width, seed=seed + 2)).half()
    return TransformArgs(offset, scale, kind, built.factors, built.block1, built.permutation, built.block2)


def transformed(x, transform):
    """x~ in float64."""
    x = x.double()
    if transform.input_offset is not None:
        x = x - transform.input_offset.double()
    if transform.input_scale is not None:
        x = x * transform.input_scale.double()
    return x @ transform.build_rotation(x.shape[1]).matrix().double()


def assert_prologue(x, arguments, bits, clip):
    """Steps to 1e-6, and every code is the rounding of x~ / step up to a near tie."""
    largest = 2 ** (bits - 1) - 1
    expected_codes, expected_scale = ops.reference_quantize_tokens(x, arguments, Rounding(bits, clip))
    exact = transformed(x.float(), arguments)
    for isa in ISAS:
        native.use(isa)
        codes, scale = ops.quantize_tokens(x, *arguments, bits, clip)
        assert codes.dtype == torch.int8 and codes.shape == x.shape and scale.shape == x.shape[:1]
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
        ratio = (exact / scale.double()[:, None]).clamp(-largest - 1, largest)
        assert (ratio - codes).abs().max() <= 0.5 + 1e-4
        if bits == 8:
            normal, normal_scale = ops.quantize_tokens(x, *arguments, 4, clip, "normal")
            assert torch.equal(normal, normal_lookup()[codes.int() + 128]) and torch.equal(normal_scale, scale)
        assert (codes != expected_codes).float().mean() < 0.01
        assert (codes.int() - expected_codes.int()).abs().max() <= 1


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 12) | st.sampled_from([48, 65]),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 150),
    bits=st.sampled_from(WEIGHT_BITS),
    has_row_tables=st.booleans(),
    has_bias=st.booleans(),
    is_trellis=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_quantized_linear_gives_the_bits_of_the_reference(
    tokens, out_features, in_features, bits, has_row_tables, has_bias, is_trellis, dtype, seed
):
    weight = random_weight(out_features, in_features, bits, has_row_tables, has_bias, seed, is_trellis)
    codes, scale = random_codes(tokens, in_features, seed=seed), random(tokens, seed=seed).abs()
    expected = ops.reference_quantized_linear(Tokens(codes, scale), weight, dtype)
    for isa in ISAS:
        native.use(isa)
        y = ops.quantized_linear(codes, scale, *weight, dtype)
        assert y.dtype == dtype and torch.equal(y, expected), isa


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_quantized_linear_of_wide_layers(bits):
    """Inputs in several splits, tokens in several chunks, channels in several groups."""
    for tokens, out_features, in_features in [(3, 20, 7000), (9, 70, 7001), (530, 40, 64), (20, 700, 96)]:
        weight = random_weight(out_features, in_features, bits, bits == 3, is_trellis=in_features % 2 == 0)
        codes, scale = random_codes(tokens, in_features), random(tokens).abs()
        expected = ops.reference_quantized_linear(Tokens(codes, scale), weight, torch.float32)
        for isa, threads in itertools.product(ISAS, (1, 2)):
            native.use(isa)
            torch.set_num_threads(threads)
            assert torch.equal(ops.quantized_linear(codes, scale, *weight, torch.float32), expected), isa


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 20),
    width=st.integers(1, 200) | st.sampled_from([192, 384, 288, 336, 320]),
    kind=st.sampled_from(list(rotation.ROTATIONS)),
    bits=st.sampled_from([4, 6, 8]),
    clip=st.sampled_from([1.0, 0.9, 0.5]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_prologue_of_any_width(tokens, width, kind, bits, clip, dtype, seed):
    if kind == "outlier" and not any(width % block == 0 for block in range(2, 129)):
        kind = "hadamard"  # a width without a block
    assert_prologue(random(tokens, width, seed=seed).to(dtype), transform_arguments(kind, width, seed), bits, clip)


@pytest.mark.parametrize("width", [1152, 4608, 1536, 8209])  # the last: two products that overlap
def test_prologue_of_transformer_widths(width):
    x, arguments = random(5, width), transform_arguments("hadamard", width)
    codes, scale = ops.reference_quantize_tokens(x, arguments, Rounding(8, 1.0))
    for isa in ISAS:
        native.use(isa)
        found, found_scale = ops.quantize_tokens(x, *arguments, 8, 1.0)
        torch.testing.assert_close(found_scale, scale, rtol=1e-6, atol=0)
        assert (found.int() - codes.int()).abs().max() <= 1 and (found != codes).float().mean() < 1e-3


@pytest.mark.parametrize("block", [12, 20, 28, 36, 24, 92, 128, 1])
def test_every_block_a_checkpoint_may_ask_for(block):
    """Orders that have neither a butterfly nor a power of two: their matrices must be passed."""
    width = 2 * block
    assert_prologue(random(9, width), TransformArgs(rotation="block_hadamard", factors=[block]), 8, 1.0)


@pytest.mark.parametrize("missing", ["offset", "scale", "both"])
@pytest.mark.parametrize("kind", list(rotation.ROTATIONS))
def test_prologue_without_offset_or_scale(missing, kind):
    absent = {"offset": ["input_offset"], "scale": ["input_scale"], "both": ["input_offset", "input_scale"]}[missing]
    assert_prologue(random(9, 48), transform_arguments(kind, 48)._replace(**dict.fromkeys(absent)), 6, 0.9)


def test_ties_and_extremes_are_the_reference_to_the_bit():
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.0], [0.0] * 8, [1e-42] * 8, [3e38, -3e38] * 4])
    for bits, clip, isa in itertools.product((4, 6, 8), (1.0, 0.5), ISAS):
        native.use(isa)
        found = ops.quantize_tokens(x, *NO_TRANSFORM, bits, clip)
        expected = ops.reference_quantize_tokens(x, NO_TRANSFORM, Rounding(bits, clip))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", list(rotation.ROTATIONS))
def test_a_token_that_is_not_finite_stays_so_and_alone(kind, value):
    weight, x, arguments = random_weight(20, 24, 4, False), random(9, 24), transform_arguments(kind, 24)
    for isa in ISAS:
        native.use(isa)
        clean = ops.quantized_linear(*ops.quantize_tokens(x, *arguments, 8, 1.0), *weight, torch.float32)
        damaged = x.clone()
        damaged[4, 3] = value
        y = ops.quantized_linear(*ops.quantize_tokens(damaged, *arguments, 8, 1.0), *weight, torch.float32)
        assert not y[4].isfinite().any()
        assert torch.equal(y[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("kind", ["none", *list(rotation.ROTATIONS)])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_weight_only_linear(kind, bits):
    weight = random_weight(37, 48, bits, bits == 3, is_trellis=bits in (2, 4))
    arguments = transform_arguments(kind, 48)
    for tokens, dtype in itertools.product((0, 1, 9, 33), DTYPES):
        x = random(tokens, 48).to(dtype)
        dense = ops.decode_weight(weight, 48).double() * weight.row_scale.double()[:, None]
        expected = transformed(x.float(), arguments) @ dense.T + weight.bias.double()
        bound = {torch.bfloat16: 5e-3, torch.float16: 6e-4}.get(dtype, 2e-6)
        for isa in ISAS:
            native.use(isa)
            y = ops.weight_only_linear(x, *arguments, *weight, dtype)
            assert y.dtype == dtype and y.shape == (tokens, 37)
            assert tokens == 0 or (y.double() - expected).abs().max() <= bound * expected.abs().max()


def test_no_tokens():
    weight = random_weight(20, 24, 4, False)
    for kind in rotation.ROTATIONS:
        codes, scale = ops.quantize_tokens(torch.empty(0, 24), *transform_arguments(kind, 24), 8, 1.0)
        assert codes.shape == (0, 24) and scale.shape == (0,)
        assert ops.quantized_linear(codes, scale, *weight, torch.bfloat16).shape == (0, 20)
        assert ops.weight_only_linear(torch.empty(0, 24), *NO_TRANSFORM, *weight, torch.float64).shape == (0, 20)


def strided(tensor):
    """The same values, every second element of a larger storage."""
    return None if tensor is None else torch.stack([tensor, tensor], -1)[..., 0]


def test_inputs_that_are_not_contiguous():
    x, arguments, weight = random(9, 24), transform_arguments("outlier", 24), random_weight(20, 24, 3, True)
    spread = tuple(strided(t) if isinstance(t, torch.Tensor) else t for t in arguments)
    assert not spread[4].is_contiguous()
    codes, scale = ops.quantize_tokens(x, *arguments, 8, 1.0)
    for view in (strided(x), x.t().contiguous().t()):
        found = ops.quantize_tokens(view, *spread, 8, 1.0)
        assert torch.equal(found[0], codes) and torch.equal(found[1], scale)
    spread_weight = tuple(strided(t) if isinstance(t, torch.Tensor) else t for t in weight)
    y = ops.quantized_linear(codes, scale, *weight, torch.float32)
    assert torch.equal(ops.quantized_linear(strided(codes), strided(scale), *spread_weight, torch.float32), y)
    y = ops.weight_only_linear(x, *arguments, *weight, torch.float32)
    assert torch.equal(ops.weight_only_linear(strided(x), *spread, *spread_weight, torch.float32), y)


def test_every_thread_count_and_instruction_set_gives_the_same_bytes():
    x, weight = random(70, 96), random_weight(120, 96, 4, False)
    for kind in rotation.ROTATIONS:
        arguments, first = transform_arguments(kind, 96), None
        for isa, threads in itertools.product(ISAS, (1, 2, 3)):
            native.use(isa)
            torch.set_num_threads(threads)
            codes, scale = ops.quantize_tokens(x, *arguments, 8, 1.0)
            y = ops.quantized_linear(codes, scale, *weight, torch.bfloat16)
            z = ops.weight_only_linear(x, *arguments, *weight, torch.float32)
            first = first or (codes, scale, y, z)
            for found, expected in zip((codes, scale, y, z), first, strict=True):
                assert torch.equal(found, expected), (isa, threads)


def test_more_inputs_than_an_int32_sum_takes():
    """The last width the kernels take is exact even at the extremes; beyond it the reference runs."""
    width = kernels.MAX_IN_FEATURES
    packed, row_scale = torch.zeros(packed_shape(1, width, 8), dtype=torch.uint8), torch.ones(1)
    codes = torch.full((1, width), -128, dtype=torch.int8)
    for isa in ISAS:
        native.use(isa)
        y = ops.quantized_linear(codes, torch.ones(1), packed, None, row_scale, None, 8, torch.float64)
        assert y.item() == torch.tensor(float(width * 128 * 128)).item()
    wider = width + 1
    packed = torch.full(packed_shape(1, wider, 8), 129, dtype=torch.uint8)
    codes = torch.ones(1, wider, dtype=torch.int8)
    y = ops.quantized_linear(codes, torch.ones(1), packed, None, row_scale, None, 8, torch.float32)
    assert y.item() == wider


def test_arguments_the_kernels_would_read_past():
    """The reference raises of its own; a kernel that trusted these would read memory that is not theirs."""
    packed, table, row_scale, bias, bits = random_weight(20, 24, 3, True)
    codes, scale, x = random_codes(5, 24), torch.ones(5), random(5, 24)
    good = {"packed": packed, "table": table, "row_scale": row_scale, "bias": bias}
    for name, bad in {
        "packed": packed[:1],
        "table": table[:3],
        "bias": bias[:3],
        "row_scale": row_scale.double(),
    }.items():
        weight = [*{**good, name: bad}.values(), bits, torch.float32]
        with pytest.raises(KernelError, match=name):
            ops.quantized_linear(codes, scale, *weight)
        with pytest.raises(KernelError, match=name):
            ops.weight_only_linear(x, *NO_TRANSFORM, *weight)
    with pytest.raises(KernelError, match="scale"):
        ops.quantized_linear(codes, scale[:2], *good.values(), bits, torch.float32)
    with pytest.raises(KernelError, match="codes"):
        ops.quantized_linear(codes.int(), scale, *good.values(), bits, torch.float32)
    arguments = list(transform_arguments("outlier", 24))
    for place, bad in {
        0: arguments[0][:5],
        1: arguments[1].float(),
        4: arguments[4][:1],
        5: arguments[5][:3],
        6: arguments[6].double(),
    }.items():
        with pytest.raises(KernelError, match="must be"):
            ops.quantize_tokens(x, *arguments[:place], bad, *arguments[place + 1 :], 8, 1.0)


def test_a_message_of_the_library_becomes_an_error():
    with pytest.raises(KernelError, match="bits must be 2 to 8"):
        ops.quantize_tokens(random(2, 8), *NO_TRANSFORM, 9, 1.0)
    with pytest.raises(KernelError, match="unknown instruction set nonsense"):
        native.use("nonsense")
    for name, missing in native.instruction_sets(native.LIBRARY).items():
        if missing:
            with pytest.raises(KernelError, match=f"{name}: {missing}"):
                native.use(name)


def test_the_fastest_instruction_set_is_described():
    native.use(ISAS[-1])
    lines = native.describe()
    assert ISAS[-1] in lines[0] and len(lines) >= len(ISAS)


@pytest.mark.parametrize("variable", ["", "reference", *ISAS])
def test_choice_by_environment(variable, monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT, variable)
    library, why = native._start()
    assert (library is None) == (variable == "reference") == bool(why)
    if variable in ISAS:
        assert library.lrq_isa().decode() == variable


def test_choice_of_nonsense(monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT, "nonsense")
    with pytest.raises(KernelError, match=r"LRQDIT_KERNELS=nonsense: .*; set reference, .*serial, or unset it$"):
        native._start()


SCRIPT = """
import sys, types
package = types.ModuleType("lrqdit")  # without __init__.py
package.__path__ = sys.argv[1:]
sys.modules["lrqdit"] = package
import torch
from lrqdit import native
from lrqdit.kernels import cpu as kernels
from lrqdit.kernels import ops
from lrqdit.kernels.ops import Rounding, Tokens, TransformArgs, WeightArgs
codes, _ = ops.quantize_tokens(torch.arange(8.0)[None], None, None, "none", [], None, None, None, 4, 1.0)
print(native.LIBRARY and native.LIBRARY.lrq_isa().decode(), codes.tolist()[0][-1])
"""


def test_choice_before_the_first_import():
    """One process for each choice, all at once."""
    processes = {}
    for choice in ("reference", ISAS[-1], "nonsense"):
        environment = {**os.environ, native.ENVIRONMENT: choice, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SCRIPT, *lrqdit.__path__]
        processes[choice] = subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)
    results = {choice: (*p.communicate(timeout=120), p.returncode) for choice, p in processes.items()}
    assert results["reference"][0] == "None 7\n"
    assert results[ISAS[-1]][0] == f"{ISAS[-1]} 7\n"
    assert results["nonsense"][2] and "KernelError: LRQDIT_KERNELS=nonsense" in results["nonsense"][1]


def test_missing_library(monkeypatch):
    monkeypatch.setattr(native, "find_library", lambda: None)
    monkeypatch.delenv(native.ENVIRONMENT, raising=False)
    library, why = native._start()
    assert library is None and "without its native library" in why
    monkeypatch.setenv(native.ENVIRONMENT, "avx2")
    with pytest.raises(KernelError, match="LRQDIT_KERNELS=avx2, but"):
        native._start()
    monkeypatch.setattr(native, "LIBRARY", None)
    assert native.describe()[0].startswith("CPU kernels: torch reference")
    with pytest.raises(KernelError, match="serial"):
        native.use("serial")


def test_library_of_another_version(monkeypatch):
    version = native.ABI_VERSION
    monkeypatch.setattr(native, "ABI_VERSION", 99)
    with pytest.raises(KernelError, match=f"has interface version {version}, this package needs 99; reinstall"):
        native.load(native.find_library())


HEADER = Path(__file__).parents[1] / "csrc" / "lrqdit.h"
STRUCTURES = {
    f"lrq_{s.__name__.lower()}": s for s in ctypes.Structure.__subclasses__() if s.__module__ == native.__name__
}


def test_structures_have_the_size_of_the_library():
    assert set(STRUCTURES) == {"lrq_matrix", "lrq_transform", "lrq_weight", "lrq_principal", "lrq_attention"}
    for name, structure in STRUCTURES.items():
        assert native.LIBRARY.lrq_size_of(name.encode()) == ctypes.sizeof(structure), name
    assert native.LIBRARY.lrq_size_of(b"lrq_nothing") == 0


def test_constants_are_those_of_the_library(monkeypatch):
    expected = {
        "BUTTERFLIES": tuple(BUTTERFLY_COST),
        "MAX_HEAD_WIDTH": attention.MAX_WIDTH,
        **{name: getattr(codebook, name) for name in ("BINS", "COARSE", "MIDDLE", "POLISHES", "SLOTS")},
        **{name: getattr(trellis, name) for name in ("STATES", "HISTORY", "STEPS_PER_SHIFT")},
        **{str(dtype).removeprefix("torch.").upper(): code for dtype, code in kernels.TYPE_CODES.items()},
        **{name.upper(): code for name, code in kernels.ROTATION_CODES.items()},
    }
    for name, value in expected.items():
        assert native.constant(f"LRQ_{name}") == (value if isinstance(value, tuple) else (value,)), name
    assert (kernels.MAX_RANK,) == native.constant("LRQ_MAX_RANK") and kernels.MAX_RANK >= 1
    assert native.constant("LRQ_NOTHING") == ()
    monkeypatch.setattr(native, "LIBRARY", None)
    assert native.constant("LRQ_BINS") == ()


def read_header() -> str:
    """The header without comments and preprocessor lines."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    return re.sub(r"^#(.*\\\n)*.*$", "", text, flags=re.M)


def c_type(declaration: str) -> type | None:
    kinds = {"void": None, "int": ctypes.c_int, "float": ctypes.c_float, "double": ctypes.c_double}
    kinds |= {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64}
    return ctypes.c_void_p if "*" in declaration else kinds[declaration.split()[0]]


def plain(declared: type) -> type:
    """All pointers alike."""
    return ctypes.c_void_p if declared is ctypes.c_char_p or issubclass(declared, ctypes._Pointer) else declared


@pytest.mark.skipif(not HEADER.is_file(), reason="needs the sources")
def test_declarations_are_those_of_the_header():
    header, functions = read_header(), {}
    for result, name, arguments in re.findall(r"LRQ_EXPORT ([\w ]+\W)(lrq_\w+)\(([^)]*)\);", header):
        functions[name] = c_type(result), [c_type(a) for a in arguments.split(",") if a.strip() != "void"]
    declared = {name: (plain(result), [*map(plain, rest)]) for name, (result, rest) in native._FUNCTIONS.items()}
    assert functions == declared

    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", header, flags=re.S):
        fields = []
        for declaration in filter(str.strip, body.split(";")):
            first, *others = declaration.split(",")
            base = re.match(r"\s*(?:const )?(\w+)", first).group(1)
            for one in (first, *(f"{base} {other}" for other in others)):
                found = re.search(r"(\w+)(?:\[(\d+)\])?\s*$", one)
                fields.append((found.group(1), c_type(one.replace("const ", "")), int(found.group(2) or 0)))
        for (field, kind), (wanted, wanted_kind, count) in zip(STRUCTURES[name]._fields_, fields, strict=True):
            assert field == wanted
            assert kind is wanted_kind * count if count else plain(kind) is wanted_kind, (name, field)


@pytest.mark.parametrize("size", [0, 40, 1000, 100_000, -1])
def test_truncated_library(size, tmp_path):
    path = tmp_path / native.LIBRARY_NAME
    path.write_bytes(native.find_library().read_bytes()[:size])
    with pytest.raises(KernelError, match=f"{path.name} cannot be loaded .*; reinstall") as caught:
        native.load(path)
    assert "\n" not in str(caught.value)


def test_library_without_the_functions():
    with pytest.raises(KernelError, match="cannot be loaded .*; reinstall"):
        native.load(Path(sys.modules["_ctypes"].__file__))


@pytest.mark.parametrize("isa", ISAS)
def test_opcheck(isa):
    native.use(isa)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    weight = random_weight(20, 24, 4, False)
    torch.library.opcheck(
        torch.ops.lrqdit.quantize_tokens.default,
        (random(5, 24).t().contiguous().t(), *transform_arguments("outlier", 24), 4, 0.9),
        test_utils=utilities,
    )
    torch.library.opcheck(
        torch.ops.lrqdit.quantized_linear.default,
        (random_codes(5, 24), torch.rand(5), *weight, torch.bfloat16),
        test_utils=utilities,
    )
    torch.library.opcheck(
        torch.ops.lrqdit.weight_only_linear.default,
        (random(5, 24), *transform_arguments("hadamard", 24), *weight, torch.float64),
        test_utils=utilities,
    )


def random_layer(out_features, in_features, bits, activation_bits=8, kind="hadamard"):
    arguments = transform_arguments(kind, in_features)
    layer = QuantLinear(
        linear_format(
            in_features, out_features, bits, activation_bits, rotation=kind, factors=tuple(arguments[3]),
            table_rows=int(bits < 8), has_offset=True, has_scale=True,
        )
    )  # fmt: skip
    packed, table, row_scale, bias, _ = random_weight(out_features, in_features, bits, False)
    values = {"packed": packed, "table": table, "row_scale_bits": row_scale.view(torch.int32)}
    values |= {"bias_bits": bias.view(torch.int32), "input_offset_bits": arguments[0].view(torch.int16)}
    values |= {"input_scale_bits": arguments[1].view(torch.int16)}
    values |= {"block1_bits": arguments[4], "block2_bits": arguments[6], "permutation": arguments[5]}
    for name, tensor in layer.tensors().items():
        tensor.copy_(values[name] if tensor.dtype == values[name].dtype else values[name].view(tensor.dtype))
    return layer


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, in inductor
def test_compiled(backend, activation_bits):
    if backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("inductor needs a C++ compiler")
    layer, x = random_layer(20, 24, 4, activation_bits), random(2, 5, 24)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_under_another_default_device():
    layer, x = random_layer(20, 24, 4), random(5, 24)
    expected = layer(x)
    with torch.device("meta"):
        assert torch.equal(layer(x), expected)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak of memory")
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_no_unpacked_copy(activation_bits):
    """4 MiB of packed codes; one int8 copy of the weight would take 8 more, float32 32."""
    layer, x = QuantLinear(linear_format(4096, 2048, 4, activation_bits)), random(16, 4096)
    layer.packed.random_()

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10, int(status.split("VmRSS:")[1].split()[0]) << 10

    layer(x)
    gc.collect()
    before = {weakref.ref(t) for t in layer.tensors().values()}
    Path("/proc/self/clear_refs").write_text("5")
    resident = peak()[1]
    layer(x)
    assert peak()[0] - resident < 4 << 20
    assert {weakref.ref(t) for t in layer.tensors().values()} == before
    held = sum(t.untyped_storage().nbytes() for t in layer.tensors().values())
    assert held <= 2048 * 4096 // 2 + 2048 * 8 + 64
    assert all(not isinstance(value, torch.Tensor) or value.ndim == 0 for value in vars(layer).values())


def test_shared_inputs_are_quantized_once(monkeypatch):
    calls, call = [], native.call_plain
    monkeypatch.setattr(native, "call_plain", lambda name, *arguments: calls.append(name) or call(name, *arguments))
    q, k, v = layers = [random_layer(20, 24, 4) for _ in range(3)]
    k.share_input(q), v.share_input(q)
    x = random(2, 5, 24)
    tokens = q.arguments().quantize_tokens(x)
    alone = [layer.arguments().quantized_linear(tokens, torch.float32) for layer in layers]
    calls.clear()
    for _ in range(2):
        for layer, expected in zip(layers, alone, strict=True):
            assert torch.equal(layer(x).view(-1, 20), expected)
    assert calls.count("lrq_linear") == 2 and calls.count("lrq_quantized_linear") == 4 and len(calls) == 6


@pytest.mark.parametrize("tokens", [1, 4, 65])
def test_a_layer_takes_one_call(tokens, monkeypatch):
    calls, call = [], native.call_plain
    monkeypatch.setattr(native, "call_plain", lambda name, *arguments: calls.append(name) or call(name, *arguments))
    layer, x = filled_layer(), random(tokens, 24)
    for isa in ISAS:
        native.use(isa)
        calls.clear()
        y = layer(x)
        assert calls == ["lrq_linear"]
        assert torch.equal(y, by_operators(layer, x))
    other = filled_layer()
    other.share_input(layer)
    calls.clear()
    layer(x), other(x)
    assert calls == ["lrq_linear", "lrq_quantized_linear"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_token_alone_is_the_token_among_others(bits):
    """Whatever the number of tokens, the same sums in the same order; a weight-only layer, too."""
    weight = random_weight(70, 600, bits, False, is_trellis=bits < 8)
    x, codes, scale = random(77, 600), random_codes(77, 600), random(77).abs()
    for isa in ISAS:
        native.use(isa)
        y = ops.weight_only_linear(x, *NO_TRANSFORM, *weight, torch.float32)
        z = ops.quantized_linear(codes, scale, *weight, torch.float32)
        for tokens in (1, 2, 3, 4, 5, 7, 8, 65):
            few = ops.weight_only_linear(x[:tokens], *NO_TRANSFORM, *weight, torch.float32)
            assert torch.equal(few, y[:tokens]), (isa, tokens)
            assert torch.equal(ops.quantized_linear(codes[:tokens], scale[:tokens], *weight, torch.float32), z[:tokens])


def by_operators(layer, x):
    """The layer's output by way of the dispatcher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "is_plain", lambda tensor: False)
        return layer(x)


@pytest.fixture
def count_operators(monkeypatch):
    calls = []
    for name in ("quantize_tokens", "quantized_linear", "weight_only_linear"):
        operator = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *arguments, call=operator: calls.append(0) or call(*arguments))
    return calls


def fill_randomly(layer, kind, seed=0):
    width, out_features = layer.in_features, layer.out_features
    layout = layer.format
    _, table, row_scale, bias, bits = random_weight(
        out_features, width, layout.weight_bits, False, seed=seed, is_trellis=layout.is_trellis
    )
    transform = transform_arguments(kind, width, seed)
    codes = torch.randint(0, 1 << bits, (out_features, width), generator=torch.Generator().manual_seed(seed))
    built = InputTransform(transform.build_rotation(width), transform.input_offset, transform.input_scale)
    return layer.fill(codes.to(torch.uint8), table, row_scale, bias, built)


def filled_layer(kind="hadamard", bits=4, activation_bits=8, levels="uniform", seed=0):
    factors, table_rows = rotation.build(24, kind)[0].factors, int(bits < 8)
    rest = dict(clip=0.9, token_levels=levels, has_offset=True, has_scale=True)
    rest |= dict(table_rows=table_rows, is_trellis=bits == 3, rotation=kind, factors=factors)
    layer = QuantLinear(linear_format(24, 20, bits, activation_bits, **rest))
    return fill_randomly(layer, kind, seed)


@pytest.mark.parametrize("kind", list(rotation.ROTATIONS))
@pytest.mark.parametrize(
    ("bits", "activation_bits", "levels"), [(4, 8, "uniform"), (8, 4, "normal"), (3, 16, "uniform")]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_give_the_bits_of_the_operators(kind, bits, activation_bits, levels, dtype, count_operators):
    layer = filled_layer(kind, bits, activation_bits, levels)
    for shape in ((24,), (1, 24), (2, 3, 24), (0, 24), (2, 0, 24)):
        x = random(*shape).to(dtype)
        count_operators.clear()
        y = layer(x)
        assert bool(count_operators) == (dtype == torch.float64)
        expected = by_operators(layer, x)
        assert y.dtype == dtype and y.shape == expected.shape and torch.equal(y, expected)
    with torch.autocast("cpu", torch.bfloat16):
        x = random(5, 24)
        assert torch.equal(layer(x), by_operators(layer, x))


def frozen(tensor):
    return torch.nn.Parameter(tensor, requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, other: layer.load_state_dict(other.state_dict()),
        lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
        lambda layer, other: [setattr(layer, name, frozen(t.clone())) for name, t in other.tensors().items()],
        lambda layer, other: [setattr(t, "data", other.tensors()[n].clone()) for n, t in layer.tensors().items()],
        lambda layer, other: [t.set_(other.tensors()[n].clone()) for n, t in layer.tensors().items()],
        lambda layer, other: [t.copy_(other.tensors()[n]) for n, t in layer.tensors().items()],
        lambda layer, other: layer.to("meta").to_empty(device="cpu").load_state_dict(other.state_dict()),
    ],
)
def test_replaced_buffers_are_noticed(change, count_operators):
    layer, other, x = filled_layer(), filled_layer(seed=1), random(5, 24)
    before, expected = layer(x), other(x)
    change(layer, other)
    assert torch.equal(layer(x), expected) and not torch.equal(before, expected)
    assert not count_operators


def test_unsound_buffers_are_refused():
    layer, x = filled_layer(), random(5, 24)
    layer(x)
    layer.row_scale_bits = frozen(layer.row_scale_bits[:-1])
    with pytest.raises(KernelError, match="bias is"):
        layer(x)


def test_another_buffer_of_the_same_identity_and_address():
    layer, x, memory = filled_layer(), random(5, 24), torch.zeros(20, dtype=torch.int32)
    layer._parameters["row_scale_bits"] = memory[:]
    layer(x)
    identity = id(layer.row_scale_bits)
    layer._parameters["row_scale_bits"], shorter = None, []
    while not shorter or id(shorter[-1]) != identity:
        assert len(shorter) < 1000
        shorter.append(memory[:-1])
    layer._parameters["row_scale_bits"] = shorter[-1]
    with pytest.raises(KernelError, match="bias is"):
        layer(x)


def test_buffers_are_not_kept_alive():
    layer = filled_layer()
    layer(random(5, 24))
    packed = weakref.ref(layer.packed)
    layer.to("meta")
    gc.collect()
    assert packed() is None


def test_threads_share_a_layer():
    layer, inputs = filled_layer(), [random(rows, 24, seed=rows) for rows in range(1, 9)] * 20
    expected = [layer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(layer, inputs), expected))


class Watch(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), named=None):
        return function(*arguments, **(named or {}))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_is_not_plain(count_operators):
    x, answers = random(4, 24), []

    def note(tensor):
        answers.append(kernels.is_plain(tensor))
        return tensor

    assert kernels.is_plain(x) and kernels.is_plain(x[1:3]) and kernels.is_plain(x.clone().requires_grad_())
    assert kernels.is_plain(torch.nn.Parameter(x))
    with torch.inference_mode():
        assert kernels.is_plain(x) and kernels.is_plain(x.clone())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        note(x), note(mode.from_tensor(x))
    with Watch():
        note(x)
    torch.func.vmap(note)(x), torch.func.jvp(note, (x,), (x,)), torch.func.functionalize(note)(x)
    torch.jit.trace(lambda tensor: note(tensor) + 1, x, check_trace=False)
    negative = torch.view_as_complex(random(4, 24, 2)).conj().imag
    for tensor in (x.to("meta"), x.t(), x.to_sparse(), negative, negative.contiguous().t()):
        note(tensor)
    make_fx(note)(x)
    assert len(answers) == 13 and not any(answers)
    count_operators.clear()
    make_fx(filled_layer())(x)
    assert len(count_operators) == 2
