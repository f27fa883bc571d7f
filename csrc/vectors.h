// Small vectors in the compilers' own notation, lowered to what the instruction set has. Arithmetic is written so that
// every instruction set gives the same bits: no contraction (-ffp-contract=off), and fma() is always one rounding.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "lrqdit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LRQ_INLINE inline __attribute__((always_inline))
#define LRQ_LAMBDA __attribute__((always_inline))

namespace lrq {
namespace LRQ_ISA {

// A register of WIDTH floats, and integers as many. (Wider generic vectors work, too, but live in memory.)
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef int8_t i8x64 __attribute__((vector_size(64)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

#if defined(__clang__)
#define LRQ_SHUFFLE4(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LRQ_SHUFFLE4(a, b, ...) __builtin_shuffle(a, b, (i32x4){__VA_ARGS__})
#endif

template <class V> LRQ_INLINE V load(const void *p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class V> LRQ_INLINE void store(void *p, V v) { __builtin_memcpy(p, &v, sizeof v); }

template <int N, class Body, int... I> LRQ_INLINE void unroll(Body &&body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}

// body(0), ..., body(N - 1) with the index known at compile time.
template <int N, class Body> LRQ_INLINE void unroll(Body &&body) {
    unroll<N>(body, std::make_integer_sequence<int, N>{});
}

// a - b, by the units that multiply: with additions beside it on their own, Zen 4 does twice as many.
template <class V> LRQ_INLINE V subtract(V a, V b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64)
        return (V)_mm512_fnmadd_ps((__m512)b, _mm512_set1_ps(1), (__m512)a);
    else if constexpr (sizeof(V) == 32)
        return (V)_mm256_fnmadd_ps((__m256)b, _mm256_set1_ps(1), (__m256)a);
    else
#endif
        return a - b;
}

// The butterfly of Sylvester's matrix on N entries, a power of two; neighbours first, whatever the register's width.
template <class V, int N, int STRIDE = 1> LRQ_INLINE void butterfly_power(V *v) {
    if constexpr (STRIDE < N) {
        unroll<N>([&](auto i) LRQ_LAMBDA {
            if constexpr ((i & STRIDE) == 0) {
                const V sum = v[i] + v[i + STRIDE], difference = subtract(v[i], v[i + STRIDE]);
                v[i] = sum, v[i + STRIDE] = difference;
            }
        });
        butterfly_power<V, N, 2 * STRIDE>(v);
    }
}

LRQ_INLINE Floats splat(float x) { return x - Floats{}; }

LRQ_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    for (int i = 0; i < WIDTH; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

LRQ_INLINE Ints greater(Ints a, Ints b) {
#if defined(__AVX512F__)
    return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
    return a > b ? a : b;
#endif
}

LRQ_INLINE Ints lesser(Ints a, Ints b) {
#if defined(__AVX512F__)
    return (Ints)_mm512_min_epi32((__m512i)a, (__m512i)b);
#else
    return a < b ? a : b;
#endif
}

// Entries from -128 to 127.
LRQ_INLINE Bytes narrow(Ints v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)v, (__m256i)v), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_castsi256_si128(words));
    return load<Bytes>(&bytes);
#else
    return __builtin_convertvector(v, Bytes);
#endif
}

LRQ_INLINE Bytes saturate(Ints v) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm512_cvtsepi32_epi8((__m512i)v);
    return load<Bytes>(&bytes);
#elif defined(__AVX2__)
    return narrow(v);  // saturates
#else
    return narrow(lesser(greater(v, -128 - (Ints){}), 127 - (Ints){}));
#endif
}

LRQ_INLINE Floats from_bfloat16(Halves bits) {
#if defined(__AVX512BW__)  // every word to the upper half of its place
    const __m512i place = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3,
                                           0, 2, 0, 1, 0, 0, 0);
    return (Floats)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, place, _mm512_castsi256_si512((__m256i)bits));
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
#endif
}

// Round to nearest even, NaN stays NaN.
LRQ_INLINE Halves to_bfloat16(Floats v) {
#if defined(__AVX512BW__)
    const __m512i all = (__m512i)v, plus = _mm512_add_epi32(all, _mm512_set1_epi32(0x7fff));
    const __mmask16 is_odd = _mm512_test_epi32_mask(all, _mm512_set1_epi32(0x10000));
    const __m512i rounded = _mm512_mask_add_epi32(plus, is_odd, plus, _mm512_set1_epi32(1));
    const __m512i word = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q),
                                               _mm512_set1_epi32(0x7fc00000));
    const __m512i upper = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25, 23,
                                           21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return (Halves)_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, word));
