// Makes codes of tokens: takes the principal part out of them if there is one, transforms them (transform.h) and rounds.
#pragma once

#include "principal.h"

namespace lrq {
namespace LRQ_ISA {

// Rounds the tokens of one call, any rows at a time.
class Rounder {
  public:
    Rounder(const lrq_transform &t, int bits, double clip, const int8_t *lookup, const Inlet *inlet, int8_t *codes,
            float *scale)
        : source(t), rest(t), inlet(inlet), bits(bits),
          clip_over_largest(static_cast<float>(clip / ((1 << (bits - 1)) - 1))), lookup(lookup), codes(codes),
          scale(scale), is_staircase(lookup && build_staircase(lookup, stairs)) {
        if (inlet) rest.x_type = LRQ_FLOAT32, rest.offset = rest.scale = nullptr;  // x^ without its principal part
        ready = make_ready(rest);
    }
    Rounder(const Rounder &) = delete;

    int64_t row_bytes() const { return source.width * (source.x_type == LRQ_FLOAT32 ? 4 : 2); }
    const uint8_t *input(int64_t row) const { return static_cast<const uint8_t *>(source.x) + row * row_bytes(); }

    // Rounds `count` tokens, INLET_ROWS at most, from `first`.
    void round(int64_t first, int64_t count) const {
        const auto round_all = [&](const Ready &r, int64_t row) {
            for (int64_t i = 0; i < count; i += ROWS_PER_TASK)
                round_rows(r, row + i, least(ROWS_PER_TASK, count - i), first + i);
        };
        if (!inlet) return round_all(ready, first);
        lrq_transform taken = rest;
        taken.x = inlet->take(first, count), taken.rows = count;
        Ready own = ready;
        own.t = &taken;
        round_all(own, 0);
    }

  private:
    const lrq_transform &source;
    lrq_transform rest;
    const Inlet *inlet;
    Ready ready;
    int bits;
    float clip_over_largest;
    const int8_t *lookup;
    int8_t *codes;
    float *scale;
    Staircase stairs;
    bool is_staircase;

    // Rounds `count` rows of `r` from `row`, and writes them as the tokens from `token`.
    void round_rows(const Ready &r, int64_t row, int64_t count, int64_t token) const {
        const int64_t width = source.width;
        transform_rows(r, row, count, [&](int64_t i, const float *values, Ints largest) {
            const int64_t at = token + i - row;
            int8_t *out = codes + at * width;
            for (int64_t k = 0; at + 1 < source.rows && k < width; k += 64) __builtin_prefetch(out + width + k, 1, 2);
            scale[at] =
                quantize_row(values, largest, width, bits, clip_over_largest, is_staircase ? &stairs : nullptr, out);
            if (lookup && !is_staircase)
                for (int64_t k = 0; k < width; ++k) out[k] = lookup[out[k] + 128];
        });
    }
};

// Calls body with the principal part's inlet, or with nullptr.
template <class Body> LRQ_INLINE void with_inlet(const lrq_transform &t, const lrq_principal *p, Body &&body) {
    if (!p) return body(static_cast<const Inlet *>(nullptr));
    const Inlet inlet(t, *p);
    body(&inlet);
}

inline void quantize_tokens(const lrq_transform &t, int bits, double clip, const int8_t *lookup,
                            const lrq_principal *principal, int threads, int8_t *codes, float *scale) {
    with_inlet(t, principal, [&](const Inlet *inlet) {
        const Rounder rounder(t, bits, clip, lookup, inlet, codes, scale);
        parallel_for(threads, ceil_div(t.rows, INLET_ROWS), [&](int64_t task) {
            const int64_t first = task * INLET_ROWS;
            rounder.round(first, least(INLET_ROWS, t.rows - first));
        });
    });
}

}  // namespace LRQ_ISA
}  // namespace lrq
