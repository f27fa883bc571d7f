"""Codes of 2 to 6 or 8 bits, packed so that a vector unit can decode them without a gather.

The unit is a tile of 16 output channels x 16 input channels, ``32 * bits`` bytes. Write channel n of the tile as
n = 4 j + p (lane j, position p) and let k be the input channel inside the tile:

====  ==================================================================================================
bits  bytes of a tile
====  ==================================================================================================
8     byte 64 p + 16 j + k holds the code
4     byte 64 v + 16 j + k holds position p = 2 v in its low half and p = 2 v + 1 in its high half
2     byte 16 j + k holds position p in bits 2 p and 2 p + 1
3     the two low bits as above (64 bytes), then bit 16 j + k (little endian) of the 64-bit word p holds the third
5     the four low bits as above (128 bytes), then the fifth as the third of 3
6     the four low bits as above (128 bytes), then the two high bits as those of 2
====  ==================================================================================================

A 128-bit lane therefore holds sixteen consecutive inputs of one output channel: one byte shuffle looks them up in
sixteen levels of that channel's own, and a 4 x 4 transpose of 32-bit words gives the order of an int8 dot-product
instruction. Channels beyond the layer's own are padded with code 0. Tiles are stored in the order (output tile, input
tile).
"""

import torch
from torch import Tensor

from lrqdit import native
from lrqdit.errors import ConfigError
from lrqdit.numerics.shapes import TILE, packed_shape

# by bits, how many of them each part of a tile holds, the lowest first
PARTS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (out_features, in_features) uint8, each below 2**bits, into :func:`packed_shape` uint8.

    Raises:
        ConfigError: for unsupported bits or a code that does not fit.
    """
    out_features, in_features = codes.shape
    out_tiles, in_tiles, tile_bytes = packed_shape(out_features, in_features, bits)
    if codes.device.type == "cpu" and native.is_available():
        packed = torch.empty(out_tiles, in_tiles, tile_bytes, dtype=torch.uint8)
        used = torch.empty(1, dtype=torch.uint8)
        native.call("lrq_pack", codes.contiguous(), *codes.shape, bits, torch.get_num_threads(), packed, used)
        _check_codes(codes, int(used), bits)
        return packed
    _check_codes(codes, int(codes.max()) if codes.numel() else 0, bits)
    padded = torch.zeros(out_tiles * TILE, in_tiles * TILE, dtype=torch.uint8, device=codes.device)
    padded[:out_features, :in_features] = codes
    # (output tile, lane j, position p, input tile, k) -> (output tile, input tile, p, 16 j + k)
    tiles = padded.view(out_tiles, 4, 4, in_tiles, TILE).permute(0, 3, 2, 1, 4).reshape(out_tiles, in_tiles, 4, 64)
    parts = []
    for width in PARTS[bits]:
        groups = (tiles & (1 << width) - 1).view(out_tiles, in_tiles, *_groups(width))
        parts.append((groups << _shifts(width, codes)).sum(dim=3, dtype=torch.uint8).flatten(2))
        tiles = tiles >> width
    return torch.cat(parts, dim=-1)


def unpack(packed: Tensor, out_features: int, in_features: int, bits: int) -> Tensor:
    """Inverse of :func:`pack`: codes (out_features, in_features) uint8."""
    shape = packed_shape(out_features, in_features, bits)
    if tuple(packed.shape) != shape:
        raise ConfigError(
            f"unpack: packed has shape {tuple(packed.shape)}, but a {out_features} x {in_features} layer at {bits} "
            f"bits has {shape}"
        )
    out_tiles, in_tiles, _ = shape
    tiles, start, shift = torch.zeros(out_tiles, in_tiles, 4, 64, dtype=torch.uint8, device=packed.device), 0, 0
    for width in PARTS[bits]:
        shape = out_tiles, in_tiles, *_groups(width)
        part = packed[:, :, start : start + 32 * width].reshape(*shape[:3], 1, *shape[4:])
        tiles |= (part >> _shifts(width, packed) & (1 << width) - 1).view(tiles.shape) << shift
        start, shift = start + 32 * width, shift + width
    codes = tiles.view(out_tiles, in_tiles, 4, 4, TILE).permute(0, 3, 2, 1, 4)
    return codes.reshape(out_tiles * TILE, in_tiles * TILE)[:out_features, :in_features].contiguous()


def _groups(width: int) -> tuple[int, ...]:
    """How the codes (4, 64) of a tile are grouped, by axis 1, into bytes of 8 // width parts of codes."""
    return (32, 8) if width == 1 else (width // 2, 8 // width, 64)


def _shifts(width: int, like: Tensor) -> Tensor:
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=like.device)
    return shifts if width == 1 else shifts[:, None]


def _check_codes(codes: Tensor, largest: int, bits: int) -> None:
    """largest: at least 2**bits if and only if a code is."""
    if largest >= 1 << bits:
        raise ConfigError(f"pack: code {int(codes.max())} does not fit {bits} bits; codes must be below {1 << bits}")