#else
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Words is_nan = (Words)(v != v);
    const Words word = (rounded & ~is_nan) | (is_nan & 0x7fc0);
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i both = _mm256_packus_epi32((__m256i)word, (__m256i)word);
    return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0xd8));
#else
    return __builtin_convertvector(word, Halves);
#endif
#endif
}

LRQ_INLINE Floats from_float16(Halves bits) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps((__m128i)bits);
#elif defined(__aarch64__)
    __fp16 halves[WIDTH];
    __builtin_memcpy(halves, &bits, sizeof halves);
    Floats v;
    for (int i = 0; i < WIDTH; ++i) v[i] = halves[i];
    return v;
#else
    const Words wide = __builtin_convertvector(bits, Words), magnitude = (wide & 0x7fff) << 13;
    const Words finite = (Words)((Floats)magnitude * 0x1p112f);  // exact, denormal halves included
    const Words is_special = (Words)(magnitude >= 0x7c00u << 13);
    return (Floats)((finite & ~is_special) | (is_special & (magnitude | 0x7f800000)) | (wide & 0x8000) << 16);
#endif
}

LRQ_INLINE Halves to_float16(Floats v) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
    __fp16 halves[WIDTH];
    for (int i = 0; i < WIDTH; ++i) halves[i] = static_cast<__fp16>(v[i]);
    return load<Halves>(halves);
#else
    const Words bits = (Words)v, magnitude = bits & 0x7fffffff;
    const Words normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    const Words denormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000;  // 0.5 + x is rounded to their units
    const Words is_small = (Words)(magnitude < 0x38800000), is_large = (Words)(magnitude >= 0x47800000);
    const Words is_nan = (Words)(magnitude > 0x7f800000);
    const Words finite = (denormal & is_small) | (normal & ~is_small);
    const Words half = (finite & ~is_large) | (is_large & 0x7c00) | (is_nan & 0x7e00) | (bits >> 16 & 0x8000);
    return __builtin_convertvector(half, Halves);
#endif
}

// The first count (at most WIDTH) of a register's values, as TYPE LRQ_FLOAT32, ..., to element index.
template <int TYPE> LRQ_INLINE void store_as(void *out, int64_t index, Floats v, int64_t count) {
    if constexpr (TYPE == LRQ_FLOAT32) {
        float *p = static_cast<float *>(out) + index;
        if (count >= WIDTH) return store(p, v);
        for (int64_t i = 0; i < count; ++i) p[i] = v[i];
    } else {
        const Halves bits = TYPE == LRQ_BFLOAT16 ? to_bfloat16(v) : to_float16(v);
        uint16_t *p = static_cast<uint16_t *>(out) + index;
        if (count >= WIDTH) return store(p, bits);
        for (int64_t i = 0; i < count; ++i) p[i] = bits[i];
    }
}

// A register of TYPE from element index; the first count (at most WIDTH) are read, the rest is 0.
template <int TYPE> LRQ_INLINE Floats load_as(const void *x, int64_t index, int64_t count) {
    if constexpr (TYPE == LRQ_FLOAT32) {
        const float *p = static_cast<const float *>(x) + index;
        if (count >= WIDTH) return load<Floats>(p);
        Floats v = {};
        for (int64_t i = 0; i < count; ++i) v[i] = p[i];
        return v;
    } else {
        const uint16_t *p = static_cast<const uint16_t *>(x) + index;
        Halves bits = {};
        if (count >= WIDTH)
            bits = load<Halves>(p);
        else
            for (int64_t i = 0; i < count; ++i) bits[i] = p[i];
        return TYPE == LRQ_BFLOAT16 ? from_bfloat16(bits) : from_float16(bits);
    }
}

// body(type as a compile-time constant)
template <class Body> LRQ_INLINE void with_type(int type, Body &&body) {
    switch (type) {
        case LRQ_FLOAT32: return body(std::integral_constant<int, LRQ_FLOAT32>{});
        case LRQ_BFLOAT16: return body(std::integral_constant<int, LRQ_BFLOAT16>{});
        default: return body(std::integral_constant<int, LRQ_FLOAT16>{});
    }
}

LRQ_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LRQ_INLINE int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }
LRQ_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LRQ_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace LRQ_ISA
}  // namespace lrq
