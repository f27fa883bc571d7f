import pytest
import torch
from conftest import dense
from torch import nn

from lrqdit.calibration.statistics import ActivationStats
from lrqdit.config import QuantizationConfig
from lrqdit.errors import NumericalError, RotationError
from lrqdit.fitting.compensate import measure_curvature
from lrqdit.fitting.layer import FittedInput, quantize_linear, quantize_without_data
from lrqdit.fitting.transform import choose_transform, data_free_transform, gaussian_clip
from lrqdit.kernels import ops
from lrqdit.models.registry import Treatment
from lrqdit.numerics import codebook, rotation
from lrqdit.numerics.tokens import dequantize_tokens, quantize_tokens

FAST = {"rotation": "hadamard", "smoothing": "never"}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observe(x):
    stats = ActivationStats(x.shape[-1], 256, seed=0)
    stats.update(x)
    return stats


def fit(weight, x, bias=None, preset="w4a8", **settings):
    config = QuantizationConfig.from_name(preset, **settings)
    weight_bits, activation_bits = config.weight_bits, config.activation_bits
    transform, report = choose_transform({"layer": weight}, observe(x), config, weight_bits, activation_bits)
    shared = FittedInput(transform, activation_bits)
    return quantize_linear("layer", dense(weight, bias), shared, weight_bits, config), report


def varying_error(layer, x, weight, bias=None):
    """Relative error of the part of the output that varies between tokens."""
    y = nn.functional.linear(x, weight, bias)
    return float((layer(x) - y).norm() / (y - y.mean(0)).norm())


def test_report_is_the_measured_error():
    """The reported error is that of the layer itself where every row and token decides."""
    x, weight = random(200, 48) + 3, random(40, 48, seed=1)
    layer, report = fit(weight, x, preset="w4a4", coding="scalar")
    assert report.error == pytest.approx(varying_error(layer, x, weight) ** 2, rel=1e-3)
    assert set(report.candidates) >= {"none", "hadamard", "none+smoothing", "hadamard+smoothing"}
    assert report.gain == pytest.approx(report.candidates["none"] / report.error)
    assert layer.format.input.clip == report.clip < 1
    assert report.rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)


def test_the_best_candidate_is_chosen():
    """A channel 60 times as large as the others needs smoothing or a rotation."""
    x, weight = random(200, 48), random(40, 48, seed=1)
    x[:, 5] *= 60
    layer, report = fit(weight, x, preset="w4a4")
    assert "outlier" in report.candidates  # there is a salient channel
    assert report.error < 0.3 * report.candidates["none"]
    cheap = min(error for kind, error in report.candidates.items() if "outlier" not in kind)
    assert report.error <= cheap
    assert layer.format.input.rotation == report.rotation and layer.format.input.has_scale


@pytest.mark.parametrize(
    ("policy", "scale", "expected"),
    [("threshold", 0.5, "hadamard"), ("threshold", 2.0, "outlier"), ("none", 1, "none"), ("outlier", 1, "outlier"),
     ("block_hadamard", 1, "block_hadamard")],
)  # fmt: skip
def test_rotation_policies(policy, scale, expected):
    layer, report = fit(random(24, 48, seed=1), scale * random(64, 48), rotation=policy, smoothing="never")
    assert layer.format.input.rotation == report.rotation == expected and list(report.candidates) == [expected]


def test_rotation_that_does_not_fit():
    x, weight = random(64, 131), random(8, 131, seed=1)  # a prime width above 128
    with pytest.raises(RotationError, match="131"):
        fit(weight, x, rotation="outlier", smoothing="never")
    _, report = fit(weight, x)
    assert report.rotation in ("none", "hadamard") and "outlier" not in report.candidates


@pytest.mark.parametrize(("policy", "expected"), [("always", True), ("never", False)])
def test_smoothing_policies(policy, expected):
    _, report = fit(random(24, 48, seed=1), random(64, 48), rotation="none", smoothing=policy)
    assert report.is_smoothed is expected


def test_centring_handles_constant_channels():
    """Three channels at N(200, 1): what varies between tokens must survive w4a4."""
    x, weight = random(256, 96), random(64, 96, seed=1) / 96**0.5
    x[:, [3, 40, 77]] += 200
    bias = random(64, seed=2)
    centred, _ = fit(weight, x, bias, "w4a4", **FAST)
    plain, _ = fit(weight, x, bias, "w4a4", is_centred=False, **FAST)
    centred_error, plain_error = (varying_error(layer, x, weight, bias) for layer in (centred, plain))
    # without the constant channels the same layer has this error: 4-bit weights and 4-bit activations
    y = x.clone()
    y[:, [3, 40, 77]] -= 200
    reference, _ = fit(weight, y, bias, "w4a4", **FAST)
    assert centred_error**2 < 0.1
    assert centred_error < 1.05 * varying_error(reference, y, weight, bias)
    assert plain_error > 3 * centred_error


