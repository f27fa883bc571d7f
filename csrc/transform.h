// The prologue: centre, smooth, rotate, clip, round, token by token.
//
// A Kronecker product is applied factor by factor: for a factor of order n, n vectors that lie `inner` entries apart go
// through one butterfly. Where the innermost factor is a power of two of 8 or more, each row is transformed by itself, and
// 8 to 128 neighbouring entries are mixed inside registers. Otherwise 8 rows are transformed side by side: then each entry
// is a vector of 8, whatever the width.
#pragma once

#include "decode.h"
#include "kernels.h"
#include "vectors.h"

namespace lrq {
namespace LRQ_ISA {

// Column j of Paley's matrix: bit i is set where entry (i, j) is -1.
constexpr uint32_t SIGNS_12[12] = {0xffe, 0xb88, 0x712, 0xe24, 0xc4a, 0x896, 0x12e, 0x25c, 0x4b8, 0x970, 0x2e2, 0x5c4};
constexpr uint32_t SIGNS_20[20] = {0xffffe, 0x9ea18, 0x3d432, 0x7a864, 0xf50c8, 0xea192, 0xd4326,
                                   0xa864e, 0x50c9e, 0xa193c, 0x4327a, 0x864f4, 0x0c9ea, 0x193d4,
                                   0x327a8, 0x64f50, 0xc9ea0, 0x93d42, 0x27a86, 0x4f50c};
constexpr uint32_t SIGNS_28[28] = {
    0xffffffe, 0xb5c8878, 0x6f13072, 0xdaa4474, 0xaec53c0, 0x7998790, 0xd722ba0, 0x76a920e, 0xcdc248e, 0xbb1490e,
    0x910f2d6, 0x260e5bc, 0x488eb6a, 0x8a782ba, 0x30f21e6, 0x457435c, 0x5241dda, 0x8491f36, 0x2921eec, 0x1e5ae44,
    0x1cb7898, 0x1d6d522, 0xf057628, 0xe43ccc2, 0xe86b914, 0x83bb548, 0x23e6e12, 0x43dd8a4};

template <int N> constexpr uint32_t paley_column(int j) {
#define LRQ_COLUMN(order) N == order ? SIGNS_##order[j] :
    return LRQ_BUTTERFLIES(LRQ_COLUMN) 0;
#undef LRQ_COLUMN
}

// N vectors get(i) -> put(j, vector). An order of LRQ_BUTTERFLIES: all signed sums of groups of G entries once (the method
// of four Russians), then each output is N / G of them. Other N are powers of two.
template <class V, int N, class Get, class Put> LRQ_INLINE void butterfly(Get &&get, Put &&put) {
    V v[N];
    unroll<N>([&](auto i) LRQ_LAMBDA { v[i] = get(i); });
    if constexpr ((N & (N - 1)) == 0) {
        butterfly_power<V, N>(v);
        unroll<N>([&](auto i) LRQ_LAMBDA { put(i, v[i]); });
    } else {
        constexpr int G = N == 12 ? 3 : 4, HALF = 1 << (G - 1);
        V sums[N / G][HALF];
        unroll<N / G>([&](auto g) LRQ_LAMBDA {
            const V *u = v + g * G;
            V *s = sums[g];
            const V plus = u[0] + u[1], minus = subtract(u[0], u[1]);
            if constexpr (G == 3) {
                s[0] = plus + u[2], s[1] = minus + u[2], s[2] = subtract(plus, u[2]), s[3] = subtract(minus, u[2]);
            } else {
                const V same = u[2] + u[3], other = subtract(u[2], u[3]);
                s[0] = plus + same, s[1] = minus + same, s[2] = subtract(plus, other), s[3] = subtract(minus, other);
                s[4] = plus + other, s[5] = minus + other, s[6] = subtract(plus, same), s[7] = subtract(minus, same);
            }
        });
        unroll<N>([&](auto j) LRQ_LAMBDA {
            V y = {};
            unroll<N / G>([&](auto g) LRQ_LAMBDA {
                constexpr uint32_t bits = paley_column<N>(j) >> (g * G) & (2 * HALF - 1);
                constexpr bool is_negative = bits & 1;
                constexpr uint32_t pattern = (is_negative ? ~bits & (2 * HALF - 1) : bits) >> 1;
                if constexpr (g == 0)
                    y = is_negative ? -sums[g][pattern] : sums[g][pattern];
                else
                    y = is_negative ? subtract(y, sums[g][pattern]) : y + sums[g][pattern];
            });
            put(j, y);
        });
    }
}

// Calls body(order) with an order that has a butterfly as a compile-time constant.
template <class Body> LRQ_INLINE void with_order(int64_t order, Body &&body) {
    switch (order) {
        case 2: return body(std::integral_constant<int, 2>{});
        case 4: return body(std::integral_constant<int, 4>{});
        case 8: return body(std::integral_constant<int, 8>{});
#define LRQ_CASE(order) \
    case order: return body(std::integral_constant<int, order>{});
        LRQ_BUTTERFLIES(LRQ_CASE)
#undef LRQ_CASE
        default: return;  // refused before
    }
}

struct Axis {
    int64_t order, inner;
    const float *matrix;  // nullptr for a butterfly
};

constexpr int64_t MAX_TAIL = 128;

// One Kronecker product over `covered` entries of a row: its axes, innermost first, and behind them `tail` neighbours that
// one pass mixes in registers.
struct Product {
    Axis axes[64];
    int count = 0;
    int64_t tail = 1;
    int64_t covered = 1;
    float norm = 1;  // of the butterflies
};

LRQ_INLINE bool is_power_of_two(int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

// lanes: 1 for a row by itself, 8 for rows side by side.
inline Product plan(const lrq_transform &t, int lanes) {
    Product p;
    int64_t inner = lanes, power = 1;
    double butterflies = 1;
    const auto add = [&](int64_t order, const float *matrix) {
        p.axes[p.count++] = {order, inner, matrix};
        inner *= order;
    };
    const auto add_power = [&](int64_t order) {
        for (; order > 1; order /= least(order, 8)) add(least(order, 8), nullptr);
    };
    const auto close_power = [&] {  // neighbouring powers of two are one
        if (lanes == 1 && inner == 1 && power >= 8) {
            p.tail = least(power, MAX_TAIL);
            inner = p.tail;
            power /= p.tail;
        }
        add_power(power);
        power = 1;
    };
    for (int64_t i = t.factor_count - 1; i >= 0; --i) {
        const int64_t order = t.factors[i];
        p.covered *= order < 0 ? -order : order;
        if (is_power_of_two(order)) {
            power *= order;
            butterflies *= static_cast<double>(order);
            continue;
        }
        close_power();
        const float *matrix = t.matrices ? t.matrices[i] : nullptr;
        if (!matrix) butterflies *= static_cast<double>(order);
        add(order < 0 ? -order : order, matrix);
    }
    close_power();
    p.norm = static_cast<float>(1 / __builtin_sqrt(butterflies));
    return p;
}

template <class V, int N> LRQ_INLINE void apply_butterflies(float *x, int64_t outer, int64_t inner) {
    for (int64_t o = 0; o < outer; ++o)
        for (int64_t i = 0; i < inner; i += sizeof(V) / 4) {
            float *first = x + o * N * inner + i;
            butterfly<V, N>([&](auto m) LRQ_LAMBDA { return load<V>(first + m * inner); },
                            [&](auto m, V v) LRQ_LAMBDA { store(first + m * inner, v); });
        }
}

// A dense orthogonal matrix: y[j] = sum_m x[m] matrix[m, j].
inline void apply_matrix(float *x, int64_t outer, const Axis &axis) {
    constexpr int lanes = WIDTH < 8 ? WIDTH : 8;  // inner is a multiple of 8
    const int64_t order = axis.order, inner = axis.inner;
    float *copy = static_cast<float *>(scratch(SLOT_PARTIAL, sizeof(float) * (lanes * order + WIDTH)));
    for (int64_t o = 0; o < outer; ++o) {
        for (int64_t i = 0; i < inner; i += lanes) {
            float *column = x + o * order * inner + i;
            for (int64_t m = 0; m < order; ++m) __builtin_memcpy(copy + lanes * m, column + m * inner, 4 * lanes);
            for (int64_t j = 0; j < order; j += 4) {
                Floats y[4] = {};
                const int64_t count = least(4, order - j);
                for (int64_t m = 0; m < order; ++m) {
                    const Floats v = load<Floats>(copy + lanes * m);
                    const float *row = axis.matrix + m * order + j;
                    if (count == 4)
                        unroll<4>([&](auto c) LRQ_LAMBDA { y[c] = fma(v, splat(row[c]), y[c]); });
                    else
                        for (int64_t c = 0; c < count; ++c) y[c] = fma(v, splat(row[c]), y[c]);
                }
                for (int64_t c = 0; c < count; ++c) __builtin_memcpy(column + (j + c) * inner, &y[c], 4 * lanes);
            }
        }
    }
}

// The first `count` axes over x, the outermost first.
inline void apply_axes(float *x, const Product &p, int count, int64_t floats) {
    for (int a = count - 1; a >= 0; --a) {
        const Axis &axis = p.axes[a];
        const int64_t inner = axis.inner, outer = floats / (axis.order * inner);
        if (axis.matrix)
            apply_matrix(x, outer, axis);
        else
            with_order(axis.order, [&](auto n) LRQ_LAMBDA {
                if (inner % WIDTH)
                    apply_butterflies<f32x8, n>(x, outer, inner);
                else
                    apply_butterflies<Floats, n>(x, outer, inner);
            });
    }
}

// One stage of the butterfly of neighbours inside a register: entries STRIDE apart.
template <int STRIDE> LRQ_INLINE Floats mix_stage(Floats v) {
#define LRQ_SIGN(i) ((i) & STRIDE ? -1.0f : 1.0f)
#define LRQ_FOUR(at, i) at(i), at(i + 1), at(i + 2), at(i + 3)
#define LRQ_OTHER(i) ((i) ^ STRIDE)
#if defined(__AVX512F__)
#define LRQ_ALL(at) LRQ_FOUR(at, 0), LRQ_FOUR(at, 4), LRQ_FOUR(at, 8), LRQ_FOUR(at, 12)
#elif defined(__AVX2__)
#define LRQ_ALL(at) LRQ_FOUR(at, 0), LRQ_FOUR(at, 4)
#else
#define LRQ_ALL(at) LRQ_FOUR(at, 0)
#endif
#if defined(__clang__)
    const Floats other = __builtin_shufflevector(v, v, LRQ_ALL(LRQ_OTHER));
#else
    const Floats other = __builtin_shuffle(v, Ints{LRQ_ALL(LRQ_OTHER)});
#endif
    return fma(v, Floats{LRQ_ALL(LRQ_SIGN)}, other);
#undef LRQ_ALL
#undef LRQ_OTHER
#undef LRQ_FOUR
#undef LRQ_SIGN
}

template <int LIMIT, int STRIDE = 1> LRQ_INLINE Floats mix_register(Floats v) {
    if constexpr (STRIDE < LIMIT)
        return mix_register<LIMIT, 2 * STRIDE>(mix_stage<STRIDE>(v));
    else
        return v;
}

// A transform made ready for one call.
struct Ready {
    const lrq_transform *t;
    bool is_side_by_side;
    int64_t padded;               // width rounded up to 16
    const float *offset, *scale;  // (padded), or nullptr; no scale without an offset
    bool is_whole;                // the product covers the row, else two of them overlap
    Product product;
    const float *block1, *block2; // (block, block rounded up to 16)
};

inline const float *pad_block(float *&memory, const float *block, int64_t order) {
    const int64_t padded = round_up(order, 16);
    float *out = memory;
    memory += order * padded;
    for (int64_t i = 0; i < order; ++i)
        for (int64_t j = 0; j < padded; ++j) out[i * padded + j] = j < order ? block[i * order + j] : 0;
    return out;
}

// Sub-rows (order) of x times the block -> y; both contiguous.
inline void multiply_blocks(const float *x, float *y, int64_t rows, int64_t order, const float *block) {
    const int64_t padded = round_up(order, 16);
    for (int64_t j = 0; j < padded; j += 2 * WIDTH) {
        const int64_t second = j + WIDTH < padded ? j + WIDTH : j;
        for (int64_t r = 0; r < rows; r += 4) {
            const int64_t count = least(4, rows - r);
            Floats sums[4][2] = {};
            const float *rows_of[4];
            for (int i = 0; i < 4; ++i) rows_of[i] = x + (r + least(i, count - 1)) * order;
            for (int64_t k = 0; k < order; ++k) {
                const Floats b0 = load<Floats>(block + k * padded + j), b1 = load<Floats>(block + k * padded + second);
                unroll<4>([&](auto i) LRQ_LAMBDA {
                    const Floats v = splat(rows_of[i][k]);
                    sums[i][0] = fma(v, b0, sums[i][0]);
                    sums[i][1] = fma(v, b1, sums[i][1]);
                });
            }
            for (int64_t i = 0; i < count; ++i)
                for (int64_t part = 0; part < 2; ++part) {
                    const int64_t start = part ? second : j, room = order - start;
                    if (room > 0) __builtin_memcpy(y + (r + i) * order + start, &sums[i][part], 4 * least(WIDTH, room));
                }
        }
    }
}

// Makes a transform ready; its memory is `slot`'s, and the transform must outlive it.
inline Ready make_ready(const lrq_transform &t, Slot slot = SLOT_SHARED) {
    Ready r{};
    r.t = &t;
    r.padded = round_up(t.width, 16);
    const int64_t order = t.rotation == LRQ_OUTLIER ? t.factors[0] : 0;
    const int64_t floats = 2 * r.padded + 2 * order * round_up(order, 16);
    float *memory = static_cast<float *>(scratch(slot, sizeof(float) * floats));
    if (t.rotation == LRQ_HADAMARD || t.rotation == LRQ_BLOCK_HADAMARD) {
        r.product = plan(t, 1);
        // One product over the whole row, or a Hadamard matrix in each block, which is the same with outer copies.
        r.is_whole = t.rotation == LRQ_BLOCK_HADAMARD || r.product.covered == t.width;
        r.is_side_by_side = !r.is_whole || r.product.tail == 1 || t.width % 16;
        if (r.is_side_by_side) r.product = plan(t, 8);
    }
    const float norm = r.is_whole ? r.product.norm : 1;
    const bool is_scaled = t.scale || t.rotation == LRQ_HADAMARD || t.rotation == LRQ_BLOCK_HADAMARD;
    if (t.offset || is_scaled) {
        float *offset = memory, *scale = memory + r.padded;
        memory += 2 * r.padded;
        for (int64_t k = 0; k < t.width; k += WIDTH) {
            store(offset + k, t.offset ? load_as<LRQ_FLOAT16>(t.offset, k, t.width - k) : Floats{});
            store(scale + k, t.scale ? load_as<LRQ_FLOAT16>(t.scale, k, t.width - k) * norm : splat(norm));
        }
        r.offset = offset, r.scale = is_scaled ? scale : nullptr;
    }
    if (t.rotation == LRQ_OUTLIER) {
        r.block1 = pad_block(memory, t.block1, order);
        r.block2 = pad_block(memory, t.block2, order);
    }
    return r;
}

LRQ_INLINE Ints magnitude(Floats v) { return (Ints)v & 0x7fffffff; }

// What a row is read from. These are copies, because for the compiler a store could change what Ready holds.
struct Source {
    const void *x;
    int64_t start;
    const float *offset, *scale;

    Source(const Ready &r, int64_t row) : x(r.t->x), start(row * r.t->width), offset(r.offset), scale(r.scale) {}

    // WIDTH centred entries from k, count of them read; and smoothed ones
    template <int TYPE> LRQ_INLINE Floats load_centred(int64_t k, int64_t count = WIDTH) const {
        return load_as<TYPE>(x, start + k, count) - load<Floats>(offset + k);
    }
    template <int TYPE> LRQ_INLINE Floats load_smoothed(int64_t k, int64_t count = WIDTH) const {
        return load_centred<TYPE>(k, count) * load<Floats>(scale + k);
    }
};

// ((x - offset) * scale) of entries [from, to) of one row -> float32 (padded), zeros behind the width. Returns the largest
// magnitudes as integers, which order like the floats, with NaN above all.
inline Ints load_entries(const Ready &r, int64_t row, int64_t from, int64_t to, float *out) {
    const Source source(r, row);
    Ints largest = {};
    with_type(r.t->x_type, [&](auto type) LRQ_LAMBDA {
        const auto keep = [&](int64_t k, Floats v) LRQ_LAMBDA {
            largest = greater(largest, magnitude(v));
            store(out + k, v);
        };
        const auto keep_all = [&](auto &&read) LRQ_LAMBDA {
            int64_t k = from;
            for (; k + WIDTH <= to; k += WIDTH) keep(k, read(k, WIDTH));
            if (k == to) return;
            Floats v = read(k, to - k);
            for (int64_t i = to - k; i < WIDTH; ++i) v[i] = 0;
            keep(k, v);
        };
        if (source.scale)
            keep_all([&](int64_t k, int64_t count) LRQ_LAMBDA { return source.load_smoothed<type>(k, count); });
        else if (source.offset)
            keep_all([&](int64_t k, int64_t count) LRQ_LAMBDA { return source.load_centred<type>(k, count); });
        else
            keep_all([&](int64_t k, int64_t count) LRQ_LAMBDA {
                return load_as<type>(source.x, source.start + k, count);
            });
        for (int64_t k = round_up(to, WIDTH); to == r.t->width && k < r.padded; k += WIDTH) store(out + k, Floats{});
    });
    return largest;
}

inline Ints load_row(const Ready &r, int64_t row, float *out) { return load_entries(r, row, 0, r.t->width, out); }

// load_row and the butterfly of the outermost axis in one pass.
inline void load_row_through(const Ready &r, const Axis &axis, int64_t row, float *out) {
    const int64_t inner = axis.inner, block = axis.order * inner, width = r.t->width;
    const Source from(r, row);
    with_type(r.t->x_type, [&](auto type) LRQ_LAMBDA {
        with_order(axis.order, [&](auto n) LRQ_LAMBDA {
            for (int64_t first = 0; first < width; first += block)
                for (int64_t k = first; k < first + inner; k += WIDTH)
                    butterfly<Floats, n>([&](auto m) LRQ_LAMBDA { return from.load_smoothed<type>(k + m * inner); },
                                         [&](auto m, Floats v) LRQ_LAMBDA { store(out + k + m * inner, v); });
        });
    });
}

// The butterflies of TAIL neighbours; returns the largest magnitudes. `next`, `bytes` an entry, is fetched on the way.
template <int TAIL> LRQ_INLINE Ints mix_tail(float *x, int64_t width, const char *next, int64_t bytes) {
    constexpr int vectors = TAIL > WIDTH ? TAIL / WIDTH : 1;
    Ints largest = {};
    for (int64_t k = 0; k < width; k += WIDTH * vectors) {
        for (int64_t b = 0; b < WIDTH * vectors * bytes; b += 64) __builtin_prefetch(next + k * bytes + b, 0, 2);
        Floats v[vectors];
        unroll<vectors>([&](auto i) LRQ_LAMBDA {
            v[i] = mix_register<TAIL < WIDTH ? TAIL : WIDTH>(load<Floats>(x + k + WIDTH * i));
        });
        butterfly_power<Floats, vectors>(v);
        unroll<vectors>([&](auto i) LRQ_LAMBDA {
            largest = greater(largest, magnitude(v[i]));
            store(x + k + WIDTH * i, v[i]);
        });
    }
    return largest;
}

// All of a rotated row that is worked on by itself; returns the largest magnitudes.
inline Ints rotate_row(const Ready &r, int64_t row, float *out) {
    const Product &p = r.product;
    const int64_t width = r.t->width, bytes = r.t->x_type == LRQ_FLOAT32 ? 4 : 2;
    const char *next = static_cast<const char *>(r.t->x) + least(row + 1, r.t->rows - 1) * width * bytes;
    int count = p.count;
    if (count && !p.axes[count - 1].matrix && p.axes[count - 1].inner % WIDTH == 0)
        load_row_through(r, p.axes[--count], row, out);
    else
        load_row(r, row, out);
    apply_axes(out, p, count, width);
    switch (p.tail) {
        case 8: return mix_tail<8>(out, width, next, bytes);
        case 16: return mix_tail<16>(out, width, next, bytes);
        case 32: return mix_tail<32>(out, width, next, bytes);
        case 64: return mix_tail<64>(out, width, next, bytes);
        default: return mix_tail<128>(out, width, next, bytes);
    }
}

// Rows side by side: rows (count, padded) -> (width, 8) -> products -> back.
inline void rotate_side_by_side(const Ready &r, float *rows, int64_t count, float *columns) {
    const int64_t width = r.t->width, covered = r.product.covered;
    for (int64_t k = 0; k < width; ++k)
        for (int64_t i = 0; i < 8; ++i) columns[8 * k + i] = i < count ? rows[i * r.padded + k] : 0;
    if (r.is_whole) {
        apply_axes(columns, r.product, r.product.count, 8 * width);
    } else {
        // Two overlapping products, with signs in between so that the second does not undo the first.
        apply_axes(columns, r.product, r.product.count, 8 * covered);
        for (int64_t k = 0; k < width; ++k) {
            const float sign = (k * k * 40503 >> 15 & 1) ? -1.0f : 1.0f, norm = r.product.norm;
            const float factor = sign * (k < covered ? norm : 1) * (k < width - covered ? 1 : norm);
            for (int64_t i = 0; i < 8; ++i) columns[8 * k + i] *= factor;
        }
        apply_axes(columns + 8 * (width - covered), r.product, r.product.count, 8 * covered);
    }
    for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < width; ++k) rows[i * r.padded + k] = columns[8 * k + i];
}

constexpr int64_t ROWS_PER_TASK = 8;

LRQ_INLINE Ints largest_of(const float *row, int64_t width) {
    Ints largest = {};
    for (int64_t k = 0; k < width; k += WIDTH) largest = greater(largest, magnitude(load<Floats>(row + k)));
    return largest;
}

// Calls finish(row index, float32 row with zeros behind the width, its largest magnitudes) for up to 8 transformed rows.
template <class Finish> LRQ_INLINE void transform_rows(const Ready &r, int64_t first, int64_t count, Finish &&finish) {
    const int64_t width = r.t->width;
    const bool is_plain = r.t->rotation == LRQ_NONE;
    // One row stays in the first cache, so do offsets and scales; where they do not, some rows share what is there of them.
    const int64_t shared = width <= 2048 ? 1 : least(ROWS_PER_TASK, greatest((36 << 10) / width, 1));
    const int64_t held = r.is_side_by_side ? ROWS_PER_TASK : is_plain ? shared : 1, stride = r.padded + 16;
    float *rows = static_cast<float *>(scratch(SLOT_ROWS, sizeof(float) * (2 * held * stride + 64)));
    float *spare = rows + held * stride;
    if (r.is_side_by_side) {
        for (int64_t i = 0; i < count; ++i) load_row(r, first + i, rows + i * r.padded);
        rotate_side_by_side(r, rows, count, spare);
        for (int64_t i = 0; i < count; ++i)
            finish(first + i, rows + i * r.padded, largest_of(rows + i * r.padded, width));
        return;
    }
    for (int64_t batch = 0; is_plain && batch < count; batch += held) {
        const int64_t batch_rows = least(held, count - batch), some = held > 1 ? 1024 : width;
        Ints largest[ROWS_PER_TASK] = {};
        for (int64_t k = 0; k < width; k += some)
            for (int64_t i = 0; i < batch_rows; ++i) {
                const Ints found =
                    load_entries(r, first + batch + i, k, least(k + some, width), rows + i * stride);
                largest[i] = greater(largest[i], found);
            }
        for (int64_t i = 0; i < batch_rows; ++i) finish(first + batch + i, rows + i * stride, largest[i]);
    }
    if (is_plain) return;
    for (int64_t i = first; i < first + count; ++i) {
        if (r.t->rotation == LRQ_OUTLIER) {
            const int64_t order = r.t->factors[0];
            load_row(r, i, rows);
            multiply_blocks(rows, spare, width / order, order, r.block1);
            for (int64_t k = 0; k < width; ++k) rows[k] = spare[r.t->permutation[k]];
            multiply_blocks(rows, spare, width / order, order, r.block2);
            __builtin_memcpy(rows, spare, sizeof(float) * width);
            finish(i, rows, largest_of(rows, width));
        } else {
            const Ints largest = rotate_row(r, i, rows);
            finish(i, rows, largest);
        }
    }
}

inline void apply_transform(const lrq_transform &t, int threads, float *out) {
    const Ready r = make_ready(t);
    parallel_for(threads, ceil_div(t.rows, ROWS_PER_TASK), [&](int64_t task) {
        const int64_t first = task * ROWS_PER_TASK;
        transform_rows(r, first, least(ROWS_PER_TASK, t.rows - first), [&](int64_t i, const float *row, Ints) {
            __builtin_memcpy(out + i * t.width, row, sizeof(float) * t.width);
        });
    });
}

// Looks codes up in vectors, where the lookup is odd and has at most one step in every 16 magnitudes.
struct Staircase {
    alignas(16) uint8_t low[16], high[16], step[16];  // by magnitude / 16: levels before and from the step, its place
    alignas(64) int8_t levels[128];                   // by magnitude

