// The block of codes and weights that the compiler writes from the dot product of dot.h, for every instruction set.
//
// The product (product.h) is a template over a block policy: a class with the public members of VectorBlock. It says how
// large a block is, how its panel looks, how it is multiplied and how its sums become outputs. An object of it belongs to
// one task: one thread, one chunk of tokens, one group of panels. The thread may yield between two calls.
#pragma once

#include "decode.h"
#include "meanwhile.h"

namespace lrq {
namespace LRQ_ISA {

// Multiplies ROWS tokens (stride bytes apart) by T tiles of channels over `steps` steps. sums (ROWS, 16 * T) grow by the
// products; with starts, token m's begin at starts[m] instead.
template <int ROWS, int T>
inline void multiply_rows(const uint8_t *panel, int64_t steps, const uint8_t *tokens, int64_t stride,
                          const int32_t *starts, int32_t *sums, Meanwhile &meanwhile) {
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

template <int T, int ROWS = 1>
inline void multiply_tiles(int64_t rows, const uint8_t *panel, int64_t steps, const uint8_t *tokens, int64_t stride,
                           const int32_t *starts, int32_t *sums, Meanwhile &meanwhile) {
    if (rows == ROWS) return multiply_rows<ROWS, T>(panel, steps, tokens, stride, starts, sums, meanwhile);
    if constexpr (ROWS < BLOCK_TOKENS)
        multiply_tiles<T, ROWS + 1>(rows, panel, steps, tokens, stride, starts, sums, meanwhile);
}

// What a token's sums start at, so that the panel's bias cancels.
LRQ_INLINE int32_t start_of(const int8_t *codes, int64_t count) {
    if (!IS_BIASED) return 0;
    int32_t total = 0;
    int64_t k = 0;
#if defined(__AVX512VNNI__) && !defined(LRQ_256)
    __m512i sums = _mm512_setzero_si512();
    for (; k + 64 <= count; k += 64) sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(codes + k));
    total = _mm512_reduce_add_epi32(sums);
#endif
    for (; k < count; ++k) total += codes[k];
    return -128 * total;
}

// Copies `count` codes of a token as elements of the dot product's type, followed by zeros up to `padded` elements.
LRQ_INLINE void copy_token(const int8_t *from, int64_t count, int64_t padded, uint8_t *to) {
    if constexpr (ELEMENT == 2) {
        int16_t *wide = reinterpret_cast<int16_t *>(to);
        for (int64_t k = 0; k < count; ++k) wide[k] = from[k];
    } else {
        __builtin_memcpy(to, from, count);
    }
    __builtin_memset(to + count * ELEMENT, 0, (padded - count) * ELEMENT);
}

class VectorBlock {
  public:
    static constexpr int64_t TOKENS = BLOCK_TOKENS, CHANNELS = BLOCK_CHANNELS;
    // of the weights of all panels that a thread keeps at a time
    static constexpr int64_t GROUP_BYTES = LRQ_ISA::GROUP_BYTES;
    // Panels of a group, at least; where fewer fit, inputs are split at multiples of STEP_TILES, and there are so many.
    static constexpr int64_t LEAST_BLOCKS = 2, SPLIT_BLOCKS = 4, STEP_TILES = 1;

    // Exists while a block of tokens is multiplied.
    struct Scope {
        explicit Scope(VectorBlock &) {}
    };

    // Lines to be fetched beside the products: the loop says which.
    Meanwhile meanwhile;

    // in_tiles: the most that a panel covers.
    VectorBlock(const Outputs &outputs, int64_t in_tiles)
        : outputs(outputs), outlet_bytes(outlet_bytes_of(outputs)), width(outputs.w.in_features) {
        // tokens are copied where they must be widened, or padded to whole steps, and where they are so far apart that all
        // of a block would lie in one set of the cache
        if (ELEMENT == 1 && width % STEP == 0 && width % 4096) return;
        copy_stride = in_tiles * 16 * ELEMENT + 64;
        copy = static_cast<uint8_t *>(scratch(SLOT_COPY, TOKENS * copy_stride));
    }
    VectorBlock(const VectorBlock &) = delete;

