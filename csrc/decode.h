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

// The tables of one output tile as 16 bytes a channel, [channel][code]; of a trellis the even levels, then the odd ones.
// `flip` is added to every level (0 or 128, modulo 256).
struct Tables {
    alignas(64) uint8_t bytes[16][16];
};

inline void load_tables(const lrq_weight &w, int64_t tile, uint8_t flip, Tables &out) {
    const int64_t levels = int64_t{1} << w.bits, step = w.is_trellis ? 2 : 1;
    for (int64_t n = 0; n < 16; ++n) {
        const int8_t *table = w.table;
        if (w.is_trellis)
            table += n & 1;
        else if (w.table_rows > 1)
            table += least(16 * tile + n, w.table_rows - 1) * levels;
        for (int64_t c = 0; c < 16; ++c)
            out.bytes[n][c] = w.table ? static_cast<uint8_t>(table[(c & (levels - 1)) * step]) ^ flip : 0;
    }
}

// body(bits, whether there is a trellis), both known at compile time
template <class Body> LRQ_INLINE void with_coding(const lrq_weight &w, Body &&body) {
    using Yes = std::true_type;
    using No = std::false_type;
    switch (w.bits) {
        case 2: return w.is_trellis ? body(std::integral_constant<int, 2>{}, Yes{}) : body(std::integral_constant<int, 2>{}, No{});
        case 3: return w.is_trellis ? body(std::integral_constant<int, 3>{}, Yes{}) : body(std::integral_constant<int, 3>{}, No{});
        case 4: return w.is_trellis ? body(std::integral_constant<int, 4>{}, Yes{}) : body(std::integral_constant<int, 4>{}, No{});
        default: return body(std::integral_constant<int, 8>{}, No{});
    }
}

// 16 codes of channel 4 j + p.
LRQ_INLINE u8x16 unpack_channel(const uint8_t *tile, int bits, int j, int p) {
    if (bits == 8) return load<u8x16>(tile + 64 * p + 16 * j);
    if (bits == 4) {
        const u8x16 both = load<u8x16>(tile + 64 * (p >> 1) + 16 * j);
        return p & 1 ? both >> 4 : both & 15;
    }
    u8x16 codes = load<u8x16>(tile + 16 * j) >> (2 * p) & 3;
    if (bits == 3) {
        uint16_t third;
        __builtin_memcpy(&third, tile + 64 + 8 * p + 2 * j, 2);
        const u8x16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
        const uint8_t low = third & 255, high = third >> 8;
        const u8x16 spread = {low, low, low, low, low, low, low, low, high, high, high, high, high, high, high, high};
        codes |= (u8x16)((spread & bit) == bit) & 4;
    }
    return codes;
}

constexpr int MEMORY = 6;  // channels before its own that a channel of a trellis depends on

// A tile's weights by channel, as bytes. before: the tile of the 16 channels before, or nullptr; used by a trellis alone.
template <int BITS, bool TRELLIS>
LRQ_INLINE void decode_channels(const uint8_t *tile, const uint8_t *before, const Tables &tables, uint8_t flip,
                                u8x16 *out) {
    if constexpr (TRELLIS) {
        u8x16 codes[MEMORY + 16] = {};
        for (int n = before ? 0 : MEMORY; n < MEMORY + 16; ++n) {
            const int channel = (n + 16 - MEMORY) % 16;
            codes[n] = unpack_channel(n < MEMORY ? before : tile, BITS, channel / 4, channel % 4);
        }
        const u8x16 even = load<u8x16>(tables.bytes[0]), odd = load<u8x16>(tables.bytes[1]);
        for (int n = 0; n < 16; ++n) {
            const u8x16 *c = codes + MEMORY + n;
            const u8x16 code = c[0] ^ ((c[-1] ^ c[-6]) & 1), is_odd = -((c[-2] ^ c[-4]) & 1);
            out[n] = (look_up(even, code) & ~is_odd) | (look_up(odd, code) & is_odd);
        }
    } else {
        for (int j = 0; j < 4; ++j)
            for (int p = 0; p < 4; ++p) {
                const u8x16 codes = unpack_channel(tile, BITS, j, p);
                out[4 * j + p] = BITS == 8 ? codes ^ static_cast<uint8_t>(flip ^ 0x80)
                                           : look_up(load<u8x16>(tables.bytes[4 * j + p]), codes);
            }
    }
}

#if defined(__AVX512VNNI__) && !defined(LRQ_256)
// All four lanes at once: position p of every lane, 4 channels x 16 inputs.
template <int BITS> LRQ_INLINE void unpack_positions(const uint8_t *tile, __m512i *out) {
    if constexpr (BITS == 8) {
        for (int p = 0; p < 4; ++p) out[p] = _mm512_loadu_si512(tile + 64 * p);
    } else if constexpr (BITS == 4) {
        const __m512i mask = _mm512_set1_epi8(15);
        for (int v = 0; v < 2; ++v) {
            const __m512i both = _mm512_loadu_si512(tile + 64 * v);
            out[2 * v] = _mm512_and_si512(both, mask);
            out[2 * v + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
        }
    } else {
        const __m512i all = _mm512_loadu_si512(tile), mask = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4);
        unroll<4>([&](auto p) LRQ_LAMBDA {
            out[p] = _mm512_and_si512(_mm512_srli_epi16(all, 2 * p), mask);
            if constexpr (BITS == 3) {
                uint64_t third;
                __builtin_memcpy(&third, tile + 64 + 8 * p, 8);
                out[p] = _mm512_mask_add_epi8(out[p], _cvtu64_mask64(third), out[p], four);
            }
        });
    }
}

