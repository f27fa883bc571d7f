// Attention of bfloat16 tokens in one pass over the keys (FlashAttention, arXiv 2205.14135 and 2307.08691).
//
// Each lane of a register belongs to one query. Both products are then the same loop: it broadcasts a pair of values of one
// operand (two channels of a key, or one channel of two keys) and multiplies it by registers of the other. No maximum or
// sum runs across lanes. The exponentials of a block of keys are computed between the dot products of the next block: most
// of their instructions run on units that do not multiply.
#pragma once

#include "kernels.h"
#include "pairs.h"

namespace lrq {
namespace LRQ_ISA {

constexpr float LOG2_E = 1.44269504f, LOWEST = -3.40282347e38f;

#if defined(__AVX512BF16__)
constexpr int SIDE = 6;                       // keys, or channels, that meet the same registers: a strip
constexpr int QUERIES = 64;                   // of a block: its 4 registers times SIDE are 24 registers of sums
constexpr int64_t BLOCK_STRIPS = 16;          // of keys: the scores of a block are 24 KiB
constexpr int64_t SEGMENT_BYTES = 384 << 10;  // of the keys and values that are repacked at a time
constexpr int64_t CHUNK_BLOCKS = 16;          // blocks of queries, at most, that share a repacked segment
constexpr int NO_MASK = 0, MASK_BY_KEY = 1, MASK_BY_PAIR = 2;

// 2^x for x <= 0, correct to 13 bits, exact at 0. NaN stays NaN.
LRQ_INLINE __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200), x);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = x - whole;
    __m512 y = _mm512_fmadd_ps(part, _mm512_set1_ps(0.05500897f), _mm512_set1_ps(0.24221106f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.69328293f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1));
    return _mm512_scalef_ps(y, whole);
}

// Pairs of bfloat16: word i has lane i of `low` in its lower half and lane i of `high` in its upper half.
LRQ_INLINE __m512i to_pairs(__m512 low, __m512 high) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, both);
}

// The mask of the first `count` lanes.
LRQ_INLINE __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : (1u << greatest(count, 0)) - 1; }

// What 16 V queries have got from the keys so far: the highest score, the sum of the weights and the weighted sum of the
// values, (1 + 1 + width) V registers. Scores are logarithms to base 2.
template <int V> struct Seen {
    __m512 *highest, *sum, *out;

    explicit Seen(__m512 *memory) : highest(memory), sum(memory + V), out(memory + 2 * V) {}
};

// Makes weights of the scores of a block of keys, one register of pairs at each call of advance().
template <int V> struct Weights {
    const __m512 *scores;      // (keys, V)
    __m512 subtracted[V], *sum;
    __m512i *weights;          // (keys / 2, V), pairs
    int64_t done, count;       // registers of weights: those made, and all

    LRQ_INLINE void advance() {
        const int64_t v = done % V;
        const __m512 *from = scores + 2 * (done - v) + v;
        const __m512 even = exp2_of(from[0] - subtracted[v]), odd = exp2_of(from[V] - subtracted[v]);
        weights[done++] = to_pairs(even, odd);
        sum[v] = sum[v] + (even + odd);
    }
};

// Computes the scores of `strips` strips of keys and raises each query's highest score. Between the products it makes the
// weights that the block before still lacks.
template <int V, int MASK>
LRQ_INLINE void score(const uint8_t *keys, int64_t strips, int64_t pairs, const __m512i *queries, float scale,
                      const float *mask, __m512 *scores, __m512 *highest, Weights<V> *before) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t strip = 0; strip < strips; ++strip, keys += SIDE * 4 * pairs, scores += SIDE * V) {
        __m512 sums[SIDE][V] = {};
        const int64_t portions = before ? ceil_div(before->count - before->done, strips - strip) : 0;
        int64_t k = 0;
        for (int64_t i = 0; i < portions; ++i) {
            const int64_t end = pairs * (i + 1) / portions;
            multiply_pairs<SIDE, V>(sums, keys + 4 * k, 4 * pairs, 4, queries + k * V, end - k);
            before->advance();
            k = end;
        }
        multiply_pairs<SIDE, V>(sums, keys + 4 * k, 4 * pairs, 4, queries + k * V, pairs - k);
        unroll<V>([&](auto v) LRQ_LAMBDA {
            __m512 most = highest[v];
            unroll<SIDE>([&](auto r) LRQ_LAMBDA {
                __m512 s;
                if constexpr (MASK == NO_MASK)
                    s = sums[r][v] * factor;
                else if constexpr (MASK == MASK_BY_KEY)
                    s = _mm512_fmadd_ps(sums[r][v], factor, _mm512_set1_ps(mask[strip * SIDE + r]));
                else
                    s = _mm512_fmadd_ps(sums[r][v], factor, _mm512_load_ps(mask + ((strip * SIDE + r) * V + v) * 16));
                scores[r * V + v] = s;
                most = _mm512_max_ps(most, s);
            });
            highest[v] = most;
        });
    }
}

