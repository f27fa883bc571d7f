// The integer dot product of one instruction set: LANES output channels at once, STEP inputs of each.
//
// A panel holds, step by step, the weights of its channels: STEP inputs of a channel side by side, ELEMENT bytes each.
// IS_BIASED: the instruction multiplies unsigned by signed bytes, so the panel stores weights plus 128. That adds 128 times
// the sum of a token's codes to each of its sums, so these start at minus that number.
#pragma once

#include "vectors.h"

namespace lrq {
namespace LRQ_ISA {

// BLOCK_TOKENS x BLOCK_TILES (of 16 channels): the block whose sums the registers hold. GROUP_BYTES: of the panels that a
// thread keeps in its second cache.
#if defined(__AVX512VNNI__) && !defined(LRQ_256)
typedef __m512i Sums;
constexpr int LANES = 16, STEP = 4, ELEMENT = 1, BLOCK_TOKENS = 8, BLOCK_TILES = 3;
constexpr bool IS_BIASED = true;
constexpr int64_t GROUP_BYTES = 448 << 10;
LRQ_INLINE Sums splat_sums(int32_t x) { return _mm512_set1_epi32(x); }
LRQ_INLINE Sums dot(Sums sums, const uint8_t *weights, int32_t tokens) {
    // not the intrinsic: around it GCC 12 copies and spills the accumulators
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(_mm512_loadu_si512(weights)), "v"(_mm512_set1_epi32(tokens)));
    return sums;
}
#elif defined(__AVXVNNI__) || defined(__AVX512VNNI__)
typedef __m256i Sums;
constexpr int LANES = 8, STEP = 4, ELEMENT = 1, BLOCK_TOKENS = 6, BLOCK_TILES = 1;
constexpr bool IS_BIASED = true;
constexpr int64_t GROUP_BYTES = 256 << 10;
LRQ_INLINE Sums splat_sums(int32_t x) { return _mm256_set1_epi32(x); }
LRQ_INLINE Sums dot(Sums sums, const uint8_t *weights, int32_t tokens) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(weights));
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, w, _mm256_set1_epi32(tokens));
#else
    return _mm256_dpbusd_epi32(sums, w, _mm256_set1_epi32(tokens));
#endif
}
#elif defined(__AVX2__)
// vpmaddubsw saturates, so both sides are widened to int16.
typedef __m256i Sums;
constexpr int LANES = 8, STEP = 2, ELEMENT = 2, BLOCK_TOKENS = 6, BLOCK_TILES = 1;
constexpr bool IS_BIASED = false;
constexpr int64_t GROUP_BYTES = 192 << 10;
LRQ_INLINE Sums splat_sums(int32_t x) { return _mm256_set1_epi32(x); }
LRQ_INLINE Sums dot(Sums sums, const uint8_t *weights, int32_t tokens) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(weights));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(w, _mm256_set1_epi32(tokens)));
}
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int32x4_t Sums;
constexpr int LANES = 4, STEP = 4, ELEMENT = 1, BLOCK_TOKENS = 6, BLOCK_TILES = 1;
constexpr bool IS_BIASED = false;
constexpr int64_t GROUP_BYTES = 192 << 10;
LRQ_INLINE Sums splat_sums(int32_t x) { return vdupq_n_s32(x); }
LRQ_INLINE Sums dot(Sums sums, const uint8_t *weights, int32_t tokens) {
    return vdotq_s32(sums, vld1q_s8(reinterpret_cast<const int8_t *>(weights)), vreinterpretq_s8_s32(vdupq_n_s32(tokens)));
}
#else
struct Sums {
    int32_t sum[4];
};
constexpr int LANES = 4, STEP = 4, ELEMENT = 1, BLOCK_TOKENS = 2, BLOCK_TILES = 1;
constexpr bool IS_BIASED = false;
constexpr int64_t GROUP_BYTES = 192 << 10;
LRQ_INLINE Sums splat_sums(int32_t x) { return {{x, x, x, x}}; }
LRQ_INLINE Sums dot(Sums sums, const uint8_t *weights, int32_t tokens) {
    int8_t q[4];
    __builtin_memcpy(q, &tokens, 4);
    for (int lane = 0; lane < 4; ++lane)
        for (int i = 0; i < 4; ++i)
            sums.sum[lane] += static_cast<int>(static_cast<int8_t>(weights[4 * lane + i])) * q[i];
    return sums;
}
#endif
constexpr int64_t BLOCK_CHANNELS = 16 * BLOCK_TILES;
constexpr int BLOCK_VECTORS = BLOCK_CHANNELS / LANES;

}  // namespace LRQ_ISA
}  // namespace lrq
