// The principal part of tokens, which is kept beside their codes: Inlet computes p = x^ U and takes p U^T out of the
// tokens, Outlet adds p C to the outputs.
//
// U and C are int8 with a scale for each direction. U's codes are exact in bfloat16, and p is multiplied by U's scales. C
// is multiplied by its own scales and rounded to bfloat16.
#pragma once

#include "pairs.h"
#include "tiles.h"
#include "transform.h"

namespace lrq {
namespace LRQ_ISA {

// Tokens that the principal part is taken out of at a time.
#if defined(LRQ_HAS_TILES)
constexpr int64_t INLET_ROWS = TILE_ROWS;
#else
constexpr int64_t INLET_ROWS = ROWS_PER_TASK;
#endif

#if defined(__AVX512BF16__)
constexpr int64_t MAX_RANK = LRQ_MAX_RANK, MAX_ROWS = INLET_ROWS;

// Pairs of entries of directions r and r + 1 of codes (rank, width), times their scales if there are any: 16 pairs from
// entry k. Entries beyond rank or width are 0.
LRQ_INLINE __m512i load_pairs(const int8_t *codes, const float *scale, int64_t rank, int64_t width, int64_t r, int64_t k) {
    const __mmask16 lanes = width - k >= 16 ? 0xffff : (1u << (width - k)) - 1;
    const auto floats = [&](int64_t r) LRQ_LAMBDA {
        if (r >= rank) return _mm512_setzero_si512();
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, codes + r * width + k));
        return (__m512i)(_mm512_cvtepi32_ps(wide) * _mm512_set1_ps(scale ? scale[r] : 1));
    };
    const auto rounded = [](__m512i v) LRQ_LAMBDA {  // to nearest even, in the upper half
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(v, 16), _mm512_set1_epi32(1));
        return _mm512_add_epi32(_mm512_add_epi32(v, odd), _mm512_set1_epi32(0x7fff));
    };
    const __m512i low = _mm512_srli_epi32(rounded(floats(r)), 16);
    const __m512i high = _mm512_and_si512(rounded(floats(r + 1)), _mm512_set1_epi32(-65536));
    return _mm512_or_si512(low, high);
}

