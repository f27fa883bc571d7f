// What the files of one instruction set offer, and what they may use. They are compiled with flags that the running CPU
// may lack, so they call nothing inline from the standard library: a linker could keep their copy for everybody.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lrqdit.h"

namespace lrq {

struct Kernels {
    const char *name;
    int64_t (*repeat_dots)(int64_t iterations);
    void (*apply_transform)(const lrq_transform &, int threads, float *out);
    void (*quantize_tokens)(const lrq_transform &, int bits, double clip, const int8_t *lookup, const lrq_principal *,
                            int threads, int8_t *codes, float *scale);
    void (*quantized_linear)(const lrq_weight &, int64_t rows, const int8_t *codes, const float *scale,
                             const lrq_principal *, int out_type, int threads, void *out);
    void (*linear)(const lrq_transform &, int bits, double clip, const int8_t *lookup, const lrq_weight &,
                   const lrq_principal *, int out_type, int threads, int8_t *codes, float *scale, void *out);
    void (*weight_only_linear)(const lrq_weight &, int64_t rows, const float *x, int out_type, int threads, void *out);
    void (*count_layer)(const lrq_matrix &, int64_t block_rows, int64_t part_blocks, int threads, double *bins,
                        double *range);
    void (*count_rows)(const lrq_matrix &, int threads, double *root_mean_square, double *bins, double *lowest,
                       double *highest);
    void (*fit_scales)(const lrq_matrix &, const int8_t *table, int64_t table_rows, int bits, const double *grid,
                       int64_t coarse_count, int threads, float *row_scale);
    void (*encode)(const lrq_matrix &, const int8_t *table, int64_t table_rows, int bits, const float *row_scale,
                   int threads, uint8_t *codes);
    void (*trellis_encode)(const lrq_matrix &, const int8_t *table, int bits, const float *row_scale, int threads,
                           uint8_t *codes);
    void (*pack)(const uint8_t *codes, int64_t rows, int64_t columns, int bits, int threads, uint8_t *packed,
                 uint8_t *used);
    // null without products of bfloat16
    int64_t (*repeat_pairs)(int64_t iterations);
    void (*attend)(const lrq_attention &, int threads);
};

// Runs task(context, i) for i in [0, tasks) on up to `threads` threads, handed out in order as threads become free.
void run_parallel(int threads, int64_t tasks, void (*task)(void *context, int64_t index), void *context);

// Memory of the calling thread, 64-byte aligned, kept between calls. Slots are independent; bytes is a minimum.
// Throws std::bad_alloc, which run_parallel passes on.
enum Slot {
    SLOT_SHARED,
    SLOT_CALL,
    SLOT_PANEL,  // the product's alone: it begins with what it holds
    SLOT_COPY,
    SLOT_ROWS,
    SLOT_SUMS,
    SLOT_PARTIAL,
    SLOT_INLET,
    SLOT_DIRECTIONS,
    SLOT_PRINCIPAL,
    SLOT_COUNT
};
void *scratch(Slot slot, size_t bytes);

// Lets another thread run.
void yield();

// A number that no other call has had.
uint64_t next_call();

template <class Body> void parallel_for(int threads, int64_t tasks, Body &&body) {
    run_parallel(
        threads, tasks, [](void *context, int64_t index) { (*static_cast<Body *>(context))(index); },
        static_cast<void *>(&body));
}

}  // namespace lrq
