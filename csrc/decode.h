// Decodes packed tiles (16 output channels x 16 inputs) to int8 weights. packing.py describes the layout: channel
// n = 4 j + p of a tile has lane j and position p, and a lane of 128 bits holds 16 inputs of one channel.
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

// A tile begins with PLANES planes of 64 bytes, which hold the LOW lowest bits of each code. The higher bits follow.
template <int BITS> constexpr int LOW = BITS == 3 ? 2 : BITS == 5 || BITS == 6 ? 4 : BITS;
template <int BITS> constexpr int PLANES = LOW<BITS> / 2;
// A lookup tells 16 levels apart, so a channel's table is cut into 2^CHOICES parts. The code's bits above the fourth choose
// among them; with a trellis, the parity chooses between even and odd levels.
template <int BITS, bool TRELLIS> constexpr int CHOICES = (BITS < 8 && BITS > 4 ? BITS - 4 : 0) + TRELLIS;

// The tables of one output tile: parts[part][64 p + 16 j + i] is level i of a part, for channel 4 j + p. With a trellis the
// parts of the even levels come first, then those of the odd ones. load_tables adds `flip` (0 or 128) to every level,
// modulo 256. At 8 bits there are no tables.
struct Tables {
    alignas(64) uint8_t parts[4][256];
};

inline void load_tables(const lrq_weight &w, int64_t tile, uint8_t flip, Tables &out) {
    if (!w.table) return;
    const int64_t levels = int64_t{1} << w.bits, parts = ceil_div(levels, 16), step = w.is_trellis ? 2 : 1;
    for (int64_t n = 0; n < 16; ++n) {
        const int64_t at = 64 * (n & 3) + 16 * (n >> 2);
        const int8_t *table = w.table + (w.table_rows > 1 ? least(16 * tile + n, w.table_rows - 1) * levels : 0);
        for (int64_t i = 0; i < step * parts; ++i) {
            uint8_t *part = out.parts[i];
            if (n && w.table_rows == 1)
                store(part + at, load<u8x16>(part));
            else
                for (int64_t c = 0; c < 16; ++c)
                    part[at + c] = static_cast<uint8_t>(table[((16 * i + c) & (levels - 1)) * step + i / parts]) ^ flip;
        }
    }
}

// Calls body(bits, is_trellis) with both as compile-time constants.
template <class Body> LRQ_INLINE void with_coding(const lrq_weight &w, Body &&body) {
    using Yes = std::true_type;
    using No = std::false_type;
    switch (w.bits) {
        case 2: return w.is_trellis ? body(std::integral_constant<int, 2>{}, Yes{}) : body(std::integral_constant<int, 2>{}, No{});
        case 3: return w.is_trellis ? body(std::integral_constant<int, 3>{}, Yes{}) : body(std::integral_constant<int, 3>{}, No{});
        case 4: return w.is_trellis ? body(std::integral_constant<int, 4>{}, Yes{}) : body(std::integral_constant<int, 4>{}, No{});
        case 5: return w.is_trellis ? body(std::integral_constant<int, 5>{}, Yes{}) : body(std::integral_constant<int, 5>{}, No{});
        case 6: return body(std::integral_constant<int, 6>{}, No{});
        default: return body(std::integral_constant<int, 8>{}, No{});
    }
}

// Applies the trellis to the planes x of some lanes; y and z are the planes one lane and two lanes before. It replaces the
// lowest bit of each code by that of the level's place, its index in the table, and sets the same bit of `parity` to 1
// where the level is an odd one (other bits of `parity` are undefined). Position p's lowest bit is bit 4 (p & 1) of plane p
// / 2, or bit 2 p of the only plane.
template <int BITS, class V> LRQ_INLINE void follow_path(V *x, const V *y, const V *z, V *parity) {
    if constexpr (LOW<BITS> == 4) {
        parity[0] = y[0] ^ y[1], parity[1] = x[0] ^ y[1];
        const V first = (x[0] << 4 | y[1] >> 4) ^ z[1], second = (x[1] << 4 | x[0] >> 4) ^ y[0];
        x[0] ^= first & 0x11, x[1] ^= second & 0x11;
    } else {
        parity[0] = (x[0] << 4 | y[0] >> 4) ^ y[0];
        x[0] ^= ((x[0] << 2 | y[0] >> 6) ^ (y[0] << 4 | z[0] >> 4)) & 0x55;
    }
}

// The codes of position p, as far as a tile's planes hold them.
template <int BITS, class V> LRQ_INLINE V unpack(const V *planes, int p) {
    if constexpr (BITS == 8)
        return planes[p];
    else if constexpr (LOW<BITS> == 4)
        return p & 1 ? planes[p >> 1] >> 4 : planes[p >> 1] & 15;
    else
        return planes[0] >> (2 * p) & 3;
}