    // Bytes of a panel's weights, and of all it holds.
    static constexpr int64_t weight_bytes(int64_t in_tiles) { return in_tiles * 16 * CHANNELS * ELEMENT; }
    static int64_t panel_bytes(const Outputs &outputs, int64_t in_tiles) {
        return outlet_bytes_of(outputs) + weight_bytes(in_tiles);
    }

    // What a token's sums start at.
    static int32_t start_of(const int8_t *codes, int64_t count) { return LRQ_ISA::start_of(codes, count); }

    // Decodes a panel: `tiles` output tiles from `tile`, input tiles [from, to).
    void pack_panel(int64_t tile, int64_t tiles, int64_t from, int64_t to, uint8_t *panel) const {
        for (int64_t t = 0; outputs.outlet && t < tiles; ++t)
            outputs.outlet->pack(outputs.w, tile + t, panel + t * outputs.outlet->tile_bytes());
        for (int64_t t = 0; t < tiles; ++t)
            with_coding(outputs.w, [&](auto bits, auto is_trellis) {
                decode_panel<bits, is_trellis>(outputs.w, tile + t, from, to, panel + outlet_bytes, tiles * 16 / LANES,
                                               t * 16 / LANES);
            });
    }

    // The tokens that are multiplied from now on: `count` tokens from `token`, of all codes, and their input tiles [from,
    // to).
    void take_tokens(const int8_t *codes, int64_t token, int64_t count, int64_t from, int64_t to) {
        const int8_t *first = codes + token * width + 16 * from;
        const int64_t inputs = least(16 * to, width) - 16 * from;
        first_token = token, rows = count, steps = ceil_div(inputs, STEP);
        tokens = copy ? copy : reinterpret_cast<const uint8_t *>(first), stride = copy ? copy_stride : width;
        for (int64_t i = 0; copy && i < rows; ++i)
            copy_token(first + i * width, inputs, steps * STEP, copy + i * copy_stride);
    }

    // The parts of these inputs that are multiplied one after another, each by all panels; and the one from now on.
    static constexpr int64_t parts() { return 1; }
    void take_part(int64_t) {}

    // Multiplies these tokens by a panel of `tiles` tiles. sums (rows, 16 * tiles) grow by the products; with starts, token
    // m's begin at starts[m] instead.
    void multiply(const uint8_t *panel, int64_t tiles, const int32_t *starts, int32_t *sums) {
        const uint8_t *weights = panel + outlet_bytes;
        if constexpr (BLOCK_TILES >= 3)
            if (tiles == 3) return multiply_tiles<3>(rows, weights, steps, tokens, stride, starts, sums, meanwhile);
        if constexpr (BLOCK_TILES >= 2)
            if (tiles == 2) return multiply_tiles<2>(rows, weights, steps, tokens, stride, starts, sums, meanwhile);
        multiply_tiles<1>(rows, weights, steps, tokens, stride, starts, sums, meanwhile);
    }

    // Makes outputs of complete sums. A policy may read the sums until finish_pending() or the end of the next finish().
    void finish(const uint8_t *panel, int64_t tile, int64_t tiles, const int32_t *sums) {
        alignas(64) float added[TOKENS * CHANNELS];
        if (outputs.outlet) outputs.outlet->multiply(panel, tiles, first_token, rows, added);
        finish_channels(outputs, sums, 16 * tiles, outputs.outlet ? added : nullptr, first_token, rows, 16 * tile);
    }

    // Writes what finish() has left to a later product.
    void finish_pending() {}

  protected:
    const Outputs &outputs;
    const int64_t outlet_bytes;  // of a panel, which begins with what adds the principal part; then weights follow
    const int64_t width;
    uint8_t *copy = nullptr;  // of a block's tokens, or nullptr
    int64_t copy_stride = 0;
    const uint8_t *tokens = nullptr;  // the first one's part, in elements; the next ones follow `stride` bytes apart
    int64_t first_token = 0, rows = 0, steps = 0, stride = 0;

    static int64_t outlet_bytes_of(const Outputs &outputs) {
        return outputs.outlet ? BLOCK_TILES * outputs.outlet->tile_bytes() : 0;
    }
};

}  // namespace LRQ_ISA
}  // namespace lrq
