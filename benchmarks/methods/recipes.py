"""The field as recipes of the same parts: levels, rotation, smoothing, rounding, low rank, grouping.

Each published method is one :class:`Recipe`. They exist to be compared with: :mod:`benchmarks.methods.simulate`
computes what their layers would compute, in float, and counts the bits they would store. Baselines get their best
setting: where a method leaves a choice open (a clip, a smoothing exponent), it is searched on the calibration tokens of
each layer. The two LRQ-DiT modes that this package really packs, ``paper`` and ``auto``, are not here but in
:mod:`lrqdit.config`.

What every recipe shares, and so what none of them is told apart by: which layers are quantized, the calibration data,
layers kept at 16 bits, dynamic quantization of activations (static ones where a paper has them would be worse).
"""

from dataclasses import dataclass

SMOOTHINGS = ("none", "absmax", "balance", "search")
LEVELS = ("affine", "symmetric", "gaussian", "twin_log", "released_log")
TOKENS = ("symmetric", "affine", "gaussian")


@dataclass(frozen=True)
class Recipe:
    """How a method quantizes a linear layer.

    Args:
        source: paper, and code where it decides.
        differs: what is different here.
        smoothing: ``none``; ``absmax`` (SmoothQuant's at ``alpha``); ``balance`` (PTQ4DiT's); ``search`` (the best
            ``alpha`` of six on the layer's output).
        alpha: exponent of the activations in the smoothing vector.
        rotation: ``none``, ``hadamard``, ``permuted_block`` (a permutation, then a Hadamard of the largest power of two
            that divides the width, up to 128) or ``outlier`` (R1 P R2).
        levels: ``affine`` (min-max with a zero point), ``symmetric``, ``gaussian`` (Lloyd-Max of a normal law),
            ``twin_log``, ``released_log`` (the released LRQ-DiT code's).
        is_weight_clipped: the range of the weights is searched for the smallest squared error.
        group: weights that share a scale, along the row; 0 is the whole row. The largest divisor of the width up to it.
        is_compensated: GPTQ instead of rounding to nearest.
        rank: of a 16-bit low-rank part.
        tokens: ``symmetric`` or ``affine`` steps, or ``gaussian`` (a table of Lloyd-Max levels).
        token_group: channels of a token that share a step; 0 is the whole token.
        token_clip: ratio of the range of the tokens; 0 searches it per layer.
    """

    source: str
    differs: str = ""
    smoothing: str = "none"
    alpha: float = 0.5
    rotation: str = "none"
    levels: str = "affine"
    is_weight_clipped: bool = False
    group: int = 0
    is_compensated: bool = False
    rank: int = 0
    tokens: str = "symmetric"
    token_group: int = 0
    token_clip: float = 1.0


RECIPES: dict[str, Recipe] = {
    "rtn": Recipe("round to nearest, min-max range of each row; per-token steps"),
    "rtn-clip": Recipe(
        "round to nearest with its best clip", "not a published method: RTN given its best", is_weight_clipped=True,
        token_clip=0.0,
    ),
    "smoothquant": Recipe(
        "arXiv 2211.10438, per-channel weights and per-token activations (its O1)", "", "absmax", 0.5,
        levels="symmetric",
    ),
    "gptq": Recipe(
        "arXiv 2210.17323, group 128, act-order, damping 1 %", "static groups; activations rounded to nearest",
        group=128, is_compensated=True,
    ),
    "q-dit": Recipe(
        "arXiv 2406.17343: weights and activations in groups of 128, GPTQ", "one group size, not searched per layer by "
        "an evolutionary algorithm on FID", group=128, is_compensated=True, tokens="affine", token_group=128,
    ),
    "ptq4dit": Recipe(
        "arXiv 2405.16005: channel-wise salience balancing", "no reconstruction; the Spearman-weighted mean over steps "
        "is the maximum over all calibration tokens", "balance", tokens="affine",
    ),
    "quarot": Recipe(
        "arXiv 2404.00456: randomized Hadamard, symmetric weights with searched clip, activation clip 0.9", "online "
        "rotations at every layer, as LRQ-DiT's comparison has it", rotation="hadamard", levels="symmetric",
        is_weight_clipped=True, token_clip=0.9,
    ),
    "quarot+gptq": Recipe(
        "arXiv 2404.00456, its GPTQ variant", "as quarot; the activation clip is searched", rotation="hadamard",
        levels="symmetric", is_weight_clipped=True, is_compensated=True, token_clip=0.0,
    ),
    "duquant": Recipe(
        "arXiv 2406.01721: smoothing, R1 P R2, clip", "one block shared by all positions; the clip is searched",
        "absmax", 0.5, "outlier", is_weight_clipped=True, tokens="affine", token_clip=0.0,
    ),
    "vidit-q": Recipe(
        "arXiv 2406.02540: channel balancing by scaling and rotation, dynamic per-token activations", "without its "
        "mixed precision over layers", "absmax", 0.5, "hadamard", tokens="affine",
    ),
    "vidit-q-released": Recipe(
        "github.com/thu-nics/ViDiT-Q, t2i/configs/quant/alpha/w4a8.yaml at a0a94fa: channel balancing alone (weight "
        "exponent .3), min-max rows, dynamic min-max tokens", "that file has 6-bit weights under the name w4a8; its "
        "moving average of maxima is the maximum", "absmax", 0.7, tokens="affine",
    ),
    "svdquant": Recipe(
        "arXiv 2411.05007: smoothing with searched exponent, rank 32 at 16 bits, groups of 64 for weights and "
        "activations", "", "search", levels="symmetric", group=64, rank=32, token_group=64,
    ),
    "svdquant+gptq": Recipe(
        "arXiv 2411.05007 with GPTQ, as deepcompressor does it", "", "search", levels="symmetric", group=64, rank=32,
        token_group=64, is_compensated=True,
    ),
    "orbitquant": Recipe(
        "the package orbitquant: permuted block Hadamard, Lloyd-Max levels of a normal law for weights and activations",
        "no calibration", rotation="permuted_block", levels="gaussian", tokens="gaussian",
    ),
    "orbitquant+gptq": Recipe(
        "the package orbitquant, its GPTQ option", "", rotation="permuted_block", levels="gaussian", tokens="gaussian",
        is_compensated=True,
    ),
    "lrq-dit-released": Recipe(
        "github.com/yanglianwei/LRQ-DiT, commit 2d0ea1f, for the record: other-sign weights enter a half at magnitude "
        "1, one code too many in the negative half, absolute eta, one clip for all rows", "the Hadamard rotation at "
        "every layer: the released scripts name the salient layers of their models by hand", "absmax", 0.5, "hadamard",
        levels="released_log", tokens="symmetric",
    ),
}  # fmt: skip