def test_bias_of_centring():
    x, weight = random(64, 48) + 5, random(24, 48, seed=1)
    layer, _ = fit(weight, x, **FAST)
    offset = layer.input_transform.input_offset
    assert layer.format.has_bias and not layer.format.has_original_bias
    torch.testing.assert_close(layer.folded_bias.double(), weight.double() @ offset.double(), rtol=1e-6, atol=1e-6)
    plain, _ = fit(weight, x, is_centred=False, **FAST)
    assert plain.bias is None and not plain.format.has_bias and plain.input_transform.input_offset is None


def test_offset_beyond_float16():
    x, weight = random(64, 48), random(24, 48, seed=1)
    x[:, 0] += 1e6
    layer, _ = fit(weight, x, **FAST)
    assert torch.isfinite(layer.input_transform.input_offset).all() and torch.isfinite(layer(x)).all()


def test_clip():
    heavy = random(200, 48) ** 3
    assert fit(random(24, 48, seed=1), heavy, preset="w4a4", **FAST)[1].clip < 1
    assert fit(random(24, 48, seed=1), heavy, preset="w4a4", is_clipped=False, **FAST)[1].clip == 1


def test_token_levels():
    x, weight = random(400, 96), random(24, 96, seed=1)
    layer, _ = fit(weight, x, preset="w4a4", **FAST)
    assert layer.format.input.token_levels == layer.input_transform.levels == "normal"
    assert fit(weight, x, preset="w4a4", token_levels="uniform", **FAST)[0].format.input.token_levels == "uniform"
    assert fit(weight, x, preset="w4a8", **FAST)[0].format.input.token_levels == "uniform"
    coarse = torch.randint(-7, 8, (400, 96)).float()  # on a uniform grid already
    coarse[:, 0] = 7
    plain = {**FAST, "rotation": "none", "is_centred": False}
    assert fit(weight, coarse, preset="w4a4", **plain)[0].format.input.token_levels == "uniform"


@pytest.mark.parametrize("weight", [torch.zeros(7, 13), random(7, 13).abs(), -random(7, 13).abs()])
@pytest.mark.parametrize("preset", ["w2a16", "w3a4", "w4a8", "w8a8"])
def test_odd_weights(weight, preset):
    x = random(30, 13, seed=1)
    layer, report = fit(weight, x, preset=preset)
    y, dense = layer(x), nn.functional.linear(x, weight)
    assert torch.isfinite(y).all()
    limit = {"w2a16": 0.7, "w3a4": 0.5, "w4a8": 0.2, "w8a8": 0.02}[preset]
    assert (y - dense).norm() <= limit * dense.norm()
    assert report.error is not None and report.error <= limit**2


def test_constant_input():
    """Nothing varies: the output must be right although the relative error has no meaning."""
    weight = random(24, 48, seed=1)
    x = random(1, 48).expand(64, -1)
    layer, report = fit(weight, x)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight), rtol=1e-2, atol=0.02)
    assert report.error is not None and 0 <= report.error < float("inf")


def test_input_of_zeros():
    weight, bias, x = random(24, 48, seed=1), random(24), torch.zeros(64, 48)
    layer, report = fit(weight, x, bias)
    assert torch.equal(layer(x), bias.expand(64, -1)) and report.error == 0


def test_group_with_one_transform():
    x, weights = random(100, 48), {"q": random(16, 48, seed=1), "k": 100 * random(24, 48, seed=2)}
    config = QuantizationConfig()
    transform, report = choose_transform(weights, observe(x), config, 4, 8)
    assert report.names == ["q", "k"]
    for name, weight in weights.items():
        layer = quantize_linear(name, dense(weight), FittedInput(transform, 8), 4, config)
        assert varying_error(layer, x, weight) < 0.2


@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("kind", list(codebook.CODEBOOKS))
def test_codebooks(kind, scope):
    weight, x = random(24, 48, seed=1), random(64, 48)
    layer, _ = fit(weight, x, codebook=kind, table_scope=scope, coding="scalar", **FAST)
    assert layer.format.codebook == kind
    expected = codebook.fit(ops.fold(layer.input_transform, weight), 4, kind, scope=scope)
    decoded = expected.quantize(ops.fold(layer.input_transform, weight))
    torch.testing.assert_close(layer.dequantize(), ops.unfold(layer.input_transform, decoded))
    assert layer.format.table_rows == len(expected.table)


