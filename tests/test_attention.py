import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_pipeline
from diffusers import PixArtTransformer2DModel

import lrqdit
from lrqdit import native
from lrqdit.app import doctor
from lrqdit.errors import ConfigError, KernelError
from lrqdit.kernels import cpu_attention as attention
from lrqdit.kernels.cpu_attention import SLOW_BESIDE_AMX

needs_kernel = pytest.mark.skipif(bool(attention.why_torch()), reason=f"torch's attention: {attention.why_torch()}")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Every test begins with torch's attention and nothing chosen, and leaves what it found."""
    monkeypatch.delenv(attention.ENVIRONMENT, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    before, is_chosen, threads = attention.current(), attention._is_chosen, torch.get_num_threads()
    attention.switch("torch")
    attention._is_chosen = False
    yield
    monkeypatch.undo()  # a test may have taken the library away
    torch.set_num_threads(threads)
    attention.switch(before)
    attention._is_chosen = is_chosen


def random(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def inputs(batch, heads, queries, keys, width, scale=1.0):
    """As diffusers has them: (batch, heads, tokens, width) views of (batch, tokens, heads, width)."""
    lengths = queries, keys, keys
    return [random(batch, n, heads, width, seed=i, scale=scale).transpose(1, 2) for i, n in enumerate(lengths)]


def exact(query, key, value, mask=None, scale=None):
    """Output and logsumexp in float64; 0 for a query whose keys are all masked by -inf."""
    scores = query.double() @ key.double().transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask.double()
    is_masked = (scores == -torch.inf).all(3)
    out = (scores.softmax(3) @ value.double()).masked_fill(is_masked[..., None], 0)
    return out, scores.logsumexp(3).masked_fill(is_masked, 0)


def torch_kernel(query, key, value, mask=None, scale=None):
    with attention.use("torch"):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scale
        )


def our_kernel(query, key, value, mask=None, scale=None):
    with attention.use("native"):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scale
        )


def check(query, key, value, mask=None, scale=None):
    """No further from the exact result than torch's own kernel, apart from a rounding of the output."""
    (out, logsumexp), (other, other_logsumexp) = (f(query, key, value, mask, scale) for f in (our_kernel, torch_kernel))
    wanted, wanted_logsumexp = exact(query, key, value, mask, scale)
    assert out.shape == other.shape and out.dtype == other.dtype and out.stride() == other.stride()
    assert logsumexp.shape == other_logsumexp.shape and logsumexp.stride() == other_logsumexp.stride()
    error, limit = (out - wanted).norm(), (other - wanted).norm()
    assert error <= 1.2 * limit + 1e-3 * wanted.norm(), (error, limit)
    is_near = torch.isclose(logsumexp.double(), wanted_logsumexp, rtol=1e-5, atol=3e-4)
    assert (is_near | (wanted_logsumexp < -1e38)).all()  # beyond, a logarithm of base 2 overflows
    return out


@needs_kernel
@pytest.mark.parametrize("width", [2, 8, 40, 64, 72, 88, 128, 160, 256])
@pytest.mark.parametrize(
    "queries, keys", [(1, 1), (1, 300), (15, 16), (16, 17), (17, 15), (63, 63), (65, 6), (300, 77)]
)
def test_shapes(queries, keys, width):
    check(*inputs(2, 3, queries, keys, width))


@needs_kernel
@pytest.mark.parametrize("width", [64, 256])
def test_keys_in_segments(width):
    """More than are repacked at a time, with and without a mask."""
    query, key, value = inputs(1, 2, 130, 3000, width)
    check(query, key, value)
    check(query, key, value, random(1, 2, 130, 3000, seed=7))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(70, 50), (1, 50), (2, 3, 70, 50), (2, 1, 70, 50), (1, 3, 1, 50), (2, 3, 1, 50), (1, 1, 1, 50)]
)
def test_masks(shape, dtype):
    query, key, value = inputs(2, 3, 70, 50, 24)
    check(query, key, value, random(*shape, seed=5).to(dtype))
    keep = random(*shape, seed=6) > 0
    keep[..., 0] = True
    check(query, key, value, torch.zeros(shape, dtype=dtype).masked_fill(~keep, -torch.inf))
    check(query, key, value, torch.zeros(shape, dtype=dtype).masked_fill(~keep, -10000.0))


@needs_kernel
def test_boolean_masks():
    query, key, value = inputs(2, 3, 70, 150, 24)
    keep = random(2, 1, 70, 150) > 0
    with attention.use("native"):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=keep)
    wanted, _ = exact(query, key, value, torch.zeros(keep.shape).masked_fill(~keep, -torch.inf))
    assert (out - wanted).norm() < 0.005 * wanted.norm()