// out = out * kept + values x weights for R channels; without kept, out = values x weights.
template <int R, int V>
LRQ_INLINE void add_values(const uint8_t *values, const __m512i *weights, int64_t pairs, const __m512 *kept, __m512 *out) {
    __m512 sums[R][V];
    unroll<R>([&](auto r) LRQ_LAMBDA {
        unroll<V>([&](auto v) LRQ_LAMBDA { sums[r][v] = kept ? out[r * V + v] * kept[v] : _mm512_setzero_ps(); });
    });
    multiply_pairs<R, V>(sums, values, 4, 4 * R, weights, pairs);
    unroll<R>([&](auto r) LRQ_LAMBDA {
        unroll<V>([&](auto v) LRQ_LAMBDA { out[r * V + v] = sums[r][v]; });
    });
}

// A segment of keys and values, repacked. keys: (padded, width). values: strip by strip of channels, pairs of keys
// (padded / 2, SIDE).
struct Segment {
    uint8_t *keys, *values;
    int64_t first, count, padded;  // keys; padded to whole strips with copies of the last key, and values of 0
};

inline void pack_segment(const lrq_attention &a, int64_t b, int64_t h, Segment &s) {
    const uint16_t *key = a.key + b * a.key_stride[0] + h * a.key_stride[1];
    const uint16_t *value = a.value + b * a.value_stride[0] + h * a.value_stride[1];
    const int64_t width = a.width;
    const auto fetch = [&](const uint16_t *rows, int64_t stride, int64_t i) LRQ_LAMBDA {
        const uint16_t *row = rows + least(s.first + i + 16, a.keys - 1) * stride;
        for (int64_t d = 0; d < width; d += 32) __builtin_prefetch(row + d);
        __builtin_prefetch(row + width - 1);
    };
    for (int64_t i = 0; i < s.padded; ++i) {
        const int64_t at = s.first + least(i, s.count - 1);
        fetch(key, a.key_stride[2], i);
        __builtin_memcpy(s.keys + i * width * 2, key + at * a.key_stride[2], width * 2);
    }
    alignas(64) uint32_t row[LRQ_MAX_HEAD_WIDTH + SIDE];
    for (int64_t i = 0; i < s.padded; i += 2) {
        fetch(value, a.value_stride[2], i);
        fetch(value, a.value_stride[2], i + 1);
        const uint16_t *even = value + (s.first + i) * a.value_stride[2], *odd = even + a.value_stride[2];
        for (int64_t d = 0; d < width; d += 16) {
            const __mmask16 lanes = first_lanes(width - d);
            const __mmask16 is_even = i < s.count ? lanes : 0, is_odd = i + 1 < s.count ? lanes : 0;
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(is_even, even + d));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(is_odd, odd + d));
            _mm512_store_si512(row + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
        for (int64_t d = 0; d < width; d += SIDE) {
            const int64_t channels = least(SIDE, width - d);
            uint8_t *to = s.values + 2 * (d * s.padded + i * channels);
            if (channels == SIDE)
                __builtin_memcpy(to, row + d, 4 * SIDE);
            else
                __builtin_memcpy(to, row + d, 4 * channels);
        }
    }
}

