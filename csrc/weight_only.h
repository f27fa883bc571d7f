// The weight-only product: float32 tokens x weights decoded to int8 levels, made float32 where they are multiplied.
//
// A channel has four sums. Sum s adds, tile after tile, the products of inputs 4 s, ..., 4 s + 3 of the tile: that is
// byte 0, ..., 3 of the four words of its 16 levels, so a level is taken out of a word by shifts and no level changes its
// place. The output is (s0 + s2) + (s1 + s3), whatever the instruction set and the number of tokens.
#pragma once

#include "decode.h"
#include "outputs.h"

namespace lrq {
namespace LRQ_ISA {

constexpr int64_t FLOAT_TOKENS = 64;  // tokens, at most, that share a decoded tile
constexpr int64_t FLOAT_TILES = 16;   // input tiles decoded at once: their levels stay in the first cache

// Four floats in each quarter of a register.
LRQ_INLINE Floats repeat_four(const float *x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_broadcast_f32x4(_mm_loadu_ps(x));
#elif defined(__AVX2__)
    return (Floats)_mm256_broadcast_ps(reinterpret_cast<const __m128 *>(x));
#else
    return load<Floats>(x);
#endif
}

// Multiplies ROWS tokens (stride floats apart, see arrange_token) by the levels of `tiles` input tiles and adds the
// products to sums (ROWS, 64).
template <int ROWS>
inline void multiply_floats(const uint8_t *levels, int64_t tiles, const float *x, int64_t stride, float *sums) {
    constexpr int REGISTERS = ROWS > 4 ? 2 : ROWS == 1 || WIDTH == 16 ? 4 : 2;
    for (int64_t part = 0; part < 64; part += REGISTERS * WIDTH) {
        Floats acc[ROWS][REGISTERS];
        unroll<ROWS>([&](auto m) LRQ_LAMBDA {
            unroll<REGISTERS>([&](auto v) LRQ_LAMBDA { acc[m][v] = load<Floats>(sums + 64 * m + part + v * WIDTH); });
        });
        for (int64_t t = 0; t < tiles; ++t)
            unroll<4>([&](auto byte) LRQ_LAMBDA {
                Floats w[REGISTERS];
                unroll<REGISTERS>([&](auto v) LRQ_LAMBDA {
                    const Ints words = load<Ints>(levels + 256 * t + 4 * (part + v * WIDTH));
                    w[v] = __builtin_convertvector((words << (24 - 8 * byte)) >> 24, Floats);
                });
                unroll<ROWS>([&](auto m) LRQ_LAMBDA {
                    const Floats q = repeat_four(x + m * stride + 16 * t + 4 * byte);
                    unroll<REGISTERS>([&](auto v) LRQ_LAMBDA { acc[m][v] = fma(q, w[v], acc[m][v]); });
                });
            });
        unroll<ROWS>([&](auto m) LRQ_LAMBDA {
            unroll<REGISTERS>([&](auto v) LRQ_LAMBDA { store(sums + 64 * m + part + v * WIDTH, acc[m][v]); });
        });
    }
}

// Copies entry 16 t + 4 s + i to 16 t + 4 i + s, with zeros beyond the width.
LRQ_INLINE void arrange_token(const float *x, int64_t width, int64_t padded, float *out) {
    for (int64_t k = 0; k < padded; ++k) out[(k & ~15) + 4 * (k & 3) + (k >> 2 & 3)] = k < width ? x[k] : 0;
}

inline void weight_only_linear(const lrq_weight &w, int64_t rows, const float *x, int out_type, int threads,
                               void *out) {
    const int64_t width = w.in_features, in_tiles = ceil_div(width, 16), out_tiles = ceil_div(w.out_features, 16);
    const int64_t stride = 16 * in_tiles + 16;  // not a power of two: tokens would share one set of the first cache
    const Outputs outputs{w, nullptr, nullptr, rows, out_type, out};
    float *tokens = static_cast<float *>(scratch(SLOT_SHARED, sizeof(float) * least(rows, FLOAT_TOKENS) * stride));
    for (int64_t first = 0; first < rows; first += FLOAT_TOKENS) {
        const int64_t count = least(FLOAT_TOKENS, rows - first);
        for (int64_t m = 0; m < count; ++m) arrange_token(x + (first + m) * width, width, 16 * in_tiles, tokens + m * stride);
        parallel_for(threads, out_tiles, [&](int64_t tile) {
            const LevelDecoder decoder(w, tile);
            alignas(64) uint8_t levels[256 * FLOAT_TILES];
            alignas(64) float sums[64 * FLOAT_TOKENS], totals[16 * FLOAT_TOKENS];
            __builtin_memset(sums, 0, sizeof(float) * 64 * count);
            for (int64_t from = 0; from < in_tiles; from += FLOAT_TILES) {
                const int64_t tiles = least(FLOAT_TILES, in_tiles - from);
                decoder(from, from + tiles, levels);
                for (int64_t m = 0, block; m < count; m += block) {
                    const float *at = tokens + m * stride + 16 * from;
                    block = count - m < 4 ? count - m : count - m < 8 ? 4 : 8;
                    switch (block) {
                        case 1: multiply_floats<1>(levels, tiles, at, stride, sums + 64 * m); break;
                        case 2: multiply_floats<2>(levels, tiles, at, stride, sums + 64 * m); break;
                        case 3: multiply_floats<3>(levels, tiles, at, stride, sums + 64 * m); break;
                        case 4: multiply_floats<4>(levels, tiles, at, stride, sums + 64 * m); break;
                        default: multiply_floats<8>(levels, tiles, at, stride, sums + 64 * m);
                    }
                }
            }
            for (int64_t m = 0; m < count; ++m)
                for (int64_t n = 0; n < 16; ++n) {
                    const float *s = sums + 64 * m + 16 * (n & 3) + 4 * (n >> 2);
                    totals[16 * m + n] = (s[0] + s[2]) + (s[1] + s[3]);
                }
            finish_channels(outputs, totals, 16, nullptr, first, count, 16 * tile);
        });
    }
}

}  // namespace LRQ_ISA
}  // namespace lrq
