import copy
import gc
import io
import pickle
import weakref

import accelerate
import peft
import pytest
import torch
from conftest import dense
from torch import nn

from lrqdit.config import QuantizationConfig
from lrqdit.errors import CheckpointError, ModelError
from lrqdit.fitting.layer import FittedInput, quantize_linear
from lrqdit.numerics.rotation import ROTATIONS, build
from lrqdit.numerics.tokens import InputTransform
from lrqdit.packed.checkpoint import stored_tensors
from lrqdit.packed.format import LinearFormat
from lrqdit.packed.linear import QuantLinear, SharedInput

WIDTH, OUT = 32, 24
CONFIG = QuantizationConfig()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_transform(kind="hadamard", clip=0.9, has_offset=True):
    built, signs = build(WIDTH, kind, 1, channel_absmax=random(WIDTH).abs() + 0.1)
    scale = torch.exp(0.3 * random(WIDTH, seed=7)) * (1 if signs is None else signs)
    return InputTransform(built, random(WIDTH, seed=8).half() if has_offset else None, scale.half(), clip)


def make_layer(name="layer", seed=0, weight_bits=4, activation_bits=8, owner=None, has_bias=True, kind="hadamard"):
    weight, bias = random(OUT, WIDTH, seed=seed), random(OUT, seed=seed + 1) if has_bias else None
    shared = FittedInput(make_transform(kind), activation_bits, owner=owner)
    layer = quantize_linear(name, dense(weight, bias), shared, weight_bits, CONFIG)
    return layer.eval()


class Attention(nn.Module):
    """q, k and v that share an input, and an output layer."""

    def __init__(self, activation_bits=8):
        super().__init__()
        self.to_q = make_layer("to_q", 0, activation_bits=activation_bits)
        self.to_k = make_layer("to_k", 2, activation_bits=activation_bits, owner="to_q")
        self.to_v = make_layer("to_v", 4, activation_bits=activation_bits, owner="to_q")
        for layer in (self.to_k, self.to_v):
            layer.share_input(self.to_q)

    def forward(self, x):
        return torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], dim=-1)


def run_apart(block, x):
    """What the block computes, every layer quantizing its own copy of the input."""
    return torch.cat([layer(x.clone()) for layer in (block.to_q, block.to_k, block.to_v)], dim=-1)


@pytest.fixture
def count_quantizations(monkeypatch):
    calls, original = [], SharedInput.put

    def counted(self, x, tokens):
        calls.append(x)
        return original(self, x, tokens)

    monkeypatch.setattr(SharedInput, "put", counted)
    return calls


def test_it_is_a_linear_layer():
    layer = make_layer()
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (WIDTH, OUT)
    assert all(not t.is_floating_point() for t in stored_tensors(layer.state_dict()).values())
    assert "w4a8" in repr(layer) and "rotation=hadamard" in repr(layer)


def test_weight_answers_questions():
    weight = make_layer().to(torch.bfloat16).weight
    assert weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.shape == (OUT, WIDTH)
    assert weight.numel() == OUT * WIDTH and weight.dim() == 2 and weight.size(1) == WIDTH and weight.ndim == 2
    assert not weight.requires_grad and weight.is_floating_point() and weight.data.dtype == torch.bfloat16
    assert weight.untyped_storage().nbytes() <= 2  # no dense weight behind it
    assert "WeightStub" in repr(weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.add_(1),
        lambda w: w.data.add_(1),
        lambda w: w.copy_(torch.zeros(OUT, WIDTH)),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__iadd__(1.0),
        lambda w: w.data.__isub__(1.0),
        lambda w: nn.init.normal_(w),
        lambda w: torch.add(torch.zeros(OUT, WIDTH), 1.0, out=w),
        lambda w: setattr(w, "data", torch.zeros(OUT, WIDTH)),
    ],
)
def test_weight_cannot_be_changed(change):
    with pytest.raises(ModelError, match="packed and cannot be changed.*fuse_lora"):
        change(make_layer().weight)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "compute",
    [
        lambda w: w + 1,
        lambda w: 1 * w,
        lambda w: w.clone(),
        lambda w: w[0],
        lambda w: w.mT if w.ndim == 2 else w.real,
        lambda w: w.data.norm(dim=-1),
        lambda w: torch.stack([w, w]),
        lambda w: torch.zeros(w.shape).add_(w),
        lambda w: nn.functional.linear(torch.ones(1, w.shape[-1]), w),
        lambda w: w.to(torch.float16),
        lambda w: w.cpu(),
        lambda w: w.abs().max().item(),
        copy.deepcopy,
    ],
)
def test_weight_is_dequantized_where_it_is_computed_with(compute, name):
    layer = make_layer()
    dense = getattr(layer.to_linear(), name).detach()
    torch.testing.assert_close(compute(getattr(layer, name)), compute(dense), rtol=0, atol=0)


