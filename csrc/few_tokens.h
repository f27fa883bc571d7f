// y = codes x weights for up to four tokens. Each weight is decoded into the register that multiplies it, without a panel.
#pragma once

#include "product.h"

namespace lrq {
namespace LRQ_ISA {

#if defined(__AVX512VNNI__) && !defined(LRQ_256)
// Output tiles that are multiplied side by side: as many streams from memory; and with a trellis, the codes that a tile
// needs of the one before it are loaded already.
template <int ROWS> constexpr int GROUP = ROWS == 1 ? 3 : ROWS == 2 ? 2 : 1;

LRQ_INLINE void add_products(__m512i &sums, __m512i weights, __m512i tokens) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(tokens));  // as in dot()
}

// Multiplies ROWS tokens by the output tiles from `tile` on. A lane of 128 bits sums the products of one channel in four
// words, which are added at the end. GCC 12 spills the sums where it inlines this.
template <int ROWS, int TILES_AT_ONCE, int BITS, bool TRELLIS>
__attribute__((noinline)) void multiply_few(const lrq_weight &w, int64_t tile, const WideTables *tables,
                                            const int8_t *codes, int64_t stride, const int32_t *starts,
                                            int32_t (*sums)[ROWS][16]) {
    constexpr int64_t tile_bytes = 32 * BITS;
    const int64_t row_bytes = ceil_div(w.in_features, 16) * tile_bytes;
    const uint8_t *packed = w.packed + tile * row_bytes;
    alignas(64) static const uint8_t none[tile_bytes] = {};
    const uint8_t *before = tile ? packed - row_bytes : none;
    const int64_t before_step = tile ? tile_bytes : 0;
    __m512i acc[TILES_AT_ONCE][ROWS][4] = {};
    for (int64_t k = 0; k < stride; k += 16, packed += tile_bytes, before += before_step) {
        unroll<TILES_AT_ONCE>([&](auto g) LRQ_LAMBDA {
            const uint8_t *at = packed + g * row_bytes;
            __m512i v[4];
            decode_positions<BITS, TRELLIS>(at, !TRELLIS ? nullptr : g ? at - row_bytes : before,
                                            tables[TRELLIS ? 0 : g], v);
            unroll<ROWS>([&](auto m) LRQ_LAMBDA {
                const __m512i q = (__m512i)_mm512_broadcast_i32x4(load<__m128i>(codes + m * stride + k));
                unroll<4>([&](auto p) LRQ_LAMBDA { add_products(acc[g][m][p], v[p], q); });
            });
        });
    }
    unroll<TILES_AT_ONCE>([&](auto g) LRQ_LAMBDA {
        unroll<ROWS>([&](auto m) LRQ_LAMBDA {
            const __m512i *s = acc[g][m];
            const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
            const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
            const __m512i sum = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
            store(sums[g][m], _mm512_add_epi32(sum, _mm512_set1_epi32(starts[m])));
        });
    });
}

