// Attention of bfloat16 tokens on tiles: 32 queries at a time, in one pass over the keys.
//
// As in attention.h a lane is a query: tiles of scores are K Q^T, tiles of outputs V^T P^T, so keys and values are the first
// operand and weights become the second one without a transpose. Three blocks of keys are under way at a time: the weights
// of one are made between the products of tiles for the scores of the next and the outputs of the one before. Outputs grow
// by products alone as long as no score exceeds the number that is subtracted from all by more than MOST_EXCESS; only then
// are they scaled.
#pragma once

#include "attention.h"
#include "tile_block.h"

namespace lrq {
namespace LRQ_ISA {

#if defined(LRQ_HAS_TILES)
constexpr int64_t TILE_QUERIES = 32, TILE_STEP = 32;  // TILE_STEP: keys, or channels, of one product of tiles
constexpr int64_t TILE_BLOCK_KEYS = 64, TILE_SEGMENT_BYTES = 768 << 10, TILE_CHUNK_BLOCKS = 32;
constexpr int64_t QUERY_ROW = 4 * TILE_QUERIES;  // bytes of a row of scores or outputs
constexpr int QUERY_REGISTERS = TILE_QUERIES / WIDTH;
constexpr float MOST_EXCESS = 8, LEAST_POWER = -125;  // logarithms to base 2

enum TileMask { UNMASKED, MASKED_BY_KEY, MASKED_BY_PAIR };

// The larger one; b if they do not compare.
LRQ_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Whether any lane of a comparison's result is true.
LRQ_INLINE bool is_any(Ints lanes) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#else
    int32_t any = 0;
    for (int i = 0; i < WIDTH; ++i) any |= lanes[i];
    return any != 0;
#endif
}

// 2^x for x up to MOST_EXCESS, correct to 13 bits; 0 below LEAST_POWER, since what is too small for normal numbers takes
// Intel's CPUs long. NaN stays NaN.
LRQ_INLINE Floats power_of_two(Floats x) {
#if defined(__AVX512F__)
    const __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(LEAST_POWER), _CMP_NLT_UQ);
    const Floats whole = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Ints is_small = x < splat(LEAST_POWER);
    x = larger(splat(LEAST_POWER), x);
    const Floats magic = splat(12582912.0f), whole = (x + magic) - magic;  // 1.5 * 2^23
#endif
    const Floats part = x - whole;
    Floats y = fma(part, splat(0.05500897f), splat(0.24221106f));
    y = fma(fma(y, part, splat(0.69328293f)), part, splat(1));
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_scalef_ps(is_normal, (__m512)y, (__m512)whole);
#else
    const Words exponent = (Words)__builtin_convertvector(whole, Ints) << 23;
    return (Floats)((Ints)((Words)y + exponent) & ~is_small);
#endif
}

// Writes pairs of bfloat16: word i has lane i of `low` in its lower half and lane i of `high` in its upper half.
LRQ_INLINE void store_pairs(uint8_t *to, Floats low, Floats high) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(to, to_pairs((__m512)low, (__m512)high));
#else
    const Words words = __builtin_convertvector(to_bfloat16(low), Words);
    store(to, words | __builtin_convertvector(to_bfloat16(high), Words) << 16);
#endif
}

// Transposes 16 x 16 words.
LRQ_INLINE void transpose_words(const uint32_t *from, uint8_t *to) {
#if defined(__AVX512BF16__)
    __m512i rows[16];
    unroll<16>([&](auto i) LRQ_LAMBDA { rows[i] = _mm512_loadu_si512(from + 16 * i); });
    transpose(rows);
    unroll<16>([&](auto i) LRQ_LAMBDA { _mm512_storeu_si512(to + 64 * i, rows[i]); });
#else
    for (int64_t i = 0; i < 16; ++i)
        for (int64_t j = 0; j < 16; ++j) store(to + 64 * j + 4 * i, from[16 * i + j]);
#endif
}

// Copies up to 32 values of 16 bits; zeros follow them, as far as 64 bytes go.
LRQ_INLINE void take_values(const uint16_t *from, int64_t count, void *to) {
#if defined(__AVX512BW__)
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << greatest(count, 0)) - 1, from));
#else
    __builtin_memset(to, 0, 64);
    if (count > 0) __builtin_memcpy(to, from, 2 * least(count, 32));
#endif
}