// A mask for each code of lane j and position p: bytes of ones where bit `bit` of those that follow the planes is 1.
template <int BITS> LRQ_INLINE u8x16 high_bits(const uint8_t *tile, int j, int p, int bit) {
    const uint8_t *behind = tile + 64 * PLANES<BITS>;
    if constexpr (BITS == 6) return (u8x16)((load<u8x16>(behind + 16 * j) >> (2 * p + bit) & 1) != 0);
    const u8x16 bits = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8_t l = behind[8 * p + 2 * j], h = behind[8 * p + 2 * j + 1];
    const u8x16 spread = {l, l, l, l, l, l, l, l, h, h, h, h, h, h, h, h};
    return (u8x16)((spread & bits) == bits);
}

LRQ_INLINE u8x16 select(u8x16 mask, u8x16 a, u8x16 b) { return (a & mask) | (b & ~mask); }

// Decodes a tile: out[n] becomes the 16 weights of channel n, as bytes. before: the tile of the preceding 16 channels,
// which only a trellis reads; nullptr in front of channel 0.
template <int BITS, bool TRELLIS>
LRQ_INLINE void decode_channels(const uint8_t *tile, const uint8_t *before, const Tables &tables, uint8_t flip,
                                u8x16 *out) {
    constexpr int planes = PLANES<BITS>;
    u8x16 lanes[6][planes] = {};  // two lanes of the preceding tile, then four of this one
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
            if constexpr (BITS == 3) codes |= high_bits<BITS>(tile, j, p, 0) & 4;
            constexpr int choices = CHOICES<BITS, TRELLIS>;
            u8x16 is_later[2];
            for (int i = 0; i < choices; ++i)
                is_later[i] = TRELLIS && i == choices - 1 ? -(unpack<BITS>(parity, p) & 1) : high_bits<BITS>(tile, j, p, i);
            u8x16 levels[4];
            for (int i = 0; i < 1 << choices; ++i)
                levels[i] = look_up(load<u8x16>(tables.parts[i] + 64 * p + 16 * j), codes);
            for (int i = choices; i-- > 0;)
                for (int part = 0; part < 1 << i; ++part)
                    levels[part] = select(is_later[i], levels[part + (1 << i)], levels[part]);
            out[4 * j + p] = levels[0];
        }
    }
}

#if defined(__AVX512VNNI__) && !defined(LRQ_256)
typedef uint8_t u8x64 __attribute__((vector_size(64)));
typedef __m512i WideTables[16];  // from gather_tables

// high_bits of all four lanes.
template <int BITS> LRQ_INLINE __mmask64 high_mask(const uint8_t *tile, int p, int bit) {
    const uint8_t *behind = tile + 64 * PLANES<BITS>;
    if constexpr (BITS == 6)
        return _mm512_test_epi8_mask(_mm512_loadu_si512(behind), _mm512_set1_epi8(static_cast<char>(1 << (2 * p + bit))));
    return _cvtu64_mask64(load<uint64_t>(behind + 8 * p));
}

#if defined(__AVX512VBMI__) && defined(__GFNI__)
// A matrix of bits as GFNI takes it: bit i of the product is the sum modulo 2 of those bits of a byte that rows[i] has.
constexpr int64_t bit_matrix(const uint8_t (&rows)[8]) {
    uint64_t matrix = 0;
    for (int i = 0; i < 8; ++i) matrix |= static_cast<uint64_t>(rows[i]) << (8 * (7 - i));
    return static_cast<int64_t>(matrix);
}

// The sum modulo 2 of three products of such matrices: with the bytes of a lane, x, of the lane before it, y, and of the
// one before that, z.
LRQ_INLINE __m512i map_bits(__m512i x, __m512i y, __m512i z, const uint8_t (&own)[8], const uint8_t (&one_before)[8],
                            const uint8_t (&two_before)[8]) {
    const __m512i a = _mm512_gf2p8affine_epi64_epi8(x, _mm512_set1_epi64(bit_matrix(own)), 0);
    const __m512i b = _mm512_gf2p8affine_epi64_epi8(y, _mm512_set1_epi64(bit_matrix(one_before)), 0);
    const __m512i c = _mm512_gf2p8affine_epi64_epi8(z, _mm512_set1_epi64(bit_matrix(two_before)), 0);
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
}

// At 4 and 5 bits the lowest bits of a tile's codes, position p's as bit 4 (p & 1) + p / 2, with other bits undefined; at 2
// and 3 bits the only plane.
template <int BITS> LRQ_INLINE __m512i gather_lowest(const uint8_t *tile) {
    const __m512i first = _mm512_loadu_si512(tile);
    if constexpr (LOW<BITS> != 4) return first;
    const __m512i second = _mm512_slli_epi16(_mm512_loadu_si512(tile + 64), 1);
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x22), second, first, 0xca);
}