template <int ROWS>
inline void quantized_linear_rows(const lrq_weight &w, const int8_t *codes, const float *scale,
                                  const lrq_principal *principal, int out_type, int threads, void *out) {
    const int64_t width = w.in_features, stride = round_up(width, 16), out_tiles = ceil_div(w.out_features, 16);
    int8_t *padded = static_cast<int8_t *>(scratch(SLOT_SHARED, ROWS * stride));
    int32_t starts[ROWS];
    for (int64_t m = 0; m < ROWS; ++m) {
        __builtin_memset(padded + m * stride + stride - 16, 0, 16);
        __builtin_memcpy(padded + m * stride, codes + m * width, width);
        starts[m] = start_of(codes + m * width, width);
    }
    const Outlet outlet(principal ? *principal : lrq_principal{});
    const Outputs outputs{w, scale, principal ? &outlet : nullptr, ROWS, out_type, out};
    constexpr int64_t group = GROUP<ROWS>;
    const int64_t per_task = round_up(ceil_div(out_tiles, 8 * threads), group);
    parallel_for(threads, ceil_div(out_tiles, per_task), [&](int64_t task) {
        const int64_t end = least((task + 1) * per_task, out_tiles);
        WideTables tables[group];
        for (int64_t tile = task * per_task, count; tile < end; tile += count) {
            count = end - tile < group ? 1 : group;
            if (tile == task * per_task || w.table_rows > 1)
                for (int64_t g = 0; g < group; ++g) {
                    Tables bytes;
                    load_tables(w, tile + g, 128, bytes);
                    with_coding(w, [&](auto b, auto is_trellis) { gather_tables<b, is_trellis>(bytes, tables[g]); });
                }
            int32_t sums[group][ROWS][16];
            with_coding(w, [&](auto bits, auto is_trellis) {
                if (count == group)
                    multiply_few<ROWS, group, bits, is_trellis>(w, tile, tables, padded, stride, starts, sums);
                else
                    multiply_few<ROWS, 1, bits, is_trellis>(w, tile, tables, padded, stride, starts, sums);
            });
            for (int64_t g = 0; g < count; ++g) {
                float added[ROWS][16];
                if (principal) {
                    uint8_t *packed = static_cast<uint8_t *>(scratch(SLOT_COPY, outlet.tile_bytes()));
                    outlet.pack(w, tile + g, packed);
                    outlet.multiply(packed, 1, 0, ROWS, added[0]);
                }
                finish_channels(outputs, sums[g][0], 16, principal ? added[0] : nullptr, 0, ROWS, 16 * (tile + g));
            }
        }
    });
}

// Computes the product if there are few enough tokens, and returns whether it did.
inline bool quantized_linear_few(const lrq_weight &w, int64_t rows, const int8_t *codes, const float *scale,
                                 const lrq_principal *principal, int out_type, int threads, void *out) {
    switch (rows) {
        case 1: return quantized_linear_rows<1>(w, codes, scale, principal, out_type, threads, out), true;
        case 2: return quantized_linear_rows<2>(w, codes, scale, principal, out_type, threads, out), true;
        case 3: return quantized_linear_rows<3>(w, codes, scale, principal, out_type, threads, out), true;
        case 4: return quantized_linear_rows<4>(w, codes, scale, principal, out_type, threads, out), true;
    }
    return false;
}

constexpr int64_t FEW = 4;
#else
constexpr int64_t FEW = 0;

inline bool quantized_linear_few(const lrq_weight &, int64_t, const int8_t *, const float *, const lrq_principal *, int,
                                 int, void *) {
    return false;
}
#endif

inline void quantized_linear(const lrq_weight &w, int64_t rows, const int8_t *codes, const float *scale,
                             const lrq_principal *principal, int out_type, int threads, void *out) {
    if (!quantized_linear_few(w, rows, codes, scale, principal, out_type, threads, out))
        quantized_linear_panels(w, rows, codes, scale, nullptr, principal, out_type, threads, out);
}

// quantize_tokens and quantized_linear in one pass: a thread rounds tokens just before the product that reads them first.
inline void linear(const lrq_transform &t, int bits, double clip, const int8_t *lookup, const lrq_weight &w,
                   const lrq_principal *principal, int out_type, int threads, int8_t *codes, float *scale, void *out) {
    if (t.rows <= FEW) {
        quantize_tokens(t, bits, clip, lookup, principal, threads, codes, scale);
        return quantized_linear(w, t.rows, codes, scale, principal, out_type, threads, out);
    }
    with_inlet(t, principal, [&](const Inlet *inlet) {
        const Rounder rounder(t, bits, clip, lookup, inlet, codes, scale);
        quantized_linear_panels(w, t.rows, codes, scale, &rounder, principal, out_type, threads, out);
    });
}

}  // namespace LRQ_ISA
}  // namespace lrq
