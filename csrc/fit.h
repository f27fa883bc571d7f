// Fits levels to a weight: measures its rows, counts their histograms, searches for each row's scale, encodes and packs.
// codebook.py and packing.py have the same operations in the same order, so the results have the same bits.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace lrq {
namespace LRQ_ISA {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef double f64x2 __attribute__((vector_size(16)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint64_t u64x2 __attribute__((vector_size(16)));

constexpr int64_t BINS = LRQ_BINS, QUARTER = BINS / 2;
constexpr int64_t COARSE = LRQ_COARSE, MIDDLE = LRQ_MIDDLE, MARGIN = COARSE + MIDDLE;
constexpr int64_t POLISHES = LRQ_POLISHES, SLOTS = LRQ_SLOTS;

LRQ_INLINE f32x16 splat16(float x) { return x - f32x16{}; }

// Calls body(k, values, count) for every 16 entries of a row, from entry k; the last call may have fewer, followed by
// zeros.
template <class Body> LRQ_INLINE void for_sixteens(const float *row, int64_t columns, Body &&body) {
    int64_t k = 0;
    for (; k + 16 <= columns; k += 16) body(k, row + k, std::integral_constant<int, 16>{});
    if (k == columns) return;
    float rest[16] = {};
    __builtin_memcpy(rest, row + k, sizeof(float) * (columns - k));
    body(k, rest, static_cast<int>(columns - k));
}

LRQ_INLINE f64x8 widen(f32x8 v) {
#if defined(__AVX512F__)
    return (f64x8)_mm512_cvtps_pd((__m256)v);
#else
    return __builtin_convertvector(v, f64x8);
#endif
}

LRQ_INLINE f64x8 widen(const float *values) { return widen(load<f32x8>(values)); }

template <int SECOND> LRQ_INLINE f32x8 half(f32x16 v) {
#if defined(__AVX512F__)
    return (f32x8)_mm512_extractf32x8_ps((__m512)v, SECOND);
#else
    float values[16];
    store(values, v);
    return load<f32x8>(values + 8 * SECOND);
#endif
}

LRQ_INLINE f64x8 magnitude(f64x8 v) { return (f64x8)((i64x8)v & 0x7fffffffffffffff); }

// The sum of 16 lanes: the upper half is added to the lower half, until one lane is left.
LRQ_INLINE double sum_lanes(f64x8 low, f64x8 high) {
    double lanes[8];
    store(lanes, low + high);
    for (int half = 4; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

struct RowStatistics {
    double root_mean_square, inverse;  // inverse: 1 / root_mean_square, or 1 if that is 0
    double lowest, highest;            // of the row's entries and 0, in units of the root mean square
};

inline RowStatistics measure_row(const float *row, int64_t columns) {
    f64x8 squares[2] = {};
    f32x16 low = {}, high = {};
    for_sixteens(row, columns, [&](int64_t, const float *values, auto) LRQ_LAMBDA {
        const f32x16 v = load<f32x16>(values);
        low = v < low ? v : low;
        high = v > high ? v : high;
        unroll<2>([&](auto i) LRQ_LAMBDA {
            const f64x8 w = widen(values + 8 * i);
            squares[i] += w * w;
        });
    });
    float lowest = 0, highest = 0;
    for (int i = 0; i < 16; ++i) {
        lowest = low[i] < lowest ? low[i] : lowest;
        highest = high[i] > highest ? high[i] : highest;
    }
    RowStatistics s;
    s.root_mean_square = __builtin_sqrt(sum_lanes(squares[0], squares[1]) / static_cast<double>(columns));
    s.inverse = 1 / (s.root_mean_square > 0 ? s.root_mean_square : 1);
    s.lowest = lowest * s.inverse, s.highest = highest * s.inverse;
    return s;
}

// Adds each entry's mass (its importance times `energy`) and moment (mass times the entry in units of the root mean square)
// to its bin.
inline void count_row(const float *row, const lrq_matrix &m, double inverse, double energy, f64x2 *bins) {
    constexpr int64_t ENTRIES = 256;  // whose bins are found at once, so that divisions overlap with additions
    double mass[ENTRIES], moment[ENTRIES];
    int32_t index[ENTRIES];
    for (int64_t first = 0; first < m.columns; first += ENTRIES) {
        const int64_t size = least(ENTRIES, m.columns - first);
        for_sixteens(row + first, size, [&](int64_t k, const float *values, auto count) LRQ_LAMBDA {
            unroll<2>([&](auto i) LRQ_LAMBDA {
                const f64x8 units = widen(values + 8 * i) * inverse;
                const f64x8 place = (1 + units / (1 + magnitude(units))) * BINS;
                store(index + k + 8 * i, __builtin_convertvector(place, i32x8));
                f64x8 weights = energy - (f64x8){};
                if (m.importance) {
                    for (int j = 0; j < 8; ++j)
                        if (8 * i + j < count) weights[j] *= m.importance[first + k + 8 * i + j];
                    store(mass + k + 8 * i, weights);
                }
                store(moment + k + 8 * i, weights * units);
            });
        });
        if (m.importance)
            for (int64_t i = 0; i < size; ++i) bins[index[i]] += (f64x2){mass[i], moment[i]};
        else
            for (int64_t i = 0; i < size; ++i) bins[index[i]] += (f64x2){energy, moment[i]};
    }
}

inline f64x2 *clear(f64x2 *bins, int64_t count) {
    __builtin_memset(bins, 0, sizeof(f64x2) * count);
    return bins;
}

inline void count_layer(const lrq_matrix &m, int64_t block_rows, int64_t part_blocks, int threads, double *bins,
                        double *range) {
    const int64_t part_rows = block_rows * part_blocks;
    parallel_for(threads, ceil_div(m.rows, part_rows), [&](int64_t part) {
        f64x2 *block = static_cast<f64x2 *>(scratch(SLOT_SUMS, sizeof(f64x2) * 2 * BINS));
        double *sums = bins + part * 4 * BINS, *ends = range + 2 * part;
        __builtin_memset(sums, 0, sizeof(double) * 4 * BINS);
        ends[0] = ends[1] = 0;
        const int64_t stop = least((part + 1) * part_rows, m.rows);
        for (int64_t first = part * part_rows; first < stop; first += block_rows) {
            clear(block, 2 * BINS);
            for (int64_t i = first; i < least(first + block_rows, stop); ++i) {
                const float *row = m.weight + i * m.columns;
                const RowStatistics s = measure_row(row, m.columns);
                count_row(row, m, s.inverse, s.root_mean_square * s.root_mean_square, block);
                ends[0] = s.lowest < ends[0] ? s.lowest : ends[0];
                ends[1] = s.highest > ends[1] ? s.highest : ends[1];
            }
            for (int64_t b = 0; b < 2 * BINS; ++b)
                store(sums + 2 * b, load<f64x2>(sums + 2 * b) + block[b]);
        }
    });
}

inline void count_rows(const lrq_matrix &m, int threads, double *root_mean_square, double *bins, double *lowest,
                       double *highest) {
    parallel_for(threads, m.rows, [&](int64_t i) {
        f64x2 *pairs = clear(static_cast<f64x2 *>(scratch(SLOT_SUMS, sizeof(f64x2) * 2 * BINS)), 2 * BINS);
        const float *row = m.weight + i * m.columns;
        const RowStatistics s = measure_row(row, m.columns);
        count_row(row, m, s.inverse, 1, pairs);
        root_mean_square[i] = s.root_mean_square, lowest[i] = s.lowest, highest[i] = s.highest;
        double *mass = bins + i * 2 * BINS, *moment = mass + m.rows * 2 * BINS;
        for (int64_t b = 0; b < 2 * BINS; ++b) mass[b] = pairs[b][0], moment[b] = pairs[b][1];
    });
}

// Makes entry b the sum of the entries 0 ... b: first within its quarter, then with the sums of the quarters before it.
inline void accumulate(f64x2 *bins) {
    f64x2 sums[4] = {};
    for (int64_t b = 0; b < QUARTER; ++b)
        unroll<4>([&](auto q) LRQ_LAMBDA { bins[q * QUARTER + b] = sums[q] += bins[q * QUARTER + b]; });
    f64x2 before = {};
    for (int q = 1; q < 4; ++q) {
        before += sums[q - 1];
        const f64x8 four = {before[0], before[1], before[0], before[1], before[0], before[1], before[0], before[1]};
        f64x2 *quarter = bins + q * QUARTER;
        for (int64_t b = 0; b < QUARTER; b += 4) store(quarter + b, load<f64x8>(quarter + b) + four);
    }
}

// The entries of a 16-entry table at 16 indices.
LRQ_INLINE f32x16 pick(f32x16 table, i32x16 index) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
    f32x16 out;
    float entries[16];
    store(entries, table);
    for (int i = 0; i < 16; ++i) out[i] = entries[index[i]];
    return out;
#endif
}

// floor(2 v) + SLOTS / 2, kept within 0 ... SLOTS - 1.
template <class V> LRQ_INLINE void find_slots(V v, int32_t *slots) {
    const V low = -SLOTS / 2 - V{}, high = SLOTS / 2 - 1 - V{};
    v = v * 2;
    v = v < low ? low : v > high ? high : v;
    const auto whole = __builtin_convertvector(v, decltype(v > v));
    store(slots, whole + (__builtin_convertvector(whole, V) > v) + SLOTS / 2);  // a true comparison is -1
}

// Finds the nearest of up to 16 ascending levels.
template <int BITS> struct FewLevels {
    f32x16 values, thresholds;  // thresholds[i], for i > 0, is the midpoint of the levels i - 1 and i

    explicit FewLevels(const int8_t *table) : values{}, thresholds{} {
        for (int i = 0; i < 1 << BITS; ++i) values[i] = table[i];
        for (int i = 1; i < 1 << BITS; ++i) thresholds[i] = 0.5f * static_cast<float>(table[i] + table[i - 1]);
    }

    // The codes of v, the number of thresholds that are not above it.
    LRQ_INLINE i32x16 find(f32x16 v) const {
        i32x16 codes = {};
#if defined(__AVX512F__)
        unroll<BITS>([&](auto i) LRQ_LAMBDA {
            const i32x16 upper = codes + (1 << (BITS - 1 - i));
            codes = v >= pick(thresholds, upper) ? upper : codes;
        });
#else
        for (int i = 1; i < 1 << BITS; ++i) codes -= v >= splat16(thresholds[i]);
#endif
        return codes;
    }

    LRQ_INLINE f32x16 nearest(f32x16 v) const { return pick(values, find(v)); }
};

// Finds the nearest of more levels by the slot, floor(2 v) + SLOTS / 2. Of 256 levels, -128 is never used.
template <int BITS> struct ManyLevels {
    uint8_t codes[SLOTS];
    float values[SLOTS];

    explicit ManyLevels(const int8_t *table) {
        int slot = 0;
        for (int code = 0; code < 1 << BITS; ++code) {
            const int stop = code + 1 < 1 << BITS ? table[code] + table[code + 1] + SLOTS / 2 : SLOTS;
            for (; slot < stop; ++slot) {
                codes[slot] = static_cast<uint8_t>(BITS == 8 && code == 0 ? 1 : code);
                values[slot] = table[code];
            }
        }
    }

    LRQ_INLINE i32x16 find(f32x16 v) const {
        int32_t slots[16];
        find_slots(v, slots);
        for (int i = 0; i < 16; ++i) slots[i] = codes[slots[i]];
        return load<i32x16>(slots);
    }

    LRQ_INLINE f32x16 nearest(f32x16 v) const {
        int32_t slots[16];
        float levels[16];
        find_slots(v, slots);
        for (int i = 0; i < 16; ++i) levels[i] = values[slots[i]];
        return load<f32x16>(levels);
    }
};

template <int BITS> using Levels = std::conditional_t<BITS <= 4, FewLevels<BITS>, ManyLevels<BITS>>;

// Calls body(bits) with bits as a compile-time constant.
template <class Body> LRQ_INLINE void with_bits(int bits, Body &&body) {
    switch (bits) {
        case 2: return body(std::integral_constant<int, 2>{});
        case 3: return body(std::integral_constant<int, 3>{});
        case 4: return body(std::integral_constant<int, 4>{});
        case 5: return body(std::integral_constant<int, 5>{});
        case 6: return body(std::integral_constant<int, 6>{});
        default: return body(std::integral_constant<int, 8>{});
    }
}

// The sums that give a row's error, up to a constant: E = scale (scale square - 2 product).
struct Moments {
    double square, product;

    double error(double scale) const { return scale * (scale * square - 2 * product); }
};

// Sums d t^2 and d t w over a row, where d is an entry's importance and t the level nearest to w / scale.
template <int BITS>
Moments measure_codes(const float *row, const lrq_matrix &m, const Levels<BITS> &levels, float scale) {
    const f32x16 divisor = splat16(scale == 0 ? 1 : scale);
    f64x8 squares[2] = {}, products[2] = {};
    for_sixteens(row, m.columns, [&](int64_t k, const float *values, auto count) LRQ_LAMBDA {
        const f32x16 nearest = levels.nearest(load<f32x16>(values) / divisor);
        unroll<2>([&](auto i) LRQ_LAMBDA {
            const f64x8 t = widen(half<i>(nearest));
            f64x8 weighted = t;
            if (m.importance) {
                for (int j = 0; j < 8; ++j)
                    weighted[j] = 8 * i + j < count ? t[j] * m.importance[k + 8 * i + j] : 0;
            } else {
                for (int j = 0; j < 8; ++j)
                    if (8 * i + j >= count) weighted[j] = 0;
            }
            squares[i] += weighted * t;
            products[i] += weighted * widen(values + 8 * i);
        });
    });
    return {sum_lanes(squares[0], squares[1]), sum_lanes(products[0], products[1])};
}

// What the search for scales needs of a table.
struct Ladder {
    int count, padded;      // midpoints between neighbouring levels; the same rounded up to whole registers
    double top, base;       // the highest level; the scale for a grid entry of 1
    double midpoints[64];
    f64x2 coefficients[64]; // of the mass and the moment below a midpoint, in the error

    Ladder(const int8_t *table, int levels)
        : count(levels - 1), padded(levels < 8 ? 8 : levels), top(table[count]), midpoints{}, coefficients{} {
        int peak = 0;
        for (int i = 0; i < levels; ++i) {
            const int size = table[i] < 0 ? -table[i] : table[i];
            peak = size > peak ? size : peak;
        }
        base = 0.5 / peak;
        for (int i = 0; i < count; ++i) {
            const double gap = table[i + 1] - table[i];
            midpoints[i] = (table[i + 1] + table[i]) / 2.0;
            coefficients[i] = (f64x2){2 * gap * midpoints[i], gap};
        }
    }

    // Finds the bin edges nearest to the midpoints times `scale`, `padded` of them.
    void find_edges(double scale, int32_t *edges) const {
        for (int i = 0; i < padded; i += 8) {
            const f64x8 units = load<f64x8>(midpoints + i) * scale;
            const f64x8 place = units / (1 + magnitude(units)) * BINS;
            const f64x8 magic = 6755399441055744.0 - (f64x8){};  // 1.5 * 2^52: the sum is rounded half to even
            store(edges + i, __builtin_convertvector(place + magic - magic, i32x8) + BINS);
        }
    }

    // below[e]: the mass and the moment below edge e.
    Moments measure(const f64x2 *below, const int32_t *edges) const {
        f64x2 sum = (f64x2){top * top, top} * below[2 * BINS];
        for (int i = 0; i < count; ++i) sum -= coefficients[i] * below[edges[i]];
        return {sum[0], sum[1]};
    }
};

// The scale of the smallest error on the grid, in units of the root mean square. edges: those that find_edges finds for
// every grid entry, or nullptr.
inline double search_scale(const f64x2 *below, const Ladder &ladder, const double *grid, int64_t coarse_count,
                           double largest, const int32_t *edges) {
    int64_t best = MARGIN;
    for (int64_t step = COARSE; step; step /= MIDDLE) {
        const bool is_first = step == COARSE;
        const int64_t first = is_first ? best : best - MIDDLE * step, count = is_first ? coarse_count : 2 * MIDDLE + 1;
        double smallest = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t entry = first + i * step;
            if (is_first && grid[entry] > 8 * largest) break;
            int32_t found[64];
            const int32_t *places = edges ? edges + ladder.padded * entry : found;
            const double scale = ladder.base * grid[entry];
            if (!edges) ladder.find_edges(scale, found);
            const double error = ladder.measure(below, places).error(scale);
            if (i == 0 || error < smallest) smallest = error, best = entry;
        }
    }
    return ladder.base * grid[best];
}

template <int BITS>
float polish_scale(const float *row, const lrq_matrix &m, const Levels<BITS> &levels, float scale) {
    float best = scale;
    double smallest = __builtin_inf();
    for (int i = 0; i <= POLISHES; ++i) {
        const Moments sums = measure_codes<BITS>(row, m, levels, scale);
        const double error = sums.error(scale);
        if (error < smallest) best = scale, smallest = error;
        if (sums.product > 0) scale = static_cast<float>(sums.product / (sums.square > 0 ? sums.square : 1));
    }
    return best;
}

template <int BITS>
void fit_scales_of(const lrq_matrix &m, const int8_t *table, int64_t table_rows, const double *grid,
                   int64_t coarse_count, int threads, float *row_scale) {
    constexpr int count = 1 << BITS;
    const Ladder shared(table, count);
    const Levels<BITS> shared_levels(table);
    const int64_t entries = (coarse_count - 1) * COARSE + 2 * MARGIN + 1;
    int32_t *edges = nullptr;
    if (table_rows == 1) {
        edges = static_cast<int32_t *>(scratch(SLOT_SHARED, sizeof(int32_t) * shared.padded * entries));
        for (int64_t i = 0; i < entries; ++i) shared.find_edges(shared.base * grid[i], edges + shared.padded * i);
    }
    parallel_for(threads, m.rows, [&](int64_t i) {
        f64x2 *below = static_cast<f64x2 *>(scratch(SLOT_SUMS, sizeof(f64x2) * (2 * BINS + 4)));
        const float *row = m.weight + i * m.columns;
        const Ladder ladder = edges ? shared : Ladder(table + i * count, count);
        const Levels<BITS> levels = edges ? shared_levels : Levels<BITS>(table + i * count);
        const RowStatistics s = measure_row(row, m.columns);
        clear(below, 2 * BINS + 1);
        count_row(row, m, s.inverse, 1, below + 1);
        accumulate(below + 1);
        const double largest = s.highest > -s.lowest ? s.highest : -s.lowest;
        const double scale = search_scale(below, ladder, grid, coarse_count, largest > 1 ? largest : 1, edges);
        row_scale[i] = polish_scale<BITS>(row, m, levels, static_cast<float>(scale * s.root_mean_square));
    });
}

inline void fit_scales(const lrq_matrix &m, const int8_t *table, int64_t table_rows, int bits, const double *grid,
                       int64_t coarse_count, int threads, float *row_scale) {
    with_bits(bits, [&](auto b) LRQ_LAMBDA {
        if constexpr (b < 8) fit_scales_of<b>(m, table, table_rows, grid, coarse_count, threads, row_scale);
    });
}

inline void encode(const lrq_matrix &m, const int8_t *table, int64_t table_rows, int bits, const float *row_scale,
                   int threads, uint8_t *codes) {
    const int64_t rows_per_task = ceil_div(1 << 14, m.columns);
    parallel_for(threads, ceil_div(m.rows, rows_per_task), [&](int64_t task) {
        with_bits(bits, [&](auto b) LRQ_LAMBDA {
            Levels<b> levels(table);
            for (int64_t i = task * rows_per_task; i < least((task + 1) * rows_per_task, m.rows); ++i) {
                if (table_rows > 1) levels = Levels<b>(table + (i << b));
                const f32x16 divisor = splat16(row_scale[i] == 0 ? 1 : row_scale[i]);
                uint8_t *out = codes + i * m.columns;
                for_sixteens(m.weight + i * m.columns, m.columns, [&](int64_t k, const float *values, auto n) LRQ_LAMBDA {
                    const i32x16 found = levels.find(load<f32x16>(values) / divisor);
                    const u8x16 bytes = __builtin_convertvector(found, u8x16);
                    __builtin_memcpy(out + k, &bytes, n);
                });
            }
        });
    });
}

// Bit j of the result is bit `bit` of byte j.
LRQ_INLINE uint16_t gather_bits(u8x16 codes, int bit) {
    const u64x2 bits = ((u64x2)codes >> bit & 0x0101010101010101) * 0x0102040810204080 >> 56;
    return static_cast<uint16_t>(bits[0] | bits[1] << 8);
}

// Packs the bits `bit` and `bit` + 1 of the codes of four channels, two bits a channel.
LRQ_INLINE u8x16 pack_pairs(const u8x16 *lane, int bit) {
    u8x16 packed = {};
    unroll<4>([&](auto p) LRQ_LAMBDA { packed |= (lane[p] >> bit & 3) << (2 * p); });
    return packed;
}

// Packs codes into tiles; *used becomes the bitwise or of all codes.
inline void pack(const uint8_t *codes, int64_t rows, int64_t columns, int bits, int threads, uint8_t *packed,
                 uint8_t *used) {
    const int64_t tiles = ceil_div(columns, 16), tile_bytes = 32 * bits;
    *used = 0;
    parallel_for(threads, ceil_div(rows, 16), [&](int64_t tile_row) {
        const int64_t count = least(16, rows - 16 * tile_row);
        u8x16 all = {};
        for (int64_t t = 0; t < tiles; ++t) {
            const uint8_t *from = codes + 16 * tile_row * columns + 16 * t;
            uint8_t *out = packed + (tile_row * tiles + t) * tile_bytes;
            const int64_t width = least(16, columns - 16 * t);
            u8x16 r[16] = {};
            if (count == 16 && width == 16)
                unroll<16>([&](auto i) LRQ_LAMBDA { r[i] = load<u8x16>(from + i * columns); });
            else
                for (int64_t i = 0; i < count; ++i) __builtin_memcpy(&r[i], from + i * columns, width);
            unroll<16>([&](auto i) LRQ_LAMBDA { all |= r[i]; });
            unroll<4>([&](auto j) LRQ_LAMBDA {
                const u8x16 *lane = r + 4 * j;
                if (bits == 8) {
                    unroll<4>([&](auto p) LRQ_LAMBDA { store(out + 64 * p + 16 * j, lane[p]); });
                } else if (bits >= 4) {
                    store(out + 16 * j, (lane[0] & 15) | lane[1] << 4);
                    store(out + 64 + 16 * j, (lane[2] & 15) | lane[3] << 4);
                    if (bits == 6) store(out + 128 + 16 * j, pack_pairs(lane, 4));
                } else {
                    store(out + 16 * j, pack_pairs(lane, 0));
                }
                if (bits & 1)
                    unroll<4>([&](auto p) LRQ_LAMBDA {
                        store(out + 32 * (bits - 1) + 8 * p + 2 * j, gather_bits(lane[p], bits - 1));
                    });
            });
        }
        uint8_t some = 0;
        for (int i = 0; i < 16; ++i) some |= all[i];
        __atomic_fetch_or(used, some, __ATOMIC_RELAXED);
    });
}

}  // namespace LRQ_ISA
}  // namespace lrq