// Packs queries as pairs of channels: (width / 2, V) registers. Lanes without a query repeat the last one.
template <int V>
inline void pack_queries(const lrq_attention &a, int64_t b, int64_t h, int64_t first, int64_t count, __m512i *packed) {
    const uint16_t *query = a.query + b * a.query_stride[0] + h * a.query_stride[1];
    const int64_t pairs = a.width / 2;
    for (int64_t v = 0; v < V; ++v)
        for (int64_t pair = 0; pair < pairs; pair += 16) {
            __m512i rows[16];
            for (int64_t i = 0; i < 16; ++i) {
                const uint16_t *row = query + (first + least(16 * v + i, count - 1)) * a.query_stride[2];
                rows[i] = _mm512_maskz_loadu_epi32(first_lanes(pairs - pair), row + 2 * pair);
            }
            transpose(rows);
            for (int64_t i = 0; i < least(16, pairs - pair); ++i) packed[(pair + i) * V + v] = rows[i];
        }
}

// The first `count` entries of the mask as logarithms to base 2; -inf in the lanes behind them.
LRQ_INLINE __m512 load_mask(const lrq_attention &a, int64_t at, int64_t count) {
    const __mmask16 lanes = first_lanes(count);
    __m512 x;
    if (a.mask_type == LRQ_FLOAT32) {
        x = _mm512_maskz_loadu_ps(lanes, static_cast<const float *>(a.mask) + at);
    } else {
        const uint16_t *bits = static_cast<const uint16_t *>(a.mask) + at;
        x = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, bits)), 16);
    }
    // finite entries stay finite: a row of the lowest numbers has a softmax, a row of -inf has none
    const __mmask16 is_number = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ);
    x = x * _mm512_set1_ps(LOG2_E);
    x = _mm512_mask_max_ps(x, is_number, _mm512_set1_ps(LOWEST), x);
    return _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), lanes, x);
}

// Packs the mask of `keys` keys from `key` as logarithms to base 2: (keys) or (keys, 16 V).
template <int V, int MASK>
inline void pack_mask(const lrq_attention &a, int64_t b, int64_t h, int64_t first, int64_t count, int64_t key,
                      int64_t keys, float *packed) {
    const int64_t start = b * a.mask_stride[0] + h * a.mask_stride[1] + key;
    for (int64_t k = 0; k < keys; k += 16) {
        const int64_t there = least(16, keys - k);
        if constexpr (MASK == MASK_BY_KEY) {
            _mm512_mask_storeu_ps(packed + k, first_lanes(there), load_mask(a, start + k, least(there, a.keys - key - k)));
        } else {
            for (int64_t v = 0; v < V; ++v) {
                __m512i rows[16];
                for (int64_t i = 0; i < 16; ++i) {
                    const int64_t query = first + least(16 * v + i, count - 1);
                    rows[i] = (__m512i)load_mask(a, start + query * a.mask_stride[2] + k, least(there, a.keys - key - k));
                }
                transpose(rows);
                for (int64_t i = 0; i < there; ++i) _mm512_store_si512(packed + ((k + i) * V + v) * 16, rows[i]);
            }
        }
    }
}

template <int V>
inline void finish_queries(const lrq_attention &a, int64_t b, int64_t h, int64_t first, int64_t count, Seen<V> seen) {
    const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
    const int64_t pairs = a.width / 2;
    uint16_t *out = a.out + b * a.out_stride[0] + h * a.out_stride[1];
    float *logsumexp = a.logsumexp + b * a.logsumexp_stride[0] + h * a.logsumexp_stride[1];
    for (int64_t v = 0; v < V; ++v) {
        // a query whose keys are all masked gets 0, as in torch
        const __mmask16 is_seen = _mm512_cmp_ps_mask(seen.highest[v], nothing, _CMP_NEQ_UQ);
        const __m512 factor = _mm512_maskz_div_ps(is_seen, _mm512_set1_ps(1), seen.sum[v]);
        alignas(64) float highest[16], sum[16];
        _mm512_store_ps(highest, seen.highest[v]);
        _mm512_store_ps(sum, seen.sum[v]);
        for (int64_t i = 0; i < least(16, count - 16 * v); ++i)
            logsumexp[(first + 16 * v + i) * a.logsumexp_stride[2]] =
                is_seen >> i & 1 ? highest[i] / LOG2_E + __builtin_logf(sum[i]) : 0.0f;
        for (int64_t pair = 0; pair < pairs; pair += 16) {
            __m512i rows[16];
            for (int64_t i = 0; i < 16; ++i) {
                const __m512 *sums = seen.out + 2 * least(pair + i, pairs - 1) * V + v;
                rows[i] = to_pairs(_mm512_maskz_mul_ps(is_seen, sums[0], factor),
                                   _mm512_maskz_mul_ps(is_seen, sums[V], factor));
            }
            transpose(rows);
            for (int64_t i = 0; i < least(16, count - 16 * v); ++i)
                _mm512_mask_storeu_epi32(out + (first + 16 * v + i) * a.out_stride[2] + 2 * pair,
                                         first_lanes(pairs - pair), rows[i]);
        }
    }
}

