// What is done beside a product, between its steps: the outputs of the block before are written, and the cache lines that
// are read next are fetched.
#pragma once

#include "outputs.h"

namespace lrq {
namespace LRQ_ISA {

// The row scales and biases of a panel's channels. They are copied when the panel is decoded.
struct alignas(64) Coefficients {
    static constexpr int64_t CHANNELS = 48;
    float row_scale[CHANNELS], bias[CHANNELS];
    bool is_whole;  // the layer has all CHANNELS channels, and all these numbers are finite

    void read(const lrq_weight &w, int64_t n) {
        is_whole = n + CHANNELS <= w.out_features;
        for (int64_t k = 0; is_whole && k < CHANNELS; ++k) {
            row_scale[k] = w.row_scale[n + k];
            bias[k] = w.bias ? w.bias[n + k] : -0.0f;  // adding -0 changes no number
        }
        is_whole = is_whole && is_finite(row_scale, 2 * CHANNELS);
    }

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

// Outputs of a block, y = sums * row_scale * scale + bias in bfloat16, that the next product writes (vnni_block.h). No
// output may be NaN: the assembly rounds without looking for it.
struct Pending {
    int64_t row_bytes = 0;                  // of the layer's output
    int32_t one = 1, almost_half = 0x7fff;  // in units of bfloat16's last bit: the bit itself, just below a half
    const Coefficients *coefficients = nullptr;
    const int32_t *sums = nullptr;  // (rows, 48)
    const float *scale = nullptr;   // (rows)
    uint16_t *to = nullptr;
    int64_t rows = 0;  // not yet written

    void take(int64_t bytes, const Coefficients *c, const int32_t *block, const float *s, uint16_t *out, int64_t count) {
        row_bytes = bytes, coefficients = c, sums = block, scale = s, to = out, rows = count;
    }

    // Notes that `count` rows were written.
    void advance(int64_t count) {
        rows -= count, sums += count * Coefficients::CHANNELS, scale += count, to += count * row_bytes / 2;
    }

    // Writes the rows that are left.
    void finish() {
        for (; rows; advance(1))
            for (int64_t k = 0; k < Coefficients::CHANNELS; k += WIDTH) {
                const Floats row_scale = load<Floats>(coefficients->row_scale + k);
                const Floats bias = load<Floats>(coefficients->bias + k);
                store_as<LRQ_BFLOAT16>(to, k, scale_sums(sums + k, row_scale, *scale, bias), WIDTH);
            }
    }
};

// Pending outputs, and two ranges of memory whose lines (64 bytes) a product fetches one by one, every few steps: [next,
// last], then [second, second_last]; after that it fetches the last line again and again. Lines are fetched into all
// caches: Zen 4 fetches nothing in time that is asked for the outer ones alone. Many lines at once stall it.
struct Meanwhile {
    Pending pending;
    const uint8_t *next = nullptr, *last = nullptr, *second = nullptr, *second_last = nullptr;

    void fetch(const void *first, int64_t bytes) {
        next = static_cast<const uint8_t *>(first), last = next + (bytes > 0 ? (bytes - 1) / 64 * 64 : 0);
        second = second_last = last;
    }
    void then_fetch(const void *first, int64_t bytes) {
        second = static_cast<const uint8_t *>(first), second_last = second + (bytes > 0 ? (bytes - 1) / 64 * 64 : 0);
    }
    template <int LOCALITY = 3> LRQ_INLINE void fetch_line() {
        __builtin_prefetch(next, 0, LOCALITY);
        next = next == second_last ? second_last : next == last ? second : next + 64;
    }
};

}  // namespace LRQ_ISA
}  // namespace lrq
