// The block of AMX: 32 tokens and 32 channels, whose sums are four tiles.
//
// The first cache holds a block's tokens, a part of their inputs at a time, while all panels of the group are streamed past
// them. Tiles of sums are stored between the first products of the block after, and outputs are written between the others:
// products of tiles leave the vector units idle.
#pragma once

#include "tiles.h"
#include "vector_block.h"

#if defined(LRQ_HAS_TILES)
namespace lrq {
namespace LRQ_ISA {

constexpr int64_t TILE_TOKENS = 32, TILE_CHANNELS = 32;
constexpr int64_t STREAMED_BYTES = 1 << 20;  // of outputs: more are written past the caches, which they would fill

// The row scales and biases of a panel's channels; 0 where the layer has no channel.
struct alignas(64) TileCoefficients {
    float row_scale[TILE_CHANNELS], bias[TILE_CHANNELS];

    void read(const lrq_weight &w, int64_t n) {
        for (int64_t k = 0; k < TILE_CHANNELS; ++k) {
            const bool is_there = n + k < w.out_features;
            row_scale[k] = is_there ? w.row_scale[n + k] : 0;
            bias[k] = !is_there ? 0 : w.bias ? w.bias[n + k] : -0.0f;  // adding -0 changes no number
        }
    }
};

// Outputs of a block in bfloat16, a line of the cache in each row, that are written beside the next products.
struct TileOutputs {
    const TileCoefficients *coefficients = nullptr;
    const int32_t *sums = nullptr;  // (rows, TILE_CHANNELS)
    const float *scale = nullptr;   // (rows)
    const float *added = nullptr;   // (rows, TILE_CHANNELS), or nullptr
    uint16_t *to = nullptr;
    int64_t stride = 0, rows = 0;  // rows: not yet written
    bool is_streamed = false;      // past the caches

    LRQ_INLINE void write(int64_t count) {
        for (count = least(count, rows); count > 0; --count) {
            Halves y[TILE_CHANNELS / WIDTH];
            unroll<TILE_CHANNELS / WIDTH>([&](auto v) LRQ_LAMBDA {
                Floats x = scale_sums(sums + v * WIDTH, load<Floats>(coefficients->row_scale + v * WIDTH), *scale,
                                      load<Floats>(coefficients->bias + v * WIDTH));
                if (added) x = x + load<Floats>(added + v * WIDTH);
                y[v] = to_bfloat16(x);
            });
            store_line(y);
            --rows, sums += TILE_CHANNELS, ++scale, to += stride;
            if (added) added += TILE_CHANNELS;
        }
    }

  private:
    LRQ_INLINE void store_line(const Halves *y) const {
#if defined(__AVX512F__)
        const __m512i line = _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)y[0]), (__m256i)y[1], 1);
        if (is_streamed) return _mm512_stream_si512(reinterpret_cast<__m512i *>(to), line);
        __builtin_prefetch(to + TILE_CHANNELS, 1);  // the next panel's
        _mm512_storeu_si512(to, line);
#else
        __builtin_memcpy(to, y, 2 * TILE_CHANNELS);
#endif
    }
};

// A panel begins with its channels' coefficients; then come what adds the principal part, and the weights: the tiles of 16
// channels one after another, then those of the other 16.
class TileBlock {
  public:
    static constexpr int64_t TOKENS = TILE_TOKENS, CHANNELS = TILE_CHANNELS, STEP_TILES = 4;
    static constexpr int64_t GROUP_BYTES = 1152 << 10, LEAST_BLOCKS = 4, SPLIT_BLOCKS = 8;

    // While it exists, tiles hold the sums of the panel that was multiplied last.
    class Scope {
      public:
        explicit Scope(TileBlock &block) : block(block) {}
        ~Scope() { block.store_sums(); }

      private:
        Tiles tiles;
        TileBlock &block;
    };

    Meanwhile meanwhile;

    TileBlock(const Outputs &outputs, int64_t in_tiles)
        : outputs(outputs), weight_offset(sizeof(TileCoefficients) + outlet_bytes_of(outputs)),
          half_bytes(weight_bytes(in_tiles) / 2), width(outputs.w.in_features),
          is_copied(width % 64 != 0 || width % 4096 == 0), copy_stride(16 * round_up(in_tiles, STEP_TILES) + 64),
          copy(static_cast<uint8_t *>(scratch(SLOT_COPY, TOKENS * copy_stride))),
          is_streaming(outputs.w.out_features % CHANNELS == 0 && 2 * outputs.rows * outputs.w.out_features > STREAMED_BYTES) {}
    TileBlock(const TileBlock &) = delete;

    static int64_t weight_bytes(int64_t in_tiles) { return round_up(in_tiles, STEP_TILES) * 16 * CHANNELS; }
    static int64_t panel_bytes(const Outputs &outputs, int64_t in_tiles) {
        return sizeof(TileCoefficients) + outlet_bytes_of(outputs) + weight_bytes(in_tiles);
    }

    static int32_t start_of(const int8_t *, int64_t) { return 0; }