def test_a_layer_is_the_product_with_its_weight_and_bias():
    layer, x = make_layer(activation_bits=16), random(4, WIDTH)
    assert layer.format.input.has_offset
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)
    half = layer.to(torch.bfloat16)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16
    half.weight.requires_grad = False  # as PEFT does


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.half().float(),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to("cpu", torch.float16, non_blocking=True),
    ],
)
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_changes_that_must_not_change_it(change, activation_bits):
    block = Attention(activation_bits)
    x = random(3, 5, WIDTH, seed=3)
    block.to_q(x)  # leaves codes behind, which must not travel
    before, y = {k: v.clone() for k, v in stored_tensors(block.state_dict()).items()}, run_apart(block, x)
    changed = change(block)
    after = stored_tensors(changed.state_dict())
    assert before.keys() == after.keys()
    assert all(after[k].dtype == before[k].dtype and torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(changed(x), y)
    assert changed.to_k.shared_input is changed.to_q.shared_input


def test_to_changes_the_answer_only():
    layer = make_layer()
    assert layer.to(torch.float16).weight.dtype == torch.float16
    assert layer.folded_bias.dtype == torch.float32 and layer.row_scale.dtype == torch.float32
    assert layer(random(2, WIDTH).half()).dtype == torch.float16


def test_state_dict_round_trip():
    block, x = Attention(), random(4, WIDTH)
    other = nn.Module()
    for name in ("to_q", "to_k", "to_v"):
        setattr(other, name, QuantLinear(block.get_submodule(name).format))
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for name in ("to_k", "to_v"):
        getattr(other, name).share_input(other.to_q)
    assert torch.equal(run_apart(other, x), run_apart(block, x))
    assert "to_k.input_offset_bits" not in block.state_dict() and "to_q.input_offset_bits" in block.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("activation_bits", [4, 16])
def test_output_follows_the_input(dtype, activation_bits):
    layer, x = make_layer(activation_bits=activation_bits), random(2, 3, WIDTH).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, OUT)
    assert torch.equal(y, layer(x.float()).to(dtype))


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("kind", ["hadamard", "outlier"])
def test_autocast_changes_the_output_dtype_only(activation_bits, kind):
    layer, x = make_layer(activation_bits=activation_bits, kind=kind), random(6, WIDTH)
    expected = layer(x).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (0, WIDTH), (2, 0, WIDTH), (2, 3, 4, WIDTH)])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_input_shapes(shape, activation_bits):
    layer, x = make_layer(activation_bits=activation_bits), random(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT)
    rows = layer(x.reshape(-1, WIDTH)).view(y.shape)
    assert torch.equal(y, rows)
    with pytest.raises(ModelError, match="must end in 32"):
        layer(random(2, WIDTH + 1))


def test_non_contiguous_input():
    layer, x = make_layer(), random(WIDTH, 7).t()
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("kind", list(ROTATIONS))
@pytest.mark.parametrize("has_bias", [True, False])
def test_dequantize_is_what_is_multiplied(kind, has_bias):
    layer, x = make_layer(activation_bits=16, kind=kind, has_bias=has_bias), random(9, WIDTH)
    offset = layer.input_transform.input_offset.float()
    expected = (x - offset) @ layer.dequantize().T + layer.folded_bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    dense = layer.to_linear()
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(x), layer(x), rtol=1e-4, atol=1e-4)
    error = (layer.dequantize() - random(OUT, WIDTH)).norm() / random(OUT, WIDTH).norm()
    assert error < 0.15  # 4 bits


def test_to_linear_has_the_layers_dtype():
    assert make_layer().to(torch.bfloat16).to_linear().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("activation_bits", [4, 8, 16])
def test_straight_through_gradient(activation_bits):
    layer = make_layer(activation_bits=activation_bits)
    x = random(2, 5, WIDTH).requires_grad_()
    y, gradient = layer(x), random(2, 5, OUT, seed=5)
    y.backward(gradient)
    assert torch.equal(y.detach(), layer(x.detach()))
    assert torch.equal(x.grad, gradient @ layer.dequantize())


def test_gradient_under_autocast():
    layer, x = make_layer(), random(5, WIDTH).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(5, -1), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("is_training", [False, True])
def test_shared_input_is_quantized_once(count_quantizations, is_training):
    block, x = Attention(), random(4, WIDTH).requires_grad_(is_training)
    y = block(x)
    assert len(count_quantizations) == 1
    assert block.to_q.shared_input.entry is None  # dropped after the last reader
    assert torch.equal(y, run_apart(block, x)) and y.requires_grad == is_training
    assert len(count_quantizations) == 4


def test_change_in_place_is_noticed(count_quantizations):
    block, x = Attention(), random(4, WIDTH)
    q = block.to_q(x)
    x.mul_(2)
    k = block.to_k(x)
    assert len(count_quantizations) == 2
    assert torch.equal(k, block.to_k(x.clone())) and not torch.equal(q, block.to_q(x.clone()))


def test_codes_die_with_their_tensor():
    block, x = Attention(), random(4, WIDTH)
    block.to_q(x)
    codes = weakref.ref(block.to_q.shared_input.entry[2].codes)
    del x
    gc.collect()
    assert codes() is None and block.to_q.shared_input.entry is None


