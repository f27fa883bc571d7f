// Products of bfloat16 in pairs, with float32 sums (AVX-512 BF16).
#pragma once

#include "vectors.h"

namespace lrq {
namespace LRQ_ISA {

#if defined(__AVX512BF16__)
constexpr bool HAS_PAIRS = true;

LRQ_INLINE __m512 dot_pairs(__m512 sums, __m512i a, __m512i b) {
    // not the intrinsic: around it GCC 12 copies and spills the accumulators
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
}

// Adds the products of pairs a[r] and b[v] over `steps` steps to sums[r][v]. b has V registers a step, or all steps of one
// v after another.
template <int R, int V, bool IS_BY_STEP = true>
LRQ_INLINE void multiply_pairs(__m512 (&sums)[R][V], const uint8_t *a, int64_t row_stride, int64_t step_stride,
                               const __m512i *b, int64_t steps) {
    for (int64_t k = 0; k < steps; ++k, a += step_stride, b += IS_BY_STEP ? V : 1) {
        __m512i columns[V];
        unroll<V>([&](auto v) LRQ_LAMBDA { columns[v] = _mm512_load_si512(b + (IS_BY_STEP ? v : v * steps)); });
        unroll<R>([&](auto r) LRQ_LAMBDA {
            const __m512i row = _mm512_set1_epi32(load<int32_t>(a + r * row_stride));
            unroll<V>([&](auto v) LRQ_LAMBDA { sums[r][v] = dot_pairs(sums[r][v], row, columns[v]); });
        });
    }
}

#else
constexpr bool HAS_PAIRS = false;
#endif

}  // namespace LRQ_ISA
}  // namespace lrq