// Copies the first `count` of 32 values.
LRQ_INLINE void put_values(const void *from, int64_t count, uint16_t *to) {
#if defined(__AVX512BW__)
    _mm512_mask_storeu_epi16(to, count >= 32 ? ~0u : (1u << count) - 1, _mm512_loadu_si512(from));
#else
    __builtin_memcpy(to, from, 2 * least(count, 32));
#endif
}

// A segment of keys and values, repacked. keys: (padded, channels rounded up to TILE_STEP). values: of each TILE_STEP keys
// tiles of 16 channels. What is beyond keys or channels is 0.
struct TileSegment {
    uint8_t *keys, *values;
    int64_t first, count, padded;  // keys; padded to whole steps
    int64_t steps, tiles;          // of the channels: products of a score, tiles of outputs

    const uint8_t *key(int64_t at) const { return keys + at * key_bytes(); }
    const uint8_t *value(int64_t at, int64_t tile) const { return values + (at / TILE_STEP * tiles + tile) * TILE_BYTES; }
    int64_t key_bytes() const { return 2 * TILE_STEP * steps; }
};

inline void pack_tiles(const lrq_attention &a, int64_t b, int64_t h, TileSegment &s) {
    const uint16_t *key = a.key + b * a.key_stride[0] + h * a.key_stride[1] + s.first * a.key_stride[2];
    const uint16_t *value = a.value + b * a.value_stride[0] + h * a.value_stride[1] + s.first * a.value_stride[2];
    for (int64_t i = 0; i < s.padded; ++i) {
        const int64_t there = i < s.count ? 2 * a.width : 0;
        uint8_t *to = s.keys + i * s.key_bytes();
        __builtin_memcpy(to, key + i * a.key_stride[2], there);
        __builtin_memset(to + there, 0, s.key_bytes() - there);
    }
    alignas(64) uint32_t pairs[16][16];
    for (int64_t i = 0; i < s.padded; i += TILE_STEP)
        for (int64_t tile = 0; tile < s.tiles; ++tile) {
            const int64_t channels = least(16, a.width - 16 * tile);
            for (int64_t pair = 0; pair < 16; ++pair) {
                uint16_t rows[2][16] = {};
                for (int64_t odd = 0; odd < 2; ++odd)
                    if (const int64_t at = i + 2 * pair + odd; at < s.count)
                        __builtin_memcpy(rows[odd], value + at * a.value_stride[2] + 16 * tile, 2 * channels);
                for (int64_t k = 0; k < 16; ++k) pairs[pair][k] = rows[0][k] | static_cast<uint32_t>(rows[1][k]) << 16;
            }
            transpose_words(pairs[0], s.values + (i / TILE_STEP * s.tiles + tile) * TILE_BYTES);
        }
}

// Computes for 32 queries, of which the last one is repeated where there are fewer.
class TileQueries {
  public:
    static int64_t memory_bytes(const TileSegment &s) {
        return TILE_BLOCK_KEYS * (2 * QUERY_ROW + QUERY_ROW + QUERY_ROW) + 2 * s.steps * TILE_BYTES;
    }
    // What the queries have got from the keys so far, in floats: the number that is subtracted from scores, which are
    // logarithms to base 2, the sum of the weights, and the outputs (channels, queries).
    static int64_t seen_floats(const TileSegment &s) { return TILE_QUERIES * (2 + 16 * s.tiles); }

    TileQueries(const lrq_attention &a, int64_t b, int64_t h, int64_t first, int64_t count, const TileSegment &s,
                uint8_t *memory, float *seen)
        : a(a), b(b), h(h), first(first), count(count), s(s), subtracted(seen), sum(seen + TILE_QUERIES),
          out(seen + 2 * TILE_QUERIES), scores(reinterpret_cast<float *>(memory)),
          weights(memory + 2 * TILE_BLOCK_KEYS * QUERY_ROW),
          mask(reinterpret_cast<float *>(weights + TILE_BLOCK_KEYS * QUERY_ROW)),
          queries(weights + 2 * TILE_BLOCK_KEYS * QUERY_ROW),
          factor(a.scale == 0 ? 1 : (a.scale < 0 ? -a.scale : a.scale) * LOG2_E) {}

    void begin() const {
        for (int64_t i = 0; i < TILE_QUERIES; ++i) subtracted[i] = -__builtin_inff();
        __builtin_memset(sum, 0, 4 * TILE_QUERIES * (1 + 16 * s.tiles));
    }

