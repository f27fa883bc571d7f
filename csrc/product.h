// y = codes x weights, packed weights decoded into a panel that stays in cache while all tokens pass (a few: few_tokens.h).
//
// Work is cut into (group of output channels) x (chunk of tokens). A thread decodes a group's panel once and reuses it
// for the chunks of that group it is handed. Sums are int32 and exact in any order.
#pragma once

#include "block.h"
#include "rounder.h"

namespace lrq {
namespace LRQ_ISA {

constexpr int64_t BLOCK_CHANNELS = 16 * TILES;
constexpr int64_t SPLIT_BLOCKS = 4;

// y = sum * row_scale * scale + bias for `rows` tokens from `first` and V registers of channels from n, the last
// register in part; sums lie stride apart, and so does what is added, if it is not nullptr.
template <int V, int TYPE, class Value>
LRQ_INLINE void finish_as(const lrq_weight &w, const Value *sums, int64_t stride, const float *added,
                          const float *scale, int64_t first, int64_t rows, int64_t n, void *out) {
    const int64_t width = w.out_features, last = least(WIDTH, width - n - (V - 1) * WIDTH);
    Floats row_scale[V], bias[V];
    unroll<V>([&](auto v) LRQ_LAMBDA {
        const int64_t at = n + v * WIDTH, count = v < V - 1 ? WIDTH : last;
        row_scale[v] = load_as<LRQ_FLOAT32>(w.row_scale, at, count);
        bias[v] = w.bias ? load_as<LRQ_FLOAT32>(w.bias, at, count) : splat(-0.0f);  // adding that changes nothing
    });
    for (int64_t i = 0; i < rows; ++i) {
        Floats y[V];
        unroll<V>([&](auto v) LRQ_LAMBDA {
            const Value *sum = sums + i * stride + v * WIDTH;
            if constexpr (std::is_same<Value, int32_t>::value)
                y[v] = scale_sums(sum, row_scale[v], scale[i], bias[v]);
            else
                y[v] = load<Floats>(sum) * row_scale[v] + bias[v];
            if (added) y[v] = y[v] + load<Floats>(added + i * stride + v * WIDTH);
        });
        const int64_t at = (first + i) * width + n;
        unroll<V - 1>([&](auto v) LRQ_LAMBDA { store_as<TYPE>(out, at + v * WIDTH, y[v], WIDTH); });
        store_as<TYPE>(out, at + (V - 1) * WIDTH, y[V - 1], last);
    }
}

// The same for `channels` from n, up to those that are there.
template <class Value>
LRQ_INLINE void finish_channels(const lrq_weight &w, const Value *sums, int64_t channels, const float *added,
                                const float *scale, int64_t first, int64_t rows, int64_t n, int type, void *out) {
    constexpr int most = BLOCK_CHANNELS / WIDTH;
    const int64_t registers = ceil_div(least(channels, w.out_features - n), WIDTH);
    with_type(type, [&](auto t) LRQ_LAMBDA {
        if (registers == most) return finish_as<most, t>(w, sums, channels, added, scale, first, rows, n, out);
        for (int64_t v = 0; v < registers; ++v)
            finish_as<1, t>(w, sums + v * WIDTH, channels, added ? added + v * WIDTH : nullptr, scale, first, rows,
                            n + v * WIDTH, out);
    });
}

// ROWS tokens (stride bytes apart) times T tiles of channels over `steps` steps -> sums (ROWS, 16 * T), on top of what is
// there, or of one start per token.
template <int ROWS, int T>
inline void multiply_block(const uint8_t *panel, int64_t steps, const uint8_t *tokens, int64_t stride,
                           const int32_t *starts, int32_t *sums, Meanwhile &meanwhile) {
    if constexpr (HAS_BLOCK && ROWS == 8 && T == 3)
        return multiply_8_by_48(panel, steps, tokens, stride, starts, sums, meanwhile);
    constexpr int V = T * 16 / LANES;
    Sums acc[ROWS][V];
    unroll<ROWS>([&](auto m) LRQ_LAMBDA {
        unroll<V>([&](auto v) LRQ_LAMBDA {
            acc[m][v] = starts ? splat_sums(starts[m]) : load<Sums>(sums + (m * V + v) * LANES);
        });
    });
    for (int64_t k = 0; k < steps;) {
        meanwhile.fetch_line();
        for (const int64_t end = least(k + 4, steps); k < end; ++k) {
            unroll<ROWS>([&](auto m) LRQ_LAMBDA {
                const int32_t q = load<int32_t>(tokens + m * stride + 4 * k);
                unroll<V>([&](auto v) LRQ_LAMBDA {
                    acc[m][v] = dot(acc[m][v], panel + v * (LANES * STEP * ELEMENT), q);
                });
            });
            panel += V * LANES * STEP * ELEMENT;
        }
    }
    unroll<ROWS>([&](auto m) LRQ_LAMBDA {
        unroll<V>([&](auto v) LRQ_LAMBDA { store(sums + (m * V + v) * LANES, acc[m][v]); });
    });
}

template <int T>
inline void multiply_rows(int64_t rows, const uint8_t *panel, int64_t steps, const uint8_t *tokens, int64_t stride,
                          const int32_t *starts, int32_t *sums, Meanwhile &meanwhile) {
    switch (rows) {
#define LRQ_CASE(R)                                                                                               \
    case R:                                                                                                       \
        if constexpr (R <= TOKENS) multiply_block<R, T>(panel, steps, tokens, stride, starts, sums, meanwhile);   \
        break;
        LRQ_CASE(1)
        LRQ_CASE(2)
        LRQ_CASE(3)
        LRQ_CASE(4)
        LRQ_CASE(5)
        LRQ_CASE(6)
        LRQ_CASE(7)
        LRQ_CASE(8)
#undef LRQ_CASE
    }
}

inline void multiply(int64_t tiles, int64_t rows, const uint8_t *panel, int64_t steps, const uint8_t *tokens,
                     int64_t stride, const int32_t *starts, int32_t *sums, Meanwhile &meanwhile) {
    switch (tiles) {
        case 1: return multiply_rows<1>(rows, panel, steps, tokens, stride, starts, sums, meanwhile);
        case 2:
            if constexpr (TILES >= 2) multiply_rows<2>(rows, panel, steps, tokens, stride, starts, sums, meanwhile);
            return;
        default:
            if constexpr (TILES >= 3) multiply_rows<3>(rows, panel, steps, tokens, stride, starts, sums, meanwhile);
    }
}

LRQ_INLINE int32_t sum_codes(const int8_t *codes, int64_t count) {
    int32_t total = 0;
    int64_t k = 0;
#if defined(__AVX512VNNI__) && !defined(LRQ_256)
    __m512i sums = _mm512_setzero_si512();
    for (; k + 64 <= count; k += 64) sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(codes + k));
    total = _mm512_reduce_add_epi32(sums);
#endif
    for (; k < count; ++k) total += codes[k];
    return total;
}

// count codes of a token -> steps_width elements of the dot product's type, zeros behind count.
LRQ_INLINE void copy_token(const int8_t *from, int64_t count, int64_t steps_width, uint8_t *to) {
    if constexpr (ELEMENT == 2) {
        int16_t *wide = reinterpret_cast<int16_t *>(to);
        for (int64_t k = 0; k < count; ++k) wide[k] = from[k];
    } else {
        __builtin_memcpy(to, from, count);
    }
    __builtin_memset(to + count * ELEMENT, 0, (steps_width - count) * ELEMENT);
}

struct Shape {
    int64_t steps, blocks, group_blocks, groups, chunk, chunks, split_tiles, splits;
};

inline Shape shape_of(const lrq_weight &w, int64_t rows, int threads) {
    Shape s;
    const int64_t in_tiles = ceil_div(w.in_features, 16);
    constexpr int64_t tile_bytes = BLOCK_CHANNELS * 16 * ELEMENT;  // of a block's panel per input tile
    s.steps = ceil_div(w.in_features, STEP);
    s.blocks = ceil_div(w.out_features, BLOCK_CHANNELS);
    s.group_blocks = PANEL_BYTES / (in_tiles * tile_bytes);
    s.splits = 1;
    if (s.group_blocks < 2) {  // part of the inputs at a time, so that a chunk of tokens serves several blocks
        s.group_blocks = least(SPLIT_BLOCKS, s.blocks);
        s.splits = ceil_div(s.group_blocks * in_tiles * tile_bytes, PANEL_BYTES);
    }
    s.split_tiles = ceil_div(in_tiles, s.splits);
    if (rows <= 8 * TOKENS) s.group_blocks = least(s.group_blocks, ceil_div(s.blocks, 4 * threads));
    s.groups = ceil_div(s.blocks, s.group_blocks);
    if (s.blocks >= threads) s.groups = round_up(s.groups, threads);
    s.group_blocks = ceil_div(s.blocks, s.groups);  // even
    s.groups = ceil_div(s.blocks, s.group_blocks);
    int64_t chunk = ceil_div(rows * s.groups, 24 * threads);
    chunk = chunk < 64 ? 64 : chunk > 512 ? 512 : chunk;
    s.chunk = least(round_up(chunk, TOKENS), rows);
    s.chunks = ceil_div(rows, s.chunk);
    return s;
}

// What a thread's panel holds; a call's number is never used again.
struct PanelKey {
    uint64_t call;
    int64_t group, split;
};

// A chunk of tokens is prepared (rounded, if there is a rounder, and summed) by the thread that comes first, while it
// multiplies; who comes later stays behind.
struct Chunk {
    int32_t is_taken, ready;  // rows
};

// If scratch memory runs out, nobody may wait for the rest of a chunk.
struct Lead {
    int32_t *ready;
    int64_t count;
    ~Lead() { publish(count); }
    void publish(int64_t rows) const {
        if (ready) __atomic_store_n(ready, static_cast<int32_t>(rows), __ATOMIC_RELEASE);
    }
};

inline void quantized_linear_panels(const lrq_weight &w, int64_t rows, const int8_t *codes, const float *scale,
                                    const Rounder *rounder, const lrq_principal *principal, int out_type, int threads,
                                    void *out) {
    const Shape s = shape_of(w, rows, threads);
    const uint64_t call = next_call();
    const int64_t width = w.in_features, in_tiles = ceil_div(width, 16), out_tiles = ceil_div(w.out_features, 16);
    // a block of tokens is copied where it must be widened, padded to whole steps, or moved off a stride that puts all of
    // it into one set of the cache
    const bool is_copied = ELEMENT != 1 || width % STEP || width % 4096 == 0;
    const int64_t copy_stride = s.split_tiles * 16 * ELEMENT + 64, stride = is_copied ? copy_stride : width;
    const int64_t steps_per_tile = 16 / STEP, block_bytes = s.split_tiles * BLOCK_CHANNELS * 16 * ELEMENT;

    // of the call: next task of each thread, the chunks' states, the sums that the tokens start at
    const size_t state_bytes = sizeof(int64_t) * threads + sizeof(Chunk) * s.chunks;
    int64_t *next_tasks = static_cast<int64_t *>(scratch(SLOT_CALL, state_bytes + sizeof(int32_t) * rows));
    Chunk *chunks = reinterpret_cast<Chunk *>(next_tasks + threads);
    int32_t *all_starts = reinterpret_cast<int32_t *>(chunks + s.chunks);
    __builtin_memset(next_tasks, 0, state_bytes);

    const Outlet outlet(principal ? *principal : lrq_principal{});

    const auto run = [&](int64_t group, int64_t chunk) {
        const int64_t first = chunk * s.chunk, count = least(s.chunk, rows - first);
        const int64_t first_block = group * s.group_blocks, blocks = least(s.group_blocks, s.blocks - first_block);
        const int64_t outlet_bytes = principal ? TILES * outlet.tile_bytes() : 0;  // of a block
        const int64_t panel_bytes = s.group_blocks * block_bytes;
        const int64_t coefficient_bytes = HAS_BLOCK ? s.group_blocks * sizeof(Coefficients) : 0;
        uint8_t *memory = static_cast<uint8_t *>(
            scratch(SLOT_PANEL, 64 + coefficient_bytes + panel_bytes + s.group_blocks * outlet_bytes));
        PanelKey *key = reinterpret_cast<PanelKey *>(memory);
        Coefficients *coefficients = reinterpret_cast<Coefficients *>(memory + 64);
        uint8_t *panel = memory + 64 + coefficient_bytes, *outlets = panel + panel_bytes;
        const int8_t *tokens = codes + first * width;
        int32_t *starts = all_starts + first, *ready = &chunks[chunk].ready;
        uint8_t *copy = nullptr;
        if (is_copied) copy = static_cast<uint8_t *>(scratch(SLOT_COPY, TOKENS * copy_stride));
        // partial sums are kept only where the panel covers a part of the inputs at a time
        int32_t *partial = nullptr;
        if (s.splits > 1)
            partial = static_cast<int32_t *>(scratch(SLOT_SUMS, sizeof(int32_t) * count * blocks * BLOCK_CHANNELS));
        const bool leads = !__atomic_exchange_n(&chunks[chunk].is_taken, 1, __ATOMIC_RELAXED);
        const Lead lead{leads ? ready : nullptr, count};
        int64_t prepared = leads ? 0 : count;
        Meanwhile meanwhile;
        alignas(64) int32_t local[2][TOKENS * BLOCK_CHANNELS];  // in turns: one may wait
        int turn = 0;
        for (int64_t split = 0; split < s.splits; ++split) {
            const int64_t from = split * s.split_tiles, to = least(from + s.split_tiles, in_tiles);
            if (key->call != call || key->group != group || key->split != split) {
                for (int64_t b = 0; b < blocks; ++b) {
                    const int64_t tile = (first_block + b) * TILES, tiles = least(TILES, out_tiles - tile);
                    if (HAS_BLOCK) coefficients[b].read(w, 16 * tile);
                    for (int64_t t = 0; principal && t < tiles; ++t)
                        outlet.pack(w, tile + t, outlets + b * outlet_bytes + t * outlet.tile_bytes());
                    for (int64_t t = 0; t < tiles; ++t)
                        with_coding(w, [&](auto bits, auto is_trellis) {
                            decode_panel<bits, is_trellis>(w, tile + t, from, to, panel + b * block_bytes,
                                                           tiles * 16 / LANES, t * 16 / LANES);
                        });
                }
                *key = {call, group, split};
            }
            const int64_t steps = least(to * steps_per_tile, s.steps) - from * steps_per_tile;
            for (int64_t m = 0; m < count; m += TOKENS) {
                const int64_t block_rows = least(TOKENS, count - m);
                for (; prepared < m + block_rows; lead.publish(prepared)) {
                    const int64_t more = least(ROWS_PER_TASK, count - prepared);
                    if (rounder) rounder->round(first + prepared, more);
                    for (const int64_t end = prepared + more; prepared < end; ++prepared)
                        starts[prepared] = IS_BIASED ? -128 * sum_codes(tokens + prepared * width, width) : 0;
                }
                while (!leads && __atomic_load_n(ready, __ATOMIC_ACQUIRE) < m + block_rows) yield();
                const int8_t *block = tokens + m * width + 16 * from;
                const uint8_t *block_tokens = reinterpret_cast<const uint8_t *>(block);
                if (is_copied) {
                    for (int64_t i = 0; i < block_rows; ++i)
                        copy_token(block + i * width, least(16 * to, width) - 16 * from, steps * STEP,
                                   copy + i * copy_stride);
                    block_tokens = copy;
                }
                // the next tokens, or what they are rounded from, are fetched while this block's panels pass
                const int64_t after = least(first + m + TOKENS, rows);
                const int64_t next_rows = least(TOKENS, rows - after);
                if (rounder && leads && split == 0)
                    meanwhile.fetch(rounder->input(after), next_rows * rounder->row_bytes());
                else if (s.splits == 1)
                    meanwhile.fetch(codes + after * width, next_rows * width);
                const bool can_wait = HAS_BLOCK && !principal && out_type == LRQ_BFLOAT16 &&
                                      Coefficients::is_finite(scale + first + m, block_rows);
                for (int64_t b = 0; b < blocks; ++b) {
                    const int64_t tile = (first_block + b) * TILES, tiles = least(TILES, out_tiles - tile);
                    const int64_t channels = 16 * tiles;
                    int32_t *sums = partial ? partial + (m * blocks + b * block_rows) * BLOCK_CHANNELS : local[turn ^= 1];
                    if (s.splits > 1 && !(rounder && leads && split == 0) && b < next_rows) {  // parts of rows
                        const int8_t *part = codes + (after + b) * width + 16 * from;
                        meanwhile.fetch(part, steps * STEP);
                        if (b + blocks < next_rows) meanwhile.then_fetch(part + blocks * width, steps * STEP);
                    }
                    multiply(tiles, block_rows, panel + b * block_bytes, steps, block_tokens, stride,
                             split == 0 ? starts + m : nullptr, sums, meanwhile);
                    if (split < s.splits - 1) continue;
                    const int64_t token = first + m;
                    meanwhile.pending.finish();
                    if (can_wait && coefficients[b].is_whole) {
                        uint16_t *to = static_cast<uint16_t *>(out) + token * w.out_features + 16 * tile;
                        meanwhile.pending.take(2 * w.out_features, coefficients + b, sums, scale + token, to, block_rows);
                        continue;
                    }
                    alignas(64) float added[TOKENS * BLOCK_CHANNELS];
                    if (principal) outlet.multiply(outlets + b * outlet_bytes, tiles, token, block_rows, added);
                    finish_channels(w, sums, channels, principal ? added : nullptr, scale + token, token, block_rows,
                                    16 * tile, out_type, out);
                }
            }
        }
        meanwhile.pending.finish();
    };
    // a thread's own groups first, so that few panels are decoded twice, and each begins with other tokens, which it
    // prepares; then what is left of the others'
    parallel_for(threads, threads, [&](int64_t thread) {
        for (int64_t i = 0; i < threads; ++i) {
            const int64_t owner = (thread + i) % threads, begin = owner * s.groups / threads * s.chunks;
            const int64_t end = (owner + 1) * s.groups / threads * s.chunks, shift = owner * s.chunks / threads;
            for (;;) {
                const int64_t task = begin + __atomic_fetch_add(next_tasks + owner, 1, __ATOMIC_RELAXED);
                if (task >= end) break;
                run(task / s.chunks, (task + shift) % s.chunks);
            }
        }
    });
}

// Dot products on registers alone; returns the number of operations. What the hardware can do at most.
inline int64_t repeat_dots(int64_t iterations) {
    Sums acc[TOKENS][VECTORS];
    alignas(64) uint8_t weights[VECTORS * LANES * STEP * ELEMENT] = {};
    int32_t tokens[TOKENS] = {};
    unroll<TOKENS>([&](auto m) LRQ_LAMBDA { unroll<VECTORS>([&](auto v) LRQ_LAMBDA { acc[m][v] = splat_sums(m); }); });
    for (int64_t i = 0; i < iterations; ++i) {
        // nothing is known about the operands: no step is skipped
        __asm__ volatile("" : : "r"(weights), "r"(tokens) : "memory");
        unroll<TOKENS>([&](auto m) LRQ_LAMBDA {
            unroll<VECTORS>([&](auto v) LRQ_LAMBDA {
                acc[m][v] = dot(acc[m][v], weights + v * (LANES * STEP * ELEMENT), tokens[m]);
            });
        });
    }
    unroll<TOKENS>([&](auto m) LRQ_LAMBDA {
        unroll<VECTORS>([&](auto v) LRQ_LAMBDA {
            const Sums used = acc[m][v];
            __asm__ volatile("" : : "m"(used));
        });
    });
    return iterations * TOKENS * VECTORS * LANES * STEP * 2;
}

}  // namespace LRQ_ISA
}  // namespace lrq
