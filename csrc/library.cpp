// The exported functions: arguments are checked here, then the best instruction set's kernel runs.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace lrq {

#define LRQ_DECLARE(isa) extern const Kernels isa##_kernels;
#if defined(__x86_64__)
#ifdef LRQ_AMX
LRQ_DECLARE(amx)
#endif
LRQ_DECLARE(avx512bf16)
LRQ_DECLARE(avx512vbmi)
LRQ_DECLARE(avx512vnni)
LRQ_DECLARE(avxvnni)
LRQ_DECLARE(avx2)
#ifdef LRQ_TESTS
LRQ_DECLARE(avx512vnni256)  // stands in for avxvnni, which few CPUs have: the same source in 256 bits
#endif
#elif defined(__aarch64__)
LRQ_DECLARE(neon)
#endif
#ifdef LRQ_TESTS
LRQ_DECLARE(plaintiles)  // stands in for amx: the same source, tiles in plain C++
#endif
LRQ_DECLARE(serial)

namespace {

thread_local std::string last_error;

struct Isa {
    const Kernels *kernels;
    const char *missing;  // what this CPU lacks, empty if nothing
};

#if defined(__x86_64__)
// Whether bit `bit` of EAX of leaf 7, subleaf 1 is set.
bool has_feature_of_7_1(int bit) {
    unsigned a = 7, b = 0, c = 1, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return a >> bit & 1;
}

const char *missing_avx512vnni() {
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return "this CPU has no AVX-512 BW";
    if (!__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) return "this CPU has no AVX-512 VL";
    return __builtin_cpu_supports("avx512vnni") ? "" : "this CPU has no AVX-512 VNNI";
}

const char *missing_avx512vbmi() {
    if (*missing_avx512vnni()) return missing_avx512vnni();
    const bool has_both = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
    return has_both ? "" : "this CPU has no AVX-512 VBMI with GFNI";
}

const char *missing_avx512bf16() {
    if (*missing_avx512vbmi()) return missing_avx512vbmi();
    return has_feature_of_7_1(5) ? "" : "this CPU has no AVX-512 BF16";
}

#ifdef LRQ_AMX
// Whether the system lets this process use the data of tiles, which a process asks for once.
bool may_use_tiles() {
#ifdef __linux__
    constexpr long arch_req_xcomp_perm = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, arch_req_xcomp_perm, tile_data) == 0;
#else
    return false;
#endif
}

const char *missing_amx() {
    if (*missing_avx512bf16()) return missing_avx512bf16();
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    const unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, int8
    if ((d & needed) != needed) return "this CPU has no AMX";
    c = 0;
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(c));
    return (a >> 17 & 3) == 3 && may_use_tiles() ? "" : "the system does not let this process use the CPU's AMX";
}
#endif

const char *missing_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "" : "this CPU has no AVX2 with FMA";
}

const char *missing_avxvnni() {
    if (*missing_avx2()) return missing_avx2();
    return has_feature_of_7_1(4) ? "" : "this CPU has no AVX-VNNI";
}
#elif defined(__aarch64__)
const char *missing_neon() {
#ifdef __linux__
    // HWCAP_ASIMDHP and HWCAP_ASIMDDP, which older headers do not name; other systems have no CPU without them
    return getauxval(AT_HWCAP) >> 10 & getauxval(AT_HWCAP) >> 20 & 1 ? "" : "this CPU has no NEON dot product with float16";
#else
    return "";
#endif
}
#endif

const Isa *isas(int *count) {
    static const Isa all[] = {
#if defined(__x86_64__)
#ifdef LRQ_AMX
        {&amx_kernels, missing_amx()},
#endif
        {&avx512bf16_kernels, missing_avx512bf16()},
        {&avx512vbmi_kernels, missing_avx512vbmi()},
        {&avx512vnni_kernels, missing_avx512vnni()},
        {&avxvnni_kernels, missing_avxvnni()},
        {&avx2_kernels, missing_avx2()},
#ifdef LRQ_TESTS
        {&avx512vnni256_kernels, missing_avx512vnni()},
#endif
#elif defined(__aarch64__)
        {&neon_kernels, missing_neon()},
#endif
#ifdef LRQ_TESTS
        {&plaintiles_kernels, ""},
#endif
        {&serial_kernels, ""},
    };
    *count = sizeof(all) / sizeof(*all);
    return all;
}

