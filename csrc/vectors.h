// Small vectors in the compilers' own notation, lowered to what the instruction set has. Arithmetic is written so that
// every instruction set gives the same bits: no contraction (-ffp-contract=off), and fma() is always one rounding.
#pragma once

#include <cstdint>
#include <cstring>
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

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

#if defined(__clang__)
#define LRQ_SHUFFLE16(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#define LRQ_SHUFFLE4(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LRQ_SHUFFLE16(v, ...) __builtin_shuffle(v, (i32x16){__VA_ARGS__})
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

// The butterfly of Sylvester's matrix on N entries, a power of two.
template <class V, int N> LRQ_INLINE void butterfly_power(V *v) {
    if constexpr (N > 1) {
        unroll<N / 2>([&](auto i) LRQ_LAMBDA {
            const V sum = v[i] + v[i + N / 2], difference = v[i] - v[i + N / 2];
            v[i] = sum, v[i + N / 2] = difference;
        });
        butterfly_power<V, N / 2>(v);
        butterfly_power<V, N / 2>(v + N / 2);
    }
}

LRQ_INLINE f32x16 splat(float x) { return x - (f32x16){}; }

LRQ_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    struct Halves {
        __m256 low, high;
    } x, y, z;
    __builtin_memcpy(&x, &a, 64), __builtin_memcpy(&y, &b, 64), __builtin_memcpy(&z, &c, 64);
    x.low = _mm256_fmadd_ps(x.low, y.low, z.low);
    x.high = _mm256_fmadd_ps(x.high, y.high, z.high);
    __builtin_memcpy(&a, &x, 64);
    return a;
#else
    for (int i = 0; i < 16; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return a;
#endif
}

LRQ_INLINE i32x16 greater(i32x16 a, i32x16 b) {
#if defined(__AVX512F__)
    return (i32x16)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
    return a > b ? a : b;
#endif
}

LRQ_INLINE i32x16 lesser(i32x16 a, i32x16 b) {
#if defined(__AVX512F__)
    return (i32x16)_mm512_min_epi32((__m512i)a, (__m512i)b);
#else
    return a < b ? a : b;
#endif
}

LRQ_INLINE f32x16 from_bfloat16(u16x16 bits) { return (f32x16)(__builtin_convertvector(bits, u32x16) << 16); }

// Without _Float16: GCC before 12 (on ARM 13) and Clang before 15 lack it, or call their library for it.
LRQ_INLINE f32x16 from_float16(u16x16 bits) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    __m128i halves[2];
    __builtin_memcpy(halves, &bits, 32);
    const __m256 parts[2] = {_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])};
    return load<f32x16>(parts);
#elif defined(__aarch64__)
    __fp16 halves[16];
    __builtin_memcpy(halves, &bits, 32);
    f32x16 v;
    for (int i = 0; i < 16; ++i) v[i] = halves[i];
    return v;
#else
    const u32x16 wide = __builtin_convertvector(bits, u32x16), magnitude = (wide & 0x7fff) << 13;
    const u32x16 finite = (u32x16)((f32x16)magnitude * 0x1p112f);  // exact, denormal halves included
    const u32x16 is_special = (u32x16)(magnitude >= 0x7c00u << 13);
    return (f32x16)((finite & ~is_special) | (is_special & (magnitude | 0x7f800000)) | (wide & 0x8000) << 16);
#endif
}

// Round to nearest even, NaN stays NaN.
LRQ_INLINE u16x16 to_bfloat16(f32x16 v) {
    const u32x16 bits = (u32x16)v;
    const u32x16 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const u32x16 is_nan = (u32x16)(v != v);
    return __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), u16x16);
}

LRQ_INLINE u16x16 to_float16(f32x16 v) {
#if defined(__AVX512F__)
    return (u16x16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    __m256 parts[2];
    __builtin_memcpy(parts, &v, 64);
    const __m128i halves[2] = {_mm256_cvtps_ph(parts[0], _MM_FROUND_TO_NEAREST_INT),
                               _mm256_cvtps_ph(parts[1], _MM_FROUND_TO_NEAREST_INT)};
    return load<u16x16>(halves);
#elif defined(__aarch64__)
    __fp16 halves[16];
    for (int i = 0; i < 16; ++i) halves[i] = static_cast<__fp16>(v[i]);
    return load<u16x16>(halves);
#else
    const u32x16 bits = (u32x16)v, magnitude = bits & 0x7fffffff;
    const u32x16 normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    const u32x16 denormal = (u32x16)((f32x16)magnitude + 0.5f) - 0x3f000000;  // 0.5 + x is rounded to their units
    const u32x16 is_small = (u32x16)(magnitude < 0x38800000), is_large = (u32x16)(magnitude >= 0x47800000);
    const u32x16 is_nan = (u32x16)(magnitude > 0x7f800000);
    const u32x16 finite = (denormal & is_small) | (normal & ~is_small);
    const u32x16 half = (finite & ~is_large) | (is_large & 0x7c00) | (is_nan & 0x7e00) | (bits >> 16 & 0x8000);
    return __builtin_convertvector(half, u16x16);
#endif
}

// The first count (at most 16) of 16 values, as TYPE LRQ_FLOAT32, ..., to element index.
template <int TYPE> LRQ_INLINE void store_as(void *out, int64_t index, f32x16 v, int64_t count) {
    if constexpr (TYPE == LRQ_FLOAT32) {
        float *p = static_cast<float *>(out) + index;
        if (count >= 16) return store(p, v);
        for (int64_t i = 0; i < count; ++i) p[i] = v[i];
    } else {
        const u16x16 bits = TYPE == LRQ_BFLOAT16 ? to_bfloat16(v) : to_float16(v);
        uint16_t *p = static_cast<uint16_t *>(out) + index;
        if (count >= 16) return store(p, bits);
        for (int64_t i = 0; i < count; ++i) p[i] = bits[i];
    }
}

// 16 values of TYPE from element index; the first count (at most 16) are read, the rest is 0.
template <int TYPE> LRQ_INLINE f32x16 load_as(const void *x, int64_t index, int64_t count) {
    if constexpr (TYPE == LRQ_FLOAT32) {
        const float *p = static_cast<const float *>(x) + index;
        if (count >= 16) return load<f32x16>(p);
        f32x16 v = {};
        for (int64_t i = 0; i < count; ++i) v[i] = p[i];
        return v;
    } else {
        const uint16_t *p = static_cast<const uint16_t *>(x) + index;
        u16x16 bits = {};
        if (count >= 16)
            bits = load<u16x16>(p);
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
LRQ_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LRQ_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace LRQ_ISA
}  // namespace lrq