// decode_path looks levels up in tables of 64 by the lower six bits of a byte. At 4 and 5 bits, positions 0 and 1 have the
// four lowest bits of the level's place in bits 0 to 3 and the parity in bit 4, positions 2 and 3 all of them one bit
// higher. At 2 and 3 bits, even positions have the place's second bit, its lowest bit and the parity in bits 0, 1 and 2,
// odd positions three bits higher. The third of 3 bits, or the fifth of 5, chooses between two tables. The remaining bits
// are undefined, so each level stands wherever the others select it.
struct PathTables {
    uint8_t from[4][64] = {};  // the index of each entry's level in the concatenated parts
};

template <int BITS> constexpr PathTables arrange_path_tables() {
    PathTables tables;
    for (int table = 0; table < 4; ++table)
        for (int i = 0; i < 64; ++i) {
            const int at = i >> ((LOW<BITS> == 4 ? 1 : 3) * (table & 1)), high = table >> 1;
            const int code = LOW<BITS> == 4 ? (at & 15) | high << 4 : (at & 1) << 1 | (at >> 1 & 1) | high << 2;
            const int parity = at >> LOW<BITS> & 1;
            tables.from[table][i] = static_cast<uint8_t>(BITS == 5 ? parity << 5 | code : parity << 4 | (code & 15));
        }
    return tables;
}

template <int BITS> LRQ_INLINE void gather_path_tables(const Tables &tables, __m512i *out) {
    static constexpr PathTables places = arrange_path_tables<BITS>();
    alignas(64) uint8_t levels[4][16];
    for (int i = 0; i < 4; ++i) store(levels[i], load<u8x16>(tables.parts[i]));
    for (int table = 0; table < 4; ++table)
        out[table] = _mm512_permutexvar_epi8(_mm512_loadu_si512(places.from[table]), _mm512_load_si512(levels));
}

template <int BITS>
LRQ_INLINE void decode_path(const uint8_t *tile, const uint8_t *before, const __m512i *tables, __m512i *out) {
    const __m512i x = gather_lowest<BITS>(tile);
    const __m512i last = before ? gather_lowest<BITS>(before) : _mm512_setzero_si512();
    const __m512i y = _mm512_alignr_epi64(x, last, 6), z = _mm512_alignr_epi64(x, last, 4);
    // the lowest bit of channel n's place is the sum modulo 2 of the lowest bits of codes n, n - 1 and n - 6, its parity
    // that of codes n - 2 and n - 4
    if constexpr (LOW<BITS> == 4) {
        constexpr uint8_t p0 = 1, p1 = 16, p2 = 2, p3 = 32;
        // the results' bits: the lowest bits of positions 0, 2, 1 and 3, then their parities
        constexpr uint8_t own[8] = {p0, p2 | p1, p1 | p0, p3 | p2, 0, p0, 0, p1};
        constexpr uint8_t one_before[8] = {p3, p0, 0, p1, p2 | p0, p2, p3 | p1, p3};
        constexpr uint8_t two_before[8] = {p2, 0, p3, 0, 0, 0, 0, 0};
        const __m512i path = map_bits(x, y, z, own, one_before, two_before), odd = _mm512_srli_epi16(path, 2);
        const __m512i low = _mm512_loadu_si512(tile), high = _mm512_loadu_si512(tile + 64);
        const __m512i first = _mm512_set1_epi8(0x11), second = _mm512_set1_epi8(0x22);
        const auto look = [&](auto p, __m512i mask, __m512i bits, __m512i codes) LRQ_LAMBDA {
            const __m512i index = _mm512_ternarylogic_epi64(mask, bits, codes, 0xca);
            const __m512i level = _mm512_permutexvar_epi8(index, tables[p >> 1]);
            if constexpr (BITS == 4) return level;
            return _mm512_mask_permutexvar_epi8(level, high_mask<BITS>(tile, p, 0), index, tables[2 + (p >> 1)]);
        };
        out[0] = look(std::integral_constant<int, 0>{}, first, path, low);
        out[1] = look(std::integral_constant<int, 1>{}, first, odd, _mm512_srli_epi16(low, 4));
        out[2] = look(std::integral_constant<int, 2>{}, second, path, _mm512_slli_epi16(high, 1));
        out[3] = look(std::integral_constant<int, 3>{}, second, odd, _mm512_srli_epi16(high, 3));
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
                    const __mmask64 third = high_mask<BITS>(tile, 2 * half + odd, 0);
                    level = _mm512_mask_permutexvar_epi8(level, third, index, tables[2 + odd]);
                }
                out[2 * half + odd] = level;
            });
        });
    }
}
#endif