std::atomic<const Kernels *> chosen{nullptr};

const Kernels &kernels() {
    const Kernels *found = chosen.load();
    if (found) return *found;
    int count;
    const Isa *isa = isas(&count);
    while (*isa->missing) ++isa;  // serial is always there
    chosen.store(isa->kernels);
    return *isa->kernels;
}

template <class Body> int guarded(Body &&body) {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc &) {
        last_error = "out of memory";
    } catch (const std::exception &error) {
        last_error = error.what();
    }
    return 1;
}

void require(bool is_sound, const char *message) {
    if (!is_sound) throw std::invalid_argument(message);
}

bool has_butterfly(int64_t order) {
#define LRQ_OR_IS(butterfly) || order == butterfly
    return order > 0 && ((order & (order - 1)) == 0 LRQ_BUTTERFLIES(LRQ_OR_IS));
#undef LRQ_OR_IS
}

void check(const lrq_transform *t, int threads, const void *out) {
    require(t && ((t->x && out) || t->rows == 0), "transform: input or output is missing");
    require(threads > 0, "transform: threads must be 1 or more");
    require(t->rows >= 0 && t->width > 0 && t->width < 1 << 23, "transform: rows or width out of range");
    require(t->x_type >= LRQ_FLOAT32 && t->x_type <= LRQ_FLOAT16, "transform: unknown x_type");
    require(t->rotation >= LRQ_NONE && t->rotation <= LRQ_OUTLIER, "transform: unknown rotation");
    if (t->rotation == LRQ_NONE) return;
    require(t->factor_count >= 0 && t->factor_count < 32, "transform: factor_count out of range");
    require(t->factors || !t->factor_count, "transform: the factors are missing");
    int64_t covered = 1;
    for (int64_t i = 0; i < t->factor_count; ++i) {
        const int64_t factor = t->factors[i];
        require(factor && factor >= -t->width && factor <= t->width, "transform: a factor is out of range");
        covered *= factor < 0 ? -factor : factor;
        require(covered <= t->width, "transform: the factors exceed the width");
        require(t->rotation == LRQ_OUTLIER ? factor > 0 : has_butterfly(factor) || (t->matrices && t->matrices[i]),
                "transform: a factor lacks its matrix");
    }
    if (t->rotation == LRQ_HADAMARD) {
        require(2 * covered >= t->width, "transform: the factors do not cover the width");
        return;
    }
    require(t->factor_count == 1 && t->width % covered == 0, "transform: the block does not divide the width");
    if (t->rotation == LRQ_OUTLIER) {
        require(t->block1 && t->block2 && t->permutation, "transform: R1 P R2 lacks a part");
        for (int64_t i = 0; i < t->width; ++i)
            require(t->permutation[i] >= 0 && t->permutation[i] < t->width, "transform: the permutation is damaged");
    }
}

// The parts of a principal part that any call needs; then those that tokens need, and those of a product.
void check(const lrq_principal *p, int64_t rows) {
    require(kernels().has_pairs, "principal part: this instruction set does not multiply bfloat16");
    require(p->rank > 0 && p->rank <= LRQ_MAX_RANK, "principal part: its rank is out of range");
    require(p->coordinates || !rows, "principal part: the coordinates' memory is missing");
}

void check(const lrq_principal *p, int64_t rows, const lrq_transform *t) {
    if (!p) return;
    check(p, rows);
    require(p->inlet && p->inlet_scale, "principal part: the directions are missing");
    require(t->x_type == LRQ_BFLOAT16, "principal part: tokens must be bfloat16");
}

void check(const lrq_principal *p, int64_t rows, int out_type) {
    if (!p) return;
    check(p, rows);
    require(p->outlet && p->outlet_scale, "principal part: the directions' images are missing");
    require(out_type == LRQ_BFLOAT16, "principal part: the output must be bfloat16");
}

void check(const lrq_transform *t, int bits, double clip, int threads, const void *codes, const float *scale) {
    check(t, threads, codes);
    require(scale || !t->rows, "quantize_tokens: the steps' memory is missing");
    require(bits >= 2 && bits <= 8, "quantize_tokens: bits must be 2 to 8");
    // below, x / step would leave the range of the rounding
    require(clip >= 1e-4, "quantize_tokens: clip must be 0.0001 or more");
}

