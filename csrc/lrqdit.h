/* The C interface of the native kernels: plain C types only, no torch and no Python.

   A function that can fail returns 0 if it did not; if it did, lrq_last_error() has the message. Pointers are to contiguous
   memory in row-major order. Results do not depend on the number of threads or on the instruction set. */
#ifndef LRQDIT_H
#define LRQDIT_H

#include <stdint.h>

#if defined(_WIN32)
#define LRQ_EXPORT __declspec(dllexport)
#else
#define LRQ_EXPORT __attribute__((visibility("default")))
#endif

#define LRQ_ABI_VERSION 5

#ifdef __cplusplus
extern "C" {
#endif

enum { LRQ_FLOAT32 = 0, LRQ_BFLOAT16 = 1, LRQ_FLOAT16 = 2 };
enum { LRQ_NONE = 0, LRQ_HADAMARD = 1, LRQ_BLOCK_HADAMARD = 2, LRQ_OUTLIER = 3 };

enum {
    LRQ_MAX_IN_FEATURES = (1 << 17) - 1, /* of a product: with more, its int32 sums could overflow */
    LRQ_MAX_RANK = 32,                   /* of a principal part */
    LRQ_MAX_HEAD_WIDTH = 256,            /* of attention */
    /* of the search for row scales, see codebook.py */
    LRQ_BINS = 1024, /* of each half of a histogram */
    LRQ_COARSE = 25, /* grid entries between two that are tried first */
    LRQ_MIDDLE = 5,  /* the step is divided by it twice */
    LRQ_POLISHES = 1,
    LRQ_SLOTS = 512, /* values of floor(2 w / row_scale) that are told apart */
    /* of the search for trellis paths, see trellis.py */
    LRQ_STATES = 64,
    LRQ_HISTORY = 6,
    LRQ_STEPS_PER_SHIFT = 32
};

/* Orders of Hadamard matrices that need no matrix from the caller, beside the powers of two. */
#define LRQ_BUTTERFLIES(use) use(12) use(20) use(28)

/* Tokens x (rows, width) and their transform, x~ = ((x - offset) * scale) R. */
typedef struct {
    const void *x;             /* of x_type */
    int32_t x_type;            /* LRQ_FLOAT32, ... */
    int32_t rotation;          /* LRQ_NONE, ... */
    int64_t rows, width;
    const uint16_t *offset;    /* float16 bits (width) or NULL */
    const uint16_t *scale;     /* float16 bits (width) or NULL */
    const int64_t *factors;    /* Kronecker factors, outermost first; or the block's size */
    const float *const *matrices; /* the orthogonal matrix (order, order) of every factor; NULL for powers of two and
                                     LRQ_BUTTERFLIES */
    int64_t factor_count;
    const float *block1, *block2; /* R1 P R2: (block, block), else NULL */
    const int32_t *permutation;   /* (width), else NULL */
} lrq_transform;

/* w[n, k] = row_scale[n] * table[n or 0, code[n, k]]. With a trellis the level is entry 2 (c ^ p) + q of one table of
   2^(bits + 1) levels, where c is code[n, k], p is the lowest bit of code[n - 1, k] ^ code[n - 6, k], q is that of
   code[n - 2, k] ^ code[n - 4, k], and codes before channel 0 are 0. */
typedef struct {
    const uint8_t *packed;     /* (ceil(N / 16), ceil(K / 16), 32 * bits) */
    const int8_t *table;       /* (table_rows, 2^bits), with a trellis (1, 2^(bits + 1)); NULL at 8 bits: code - 128 */
    const float *row_scale;    /* (N) */
    const float *bias;         /* (N) or NULL */
    int64_t out_features, in_features, table_rows;
    int32_t bits;              /* 2 to 6, or 8 */
    int32_t is_trellis;        /* 0 or 1; 1 has one table and at most 5 bits */
} lrq_weight;

/* The principal part of tokens: directions U of the centred and smoothed input, x^, that are not rounded with the rest
   (principal.py). p = x^ U is rounded to bfloat16, the codes are those of x^ - p U^T, and the product adds p C to its
   outputs. It needs bfloat16 tokens and outputs, and lrq_has_pairs(). */
typedef struct {
    const int8_t *inlet;       /* U^T (rank, width); NULL for a product alone */
    const float *inlet_scale;  /* (rank), of U's columns */
    const int8_t *outlet;      /* C (rank, N); NULL for tokens alone */
    const float *outlet_scale; /* (rank) */
    int64_t rank;              /* at most LRQ_MAX_RANK */
    uint16_t *coordinates;     /* p, bfloat16 (rows, rank rounded up to even): written with the codes, read by the product */
} lrq_principal;

/* A weight whose levels are fitted. */
typedef struct {
    const float *weight;      /* (rows, columns), finite */
    int64_t rows, columns;
    const double *importance; /* (columns), or NULL: 1 for all */
} lrq_matrix;

/* softmax(scale q k^T + mask) v of every batch and head. Strides are in elements, of (batch, head, token); channels are
   contiguous. */
typedef struct {
    const uint16_t *query, *key, *value; /* bfloat16 bits (batch, heads, queries or keys, width) */
    uint16_t *out;                       /* bfloat16 bits (batch, heads, queries, width) */
    float *logsumexp;                    /* (batch, heads, queries); where all keys are masked it is 0, and so is out */
    const void *mask;                    /* (batch, heads, queries, keys) of mask_type, keys contiguous; or NULL */
    int64_t batch, heads, queries, keys, width; /* width: even, up to LRQ_MAX_HEAD_WIDTH */
    int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3], logsumexp_stride[3];
    int64_t mask_stride[3];              /* 0 where it is the same for all */
    int32_t mask_type;                   /* LRQ_FLOAT32 or LRQ_BFLOAT16 */
    float scale;
} lrq_attention;

