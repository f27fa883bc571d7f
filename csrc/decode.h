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

LRQ_INLINE i8x16 look_up(u8x16 table, i8x16 index) { return (i8x16)look_up(table, (u8x16)index); }

#if defined(__AVX512BW__)
LRQ_INLINE i8x64 look_up(u8x16 table, i8x64 index) {
    return (i8x64)_mm512_shuffle_epi8(_mm512_broadcast_i32x4((__m128i)table), (__m512i)index);
}
#endif

// The tables of one output tile as 16 bytes a channel, [channel][code]; of a trellis the even levels, then the odd ones.
// `flip` is added to every level (0 or 128, modulo 256).
struct Tables {
    alignas(64) uint8_t bytes[16][16];
};

inline void load_tables(const lrq_weight &w, int64_t tile, uint8_t flip, Tables &out) {
    const int64_t levels = int64_t{1} << w.bits, step = w.is_trellis ? 2 : 1;
    for (int64_t n = 0; n < 16; ++n) {
        if (n > 1 && w.table_rows < 2) {  // the same for all channels, or for every other one
            __builtin_memcpy(out.bytes[n], out.bytes[n & 1], 16);
            continue;
        }
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

// A tile is BITS / 2 planes of 64 bytes, a lane of 16 bytes for each j (3 bits: one, and the third bits behind it).
template <int BITS> constexpr int PLANES = BITS == 3 ? 1 : BITS / 2;

// What a trellis makes of the planes x of some lanes, given those of one lane and of two lanes before, y and z: the codes'
// lowest bits are replaced by those of the level's place, and the lowest bits of `parity`, at the codes' places, tell odd
// from even levels. A channel's lowest bit lies at bit 4 (p & 1) of plane p / 2, or at bit 2 p of the only plane.
template <int BITS, class V> LRQ_INLINE void follow_path(V *x, const V *y, const V *z, V *parity) {
    if constexpr (BITS == 4) {
        parity[0] = y[0] ^ y[1], parity[1] = x[0] ^ y[1];
        const V first = (x[0] << 4 | y[1] >> 4) ^ z[1], second = (x[1] << 4 | x[0] >> 4) ^ y[0];
        x[0] ^= first & 0x11, x[1] ^= second & 0x11;
    } else {
        parity[0] = (x[0] << 4 | y[0] >> 4) ^ y[0];
        x[0] ^= ((x[0] << 2 | y[0] >> 6) ^ (y[0] << 4 | z[0] >> 4)) & 0x55;
    }
}

// The codes of position p from a tile's planes, without the third bit.
template <int BITS, class V> LRQ_INLINE V unpack(const V *planes, int p) {
    if constexpr (BITS == 8)
        return planes[p];
    else if constexpr (BITS == 4)
        return p & 1 ? planes[p >> 1] >> 4 : planes[p >> 1] & 15;
    else
        return planes[0] >> (2 * p) & 3;
}

// A tile's weights by channel, as bytes. before: the tile of the 16 channels before, or nullptr; used by a trellis alone.
template <int BITS, bool TRELLIS>
LRQ_INLINE void decode_channels(const uint8_t *tile, const uint8_t *before, const Tables &tables, uint8_t flip,
                                u8x16 *out) {
    constexpr int planes = PLANES<BITS>;
    u8x16 lanes[6][planes] = {};  // two of the tile before, then the tile's
    for (int j = before ? -2 : 0; j < 4; ++j)
        for (int v = 0; v < planes; ++v) lanes[j + 2][v] = load<u8x16>((j < 0 ? before + 64 : tile) + 64 * v + 16 * j);
    for (int j = 0; j < 4; ++j) {
        u8x16 x[planes], parity[planes] = {};
        for (int v = 0; v < planes; ++v) x[v] = lanes[j + 2][v];
        if constexpr (TRELLIS) follow_path<BITS>(x, lanes[j + 1], lanes[j], parity);
        for (int p = 0; p < 4; ++p) {
            u8x16 codes = unpack<BITS>(x, p);
            if constexpr (BITS == 8) {
                out[4 * j + p] = codes ^ static_cast<uint8_t>(flip ^ 0x80);
                continue;
            }
            if constexpr (BITS == 3) {
                uint16_t third;
                __builtin_memcpy(&third, tile + 64 + 8 * p + 2 * j, 2);
                const u8x16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
                const uint8_t l = third & 255, h = third >> 8;
                const u8x16 spread = {l, l, l, l, l, l, l, l, h, h, h, h, h, h, h, h};
                codes |= (u8x16)((spread & bit) == bit) & 4;
            }
            if constexpr (TRELLIS) {
                const u8x16 is_odd = -(unpack<BITS>(parity, p) & 1);
                const u8x16 even = look_up(load<u8x16>(tables.bytes[0]), codes);
                out[4 * j + p] = (even & ~is_odd) | (look_up(load<u8x16>(tables.bytes[1]), codes) & is_odd);
            } else {
                out[4 * j + p] = look_up(load<u8x16>(tables.bytes[4 * j + p]), codes);
            }
        }
    }
}

#if defined(__AVX512VNNI__) && !defined(LRQ_256)
typedef uint8_t u8x64 __attribute__((vector_size(64)));

#if defined(__AVX512VBMI__) && defined(__GFNI__)
// A path by linear maps of bits: bit i of the result is the sum modulo 2 of the source's bits rows[i].
constexpr int64_t bit_matrix(const uint8_t (&rows)[8]) {
    uint64_t matrix = 0;
    for (int i = 0; i < 8; ++i) matrix |= static_cast<uint64_t>(rows[i]) << (8 * (7 - i));
    return static_cast<int64_t>(matrix);
}

// What the bytes of one lane, of the lane before and of the one before that give together.
LRQ_INLINE __m512i map_bits(__m512i x, __m512i y, __m512i z, const uint8_t (&own)[8], const uint8_t (&one_before)[8],
                            const uint8_t (&two_before)[8]) {
    const __m512i a = _mm512_gf2p8affine_epi64_epi8(x, _mm512_set1_epi64(bit_matrix(own)), 0);
    const __m512i b = _mm512_gf2p8affine_epi64_epi8(y, _mm512_set1_epi64(bit_matrix(one_before)), 0);
    const __m512i c = _mm512_gf2p8affine_epi64_epi8(z, _mm512_set1_epi64(bit_matrix(two_before)), 0);
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

// The lowest bits of a tile's codes, position p's at bit 4 (p & 1) + p / 2, other bits undefined; or 2 and 3 bits' codes.
template <int BITS> LRQ_INLINE __m512i gather_lowest(const uint8_t *tile) {
    const __m512i first = _mm512_loadu_si512(tile);
    if constexpr (BITS != 4) return first;
    const __m512i second = _mm512_slli_epi16(_mm512_loadu_si512(tile + 64), 1);
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x22), second, first, 0xca);
}

// A level's place in the table of 64 is a byte's lower six bits. 4 bits: positions 0 and 1 have their code's lowest bit and
// the parity at bits 0 and 4 and the code's others between them, positions 2 and 3 all of that one bit higher. 2 and 3
// bits: even positions have the code's second bit, its lowest and the parity at bits 0, 1 and 2, odd ones three bits
// higher; third bits choose between two tables. The bits between are anything.
struct PathTables {
    uint8_t from[4][64] = {};  // 16 parity + code
};

template <int BITS> constexpr PathTables arrange_path_tables() {
    PathTables tables;
    for (int table = 0; table < 4; ++table)
        for (int i = 0; i < 64; ++i) {
            const int at = i >> ((BITS == 4 ? 1 : 3) * (table & 1)), code = (at & 1) << 1 | (at >> 1 & 1) | (table >> 1) << 2;
            tables.from[table][i] = static_cast<uint8_t>(BITS == 4 ? at & 31 : (at >> 2 & 1) << 4 | code);
        }
    return tables;
}

template <int BITS> LRQ_INLINE void gather_path_tables(const Tables &tables, __m512i *out) {
    static constexpr PathTables places = arrange_path_tables<BITS>();
    const __m512i levels = _mm512_load_si512(tables.bytes);
    for (int table = 0; table < 4; ++table)
        out[table] = _mm512_permutexvar_epi8(_mm512_loadu_si512(places.from[table]), levels);
}

template <int BITS>
LRQ_INLINE void decode_path(const uint8_t *tile, const uint8_t *before, const __m512i *tables, __m512i *out) {
    const __m512i x = gather_lowest<BITS>(tile);
    const __m512i last = before ? gather_lowest<BITS>(before) : _mm512_setzero_si512();
    const __m512i y = _mm512_alignr_epi64(x, last, 6), z = _mm512_alignr_epi64(x, last, 4);
    // a level's lowest bit is that of codes n, n - 1 and n - 6, its parity that of codes n - 2 and n - 4
    if constexpr (BITS == 4) {
        constexpr uint8_t p0 = 1, p1 = 16, p2 = 2, p3 = 32;
        // lowest bits of positions 0, 2, 1, 3, then the parities
        constexpr uint8_t own[8] = {p0, p2 | p1, p1 | p0, p3 | p2, 0, p0, 0, p1};
        constexpr uint8_t one_before[8] = {p3, p0, 0, p1, p2 | p0, p2, p3 | p1, p3};
        constexpr uint8_t two_before[8] = {p2, 0, p3, 0, 0, 0, 0, 0};
        const __m512i path = map_bits(x, y, z, own, one_before, two_before), odd = _mm512_srli_epi16(path, 2);
        const __m512i low = _mm512_loadu_si512(tile), high = _mm512_loadu_si512(tile + 64);
        const __m512i first = _mm512_set1_epi8(0x11), second = _mm512_set1_epi8(0x22);
        const auto look = [&](__m512i mask, __m512i bits, __m512i codes, __m512i table) LRQ_LAMBDA {
            return _mm512_permutexvar_epi8(_mm512_ternarylogic_epi64(mask, bits, codes, 0xca), table);
        };
        out[0] = look(first, path, low, tables[0]);
        out[1] = look(first, odd, _mm512_srli_epi16(low, 4), tables[0]);
        out[2] = look(second, path, _mm512_slli_epi16(high, 1), tables[1]);
        out[3] = look(second, odd, _mm512_srli_epi16(high, 3), tables[1]);
    } else {
        constexpr uint8_t p0 = 1, p1 = 4, p2 = 16, p3 = 64;
        constexpr uint8_t own[2][8] = {{2 * p0, p0, 0, 2 * p1, p1 | p0, 0, 0, 0},
                                       {2 * p2, p2 | p1, p0, 2 * p3, p3 | p2, p1, 0, 0}};
        constexpr uint8_t one_before[2][8] = {{0, p3, p2 | p0, 0, 0, p3 | p1, 0, 0}, {0, p0, p2, 0, p1, p3, 0, 0}};
        constexpr uint8_t two_before[2][8] = {{0, p2, 0, 0, p3, 0, 0, 0}, {}};
        unroll<2>([&](auto half) LRQ_LAMBDA {
            const __m512i index = map_bits(x, y, z, own[half], one_before[half], two_before[half]);
            unroll<2>([&](auto odd) LRQ_LAMBDA {
                __m512i level = _mm512_permutexvar_epi8(index, tables[odd]);
                if constexpr (BITS == 3) {
                    uint64_t third;
                    __builtin_memcpy(&third, tile + 64 + 8 * (2 * half + odd), 8);
                    level = _mm512_mask_permutexvar_epi8(level, _cvtu64_mask64(third), index, tables[2 + odd]);
                }
                out[2 * half + odd] = level;
            });
        });
    }
}
#endif

// The same for all four lanes at once: out[p] is position p, 4 channels x 16 inputs. tables: from gather_tables. At 8
// bits the codes are the weights.
template <int BITS, bool TRELLIS>
LRQ_INLINE void decode_positions(const uint8_t *tile, const uint8_t *before, const __m512i *tables, __m512i *out) {
#if defined(__AVX512VBMI__) && defined(__GFNI__)
    if constexpr (TRELLIS) return decode_path<BITS>(tile, before, tables, out);
#endif
    constexpr int planes = PLANES<BITS>;
    u8x64 x[planes], parity[planes] = {};
    unroll<planes>([&](auto v) LRQ_LAMBDA { x[v] = load<u8x64>(tile + 64 * v); });
    if constexpr (TRELLIS) {
        u8x64 y[planes], z[planes];
        unroll<planes>([&](auto v) LRQ_LAMBDA {
            const __m512i last = before ? _mm512_loadu_si512(before + 64 * v) : _mm512_setzero_si512();
            y[v] = (u8x64)_mm512_alignr_epi64((__m512i)x[v], last, 6);
            z[v] = (u8x64)_mm512_alignr_epi64((__m512i)x[v], last, 4);
        });
        follow_path<BITS>(x, y, z, parity);
    }
    unroll<4>([&](auto p) LRQ_LAMBDA {
        __m512i codes = (__m512i)unpack<BITS>(x, p);
        if constexpr (BITS == 3) {
            uint64_t third;
            __builtin_memcpy(&third, tile + 64 + 8 * p, 8);
            codes = _mm512_mask_add_epi8(codes, _cvtu64_mask64(third), codes, _mm512_set1_epi8(4));
        }
        if constexpr (BITS == 8) {
            out[p] = codes;
        } else if constexpr (TRELLIS) {
            constexpr int plane = BITS == 4 ? p >> 1 : 0, place = BITS == 4 ? 4 * (p & 1) : 2 * p;
            const __mmask64 is_odd = _mm512_test_epi8_mask((__m512i)parity[plane], _mm512_set1_epi8(1 << place));
            out[p] = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(tables[0], codes), is_odd, tables[1], codes);
        } else {
            out[p] = _mm512_shuffle_epi8(tables[p], codes);
        }
    });
}