void check(const lrq_weight *w, int64_t rows, const void *x, int out_type, int threads, const void *out) {
    require(w && w->packed && w->row_scale, "linear: the weight lacks a part");
    require(rows >= 0 && ((x && out) || rows == 0), "linear: input or output is missing");
    require(threads > 0, "linear: threads must be 1 or more");
    require(out_type >= LRQ_FLOAT32 && out_type <= LRQ_FLOAT16, "linear: unknown out_type");
    require((w->bits >= 2 && w->bits <= 6) || w->bits == 8, "linear: bits must be 2 to 6, or 8");
    require(w->out_features > 0 && w->in_features > 0, "linear: features out of range");
    require(w->in_features <= LRQ_MAX_IN_FEATURES, "linear: so many input features could overflow an int32");
    require((w->table == nullptr) == (w->bits == 8), "linear: a table belongs to 2 to 6 bits");
    require(!w->table || w->table_rows == 1 || w->table_rows == w->out_features, "linear: the table has a wrong shape");
    require(!w->is_trellis || (w->table_rows == 1 && w->bits <= 5), "linear: a trellis has one table of 2 to 5 bits");
}

void check(const lrq_matrix *m) {
    require(m && m->weight, "fit: the weight is missing");
    require(m->rows > 0 && m->columns > 0 && m->columns < 1 << 30, "fit: rows or columns out of range");
}

void check(const lrq_attention *a, int threads) {
    require(a && a->query && a->key && a->value && a->out && a->logsumexp, "attention: an array is missing");
    require(threads > 0, "attention: threads must be 1 or more");
    require(a->batch >= 0 && a->heads >= 0 && a->queries >= 0 && a->keys > 0, "attention: a size is out of range");
    require(a->width > 0 && a->width <= LRQ_MAX_HEAD_WIDTH, "attention: the width is out of range");
    require(a->width % 2 == 0, "attention: the width must be even");
    require(!a->mask || a->mask_type == LRQ_FLOAT32 || a->mask_type == LRQ_BFLOAT16, "attention: unknown mask_type");
    require(kernels().attend, "attention: the instruction set in use has none");
}

void check_table(const int8_t *table, int64_t table_rows, int64_t rows) {
    require(table && (table_rows == 1 || table_rows == rows), "fit: the table has a wrong shape");
}

struct Buffer {
    void *memory = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(memory); }
};

}  // namespace

void *scratch(Slot slot, size_t bytes) {
    thread_local Buffer buffers[SLOT_COUNT];
    Buffer &buffer = buffers[slot];
#ifdef LRQ_EXACT_SCRATCH  // so that the address sanitizer sees the end of every one
    const size_t page = 64;
    const bool is_right = buffer.size == (bytes + 63) / 64 * 64;
#else
    const size_t page = 4096;
    const bool is_right = buffer.size >= bytes;
#endif
    if (!is_right) {
        std::free(buffer.memory);
        buffer.size = 0;
        bytes = (bytes + page - 1) / page * page;
        buffer.memory = std::aligned_alloc(64, bytes);
        if (!buffer.memory) throw std::bad_alloc();
        std::memset(buffer.memory, 0, 64);
        buffer.size = bytes;
    }
    return buffer.memory;
}

void yield() { std::this_thread::yield(); }

uint64_t next_call() {
    static std::atomic<uint64_t> calls{0};
    return ++calls;
}

void run_parallel(int threads, int64_t tasks, void (*task)(void *, int64_t), void *context) {
    if (threads > tasks) threads = static_cast<int>(tasks);
#ifdef _OPENMP
    if (threads > 1) {
        std::atomic<bool> has_failed{false};
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (int64_t i = 0; i < tasks; ++i) {
            try {
                task(context, i);
            } catch (const std::bad_alloc &) {
                has_failed = true;
            }
        }
        if (has_failed) throw std::bad_alloc();
        return;
    }
#endif
    for (int64_t i = 0; i < tasks; ++i) task(context, i);
}

}  // namespace lrq

using namespace lrq;

int lrq_abi_version(void) { return LRQ_ABI_VERSION; }

const char *lrq_last_error(void) { return last_error.c_str(); }