    LRQ_INLINE i8x16 climb(i8x16 code) const {
        const i8x16 is_negative = code < 0;
        const i8x16 magnitude = (code ^ is_negative) - is_negative, block = magnitude >> 4 & 15;
        const i8x16 is_low = (magnitude & 15) < look_up(load<u8x16>(step), block);
        const i8x16 level = (look_up(load<u8x16>(low), block) & is_low) | (look_up(load<u8x16>(high), block) & ~is_low);
        return (level ^ is_negative) - is_negative;
    }
#if defined(__AVX512BW__)
    // codes of -127 or more
    LRQ_INLINE i8x64 climb(i8x64 code) const {
        const __m512i magnitude = _mm512_abs_epi8((__m512i)code);
#if defined(__AVX512VBMI__)
        const __m512i level = _mm512_permutex2var_epi8(_mm512_load_si512(levels), magnitude, _mm512_load_si512(levels + 64));
#else
        const auto wide = [](const uint8_t *table) LRQ_LAMBDA {
            return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i *>(table)));
        };
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i block = _mm512_and_si512(_mm512_srli_epi16(magnitude, 4), nibble);
        const __mmask64 is_low = _mm512_cmplt_epu8_mask(_mm512_and_si512(magnitude, nibble),
                                                        _mm512_shuffle_epi8(wide(step), block));
        const __m512i level =
            _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(wide(high), block), is_low, wide(low), block);
#endif
        return (i8x64)_mm512_mask_sub_epi8(level, _mm512_movepi8_mask((__m512i)code), _mm512_setzero_si512(), level);
    }
