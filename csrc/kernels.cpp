// All kernels of one instruction set, LRQ_ISA; compiled once for each with its own flags.
#include "attention.h"
#include "few_tokens.h"
#include "fit.h"
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
    LRQ_STRING(LRQ_ISA),       LRQ_ISA::repeat_dots,        LRQ_ISA::apply_transform, LRQ_ISA::quantize_tokens,
    LRQ_ISA::quantized_linear, LRQ_ISA::linear,             LRQ_ISA::weight_only_linear,
    LRQ_ISA::count_layer,      LRQ_ISA::count_rows,         LRQ_ISA::fit_scales,      LRQ_ISA::encode,
    LRQ_ISA::trellis_encode,   LRQ_ISA::pack,               LRQ_ISA::repeat_pairs,
    LRQ_ISA::attend,
};

}  // namespace lrq
