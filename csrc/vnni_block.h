// The block of AVX-512 VNNI: 8 tokens and 48 channels in assembly, which also writes the outputs of the block before.
//
// Dot products of 512 bits take all of two of Zen 4's four vector units. Additions, conversions and narrowing stores run on
// the other two and cost next to nothing where they stand between dot products. It is assembly because compilers copy or
// spill the 24 accumulators as soon as anything else is in their loop. (A plain store between them costs as much as a dot
// product; vpmovdw's store does not.)
#pragma once

#include "vector_block.h"

#if defined(__AVX512VNNI__) && !defined(LRQ_256)
namespace lrq {
namespace LRQ_ISA {

static_assert(BLOCK_TOKENS == 8 && BLOCK_TILES == 3 && STEP == 4, "the assembly is written for these");


// Accumulator (m, v) is zmm[8 v + m].
#define LRQ_DOTS(at, x, y, z)                        \
    "vpbroadcastd " at ", %%zmm27\n"                 \
    "vpdpbusd %%zmm27, %%zmm24, %%zmm" #x "\n"       \
    "vpdpbusd %%zmm27, %%zmm25, %%zmm" #y "\n"       \
    "vpdpbusd %%zmm27, %%zmm26, %%zmm" #z "\n"
#define LRQ_STEP                                     \
    "vmovdqu64 (%[a]), %%zmm24\n"                    \
    "vmovdqu64 64(%[a]), %%zmm25\n"                  \
    "vmovdqu64 128(%[a]), %%zmm26\n"                 \
    LRQ_DOTS("(%[t])", 0, 8, 16)                     \
    LRQ_DOTS("(%[t],%[s])", 1, 9, 17)                \
    LRQ_DOTS("(%[t],%[s],2)", 2, 10, 18)             \
    LRQ_DOTS("(%[t],%[s3])", 3, 11, 19)              \
    LRQ_DOTS("(%[u])", 4, 12, 20)                    \
    LRQ_DOTS("(%[u],%[s])", 5, 13, 21)               \
    LRQ_DOTS("(%[u],%[s],2)", 6, 14, 22)             \
    LRQ_DOTS("(%[u],%[s3])", 7, 15, 23)              \
    "add $192, %[a]\n"                               \
    "add $4, %[t]\n"                                 \
    "add $4, %[u]\n"
// Meanwhile::fetch_line
#define LRQ_FETCH                                    \
    "prefetcht0 (%[next])\n"                         \
    "lea 64(%[next]), %[after]\n"                    \
    "cmp 64(%[p]), %[next]\n"                        \
    "cmove 72(%[p]), %[after]\n"                     \
    "cmp 80(%[p]), %[next]\n"                        \
    "cmovne %[after], %[next]\n"
// Writes 16 channels, a third of a pending row: scale_sums, rounded to nearest even.
#define LRQ_OUTPUT(sums, row_scale, bias, to)        \
    "vcvtdq2ps " #sums "(%[sums]), %%zmm28\n"        \
    "vmulps " #row_scale "(%[c]), %%zmm28, %%zmm28\n"\
    "vmulps %%zmm30, %%zmm28, %%zmm28\n"             \
    "vaddps " #bias "(%[c]), %%zmm28, %%zmm28\n"     \
    "vpsrld $16, %%zmm28, %%zmm29\n"                 \
    "vpandd 8(%[p])%{1to16%}, %%zmm29, %%zmm29\n"    \
    "vpaddd 12(%[p])%{1to16%}, %%zmm28, %%zmm28\n"   \
    "vpaddd %%zmm29, %%zmm28, %%zmm28\n"             \
    "vpsrld $16, %%zmm28, %%zmm28\n"                 \
    "vpmovdw %%zmm28, " #to "(%[to])\n"
// The members of the Meanwhile at p and of the Coefficients at c that the assembly reads.
static_assert(offsetof(Meanwhile, pending) == 0 && offsetof(Pending, row_bytes) == 0 && offsetof(Pending, one) == 8 &&
                  offsetof(Pending, almost_half) == 12 && offsetof(Pending, coefficients) == 16 &&
                  offsetof(Pending, sums) == 24 && offsetof(Pending, scale) == 32 && offsetof(Pending, to) == 40 &&
                  offsetof(Meanwhile, last) == 64 && offsetof(Meanwhile, second) == 72 &&
                  offsetof(Meanwhile, second_last) == 80 && offsetof(Coefficients, row_scale) == 0 &&
                  offsetof(Coefficients, bias) == 192,
              "offsets in the assembly");
#define LRQ_ALL_SUMS(at)                                                                                     \
    at(0, 0) at(8, 64) at(16, 128) at(1, 192) at(9, 256) at(17, 320) at(2, 384) at(10, 448) at(18, 512)      \
    at(3, 576) at(11, 640) at(19, 704) at(4, 768) at(12, 832) at(20, 896) at(5, 960) at(13, 1024)            \
    at(21, 1088) at(6, 1152) at(14, 1216) at(22, 1280) at(7, 1344) at(15, 1408) at(23, 1472)
#define LRQ_START(m, y, z, at)                       \
    "vpbroadcastd " #at "(%[sums]), %%zmm" #m "\n"   \
    "vmovdqa64 %%zmm" #m ", %%zmm" #y "\n"           \
    "vmovdqa64 %%zmm" #m ", %%zmm" #z "\n"
#define LRQ_LOAD(r, at) "vmovdqu64 " #at "(%[to]), %%zmm" #r "\n"
#define LRQ_STORE(r, at) "vmovdqu64 %%zmm" #r ", " #at "(%[a])\n"

// Multiplies 8 tokens, stride bytes apart, by the 48 channels of a panel over `steps` steps. sums (8, 48) grow by the
// products; with starts, token m's begin at starts[m] instead. Writes a pending row every four steps, while there are any.
__attribute__((noinline)) inline void multiply_8_by_48(const uint8_t *panel, int64_t steps, const uint8_t *tokens,
                                                       int64_t stride, const int32_t *starts, int32_t *sums,
                                                       Meanwhile &meanwhile) {
    Pending &pending = meanwhile.pending;
    const int64_t written = least(pending.rows, steps / 4);
    int64_t rows = written, fours = steps / 4 - written, rest = steps % 4;
    const uint8_t *others = tokens + 4 * stride, *after;
    const float *scale;
    const Coefficients *coefficients;
    const int32_t *to = sums;
    __asm__ volatile(
        "test %[sums], %[sums]\n"
        "jz 1f\n" LRQ_START(0, 8, 16, 0) LRQ_START(1, 9, 17, 4) LRQ_START(2, 10, 18, 8) LRQ_START(3, 11, 19, 12)
            LRQ_START(4, 12, 20, 16) LRQ_START(5, 13, 21, 20) LRQ_START(6, 14, 22, 24) LRQ_START(7, 15, 23, 28)
        "jmp 2f\n"
        "1:\n" LRQ_ALL_SUMS(LRQ_LOAD)
        "2:\n"
        "mov 16(%[p]), %[c]\n"
        "mov 24(%[p]), %[sums]\n"
        "mov 32(%[p]), %[scale]\n"
        "mov 40(%[p]), %[to]\n"
        "test %[rows], %[rows]\n"
        "jz 4f\n"
        "3:\n"
        "vbroadcastss (%[scale]), %%zmm30\n" LRQ_FETCH LRQ_STEP LRQ_OUTPUT(0, 0, 192, 0) LRQ_STEP
            LRQ_OUTPUT(64, 64, 256, 32) LRQ_FETCH LRQ_STEP LRQ_OUTPUT(128, 128, 320, 64) LRQ_STEP
        "add $192, %[sums]\n"
        "add (%[p]), %[to]\n"
        "add $4, %[scale]\n"
        "dec %[rows]\n"
        "jnz 3b\n"
        "4:\n"
        "cmpq $0, %[fours]\n"
        "jz 6f\n"
        "5:\n" LRQ_FETCH LRQ_STEP LRQ_STEP LRQ_FETCH LRQ_STEP LRQ_STEP
        "decq %[fours]\n"
        "jnz 5b\n"
        "6:\n"
        "cmpq $0, %[rest]\n"
        "jz 8f\n"
        "7:\n" LRQ_STEP
        "decq %[rest]\n"
        "jnz 7b\n"
        "8:\n"
        "mov %[out], %[a]\n" LRQ_ALL_SUMS(LRQ_STORE)
        : [a] "+r"(panel), [t] "+r"(tokens), [u] "+r"(others), [sums] "+r"(starts), [to] "+r"(to), [scale] "=&r"(scale),
          [c] "=&r"(coefficients), [rows] "+r"(rows), [fours] "+m"(fours), [rest] "+m"(rest),
          [next] "+r"(meanwhile.next), [after] "=&r"(after)
        : [s] "r"(stride), [s3] "r"(3 * stride), [p] "r"(&meanwhile), [out] "m"(sums)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
          "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",
          "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30");
    if (written) pending.advance(written);
}

#undef LRQ_STORE
#undef LRQ_LOAD
#undef LRQ_START
#undef LRQ_ALL_SUMS
#undef LRQ_OUTPUT
#undef LRQ_FETCH
#undef LRQ_STEP
#undef LRQ_DOTS

// A panel begins with its channels' coefficients.
class VnniBlock : public VectorBlock {
  public:
    static_assert(CHANNELS == Coefficients::CHANNELS, "the assembly is written for these");