LRQ_EXPORT int lrq_abi_version(void);
LRQ_EXPORT const char *lrq_last_error(void);

/* For callers that repeat this header in another language. lrq_size_of("lrq_weight") is the size of a structure in bytes;
   lrq_constant("LRQ_BUTTERFLIES", ...) sets *values to a constant's values and returns how many there are. Both return 0 for
   an unknown name. */
LRQ_EXPORT int64_t lrq_size_of(const char *name);
LRQ_EXPORT int lrq_constant(const char *name, const int64_t **values);

/* Instruction sets, best first. lrq_isa_missing says what this CPU lacks for one; it is empty if nothing is missing. */
LRQ_EXPORT int lrq_isa_count(void);
LRQ_EXPORT const char *lrq_isa_name(int index);
LRQ_EXPORT const char *lrq_isa_missing(int index);
/* lrq_isa() is the one in use: the best one that this CPU has, until lrq_use_isa() chooses another. */
LRQ_EXPORT const char *lrq_isa(void);
LRQ_EXPORT int lrq_use_isa(const char *name);
LRQ_EXPORT int lrq_is_parallel(void);

/* Runs integer dot products on registers alone, on every thread; *operations becomes the number of multiplications and
   additions. For benchmarks. */
LRQ_EXPORT int lrq_repeat_dots(int64_t iterations, int threads, int64_t *operations);
/* The same with pairs of bfloat16; needs lrq_has_pairs(). */
LRQ_EXPORT int lrq_repeat_pairs(int64_t iterations, int threads, int64_t *operations);

/* out: float32 (rows, width). */
LRQ_EXPORT int lrq_apply_transform(const lrq_transform *transform, int threads, float *out);
/* codes: int8 (rows, width). scale: float32 (rows), the tokens' quantization steps. lookup: int8 (256), whose entry
   code + 128 replaces each code; or NULL. principal may be NULL here and below. */
LRQ_EXPORT int lrq_quantize_tokens(const lrq_transform *transform, int bits, double clip, const int8_t *lookup,
                                   const lrq_principal *principal, int threads, int8_t *codes, float *scale);
/* out: (rows, N) of out_type; out[m, n] = scale[m] sum_k codes[m, k] w[n, k] + bias[n]. */
LRQ_EXPORT int lrq_quantized_linear(const lrq_weight *weight, int64_t rows, const int8_t *codes, const float *scale,
                                    const lrq_principal *principal, int out_type, int threads, void *out);
/* lrq_quantize_tokens and lrq_quantized_linear in one pass, which takes less time. It writes codes and scale, too. */
LRQ_EXPORT int lrq_linear(const lrq_transform *transform, int bits, double clip, const int8_t *lookup,
                          const lrq_weight *weight, const lrq_principal *principal, int out_type, int threads,
                          int8_t *codes, float *scale, void *out);
/* out: (rows, N) of out_type = x w^T + bias, x float32 (rows, K). */
LRQ_EXPORT int lrq_weight_only_linear(const lrq_weight *weight, int64_t rows, const float *x, int out_type, int threads,
                                      void *out);

/* Whether the instruction set in use multiplies pairs of bfloat16, which attention and principal parts need: 0 or 1. */
LRQ_EXPORT int lrq_has_pairs(void);
LRQ_EXPORT int lrq_attend(const lrq_attention *attention, int threads);

/* The layer's histogram, in parts of part_blocks blocks of block_rows rows: bins (parts, 2 LRQ_BINS, 2), the mass and the
   moment of each bin; range (parts, 2), the lowest and the highest entry. See codebook.py for all of this. */
LRQ_EXPORT int lrq_count_layer(const lrq_matrix *matrix, int64_t block_rows, int64_t part_blocks, int threads,
                               double *bins, double *range);
/* The rows' histograms: bins (2, rows, 2 LRQ_BINS); the others (rows). */
LRQ_EXPORT int lrq_count_rows(const lrq_matrix *matrix, int threads, double *root_mean_square, double *bins,
                              double *lowest, double *highest);
/* row_scale: float32 (rows), searched on grid (LRQ_COARSE (coarse_count - 1) + 2 (LRQ_COARSE + LRQ_MIDDLE) + 1), then
   polished; table (table_rows, 2^bits) for 2 to 6 bits, table_rows 1 or rows. */
LRQ_EXPORT int lrq_fit_scales(const lrq_matrix *matrix, const int8_t *table, int64_t table_rows, int bits,
                              const double *grid, int64_t coarse_count, int threads, float *row_scale);
/* codes: (rows, columns), of the levels nearest to weight / row_scale. */
LRQ_EXPORT int lrq_encode(const lrq_matrix *matrix, const int8_t *table, int64_t table_rows, int bits,
                          const float *row_scale, int threads, uint8_t *codes);
/* codes: (rows, columns), of the path of least squared error in each column; table (2^(bits + 1)) for 2 to 5 bits, see
   lrq_weight. */
LRQ_EXPORT int lrq_trellis_encode(const lrq_matrix *matrix, const int8_t *table, int bits, const float *row_scale,
                                  int threads, uint8_t *codes);
/* Packs codes (rows, columns), see lrq_weight; *used becomes the bitwise or of all codes. */
LRQ_EXPORT int lrq_pack(const uint8_t *codes, int64_t rows, int64_t columns, int bits, int threads, uint8_t *packed,
                        uint8_t *used);

#ifdef __cplusplus
}
#endif
#endif
