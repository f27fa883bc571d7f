import pytest
import torch
from torch import nn

from benchmarks.methods import simulate
from benchmarks.methods.recipes import LEVELS, RECIPES, SMOOTHINGS, TOKENS, Recipe
from lrqdit.calibration.statistics import ActivationStats, InputGroup
from lrqdit.numerics.rotation import ROTATIONS


def tokens(count, width=64, seed=0):
    basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(99))).Q
    spectrum = torch.arange(1, width + 1).float() ** -0.7
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * spectrum @ basis


def setting(recipe, weight_bits, activation_bits, x=None):
    """A layer of 96 x 64, its simulated form, and what that would store."""
    x = tokens(600) if x is None else x
    torch.manual_seed(0)
    layer = nn.Linear(64, 96)
    model = nn.Sequential(nn.Linear(64, 96))
    model.load_state_dict({"0." + k: v for k, v in layer.state_dict().items()})
    stats = ActivationStats(64, 256, 0, has_moment=True)
    stats.update(x)
    report = simulate.simulate(model, recipe, [InputGroup(["0"], stats)], weight_bits, activation_bits)
    return layer, model, report


def relative_error(layer, model, x):
    with torch.no_grad():
        y, found = layer(x), model(x)
    return float((found - y).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    """Finite, of the right size, and better with more bits."""
    recipe = RECIPES[name]
    assert recipe.smoothing in SMOOTHINGS and recipe.levels in LEVELS and recipe.tokens in TOKENS
    assert recipe.rotation in {*ROTATIONS, "permuted_block"} and recipe.source
    errors = []
    for bits in ((2, 4), (4, 4), (4, 8)):
        layer, model, report = setting(recipe, *bits)
        errors.append(relative_error(layer, model, tokens(200, seed=1)))
        assert report.parameters == 97 * 64 - 64 + 96
        assert report.true_bits > bits[0]
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < (0.1 if name == "lrq-dit-released" else 0.03)


@pytest.mark.parametrize("name", ["quarot", "svdquant", "orbitquant"])
def test_compensation_helps(name):
    errors = [relative_error(*setting(RECIPES[n], 3, 8)[:2], tokens(200, seed=1)) for n in (name, f"{name}+gptq")]
    assert errors[1] < 0.8 * errors[0]


def test_low_rank_keeps_the_large_directions():
    plain, low = (setting(Recipe("", rank=rank), 2, 16) for rank in (0, 16))
    x = tokens(200, seed=1)
    assert relative_error(*low[:2], x) < relative_error(*plain[:2], x)
    assert low[2].bits - plain[2].bits == 16 * 16 * (96 + 64)


def test_bits_are_counted_from_the_parts():
    weights, bias = 96 * 64, 96
    expected = {
        Recipe(""): weights * 4 + 96 * (16 + 4),
        Recipe("", group=16): weights * 4 + 96 * 4 * (16 + 4),
        Recipe("", levels="symmetric"): weights * 4 + 96 * 16,
        Recipe("", levels="symmetric", smoothing="absmax"): weights * 4 + 96 * 16 + 64 * 16,
        Recipe("", levels="gaussian", rotation="permuted_block"): weights * 4 + 96 * 16 + 16 * 16 + 64 * 17,
    }
    for recipe, bits in expected.items():
        assert setting(recipe, 4, 8)[2].bits == bits + 16 * bias


def test_transforms_change_nothing_but_rounding():
    """At 16-bit activations and without rounding, every transform cancels."""
    x = tokens(300) * torch.linspace(0.1, 10, 64)
    stats = ActivationStats(64, 256, 0)
    stats.update(x)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    for rotation in ("none", "hadamard", "permuted_block", "outlier"):
        for smoothing in SMOOTHINGS:
            recipe = Recipe("", smoothing=smoothing, rotation=rotation)
            transform, _ = simulate.fit_transform({"a": weight}, stats, recipe, 16, 0, 4)
            torch.testing.assert_close(
                transform.apply(x) @ transform.fold(weight).T, x @ weight.T, rtol=1e-3, atol=2e-2
            )
            moment = transform.fold_moment(x.T @ x / len(x))
            seen = transform.apply(x).double()
            torch.testing.assert_close(moment, seen.T @ seen / len(x), rtol=1e-3, atol=1e-2)


def test_gaussian_levels():
    """Max 1960: distortion of a standard normal law with 4 and 8 levels."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for bits, distortion in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        levels = simulate.gaussian_levels(bits)
        torch.testing.assert_close(levels, -levels.flip(0), rtol=0, atol=1e-4)
        code = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        assert float((levels[code] - x).square().mean()) == pytest.approx(distortion, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_nearest_level(bits):
    """The same as a search between the edges, on the edges themselves and their neighbours, too."""
    levels = simulate.gaussian_levels(bits)
    edges = (levels[1:] + levels[:-1]) / 2
    beside = [torch.nextafter(edges, torch.full_like(edges, side)) for side in (-torch.inf, torch.inf)]
    x = 1.5 * torch.randn(20_000, generator=torch.Generator().manual_seed(bits))
    x = torch.cat([x, edges, *beside, levels, torch.tensor([-1e30, 1e30, 0.0])])
    assert torch.equal(simulate.gaussian_rounding(bits)(x), levels[torch.bucketize(x, edges)])


def test_released_defects():
    """The released code's dead clip search: several times the error of levels that see their own half only."""
    weight = 0.03 * torch.randn(64, 1152, generator=torch.Generator().manual_seed(0))
    error = float((simulate.round_released(weight, 3) - weight).square().sum() / weight.square().sum())
    assert 0.15 < error < 0.3
    assert len(simulate.round_released(weight[:1], 3)[0].unique()) <= 10


def test_group_sizes():
    assert [simulate.group_size(288, n) for n in (0, 64, 128)] == [288, 48, 96]
    assert simulate.group_size(7, 128) == 7