@needs_kernel
@pytest.mark.parametrize("queries", [3, 20])
@pytest.mark.parametrize("keys", [5, 150, 1000])
def test_rows_that_are_masked(queries, keys):
    """By -inf: 0, as torch has it; by the lowest number: the plain mean, as softmax has it."""
    query, key, value = inputs(1, 2, queries, keys, 16)
    mask = torch.zeros(1, 1, queries, keys)
    mask[..., 0, :] = -torch.inf
    mask[..., -1, : keys - 1] = -torch.inf  # all but the last key
    mask[..., 1, :] = torch.finfo(torch.float32).min
    out = check(query, key, value, mask)
    assert not out[:, :, 0].any()
    assert torch.allclose(out[:, :, 1].float(), value.float().mean(2), atol=0.01)
    assert torch.equal(out[:, :, -1], value[:, :, -1])


@needs_kernel
def test_a_mask_of_the_lowest_bfloat16():
    query, key, value = inputs(1, 2, 10, 40, 16)
    mask = torch.full((1, 1, 1, 40), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16)
    check(query, key, value, mask)
    mask[..., :7] = 0
    check(query, key, value, mask)


@needs_kernel
def test_layouts():
    batch_first = inputs(2, 3, 50, 60, 40)
    wanted = check(*batch_first)
    contiguous = [t.contiguous() for t in batch_first]
    assert torch.equal(check(*contiguous), wanted)
    wide = [torch.cat([t, t], 3)[..., :40] for t in contiguous]
    assert torch.equal(check(*wide), wanted)
    one = [t[:1, :1].expand(2, 3, -1, -1) for t in contiguous]
    assert torch.equal(check(*one)[1, 2], wanted[0, 0])


@needs_kernel
@pytest.mark.parametrize("scale", [0.0, 0.3, -0.5, 2.0])
def test_scale(scale):
    check(*inputs(1, 2, 40, 90, 32), scale=scale)


@needs_kernel
def test_large_and_rising_scores():
    query, key, value = inputs(1, 2, 40, 500, 64, scale=30.0)  # scores of some thousands: one key takes it all
    out = our_kernel(query, key, value)[0]
    wanted, _ = exact(query, key, value)
    assert (out - wanted).norm() <= 1.2 * (torch_kernel(query, key, value)[0] - wanted).norm() + 1e-3 * wanted.norm()
    query, key, value = inputs(1, 1, 20, 700, 16)
    key = key.abs() * torch.linspace(0, 40, 700)[:, None].bfloat16()  # the highest score comes last
    check(query.abs(), key, value)
    check(-query.abs(), key, value)


@needs_kernel
def test_not_a_number_stays_in_its_place():
    query, key, value = inputs(1, 2, 40, 90, 32)
    clean = our_kernel(query, key, value)[0]
    query = query.clone()
    query[0, 1, 7] = torch.nan
    out = our_kernel(query, key, value)[0]
    assert out[0, 1, 7].isnan().all()
    out[0, 1, 7] = clean[0, 1, 7]
    assert torch.equal(out, clean)


@needs_kernel
def test_the_same_bytes_for_any_number_of_threads():
    shapes = (1, 1, 300, 200, 40), (2, 3, 65, 2000, 64), (1, 2, 1100, 100, 8)
    for shape in shapes:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(our_kernel(*inputs(*shape)))
        for out, logsumexp in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(logsumexp, results[0][1])


@needs_kernel
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_through_the_backward_of_torch(masked):
    query, key, value = inputs(2, 3, 50, 40, 24)
    mask = random(2, 1, 50, 40, seed=9) if masked else None
    weights = random(2, 3, 50, 24, seed=4)
    gradients = {}
    for name in ("native", "torch", "exact"):
        leaves = [(t.double() if name == "exact" else t.clone()).requires_grad_() for t in (query, key, value)]
        with attention.use("torch" if name == "exact" else name):
            out = exact(*leaves, mask)[0] if name == "exact" else F.scaled_dot_product_attention(*leaves, mask)
        gradients[name] = torch.autograd.grad((out * weights).sum(), leaves)
    for ours, other, wanted in zip(*gradients.values(), strict=True):
        assert (ours - wanted).norm() <= 1.2 * (other - wanted).norm() + 1e-3 * wanted.norm()