    // Attends to the keys of the segment.
    template <TileMask MASK> void attend() const {
        pack_queries();
        const int64_t blocks = ceil_div(s.padded, TILE_BLOCK_KEYS);
        Making none;
        int64_t waiting = -1;  // block whose weights are there, but not in the outputs
        score(0, none, 1);
        raise<MASK>(0, waiting);
        for (int64_t block = 0; block < blocks; ++block) {
            Making making(*this, block, MASK == UNMASKED ? factor : 1);
            const int64_t scored = block + 1 < blocks ? keys_of(block + 1) * s.steps : 0;
            const int64_t added = waiting >= 0 ? keys_of(waiting) * ceil_div(s.tiles, 2) : 0;
            const int64_t portion = ceil_div(making.left, greatest((scored + added) / TILE_STEP, 1));
            if (scored) score(block + 1, making, portion);
            if (added) add_values(waiting, making, portion);
            making.advance(making.left);
            making.finish(sum);
            waiting = block;
            if (scored) raise<MASK>(block + 1, waiting);
        }
        if (waiting >= 0) add_values(waiting, none, 1);
    }

    void finish() const {
        const int64_t stride = a.out_stride[2];
        uint16_t *to = a.out + b * a.out_stride[0] + h * a.out_stride[1] + first * stride;
        float *logsumexp = a.logsumexp + b * a.logsumexp_stride[0] + h * a.logsumexp_stride[1];
        alignas(64) float inverse[TILE_QUERIES];
        for (int64_t i = 0; i < TILE_QUERIES; ++i) {
            const bool is_seen = subtracted[i] != -__builtin_inff();  // else all keys are masked: 0, as in torch
            inverse[i] = is_seen ? 1 / sum[i] : 0;
            if (i < count)
                logsumexp[(first + i) * a.logsumexp_stride[2]] = is_seen ? subtracted[i] / LOG2_E + __builtin_logf(sum[i]) : 0;
        }
        alignas(64) uint32_t pairs[16][16];
        alignas(64) uint8_t rows[16][64];
        for (int64_t query = 0; query < count; query += 16)
            for (int64_t channel = 0; channel < a.width; channel += TILE_STEP) {
                const int64_t channels = least(TILE_STEP, a.width - channel);
                for (int64_t pair = 0; 2 * pair < channels; ++pair)
                    unroll<16 / WIDTH>([&](auto v) LRQ_LAMBDA {
                        const float *at = out + (channel + 2 * pair) * TILE_QUERIES + query + v * WIDTH;
                        const Floats by = load<Floats>(inverse + query + v * WIDTH);
                        store_pairs(reinterpret_cast<uint8_t *>(pairs[pair] + v * WIDTH), load<Floats>(at) * by,
                                    load<Floats>(at + TILE_QUERIES) * by);
                    });
                transpose_words(pairs[0], rows[0]);
                for (int64_t i = 0; i < least(16, count - query); ++i)
                    put_values(rows[i], channels, to + (query + i) * stride + channel);
            }
    }

  private:
    const lrq_attention &a;
    const int64_t b, h, first, count;
    const TileSegment &s;
    float *const subtracted, *const sum, *const out;
    float *const scores;      // of two blocks in turns, (keys, queries)
    uint8_t *const weights;   // of two blocks in turns: of each TILE_STEP keys two tiles of 16 queries
    float *const mask;        // of a block, (keys, queries)
    uint8_t *const queries;   // of each TILE_STEP channels two tiles of 16 queries
    const float factor;       // of the products, positive: the rest of the scale is in the queries

    int64_t keys_of(int64_t block) const { return least(TILE_BLOCK_KEYS, s.padded - block * TILE_BLOCK_KEYS); }
    float *scores_of(int64_t block) const { return scores + block % 2 * TILE_BLOCK_KEYS * TILE_QUERIES; }
    uint8_t *weights_of(int64_t block) const { return weights + block % 2 * TILE_BLOCK_KEYS * QUERY_ROW / 2; }

    // Makes weights of a block's scores, those of two keys at each step.
    struct Making {
        int64_t left = 0;  // pairs of keys
        const float *scores = nullptr;
        uint8_t *weights = nullptr;
        int64_t row = 0;
        Floats factor, subtracted[QUERY_REGISTERS], sums[QUERY_REGISTERS];

        Making() = default;
        LRQ_INLINE Making(const TileQueries &q, int64_t block, float factor)
            : left(q.keys_of(block) / 2), scores(q.scores_of(block)), weights(q.weights_of(block)), factor(splat(factor)) {
            unroll<QUERY_REGISTERS>([&](auto v) LRQ_LAMBDA {
                const Floats x = load<Floats>(q.subtracted + v * WIDTH);
                subtracted[v] = x == splat(-__builtin_inff()) ? Floats{} : x;
                sums[v] = Floats{};
            });
        }