// Of the four positions; of a trellis the even and the odd levels.
template <int BITS, bool TRELLIS> LRQ_INLINE void gather_tables(const Tables &tables, __m512i *out) {
#if defined(__AVX512VBMI__) && defined(__GFNI__)
    if constexpr (TRELLIS) return gather_path_tables<BITS>(tables, out);
#endif
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
    gather_tables<BITS, TRELLIS>(tables, wide);
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

// The levels of one tile of channels as int8, in the order of 8-bit codes: byte 64 p + 16 j + k of an input tile.
class LevelDecoder {
  public:
    LevelDecoder(const lrq_weight &w, int64_t tile) : weight(w), tile(tile) {
        load_tables(w, tile, 0, tables);
#if defined(__AVX512VNNI__) && !defined(LRQ_256)
        with_coding(w, [&](auto bits, auto is_trellis) { gather_tables<bits, is_trellis>(tables, wide); });
#endif
    }

    // input tiles [from, to)
    void operator()(int64_t from, int64_t to, uint8_t *out) const {
        with_coding(weight, [&](auto bits, auto is_trellis) {
            constexpr int64_t tile_bytes = 32 * bits;
            const int64_t row_bytes = ceil_div(weight.in_features, 16) * tile_bytes;
            const uint8_t *at = weight.packed + tile * row_bytes + from * tile_bytes;
            for (; from < to; ++from, at += tile_bytes, out += 256) {
                const uint8_t *before = is_trellis && tile ? at - row_bytes : nullptr;
#if defined(__AVX512VNNI__) && !defined(LRQ_256)
                __m512i v[4];
                decode_positions<bits, is_trellis>(at, before, wide, v);
                for (int p = 0; p < 4; ++p)
                    store(out + 64 * p, bits == 8 ? _mm512_xor_si512(v[p], _mm512_set1_epi8(-128)) : v[p]);
#else
                u8x16 channels[16];
                decode_channels<bits, is_trellis>(at, before, tables, 0, channels);
                for (int n = 0; n < 16; ++n) store(out + 64 * (n & 3) + 16 * (n >> 2), channels[n]);
#endif
            }
        });
    }

  private:
    const lrq_weight &weight;
    const int64_t tile;
    Tables tables;
#if defined(__AVX512VNNI__) && !defined(LRQ_256)
    __m512i wide[4];
#endif
};

}  // namespace LRQ_ISA
}  // namespace lrq