@needs_kernel
@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: ((q.float(), k.float(), v.float()), {}),
        lambda q, k, v: ((q.half(), k.half(), v.half()), {}),
        lambda q, k, v: ((q[..., :5], k[..., :5], v[..., :5]), {}),
        lambda q, k, v: ([random(1, 2, 9, 258, seed=i) for i in range(3)], {}),
        lambda q, k, v: ((q, k, v), {"is_causal": True}),
        lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(9, 1).bfloat16().expand(9, 9)}),
    ],
)
def test_what_is_left_to_torch(change):
    arguments, options = change(*inputs(1, 2, 9, 9, 16))
    function = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    wanted = function(*arguments, **options)
    with attention.use("native"):
        found = function(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@needs_kernel
def test_no_tokens_and_channels_apart():
    query, key, value = inputs(1, 2, 9, 9, 16)
    apart = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (query, key, value)]
    for arguments in ((query[:, :, :0], key, value), (query, key[:, :, :0], value[:, :, :0]), apart):
        wanted = F.scaled_dot_product_attention(*arguments)
        with attention.use("native"):
            assert torch.equal(F.scaled_dot_product_attention(*arguments), wanted)


@needs_kernel
def test_errors_stay_those_of_torch():
    query, key, value = inputs(1, 2, 9, 9, 16)
    function = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    wrong = [
        lambda: function(query, key, value, 0.5),
        lambda: function(query, key[..., :8], value),
        lambda: function(query, key, value, attn_mask=torch.zeros(4, 9)),
        lambda: function(query, key, value, attn_mask=torch.zeros(9, 9, dtype=torch.bool)),
    ]
    for call in wrong:
        messages = []
        for name in attention.CHOICES:
            with attention.use(name), pytest.raises(RuntimeError) as raised:
                call()
            messages.append(str(raised.value).splitlines()[0])
        assert messages[0] == messages[1]


class Calls:
    """Counts the calls of our kernel."""

    def __init__(self, monkeypatch):
        self.count, original = 0, attention.attend

        def attend(*arguments):
            self.count += 1
            return original(*arguments)

        monkeypatch.setattr(attention, "attend", attend)


@needs_kernel
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_use_it(backend, monkeypatch):
    calls = Calls(monkeypatch)
    arguments = inputs(1, 2, 30, 40, 16)
    compiled = torch.compile(F.scaled_dot_product_attention, backend=backend, fullgraph=True)
    with attention.use("native"):
        wanted = F.scaled_dot_product_attention(*arguments)
        assert torch.equal(compiled(*arguments), wanted) and calls.count == 2
    leaves = [t.clone().requires_grad_() for t in arguments]
    with attention.use("native"):
        compiled(*leaves).sum().backward()
    assert calls.count == 3 and all(t.grad is not None for t in leaves)


@needs_kernel
def test_switching(monkeypatch):
    calls, arguments = Calls(monkeypatch), inputs(1, 2, 9, 9, 16)

    def count():
        calls.count = 0
        F.scaled_dot_product_attention(*arguments)
        return calls.count

    assert (attention.current(), count()) == ("torch", 0)
    attention.switch("native")
    attention.switch("native")
    assert (attention.current(), count()) == ("native", 1)
    with attention.use("torch"):
        assert (attention.current(), count()) == ("torch", 0)
        with attention.use("native"):
            assert count() == 1
        assert count() == 0
    assert count() == 1
    with pytest.raises(ZeroDivisionError), attention.use("torch"):
        raise ZeroDivisionError
    assert count() == 1
    attention.switch("torch")
    assert (attention.current(), count()) == ("torch", 0)
    with pytest.raises(ConfigError, match="attention 'flash' is not one of native, torch"):
        attention.switch("flash")


@needs_kernel
def test_another_instruction_set_leaves_it_to_torch(monkeypatch):
    calls, arguments = Calls(monkeypatch), inputs(1, 2, 9, 9, 16)
    before = native.LIBRARY.lrq_isa().decode()
    attention.switch("native")
    try:
        native.use("avx2")
        assert attention.current() == "torch"
        assert "LRQDIT_KERNELS chose" in attention.describe()
        F.scaled_dot_product_attention(*arguments)
        with pytest.raises(KernelError, match="instruction set in use has none"):
            attention.attend(*arguments, None, 1.0)
    finally:
        native.use(before)
    assert calls.count == 1  # the refused one
    F.scaled_dot_product_attention(*arguments)
    assert calls.count == 2


@needs_kernel
def test_the_first_quantized_model_switches_it_on(caplog):
    caplog.set_level(logging.INFO, "lrqdit")
    assert "from the first quantized model on" in attention.describe()
    attention.start()
    attention.start()
    assert attention.current() == "native" and "from the first" not in attention.describe()
    (record,) = caplog.records
    assert (
        record.levelname == "INFO" and "LRQDIT_ATTENTION=torch or call lrqdit.attention.switch" in record.getMessage()
    )
    attention.switch("torch")
    attention.start()  # a choice stays
    assert attention.current() == "torch" and "chosen in this process" in attention.describe()


@pytest.fixture
def without_tiles():
    """Our best kernels that use no AMX."""
    before = native.LIBRARY.lrq_isa().decode()
    native.use("avx512bf16" if before == attention.AMX else before)
    yield
    native.use(before)


