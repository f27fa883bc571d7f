// What the files of one instruction set offer, and what they may use. They are compiled for instructions that the running
// CPU may lack, so they call no inline function of the standard library: the linker could keep their copy of it for all
// files.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lrqdit.h"

namespace lrq {

// The kernel behind a function of the C interface: it takes the same arguments, structures that are never missing by
// reference.
template <class T> struct KernelArgument { using type = T; };
template <> struct KernelArgument<const lrq_transform *> { using type = const lrq_transform &; };
template <> struct KernelArgument<const lrq_weight *> { using type = const lrq_weight &; };
template <> struct KernelArgument<const lrq_matrix *> { using type = const lrq_matrix &; };
template <> struct KernelArgument<const lrq_attention *> { using type = const lrq_attention &; };

template <class Function> struct KernelOf;
template <class... A> struct KernelOf<int(A...)> { using type = void (*)(typename KernelArgument<A>::type...); };

// All kernels: lrq_NAME checks the arguments of NAME.
#define LRQ_KERNELS(use)                                                                                      \
    use(apply_transform) use(quantize_tokens) use(quantized_linear) use(linear) use(weight_only_linear)       \
    use(count_layer) use(count_rows) use(fit_scales) use(encode) use(trellis_encode) use(pack) use(attend)

struct Kernels {
    const char *name;
    bool has_pairs;  // whether it multiplies pairs of bfloat16 for principal parts; attend and repeat_pairs may be nullptr
    int64_t (*repeat_dots)(int64_t iterations);
    int64_t (*repeat_pairs)(int64_t iterations);
#define LRQ_MEMBER(kernel) KernelOf<decltype(lrq_##kernel)>::type kernel;
    LRQ_KERNELS(LRQ_MEMBER)
#undef LRQ_MEMBER
};

// Runs task(context, i) for i in [0, tasks) on up to `threads` threads, handed out in order as threads become free.
void run_parallel(int threads, int64_t tasks, void (*task)(void *context, int64_t index), void *context);

// Memory of the calling thread, 64-byte aligned, kept between calls. Slots are independent; bytes is a minimum.
// Throws std::bad_alloc, which run_parallel passes on.
enum Slot {
    SLOT_SHARED,
    SLOT_CALL,
    SLOT_PANEL,  // only for the product, which notes at its beginning what it holds
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
