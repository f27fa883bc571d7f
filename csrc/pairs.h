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

// Transposes 16 x 16 words.
LRQ_INLINE void transpose(__m512i *v) {
    __m512i pairs[16], fours[16];
    unroll<8>([&](auto i) LRQ_LAMBDA {
        pairs[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    });
    unroll<8>([&](auto i) LRQ_LAMBDA {
        constexpr int from = i / 2 * 4 + i % 2;
        fours[i / 2 * 4 + i % 2 * 2] = _mm512_unpacklo_epi64(pairs[from], pairs[from + 2]);
        fours[i / 2 * 4 + i % 2 * 2 + 1] = _mm512_unpackhi_epi64(pairs[from], pairs[from + 2]);
    });
    unroll<4>([&](auto i) LRQ_LAMBDA {
        const __m512i a = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xdd);
        v[i] = _mm512_shuffle_i32x4(a, c, 0x88), v[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        v[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88), v[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    });
}

#else
constexpr bool HAS_PAIRS = false;
#endif

}  // namespace LRQ_ISA
}  // namespace lrq
