// Searches for each column's path of least cost through the trellis (Viterbi). trellis.py has the same operations in the
// same order, so the results have the same bits. Where many columns are searched, each lane of a register holds a column;
// where a single one is, each lane holds a state.
#pragma once

#include "fit.h"

namespace lrq {
namespace LRQ_ISA {

typedef float f32x4 __attribute__((vector_size(16)));

constexpr int STATES = LRQ_STATES, HISTORY = LRQ_HISTORY, STEPS_PER_SHIFT = LRQ_STEPS_PER_SHIFT;
constexpr int64_t MAX_COLUMNS_PER_TASK = 64;

typedef std::conditional_t<WIDTH == 16, uint16_t, uint8_t> Mask;  // a bit for each lane

// The subset whose level leads from state h to 2 h, and from h + 32 to 2 h + 1; the opposite one leads from h to 2 h + 1
// and from h + 32 to 2 h (h < 32 = STATES / 2). A state's bits, from the lowest, are the codes' lowest bits u[t-1], u[t-2],
// ..., u[t-6]. A subset's lower bit is u[t-2] ^ u[t-4], its upper bit u[t-1] ^ u[t-6] ^ u[t].
constexpr int subset_of(int h, int is_opposite) { return 2 * ((h & 1) ^ is_opposite) + ((h >> 1 ^ h >> 3) & 1); }

// The nearest level of each of the four subsets, and its rank in the subset, four bits a rank.
struct Subsets {
    f32x4 level[SLOTS];  // by floor(2 w / row_scale) + SLOTS / 2
    uint16_t ranks[SLOTS];

    Subsets(const int8_t *table, int bits) : ranks{} {
        const int size = 1 << (bits - 1);
        for (int s = 0; s < 4; ++s) {
            int r = 0;
            for (int slot = 0; slot < SLOTS; ++slot) {
                while (r + 1 < size && table[4 * r + s] + table[4 * (r + 1) + s] + SLOTS / 2 <= slot) ++r;
                ranks[slot] |= static_cast<uint16_t>(r << 4 * s);
                level[slot][s] = table[4 * r + s];
            }
        }
    }
};

// The same for a register of weights. A weight's place is the index of its interval between thresholds; levels and ranks
// are looked up by it.
template <int BITS> class Nearest {
#if defined(__AVX512F__)
    static constexpr int REGISTERS = BITS == 5 ? 4 : 2;
    // the values of 2 w / row_scale at which a rank changes: 28 at most, or 60 at 5 bits
    Floats thresholds[REGISTERS];
    Floats levels[4][REGISTERS];
    Ints packed[REGISTERS];

  public:
    explicit Nearest(const Subsets &subsets) {
        float bounds[REGISTERS * WIDTH];
        for (float &bound : bounds) bound = __builtin_nanf("");  // reached by no weight
        for (int slot = 0, place = 0; slot < SLOTS; ++slot) {
            if (slot && subsets.ranks[slot] != subsets.ranks[slot - 1]) bounds[++place] = slot - SLOTS / 2;
            const int v = place / WIDTH, i = place % WIDTH;
            for (int s = 0; s < 4; ++s) levels[s][v][i] = subsets.level[slot][s];
            packed[v][i] = subsets.ranks[slot];
        }
        __builtin_memcpy(thresholds, bounds, sizeof bounds);
    }

    LRQ_INLINE Ints find(Floats units) const {
        Ints place = {};
        unroll<REGISTERS == 4 ? 6 : 5>([&](auto i) LRQ_LAMBDA {
            const Ints upper = place + (REGISTERS * WIDTH / 2 >> i);
            place = units * 2 >= pick(thresholds, upper) ? upper : place;
        });
        return place;
    }
    LRQ_INLINE Floats level(int s, Ints place) const { return pick(levels[s], place); }
    LRQ_INLINE Ints ranks(Ints place) const { return (Ints)pick((const Floats *)packed, place); }

  private:
    static LRQ_INLINE Floats pick(const Floats *table, Ints index) {
        const __m512 low = _mm512_permutex2var_ps((__m512)table[0], (__m512i)index, (__m512)table[1]);
        if constexpr (REGISTERS == 2) return (Floats)low;
        const __m512 high = _mm512_permutex2var_ps((__m512)table[REGISTERS - 2], (__m512i)index, (__m512)table[REGISTERS - 1]);
        return (Floats)_mm512_mask_mov_ps(low, _mm512_test_epi32_mask((__m512i)index, _mm512_set1_epi32(32)), high);
    }
#else
    const Subsets &subsets;  // a place is a slot

  public:
    explicit Nearest(const Subsets &s) : subsets(s) {}

    LRQ_INLINE Ints find(Floats units) const {
        int32_t slots[WIDTH];
        find_slots(units, slots);
        return load<Ints>(slots);
    }
    LRQ_INLINE Floats level(int s, Ints place) const {
        Floats v;
        for (int i = 0; i < WIDTH; ++i) v[i] = subsets.level[place[i]][s];
        return v;
    }
    LRQ_INLINE Ints ranks(Ints place) const {
        Ints v;
        for (int i = 0; i < WIDTH; ++i) v[i] = subsets.ranks[place[i]];
        return v;
    }
#endif
};

// The first or the second half of (a0, b0, a1, b1, ...).
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

// The smaller of a and b in each lane; none of them is negative. Bit i of *is_second is 1 where it is b's.
LRQ_INLINE Floats smaller(Floats a, Floats b, uint32_t *is_second) {
#if defined(__AVX512F__)
    // floats that are not negative have the order of their bits, and integers are compared in half the time
    *is_second = _mm512_cmplt_epi32_mask((__m512i)b, (__m512i)a);
    return (Floats)_mm512_min_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    *is_second = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)b, (__m256)a, _CMP_LT_OQ)));
    return (Floats)_mm256_min_ps((__m256)b, (__m256)a);