int64_t lrq_size_of(const char *name) {
#define LRQ_SIZE(structure) {#structure, sizeof(structure)}
    static const std::map<std::string, int64_t> sizes = {
        LRQ_SIZE(lrq_transform), LRQ_SIZE(lrq_weight), LRQ_SIZE(lrq_principal), LRQ_SIZE(lrq_matrix), LRQ_SIZE(lrq_attention),
    };
#undef LRQ_SIZE
    const auto found = sizes.find(name ? name : "");
    return found == sizes.end() ? 0 : found->second;
}

int lrq_constant(const char *name, const int64_t **values) {
#define LRQ_ONE(constant) {#constant, {constant}}
#define LRQ_ORDER(order) order,
    static const std::map<std::string, std::vector<int64_t>> constants = {
        LRQ_ONE(LRQ_FLOAT32),         LRQ_ONE(LRQ_BFLOAT16),           LRQ_ONE(LRQ_FLOAT16),
        LRQ_ONE(LRQ_NONE),            LRQ_ONE(LRQ_HADAMARD),           LRQ_ONE(LRQ_BLOCK_HADAMARD), LRQ_ONE(LRQ_OUTLIER),
        LRQ_ONE(LRQ_MAX_IN_FEATURES), LRQ_ONE(LRQ_MAX_RANK),           LRQ_ONE(LRQ_MAX_HEAD_WIDTH),
        LRQ_ONE(LRQ_BINS),            LRQ_ONE(LRQ_COARSE),             LRQ_ONE(LRQ_MIDDLE),
        LRQ_ONE(LRQ_POLISHES),        LRQ_ONE(LRQ_SLOTS),              LRQ_ONE(LRQ_STATES),
        LRQ_ONE(LRQ_HISTORY),         LRQ_ONE(LRQ_STEPS_PER_SHIFT),    {"LRQ_BUTTERFLIES", {LRQ_BUTTERFLIES(LRQ_ORDER)}},
    };
#undef LRQ_ORDER
#undef LRQ_ONE
    const auto found = constants.find(name ? name : "");
    if (found == constants.end()) return 0;
    *values = found->second.data();
    return static_cast<int>(found->second.size());
}