    void pack_panel(int64_t tile, int64_t tiles, int64_t from, int64_t to, uint8_t *panel) const {
        reinterpret_cast<TileCoefficients *>(panel)->read(outputs.w, 16 * tile);
        if (outputs.outlet) __builtin_memset(panel + sizeof(TileCoefficients), 0, 2 * TILE_BYTES);
        for (int64_t t = 0; outputs.outlet && t < tiles; ++t)
            outputs.outlet->pack(outputs.w, tile + t, panel + sizeof(TileCoefficients) + t * TILE_BYTES);
        const int64_t bytes = 256 * (to - from), all_bytes = 256 * round_up(to - from, STEP_TILES);
        for (int64_t t = 0; t < CHANNELS / 16; ++t) {
            uint8_t *weights = panel + weight_offset + t * half_bytes;
            if (t >= tiles) {
                __builtin_memset(weights, 0, all_bytes);
                continue;
            }
            with_coding(outputs.w, [&](auto bits, auto is_trellis) {
                decode_panel<bits, is_trellis, false>(outputs.w, tile + t, from, to, weights, 16 / LANES, 0);
            });
            __builtin_memset(weights + bytes, 0, all_bytes - bytes);
        }
    }

    void take_tokens(const int8_t *codes, int64_t token, int64_t count, int64_t from, int64_t to) {
        const int8_t *first = codes + token * width + 16 * from;
        const int64_t inputs = least(16 * to, width) - 16 * from, all = round_up(count, TILE_ROWS);
        first_token = token, rows = count, steps = ceil_div(inputs, 64);
        for (int64_t i = 0; outputs.outlet && i < count; ++i)
            __builtin_memcpy(coordinates[i], outputs.outlet->coordinates(token + i), outputs.outlet->coordinate_bytes());
        part_count = steps > MOST_STEPS ? ceil_div(steps, PART_STEPS) : 1, part_steps = ceil_div(steps, part_count);
        tokens = reinterpret_cast<const uint8_t *>(first), stride = width;
        if (!is_copied && count == all) return;
        tokens = copy, stride = copy_stride;
        for (int64_t i = 0; i < all; ++i) {
            const int64_t there = i < count ? inputs : 0;
            __builtin_memcpy(copy + i * stride, first + i * width, there);
            __builtin_memset(copy + i * stride + there, 0, 64 * steps - there);
        }
    }

    int64_t parts() const { return part_count; }
    void take_part(int64_t part) { first_step = part * part_steps, last_step = least(first_step + part_steps, steps); }

    void multiply(const uint8_t *panel, int64_t, const int32_t *starts, int32_t *sums) {
        const uint8_t *weights = panel + weight_offset;
        if (rows > TILE_ROWS)
            multiply_tiles<2>(weights, starts, sums);
        else
            multiply_tiles<1>(weights, starts, sums);
    }

    void finish(const uint8_t *panel, int64_t tile, int64_t, const int32_t *sums) {
        const int64_t channels = outputs.w.out_features, n = 16 * tile;
        if (outputs.outlet) find_added(panel);
        const float *more = outputs.outlet ? added : nullptr;
        if (outputs.type != LRQ_BFLOAT16 || n + CHANNELS > channels) {
            store_sums();
            return finish_channels(outputs, sums, CHANNELS, more, first_token, rows, n);
        }
        const auto *coefficients = reinterpret_cast<const TileCoefficients *>(panel);
        uint16_t *to = static_cast<uint16_t *>(outputs.to) + first_token * channels + n;
        pending.coefficients = coefficients, pending.sums = sums, pending.scale = outputs.scale + first_token;
        pending.added = more;
        pending.to = to, pending.stride = channels, pending.rows = rows;
        pending.is_streamed = is_streaming && reinterpret_cast<uintptr_t>(to) % 64 == 0;
    }

    void finish_pending() {
        pending.write(pending.rows);
#if defined(__AVX512F__)
        _mm_sfence();
#endif
    }

  private:
    // Steps of 64 inputs. The tokens of so many fill most of the first cache; where there are more, it holds sums, too.
    static constexpr int64_t MOST_STEPS = 18, PART_STEPS = 12;

    const Outputs &outputs;
    const int64_t weight_offset, half_bytes, width;
    const bool is_copied;  // tokens are, where they must be padded, or would all lie in one set of the cache
    const int64_t copy_stride;
    uint8_t *const copy;
    const bool is_streaming;
    const uint8_t *tokens = nullptr;
    int64_t first_token = 0, rows = 0, steps = 0, stride = 0;
    int64_t part_count = 1, part_steps = 0, first_step = 0, last_step = 0;
    int32_t *held = nullptr;  // where the sums in the tiles belong; nullptr if they are there
    TileOutputs pending;

    alignas(64) uint8_t coordinates[TOKENS][64] = {};  // the tokens' principal parts
    alignas(64) float added[TOKENS * CHANNELS];        // what becomes of them in the outputs of the panel multiplied last