#else
    const Ints mask = b < a;
    *is_second = 0;
    for (int i = 0; i < WIDTH; ++i) *is_second |= static_cast<uint32_t>(mask[i] & 1) << i;
    return mask ? b : a;
#endif
}

// The squared errors of the four subsets' nearest levels in one row; get<V, ...> gives each of the states WIDTH * V,
// WIDTH * V + 1, ... that of the subset that leads on from it.
struct Distances {
#if defined(__AVX512F__)
    __m512 d;  // the four errors, repeated
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
    template <int V, int OPPOSITE> LRQ_INLINE Floats get() const {
        constexpr int first = V * WIDTH;
        Ints index;
        for (int i = 0; i < WIDTH; ++i) index[i] = subset_of(first + i, OPPOSITE);
        return pick(index);
    }
};

// Searches one column. units: w / row_scale; slots: floor(2 units) + SLOTS / 2; weights: the factor of each row's error.
// codes may share the memory of units. decisions (rows): bit h + 32 u is set to 1 where state 2 h + u is reached from h +
// 32, to 0 where it is reached from h.
inline void encode_path(const Subsets &subsets, const float *units, const int32_t *slots, const float *weights,
                        int64_t rows, uint64_t *decisions, uint8_t *codes) {
    constexpr int V = STATES / WIDTH, H = V / 2;
    Floats cost[V];
    unroll<V>([&](auto v) LRQ_LAMBDA { cost[v] = splat(1e30f); });
    cost[0][0] = 0;
    for (int64_t t = 0; t < rows; ++t) {
        const f32x4 e = (units[t] - subsets.level[slots[t]]) * weights[t];
        const Distances d(e * e);
        uint64_t bits = 0;
        Floats next[V];
        unroll<H>([&](auto v) LRQ_LAMBDA {
            const Floats a = d.get<v, 0>(), b = d.get<v, 1>();
            uint32_t even_bits, odd_bits;
            const Floats even = smaller(cost[v] + a, cost[v + H] + b, &even_bits);
            const Floats odd = smaller(cost[v] + b, cost[v + H] + a, &odd_bits);
            bits |= static_cast<uint64_t>(even_bits) << (v * WIDTH);
            bits |= static_cast<uint64_t>(odd_bits) << (STATES / 2 + v * WIDTH);
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
        const unsigned u = state & 1, h = state >> 1, old = decisions[t] >> (h | u << (HISTORY - 1)) & 1;
        const unsigned rank = subsets.ranks[slots[t]] >> 4 * subset_of(h, u ^ old) & 15;
        codes[t] = static_cast<uint8_t>(2 * rank + u);
        state = h | old << (HISTORY - 1);
    }
}

// Advances the states' costs, a column in each lane, by STEPS rows: two rows at once need half of the loads and stores. Bit
// i of decisions[row][s] is set to 1 where column i reaches state s from s / 2 + 32, to 0 where it does from s / 2.
template <int STEPS>
LRQ_INLINE void advance(const Floats *from, Floats *to, const Floats (*distances)[4], Mask (*decisions)[STATES]) {
    constexpr int N = 1 << STEPS;
    Floats d[STEPS][4];
    __builtin_memcpy(d, distances, sizeof d);
    unroll<STATES / N>([&](auto group) LRQ_LAMBDA {  // N states lead to N others, and no other state does
        Floats cost[N], next[N];
        unroll<N>([&](auto i) LRQ_LAMBDA { cost[i] = from[group + STATES / N * i]; });
        unroll<STEPS>([&](auto k) LRQ_LAMBDA {
            unroll<N / 2>([&](auto i) LRQ_LAMBDA {
                constexpr int h = (i >> k) * (STATES / N << k) + (group << k) + i % (1 << k);
                const Floats a = d[k][subset_of(h, 0)], b = d[k][subset_of(h, 1)];
                uint32_t even, odd;
                next[2 * i] = smaller(cost[i] + a, cost[i + N / 2] + b, &even);
                next[2 * i + 1] = smaller(cost[i] + b, cost[i + N / 2] + a, &odd);
                decisions[k][2 * h] = static_cast<Mask>(even), decisions[k][2 * h + 1] = static_cast<Mask>(odd);
            });
            unroll<N>([&](auto i) LRQ_LAMBDA { cost[i] = next[i]; });
        });
        unroll<N>([&](auto i) LRQ_LAMBDA { to[N * group + i] = cost[i]; });
    });
}

// Bit i of decisions[state[i]], for each lane i.
LRQ_INLINE Ints look_up(const Mask *decisions, Ints state) {
#if defined(__AVX512F__)
    const __m512i low = load<__m512i>(decisions), high = load<__m512i>(decisions + STATES / 2);
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (Ints)_mm512_permutex2var_epi16(low, (__m512i)state, high) >> lane & 1;
#else
    Ints bits;
    for (int i = 0; i < WIDTH; ++i) bits[i] = decisions[state[i]] >> i & 1;
    return bits;
#endif
}

// Searches `count` columns, at most WIDTH, of a matrix that has `stride` columns.
template <int BITS>
inline void encode_paths(const Nearest<BITS> &nearest, const float *weight, const float *row_scale, const float *row_weight,
                         int64_t rows, int64_t stride, int64_t count, uint8_t *codes) {
    Mask(*decisions)[STATES] = static_cast<Mask(*)[STATES]>(scratch(SLOT_PARTIAL, sizeof(Mask) * STATES * rows));
    Halves *places = static_cast<Halves *>(scratch(SLOT_ROWS, sizeof(Halves) * rows));
    Floats buffers[2][STATES], *cost = buffers[0], *next = buffers[1];
    Floats units[STEPS_PER_SHIFT], distances[STEPS_PER_SHIFT][4];
    for (int s = 0; s < STATES; ++s) cost[s] = splat(s ? 1e30f : 0);
    for (int64_t first = 0; first < rows; first += STEPS_PER_SHIFT) {
        const int steps = static_cast<int>(least(STEPS_PER_SHIFT, rows - first));
        for (int t = 0; t < steps; ++t) {
            const int64_t row = first + t;
            __builtin_prefetch(weight + (row + STEPS_PER_SHIFT) * stride);
            units[t] =
                load_as<LRQ_FLOAT32>(weight, row * stride, count) / splat(row_scale[row] == 0 ? 1 : row_scale[row]);
            places[row] = __builtin_convertvector(nearest.find(units[t]), Halves);
        }
        for (int t = 0; t < steps; ++t) {
            const Ints place = __builtin_convertvector(places[first + t], Ints);
            unroll<4>([&](auto s) LRQ_LAMBDA {
                const Floats e = (units[t] - nearest.level(s, place)) * row_weight[first + t];
                distances[t][s] = e * e;
            });
        }
        const auto go = [&](auto n, int t) LRQ_LAMBDA {
            advance<n>(cost, next, distances + t, decisions + first + t);
            Floats *const last = cost;
            cost = next, next = last;
        };
        int t = 0;
        for (; t + 1 < steps; t += 2) go(std::integral_constant<int, 2>{}, t);
        if (t < steps) go(std::integral_constant<int, 1>{}, t);
        if (steps < STEPS_PER_SHIFT) break;
        Floats smallest = cost[0];
        uint32_t ignored;
        for (int s = 1; s < STATES; ++s) smallest = smaller(smallest, cost[s], &ignored);
        for (int s = 0; s < STATES; ++s) cost[s] -= smallest;
    }
    Floats best = cost[0];
    Ints state = {};
    for (int s = 1; s < STATES; ++s) {
        const Ints is_less = cost[s] < best;
        state = is_less ? s - Ints{} : state;
        best = is_less ? cost[s] : best;
    }
    for (int64_t t = rows - 1; t >= 0; --t) {
        const Ints u = state & 1, h = state >> 1, old = look_up(decisions[t], state);
        const Ints subset = ((u ^ h ^ old) & 1) << 1 | ((h >> 1 ^ h >> 3) & 1);
        const Ints rank = nearest.ranks(__builtin_convertvector(places[t], Ints)) >> 4 * subset & 15;
        const Bytes path = narrow(2 * rank + u);
        __builtin_prefetch(codes + (t - STEPS_PER_SHIFT) * stride, 1);
        if (count == WIDTH)
            store(codes + t * stride, path);
        else
            __builtin_memcpy(codes + t * stride, &path, count);
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
    const auto encode_one = [&](int64_t j) {
        float *units = static_cast<float *>(scratch(SLOT_ROWS, sizeof(float) * padded));
        int32_t *slots = static_cast<int32_t *>(scratch(SLOT_SUMS, sizeof(int32_t) * padded));
        uint64_t *decisions = static_cast<uint64_t *>(scratch(SLOT_PARTIAL, sizeof(uint64_t) * m.rows));
        for (int64_t i = 0; i < m.rows; ++i)
            units[i] = m.weight[i * m.columns + j] / (row_scale[i] == 0 ? 1 : row_scale[i]);
        for (int64_t i = m.rows; i < padded; ++i) units[i] = 0;
        for (int64_t i = 0; i < padded; i += 16) find_slots(load<f32x16>(units + i), slots + i);
        uint8_t *path = reinterpret_cast<uint8_t *>(units);
        encode_path(subsets, units, slots, weights, m.rows, decisions, path);
        for (int64_t i = 0; i < m.rows; ++i) codes[i * m.columns + j] = path[i];
    };
    const int64_t columns = least(round_up(ceil_div(m.columns, 4 * threads), WIDTH), MAX_COLUMNS_PER_TASK);
    const auto encode_all = [&](const auto &nearest) {
        parallel_for(threads, ceil_div(m.columns, columns), [&](int64_t task) {
            const int64_t stop = least((task + 1) * columns, m.columns);
            for (int64_t j = task * columns; j < stop; j += WIDTH) {
                const int64_t count = least(WIDTH, stop - j);
                if (2 * count >= WIDTH)
                    encode_paths(nearest, m.weight + j, row_scale, weights, m.rows, m.columns, count, codes + j);
                else
                    for (int64_t i = 0; i < count; ++i) encode_one(j + i);
            }
        });
    };
    bits < 5 ? encode_all(Nearest<4>(subsets)) : encode_all(Nearest<5>(subsets));
}

}  // namespace LRQ_ISA
}  // namespace lrq