// tables: of the four positions; of a trellis the even and the odd levels.
template <int BITS, bool TRELLIS>
LRQ_INLINE void decode_positions(const uint8_t *tile, const uint8_t *before, const __m512i *tables, __m512i *out) {
    __m512i c[4];
    unpack_positions<BITS>(tile, c);
    if constexpr (BITS == 8) {
        for (int p = 0; p < 4; ++p) out[p] = c[p];
    } else if constexpr (TRELLIS) {
        __m512i b[4] = {}, x[MEMORY + 4];  // x[MEMORY + p + d]: the channels at distance d from those of position p
        if (before) unpack_positions<BITS>(before, b);
        unroll<4>([&](auto p) LRQ_LAMBDA { x[MEMORY + p] = c[p]; });
        unroll<4>([&](auto p) LRQ_LAMBDA { x[2 + p] = _mm512_alignr_epi64(c[p], b[p], 6); });
        unroll<2>([&](auto p) LRQ_LAMBDA { x[p] = _mm512_alignr_epi64(c[2 + p], b[2 + p], 4); });
        const __m512i one = _mm512_set1_epi8(1);
        unroll<4>([&](auto p) LRQ_LAMBDA {
            const __m512i *at = x + MEMORY + p;
            // c ^ ((c[-1] ^ c[-6]) & 1)
            const __m512i flips = _mm512_and_si512(_mm512_xor_si512(at[-1], at[-6]), one);
            const __m512i code = _mm512_xor_si512(at[0], flips);
            const __mmask64 is_odd = _mm512_test_epi8_mask(_mm512_xor_si512(at[-2], at[-4]), one);
            out[p] = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(tables[0], code), is_odd, tables[1], code);
        });
    } else {
        for (int p = 0; p < 4; ++p) out[p] = _mm512_shuffle_epi8(tables[p], c[p]);
    }
}

template <bool TRELLIS> LRQ_INLINE void gather_tables(const Tables &tables, __m512i *out) {
    for (int p = 0; p < 4; ++p) {
        __m512i v = {};
        for (int j = 0; j < 4; ++j) {
            const uint8_t *table = tables.bytes[TRELLIS ? p & 1 : 4 * j + p];
            const __m512i lanes = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i *>(table)));
            v = _mm512_mask_mov_epi32(v, static_cast<__mmask16>(15 << (4 * j)), lanes);
        }
        out[p] = v;
    }
}
#endif

// Output tile `tile`, input tiles [from, to), into a panel of `vectors` vectors per step, starting at vector `first`.
template <int BITS, bool TRELLIS>
inline void decode_panel(const lrq_weight &w, int64_t tile, int64_t from, int64_t to, uint8_t *panel, int64_t vectors,
                         int64_t first) {
    constexpr int64_t tile_bytes = 32 * BITS, vector_bytes = LANES * STEP * ELEMENT;
    const int64_t row_bytes = ceil_div(w.in_features, 16) * tile_bytes;
    const uint8_t *packed = w.packed + tile * row_bytes;
    Tables tables;
    load_tables(w, tile, IS_BIASED ? 128 : 0, tables);
#if defined(__AVX512VNNI__) && !defined(LRQ_256)
    __m512i wide[4];
    gather_tables<TRELLIS>(tables, wide);
#endif
    for (int64_t t = from; t < to; ++t) {
        const uint8_t *at = packed + t * tile_bytes, *before = TRELLIS && tile ? at - row_bytes : nullptr;
#if defined(__AVX512VNNI__) && !defined(LRQ_256)
        __m512i v[4];
        decode_positions<BITS, TRELLIS>(at, before, wide, v);
        // 4 x 4 transpose of 32-bit words inside each lane: then a lane holds 4 inputs of 4 channels
        const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
        const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
        uint8_t *out = panel + ((t - from) * 4 * vectors + first) * vector_bytes;
        _mm512_store_si512(out, _mm512_unpacklo_epi64(a, c));
        _mm512_store_si512(out + vectors * vector_bytes, _mm512_unpackhi_epi64(a, c));
        _mm512_store_si512(out + 2 * vectors * vector_bytes, _mm512_unpacklo_epi64(b, d));
        _mm512_store_si512(out + 3 * vectors * vector_bytes, _mm512_unpackhi_epi64(b, d));
#else
        u8x16 channels[16];
        decode_channels<BITS, TRELLIS>(at, before, tables, IS_BIASED ? 128 : 0, channels);
        for (int j = 0; j < 4; ++j) {
            i32x4 v[4];
            for (int p = 0; p < 4; ++p) v[p] = (i32x4)channels[4 * j + p];
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
#endif
    }
}

}  // namespace LRQ_ISA
}  // namespace lrq