// Computes the attention of `count` queries from `first`, up to 16 V, to the keys of a segment, on top of what they have
// seen.
template <int V, int MASK>
inline void attend_block(const lrq_attention &a, int64_t b, int64_t h, int64_t first, int64_t count, const Segment &s,
                         uint8_t *memory, Seen<V> seen) {
    constexpr int64_t most_keys = BLOCK_STRIPS * SIDE;
    const int64_t pairs = a.width / 2, strips = s.padded / SIDE, blocks = ceil_div(strips, BLOCK_STRIPS);
    __m512 *scores = reinterpret_cast<__m512 *>(memory);  // of two blocks, in turns
    __m512i *weights = reinterpret_cast<__m512i *>(scores + 2 * most_keys * V);
    __m512i *queries = weights + most_keys / 2 * V;
    float *mask = reinterpret_cast<float *>(queries + pairs * V);
    pack_queries<V>(a, b, h, first, count, queries);
    const float scale = a.scale * LOG2_E;
    Weights<V> now;
    __m512 kept[V];

    __m512 highest[V];
    unroll<V>([&](auto v) LRQ_LAMBDA { highest[v] = seen.highest[v]; });

    const auto score_block = [&](int64_t block, Weights<V> *before) LRQ_LAMBDA {
        const int64_t from = block * strips / blocks * SIDE, to = (block + 1) * strips / blocks * SIDE;
        __m512 *block_scores = scores + block % 2 * most_keys * V;
        if constexpr (MASK != NO_MASK) pack_mask<V, MASK>(a, b, h, first, count, s.first + from, to - from, mask);
        score<V, MASK>(s.keys + from * pairs * 4, (to - from) / SIDE, pairs, queries, scale, mask, block_scores, highest,
                       before);
        for (int64_t k = least(to, s.count) - from; k < to - from; ++k)
            unroll<V>([&](auto v) LRQ_LAMBDA { block_scores[k * V + v] = _mm512_set1_ps(-__builtin_inff()); });
    };
    score_block(0, nullptr);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = block * strips / blocks * SIDE, keys = (block + 1) * strips / blocks * SIDE - from;
        now.scores = scores + block % 2 * most_keys * V, now.weights = weights, now.sum = seen.sum;
        now.done = 0, now.count = keys / 2 * V;
        unroll<V>([&](auto v) LRQ_LAMBDA {
            // where all keys so far are masked the highest score is -inf, and -inf less -inf would be NaN
            const __mmask16 is_seen = _mm512_cmp_ps_mask(highest[v], _mm512_set1_ps(-__builtin_inff()), _CMP_NEQ_UQ);
            now.subtracted[v] = _mm512_maskz_mov_ps(is_seen, highest[v]);
            kept[v] = exp2_of(seen.highest[v] - now.subtracted[v]);
            seen.sum[v] = seen.sum[v] * kept[v];
            seen.highest[v] = highest[v];
        });
        if (block + 1 < blocks) score_block(block + 1, &now);
        while (now.done < now.count) now.advance();
        const __m512 *scaled_by = s.first || block ? kept : nullptr;
        for (int64_t d = 0; d < a.width; d += SIDE) {
            const int64_t channels = least(SIDE, a.width - d);
            const uint8_t *values = s.values + 2 * (d * s.padded + from * channels);
            __m512 *out = seen.out + d * V;
            if (channels == 6)
                add_values<6, V>(values, weights, keys / 2, scaled_by, out);
            else if (channels == 4)
                add_values<4, V>(values, weights, keys / 2, scaled_by, out);
            else
                add_values<2, V>(values, weights, keys / 2, scaled_by, out);
        }
    }
}

