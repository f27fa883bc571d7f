// y = codes x weights: packed weights are decoded into panels that stay in cache while all tokens pass. (A few tokens need
// no panel: few_tokens.h.)
//
// Work is cut into tasks: a group of panels, and a chunk of tokens that are prepared together. A thread decodes a group
// once and keeps it for the chunks of that group it is handed. Sums are int32 and exact in any order. How a block is
// multiplied is the policy's affair (vector_block.h).
#pragma once

#include "rounder.h"
#include "tile_block.h"
#include "vnni_block.h"

namespace lrq {
namespace LRQ_ISA {

// How a product is cut. A group has group_blocks panels; where two whole panels exceed GROUP_BYTES, inputs are cut into
// `splits` parts of split_tiles input tiles, and a panel covers one of them.
struct Shape {
    int64_t in_tiles, out_tiles, blocks, group_blocks, groups, chunk, chunks, split_tiles, splits;
};

constexpr int64_t MIN_CHUNK = 64, MAX_CHUNK = 512;   // tokens
constexpr int64_t TASKS_PER_THREAD = 24;             // at least, where chunks may be so small

template <class Block> Shape shape_of(const lrq_weight &w, int64_t rows, int threads) {
    Shape s;
    s.in_tiles = ceil_div(w.in_features, 16), s.out_tiles = ceil_div(w.out_features, 16);
    s.blocks = ceil_div(w.out_features, Block::CHANNELS);
    s.group_blocks = Block::GROUP_BYTES / Block::weight_bytes(s.in_tiles);
    s.splits = 1;
    if (s.group_blocks < Block::LEAST_BLOCKS) {  // split, so that a block of tokens serves several panels
        s.group_blocks = least(Block::SPLIT_BLOCKS, s.blocks);
        s.splits = ceil_div(s.group_blocks * Block::weight_bytes(s.in_tiles), Block::GROUP_BYTES);
    }
    s.split_tiles = round_up(ceil_div(s.in_tiles, s.splits), Block::STEP_TILES);
    s.splits = ceil_div(s.in_tiles, s.split_tiles);
    if (rows <= 8 * Block::TOKENS) s.group_blocks = least(s.group_blocks, ceil_div(s.blocks, 4 * threads));
    s.groups = ceil_div(s.blocks, s.group_blocks);
    if (s.blocks >= threads) s.groups = round_up(s.groups, threads);
    s.group_blocks = ceil_div(s.blocks, s.groups);  // groups of the same size
    s.groups = ceil_div(s.blocks, s.group_blocks);
    const int64_t chunk = least(greatest(ceil_div(rows * s.groups, TASKS_PER_THREAD * threads), MIN_CHUNK), MAX_CHUNK);
    s.chunk = least(round_up(chunk, Block::TOKENS), rows);
    s.chunks = ceil_div(rows, s.chunk);
    return s;
}

// The group and part of the inputs whose panels a thread's memory holds, and the call that decoded them; no two calls have
// the same number.
struct PanelKey {
    uint64_t call;
    int64_t group, split;
};

// A chunk is prepared (its tokens are rounded, if there is a rounder, and summed) by the first thread that is handed it,
// block by block as that thread multiplies it. Other threads that are handed it meanwhile wait for each block.
struct Chunk {
    int32_t is_taken, ready;  // ready: tokens that are prepared
};

// What the thread that prepares a chunk tells the others. If it runs out of memory, they must not wait for ever: in the end
// all count as prepared.
struct Lead {
    int32_t *ready;  // nullptr in a thread that does not prepare
    int64_t count;
    ~Lead() { publish(count); }
    void publish(int64_t rows) const {
        if (ready) __atomic_store_n(ready, static_cast<int32_t>(rows), __ATOMIC_RELEASE);
    }
};

// What all tasks of one call share.
template <class Block> class PanelProduct {
  public:
    PanelProduct(const Outputs &outputs, const int8_t *codes, const Rounder *rounder, int threads)
        : outputs(outputs), rows(outputs.rows), codes(codes), rounder(rounder), threads(threads),
          shape(shape_of<Block>(outputs.w, rows, threads)), call(next_call()) {
        const size_t state_bytes = sizeof(int64_t) * threads + sizeof(Chunk) * shape.chunks;
        next_tasks = static_cast<int64_t *>(scratch(SLOT_CALL, state_bytes + sizeof(int32_t) * rows));
        chunks = reinterpret_cast<Chunk *>(next_tasks + threads);
        starts = reinterpret_cast<int32_t *>(chunks + shape.chunks);
        __builtin_memset(next_tasks, 0, state_bytes);
    }

    // A thread takes the tasks of its own groups first, so that few panels are decoded twice, then what is left of the
    // other threads' tasks.
    void run() const {
        parallel_for(threads, threads, [&](int64_t thread) {
            for (int64_t i = 0; i < threads; ++i) run_tasks_of((thread + i) % threads);
        });
    }

  private:
    class Task;

    const Outputs &outputs;
    const int64_t rows;
    const int8_t *const codes;
    const Rounder *const rounder;  // what writes the codes; nullptr if they are there
    const int threads;
    const Shape shape;
    const uint64_t call;
    int64_t *next_tasks;  // (threads)
    Chunk *chunks;
    int32_t *starts;  // (rows), what the tokens' sums start at

    // A thread's tasks go through all chunks of its first group, then of its next one. Each thread begins at another chunk,
    // and prepares it.
    void run_tasks_of(int64_t thread) const {
        const int64_t begin = thread * shape.groups / threads * shape.chunks;
        const int64_t end = (thread + 1) * shape.groups / threads * shape.chunks, shift = thread * shape.chunks / threads;
        for (;;) {
            const int64_t task = begin + __atomic_fetch_add(next_tasks + thread, 1, __ATOMIC_RELAXED);
            if (task >= end) return;
            Task(*this, task / shape.chunks, (task + shift) % shape.chunks).run();
        }
    }
};

// The product of one group of panels and one chunk of tokens.
template <class Block> class PanelProduct<Block>::Task {
  public:
    Task(const PanelProduct &product, int64_t group, int64_t index)
        : product(product), s(product.shape), group(group), first(index * s.chunk),
          count(least(s.chunk, product.rows - first)), first_block(group * s.group_blocks),
          blocks(least(s.group_blocks, s.blocks - first_block)),
          panel_bytes(Block::panel_bytes(product.outputs, s.split_tiles)),
          memory(static_cast<uint8_t *>(scratch(SLOT_PANEL, KEY_BYTES + s.group_blocks * panel_bytes))),
          block(product.outputs, s.split_tiles), chunk(product.chunks[index]) {
        if (s.splits > 1) partial = partial_sums(round_up(count, Block::TOKENS));
    }
    Task(const Task &) = delete;

    void run() {
        const bool leads = !__atomic_exchange_n(&chunk.is_taken, 1, __ATOMIC_RELAXED);
        const Lead lead{leads ? &chunk.ready : nullptr, count};
        for (int64_t split = 0; split < s.splits; ++split) {
            const int64_t from = split * s.split_tiles, to = least(from + s.split_tiles, s.in_tiles);
            hold_panels(split, from, to);
            for (int64_t m = 0; m < count; m += Block::TOKENS) {
                const int64_t tokens = least(Block::TOKENS, count - m);
                leads ? prepare(m + tokens, lead) : wait_for(m + tokens);
                block.take_tokens(product.codes, first + m, tokens, from, to);
                fetch_next(m, from, to, leads && split == 0);
                multiply_group(m, split);
            }
        }
        block.finish_pending();
    }

  private:
    static constexpr int64_t KEY_BYTES = 64;

    const PanelProduct &product;
    const Shape &s;
    const int64_t group, first, count, first_block, blocks, panel_bytes;
    uint8_t *const memory;  // the thread's: key and panels
    Block block;
    Chunk &chunk;
    int32_t *partial = nullptr;  // (tokens, channels) block by block, where inputs are split: all of the task's
    int64_t prepared = 0;        // tokens of the chunk
    const int8_t *next_row = nullptr;  // of the next block of tokens, where rows are fetched part by part
    int64_t next_rows = 0, part_bytes = 0;
    alignas(64) int32_t sums[2][Block::TOKENS * Block::CHANNELS];  // used in turns: the outputs of one may be pending
    int turn = 0;

    uint8_t *panel(int64_t b) const { return memory + KEY_BYTES + b * panel_bytes; }
    int64_t tile_of(int64_t b) const { return (first_block + b) * (Block::CHANNELS / 16); }
    int64_t tiles_of(int64_t b) const { return least(Block::CHANNELS / 16, s.out_tiles - tile_of(b)); }

    // Decodes the group's panels for input tiles [from, to), unless the thread still has them.
    void hold_panels(int64_t split, int64_t from, int64_t to) const {
        PanelKey &key = *reinterpret_cast<PanelKey *>(memory);
        if (key.call == product.call && key.group == group && key.split == split) return;
        for (int64_t b = 0; b < blocks; ++b) block.pack_panel(tile_of(b), tiles_of(b), from, to, panel(b));
        key = {product.call, group, split};
    }

    // Prepares the chunk's first `wanted` tokens.
    void prepare(int64_t wanted, const Lead &lead) {
        const int64_t width = product.outputs.w.in_features;
        for (; prepared < wanted; lead.publish(prepared)) {
            const int64_t more = least(INLET_ROWS, count - prepared);
            if (product.rounder) product.rounder->round(first + prepared, more);
            for (const int64_t end = prepared + more; prepared < end; ++prepared) {
                const int64_t token = first + prepared;
                product.starts[token] = Block::start_of(product.codes + token * width, width);
            }
        }
    }

    void wait_for(int64_t wanted) const {
        while (__atomic_load_n(&chunk.ready, __ATOMIC_ACQUIRE) < wanted) yield();
    }

    // Has what the block of tokens after m will be read from fetched beside the products: the rounder's input if this thread
    // prepares that block, else codes.
    void fetch_next(int64_t m, int64_t from, int64_t to, bool is_preparing) {
        const Rounder *rounder = product.rounder;
        const int64_t width = product.outputs.w.in_features, after = least(first + m + Block::TOKENS, product.rows);
        const int64_t tokens = least(Block::TOKENS, product.rows - after);
        next_rows = 0;
        if (rounder && is_preparing) return block.meanwhile.fetch(rounder->input(after), tokens * rounder->row_bytes());
        if (s.splits == 1) return block.meanwhile.fetch(product.codes + after * width, tokens * width);
        next_row = product.codes + after * width + 16 * from, next_rows = tokens;
        part_bytes = least(16 * to, width) - 16 * from;
    }

    // The same where inputs are split: beside the product of panel b the parts of rows b and b + blocks.
    void fetch_parts(int64_t b) {
        if (b >= next_rows) return;
        const int8_t *part = next_row + b * product.outputs.w.in_features;
        block.meanwhile.fetch(part, part_bytes);
        if (b + blocks < next_rows) block.meanwhile.then_fetch(part + blocks * product.outputs.w.in_features, part_bytes);
    }

    int32_t *partial_sums(int64_t tokens) const {
        return static_cast<int32_t *>(scratch(SLOT_SUMS, sizeof(int32_t) * tokens * blocks * Block::CHANNELS));
    }

    // Multiplies the block of tokens at m by the group's panels.
    void multiply_group(int64_t m, int64_t split) {
        const typename Block::Scope scope(block);
        const int64_t parts = block.parts(), task_block = s.splits > 1 ? m / Block::TOKENS * blocks : 0;
        if (parts > 1 && s.splits == 1) partial = partial_sums(Block::TOKENS);
        for (int64_t part = 0; part < parts; ++part) {
            block.take_part(part);
            const bool is_first = split == 0 && part == 0, is_last = split == s.splits - 1 && part == parts - 1;
            for (int64_t b = 0; b < blocks; ++b) {
                int32_t *to = partial ? partial + (task_block + b) * Block::TOKENS * Block::CHANNELS : sums[turn ^= 1];
                if (part == 0) fetch_parts(b);
                block.multiply(panel(b), tiles_of(b), is_first ? product.starts + first + m : nullptr, to);
                if (is_last) block.finish(panel(b), tile_of(b), tiles_of(b), to);
            }
        }
    }
};

#if defined(LRQ_HAS_TILES)
using BestBlock = TileBlock;
#elif defined(__AVX512VNNI__) && !defined(LRQ_256)
using BestBlock = VnniBlock;
#else
using BestBlock = VectorBlock;
#endif

inline void quantized_linear_panels(const lrq_weight &w, int64_t rows, const int8_t *codes, const float *scale,
                                    const Rounder *rounder, const lrq_principal *principal, int out_type, int threads,
                                    void *out) {
    const Outlet outlet(principal ? *principal : lrq_principal{});
    const Outputs outputs{w, scale, principal ? &outlet : nullptr, rows, out_type, out};
    PanelProduct<BestBlock>(outputs, codes, rounder, threads).run();
}

// Repeats dot products on registers alone, the most the hardware can do; returns the number of operations.
inline int64_t repeat_dots(int64_t iterations) {
#if defined(LRQ_HAS_TILES)
    return repeat_tiles<false>(iterations);
#else
    Sums acc[BLOCK_TOKENS][BLOCK_VECTORS];
    alignas(64) uint8_t weights[BLOCK_VECTORS * LANES * STEP * ELEMENT] = {};
    int32_t tokens[BLOCK_TOKENS] = {};
    unroll<BLOCK_TOKENS>([&](auto m) LRQ_LAMBDA {
        unroll<BLOCK_VECTORS>([&](auto v) LRQ_LAMBDA { acc[m][v] = splat_sums(m); });
    });
    for (int64_t i = 0; i < iterations; ++i) {
        // nothing is known about the operands: no step is skipped
        __asm__ volatile("" : : "r"(weights), "r"(tokens) : "memory");
        unroll<BLOCK_TOKENS>([&](auto m) LRQ_LAMBDA {
            unroll<BLOCK_VECTORS>([&](auto v) LRQ_LAMBDA {
                acc[m][v] = dot(acc[m][v], weights + v * (LANES * STEP * ELEMENT), tokens[m]);
            });
        });
    }
    unroll<BLOCK_TOKENS>([&](auto m) LRQ_LAMBDA {
        unroll<BLOCK_VECTORS>([&](auto v) LRQ_LAMBDA {
            const Sums used = acc[m][v];
            __asm__ volatile("" : : "m"(used));
        });
    });
    return iterations * BLOCK_TOKENS * BLOCK_VECTORS * LANES * STEP * 2;
#endif
}

}  // namespace LRQ_ISA
}  // namespace lrq