@needs_kernel
def test_torch_stays_where_it_alone_has_tiles(monkeypatch, caplog, without_tiles):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    attention.start()
    assert attention.current() == "torch" and attention.describe() == f"CPU attention: torch ({SLOW_BESIDE_AMX})"
    monkeypatch.setenv(attention.ENVIRONMENT, "native")
    attention.start()
    assert attention.current() == "native" and attention.describe().endswith(f"tokens; {SLOW_BESIDE_AMX}")
    monkeypatch.delenv(attention.ENVIRONMENT)
    attention.switch("torch")
    attention.switch("native")
    warning = f"{SLOW_BESIDE_AMX}; lrqdit.attention.switch('torch') goes back"
    assert [record.getMessage() for record in caplog.records] == [warning, warning]


@needs_kernel
def test_native_where_both_have_tiles(monkeypatch, caplog):
    if native.instruction_sets(native.LIBRARY).get(attention.AMX, "none"):
        pytest.skip("no AMX")
    before = native.LIBRARY.lrq_isa().decode()
    native.use(attention.AMX)
    try:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
        attention.start()
        assert attention.current() == "native" and SLOW_BESIDE_AMX not in attention.describe() and not caplog.records
    finally:
        attention.switch("torch")
        native.use(before)


def test_a_plain_checkpoint_leaves_attention_alone(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
    lrqdit.save_checkpoint(model, tmp_path)
    lrqdit.attention.switch("torch")
    attention._is_chosen = False
    lrqdit.load_checkpoint(torch.nn.Sequential(torch.nn.Linear(64, 64)), tmp_path)
    assert attention.current() == "torch"


def test_choice_by_environment(monkeypatch):
    monkeypatch.setenv(attention.ENVIRONMENT, "torch")
    attention.start()
    assert attention.current() == "torch"
    assert "CPU attention: torch (LRQDIT_ATTENTION=torch)" in doctor.describe()
    monkeypatch.setenv(attention.ENVIRONMENT, "flash")
    with pytest.raises(ConfigError, match="LRQDIT_ATTENTION='flash' is not one of native, torch; set"):
        attention.start()


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(native, "LIBRARY", None)
    monkeypatch.setattr(native, "WHY_REFERENCE", "no library")
    attention.start()
    assert attention.current() == "torch" and attention.describe() == "CPU attention: torch (no library)"
    with pytest.raises(KernelError, match="native attention: no library"):
        attention.switch("native")
    monkeypatch.setenv(attention.ENVIRONMENT, "native")
    with pytest.raises(KernelError, match="LRQDIT_ATTENTION=native: no library"):
        attention.start()


def test_a_torch_that_cannot_hand_over_its_kernel(monkeypatch):
    monkeypatch.delattr(torch.library, "get_kernel", raising=False)
    attention.start()
    assert attention.current() == "torch"


SCRIPT = """
import sys
import torch
torch.cpu._is_amx_tile_supported = lambda: sys.argv[1] == "True"
import lrqdit
from lrqdit.kernels import cpu_attention as attention
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
before = attention.current()
lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
q = torch.randn(1, 2, 9, 16).bfloat16()
torch.nn.functional.scaled_dot_product_attention(q, q, q)
print(before, attention.current())
"""


@pytest.mark.parametrize("has_amx", [False, True])
def test_a_process_without_a_warning(has_amx):
    """Importing changes nothing; quantizing does, and no warning is printed by torch (C++ ones come on stderr)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop(attention.ENVIRONMENT, None)
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, str(has_amx)]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert child.returncode == 0, child.stderr
    is_beaten = has_amx and native.LIBRARY is not None and native.LIBRARY.lrq_isa().decode() != attention.AMX
    assert child.stdout.split() == ["torch", "torch" if is_beaten or attention.why_torch() else "native"]
    assert "verrid" not in child.stderr


@needs_kernel
def test_a_pipeline_from_end_to_end(monkeypatch, tmp_path):
    calls = Calls(monkeypatch)
    model = build_tiny_pipeline().transformer.bfloat16().eval()
    lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
    model.save_pretrained(tmp_path)
    attention.switch("torch")
    attention._is_chosen = False
    model = PixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert attention.current() == "native"
    step = {
        "hidden_states": random(2, 4, 8, 8),
        "encoder_hidden_states": random(2, 11, 32),
        "encoder_attention_mask": torch.tensor([[1] * 11, [1] * 5 + [0] * 6]),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(**step)[0].float()
        assert calls.count == 4  # two blocks, each with self-attention and cross-attention
        with attention.use("torch"):
            other = model(**step)[0].float()
        whole = PixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float32)(
            **{k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in step.items()}
        )[0]
    assert calls.count == 4
    assert (out - whole).norm() <= 1.2 * (other - whole).norm()