        LRQ_INLINE void advance(int64_t count) {
            for (count = least(count, left); count > 0; --count) {
                unroll<QUERY_REGISTERS>([&](auto v) LRQ_LAMBDA {
                    const auto weight = [&](const float *score) LRQ_LAMBDA {
                        return power_of_two(fma(load<Floats>(score + v * WIDTH), factor, -subtracted[v]));
                    };
                    const Floats even = weight(scores), odd = weight(scores + TILE_QUERIES);
                    sums[v] = sums[v] + (even + odd);
                    constexpr int lane = v * WIDTH % 16, tile = v * WIDTH / 16;
                    store_pairs(weights + tile * TILE_BYTES + 4 * lane, even, odd);
                });
                --left, scores += 2 * TILE_QUERIES, weights += 64;
                if (++row % 16 == 0) weights += TILE_BYTES;
            }
        }

        LRQ_INLINE void finish(float *sum) const {
            unroll<QUERY_REGISTERS>([&](auto v) LRQ_LAMBDA {
                store(sum + v * WIDTH, load<Floats>(sum + v * WIDTH) + sums[v]);
            });
        }
    };

    void pack_queries() const {
        const uint16_t *query = a.query + b * a.query_stride[0] + h * a.query_stride[1];
        alignas(64) uint32_t rows[16][16];
        for (int64_t step = 0; step < s.steps; ++step)
            for (int64_t tile = 0; tile < 2; ++tile) {
                const int64_t channel = TILE_STEP * step;
                for (int64_t i = 0; i < 16; ++i) {
                    const uint16_t *row = query + (first + least(16 * tile + i, count - 1)) * a.query_stride[2];
                    take_values(row + channel, a.width - channel, rows[i]);
                    for (int64_t k = 0; a.scale < 0 && k < 16; ++k) rows[i][k] ^= 0x80008000;
                    if (a.scale == 0) __builtin_memset(rows[i], 0, 64);
                }
                transpose_words(rows[0], queries + (2 * step + tile) * TILE_BYTES);
            }
    }

    // Computes the products of a block's keys, and makes weights between them, `portion` pairs of keys at a time.
    LRQ_INLINE void score(int64_t block, Making &making, int64_t portion) const {
        const int64_t stride = s.key_bytes(), keys = keys_of(block);
        float *to = scores_of(block);
        for (int64_t i = 0; i < keys; i += TILE_STEP, to += TILE_STEP * TILE_QUERIES) {
            const uint8_t *key = s.key(block * TILE_BLOCK_KEYS + i), *query = queries;
            unroll<4>([](auto t) LRQ_LAMBDA { tile_zero<t>(); });
            for (int64_t k = 0; k < s.steps; ++k, key += 2 * TILE_STEP, query += 2 * TILE_BYTES) {
                tile_load<6>(query, 64), tile_load<7>(query + TILE_BYTES, 64);
                tile_stream<4>(key, stride);
                tile_pairs<0, 4, 6>(), tile_pairs<1, 4, 7>();
                tile_stream<5>(key + 16 * stride, stride);
                tile_pairs<2, 5, 6>(), tile_pairs<3, 5, 7>();
                making.advance(portion);
            }
            tile_store<0>(to, QUERY_ROW), tile_store<1>(to + 16, QUERY_ROW);
            tile_store<2>(to + 16 * TILE_QUERIES, QUERY_ROW), tile_store<3>(to + 16 * TILE_QUERIES + 16, QUERY_ROW);
        }
    }

