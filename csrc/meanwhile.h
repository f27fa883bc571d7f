// What is done between and beside products: fetching what comes next, and outputs that wait.
#pragma once

#include "dot.h"
#include "kernels.h"

namespace lrq {
namespace LRQ_ISA {

LRQ_INLINE Floats scale_sums(const int32_t *sums, Floats row_scale, float scale, Floats bias) {
    return __builtin_convertvector(load<Ints>(sums), Floats) * row_scale * splat(scale) + bias;
}

// Outputs of a block of 48 channels, y = sums * row_scale * scale + bias in bfloat16, that the next product writes (block.h).
struct Pending {
    static constexpr int64_t CHANNELS = 48;

    int64_t row_bytes;                      // of the output
    int32_t one = 1, almost_half = 0x7fff;  // of bfloat16's last bit
    alignas(64) float row_scale[CHANNELS];
    alignas(64) float bias[CHANNELS];
    const int32_t *sums;
    const float *scale;
    uint16_t *to;
    int64_t rows = 0;  // left

    // Whether they can wait: sums (some, 48) of channels from n, all there, and tokens from `first`.
    bool take(const lrq_weight &w, const int32_t *block_sums, const float *token_scale, int64_t first, int64_t some,
              int64_t n, int type, void *out) {
        if (type != LRQ_BFLOAT16) return false;
        __builtin_memcpy(row_scale, w.row_scale + n, sizeof row_scale);
        for (int64_t k = 0; k < CHANNELS; ++k) bias[k] = w.bias ? w.bias[n + k] : -0.0f;  // adding that changes nothing
        // then no output is NaN, which would need to be told apart
        if (!is_finite(row_scale, CHANNELS) || !is_finite(bias, CHANNELS) || !is_finite(token_scale, some)) return false;
        sums = block_sums, scale = token_scale, rows = some, row_bytes = 2 * w.out_features;
        to = static_cast<uint16_t *>(out) + first * w.out_features + n;
        return true;
    }

    // `count` rows were written.
    void advance(int64_t count) { rows -= count, sums += count * CHANNELS, scale += count, to += count * row_bytes / 2; }

    // All that still waits, now.
    void finish() {
        for (; rows; advance(1))
            for (int64_t k = 0; k < CHANNELS; k += WIDTH)
                store_as<LRQ_BFLOAT16>(to, k, scale_sums(sums + k, load<Floats>(row_scale + k), *scale, load<Floats>(bias + k)),
                                       WIDTH);
    }

  private:
    static bool is_finite(const float *x, int64_t count) {
        int32_t largest = 0;
        for (int64_t i = 0; i < count; ++i) {
            int32_t bits;
            __builtin_memcpy(&bits, x + i, 4);
            bits &= 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        return largest < 0x7f800000;
    }
};

struct Meanwhile {
    Pending pending;
    // lines to fetch into all caches, one every other step (for outer caches alone, Zen 4 fetches nothing in time)
    const uint8_t *next = nullptr, *last = nullptr;

    void fetch(const void *first, int64_t bytes) {
        next = static_cast<const uint8_t *>(first), last = next + (bytes > 64 ? bytes - 64 : 0);
    }
    LRQ_INLINE void fetch_line() {
        __builtin_prefetch(next);
        next += next < last ? 64 : 0;
    }
};

}  // namespace LRQ_ISA
}  // namespace lrq
