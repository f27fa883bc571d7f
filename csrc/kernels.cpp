// All kernels of one instruction set, LRQ_ISA; compiled once for each with its own flags.
#include "few_tokens.h"
#include "fit.h"
#include "tile_attention.h"
#include "transform.h"
#include "trellis.h"
#include "weight_only.h"

#define LRQ_PASTE_(a, b) a##b
#define LRQ_PASTE(a, b) LRQ_PASTE_(a, b)
#define LRQ_STRING_(a) #a
#define LRQ_STRING(a) LRQ_STRING_(a)

namespace lrq {

extern const Kernels LRQ_PASTE(LRQ_ISA, _kernels);
const Kernels LRQ_PASTE(LRQ_ISA, _kernels) = {
    LRQ_STRING(LRQ_ISA), LRQ_ISA::HAS_PAIRS, LRQ_ISA::repeat_dots, LRQ_ISA::repeat_pairs,
#define LRQ_ENTRY(kernel) LRQ_ISA::kernel,
    LRQ_KERNELS(LRQ_ENTRY)
#undef LRQ_ENTRY
};

}  // namespace lrq