    // Adds the values of a block's keys to the outputs, and makes weights meanwhile.
    LRQ_INLINE void add_values(int64_t block, Making &making, int64_t portion) const {
        const int64_t first_key = block * TILE_BLOCK_KEYS, keys = keys_of(block);
        for (int64_t tile = 0; tile < s.tiles; tile += 2) {
            float *to = out + 16 * tile * TILE_QUERIES;
            const bool is_pair = tile + 1 < s.tiles;
            tile_load<0>(to, QUERY_ROW), tile_load<1>(to + 16, QUERY_ROW);
            if (is_pair) tile_load<2>(to + 16 * TILE_QUERIES, QUERY_ROW), tile_load<3>(to + 16 * TILE_QUERIES + 16, QUERY_ROW);
            const uint8_t *weight = weights_of(block);
            for (int64_t i = 0; i < keys; i += TILE_STEP, weight += 2 * TILE_BYTES) {
                const uint8_t *value = s.value(first_key + i, tile);
                tile_load<6>(weight, 64), tile_load<7>(weight + TILE_BYTES, 64);
                tile_stream<4>(value, 64);
                tile_pairs<0, 4, 6>(), tile_pairs<1, 4, 7>();
                if (is_pair) {
                    tile_stream<5>(value + TILE_BYTES, 64);
                    tile_pairs<2, 5, 6>(), tile_pairs<3, 5, 7>();
                }
                making.advance(portion);
            }
            tile_store<0>(to, QUERY_ROW), tile_store<1>(to + 16, QUERY_ROW);
            if (is_pair) tile_store<2>(to + 16 * TILE_QUERIES, QUERY_ROW), tile_store<3>(to + 16 * TILE_QUERIES + 16, QUERY_ROW);
        }
    }

    // Adds the mask to a block's scores and looks for the highest ones. Where one exceeds by too much what is subtracted, it
    // takes its place, and what the query has got is scaled; before that, the block that waits joins it. No query changes
    // what others get.
    template <TileMask MASK> LRQ_INLINE void raise(int64_t block, int64_t &waiting) const {
        const int64_t from = block * TILE_BLOCK_KEYS, keys = keys_of(block);
        float *score = scores_of(block);
        for (int64_t i = least(keys, greatest(s.count - from, 0)) * TILE_QUERIES; i < keys * TILE_QUERIES; ++i)
            score[i] = -__builtin_inff();
        if constexpr (MASK != UNMASKED) pack_mask<MASK>(s.first + from, least(keys, s.count - from));
        Floats highest[QUERY_REGISTERS];
        unroll<QUERY_REGISTERS>([&](auto v) LRQ_LAMBDA { highest[v] = splat(-__builtin_inff()); });
        for (int64_t i = 0; i < least(keys, s.count - from); ++i, score += TILE_QUERIES)
            unroll<QUERY_REGISTERS>([&](auto v) LRQ_LAMBDA {
                Floats x = load<Floats>(score + v * WIDTH);
                if constexpr (MASK != UNMASKED) {
                    const float *added = mask + (MASK == MASKED_BY_KEY ? i : i * TILE_QUERIES + v * WIDTH);
                    x = fma(x, splat(factor), MASK == MASKED_BY_KEY ? splat(*added) : load<Floats>(added));
                    store(score + v * WIDTH, x);
                }
                highest[v] = larger(highest[v], x);
            });
        Ints exceeds[QUERY_REGISTERS], is_higher = {};
        unroll<QUERY_REGISTERS>([&](auto v) LRQ_LAMBDA {
            if constexpr (MASK == UNMASKED) highest[v] = highest[v] * splat(factor);
            exceeds[v] = ~(highest[v] <= load<Floats>(subtracted + v * WIDTH) + splat(MOST_EXCESS));  // or is NaN
            is_higher |= exceeds[v];
        });
        if (!is_any(is_higher)) return;
        Making none;
        if (waiting >= 0) add_values(waiting, none, 1);
        waiting = -1;
        unroll<QUERY_REGISTERS>([&](auto v) LRQ_LAMBDA {
            const Floats before = load<Floats>(subtracted + v * WIDTH), now = exceeds[v] ? highest[v] : before;
            const Floats kept = exceeds[v] ? power_of_two(before - now) : splat(1);
            store(subtracted + v * WIDTH, now);
            store(sum + v * WIDTH, load<Floats>(sum + v * WIDTH) * kept);
            for (int64_t k = 0; k < 16 * s.tiles; ++k) {
                float *at = out + k * TILE_QUERIES + v * WIDTH;
                store(at, load<Floats>(at) * kept);
            }
        });
    }