int lrq_is_parallel(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

int lrq_isa_count(void) {
    int count;
    isas(&count);
    return count;
}

const char *lrq_isa_name(int index) {
    int count;
    const Isa *all = isas(&count);
    return index >= 0 && index < count ? all[index].kernels->name : "";
}

const char *lrq_isa_missing(int index) {
    int count;
    const Isa *all = isas(&count);
    return index >= 0 && index < count ? all[index].missing : "no such instruction set";
}

const char *lrq_isa(void) { return kernels().name; }

int lrq_use_isa(const char *name) {
    return guarded([&] {
        require(name, "the name of an instruction set is missing");
        int count;
        const Isa *all = isas(&count);
        for (int i = 0; i < count; ++i) {
            if (std::string(all[i].kernels->name) != name) continue;
            if (*all[i].missing) throw std::invalid_argument(std::string(name) + ": " + all[i].missing);
            chosen.store(all[i].kernels);
            return;
        }
        throw std::invalid_argument(std::string("unknown instruction set ") + name);
    });
}

int lrq_repeat_dots(int64_t iterations, int threads, int64_t *operations) {
    return guarded([&] {
        std::atomic<int64_t> total{0};
        parallel_for(threads, threads, [&](int64_t) { total += kernels().repeat_dots(iterations); });
        *operations = total;
    });
}

int lrq_repeat_pairs(int64_t iterations, int threads, int64_t *operations) {
    return guarded([&] {
        require(kernels().repeat_pairs, "the instruction set in use has no products of bfloat16");
        std::atomic<int64_t> total{0};
        parallel_for(threads, threads, [&](int64_t) { total += kernels().repeat_pairs(iterations); });
        *operations = total;
    });
}

int lrq_apply_transform(const lrq_transform *transform, int threads, float *out) {
    return guarded([&] {
        check(transform, threads, out);
        if (transform->rows) kernels().apply_transform(*transform, threads, out);
    });
}

int lrq_quantize_tokens(const lrq_transform *transform, int bits, double clip, const int8_t *lookup,
                        const lrq_principal *principal, int threads, int8_t *codes, float *scale) {
    return guarded([&] {
        check(transform, bits, clip, threads, codes, scale);
        check(principal, transform->rows, transform);
        if (transform->rows)
            kernels().quantize_tokens(*transform, bits, clip, lookup, principal, threads, codes, scale);
    });
}

int lrq_quantized_linear(const lrq_weight *weight, int64_t rows, const int8_t *codes, const float *scale,
                         const lrq_principal *principal, int out_type, int threads, void *out) {
    return guarded([&] {
        check(weight, rows, codes, out_type, threads, out);
        check(principal, rows, out_type);
        require(scale || !rows, "linear: the steps are missing");
        if (rows) kernels().quantized_linear(*weight, rows, codes, scale, principal, out_type, threads, out);
    });
}

int lrq_linear(const lrq_transform *transform, int bits, double clip, const int8_t *lookup, const lrq_weight *weight,
               const lrq_principal *principal, int out_type, int threads, int8_t *codes, float *scale, void *out) {
    return guarded([&] {
        check(transform, bits, clip, threads, codes, scale);
        check(weight, transform->rows, codes, out_type, threads, out);
        check(principal, transform->rows, transform);
        check(principal, transform->rows, out_type);
        require(weight->in_features == transform->width, "linear: transform and weight differ in width");
        if (transform->rows)
            kernels().linear(*transform, bits, clip, lookup, *weight, principal, out_type, threads, codes, scale, out);
    });
}

int lrq_weight_only_linear(const lrq_weight *weight, int64_t rows, const float *x, int out_type, int threads,
                           void *out) {
    return guarded([&] {
        check(weight, rows, x, out_type, threads, out);
        if (rows) kernels().weight_only_linear(*weight, rows, x, out_type, threads, out);
    });
}

int lrq_count_layer(const lrq_matrix *matrix, int64_t block_rows, int64_t part_blocks, int threads, double *bins,
                    double *range) {
    return guarded([&] {
        check(matrix);
        require(block_rows > 0 && part_blocks > 0, "count_layer: blocks must have rows");
        kernels().count_layer(*matrix, block_rows, part_blocks, threads, bins, range);
    });
}

int lrq_count_rows(const lrq_matrix *matrix, int threads, double *root_mean_square, double *bins, double *lowest,
                   double *highest) {
    return guarded([&] {
        check(matrix);
        kernels().count_rows(*matrix, threads, root_mean_square, bins, lowest, highest);
    });
}

int lrq_fit_scales(const lrq_matrix *matrix, const int8_t *table, int64_t table_rows, int bits, const double *grid,
                   int64_t coarse_count, int threads, float *row_scale) {
    return guarded([&] {
        check(matrix);
        check_table(table, table_rows, matrix->rows);
        require(bits >= 2 && bits <= 6 && coarse_count > 0, "fit_scales: bits must be 2 to 6, the grid not empty");
        kernels().fit_scales(*matrix, table, table_rows, bits, grid, coarse_count, threads, row_scale);
    });
}

int lrq_encode(const lrq_matrix *matrix, const int8_t *table, int64_t table_rows, int bits, const float *row_scale,
               int threads, uint8_t *codes) {
    return guarded([&] {
        check(matrix);
        check_table(table, table_rows, matrix->rows);
        require((bits >= 2 && bits <= 6) || bits == 8, "encode: bits must be 2 to 6, or 8");
        kernels().encode(*matrix, table, table_rows, bits, row_scale, threads, codes);
    });
}

int lrq_trellis_encode(const lrq_matrix *matrix, const int8_t *table, int bits, const float *row_scale, int threads,
                       uint8_t *codes) {
    return guarded([&] {
        check(matrix);
        require(table && row_scale && codes, "trellis_encode: an array is missing");
        require(bits >= 2 && bits <= 5, "trellis_encode: bits must be 2 to 5");
        kernels().trellis_encode(*matrix, table, bits, row_scale, threads, codes);
    });
}

int lrq_pack(const uint8_t *codes, int64_t rows, int64_t columns, int bits, int threads, uint8_t *packed,
             uint8_t *used) {
    return guarded([&] {
        require(rows >= 0 && columns >= 0, "pack: rows or columns out of range");
        require((bits >= 2 && bits <= 6) || bits == 8, "pack: bits must be 2 to 6, or 8");
        kernels().pack(codes, rows, columns, bits, threads, packed, used);
    });
}

int lrq_has_pairs(void) { return kernels().has_pairs; }

int lrq_attend(const lrq_attention *attention, int threads) {
    return guarded([&] {
        check(attention, threads);
        if (attention->batch && attention->heads && attention->queries) kernels().attend(*attention, threads);
    });
}