// Decodes all four lanes of a tile: out[p] becomes position p, 4 channels x 16 inputs. At 8 bits these are the codes.
template <int BITS, bool TRELLIS>
LRQ_INLINE void decode_positions(const uint8_t *tile, const uint8_t *before, const WideTables &tables, __m512i *out) {
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
        if constexpr (BITS == 8) {
            out[p] = codes;
        } else {
            if constexpr (BITS == 3)
                codes = _mm512_mask_add_epi8(codes, high_mask<BITS>(tile, p, 0), codes, _mm512_set1_epi8(4));
            constexpr int choices = CHOICES<BITS, TRELLIS>;
            __mmask64 is_later[2];
            unroll<choices>([&](auto i) LRQ_LAMBDA {
                if constexpr (TRELLIS && i == choices - 1) {
                    constexpr int plane = p * LOW<BITS> / 8, place = p * LOW<BITS> % 8;
                    is_later[i] = _mm512_test_epi8_mask((__m512i)parity[plane], _mm512_set1_epi8(1 << place));
                } else {
                    is_later[i] = high_mask<BITS>(tile, p, i);
                }
            });
            const auto part = [&](int i) LRQ_LAMBDA { return tables[TRELLIS ? i : 4 * i + p]; };
            __m512i levels = _mm512_shuffle_epi8(part(0), codes);
            if constexpr (choices > 0) levels = _mm512_mask_shuffle_epi8(levels, is_later[0], part(1), codes);
            if constexpr (choices > 1) {
                levels = _mm512_mask_shuffle_epi8(levels, is_later[1], part(2), codes);
                levels = _mm512_mask_shuffle_epi8(levels, _kand_mask64(is_later[0], is_later[1]), part(3), codes);
            }
            out[p] = levels;
        }
    });
}

// Loads the tables for decode_positions: part by part those of the four positions, or with a trellis one for all positions.
template <int BITS, bool TRELLIS> LRQ_INLINE void gather_tables(const Tables &tables, WideTables &out) {
#if defined(__AVX512VBMI__) && defined(__GFNI__)
    if constexpr (TRELLIS) return gather_path_tables<BITS>(tables, out);
#endif
    for (int i = 0; i < 1 << CHOICES<BITS, TRELLIS>; ++i)
        for (int p = 0; p < (TRELLIS ? 1 : 4); ++p)
            out[TRELLIS ? i : 4 * i + p] = _mm512_load_si512(tables.parts[i] + 64 * p);
}
#endif

// Decodes input tiles [from, to) of output tile `tile` into a panel of `vectors` vectors a step, beginning at vector
// `first`.
template <int BITS, bool TRELLIS, bool BIASED = IS_BIASED>
inline void decode_panel(const lrq_weight &w, int64_t tile, int64_t from, int64_t to, uint8_t *panel, int64_t vectors,
                         int64_t first) {
    constexpr int64_t tile_bytes = 32 * BITS, vector_bytes = LANES * STEP * ELEMENT;
    const int64_t row_bytes = ceil_div(w.in_features, 16) * tile_bytes;
    const uint8_t *packed = w.packed + tile * row_bytes;
    Tables tables;
    load_tables(w, tile, BIASED ? 128 : 0, tables);
#if defined(__AVX512VNNI__) && !defined(LRQ_256)
    WideTables wide;
    gather_tables<BITS, TRELLIS>(tables, wide);
#endif
    for (int64_t t = from; t < to; ++t) {
        const uint8_t *at = packed + t * tile_bytes, *before = TRELLIS && tile ? at - row_bytes : nullptr;
#if defined(__AVX512VNNI__) && !defined(LRQ_256)
        __m512i v[4];
        decode_positions<BITS, TRELLIS>(at, before, wide, v);
        if constexpr (BITS == 8 && !BIASED)
            unroll<4>([&](auto p) LRQ_LAMBDA { v[p] = _mm512_xor_si512(v[p], _mm512_set1_epi8(-128)); });
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
        decode_channels<BITS, TRELLIS>(at, before, tables, BIASED ? 128 : 0, channels);
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

// Decodes the levels of one output tile as int8: those of an input tile are 256 bytes, input k of channel 4 j + p is byte
// 64 p + 16 j + k.
class LevelDecoder {
  public:
    LevelDecoder(const lrq_weight &w, int64_t tile) : weight(w), tile(tile) {
        load_tables(w, tile, 0, tables);
#if defined(__AVX512VNNI__) && !defined(LRQ_256)
        with_coding(w, [&](auto bits, auto is_trellis) { gather_tables<bits, is_trellis>(tables, wide); });
#endif
    }

    // Decodes input tiles [from, to).
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
    WideTables wide;
#endif
};

}  // namespace LRQ_ISA
}  // namespace lrq
