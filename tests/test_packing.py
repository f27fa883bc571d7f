import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrqdit.config import WEIGHT_BITS
from lrqdit.errors import ConfigError
from lrqdit.numerics.packing import pack, unpack
from lrqdit.numerics.shapes import TILE, packed_shape


def random_codes(out_features, in_features, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (out_features, in_features), generator=generator).to(torch.uint8)


def pack_slowly(codes, bits):
    """The table of packing.py's docstring, one code at a time."""
    out_tiles, in_tiles, tile_bytes = -(-codes.shape[0] // 16), -(-codes.shape[1] // 16), 32 * bits
    tiles = [[[0] * tile_bytes for _ in range(in_tiles)] for _ in range(out_tiles)]
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            code, tile = int(codes[row, column]), tiles[row // 16][column // 16]
            j, p, k = row % 16 // 4, row % 4, column % 16
            if bits == 8:
                tile[64 * p + 16 * j + k] = code
            elif bits >= 4:
                tile[64 * (p // 2) + 16 * j + k] |= (code & 15) << 4 * (p % 2)
            else:
                tile[16 * j + k] |= (code & 3) << 2 * p
            if bits == 6:
                tile[128 + 16 * j + k] |= (code >> 4) << 2 * p
            if bits in (3, 5):
                bit = 16 * j + k
                tile[32 * (bits - 1) + 8 * p + bit // 8] |= (code >> bits - 1) << bit % 8
    return torch.tensor(tiles, dtype=torch.uint8)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(WEIGHT_BITS), st.integers(0, 2**31))
def test_round_trip(out_features, in_features, bits, seed):
    codes = random_codes(out_features, in_features, bits, seed)
    packed = pack(codes, bits)
    assert tuple(packed.shape) == packed_shape(out_features, in_features, bits) and packed.is_contiguous()
    assert torch.equal(unpack(packed, out_features, in_features, bits), codes)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("shape", [(16, 16), (33, 20), (7, 13), (1, 17)])
def test_byte_layout(bits, shape):
    codes = random_codes(*shape, bits)
    assert torch.equal(pack(codes, bits), pack_slowly(codes, bits))


def test_noncontiguous_codes():
    codes = random_codes(20, 36, 3).t()
    assert torch.equal(pack(codes, 3), pack_slowly(codes, 3))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_code_too_large(bits):
    codes = torch.zeros(3, 3, dtype=torch.uint8)
    codes[2, 1] = 1 << bits
    with pytest.raises(ConfigError, match=f"code {1 << bits} does not fit {bits} bits"):
        pack(codes, bits)


def test_wrong_arguments():
    packed = pack(random_codes(20, 36, 4), 4)
    with pytest.raises(ConfigError, match=r"\(2, 3, 128\), but a 40 x 36 layer at 4 bits has \(3, 3, 128\)"):
        unpack(packed, 40, 36, 4)
    with pytest.raises(ConfigError, match="layer at 3 bits"):
        unpack(packed, 20, 36, 3)
    with pytest.raises(ConfigError, match="bits=7"):
        pack(random_codes(4, 4, 2), 7)
    assert TILE == 16