    static int64_t outlet_bytes_of(const Outputs &outputs) { return outputs.outlet ? CHANNELS / 16 * TILE_BYTES : 0; }

    void find_added(const uint8_t *panel) {
        const uint8_t *directions = panel + sizeof(TileCoefficients);
        store_sums();
        unroll<4>([](auto t) LRQ_LAMBDA { tile_zero<t>(); });
        tile_load<4>(coordinates[0], 64), tile_load<6>(directions, 64), tile_pairs<0, 4, 6>();
        tile_load<7>(directions + TILE_BYTES, 64), tile_pairs<1, 4, 7>();
        if (rows > TILE_ROWS)
            tile_load<5>(coordinates[TILE_ROWS], 64), tile_pairs<2, 5, 6>(), tile_pairs<3, 5, 7>();
        unroll<4>([&](auto t) LRQ_LAMBDA { tile_store<t>(added + offset_of(t), 4 * CHANNELS); });
    }

    // Tile of sums 2 r + c has the tokens from 16 r and the channels from 16 c.
    static constexpr int64_t offset_of(int tile) { return tile / 2 * TILE_ROWS * CHANNELS + tile % 2 * 16; }

    void store_sums() {
        if (!held) return;
        tile_store<0>(held, 4 * CHANNELS), tile_store<1>(held + offset_of(1), 4 * CHANNELS);
        if (rows > TILE_ROWS)
            tile_store<2>(held + offset_of(2), 4 * CHANNELS), tile_store<3>(held + offset_of(3), 4 * CHANNELS);
        held = nullptr;
    }

    // Puts a tile's sums where they belong and begins those of a panel: with zeros, or with what it has so far.
    template <int T> LRQ_INLINE void begin_tile(int32_t *before, const int32_t *sums) const {
        if (before) tile_store<T>(before + offset_of(T), 4 * CHANNELS);
        if (sums)
            tile_load<T>(sums + offset_of(T), 4 * CHANNELS);
        else
            tile_zero<T>();
    }

    template <int R> void multiply_tiles(const uint8_t *weights, const int32_t *starts, int32_t *sums) {
        constexpr int SUMS = 0, A = 4, B = 6;
        const int64_t stride = this->stride, count = last_step - first_step;
        const uint8_t *a = tokens + 64 * first_step, *b = weights + TILE_BYTES * first_step, *c = b + half_bytes;
        int32_t *const before = held;
        const bool is_there = before == sums && !starts;  // in the tiles
        const auto begin = [&](auto tile) LRQ_LAMBDA {
            if (!is_there) begin_tile<tile>(before, starts ? nullptr : sums);
        };
        tile_load<A>(a, stride), tile_stream<B>(b, 64);
        begin(std::integral_constant<int, 0>{}), tile_dot<SUMS, A, B>();
        tile_stream<B + 1>(c, 64);
        begin(std::integral_constant<int, 1>{}), tile_dot<SUMS + 1, A, B + 1>();
        if constexpr (R == 2) {
            tile_load<A + 1>(a + TILE_ROWS * stride, stride);
            begin(std::integral_constant<int, 2>{}), tile_dot<SUMS + 2, A + 1, B>();
            begin(std::integral_constant<int, 3>{}), tile_dot<SUMS + 3, A + 1, B + 1>();
        }
        held = sums;
        TileOutputs outputs = pending;
        const int64_t rows_per_step = ceil_div(outputs.rows, greatest(count - 1, 1));
        for (int64_t k = 1; k < count; ++k) {
            a += 64, b += TILE_BYTES, c += TILE_BYTES;
            tile_load<A>(a, stride), tile_stream<B>(b, 64);
            tile_dot<SUMS, A, B>();
            tile_stream<B + 1>(c, 64);
            tile_dot<SUMS + 1, A, B + 1>();
            if constexpr (R == 2) {
                tile_load<A + 1>(a + TILE_ROWS * stride, stride);
                tile_dot<SUMS + 2, A + 1, B>();
                tile_dot<SUMS + 3, A + 1, B + 1>();
            }
            outputs.write(rows_per_step);
            meanwhile.fetch_line<2>(), meanwhile.fetch_line<2>();  // the first cache is full
        }
        outputs.write(outputs.rows);
        pending.rows = 0;
    }
};

// Repeats products of tiles, the most the hardware can do; returns the number of operations.
template <bool IS_PAIRS> inline int64_t repeat_tiles(int64_t iterations) {
    const Tiles tiles;
    unroll<TILES>([](auto t) LRQ_LAMBDA { tile_zero<t>(); });
    for (int64_t i = 0; i < iterations; ++i)
        unroll<4>([](auto t) LRQ_LAMBDA {
            if constexpr (IS_PAIRS)
                tile_pairs<t, 4 + t / 2, 6 + t % 2>();
            else
                tile_dot<t, 4 + t / 2, 6 + t % 2>();
        });
    return iterations * 4 * 2 * 16 * 16 * (IS_PAIRS ? 32 : 64);
}

}  // namespace LRQ_ISA
}  // namespace lrq
#endif