// Takes the principal part out of tokens.
class Inlet {
  public:
    Inlet(const lrq_transform &from, const lrq_principal &p) : transform(from), principal(p) {
        transform.rotation = LRQ_NONE;
        ready = make_ready(transform, SLOT_INLET);
        const int64_t width = transform.width, rank = p.rank;
        steps = ceil_div(rank, 2), stride = round_up(width, 32), tiles = ceil_div(width, 16);
        padded_rank = round_up(2 * steps, SIDES), padded_steps = HAS_TILES ? TILE_ROWS : steps;
        const int64_t row_bytes = padded_rank * stride * 2;
        uint8_t *memory = static_cast<uint8_t *>(scratch(SLOT_DIRECTIONS, row_bytes + tiles * padded_steps * 64));
        rows = reinterpret_cast<uint16_t *>(memory), pairs = reinterpret_cast<__m512i *>(memory + row_bytes);
        for (int64_t r = 0; r < padded_rank; ++r)
            for (int64_t k = 0; k < stride; k += 32) {
                const __mmask32 there = r >= rank || k >= width ? 0 : width - k >= 32 ? ~0u : (1u << (width - k)) - 1;
                const __m256i codes = _mm256_maskz_loadu_epi8(there, p.inlet + r * width + k);
                const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
                const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
                _mm512_storeu_si512(rows + r * stride + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            }
        if constexpr (HAS_TILES) arrange_rows();
        for (int64_t tile = 0; tile < tiles; ++tile)
            for (int64_t j = 0; j < padded_steps; ++j)
                pairs[tile * padded_steps + j] = load_pairs(p.inlet, nullptr, rank, width, 2 * j, 16 * tile);
    }

    // Up to MAX_ROWS tokens from `first`, centred, smoothed and without their principal part: float32 (count, width), valid until
    // the thread's next call. p is written.
    const float *take(int64_t first, int64_t count) const {
        const int64_t width = transform.width, floats = round_up(MAX_ROWS * width + 16, 16);
        float *x = static_cast<float *>(scratch(SLOT_PRINCIPAL, 4 * floats + 2 * MAX_ROWS * stride));
        uint16_t *halves = reinterpret_cast<uint16_t *>(x + floats);
        for (int64_t i = 0; i < count; ++i) {
            float *row = x + i * width;
            load_entries(ready, first + i, 0, width, row);  // the next row overwrites the zeros behind this one
            for (int64_t k = 0; k < stride; k += 32) {
                const auto part = [&](int64_t at) LRQ_LAMBDA {
                    const int64_t there = width - at;
                    const __mmask16 lanes = there >= 16 ? 0xffff : there > 0 ? (1u << there) - 1 : 0;
                    return _mm512_maskz_loadu_ps(lanes, row + at);
                };
                _mm512_storeu_si512(halves + i * stride + k, (__m512i)_mm512_cvtne2ps_pbh(part(k + 16), part(k)));
            }
        }
        alignas(64) uint16_t back[MAX_ROWS][MAX_RANK] = {};  // - p times U's scale
#if defined(LRQ_HAS_TILES)
        const Tiles held;
        find_coordinates(halves, first, count, back);
        subtract_all(x, back);
        return x;
#else
        for (int64_t i = 0; i < count; i += 4)
            for (int64_t r = 0; r < padded_rank; r += SIDES) find_coordinates(halves, first, i, count, r, back);
        int64_t tile = 0;
        for (; 16 * (tile + 3) <= width; tile += 3) subtract_part<3>(x, tile, count, back);
        for (; tile < tiles; ++tile) subtract_part<1>(x, tile, count, back);
        return x;
#endif
    }

  private:
#if defined(LRQ_HAS_TILES)
    static constexpr bool HAS_TILES = true;
    static constexpr int64_t SIDES = TILE_ROWS;
#else
    static constexpr bool HAS_TILES = false;
    static constexpr int64_t SIDES = 6, TILE_ROWS = 0;
    void arrange_rows() {}
#endif
    lrq_transform transform;
    lrq_principal principal;
    Ready ready;
    int64_t steps, stride, tiles, padded_rank, padded_steps;  // steps: pairs of directions
    uint16_t *rows;  // U^T's codes, (padded_rank, stride); for tiles: of each 32 entries tiles of 16 directions
    __m512i *pairs;  // the same in pairs of directions, (tiles, padded_steps)

#if defined(LRQ_HAS_TILES)
    void arrange_rows() {
        const int64_t bytes = padded_rank * stride * 2;
        uint8_t *copy = static_cast<uint8_t *>(scratch(SLOT_PRINCIPAL, bytes));
        __builtin_memcpy(copy, rows, bytes);
        for (int64_t k = 0; k < stride; k += 32)
            for (int64_t r = 0; r < padded_rank; r += TILE_ROWS) {
                __m512i v[16];
                for (int64_t i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(copy + ((r + i) * stride + k) * 2);
                transpose(v);
                for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(rows + k * padded_rank + r * 32 + 32 * i, v[i]);
            }
    }

    // The directions of all tokens.
    void find_coordinates(const uint16_t *halves, int64_t first, int64_t count, uint16_t (*back)[MAX_RANK]) const {
        alignas(64) float sums[2][2][TILE_ROWS][16];  // of even and odd steps; of 16 directions each
        const bool is_wide = padded_rank > TILE_ROWS;
        unroll<4>([](auto t) LRQ_LAMBDA { tile_zero<t>(); });
        const auto step = [&](auto odd, int64_t k) LRQ_LAMBDA {
            const uint16_t *directions = rows + k * padded_rank;
            tile_load<4 + odd>(halves + k, 2 * stride);
            tile_stream<6>(directions, 64), tile_pairs<2 * odd, 4 + odd, 6>();
            if (is_wide) tile_stream<7>(directions + 32 * TILE_ROWS, 64), tile_pairs<2 * odd + 1, 4 + odd, 7>();
        };
        for (int64_t k = 0; k < stride; k += 64) {
            step(std::integral_constant<int, 0>{}, k);
            if (k + 32 < stride) step(std::integral_constant<int, 1>{}, k + 32);
        }
        unroll<4>([&](auto t) LRQ_LAMBDA { tile_store<t>(sums[t / 2][t % 2], 64); });
        alignas(64) float scale[MAX_RANK] = {};
        for (int64_t r = 0; r < principal.rank; ++r) scale[r] = principal.inlet_scale[r];
        for (int64_t i = 0; i < count; ++i)
            for (int64_t r = 0; r < 2 * steps; r += WIDTH) {
                const Floats by = load<Floats>(scale + r);
                const Floats p = (load<Floats>(sums[0][r / 16][i]) + load<Floats>(sums[1][r / 16][i])) * by;
                store_as<LRQ_BFLOAT16>(principal.coordinates, (first + i) * 2 * steps + r, p, 2 * steps - r);
                store(back[i] + r, to_bfloat16(from_bfloat16(to_bfloat16(p)) * -by));
            }
    }

    // Adds `back` times the directions to x. What is read of the next row at the end of one does not change.
    void subtract_all(float *x, const uint16_t (*back)[MAX_RANK]) const {
        const int64_t row_bytes = 4 * transform.width;
        tile_load<5>(back, 2 * MAX_RANK);
        const auto part = [&](auto c, int64_t tile) LRQ_LAMBDA {
            tile_load<c>(x + 16 * tile, row_bytes), tile_stream<6>(pairs + tile * padded_steps, 64);
            tile_pairs<c, 5, 6>(), tile_store<c>(x + 16 * tile, row_bytes);
        };
        int64_t tile = 0;
        for (; tile + 4 <= tiles; tile += 4) unroll<4>([&](auto c) LRQ_LAMBDA { part(c, tile + c); });
        for (; tile < tiles; ++tile) part(std::integral_constant<int, 0>{}, tile);
    }
#else
    // Directions [r, r + SIDES) of four tokens from i.
    void find_coordinates(const uint16_t *halves, int64_t first, int64_t i, int64_t count, int64_t r,
                          uint16_t (*back)[MAX_RANK]) const {
        __m512 sums[4][SIDES] = {};
        const uint16_t *token[4];
        for (int64_t m = 0; m < 4; ++m) token[m] = halves + least(i + m, count - 1) * stride;
        const uint16_t *directions = rows + r * stride;
        for (int64_t k = 0; k < stride; k += 32) {
            __m512i v[4];
            unroll<4>([&](auto m) LRQ_LAMBDA { v[m] = _mm512_loadu_si512(token[m] + k); });
            unroll<SIDES>([&](auto s) LRQ_LAMBDA {
                const __m512i u = _mm512_loadu_si512(directions + s * stride + k);
                unroll<4>([&](auto m) LRQ_LAMBDA { sums[m][s] = dot_pairs(sums[m][s], v[m], u); });
            });
        }
        for (int64_t m = 0; m < 4 && i + m < count; ++m)
            for (int64_t s = 0; s < SIDES && r + s < 2 * steps; ++s) {
                const float scale = r + s < principal.rank ? principal.inlet_scale[r + s] : 0;
                const Floats p = splat(_mm512_reduce_add_ps(sums[m][s]) * scale);
                const Halves rounded = to_bfloat16(p);
                principal.coordinates[(first + i + m) * 2 * steps + r + s] = rounded[0];
                back[i + m][r + s] = to_bfloat16(from_bfloat16(rounded) * splat(-scale))[0];
            }
    }

    // V tiles of 16 entries of all rows; V is 1 where a tile is not full.
    template <int V>
    LRQ_INLINE void subtract_part(float *x, int64_t tile, int64_t count, const uint16_t (*back)[MAX_RANK]) const {
        const int64_t width = transform.width, there = width - 16 * tile;
        const __mmask16 lanes = there >= 16 ? 0xffff : (1u << there) - 1;
        const __m512i *from = pairs + tile * steps;
        const auto some = [&](auto rows_at_once, int64_t i) LRQ_LAMBDA {
            __m512 sums[rows_at_once][V];
            unroll<rows_at_once>([&](auto m) LRQ_LAMBDA {
                unroll<V>([&](auto v) LRQ_LAMBDA {
                    sums[m][v] = _mm512_maskz_loadu_ps(lanes, x + (i + m) * width + 16 * (tile + v));
                });
            });
            multiply_pairs<rows_at_once, V, false>(sums, reinterpret_cast<const uint8_t *>(back[i]), 2 * MAX_RANK, 4, from,
                                                   steps);
            unroll<rows_at_once>([&](auto m) LRQ_LAMBDA {
                unroll<V>([&](auto v) LRQ_LAMBDA {
                    _mm512_mask_storeu_ps(x + (i + m) * width + 16 * (tile + v), lanes, sums[m][v]);
                });
            });
        };
        if (count == MAX_ROWS) return some(std::integral_constant<int, MAX_ROWS>{}, 0);
        for (int64_t i = 0; i < count; ++i) some(std::integral_constant<int, 1>{}, i);
    }
#endif
};

// Adds p C to the output.
class Outlet {
  public:
    explicit Outlet(const lrq_principal &p) : principal(p), steps(ceil_div(p.rank, 2)) {}

    // Bytes of a tile of 16 channels.
    int64_t tile_bytes() const { return steps * 64; }

    void pack(const lrq_weight &w, int64_t tile, uint8_t *packed) const {
        for (int64_t j = 0; j < steps; ++j)
            store(packed + 64 * j, load_pairs(principal.outlet, principal.outlet_scale, principal.rank, w.out_features,
                                              2 * j, 16 * tile));
    }

    // A token's p, and its bytes.
    const uint16_t *coordinates(int64_t token) const { return principal.coordinates + token * 2 * steps; }
    int64_t coordinate_bytes() const { return 4 * steps; }

    // p C for `rows` tokens from `first` and `count` packed tiles -> (rows, 16 * count).
    void multiply(const uint8_t *packed, int64_t count, int64_t first, int64_t rows, float *out) const {
        const uint16_t *p = coordinates(first);
        const int64_t stride = 16 * count;
        if (count == 3 && rows == 8) return multiply_block<8, 3>(packed, p, out, stride);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t t = 0; t < count; ++t)
                multiply_block<1, 1>(packed + t * tile_bytes(), p + i * 2 * steps, out + i * stride + 16 * t, stride);
    }

  private:
    const lrq_principal principal;
    const int64_t steps;

    template <int R, int V>
    void multiply_block(const uint8_t *packed, const uint16_t *p, float *out, int64_t stride) const {
        __m512 sums[R][V] = {};
        multiply_pairs<R, V, false>(sums, reinterpret_cast<const uint8_t *>(p), 4 * steps, 4,
                                    reinterpret_cast<const __m512i *>(packed), steps);
        unroll<R>([&](auto m) LRQ_LAMBDA {
            unroll<V>([&](auto v) LRQ_LAMBDA { _mm512_storeu_ps(out + m * stride + 16 * v, sums[m][v]); });
        });
    }
};
#else  // refused before they are reached
struct Inlet {
    Inlet(const lrq_transform &, const lrq_principal &) {}
    const float *take(int64_t, int64_t) const { return nullptr; }
};

struct Outlet {
    explicit Outlet(const lrq_principal &) {}
    int64_t tile_bytes() const { return 0; }
    void pack(const lrq_weight &, int64_t, uint8_t *) const {}
    const uint16_t *coordinates(int64_t) const { return nullptr; }
    int64_t coordinate_bytes() const { return 0; }
    void multiply(const uint8_t *, int64_t, int64_t, int64_t, float *) const {}
};
#endif

}  // namespace LRQ_ISA
}  // namespace lrq
