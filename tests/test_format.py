"""The format, read a second time from docs/FORMAT.md alone: of the package, this reader uses only the matrices."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.make import VARIANTS, Block
from safetensors.torch import load_file

import lrqdit
from lrqdit.numerics.hadamard import hadamard_matrix

GOLDEN = Path(__file__).parent / "golden"


def read_codes(packed, out_features, in_features, bits):
    """Codes (out, in) from tiles, one at a time."""
    codes = np.zeros((out_features, in_features), np.int64)
    for n in range(out_features):
        for k in range(in_features):
            tile, (j, p), place = packed[n // 16, k // 16].astype(np.int64), divmod(n % 16, 4), k % 16
            if bits == 8:
                code = tile[64 * p + 16 * j + place]
            elif bits >= 4:
                code = tile[64 * (p // 2) + 16 * j + place] >> 4 * (p % 2) & 15
            else:
                code = tile[16 * j + place] >> 2 * p & 3
            if bits in (3, 5):
                first, bit = 64 if bits == 3 else 128, 16 * j + place
                code |= (tile[first + 8 * p + bit // 8] >> bit % 8 & 1) << bits - 1
            if bits == 6:
                code |= (tile[128 + 16 * j + place] >> 2 * p & 3) << 4
            codes[n, k] = code
    return codes


def rotate(x, layout, tensors):
    kind, factors = layout.get("rotation", "none"), layout.get("factors", [])
    if kind == "none":
        return x
    if kind == "outlier":
        first, second = (tensors[f"block{i}_bits"].view(np.float32).astype(np.float64) for i in (1, 2))
        blocks = np.eye(x.shape[1] // factors[0])
        return (x @ np.kron(blocks, first))[:, tensors["permutation"]] @ np.kron(blocks, second)
    matrix = np.eye(1)
    for factor in factors:
        if factor > 0:
            part = hadamard_matrix(factor).numpy() / np.sqrt(factor)
        else:
            m, rows = -factor, np.arange(-factor)
            part = np.sqrt(2 / m) * np.cos(np.pi / m * (rows[:, None] + 0.5) * rows)
            part[:, 0] = np.sqrt(1 / m)
        matrix = np.kron(matrix, part)
    return x @ matrix


def run_layer(x, name, layers, tensors):
    """y of one layer for x (tokens, in_features) float64, as FORMAT.md defines it."""
    layout = layers[name]
    own = {k.removeprefix(f"{name}."): v.numpy() for k, v in tensors.items() if k.startswith(f"{name}.")}
    owner = layout.get("input_from", name)
    shared = {k.removeprefix(f"{owner}."): v.numpy() for k, v in tensors.items() if k.startswith(f"{owner}.")}
    if layout.get("has_offset"):
        x = x - shared["input_offset_bits"].view(np.float16).astype(np.float64)
    if layout.get("has_scale"):
        x = x * shared["input_scale_bits"].view(np.float16).astype(np.float64)
    p = None
    if layout.get("principal_rank", 0):
        directions = shared["principal"] * shared["principal_scale_bits"].view(np.float32).astype(np.float64)[:, None]
        p = x @ directions.T
        x = x - p @ directions
    x = rotate(x, layout, shared)
    is_normal, bits = layout.get("token_levels") == "normal", layout["activation_bits"]
    largest = 2 ** ((8 if is_normal else bits) - 1) - 1
    step = np.ones((len(x), 1))
    if bits < 16:
        step = layout.get("clip", 1.0) * np.abs(x).max(1, keepdims=True) / largest
        x = np.clip(np.rint(x / step), -largest - 1, largest)
    if is_normal:
        levels = np.array([6, 18, 31, 44, 58, 75, 96, 127])
        distance = np.abs(np.abs(x)[..., None] - levels)
        x = levels[7 - distance[..., ::-1].argmin(-1)] * np.where(x < 0, -1, 1)
    codes = read_codes(own["packed"], layout["out_features"], layout["in_features"], layout["weight_bits"])
    if layout.get("table_rows", 1) == 0:
        weight = codes - 128
    else:
        table = np.broadcast_to(own["table"].astype(np.int64), (len(codes), own["table"].shape[1]))
        if layout.get("is_trellis", False):
            before = np.concatenate([np.zeros((6, codes.shape[1]), np.int64), codes])
            c1, c2, c4, c6 = (before[6 - d : len(before) - d] for d in (1, 2, 4, 6))
            codes = 2 * (codes ^ (c1 ^ c6) & 1) + ((c2 ^ c4) & 1)
        weight = np.take_along_axis(table, codes, 1)
    y = x @ weight.T.astype(np.float64) * own["row_scale_bits"].view(np.float32) * step
    if p is not None:
        y = y + p @ (own["outlet"] * own["outlet_scale_bits"].view(np.float32).astype(np.float64)[:, None])
    return y + own["bias_bits"].view(np.float32) if layout.get("has_bias", True) else y


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.glob("v*")))
@pytest.mark.parametrize("preset", VARIANTS)
def test_golden_checkpoints_still_load(version, preset):
    folder = GOLDEN / version / preset
    expected = load_file(folder / "expected.safetensors")
    model = lrqdit.load_checkpoint(Block(), folder)
    with torch.no_grad():
        torch.testing.assert_close(model(expected["x"]), expected["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", VARIANTS)
def test_reader_written_from_the_document(preset):
    folder = GOLDEN / "v1" / preset
    layers = json.loads((folder / "config.json").read_text())["layers"]
    tensors = load_file(folder / "model.safetensors")
    model = lrqdit.load_checkpoint(Block(), folder)
    assert any("input_from" in layout for layout in layers.values())
    for name, layout in layers.items():
        x = torch.randn(9, layout["in_features"], generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            found = model.get_submodule(name)(x).double().numpy()
        wanted = run_layer(x.double().numpy(), name, layers, tensors)
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())