    using VectorBlock::VectorBlock;

    static int64_t panel_bytes(const Outputs &outputs, int64_t in_tiles) {
        return sizeof(Coefficients) + VectorBlock::panel_bytes(outputs, in_tiles);
    }

    void pack_panel(int64_t tile, int64_t tiles, int64_t from, int64_t to, uint8_t *panel) const {
        reinterpret_cast<Coefficients *>(panel)->read(outputs.w, 16 * tile);
        VectorBlock::pack_panel(tile, tiles, from, to, panel + sizeof(Coefficients));
    }

    void take_tokens(const int8_t *codes, int64_t token, int64_t count, int64_t from, int64_t to) {
        VectorBlock::take_tokens(codes, token, count, from, to);
        scale = outputs.scale + token;
        can_wait = !outputs.outlet && outputs.type == LRQ_BFLOAT16 && Coefficients::is_finite(scale, count);
    }

    void multiply(const uint8_t *panel, int64_t tiles, const int32_t *starts, int32_t *sums) {
        panel += sizeof(Coefficients);
        if (rows == TOKENS && tiles == BLOCK_TILES)
            return multiply_8_by_48(panel + outlet_bytes, steps, tokens, stride, starts, sums, meanwhile);
        VectorBlock::multiply(panel, tiles, starts, sums);
    }

    void finish(const uint8_t *panel, int64_t tile, int64_t tiles, const int32_t *sums) {
        finish_pending();
        const auto *coefficients = reinterpret_cast<const Coefficients *>(panel);
        if (!can_wait || !coefficients->is_whole)
            return VectorBlock::finish(panel + sizeof(Coefficients), tile, tiles, sums);
        const int64_t channels = outputs.w.out_features;
        uint16_t *to = static_cast<uint16_t *>(outputs.to) + first_token * channels + 16 * tile;
        meanwhile.pending.take(2 * channels, coefficients, sums, scale, to, rows);
    }

    void finish_pending() { meanwhile.pending.finish(); }

  private:
    const float *scale = nullptr;  // of the tokens that are multiplied
    bool can_wait = false;         // whether their outputs may be pending: bfloat16 without a principal part, no NaN
};

}  // namespace LRQ_ISA
}  // namespace lrq
#endif