inline void attend_all(const lrq_attention &a, int threads) {
    const int64_t blocks = ceil_div(a.queries, QUERIES), heads = a.batch * a.heads;
    const int64_t chunks = ceil_div(blocks, least(greatest(heads * blocks / (4 * threads), 1), CHUNK_BLOCKS));
    const int64_t chunk = ceil_div(blocks, chunks);
    const int64_t segments = ceil_div(a.keys, SEGMENT_BYTES / (4 * a.width));
    const int64_t segment_keys = round_up(ceil_div(a.keys, segments), SIDE);
    constexpr int64_t most_keys = BLOCK_STRIPS * SIDE;
    const int64_t block_bytes = QUERIES * (most_keys * (4 + 4 + 2 + 4) + a.width * 2);
    const int64_t seen_registers = (2 + a.width) * (QUERIES / 16);
    parallel_for(threads, heads * chunks, [&](int64_t task) {
        const int64_t b = task / chunks / a.heads, h = task / chunks % a.heads;
        const int64_t first_block = task % chunks * chunk, end_block = least(first_block + chunk, blocks);
        Segment s;
        s.keys = static_cast<uint8_t *>(scratch(SLOT_COPY, segment_keys * a.width * 4));
        s.values = s.keys + segment_keys * a.width * 2;
        uint8_t *memory = static_cast<uint8_t *>(scratch(SLOT_ROWS, block_bytes));
        __m512 *all_seen = static_cast<__m512 *>(scratch(SLOT_SUMS, (segments > 1 ? chunk : 1) * seen_registers * 64));
        for (s.first = 0; s.first < a.keys; s.first += segment_keys) {
            s.count = least(segment_keys, a.keys - s.first), s.padded = round_up(s.count, SIDE);
            pack_segment(a, b, h, s);
            for (int64_t block = first_block; block < end_block; ++block) {
                const int64_t first = block * QUERIES, count = least(QUERIES, a.queries - first);
                __m512 *seen_memory = all_seen + (segments > 1 ? block - first_block : 0) * seen_registers;
                const auto run = [&](auto v, auto mask) {
                    const Seen<v> seen(seen_memory);
                    if (!s.first)
                        for (int i = 0; i < v; ++i)
                            seen.highest[i] = _mm512_set1_ps(-__builtin_inff()), seen.sum[i] = _mm512_setzero_ps();
                    attend_block<v, mask>(a, b, h, first, count, s, memory, seen);
                    if (s.first + s.count == a.keys) finish_queries<v>(a, b, h, first, count, seen);
                };
                const auto run_masked = [&](auto v) {
                    if (!a.mask) return run(v, std::integral_constant<int, NO_MASK>{});
                    if (!a.mask_stride[2]) return run(v, std::integral_constant<int, MASK_BY_KEY>{});
                    run(v, std::integral_constant<int, MASK_BY_PAIR>{});
                };
                switch (ceil_div(count, 16)) {
                    case 1: run_masked(std::integral_constant<int, 1>{}); break;
                    case 2: run_masked(std::integral_constant<int, 2>{}); break;
                    case 3: run_masked(std::integral_constant<int, 3>{}); break;
                    default: run_masked(std::integral_constant<int, 4>{});
                }
            }
        }
    });
}

// Repeats products of pairs on registers alone, the most the hardware can do; returns the number of operations.
inline int64_t repeat_all_pairs(int64_t iterations) {
    __m512 sums[SIDE][4];
    unroll<SIDE>([&](auto r) LRQ_LAMBDA {
        unroll<4>([&](auto v) LRQ_LAMBDA { sums[r][v] = _mm512_set1_ps(4 * r + v); });  // all different
    });
    const __m512i a = _mm512_setzero_si512();
    for (int64_t i = 0; i < iterations; ++i)
        unroll<SIDE>([&](auto r) LRQ_LAMBDA {
            unroll<4>([&](auto v) LRQ_LAMBDA { sums[r][v] = dot_pairs(sums[r][v], a, a); });
        });
    unroll<SIDE>([&](auto r) LRQ_LAMBDA {
        unroll<4>([&](auto v) LRQ_LAMBDA {
            const __m512 used = sums[r][v];
            __asm__ volatile("" : : "m"(used));
        });
    });
    return iterations * SIDE * 4 * 64;
}
#endif

}  // namespace LRQ_ISA
}  // namespace lrq
