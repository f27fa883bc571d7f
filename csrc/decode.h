// From packed tiles (16 output channels x 16 inputs) to int8 weights. See lrqdit/packing.py for the layout: in a tile
// channel n = 4 j + p (lane j, position p), and a 128-bit lane holds 16 inputs of one channel.
#pragma once

#include "dot.h"
#include "kernels.h"

namespace lrq {
namespace LRQ_ISA {

LRQ_INLINE u8x16 look_up(u8x16 table, u8x16 index) {
#if defined(__SSSE3__)
    return (u8x16)_mm_shuffle_epi8((__m128i)table, (__m128i)index);
#elif defined(__ARM_NEON)
    return (u8x16)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index);
#else
    u8x16 out;
    for (int i = 0; i < 16; ++i) out[i] = table[index[i] & 15];
    return out;
#endif
}

// The tables of one output tile as 16 bytes a channel; `flip` is added to every level (0 or 128, modulo 256).
struct Tables {
    alignas(64) uint8_t bytes[16][16];  // [channel][code]
};

inline void load_tables(const lrq_weight &w, int64_t tile, uint8_t flip, Tables &out) {
    const int64_t levels = int64_t{1} << w.bits;
    for (int64_t n = 0; n < 16; ++n) {
        const int64_t row = w.table_rows == 1 ? 0 : least(16 * tile + n, w.table_rows - 1);
        for (int64_t c = 0; c < 16; ++c)
            out.bytes[n][c] = w.table ? static_cast<uint8_t>(w.table[row * levels + (c & (levels - 1))]) ^ flip : 0;
    }
}

// 16 weights of channel 4 j + p, as bytes.
LRQ_INLINE u8x16 decode_channel(const uint8_t *tile, int bits, int j, int p, const Tables &tables, uint8_t flip) {
    if (bits == 8) return load<u8x16>(tile + 64 * p + 16 * j) ^ static_cast<uint8_t>(flip ^ 0x80);
    u8x16 codes;
    if (bits == 4) {
        codes = load<u8x16>(tile + 64 * (p >> 1) + 16 * j);
        codes = p & 1 ? codes >> 4 : codes & 15;
    } else {
        codes = load<u8x16>(tile + 16 * j) >> (2 * p) & 3;
        if (bits == 3) {
            uint16_t third;
            __builtin_memcpy(&third, tile + 64 + 8 * p + 2 * j, 2);
            const u8x16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
            const uint8_t low = third & 255, high = third >> 8;
            const u8x16 spread = {low, low, low, low, low, low, low, low, high, high, high, high, high, high, high, high};
            codes |= (u8x16)((spread & bit) == bit) & 4;
        }
    }
    return look_up(load<u8x16>(tables.bytes[4 * j + p]), codes);
}

#if defined(__AVX512VNNI__) && !defined(LRQ_256)
// All four lanes at once: position p of every lane, 4 channels x 16 inputs.
LRQ_INLINE void decode_positions(const uint8_t *tile, int bits, const __m512i *tables, __m512i *out) {
    if (bits == 8) {
        for (int p = 0; p < 4; ++p) out[p] = _mm512_loadu_si512(tile + 64 * p);
    } else if (bits == 4) {
        const __m512i mask = _mm512_set1_epi8(15);
        for (int v = 0; v < 2; ++v) {
            const __m512i both = _mm512_loadu_si512(tile + 64 * v);
            out[2 * v] = _mm512_shuffle_epi8(tables[2 * v], _mm512_and_si512(both, mask));
            out[2 * v + 1] =
                _mm512_shuffle_epi8(tables[2 * v + 1], _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
        }
    } else {
        const __m512i all = _mm512_loadu_si512(tile), mask = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4);
        unroll<4>([&](auto p) LRQ_LAMBDA {
            __m512i codes = _mm512_and_si512(_mm512_srli_epi16(all, 2 * p), mask);
            if (bits == 3) {
                uint64_t third;
                __builtin_memcpy(&third, tile + 64 + 8 * p, 8);
                codes = _mm512_mask_add_epi8(codes, _cvtu64_mask64(third), codes, four);
            }
            out[p] = _mm512_shuffle_epi8(tables[p], codes);
        });
    }
}

LRQ_INLINE void gather_tables(const Tables &tables, __m512i *out) {
    for (int p = 0; p < 4; ++p) {
        __m512i v = _mm512_castsi128_si512(_mm_load_si128(reinterpret_cast<const __m128i *>(tables.bytes[p])));
        v = _mm512_inserti32x4(v, _mm_load_si128(reinterpret_cast<const __m128i *>(tables.bytes[4 + p])), 1);
        v = _mm512_inserti32x4(v, _mm_load_si128(reinterpret_cast<const __m128i *>(tables.bytes[8 + p])), 2);
        out[p] = _mm512_inserti32x4(v, _mm_load_si128(reinterpret_cast<const __m128i *>(tables.bytes[12 + p])), 3);
    }
}
#endif

// Output tile `tile`, input tiles [from, to), into a panel of `vectors` vectors per step, starting at vector `first`.
inline void decode_panel(const lrq_weight &w, int64_t tile, int64_t from, int64_t to, uint8_t *panel, int64_t vectors,
                         int64_t first) {
    const int64_t tile_bytes = 32 * w.bits, in_tiles = ceil_div(w.in_features, 16);
    const uint8_t *packed = w.packed + tile * in_tiles * tile_bytes;
    Tables tables;
    load_tables(w, tile, IS_BIASED ? 128 : 0, tables);
    constexpr int64_t vector_bytes = LANES * STEP * ELEMENT;
#if defined(__AVX512VNNI__) && !defined(LRQ_256)
    __m512i wide[4];
    gather_tables(tables, wide);
    for (int64_t t = from; t < to; ++t) {
        __m512i v[4];
        switch (w.bits) {
            case 2: decode_positions(packed + t * tile_bytes, 2, wide, v); break;
            case 3: decode_positions(packed + t * tile_bytes, 3, wide, v); break;
            case 4: decode_positions(packed + t * tile_bytes, 4, wide, v); break;
            default: decode_positions(packed + t * tile_bytes, 8, wide, v);
        }
        // 4 x 4 transpose of 32-bit words inside each lane: then a lane holds 4 inputs of 4 channels
        const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
        const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
        uint8_t *out = panel + ((t - from) * 4 * vectors + first) * vector_bytes;
        _mm512_store_si512(out, _mm512_unpacklo_epi64(a, c));
        _mm512_store_si512(out + vectors * vector_bytes, _mm512_unpackhi_epi64(a, c));
        _mm512_store_si512(out + 2 * vectors * vector_bytes, _mm512_unpacklo_epi64(b, d));
        _mm512_store_si512(out + 3 * vectors * vector_bytes, _mm512_unpackhi_epi64(b, d));
    }
#else
    for (int64_t t = from; t < to; ++t) {
        for (int j = 0; j < 4; ++j) {
            i32x4 v[4];
            for (int p = 0; p < 4; ++p)
                v[p] = (i32x4)decode_channel(packed + t * tile_bytes, w.bits, j, p, tables, IS_BIASED ? 128 : 0);
            const i32x4 a = LRQ_SHUFFLE4(v[0], v[1], 0, 4, 1, 5), b = LRQ_SHUFFLE4(v[0], v[1], 2, 6, 3, 7);
            const i32x4 c = LRQ_SHUFFLE4(v[2], v[3], 0, 4, 1, 5), d = LRQ_SHUFFLE4(v[2], v[3], 2, 6, 3, 7);
            const i32x4 quads[4] = {LRQ_SHUFFLE4(a, c, 0, 1, 4, 5), LRQ_SHUFFLE4(a, c, 2, 3, 6, 7),
                                    LRQ_SHUFFLE4(b, d, 0, 1, 4, 5), LRQ_SHUFFLE4(b, d, 2, 3, 6, 7)};
            // quads[s]: inputs 4 s ... 4 s + 3 of channels 4 j ... 4 j + 3
            constexpr int per_vector = LANES / 4;  // lanes j in a vector
            for (int s = 0; s < 4; ++s) {
                if constexpr (STEP == 4) {
                    uint8_t *out = panel + (((t - from) * 4 + s) * vectors + first + j / per_vector) * vector_bytes;
                    store(out + (j % per_vector) * 16, quads[s]);
                } else {  // pairs of int16
                    const i8x16 bytes = (i8x16)quads[s];
                    for (int half = 0; half < 2; ++half) {
                        int16_t pairs[8];
                        for (int n = 0; n < 4; ++n)
                            for (int i = 0; i < 2; ++i) pairs[2 * n + i] = bytes[4 * n + 2 * half + i];
                        uint8_t *out = panel + (((t - from) * 8 + 2 * s + half) * vectors + first + j / per_vector) *
                                                   vector_bytes;
                        __builtin_memcpy(out + (j % per_vector) * 16, pairs, 16);
                    }
                }
            }
        }
    }
#endif
}

// One tile as int8 [channel][input].
inline void decode_tile(const uint8_t *tile, int bits, const Tables &tables, int8_t (*out)[16]) {
    for (int j = 0; j < 4; ++j)
        for (int p = 0; p < 4; ++p) store(out[4 * j + p], decode_channel(tile, bits, j, p, tables, 0));
}

}  // namespace LRQ_ISA
}  // namespace lrq
