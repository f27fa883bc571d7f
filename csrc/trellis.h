// The search for a column's cheapest path through the trellis (Viterbi): trellis.py once more, with the same operations
// in the same order, so the same bits.
#pragma once

#include "fit.h"

namespace lrq {
namespace LRQ_ISA {

// As in trellis.py.
typedef float f32x4 __attribute__((vector_size(16)));

constexpr int STATES = 64, HISTORY = 6, STEPS_PER_SHIFT = 32;
constexpr int64_t COLUMNS_PER_TASK = 16;

// For every value of floor(2 w / row_scale) + SLOTS / 2, the nearest level of each of the four subsets.
struct Subsets {
    alignas(64) float level[SLOTS][4];
    uint8_t rank[SLOTS][4];  // of the level in its subset

    Subsets(const int8_t *table, int bits) {
        const int size = 1 << (bits - 1);
        for (int s = 0; s < 4; ++s) {
            int r = 0;
            for (int slot = 0; slot < SLOTS; ++slot) {
                while (r + 1 < size && table[4 * r + s] + table[4 * (r + 1) + s] + SLOTS / 2 <= slot) ++r;
                rank[slot][s] = static_cast<uint8_t>(r);
                level[slot][s] = table[4 * r + s];
            }
        }
    }
};

// (a0, b0, a1, b1, ...): the first half of it, or the second.
template <bool SECOND> LRQ_INLINE Floats interleave(Floats a, Floats b) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i index = SECOND ? _mm512_add_epi32(low, _mm512_set1_epi32(8)) : low;
    return (Floats)_mm512_permutex2var_ps((__m512)a, index, (__m512)b);
#elif defined(__AVX2__)
    const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
    return (Floats)_mm256_permute2f128_ps(low, high, SECOND ? 0x31 : 0x20);
#else
    constexpr int from = SECOND ? 2 : 0;
    return (Floats){a[from], b[from], a[from + 1], b[from + 1]};
#endif
}

// The smaller of each two entries; bit i of `is_second` tells that it is b's.
LRQ_INLINE Floats smaller(Floats a, Floats b, uint32_t *is_second) {
#if defined(__AVX512F__)
    const __mmask16 mask = _mm512_cmp_ps_mask((__m512)b, (__m512)a, _CMP_LT_OQ);
    *is_second = mask;
    return (Floats)_mm512_mask_mov_ps((__m512)a, mask, (__m512)b);
#elif defined(__AVX2__)
    const __m256 mask = _mm256_cmp_ps((__m256)b, (__m256)a, _CMP_LT_OQ);
    *is_second = static_cast<uint32_t>(_mm256_movemask_ps(mask));
    return (Floats)_mm256_blendv_ps((__m256)a, (__m256)b, mask);
#else
    const Ints mask = b < a;
    *is_second = 0;
    for (int i = 0; i < WIDTH; ++i) *is_second |= static_cast<uint32_t>(mask[i] & 1) << i;
    return mask ? b : a;
#endif
}

// The distances of the states from WIDTH * v on, when one entry is reached from state h and one from h + 32. With u[t] = 0
// the bits u[t-1], u[t-2], ... of h, from the lowest, fix the subset: its lowest bit is u[t-2] ^ u[t-4], the other one
// u[t-1], and the opposite of that if u[t-6] or u[t] is 1.
struct Distances {
#if defined(__AVX512F__)
    __m512 d;  // the four subsets' distances, repeated
    explicit Distances(f32x4 four) : d(_mm512_broadcast_f32x4((__m128)four)) {}
    LRQ_INLINE Floats pick(Ints index) const { return (Floats)_mm512_permutevar_ps(d, (__m512i)index); }
#elif defined(__AVX2__)
    __m256 d;
    explicit Distances(f32x4 four) : d(_mm256_set_m128((__m128)four, (__m128)four)) {}
    LRQ_INLINE Floats pick(Ints index) const { return (Floats)_mm256_permutevar_ps(d, (__m256i)index); }
#else
    f32x4 d;
    explicit Distances(f32x4 four) : d(four) {}
    LRQ_INLINE Floats pick(Ints index) const { return (Floats){d[index[0]], d[index[1]], d[index[2]], d[index[3]]}; }
#endif
    template <int FIRST, int OPPOSITE> static constexpr int subset(int i) {
        const int h = FIRST + i;
        return 2 * ((h & 1) ^ OPPOSITE) + ((h >> 1 ^ h >> 3) & 1);
    }
    template <int V, int OPPOSITE> LRQ_INLINE Floats get() const {
        constexpr int first = V * WIDTH;
        Ints index;
        for (int i = 0; i < WIDTH; ++i) index[i] = subset<first, OPPOSITE>(i);
        return pick(index);
    }
};

// One column: units are w / row_scale, slots floor(2 units) + SLOTS / 2, weights the factor of each row's error; the codes
// may take the place of units. decisions: room for `rows`; bit h + 32 u tells that state 2 h + u is reached from h + 32, not
// from h.
inline void encode_path(const Subsets &subsets, const float *units, const int32_t *slots, const float *weights,
                        int64_t rows, uint64_t *decisions, uint8_t *codes) {
    constexpr int V = STATES / WIDTH, H = V / 2;
    Floats cost[V];
    unroll<V>([&](auto v) LRQ_LAMBDA { cost[v] = splat(1e30f); });
    cost[0][0] = 0;
    for (int64_t t = 0; t < rows; ++t) {
        const f32x4 e = (units[t] - load<f32x4>(subsets.level[slots[t]])) * weights[t];
        const Distances d(e * e);
        uint64_t bits = 0;
        Floats next[V];
        unroll<H>([&](auto v) LRQ_LAMBDA {
            const Floats a = d.get<v, 0>(), b = d.get<v, 1>();
            uint32_t even_bits, odd_bits;
            const Floats even = smaller(cost[v] + a, cost[v + H] + b, &even_bits);
            const Floats odd = smaller(cost[v] + b, cost[v + H] + a, &odd_bits);
            bits |= static_cast<uint64_t>(even_bits) << (v * WIDTH);
            bits |= static_cast<uint64_t>(odd_bits) << (32 + v * WIDTH);
            next[2 * v] = interleave<false>(even, odd), next[2 * v + 1] = interleave<true>(even, odd);
        });
        decisions[t] = bits;
        unroll<V>([&](auto v) LRQ_LAMBDA { cost[v] = next[v]; });
        if (t % STEPS_PER_SHIFT < STEPS_PER_SHIFT - 1) continue;
        Floats all = cost[0];
        uint32_t ignored;
        unroll<V>([&](auto v) LRQ_LAMBDA { all = smaller(all, cost[v], &ignored); });
        float smallest = all[0];
        for (int i = 1; i < WIDTH; ++i) smallest = all[i] < smallest ? all[i] : smallest;
        unroll<V>([&](auto v) LRQ_LAMBDA { cost[v] -= splat(smallest); });
    }
    float costs[STATES];
    unroll<V>([&](auto v) LRQ_LAMBDA { store(costs + v * WIDTH, cost[v]); });
    unsigned state = 0;
    for (unsigned s = 1; s < STATES; ++s) state = costs[s] < costs[state] ? s : state;
    for (int64_t t = rows - 1; t >= 0; --t) {
        const unsigned u = state & 1, h = state >> 1, old = decisions[t] >> (h | u << 5) & 1;
        const unsigned subset = 2 * (u ^ (h & 1) ^ old) + ((h >> 1 ^ h >> 3) & 1);
        codes[t] = static_cast<uint8_t>(2 * subsets.rank[slots[t]][subset] + u);
        state = h | old << (HISTORY - 1);
    }
}

inline void trellis_encode(const lrq_matrix &m, const int8_t *table, int bits, const float *row_scale, int threads,
                           uint8_t *codes) {
    const Subsets subsets(table, bits);
    const int64_t padded = round_up(m.rows, 16);
    float *weights = static_cast<float *>(scratch(SLOT_SHARED, sizeof(float) * m.rows));
    float largest = 0;
    for (int64_t i = 0; i < m.rows; ++i) largest = row_scale[i] > largest ? row_scale[i] : largest;
    for (int64_t i = 0; i < m.rows; ++i) weights[i] = largest > 0 ? row_scale[i] / largest : 0;
    parallel_for(threads, ceil_div(m.columns, COLUMNS_PER_TASK), [&](int64_t task) {
        const int64_t first = task * COLUMNS_PER_TASK, count = least(COLUMNS_PER_TASK, m.columns - first);
        float *units = static_cast<float *>(scratch(SLOT_ROWS, sizeof(float) * count * padded));
        int32_t *slots = static_cast<int32_t *>(scratch(SLOT_SUMS, sizeof(int32_t) * padded));
        uint64_t *decisions = static_cast<uint64_t *>(scratch(SLOT_PARTIAL, sizeof(uint64_t) * m.rows));
        for (int64_t i = 0; i < padded; ++i) {
            const float divisor = i >= m.rows || row_scale[i] == 0 ? 1 : row_scale[i];
            for (int64_t j = 0; j < count; ++j)
                units[j * padded + i] = i < m.rows ? m.weight[i * m.columns + first + j] / divisor : 0;
        }
        for (int64_t j = 0; j < count; ++j) {
            float *column = units + j * padded;
            for (int64_t i = 0; i < padded; i += 16) find_slots(load<f32x16>(column + i), slots + i);
            encode_path(subsets, column, slots, weights, m.rows, decisions, reinterpret_cast<uint8_t *>(column));
        }
        for (int64_t i = 0; i < m.rows; ++i)
            for (int64_t j = 0; j < count; ++j)
                codes[i * m.columns + first + j] = reinterpret_cast<const uint8_t *>(units + j * padded)[i];
    });
}

}  // namespace LRQ_ISA
}  // namespace lrq