    // The mask of `keys` keys from `key` as logarithms to base 2: (keys), or (keys, queries).
    template <TileMask MASK> void pack_mask(int64_t key, int64_t keys) const {
        const int64_t start = b * a.mask_stride[0] + h * a.mask_stride[1] + key;
        for (int64_t k = 0; k < keys; k += 16) {
            const int64_t there = least(16, keys - k);
            if constexpr (MASK == MASKED_BY_KEY) {
                for (int64_t v = 0; v < there; v += WIDTH) store(mask + k + v, read_mask(start + k + v, there - v));
            } else {
                alignas(64) uint32_t rows[16][16];
                alignas(64) uint8_t columns[16][64];
                for (int64_t query = 0; query < TILE_QUERIES; query += 16) {
                    for (int64_t i = 0; i < 16; ++i) {
                        const int64_t row = start + (first + least(query + i, count - 1)) * a.mask_stride[2] + k;
                        for (int64_t v = 0; v < there; v += WIDTH) store(rows[i] + v, read_mask(row + v, there - v));
                    }
                    transpose_words(rows[0], columns[0]);
                    for (int64_t i = 0; i < there; ++i) __builtin_memcpy(mask + (k + i) * TILE_QUERIES + query, columns[i], 64);
                }
            }
        }
    }

    // A register of the mask from element `at`, of which `there` are read. Finite entries stay finite: a row of the lowest
    // numbers has a softmax, a row of -inf has none.
    LRQ_INLINE Floats read_mask(int64_t at, int64_t there) const {
        const Floats x = a.mask_type == LRQ_FLOAT32 ? load_as<LRQ_FLOAT32>(a.mask, at, there)
                                                    : load_as<LRQ_BFLOAT16>(a.mask, at, there);
        const Floats y = x * splat(LOG2_E), nothing = splat(-__builtin_inff());
        return (y == nothing) & (x != nothing) ? splat(LOWEST) : y;
    }
};

inline void attend_tiles(const lrq_attention &a, int threads) {
    const int64_t blocks = ceil_div(a.queries, TILE_QUERIES), heads = a.batch * a.heads;
    const int64_t chunks = ceil_div(blocks, least(greatest(heads * blocks / (4 * threads), 1), TILE_CHUNK_BLOCKS));
    const int64_t chunk = ceil_div(blocks, chunks);
    TileSegment all{};
    all.steps = ceil_div(a.width, TILE_STEP), all.tiles = ceil_div(a.width, 16);
    const int64_t key_bytes = all.key_bytes() + 32 * all.tiles;  // of a key and its value
    const int64_t segments = ceil_div(a.keys * key_bytes, TILE_SEGMENT_BYTES);
    const int64_t segment_keys = round_up(ceil_div(a.keys, segments), TILE_BLOCK_KEYS);
    parallel_for(threads, heads * chunks, [&](int64_t task) {
        const int64_t b = task / chunks / a.heads, h = task / chunks % a.heads;
        const int64_t first_block = task % chunks * chunk, end_block = least(first_block + chunk, blocks);
        TileSegment s = all;
        s.keys = static_cast<uint8_t *>(scratch(SLOT_COPY, segment_keys * key_bytes));
        s.values = s.keys + segment_keys * s.key_bytes();
        uint8_t *memory = static_cast<uint8_t *>(scratch(SLOT_ROWS, TileQueries::memory_bytes(s)));
        const int64_t seen_floats = TileQueries::seen_floats(s);
        float *seen = static_cast<float *>(scratch(SLOT_SUMS, 4 * seen_floats * (segment_keys < a.keys ? chunk : 1)));
        for (s.first = 0; s.first < a.keys; s.first += segment_keys) {
            s.count = least(segment_keys, a.keys - s.first), s.padded = round_up(s.count, TILE_STEP);
            pack_tiles(a, b, h, s);
            const Tiles tiles;
            for (int64_t block = first_block; block < end_block; ++block) {
                const int64_t first = block * TILE_QUERIES, count = least(TILE_QUERIES, a.queries - first);
                const TileQueries queries(a, b, h, first, count, s, memory,
                                          seen + (segment_keys < a.keys ? (block - first_block) * seen_floats : 0));
                if (!s.first) queries.begin();
                if (!a.mask)
                    queries.attend<UNMASKED>();
                else if (!a.mask_stride[2])
                    queries.attend<MASKED_BY_KEY>();
                else
                    queries.attend<MASKED_BY_PAIR>();
                if (s.first + s.count == a.keys) queries.finish();
            }
        }
    });
}

constexpr auto attend = &attend_tiles;
constexpr auto repeat_pairs = &repeat_tiles<true>;
#elif defined(__AVX512BF16__)
constexpr auto attend = &attend_all;
constexpr auto repeat_pairs = &repeat_all_pairs;
#else
constexpr void (*attend)(const lrq_attention &, int threads) = nullptr;
constexpr int64_t (*repeat_pairs)(int64_t iterations) = nullptr;
#endif

}  // namespace LRQ_ISA
}  // namespace lrq