def test_codes_are_not_kept_in_training():
    block = Attention()
    x = random(4, WIDTH).requires_grad_()
    block.to_q(x).sum().backward()
    del x
    gc.collect()
    assert block.to_q.shared_input.entry is None


def test_another_tensor_is_quantized_again(count_quantizations):
    block, x, y = Attention(), random(4, WIDTH), random(4, WIDTH, seed=1)
    for tensor in (x, y, x):
        assert torch.equal(block(tensor), run_apart(block, tensor))


def test_sharing_twice_counts_once():
    block = Attention()
    block.to_k.share_input(block.to_q)
    assert block.to_q.shared_input.readers == 3


def test_inference_mode():
    block, x = Attention(), random(4, WIDTH)
    expected = run_apart(block, x)
    with torch.inference_mode():
        assert torch.equal(block(x), expected)
        inner = x.clone()
        q = block.to_q(inner)
        inner.mul_(3)  # an inference tensor counts no versions
        assert torch.equal(block.to_k(inner), block.to_k(3 * x)) and torch.equal(q, expected[:, :OUT])
    assert torch.equal(block(x), expected)


class Wrapped(nn.Module):
    """What PEFT needs around a block."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()

    def forward(self, x):
        return self.attn(self.norm(x))


def test_lora(tmp_path):
    base, x = Wrapped().eval(), random(4, WIDTH)
    y = base(x)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["to_q", "to_v"], r=2))
    assert torch.equal(model(x), y)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("lora_" in n for n in trained)
    model(x).square().mean().backward()
    assert any(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    optimizer.step()
    after = model(x).detach()
    assert not torch.equal(after, y)
    stored = {k.replace("base_layer.", ""): v for k, v in base.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(stored[k], before[k]) for k in before)

    with pytest.raises(ModelError, match="LoRA"):
        model.merge_adapter()
    with pytest.raises(ModelError, match="LoRA"):
        model.merge_and_unload()

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Wrapped().eval(), tmp_path)
    assert torch.equal(again(x), after)


def test_gradient_reaches_a_lora_below():
    """A LoRA in front of a quantized layer learns through it."""
    layers = nn.Sequential(make_layer(kind="none"), make_layer(seed=3))
    front = nn.Linear(WIDTH, WIDTH)
    layers[1](front(random(3, WIDTH))).sum().backward()
    assert front.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_compile(activation_bits):
    block, x = Attention(activation_bits), random(4, WIDTH)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), block(x))
        assert torch.equal(compiled(2 * x), block(2 * x))


# torch itself makes both, around the graph break at an autograd function that takes a module
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute")
def test_compile_with_gradients():
    block = Attention()
    compiled = torch.compile(block, backend="aot_eager")
    x, z = (random(4, WIDTH).requires_grad_() for _ in range(2))
    compiled(x).sum().backward()
    block(z).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-5, atol=1e-5)


def test_accelerate_offload():
    block, x = Attention(), random(4, WIDTH)
    y = run_apart(block, x)
    before = {k: v.clone() for k, v in block.state_dict().items()}
    accelerate.cpu_offload(block, execution_device="cpu", offload_buffers=True)
    assert block.to_q.packed.is_meta
    assert torch.equal(block(x), y) and torch.equal(block(x), y)
    assert block.to_q.packed.is_meta
    accelerate.hooks.remove_hook_from_module(block, recurse=True)
    assert {k: v.dtype for k, v in block.state_dict().items()} == {k: v.dtype for k, v in before.items()}


def test_accelerate_dispatch():
    block, x = Attention(), random(4, WIDTH)
    y = run_apart(block, x)
    accelerate.dispatch_model(block, {"to_q": "cpu", "to_k": "cpu", "to_v": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(block(x), y)


def test_format_round_trip():
    layout = make_layer(kind="outlier").format
    assert LinearFormat.from_dict(layout.to_dict()) == layout
    assert "codebook" not in layout.to_dict()  # defaults are left out


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"weight_bits": 7},
        {"weight_bits": 6, "is_trellis": True},
        {"weight_bits": "4"},
        {"weight_bits": True},
        {"activation_bits": 5},
        {"in_features": 0},
        {"in_features": None},
        {"clip": 0.0},
        {"clip": float("nan")},
        {"table_rows": 7},
        {"rotation": "spiral"},
        {"rotation": "outlier", "factors": [5]},
        {"rotation": "outlier", "factors": []},
        {"rotation": "hadamard", "factors": [3]},
        {"factors": 3},
        {"factors": ["a"]},
        {"has_bias": 1},
        {"input_from": 3},
    ],
)
def test_impossible_formats(change):
    values = {**make_layer().format.to_dict(), **change}
    with pytest.raises(CheckpointError, match="layer format"):
        LinearFormat.from_dict(values)


def test_format_of_another_kind():
    for values in (None, [], "w4a8", {"in_features": 4}):
        with pytest.raises(CheckpointError, match="layer format"):
            LinearFormat.from_dict(values)
