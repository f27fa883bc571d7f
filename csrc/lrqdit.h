/* The C interface of the native kernels: plain C types only, no torch and no Python.

   Every function returns 0, or another number with a message in lrq_last_error(). Pointers are to contiguous memory in
   row-major order. Results do not depend on the number of threads or on the instruction set. */
#ifndef LRQDIT_H
#define LRQDIT_H

#include <stdint.h>

#if defined(_WIN32)
#define LRQ_EXPORT __declspec(dllexport)
#else
#define LRQ_EXPORT __attribute__((visibility("default")))
#endif

#define LRQ_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

enum { LRQ_FLOAT32 = 0, LRQ_BFLOAT16 = 1, LRQ_FLOAT16 = 2 };
enum { LRQ_NONE = 0, LRQ_HADAMARD = 1, LRQ_BLOCK_HADAMARD = 2, LRQ_OUTLIER = 3 };

/* x (rows, width) -> x~ = ((x - offset) * scale) R. */
typedef struct {
    const void *x;             /* of x_type */
    int32_t x_type;            /* LRQ_FLOAT32, ... */
    int32_t rotation;          /* LRQ_NONE, ... */
    int64_t rows, width;
    const uint16_t *offset;    /* float16 bits (width) or NULL */
    const uint16_t *scale;     /* float16 bits (width) or NULL */
    const int64_t *factors;    /* Kronecker factors, outermost first; or the block's size */
    const float *const *matrices; /* the orthogonal matrix (order, order) of every factor that is neither a power of two
                                     nor 12, 20 or 28; NULL for these */
    int64_t factor_count;
    const float *block1, *block2; /* R1 P R2: (block, block), else NULL */
    const int32_t *permutation;   /* (width), else NULL */
} lrq_transform;

/* w[n, k] = row_scale[n] * table[n or 0, code[n, k]]. */
typedef struct {
    const uint8_t *packed;     /* (ceil(N / 16), ceil(K / 16), 32 * bits) */
    const int8_t *table;       /* (table_rows, 2^bits); NULL at 8 bits: code - 128 */
    const float *row_scale;    /* (N) */
    const float *bias;         /* (N) or NULL */
    int64_t out_features, in_features, table_rows;
    int32_t bits;              /* 2, 3, 4 or 8 */
} lrq_weight;

LRQ_EXPORT int lrq_abi_version(void);
LRQ_EXPORT const char *lrq_last_error(void);

/* Instruction sets, best first. An unsupported one says why in lrq_isa_missing (empty if supported). */
LRQ_EXPORT int lrq_isa_count(void);
LRQ_EXPORT const char *lrq_isa_name(int index);
LRQ_EXPORT const char *lrq_isa_missing(int index);
/* The one in use; the best supported one until another is chosen. */
LRQ_EXPORT const char *lrq_isa(void);
LRQ_EXPORT int lrq_use_isa(const char *name);
LRQ_EXPORT int lrq_is_parallel(void);

/* Runs integer dot products on registers alone, on every thread; *operations is their number. For benchmarks. */
LRQ_EXPORT int lrq_repeat_dots(int64_t iterations, int threads, int64_t *operations);

/* out: float32 (rows, width). */
LRQ_EXPORT int lrq_apply_transform(const lrq_transform *transform, int threads, float *out);
/* codes: int8 (rows, width); scale: float32 (rows). */
LRQ_EXPORT int lrq_quantize_tokens(const lrq_transform *transform, int bits, double clip, int threads, int8_t *codes,
                                   float *scale);
/* out: (rows, N) of out_type = sum_k codes w * scale + bias. */
LRQ_EXPORT int lrq_quantized_linear(const lrq_weight *weight, int64_t rows, const int8_t *codes, const float *scale,
                                    int out_type, int threads, void *out);
/* out: (rows, N) of out_type = x w^T + bias, x float32 (rows, K). */
LRQ_EXPORT int lrq_weight_only_linear(const lrq_weight *weight, int64_t rows, const float *x, int out_type, int threads,
                                      void *out);

#ifdef __cplusplus
}
#endif
#endif
