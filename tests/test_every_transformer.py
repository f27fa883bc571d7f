"""Every transformer class of diffusers, as a tiny random model, through everything that people do with one."""

import functools
import warnings

import diffusers
import pytest
import torch
from tiny_transformers import TINY, build_model, run

import lrqdit
from benchmarks.models_table import transformer_classes
from lrqdit.app.inspection import describe_folder
from lrqdit.integrations.diffusers import LRQDiTConfig
from lrqdit.models.registry import linear_layers, roles
from lrqdit.packed.format import describe_unpacked
from lrqdit.packed.linear import QuantLinear

MODULATED_BY_TOKEN = {"RFD4ProteinaTransformer"}
SETTINGS = {"calibration_tokens": 64}
CLASSES = pytest.mark.parametrize("name", sorted(TINY))
pytestmark = pytest.mark.skipif(
    tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42),
    reason="the configurations are those of diffusers 0.42",
)


@pytest.fixture(autouse=True)
def _as_users_run():
    """Without gradients; and what diffusers and torch warn of in their own code is not looked at."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", module=r"(diffusers|torch)\.")
        yield


@functools.cache
def exact(name):
    return run(build_model(name))


def relative_error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_every_class_has_a_tiny_model():
    """A newer diffusers may have more: give each a configuration and inputs, and look at what its plan takes."""
    assert set(TINY) == set(transformer_classes())


@CLASSES
def test_modulation_is_what_reads_one_token_a_picture(name):
    """Seen while it runs: weight-only layers read one token of each of two pictures, low-bit layers more."""
    model, tokens = build_model(name), {}

    def note(layer_name, x):
        tokens[layer_name] = x.numel() // layers[layer_name].in_features

    layers = linear_layers(model)
    for layer_name in layers:
        layer = model.get_submodule(layer_name)
        layer.register_forward_pre_hook(lambda _, x, k, n=layer_name: note(n, *x, *k.values()), with_kwargs=True)
    run(model)
    found = roles(model)
    assert not [n for n, count in tokens.items() if found[n] == "quantized" and count <= 2]
    if name not in MODULATED_BY_TOKEN:
        assert not [n for n, count in tokens.items() if found[n] == "weight-only" and count > 2]


@CLASSES
def test_without_data(name, tmp_path):
    model = build_model(name)
    model.save_pretrained(tmp_path / "float")
    lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
    output = run(model)
    assert relative_error(output, exact(name)) < 0.3

    model.save_pretrained(tmp_path / "quantized")
    loaded = type(model).from_pretrained(tmp_path / "quantized")
    assert equal_states(loaded, model) and torch.equal(run(loaded), output)

    config = LRQDiTConfig("w4a8")
    assert equal_states(type(model).from_pretrained(tmp_path / "float", quantization_config=config), model)
    if not TINY[name].bfloat16_fault:
        narrow = type(model).from_pretrained(tmp_path / "float", quantization_config=config, torch_dtype=torch.bfloat16)
        assert relative_error(run(narrow), exact(name)) < 0.3


@CLASSES
def test_with_data(name, tmp_path):
    model = build_model(name)
    settings = {"show_progress": False, **SETTINGS}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lrqdit.quantize(model, "w4a8", forward_loop=lambda m: [run(m, seed) for seed in (1, 2)], **settings)
    is_said = any("cannot be differentiated" in str(warning.message) for warning in caught)
    assert is_said == bool(TINY[name].gradient_fault)
    output = run(model)
    assert relative_error(output, exact(name)) < 0.2
    assert any(isinstance(layer, QuantLinear) for layer in model.modules())
    model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path)), output)
    if not TINY[name].bfloat16_fault:
        narrow = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        assert relative_error(run(narrow), output) < 0.1


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "MiniMaxH3Transformer3DModel"])
def test_what_diffusers_keeps_in_float32_is_loaded_in_float32(name, tmp_path):
    model = build_model(name)
    lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    embedders = [p for name, p in loaded.named_parameters() if ".time_embedder." in f".{name}"]
    assert len(embedders) == 4 and {p.dtype for p in embedders} == {torch.float32}
    assert relative_error(run(loaded), run(model)) < 0.05


def test_what_is_no_matrix_is_counted(tmp_path):
    """The experts of Nucleus-Image are tensors of three dimensions: the report and `lrqdit inspect` say so."""
    model = build_model("NucleusMoEImageTransformer2DModel")
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name and p.ndim == 3)
    parameters = sum(p.numel() for p in model.parameters())
    size = lrqdit.quantize(model, "w4a8", is_calibrated=False, show_progress=False).size
    assert size.unpacked_share == pytest.approx(experts / parameters) and size.unpacked_share > 0.1
    model.save_pretrained(tmp_path)
    assert describe_folder(tmp_path)["totals"]["unpacked_share"] == pytest.approx(size.unpacked_share)
    assert f"{size.unpacked_share:.0%} of the parameters" in describe_unpacked(size.unpacked_share)
    assert describe_unpacked(0.004) == ""
