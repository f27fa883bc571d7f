// From sums to outputs: scales, bias, the principal part's share, the output's type.
#pragma once

#include "principal.h"

namespace lrq {
namespace LRQ_ISA {

// What a product's sums are scaled by, and the memory of its outputs (tokens, out_features).
struct Outputs {
    const lrq_weight &w;
    const float *scale;    // (tokens), their quantization steps; nullptr for float sums, which have none
    const Outlet *outlet;  // what adds the principal part; or nullptr
    int64_t rows;          // tokens
    int type;              // LRQ_FLOAT32, ...
    void *to;
};

LRQ_INLINE Floats scale_sums(const int32_t *sums, Floats row_scale, float scale, Floats bias) {
    return __builtin_convertvector(load<Ints>(sums), Floats) * row_scale * splat(scale) + bias;
}

// Writes sum * row_scale * scale + bias for `rows` tokens from `first` and V registers of channels from n, of which the
// last one may be cut off by the layer's width. Token i's sums begin at sums + i * stride; so does what is added, if it is
// not nullptr.
template <int V, int TYPE, class Value>
LRQ_INLINE void finish_as(const Outputs &outputs, const Value *sums, int64_t stride, const float *added, int64_t first,
                          int64_t rows, int64_t n) {
    const lrq_weight &w = outputs.w;
    const int64_t width = w.out_features, last = least(WIDTH, width - n - (V - 1) * WIDTH);
    Floats row_scale[V], bias[V];
    unroll<V>([&](auto v) LRQ_LAMBDA {
        const int64_t at = n + v * WIDTH, count = v < V - 1 ? WIDTH : last;
        row_scale[v] = load_as<LRQ_FLOAT32>(w.row_scale, at, count);
        bias[v] = w.bias ? load_as<LRQ_FLOAT32>(w.bias, at, count) : splat(-0.0f);  // adding -0 changes no number
    });
    for (int64_t i = 0; i < rows; ++i) {
        Floats y[V];
        unroll<V>([&](auto v) LRQ_LAMBDA {
            const Value *sum = sums + i * stride + v * WIDTH;
            if constexpr (std::is_same<Value, int32_t>::value)
                y[v] = scale_sums(sum, row_scale[v], outputs.scale[first + i], bias[v]);
            else
                y[v] = load<Floats>(sum) * row_scale[v] + bias[v];
            if (added) y[v] = y[v] + load<Floats>(added + i * stride + v * WIDTH);
        });
        const int64_t at = (first + i) * width + n;
        unroll<V - 1>([&](auto v) LRQ_LAMBDA { store_as<TYPE>(outputs.to, at + v * WIDTH, y[v], WIDTH); });
        store_as<TYPE>(outputs.to, at + (V - 1) * WIDTH, y[V - 1], last);
    }
}

// The same for `channels` channels from n, as far as the layer has them; sums and what is added are (rows, channels).
template <class Value>
LRQ_INLINE void finish_channels(const Outputs &outputs, const Value *sums, int64_t channels, const float *added,
                                int64_t first, int64_t rows, int64_t n) {
    constexpr int most = BLOCK_CHANNELS / WIDTH;
    const int64_t registers = ceil_div(least(channels, outputs.w.out_features - n), WIDTH);
    with_type(outputs.type, [&](auto t) LRQ_LAMBDA {
        if (registers == most) return finish_as<most, t>(outputs, sums, channels, added, first, rows, n);
        for (int64_t v = 0; v < registers; ++v)
            finish_as<1, t>(outputs, sums + v * WIDTH, channels, added ? added + v * WIDTH : nullptr, first, rows,
                            n + v * WIDTH);
    });
}

}  // namespace LRQ_ISA
}  // namespace lrq