#endif
};

inline bool build_staircase(const int8_t *lookup, Staircase &s) {
    for (int m = 1; m < 128; ++m)
        if (lookup[128 - m] != -lookup[128 + m]) return false;
    if (lookup[0] != lookup[1]) return false;
    __builtin_memcpy(s.levels, lookup + 128, sizeof s.levels);
    for (int block = 0; block < 16; ++block) {
        const int8_t *levels = lookup + 128 + 16 * (block < 8 ? block : 7);  // -128 counts as -127
        int step = 0;
        while (step < 16 && levels[step] == levels[0]) ++step;
        for (int i = step; i < 16; ++i)
            if (levels[i] != levels[15]) return false;
        s.low[block] = static_cast<uint8_t>(block < 8 ? levels[0] : levels[15]);
        s.high[block] = static_cast<uint8_t>(levels[15]), s.step[block] = static_cast<uint8_t>(step);
    }
    return true;
}

#if defined(__AVX512BW__)
// Four registers of integers, saturated to bytes.
LRQ_INLINE i8x64 saturate(const Ints (&v)[4]) {
    const __m512i low = _mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]);
    const __m512i high = _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3]);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (i8x64)_mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));  // packs work lane by lane
}
#endif

LRQ_INLINE Ints round_entries(const float *row, Floats inverse) {
    const Floats v = load<Floats>(row) * inverse;
#if defined(__AVX512F__)
    return (Ints)_mm512_cvt_roundps_epi32((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the integer, rounded half to even
    return (Ints)(v + magic) - 0x4b400000;
#endif
}

#if defined(__AVX512BW__)
// Makes codes of 64 entries; stairs, if not nullptr, replaces each code.
LRQ_INLINE i8x64 quantize_entries(const float *row, Floats inverse, int bits, const Staircase *stairs) {
    const Ints v[4] = {round_entries(row, inverse), round_entries(row + 16, inverse), round_entries(row + 32, inverse),
                       round_entries(row + 48, inverse)};
    const int most = (1 << (bits - 1)) - 1;
    const __m512i code = _mm512_min_epi8((__m512i)saturate(v), _mm512_set1_epi8(static_cast<char>(most)));
    const int least = stairs ? -most : -most - 1;  // -128 has -127's level
    const i8x64 clamped = (i8x64)_mm512_max_epi8(code, _mm512_set1_epi8(static_cast<char>(least)));
    return stairs ? stairs->climb(clamped) : clamped;
}
#endif

// Makes codes of one row (zeros follow it) with the given largest magnitudes, and returns its step. A row that is not
// finite has a step that is not finite either, and zeros for codes.
LRQ_INLINE float quantize_row(const float *row, Ints largest, int64_t width, int bits, float clip_over_largest,
                              const Staircase *stairs, int8_t *codes) {
    int32_t top = 0;
    for (int i = 0; i < WIDTH; ++i) top = largest[i] > top ? largest[i] : top;
    float absmax;
    __builtin_memcpy(&absmax, &top, 4);
    const float step = absmax * clip_over_largest;
    if (!(step <= 3.40282347e38f)) {
        __builtin_memset(codes, 0, width);
        return step;
    }
    const Floats inverse = splat(step > 1.17549435e-38f ? 1.0f / step : 0.0f);
    int64_t k = 0;
#if defined(__AVX512BW__)
    if (stairs)
        for (; k + 64 <= width; k += 64) store(codes + k, quantize_entries(row + k, inverse, bits, stairs));
    else
        for (; k + 64 <= width; k += 64) store(codes + k, quantize_entries(row + k, inverse, bits, nullptr));
#endif
    const int64_t rest = k;
    const Ints high = (1 << (bits - 1)) - 1 - (Ints){}, low = -1 - high;
    const auto quantize = [&](int64_t k) LRQ_LAMBDA {
        const Ints code = round_entries(row + k, inverse);
        return bits == 8 ? saturate(code) : narrow(lesser(greater(code, low), high));
    };
    for (; k + WIDTH <= width; k += WIDTH) store(codes + k, quantize(k));
    if (k < width) {
        const Bytes last = quantize(k);
        __builtin_memcpy(codes + k, &last, width - k);
    }
    for (k = rest; stairs && k < width; k += 16) {
        i8x16 some = {};
        __builtin_memcpy(&some, codes + k, least(16, width - k));
        some = stairs->climb(some);
        __builtin_memcpy(codes + k, &some, least(16, width - k));
    }
    return step;
}

}  // namespace LRQ_ISA
}  // namespace lrq