@pytest.mark.parametrize(("preset", "settings", "expected"), [
    ("w4a8", {}, True), ("w3a8", {"coding": "scalar"}, False),
    ("w4a8", {"codebook": "nf4"}, False), ("w4a8", {"codebook": "nf4", "coding": "trellis"}, True),
    ("w4a8", {"table_scope": "row"}, False), ("w4a8", {"mode": "paper"}, False), ("w8a8", {}, False),
])  # fmt: skip
def test_coding(preset, settings, expected):
    weight, x = random(24, 48, seed=1), random(64, 48)
    layer, _ = fit(weight, x, preset=preset, **{**FAST, **settings})
    assert layer.format.is_trellis is expected
    assert varying_error(layer, x, weight) < 0.3


def test_a_trellis_loses_less():
    weight, x = random(96, 96, seed=1), random(64, 96)
    errors = [varying_error(fit(weight, x, coding=coding, **FAST)[0], x, weight) for coding in ("trellis", "scalar")]
    assert errors[0] ** 2 < 0.8 * errors[1] ** 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_bad_weights(bad, leaf):
    layer = nn.Linear(48, 24)
    getattr(layer, leaf).data.flatten()[7] = bad
    transform = data_free_transform(48, QuantizationConfig(), 8)
    with pytest.raises(NumericalError, match=rf"blocks\.3\.to_q\.{leaf} contains NaN or Inf"):
        quantize_linear("blocks.3.to_q", layer, FittedInput(transform, 8), 4, QuantizationConfig())


@pytest.mark.parametrize("policy", ["auto", "threshold", "outlier", "none", "hadamard", "block_hadamard"])
def test_data_free_transform(policy):
    transform = data_free_transform(48, QuantizationConfig(rotation=policy, activation_bits=4), 4)
    assert transform.input_offset is None
    assert transform.rotation.kind == ("hadamard" if policy in ("auto", "threshold", "outlier") else policy)
    x = random(64, 48)
    torch.testing.assert_close(transform.apply(x).norm(dim=1), x.norm(dim=1))
    assert data_free_transform(48, QuantizationConfig(is_clipped=False), 4).clip == 1


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("width", [48, 512, 4096])
def test_gaussian_clip(width, bits):
    """Within 5 % of the smallest error that any clip has on Gaussian tokens."""
    x = random(64, width)

    def error(clip):
        return float((dequantize_tokens(*quantize_tokens(x, bits, clip)) - x).square().sum())

    assert error(gaussian_clip(width, bits)) < 1.05 * min(error(clip / 50) for clip in range(20, 51))


def test_seed_changes_the_signs():
    one, two = (data_free_transform(48, QuantizationConfig(seed=seed), 8) for seed in (0, 1))
    assert not torch.equal(one.input_scale, two.input_scale)


def test_keep_at_8_bits():
    layer, x = nn.Linear(48, 24), random(9, 48)
    kept = quantize_without_data("proj_out", layer, Treatment(8), QuantizationConfig())
    assert (kept.format.weight_bits, kept.format.input.activation_bits, kept.format.input.rotation) == (8, 16, "none")
    y = layer(x)
    assert (kept(x) - y).norm() < 0.01 * y.norm()
    assert kept.format.table_rows == 0 and rotation.ROTATIONS


def test_compensated_rounding_is_used_when_asked_for():
    torch.manual_seed(0)
    stats = ActivationStats(48, 512, seed=0, has_moment=True)
    stats.update(torch.randn(512, 6) @ torch.randn(6, 48))  # few directions: much to compensate
    weight = torch.randn(32, 48)
    config = QuantizationConfig.from_name("w3a8", rounding="compensated")
    transform, report = choose_transform({"a": weight}, stats, config, 3, 8)
    curvature = measure_curvature(transform, stats, 8, config.damping)
    layer = quantize_linear("a", dense(weight), FittedInput(transform, 8, curvature), 3, config, report)
    plain = quantize_linear("a", dense(weight), FittedInput(transform, 8), 3, config)
    target = stats.tokens @ weight.T
    assert report.rounding["a"]["gptq"] < 0.5
    assert (layer(stats.tokens) - target).norm() < 0.7 * (plain(stats.tokens) - target).norm()
