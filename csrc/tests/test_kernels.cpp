// Tests of the C interface against a naive reference in int64 and double, on every instruction set this CPU has.
//
// Every buffer is a heap block of exactly its size, so the address sanitizer sees one byte too many. Prints one line
// for each check that failed and ends with status 1 if any did.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "lrqdit.h"

namespace {

int failures = 0;
int64_t checks = 0;

bool check(bool is_right, const std::string &what) {
    ++checks;
    if (!is_right && ++failures <= 50) std::printf("FAILED: %s\n", what.c_str());
    return is_right;
}

std::string text(const char *format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char *format, ...) {
    char buffer[400];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

// Exactly sized heap memory (std::vector may reserve more); unlike it, bytes that compare as a whole.
template <class T>
class Array {
  public:
    explicit Array(int64_t size = 0) : size_(size), data_(new T[size]) { std::memset(data(), 0xa5, bytes()); }
    Array(const Array &other) : Array(other.size_) { std::memcpy(data(), other.data(), bytes()); }
    Array(Array &&) = default;
    Array &operator=(Array &&) = default;
    T *data() const { return data_.get(); }
    T &operator[](int64_t i) const { return data_[i]; }
    int64_t size() const { return size_; }
    size_t bytes() const { return size_ * sizeof(T); }
    bool operator==(const Array &other) const {
        return size_ == other.size_ && std::memcmp(data(), other.data(), bytes()) == 0;
    }
    bool is_untouched() const {
        const auto *p = reinterpret_cast<const uint8_t *>(data());
        return std::all_of(p, p + bytes(), [](uint8_t byte) { return byte == 0xa5; });
    }

  private:
    int64_t size_;
    std::unique_ptr<T[]> data_;
};

// splitmix64
struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
    float real() { return static_cast<float>(next() >> 40) / (1 << 23) - 1; }  // [-1, 1)
    float normal() { return (real() + real() + real() + real()) * 0.866f; }
};

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Conversions by arithmetic, not by the instructions under test.
float from_half(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double sign = half >> 15 ? -1 : 1;
    if (exponent == 31) return static_cast<float>(fraction ? NAN : sign * INFINITY);
    return static_cast<float>(sign *
                              (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24)));
}

uint16_t to_half(float x) {
    const uint16_t sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
    const double magnitude = std::fabs(static_cast<double>(x));
    if (magnitude >= 65520) return sign | 0x7c00;
    const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14);
    const int fraction = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // to even
    return static_cast<uint16_t>(sign |
                                 (((exponent + 14) << 10) + fraction));  // a fraction of 1024 is the implicit bit
}

uint16_t to_bfloat16(float x) {
    const uint32_t bits = bits_of(x), low = bits & 0xffff;
    return static_cast<uint16_t>((bits >> 16) + (low > 0x8000 || (low == 0x8000 && (bits >> 16 & 1))));
}

float from_bfloat16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

int element_size(int type) { return type == LRQ_FLOAT32 ? 4 : 2; }

Array<uint8_t> convert(const Array<float> &x, int type) {
    Array<uint8_t> out(x.size() * element_size(type));
    for (int64_t i = 0; i < x.size(); ++i) {
        const uint32_t bits = type == LRQ_FLOAT32    ? bits_of(x[i])
                              : type == LRQ_BFLOAT16 ? to_bfloat16(x[i])
                                                     : to_half(x[i]);
        std::memcpy(out.data() + i * element_size(type), &bits, element_size(type));
    }
    return out;
}

std::vector<std::string> supported() {
    std::vector<std::string> names;
    for (int i = 0; i < lrq_isa_count(); ++i)
        if (!*lrq_isa_missing(i)) names.push_back(lrq_isa_name(i));
    return names;
}

const std::vector<int> ALL_TYPES = {LRQ_FLOAT32, LRQ_BFLOAT16, LRQ_FLOAT16};

// A packed weight and what it stands for.
struct Weight {
    int64_t n, k;
    int bits;
    Array<uint8_t> packed;
    Array<int8_t> table, dense;
    Array<float> row_scale, bias;
    lrq_weight c{};

    Weight(int64_t n, int64_t k, int bits, bool has_row_tables, bool has_bias, uint64_t seed, bool is_extreme = false,
           bool is_trellis = false)
        : n(n),
          k(k),
          bits(bits),
          packed((n + 15) / 16 * ((k + 15) / 16) * 32 * bits),
          table(bits == 8 ? 0 : (has_row_tables ? n : is_trellis ? 2 : 1) << bits),
          dense(n * k),
          row_scale(n),
          bias(has_bias ? n : 0) {
        Random random{seed};
        for (int64_t i = 0; i < table.size(); ++i)
            table[i] = static_cast<int8_t>(is_extreme ? -128 : random.below(256) - 128);
        for (int64_t i = 0; i < n; ++i) {
            row_scale[i] = 0.05f + 0.04f * random.real();
            if (has_bias) bias[i] = random.normal();
        }
        std::memset(packed.data(), 0, packed.bytes());
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < k; ++j) {
                const int code = static_cast<int>(is_extreme ? 0 : random.below(1 << bits));
                put(i, j, code);
                dense[i * k + j] = static_cast<int8_t>(
                    bits == 8 ? code - 128 : is_trellis ? code : table[((has_row_tables ? i : 0) << bits) + code]);
            }
        // a channel depends on those before it, so from the last one upwards
        for (int64_t i = n - 1; is_trellis && i >= 0; --i)
            for (int64_t j = 0; j < k; ++j) {
                const auto code = [&](int64_t back) { return i < back ? 0 : int(dense[(i - back) * k + j]); };
                const int chosen = code(0) ^ ((code(1) ^ code(6)) & 1), parity = (code(2) ^ code(4)) & 1;
                dense[i * k + j] = table[2 * chosen + parity];
            }
        c = {packed.data(),
             bits == 8 ? nullptr : table.data(),
             row_scale.data(),
             has_bias ? bias.data() : nullptr,
             n,
             k,
             bits == 8        ? 0
             : has_row_tables ? n
                              : 1,
             bits,
             is_trellis};
    }

    // The layout as lrqdit/packing.py describes it.
    void put(int64_t row, int64_t column, int code) {
        uint8_t *tile = packed.data() + (row / 16 * ((k + 15) / 16) + column / 16) * 32 * bits;
        const int64_t j = row % 16 / 4, p = row % 4, at = 16 * j + column % 16;
        if (bits == 8) {
            tile[64 * p + at] = static_cast<uint8_t>(code);
        } else if (bits >= 4) {
            tile[64 * (p / 2) + at] |= static_cast<uint8_t>((code & 15) << 4 * (p % 2));
            if (bits == 6) tile[128 + at] |= static_cast<uint8_t>((code >> 4) << 2 * p);
        } else {
            tile[at] |= static_cast<uint8_t>((code & 3) << 2 * p);
        }
        if (bits == 3) tile[64 + 8 * p + at / 8] |= static_cast<uint8_t>((code >> 2) << at % 8);
        if (bits == 5) tile[128 + 8 * p + at / 8] |= static_cast<uint8_t>((code >> 4) << at % 8);
    }
};

Array<int8_t> random_codes(int64_t size, uint64_t seed) {
    Random random{seed};
    Array<int8_t> codes(size);
    for (int64_t i = 0; i < size; ++i) codes[i] = static_cast<int8_t>(random.below(256) - 128);
    return codes;
}

Array<float> random_reals(int64_t size, uint64_t seed) {
    Random random{seed};
    Array<float> x(size);
    for (int64_t i = 0; i < size; ++i) x[i] = random.normal();
    return x;
}

Array<float> expected_product(const Weight &w, int64_t rows, const Array<int8_t> &codes, const Array<float> &scale) {
    Array<float> y(rows * w.n);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < w.n; ++n) {
            int64_t sum = 0;
            for (int64_t k = 0; k < w.k; ++k) sum += codes[m * w.k + k] * w.dense[n * w.k + k];
            const float value = static_cast<float>(sum) * w.row_scale[n] * scale[m];
            y[m * w.n + n] = w.c.bias ? value + w.bias[n] : value;
        }
    return y;
}

void check_product(const Weight &w, int64_t rows, const std::vector<int> &types, const std::vector<int> &threads,
                   const Array<int8_t> &codes) {
    Array<float> scale(rows);
    for (int64_t m = 0; m < rows; ++m) scale[m] = 0.01f + 0.001f * static_cast<float>(m % 7);
    const Array<float> expected = expected_product(w, rows, codes, scale);
    for (const int type : types) {
        const Array<uint8_t> bytes = convert(expected, type);
        for (const std::string &isa : supported()) {
            lrq_use_isa(isa.c_str());
            for (const int count : threads) {
                Array<uint8_t> out(rows * w.n * element_size(type));
                const int status =
                    lrq_quantized_linear(&w.c, rows, codes.data(), scale.data(), nullptr, type, count, out.data());
                check(status == 0 && out == bytes,
                      text("quantized_linear on %s: %d bits%s, M %d, N %d, K %d, %d table rows, type %d, %d threads: %s",
                           isa.c_str(), w.bits, w.c.is_trellis ? ", trellis" : "", int(rows), int(w.n), int(w.k), int(w.c.table_rows), type, count,
                           status ? lrq_last_error() : "other bytes"));
            }
        }
    }
}

void test_quantized_linear() {
    uint64_t seed = 1;
    for (const int bits : {2, 3, 4, 5, 6, 8})
        for (const int64_t n : {1, 15, 16, 17, 33, 49, 97})
            for (const int64_t k : {1, 15, 16, 17, 33, 64, 100}) {
                const Weight w(n, k, bits, bits == 3 || n % 16 == 1, n != 16, ++seed);
                for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9})
                    check_product(w, rows, {static_cast<int>((n + rows) % 3)}, {1}, random_codes(rows * k, ++seed));
                check_product(w, 70, ALL_TYPES, {1, 2}, random_codes(70 * k, ++seed));
            }
    for (const int bits : {2, 3, 4, 5})
        for (const int64_t n : {1, 7, 16, 17, 33, 97})
            for (const int64_t k : {1, 16, 33, 100}) {
                const Weight w(n, k, bits, false, true, ++seed, false, true);
                for (const int64_t rows : {1, 2, 3, 4, 5, 70})
                    check_product(w, rows, {LRQ_BFLOAT16}, {1, 2}, random_codes(rows * k, ++seed));
            }
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
        const auto run = [&](int64_t rows, int64_t n, int64_t k, bool has_row_tables) {
            const Weight w(n, k, bits, has_row_tables, true, ++seed);
            check_product(w, rows, {LRQ_FLOAT32}, {1, 2, 3, 7}, random_codes(rows * k, ++seed));
        };
        run(13, 200, 6500, false);  // inputs in several splits
        run(3, 130, 6147, true);
        run(67, 50, 4096, false);  // rows a power of two apart
        run(600, 70, 40, true);    // several chunks
        run(1300, 100, 17, false);
        run(33, 1700, 64, false);  // several groups
        run(1, 1700, 48, true);
    }
    // bfloat16, whose outputs may be written beside later products
    for (const auto &[rows, n, k, bits] : std::vector<std::array<int64_t, 4>>{
             {50, 170, 1300, 4}, {17, 32, 2500, 3}, {41, 96, 10000, 8}, {70, 300, 64, 2}}) {
        const Weight w(n, k, static_cast<int>(bits), false, true, ++seed);
        check_product(w, rows, {LRQ_BFLOAT16}, {1, 3}, random_codes(rows * k, ++seed));
    }
    // The largest sum that must not overflow; the 16 rows of a tile beyond N are decoded, too.
    for (const int bits : {2, 8}) {
        const int64_t k = (1 << 17) - 1;
        const Weight w(3, k, bits, false, true, ++seed, true);
        for (const int64_t rows : {1, 5}) {
            Array<int8_t> codes(rows * k);
            std::memset(codes.data(), -128, codes.bytes());
            check_product(w, rows, {LRQ_FLOAT32}, {1}, codes);
        }
    }
}

// Outputs that begin at a line of the cache and are more than it would keep.
void test_many_outputs() {
    const Weight w(1024, 40, 4, false, true, 9);
    const int64_t rows = 530, values = rows * w.n;
    const Array<int8_t> codes = random_codes(rows * w.k, 10);
    Array<float> scale(rows);
    for (int64_t m = 0; m < rows; ++m) scale[m] = 0.01f + 0.001f * static_cast<float>(m % 7);
    const Array<uint8_t> expected = convert(expected_product(w, rows, codes, scale), LRQ_BFLOAT16);
    for (const std::string &isa : supported()) {
        lrq_use_isa(isa.c_str());
        const std::unique_ptr<void, decltype(&std::free)> out(std::aligned_alloc(64, 2 * values), &std::free);
        const int status =
            lrq_quantized_linear(&w.c, rows, codes.data(), scale.data(), nullptr, LRQ_BFLOAT16, 2, out.get());
        check(status == 0 && !std::memcmp(out.get(), expected.data(), expected.bytes()), "many outputs on " + isa);
    }
}

// Steps and scales that are not finite, in blocks whose outputs would otherwise be written beside the next product.
void test_special_scales() {
    Weight w(200, 64, 4, false, true, 7);
    const int64_t rows = 33;
    const Array<int8_t> codes = random_codes(rows * w.k, 8);
    Array<float> scale(rows);
    for (int64_t m = 0; m < rows; ++m) scale[m] = m == 3 ? NAN : m == 12 ? INFINITY : 0.01f;
    for (const bool has_special_channel : {false, true}) {
        if (has_special_channel) w.row_scale[60] = INFINITY, w.bias[110] = NAN;
        Array<uint8_t> expected(rows * w.n * 2);
        lrq_use_isa("serial");
        lrq_quantized_linear(&w.c, rows, codes.data(), scale.data(), nullptr, LRQ_BFLOAT16, 1, expected.data());
        const auto *halves = reinterpret_cast<const uint16_t *>(expected.data());
        check(halves[3 * w.n] == 0x7fc0 && (halves[12 * w.n + 1] & 0x7fff) == 0x7f80, "a step that is not finite");
        for (const std::string &isa : supported()) {
            lrq_use_isa(isa.c_str());
            Array<uint8_t> out(expected.size());
            lrq_quantized_linear(&w.c, rows, codes.data(), scale.data(), nullptr, LRQ_BFLOAT16, 2, out.data());
            check(out == expected, "scales that are not finite on " + isa);
        }
    }
}

// The squared error of a column's codes, as lrqdit.h defines a trellis.
double path_error(const float *column, int64_t stride, int64_t rows, const int8_t *table, const float *scale,
                  const std::vector<int> &codes) {
    double error = 0;
    for (int64_t n = 0; n < rows; ++n) {
        const auto bit = [&](int64_t back) { return n < back ? 0 : codes[n - back] & 1; };
        const int level = table[2 * (codes[n] ^ bit(1) ^ bit(6)) + (bit(2) ^ bit(4))];
        const double e = column[n * stride] - double(scale[n]) * level;
        error += e * e;
    }
    return error;
}

void test_trellis() {
    uint64_t seed = 40;
    for (const int bits : {2, 3, 4, 5})
        for (const int64_t rows : {1, 2, 3, 17, 70})
            for (const int64_t columns : {1, 3, 16, 33, 150}) {
                Random random{++seed};
                const Array<float> weight = random_reals(rows * columns, ++seed);
                Array<int8_t> table(2 << bits);
                for (int64_t i = 0; i < table.size(); ++i)
                    table[i] = static_cast<int8_t>(-120 + 240 * i / (table.size() - 1));
                Array<float> scale(rows);
                for (int64_t i = 0; i < rows; ++i) scale[i] = i == 5 ? 0 : 0.015f + 0.01f * random.real();
                const lrq_matrix matrix = {weight.data(), rows, columns, nullptr};
                Array<uint8_t> expected;
                for (const std::string &isa : supported())
                    for (const int threads : {1, 3}) {
                        lrq_use_isa(isa.c_str());
                        Array<uint8_t> codes(rows * columns);
                        const int status =
                            lrq_trellis_encode(&matrix, table.data(), bits, scale.data(), threads, codes.data());
                        if (!expected.size()) expected = Array<uint8_t>(codes);
                        check(status == 0 && codes == expected,
                              text("trellis_encode on %s: %d bits, %d x %d, %d threads", isa.c_str(), bits, int(rows),
                                   int(columns), threads));
                    }
                if (rows > 3) continue;
                for (int64_t j = 0; j < columns; ++j) {  // against every path there is
                    std::vector<int> path(rows);
                    for (int64_t n = 0; n < rows; ++n) path[n] = expected[n * columns + j];
                    const auto measure = [&](const std::vector<int> &codes) {
                        return path_error(weight.data() + j, columns, rows, table.data(), scale.data(), codes);
                    };
                    double best = measure(path);
                    const double found = best;
                    for (int64_t number = 0; number < int64_t{1} << (bits * rows); ++number) {
                        std::vector<int> codes(rows);
                        for (int64_t n = 0; n < rows; ++n) codes[n] = number >> (bits * n) & ((1 << bits) - 1);
                        best = std::min(best, measure(codes));
                    }
                    check(found <= best * (1 + 1e-5) + 1e-12, text("trellis_encode: %d bits, %d rows", bits, int(rows)));
                }
            }
}

void test_conversions() {
    // Values at and around ties, denormal and overflowing halves, through row_scale of a product of 1.
    Random random{77};
    const int64_t n = 4000;
    Weight w(n, 1, 8, false, false, 5);
    for (int64_t i = 0; i < n; ++i) {
        w.put(i, 0, 129);
        const float half = from_half(static_cast<uint16_t>(random.below(0x7bff)));
        const float next = from_half(static_cast<uint16_t>(to_half(half) + 1));
        const float tie = (half + next) / 2;
        const float values[] = {tie,
                                float_of(bits_of(tie) + 1),
                                float_of(bits_of(tie) - 1),
                                half,
                                70000.0f,
                                65519.9f,
                                random.real() * 1e-7f,
                                float_of(static_cast<uint32_t>(random.next()) & 0xbf7fffff)};
        w.row_scale[i] = values[i % 8];
        w.dense[i] = 1;
    }
    // the packed bytes were filled with other codes at first
    std::memset(w.packed.data(), 129, w.packed.bytes());
    Array<int8_t> codes(5);
    std::memset(codes.data(), 1, 5);
    check_product(w, 5, ALL_TYPES, {1}, codes);
    // every half and every bfloat16, to float32
    Array<uint16_t> all(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) all[i] = static_cast<uint16_t>(i);
    for (const int type : {LRQ_BFLOAT16, LRQ_FLOAT16})
        for (const std::string &isa : supported()) {
            lrq_use_isa(isa.c_str());
            lrq_transform t{};
            t.x = all.data(), t.x_type = type, t.rows = 4, t.width = 1 << 14;
            Array<float> out(1 << 16);
            lrq_apply_transform(&t, 1, out.data());
            bool is_right = true;
            for (int i = 0; i < 1 << 16; ++i) {
                const float value = type == LRQ_FLOAT16 ? from_half(all[i]) : from_bfloat16(all[i]);
                is_right &= std::isnan(value) ? std::isnan(out[i]) : bits_of(value) == bits_of(out[i]);
            }
            check(is_right, text("inputs of type %d on %s", type, isa.c_str()));
        }
    for (uint32_t half = 0; half < 0x7c00; ++half)
        check(to_half(from_half(static_cast<uint16_t>(half))) == half, "the test's own to_half");
}

void test_weight_only() {
    uint64_t seed = 900;
    for (const int bits : {2, 3, 4, 5, 6, 8})
        for (const int64_t n : {1, 16, 33})
            for (const int64_t k : {1, 17, 64, 130})
                for (const int64_t rows : {1, 2, 7, 8, 9, 21}) {
                    const Weight w(n, k, bits, n == 33, k != 17, ++seed);
                    const Array<float> x = random_reals(rows * k, ++seed);
                    Array<float> first(0);
                    for (const std::string &isa : supported())
                        for (const int threads : {1, 2}) {
                            lrq_use_isa(isa.c_str());
                            Array<float> y(rows * n);
                            const std::string what = text("weight_only_linear on %s: %d bits, M %d, N %d, K %d",
                                                          isa.c_str(), bits, int(rows), int(n), int(k));
                            const int status =
                                lrq_weight_only_linear(&w.c, rows, x.data(), LRQ_FLOAT32, threads, y.data());
                            if (!check(status == 0, what)) return;
                            if (first.size()) check(first == y, what + ": other bytes than the first instruction set");
                            for (int64_t m = 0; m < rows; ++m)
                                for (int64_t i = 0; i < n; ++i) {
                                    double sum = 0, size = 0;
                                    for (int64_t j = 0; j < k; ++j) {
                                        const double product = static_cast<double>(x[m * k + j]) * w.dense[i * k + j];
                                        sum += product, size += std::fabs(product);
                                    }
                                    const double bias = w.c.bias ? w.bias[i] : 0, scale = w.row_scale[i];
                                    const double error = std::fabs(y[m * n + i] - (sum * scale + bias));
                                    check(error <= 1e-6 * (size * scale + std::fabs(bias)),
                                          what + text(": error %g", error));
                                }
                            for (const int type : {LRQ_BFLOAT16, LRQ_FLOAT16}) {
                                Array<uint8_t> out(rows * n * 2);
                                lrq_weight_only_linear(&w.c, rows, x.data(), type, threads, out.data());
                                check(out == convert(y, type), what + text(" as type %d", type));
                            }
                            first = std::move(y);
                        }
                }
}

// A thread's panel is kept from call to call; no call may find another's.
void test_calls_in_turn() {
    const Weight a(100, 64, 4, false, true, 1), b(100, 64, 4, false, true, 2), c(100, 96, 3, true, false, 3);
    const int64_t rows = 9;
    Array<float> scale(rows);
    std::fill(scale.data(), scale.data() + rows, 0.5f);
    const Array<int8_t> codes = random_codes(rows * 96, 4);
    const Array<float> x = random_reals(rows * 96, 5);
    for (const std::string &isa : supported()) {
        lrq_use_isa(isa.c_str());
        for (int round = 0; round < 3; ++round)
            for (const Weight *w : {&a, &b, &c}) {
                Array<float> y(rows * w->n), z(rows * w->n);
                lrq_quantized_linear(&w->c, rows, codes.data(), scale.data(), nullptr, LRQ_FLOAT32, 1, y.data());
                check(y == expected_product(*w, rows, codes, scale), "calls in turn on " + isa);
                lrq_weight_only_linear(&w->c, rows, x.data(), LRQ_FLOAT32, 1, z.data());
            }
    }
}

void test_concurrent_callers() {
    for (const std::string &isa : supported()) {
        lrq_use_isa(isa.c_str());
        std::vector<std::thread> callers;
        bool is_right[4] = {};
        for (int i = 0; i < 4; ++i)
            callers.emplace_back([i, &is_right] {
                const int64_t rows = 3 + 10 * i;
                const Weight w(70 + i, 40 + i, i % 2 ? 3 : 8, false, true, 50 + i);
                const Array<int8_t> codes = random_codes(rows * w.k, 60 + i);
                Array<float> scale(rows);
                std::fill(scale.data(), scale.data() + rows, 0.25f);
                const Array<float> expected = expected_product(w, rows, codes, scale);
                is_right[i] = true;
                for (int round = 0; round < 10; ++round) {
                    Array<float> y(rows * w.n);
                    is_right[i] &=
                        !lrq_quantized_linear(&w.c, rows, codes.data(), scale.data(), nullptr, LRQ_FLOAT32, 1, y.data());
                    is_right[i] &= y == expected;
                    is_right[i] &= lrq_quantized_linear(&w.c, -1, nullptr, nullptr, nullptr, 0, 1, nullptr) != 0;
                    is_right[i] &= std::strlen(lrq_last_error()) > 0;  // one per thread
                }
            });
        for (std::thread &caller : callers) caller.join();
        for (const bool right : is_right) check(right, "concurrent callers on " + isa);
    }
}

// Paley's and Sylvester's matrices as lrqdit/hadamard.py makes them.
std::vector<int> jacobsthal(int size, int prime, int degree) {
    std::vector<int> character;
    const auto digits_of = [&](int number) {
        std::vector<int> digits(degree);
        for (int &digit : digits) digit = number % prime, number /= prime;
        return digits;
    };
    for (int low = 1; low < size; ++low) {
        character.assign(size, 0);
        std::vector<int> element = digits_of(1), polynomial = digits_of(low);
        int power = 0;
        for (; power < size - 1; ++power) {
            int number = 0;
            for (int place = degree; place-- > 0;) number = number * prime + element[place];
            if (number == 0 || character[number]) break;
            character[number] = 1 - 2 * (power % 2);
            std::vector<int> shifted(degree);
            for (int place = 0; place < degree; ++place)
                shifted[place] =
                    ((place ? element[place - 1] : 0) + element[degree - 1] * (prime - polynomial[place])) % prime;
            element = shifted;
        }
        if (power == size - 1) break;
    }
    std::vector<int> q(size * size);
    for (int i = 0; i < size; ++i)
        for (int j = 0; j < size; ++j) {
            const std::vector<int> a = digits_of(i), b = digits_of(j);
            int number = 0;
            for (int place = degree; place-- > 0;) number = number * prime + (a[place] - b[place] + prime) % prime;
            q[i * size + j] = character[number];
        }
    return q;
}

std::vector<double> butterfly_matrix(int64_t order) {
    std::vector<double> h(order * order, 1.0);
    if (order == 12 || order == 20 || order == 28) {
        const int size = static_cast<int>(order) - 1;
        const std::vector<int> q = size == 27 ? jacobsthal(27, 3, 3) : jacobsthal(size, size, 1);
        for (int64_t i = 1; i < order; ++i) {
            h[i * order] = -1;
            for (int64_t j = 1; j < order; ++j) h[i * order + j] = i == j ? 1 : q[(i - 1) * size + j - 1];
        }
    } else {
        for (int64_t i = 0; i < order; ++i)
            for (int64_t j = 0; j < order; ++j)
                h[i * order + j] = __builtin_popcountll(static_cast<unsigned long long>(i & j)) % 2 ? -1 : 1;
    }
    for (double &entry : h) entry /= std::sqrt(static_cast<double>(order));
    return h;
}

// x (first .. first + covered) times the Kronecker product of the matrices, outermost first.
void multiply_kronecker(double *x, int64_t covered, const std::vector<std::vector<double>> &matrices) {
    int64_t inner = covered;
    for (const std::vector<double> &matrix : matrices) {
        const int64_t order = static_cast<int64_t>(std::llround(std::sqrt(static_cast<double>(matrix.size()))));
        inner /= order;
        for (int64_t o = 0; o < covered; o += order * inner)
            for (int64_t i = 0; i < inner; ++i) {
                std::vector<double> y(order, 0.0);
                for (int64_t m = 0; m < order; ++m)
                    for (int64_t j = 0; j < order; ++j) y[j] += x[o + m * inner + i] * matrix[m * order + j];
                for (int64_t j = 0; j < order; ++j) x[o + j * inner + i] = y[j];
            }
    }
}

// A transform, and everything it points to. A negative factor, or an order without a butterfly, gets a dense matrix.
struct Transform {
    int64_t rows, width, covered = 1;
    int type, rotation;
    Array<uint8_t> x;
    Array<float> values;  // x as float32, which is exact
    Array<uint16_t> offset, scale;
    Array<int64_t> factors;
    std::vector<Array<float>> dense;
    std::vector<std::vector<double>> matrices;
    std::unique_ptr<const float *[]> pointers;
    Array<float> block1, block2;
    Array<int32_t> permutation;
    lrq_transform c{};

    Transform(int rotation, int64_t rows, int64_t width, std::vector<int64_t> orders, int type, bool has_parts,
              uint64_t seed)
        : rows(rows),
          width(width),
          type(type),
          rotation(rotation),
          x(rows * width * element_size(type)),
          values(rows * width),
          offset(has_parts ? width : 0),
          scale(has_parts ? width : 0),
          factors(static_cast<int64_t>(orders.size())),
          pointers(new const float *[orders.size()]) {
        Random random{seed};
        for (int64_t i = 0; i < rows * width; ++i) values[i] = random.normal() * (i % 7 == 3 ? 30.0f : 1.0f);
        refresh();
        for (int64_t i = 0; i < offset.size(); ++i) {
            offset[i] = to_half(random.normal());
            scale[i] = to_half(random.normal() + (i % 2 ? 1.5f : -1.5f));
        }
        const auto random_matrix = [&](int64_t order) {  // it need not be orthogonal
            Array<float> matrix(order * order);
            for (int64_t i = 0; i < matrix.size(); ++i)
                matrix[i] = random.normal() / std::sqrt(static_cast<float>(order));
            return matrix;
        };
        for (size_t i = 0; i < orders.size(); ++i) {
            const int64_t order = std::llabs(orders[i]);
            factors[static_cast<int64_t>(i)] = orders[i];
            covered *= order;
            pointers[i] = nullptr;
            if (rotation == LRQ_OUTLIER) continue;
            if (orders[i] > 0 && ((order & (order - 1)) == 0 || order == 12 || order == 20 || order == 28)) {
                matrices.push_back(butterfly_matrix(order));
            } else {
                dense.push_back(random_matrix(order));
                pointers[i] = dense.back().data();
                matrices.emplace_back(dense.back().data(), dense.back().data() + order * order);
            }
        }
        if (rotation == LRQ_OUTLIER) {
            block1 = random_matrix(covered), block2 = random_matrix(covered);
            permutation = Array<int32_t>(width);
            for (int64_t i = 0; i < width; ++i) permutation[i] = static_cast<int32_t>(i);
            for (int64_t i = width; i-- > 1;) std::swap(permutation[i], permutation[random.below(i + 1)]);
        }
        c = {x.data(),
             type,
             rotation,
             rows,
             width,
             has_parts ? offset.data() : nullptr,
             has_parts ? scale.data() : nullptr,
             factors.data(),
             pointers.get(),
             factors.size(),
             rotation == LRQ_OUTLIER ? block1.data() : nullptr,
             rotation == LRQ_OUTLIER ? block2.data() : nullptr,
             rotation == LRQ_OUTLIER ? permutation.data() : nullptr};
    }

    // x from values, and values rounded to what x holds.
    void refresh() {
        Array<uint8_t> converted = convert(values, type);
        std::memcpy(x.data(), converted.data(), x.bytes());
        for (int64_t i = 0; i < values.size() && type != LRQ_FLOAT32; ++i) {
            uint16_t bits;
            std::memcpy(&bits, x.data() + 2 * i, 2);
            values[i] = type == LRQ_BFLOAT16 ? from_bfloat16(bits) : from_half(bits);
        }
    }

    std::vector<double> expected_row(int64_t row) const {
        std::vector<double> y(width);
        for (int64_t k = 0; k < width; ++k) {
            y[k] = values[row * width + k];
            if (c.offset) y[k] -= from_half(offset[k]);
            if (c.scale) y[k] *= from_half(scale[k]);
        }
        if (rotation == LRQ_HADAMARD) {
            multiply_kronecker(y.data(), covered, matrices);
            if (covered == width) return y;
            for (int64_t k = 0; k < width; ++k)
                if (k * k * 40503 >> 15 & 1) y[k] = -y[k];
            multiply_kronecker(y.data() + width - covered, covered, matrices);
        } else if (rotation != LRQ_NONE) {
            const auto multiply = [&](const std::vector<double> &matrix) {
                for (int64_t k = 0; k < width; k += covered) multiply_kronecker(y.data() + k, covered, {matrix});
            };
            if (rotation == LRQ_BLOCK_HADAMARD) return multiply(matrices[0]), y;
            multiply({block1.data(), block1.data() + block1.size()});
            const std::vector<double> mixed = y;
            for (int64_t k = 0; k < width; ++k) y[k] = mixed[permutation[k]];
            multiply({block2.data(), block2.data() + block2.size()});
        }
        return y;
    }
};

void check_transform(int rotation, int64_t width, const std::vector<int64_t> &factors, uint64_t seed) {
    std::string name = text("rotation %d, width %d, factors", rotation, int(width));
    for (const int64_t factor : factors) name += " " + std::to_string(factor);
    for (const int64_t rows : {0, 1, 2, 7, 8, 9, 17}) {
        const int type = static_cast<int>((rows + seed) % 3);
        const Transform t(rotation, rows, width, factors, type, (rows + seed / 3) % 4 != 1, seed + rows);
        Array<float> first(0);
        for (const std::string &isa : supported())
            for (const int threads : {1, 2, 3}) {
                const std::string what =
                    text("%s, %d rows of type %d on %s: ", name.c_str(), int(rows), type, isa.c_str());
                lrq_use_isa(isa.c_str());
                Array<float> y(rows * width);
                if (!check(lrq_apply_transform(&t.c, threads, y.data()) == 0, what + lrq_last_error())) return;
                if (first.size()) {
                    check(first == y, what + "other bytes than the first instruction set or thread count");
                } else {
                    for (int64_t m = 0; m < rows; ++m) {
                        const std::vector<double> expected = t.expected_row(m);
                        double largest = 0, error = 0;
                        for (int64_t k = 0; k < width; ++k) {
                            largest = std::max(largest, std::fabs(expected[k]));
                            error = std::max(error, std::fabs(expected[k] - y[m * width + k]));
                        }
                        check(error <= 4e-6 * largest + 1e-6,
                              what + text("row %d is off by %g of %g", int(m), error, largest));
                    }
                }
                const int bits = 4 + 2 * static_cast<int>((rows + width) % 3);
                const double clip = rows % 2 ? 1.0 : 0.85;
                Array<int8_t> codes(rows * width);
                Array<float> scale(rows);
                check(lrq_quantize_tokens(&t.c, bits, clip, nullptr, nullptr, threads, codes.data(), scale.data()) == 0,
                      what + lrq_last_error());
                const int most = (1 << (bits - 1)) - 1;
                for (int64_t m = 0; m < rows; ++m) {
                    float largest = 0;
                    for (int64_t k = 0; k < width; ++k) largest = std::max(largest, std::fabs(y[m * width + k]));
                    const float step = largest * static_cast<float>(clip / most);
                    check(scale[m] == step, what + text("step %g, not %g", scale[m], step));
                    const float inverse = step > std::numeric_limits<float>::min() ? 1.0f / step : 0.0f;
                    bool is_right = true;
                    for (int64_t k = 0; k < width; ++k) {
                        const float code = std::nearbyint(y[m * width + k] * inverse);
                        is_right &= codes[m * width + k] == std::min(std::max(code, -most - 1.0f), most * 1.0f);
                    }
                    check(is_right, what + text("codes of row %d at %d bits", int(m), bits));
                }
                if (!first.size()) first = std::move(y);
            }
    }
}

void test_transforms() {
    uint64_t seed = 3000;
    for (const int64_t width : {1, 2, 15, 16, 17, 31, 33, 64, 100, 1152}) check_transform(LRQ_NONE, width, {}, ++seed);
    const std::vector<std::vector<int64_t>> products = {{},
                                                        {1},
                                                        {2},
                                                        {4},
                                                        {8},
                                                        {16},
                                                        {32},
                                                        {64},
                                                        {128},
                                                        {256},
                                                        {512},
                                                        {4, 512},
                                                        {64, 64},
                                                        {12},
                                                        {20},
                                                        {28},
                                                        {12, 2},
                                                        {12, 4},
                                                        {12, 8},
                                                        {12, 16},
                                                        {20, 8},
                                                        {28, 8},
                                                        {28, 32},
                                                        {20, 64},
                                                        {12, 12, 8},
                                                        {12, 12, 32},
                                                        {12, 20, 28},
                                                        {28, 12, 2},
                                                        {-3},
                                                        {-7, 2},
                                                        {-3, 8},
                                                        {-5, 8},
                                                        {-3, 16},
                                                        {-2, 8},
                                                        {-6, 12},
                                                        {-13, 20},
                                                        {-17, 28, 8},
                                                        {36, 8},
                                                        {36, 4},
                                                        {-33, 128},
                                                        {-131, 16},
                                                        {8, 12},
                                                        {16, -3},
                                                        {2, -3, 8},
                                                        {-3, -5, 16},
                                                        {8, 8, 8},
                                                        {2, 2, 2, 2, 2},
                                                        {-1, 16},
                                                        {1, 24},
                                                        {172}};
    for (const std::vector<int64_t> &factors : products) {
        int64_t covered = 1;
        for (const int64_t factor : factors) covered *= std::llabs(factor);
        check_transform(LRQ_HADAMARD, covered, factors, ++seed);
        if (covered > 512) continue;
        for (const int64_t width : {covered + 1, covered + covered / 2, 2 * covered})  // two that overlap
            if (width > covered && width <= 2 * covered) check_transform(LRQ_HADAMARD, width, factors, ++seed);
    }
    const std::vector<std::pair<int64_t, int64_t>> blocks = {
        {1, 1},   {5, 1},   {6, 2},   {12, 4},  {24, 8},  {80, 16}, {96, 32}, {192, 64}, {384, 128},
        {24, 12}, {40, 20}, {56, 28}, {72, 36}, {48, 24}, {17, 17}, {102, 6}, {92, 23},  {1152, 128}};
    for (const auto &[width, block] : blocks) {
        check_transform(LRQ_BLOCK_HADAMARD, width, {block}, ++seed);
        check_transform(LRQ_OUTLIER, width, {block}, ++seed);
    }
}

void test_principal() {
    for (const auto &[rows, width, out_features, rank] : std::vector<std::array<int64_t, 4>>{
             {1, 48, 33, 2}, {3, 100, 52, 1}, {5, 33, 17, 5}, {9, 96, 48, 24}, {40, 200, 100, 31}, {70, 64, 48, 32}})
        for (const std::string &isa : supported()) {
            lrq_use_isa(isa.c_str());
            if (!lrq_has_pairs()) continue;
            const std::string what = text("principal part, M %d, K %d, N %d, rank %d on %s: ", int(rows), int(width),
                                          int(out_features), int(rank), isa.c_str());
            const Transform t(LRQ_NONE, rows, width, {}, LRQ_BFLOAT16, true, 3);
            const Weight w(out_features, width, 4, false, true, 5);
            Random random{9};
            Array<int8_t> inlet(rank * width), outlet(rank * out_features), codes(rows * width), other_codes(rows * width);
            for (int64_t i = 0; i < inlet.size(); ++i) inlet[i] = static_cast<int8_t>(random.below(255) - 127);
            for (int64_t i = 0; i < outlet.size(); ++i) outlet[i] = static_cast<int8_t>(random.below(255) - 127);
            Array<float> inlet_scale(rank), outlet_scale(rank), scale(rows), other_scale(rows);
            for (int64_t r = 0; r < rank; ++r)
                inlet_scale[r] = 1e-4f * static_cast<float>(r + 1), outlet_scale[r] = 1e-3f * static_cast<float>(r + 2);
            const int64_t even = rank + rank % 2;
            Array<uint16_t> p(rows * even), other_p(rows * even), out(rows * out_features), other(rows * out_features);
            lrq_principal part{inlet.data(), inlet_scale.data(), outlet.data(), outlet_scale.data(), rank, p.data()};
            if (!check(!lrq_quantize_tokens(&t.c, 8, 1.0, nullptr, &part, 1, codes.data(), scale.data()) &&
                           !lrq_quantized_linear(&w.c, rows, codes.data(), scale.data(), &part, LRQ_BFLOAT16, 1, out.data()),
                       what + lrq_last_error()))
                return;
            const auto value = [](uint16_t half) { return static_cast<double>(from_bfloat16(half)); };
            bool is_right = true;
            for (int64_t i = 0; i < rows; ++i) {
                std::vector<double> x(width), left(width);
                for (int64_t k = 0; k < width; ++k)
                    left[k] = x[k] = (static_cast<double>(t.values[i * width + k]) - from_half(t.offset[k])) *
                                     from_half(t.scale[k]);
                for (int64_t r = 0; r < rank; ++r) {
                    double exact = 0, size = 0;
                    for (int64_t k = 0; k < width; ++k) {
                        exact += x[k] * inlet[r * width + k] * inlet_scale[r];
                        size += std::fabs(x[k] * inlet[r * width + k] * inlet_scale[r]);
                        left[k] -= value(p[i * even + r]) * inlet_scale[r] * inlet[r * width + k];
                    }
                    is_right &= std::fabs(exact - value(p[i * even + r])) <= 0.01 * size;
                }
                if (even > rank) is_right &= p[i * even + rank] == 0;
                double largest = 0, sum_of_parts = 0;
                for (int64_t k = 0; k < width; ++k) largest = std::max(largest, std::fabs(left[k]));
                for (int64_t r = 0; r < rank; ++r) sum_of_parts += std::fabs(value(p[i * even + r])) * inlet_scale[r] * 127;
                for (int64_t k = 0; k < width; ++k)
                    is_right &= std::fabs(codes[i * width + k] * static_cast<double>(scale[i]) - left[k]) <=
                                0.51 * scale[i] + 0.004 * sum_of_parts;
                for (int64_t n = 0; n < out_features; ++n) {
                    double y = 0, size = 0;
                    for (int64_t k = 0; k < width; ++k)
                        y += static_cast<double>(codes[i * width + k]) * w.dense[n * width + k];
                    y = y * scale[i] * w.row_scale[n] + w.bias[n];
                    size = std::fabs(y);
                    for (int64_t r = 0; r < rank; ++r) {
                        const double one = value(p[i * even + r]) * outlet[r * out_features + n] * outlet_scale[r];
                        y += one, size += std::fabs(one);
                    }
                    is_right &= std::fabs(value(out[i * out_features + n]) - y) <= 0.01 * size + 1e-6;
                }
            }
            check(is_right, what + "wrong");
            for (const int threads : {1, 2, 3}) {
                part.coordinates = other_p.data();
                const int status = lrq_linear(&t.c, 8, 1.0, nullptr, &w.c, &part, LRQ_BFLOAT16, threads, other_codes.data(),
                                              other_scale.data(), other.data());
                check(status == 0 && other == out && other_codes == codes && other_scale == scale && other_p == p,
                      what + text("%d threads: ", threads) + lrq_last_error());
            }
            part.rank = 33;
            check(lrq_quantize_tokens(&t.c, 8, 1.0, nullptr, &part, 1, codes.data(), scale.data()), what + "rank 33");
            part.rank = rank, part.inlet = nullptr;
            check(lrq_quantize_tokens(&t.c, 8, 1.0, nullptr, &part, 1, codes.data(), scale.data()), what + "no inlet");
            part.outlet = nullptr;
            check(lrq_quantized_linear(&w.c, rows, codes.data(), scale.data(), &part, LRQ_BFLOAT16, 1, out.data()),
                  what + "no outlet");
            lrq_use_isa("serial");
            part = {inlet.data(), inlet_scale.data(), outlet.data(), outlet_scale.data(), rank, p.data()};
            check(lrq_quantize_tokens(&t.c, 8, 1.0, nullptr, &part, 1, codes.data(), scale.data()), what + "serial");
        }
}

void test_special_rows() {
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    for (const auto &[rotation, width, factors] : std::vector<std::tuple<int, int64_t, std::vector<int64_t>>>{
             {LRQ_NONE, 37, {}}, {LRQ_HADAMARD, 64, {64}}, {LRQ_HADAMARD, 36, {-3, 12}}, {LRQ_OUTLIER, 36, {12}}})
        for (const int bits : {4, 6, 8}) {
            Transform t(rotation, 9, width, factors, LRQ_FLOAT32, false, 7);
            for (const std::string &isa : supported()) {
                lrq_use_isa(isa.c_str());
                const std::string what =
                    text("special rows, rotation %d, %d bits on %s: ", rotation, bits, isa.c_str());
                Array<int8_t> clean(9 * width), codes(9 * width);
                Array<float> clean_scale(9), scale(9);
                t = Transform(rotation, 9, width, factors, LRQ_FLOAT32, false, 7);
                lrq_quantize_tokens(&t.c, bits, 1.0, nullptr, nullptr, 1, clean.data(), clean_scale.data());
                t.values[1 * width + 5] = nan;
                t.values[2 * width + 6] = infinity;
                t.values[3 * width + 7] = -infinity;
                t.values[4 * width + 1] = -nan;
                for (int64_t k = 0; k < width; ++k) {
                    t.values[5 * width + k] = k % 2 ? 0.0f : -0.0f;
                    t.values[6 * width + k] = 1e-42f * static_cast<float>(k + 1);
                    t.values[7 * width + k] = (k % 2 ? 1e-37f : -1e-37f) * static_cast<float>(k + 1);
                }
                t.refresh();
                lrq_quantize_tokens(&t.c, bits, 1.0, nullptr, nullptr, 1, codes.data(), scale.data());
                for (const int64_t row : {0, 8})
                    check(scale[row] == clean_scale[row] &&
                              !std::memcmp(codes.data() + row * width, clean.data() + row * width, width),
                          what + "a neighbour changed");
                for (const int64_t row : {1, 2, 3, 4}) check(!std::isfinite(scale[row]), what + "a finite step");
                check(std::isnan(scale[1]) && std::isnan(scale[4]), what + "NaN was lost");
                check(scale[5] == 0, what + "the step of zeros");
                bool is_zero = true;
                for (int64_t k = 5 * width; k < 7 * width; ++k) is_zero &= codes[k] == 0;
                check(is_zero, what + "codes of zeros or of denormals");
                const int most = (1 << (bits - 1)) - 1;
                check(*std::max_element(codes.data() + 7 * width, codes.data() + 8 * width) <= most,
                      what + "code out of range");
                for (int64_t k = 0; k < 9 * width; ++k)
                    if (!check(codes[k] >= -most - 1 && codes[k] <= most, what + "code out of range")) break;
            }
        }
}

void test_quantize_bits() {
    // Ties go to even, and the smallest code is reached only with a clip.
    Transform t(LRQ_NONE, 1, 20, {}, LRQ_FLOAT32, false, 1);
    for (int64_t k = 0; k < 20; ++k) t.values[k] = static_cast<float>(k) / 2 - 5;
    t.values[19] = 7, t.values[0] = -7;
    t.refresh();
    for (const std::string &isa : supported()) {
        lrq_use_isa(isa.c_str());
        Array<int8_t> codes(20);
        Array<float> scale(1);
        lrq_quantize_tokens(&t.c, 4, 1.0, nullptr, nullptr, 1, codes.data(), scale.data());
        check(scale[0] == 1.0f, "step 1 on " + isa);
        for (int64_t k = 0; k < 20; ++k) check(codes[k] == std::nearbyint(t.values[k]), "ties to even on " + isa);
        lrq_quantize_tokens(&t.c, 4, 0.5, nullptr, nullptr, 1, codes.data(), scale.data());
        check(scale[0] == 0.5f && codes[0] == -8 && codes[19] == 7, "clipped codes on " + isa);
        // far below what a checkpoint may hold: everything saturates, on its own side
        lrq_quantize_tokens(&t.c, 8, 1e-3, nullptr, nullptr, 1, codes.data(), scale.data());
        for (int64_t k = 0; k < 20; ++k)
            check(codes[k] == (t.values[k] > 0 ? 127 : t.values[k] < 0 ? -128 : 0), "saturated codes on " + isa);
    }
}

// Both in one call give the bytes of one after the other, whoever prepares which tokens.
void test_linear() {
    uint64_t seed = 900;
    const auto run = [&](int rotation, int64_t rows, int64_t n, const std::vector<int64_t> &factors, int64_t k, int type,
                         bool has_lookup) {
        const Transform t(rotation, rows, k, factors, type, true, ++seed);
        const Weight w(n, k, 4, false, true, ++seed, false, true);
        Array<int8_t> lookup(256);
        for (int64_t i = 0; i < 256; ++i) lookup[i] = static_cast<int8_t>((i - 128) / 16 * 16);
        const int8_t *levels = has_lookup ? lookup.data() : nullptr;
        for (const std::string &isa : supported()) {
            lrq_use_isa(isa.c_str());
            Array<int8_t> codes(rows * k);
            Array<float> scale(rows);
            Array<uint8_t> out(rows * n * element_size(type));
            lrq_quantize_tokens(&t.c, 8, 0.9, levels, nullptr, 1, codes.data(), scale.data());
            lrq_quantized_linear(&w.c, rows, codes.data(), scale.data(), nullptr, type, 1, out.data());
            for (const int threads : {1, 2, 3, 7}) {
                Array<int8_t> other_codes(rows * k);
                Array<float> other_scale(rows);
                Array<uint8_t> other(rows * n * element_size(type));
                const int status = lrq_linear(&t.c, 8, 0.9, levels, &w.c, nullptr, type, threads, other_codes.data(),
                                              other_scale.data(), other.data());
                check(status == 0 && other == out && other_codes == codes && other_scale == scale,
                      text("linear on %s: rotation %d, M %d, N %d, K %d, type %d, %d threads: %s", isa.c_str(), rotation,
                           int(rows), int(n), int(k), type, threads, status ? lrq_last_error() : "other bytes"));
            }
        }
    };
    for (const int64_t rows : {1, 4, 5, 9, 70, 700}) {
        run(LRQ_NONE, rows, 33, {}, 40, LRQ_BFLOAT16, false);
        run(LRQ_HADAMARD, rows, 500, {12, 8}, 96, LRQ_BFLOAT16, true);
        run(LRQ_HADAMARD, rows, 50, {-3, 4}, 12, LRQ_FLOAT32, false);
        run(LRQ_OUTLIER, rows, 20, {8}, 24, LRQ_FLOAT16, false);
    }
    run(LRQ_NONE, 70, 200, {}, 13000, LRQ_BFLOAT16, true);  // inputs in several splits
}

// Attention against softmax(scale q k^T + mask) v in double, the same for any number of threads.
void test_attention() {
    const auto real = [](uint16_t x) { return static_cast<double>(from_bfloat16(x)); };
    uint64_t seed = 70;
    const auto run = [&](int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t width, int mask_rank,
                         int mask_type) {
        Random random{++seed};
        const int64_t all_heads = batch * heads;
        // (batch, token, head, width) in memory
        Array<uint16_t> q(all_heads * queries * width), k(all_heads * keys * width), v(all_heads * keys * width);
        for (const Array<uint16_t> *array : {&q, &k, &v})
            for (int64_t i = 0; i < array->size(); ++i) (*array)[i] = to_bfloat16(random.normal());
        // rank 0: none; 1: by key; 2: by query and key; 4: all. The second query sees one key, the third none.
        const int64_t mask_rows = mask_rank == 4 ? all_heads * queries : mask_rank == 2 ? queries : 1;
        Array<float> mask(mask_rows * keys);
        Array<uint16_t> mask_bits(mask.size());
        for (int64_t i = 0; i < mask.size(); ++i) {
            const int64_t row = i / keys % queries;
            const bool is_masked = mask_rank > 1 && ((row == 1 && i % keys) || row == 2);
            mask_bits[i] = to_bfloat16(is_masked ? -INFINITY : random.normal());
            mask[i] = from_bfloat16(mask_bits[i]);
        }
        lrq_attention a{};
        a.query = q.data(), a.key = k.data(), a.value = v.data();
        a.batch = batch, a.heads = heads, a.queries = queries, a.keys = keys, a.width = width;
        a.scale = 0.3f, a.mask_type = mask_type;
        const auto set = [&](int64_t *stride, int64_t tokens, int64_t size) {
            stride[0] = tokens * heads * size, stride[1] = size, stride[2] = heads * size;
        };
        set(a.query_stride, queries, width), set(a.key_stride, keys, width), set(a.value_stride, keys, width);
        set(a.out_stride, queries, width), set(a.logsumexp_stride, queries, 1);
        if (mask_rank) a.mask = mask_type == LRQ_FLOAT32 ? static_cast<void *>(mask.data()) : mask_bits.data();
        if (mask_rank > 1) a.mask_stride[2] = keys;
        if (mask_rank == 4) a.mask_stride[1] = queries * keys, a.mask_stride[0] = heads * queries * keys;

        Array<double> wanted(q.size()), wanted_sum(all_heads * queries);
        std::vector<double> scores(keys);
        for (int64_t row = 0; row < all_heads * queries; ++row) {  // (batch, query, head)
            const int64_t b = row / heads / queries, i = row / heads % queries, h = row % heads;
            double most = -INFINITY, sum = 0;
            for (int64_t j = 0; j < keys; ++j) {
                const int64_t key_row = (b * keys + j) * heads + h;
                scores[j] = 0;
                for (int64_t d = 0; d < width; ++d) scores[j] += real(q[row * width + d]) * real(k[key_row * width + d]);
                scores[j] *= a.scale;
                if (mask_rank) scores[j] += mask[b * a.mask_stride[0] + h * a.mask_stride[1] + i * a.mask_stride[2] + j];
                most = std::max(most, scores[j]);
            }
            for (double &score : scores) sum += score = most > -INFINITY ? std::exp(score - most) : 0;
            wanted_sum[row] = sum > 0 ? most + std::log(sum) : 0;
            for (int64_t d = 0; d < width; ++d) {
                double &out = wanted[row * width + d] = 0;
                for (int64_t j = 0; j < keys; ++j) out += scores[j] * real(v[((b * keys + j) * heads + h) * width + d]);
                if (sum > 0) out /= sum;
            }
        }
        for (const std::string &isa : supported()) {
            lrq_use_isa(isa.c_str());
            if (!lrq_has_pairs() && isa != "plaintiles") continue;
            Array<uint16_t> first(q.size());
            for (const int threads : {1, 2, 3}) {
                Array<uint16_t> out(q.size());
                Array<float> logsumexp(all_heads * queries);
                a.out = out.data(), a.logsumexp = logsumexp.data();
                const std::string name = text("attention on %s: B %d, H %d, Lq %d, Lk %d, D %d, mask %d, %d threads",
                                              isa.c_str(), int(batch), int(heads), int(queries), int(keys), int(width),
                                              mask_rank, threads);
                if (!check(lrq_attend(&a, threads) == 0, name + ": " + lrq_last_error())) return;
                if (threads > 1) {
                    check(out == first, name + ": other bytes");
                    continue;
                }
                std::memcpy(first.data(), out.data(), out.bytes());
                double error = 0, sum_error = 0;
                for (int64_t i = 0; i < out.size(); ++i) error = std::max(error, std::fabs(real(out[i]) - wanted[i]));
                for (int64_t i = 0; i < logsumexp.size(); ++i)
                    sum_error = std::max(sum_error, std::fabs(logsumexp[i] - wanted_sum[i]));
                check(error < 0.02 && sum_error < 1e-3, name + text(": errors %g and %g", error, sum_error));
            }
        }
    };
    for (const int64_t width : {2, 8, 40, 72, 128, 256})
        for (const int64_t queries : {1, 17, 70})
            for (const int64_t keys : {1, 6, 77, 300}) run(1, 2, queries, keys, width, 0, LRQ_FLOAT32);
    for (const int rank : {1, 2, 4})
        for (const int type : {LRQ_FLOAT32, LRQ_BFLOAT16})
            for (const int64_t keys : {5, 130}) run(2, 3, 35, keys, 24, rank, type);
    run(1, 1, 70, 1000, 256, 2, LRQ_BFLOAT16);  // keys in several segments
    run(1, 1, 1200, 10, 4, 0, LRQ_FLOAT32);     // queries in several chunks
}

template <class Call>
void refuse(const char *what, const Array<float> &out, Call &&call) {
    lrq_use_isa("no such thing");
    const std::string before = lrq_last_error();
    const int status = call();
    check(status != 0, text("%s was accepted", what));
    check(before != lrq_last_error() && *lrq_last_error(), text("%s: no message", what));
    check(out.is_untouched(), text("%s: the output was written", what));
}

void test_bad_arguments() {
    const Array<float> out(1000);
    Array<float> scale(40);
    std::fill(scale.data(), scale.data() + 40, 1.0f);
    const Array<int8_t> codes = random_codes(1000, 1);
    const Array<float> x = random_reals(1000, 1);
    const Weight good(20, 24, 3, true, true, 1), eight(20, 24, 8, false, true, 1);
    const auto linear = [&](const char *what, auto change) {
        Weight w(20, 24, 3, true, true, 1);
        int64_t rows = 5;
        int type = LRQ_FLOAT32, threads = 1;
        const void *input = codes.data(), *steps = scale.data();
        void *output = out.data();
        change(w.c, rows, type, threads, input, steps, output);
        refuse(what, out, [&] {
            return lrq_quantized_linear(&w.c, rows, static_cast<const int8_t *>(input),
                                        static_cast<const float *>(steps), nullptr, type, threads, output);
        });
        if (!steps) return;
        refuse(what, out, [&] {
            return lrq_weight_only_linear(&w.c, rows, static_cast<const float *>(input ? x.data() : nullptr), type,
                                          threads, output);
        });
    };
#define LINEAR(what, change)                                                                                        \
    linear(what, [&](lrq_weight &w, int64_t &rows, int &type, int &threads, const void *&input, const void *&steps, \
                     void *&output) {                                                                               \
        (void)w, (void)rows, (void)type, (void)threads, (void)input, (void)steps, (void)output;                     \
        change;                                                                                                     \
    })
    LINEAR("no packed weight", w.packed = nullptr);
    LINEAR("no row scale", w.row_scale = nullptr);
    LINEAR("no table", w.table = nullptr);
    LINEAR("a table at 8 bits", w.bits = 8);
    LINEAR("7 bits", w.bits = 7);
    LINEAR("0 bits", w.bits = 0);
    LINEAR("no output channels", w.out_features = 0);
    LINEAR("no inputs", w.in_features = 0);
    LINEAR("too many inputs", w.in_features = 1 << 17);
    LINEAR("19 tables", w.table_rows = 19);
    LINEAR("a trellis of many tables", w.table_rows = w.out_features; w.is_trellis = 1);
    LINEAR("a trellis of 6 bits", w.table_rows = 1; w.bits = 6; w.is_trellis = 1);
    LINEAR("0 tables", w.table_rows = 0);
    LINEAR("-1 rows", rows = -1);
    LINEAR("output type 3", type = 3);
    LINEAR("output type -1", type = -1);
    LINEAR("0 threads", threads = 0);
    LINEAR("-1 threads", threads = -1);
    LINEAR("no input", input = nullptr);
    LINEAR("no output", output = nullptr);
    LINEAR("no steps", steps = nullptr);
#undef LINEAR
    refuse("no weight", out,
           [&] { return lrq_quantized_linear(nullptr, 1, codes.data(), scale.data(), nullptr, 0, 1, out.data()); });

    const auto transform = [&](const char *what, int rotation, std::vector<int64_t> factors, auto change) {
        Transform t(rotation, 5, 24, factors, LRQ_FLOAT32, true, 1);
        int threads = 1;
        float *output = out.data();
        change(t, threads, output);
        refuse(what, out, [&] { return lrq_apply_transform(&t.c, threads, output); });
        const Array<float> steps(5);
        refuse(what, out, [&] {
            return lrq_quantize_tokens(&t.c, 8, 1.0, nullptr, nullptr, threads, reinterpret_cast<int8_t *>(output), steps.data());
        });
        check(steps.is_untouched(), text("%s: the steps were written", what));
    };
#define TRANSFORM(what, rotation, factors, change)                                                            \
    transform(what, rotation, std::vector<int64_t> factors, [&](Transform &t, int &threads, float *&output) { \
        (void)t, (void)threads, (void)output;                                                                 \
        change;                                                                                               \
    })
    TRANSFORM("no x", LRQ_NONE, ({}), t.c.x = nullptr);
    TRANSFORM("-1 rows", LRQ_NONE, ({}), t.c.rows = -1);
    TRANSFORM("width 0", LRQ_NONE, ({}), t.c.width = 0);
    TRANSFORM("a huge width", LRQ_NONE, ({}), t.c.width = int64_t{1} << 40);
    TRANSFORM("x type 7", LRQ_NONE, ({}), t.c.x_type = 7);
    TRANSFORM("rotation 4", LRQ_NONE, ({}), t.c.rotation = 4);
    TRANSFORM("rotation -1", LRQ_NONE, ({}), t.c.rotation = -1);
    TRANSFORM("no output", LRQ_NONE, ({}), output = nullptr);
    TRANSFORM("0 threads", LRQ_NONE, ({}), threads = 0);
    TRANSFORM("no factors", LRQ_HADAMARD, ({12, 2}), t.c.factors = nullptr);
    TRANSFORM("-1 factors", LRQ_HADAMARD, ({12, 2}), t.c.factor_count = -1);
    TRANSFORM("99 factors", LRQ_HADAMARD, ({12, 2}), t.c.factor_count = 99);
    TRANSFORM("factor 0", LRQ_HADAMARD, ({12, 2}), t.factors[0] = 0);
    TRANSFORM("the smallest factor", LRQ_HADAMARD, ({12, 2}), t.factors[0] = INT64_MIN);
    TRANSFORM("factors above the width", LRQ_HADAMARD, ({12, 2}), t.factors[1] = 4);
    TRANSFORM("factors below half the width", LRQ_HADAMARD, ({8}), t.factors[0] = 4);
    TRANSFORM("a dense factor without matrices", LRQ_HADAMARD, ({-3, 8}), t.c.matrices = nullptr);
    TRANSFORM("a dense factor without its matrix", LRQ_HADAMARD, ({-3, 8}), t.pointers[0] = nullptr);
    TRANSFORM("order 24 without its matrix", LRQ_HADAMARD, ({24}), t.pointers[0] = nullptr);
    TRANSFORM("a block of 24 without its matrix", LRQ_BLOCK_HADAMARD, ({24}), t.pointers[0] = nullptr);
    TRANSFORM("a negative power of two without its matrix", LRQ_HADAMARD, ({-2, 12}), t.pointers[0] = nullptr);
    TRANSFORM("two blocks", LRQ_BLOCK_HADAMARD, ({2, 2}), (void)0);
    TRANSFORM("a block that does not divide", LRQ_BLOCK_HADAMARD, ({16}), (void)0);
    TRANSFORM("a negative block", LRQ_OUTLIER, ({8}), t.factors[0] = -8);
    TRANSFORM("no block1", LRQ_OUTLIER, ({8}), t.c.block1 = nullptr);
    TRANSFORM("no block2", LRQ_OUTLIER, ({8}), t.c.block2 = nullptr);
    TRANSFORM("no permutation", LRQ_OUTLIER, ({8}), t.c.permutation = nullptr);
    TRANSFORM("a permutation below 0", LRQ_OUTLIER, ({8}), t.permutation[3] = -1);
    TRANSFORM("a permutation beyond the width", LRQ_OUTLIER, ({8}), t.permutation[3] = 24);
#undef TRANSFORM
    refuse("no transform", out, [&] { return lrq_apply_transform(nullptr, 1, out.data()); });
    const Transform t(LRQ_NONE, 5, 24, {}, LRQ_FLOAT32, true, 1);
    auto *codes_out = reinterpret_cast<int8_t *>(out.data());
    for (const int bits : {-1, 0, 1, 9, 100})
        refuse("bits", out, [&] { return lrq_quantize_tokens(&t.c, bits, 1.0, nullptr, nullptr, 1, codes_out, scale.data()); });
    for (const double clip : {0.0, -1.0, 1e-9, static_cast<double>(NAN)})
        refuse("clip", out, [&] { return lrq_quantize_tokens(&t.c, 8, clip, nullptr, nullptr, 1, codes_out, scale.data()); });
    refuse("no steps", out, [&] { return lrq_quantize_tokens(&t.c, 8, 1.0, nullptr, nullptr, 1, codes_out, nullptr); });
    const auto both = [&](const Transform &from, int bits, double clip, const Weight &w, int type, float *to) {
        return lrq_linear(&from.c, bits, clip, nullptr, &w.c, nullptr, type, 1, codes_out, scale.data(), to);
    };
    const Transform wide(LRQ_NONE, 5, 48, {}, LRQ_FLOAT32, true, 1);
    refuse("another width", out, [&] { return both(wide, 8, 1.0, good, LRQ_FLOAT32, out.data()); });
    refuse("bits", out, [&] { return both(t, 9, 1.0, good, LRQ_FLOAT32, out.data()); });
    refuse("clip", out, [&] { return both(t, 8, 0.0, good, LRQ_FLOAT32, out.data()); });
    refuse("type", out, [&] { return both(t, 8, 1.0, good, 3, out.data()); });
    refuse("no output", out, [&] { return both(t, 8, 1.0, good, LRQ_FLOAT32, nullptr); });

    const auto refuse_linear = [&](const char *what, const lrq_transform *transform, const lrq_weight *weight, int bits,
                                   float *steps, int threads) {
        refuse(what, out, [&] {
            return lrq_linear(transform, bits, 1.0, nullptr, weight, nullptr, LRQ_FLOAT32, threads, codes_out, steps,
                              scale.data());
        });
    };
    const Weight narrow(20, 23, 3, true, true, 1);
    refuse_linear("no transform", nullptr, &good.c, 8, scale.data(), 1);
    refuse_linear("no weight", &t.c, nullptr, 8, scale.data(), 1);
    refuse_linear("another width", &t.c, &narrow.c, 8, scale.data(), 1);
    refuse_linear("1 bit", &t.c, &good.c, 1, scale.data(), 1);
    refuse_linear("no steps", &t.c, &good.c, 8, nullptr, 1);
    refuse_linear("0 threads", &t.c, &good.c, 8, scale.data(), 0);

    const auto refuse_attention = [&](const char *what, auto change) {
        uint16_t tokens[8] = {};
        lrq_attention a{};
        a.query = a.key = a.value = tokens;
        a.out = reinterpret_cast<uint16_t *>(out.data()), a.logsumexp = out.data() + 1;
        a.batch = a.heads = a.queries = a.keys = 1, a.width = 2, a.mask = tokens, a.mask_type = LRQ_BFLOAT16;
        int threads = 1;
        change(a, threads);
        refuse(what, out, [&] { return lrq_attend(&a, threads); });
    };
#define ATTENTION(what, ...)                                       \
    refuse_attention(what, [&](lrq_attention &a, int &threads) {   \
        (void)a, (void)threads;                                    \
        __VA_ARGS__;                                               \
    })
    ATTENTION("no query", a.query = nullptr);
    ATTENTION("no key", a.key = nullptr);
    ATTENTION("no value", a.value = nullptr);
    ATTENTION("no output", a.out = nullptr);
    ATTENTION("no logsumexp", a.logsumexp = nullptr);
    ATTENTION("an odd width", a.width = 3);
    ATTENTION("width 0", a.width = 0);
    ATTENTION("width 258", a.width = 258);
    ATTENTION("no keys", a.keys = 0);
    ATTENTION("-1 queries", a.queries = -1);
    ATTENTION("-1 heads", a.heads = -1);
    ATTENTION("-1 batch", a.batch = -1);
    ATTENTION("mask type 2", a.mask_type = LRQ_FLOAT16);
    ATTENTION("0 threads", threads = 0);
#undef ATTENTION
    refuse("no attention", out, [&] { return lrq_attend(nullptr, 1); });
    lrq_use_isa("serial");
    check(!lrq_has_pairs(), "serial has no attention");
    refuse_attention("attention where there is none", [](lrq_attention &, int &) {});
    lrq_use_isa(supported().front().c_str());

    // no rows: nothing to do, and nothing to point to
    check(lrq_quantized_linear(&good.c, 0, nullptr, nullptr, nullptr, LRQ_FLOAT32, 1, nullptr) == 0, "0 rows");
    check(lrq_weight_only_linear(&eight.c, 0, nullptr, LRQ_FLOAT32, 1, nullptr) == 0, "0 rows");
    const Transform none(LRQ_HADAMARD, 0, 24, {12, 2}, LRQ_FLOAT32, true, 1);
    check(lrq_quantize_tokens(&none.c, 8, 1.0, nullptr, nullptr, 1, nullptr, nullptr) == 0, "0 rows");
}

void test_instruction_sets() {
    check(lrq_abi_version() == LRQ_ABI_VERSION, "interface version");
    check(lrq_size_of("lrq_weight") == sizeof(lrq_weight), "the size of a structure");
    check(!lrq_size_of("lrq_nothing") && !lrq_size_of(nullptr), "the size of no structure");
    const int64_t *values = nullptr;
    check(lrq_constant("LRQ_BUTTERFLIES", &values) == 3 && values[0] == 12 && values[2] == 28, "a constant of three values");
    check(lrq_constant("LRQ_MAX_RANK", &values) == 1 && *values == LRQ_MAX_RANK, "a constant");
    check(!lrq_constant("LRQ_NOTHING", &values) && !lrq_constant(nullptr, &values), "no constant");
    check(lrq_isa_count() >= 1 && std::string(lrq_isa_name(lrq_isa_count() - 1)) == "serial", "serial is the last");
    check(!*lrq_isa_missing(lrq_isa_count() - 1), "serial runs everywhere");
    check(!*lrq_isa_name(-1) && !*lrq_isa_name(99) && *lrq_isa_missing(99), "indices out of range");
    check(lrq_isa() == supported().front(), "the best one is in use at first");
    for (int i = 0; i < lrq_isa_count(); ++i) {
        const bool is_there = !*lrq_isa_missing(i);
        std::printf("%s: %s\n", lrq_isa_name(i), is_there ? "tested" : lrq_isa_missing(i));
        check((lrq_use_isa(lrq_isa_name(i)) == 0) == is_there, text("choosing %s", lrq_isa_name(i)));
        if (is_there)
            check(!std::strcmp(lrq_isa(), lrq_isa_name(i)), "the chosen one is in use");
        else
            check(std::strstr(lrq_last_error(), lrq_isa_missing(i)) != nullptr, "the message says what is missing");
    }
    const std::string before = lrq_isa();
    check(lrq_use_isa("nonsense") != 0 && lrq_isa() == before, "an unknown one changes nothing");
    check(lrq_use_isa(nullptr) != 0 && lrq_isa() == before, "no name");
    std::printf("threads: %s\n", lrq_is_parallel() ? "OpenMP" : "one");
}

}  // namespace

int main() {
    const std::pair<const char *, void (*)()> tests[] = {
        {"instruction sets", test_instruction_sets},
        {"bad arguments", test_bad_arguments},
        {"quantized_linear", test_quantized_linear},
        {"many outputs", test_many_outputs},
        {"special scales", test_special_scales},
        {"linear", test_linear},
        {"attention", test_attention},
        {"principal part", test_principal},
        {"conversions", test_conversions},
        {"weight_only_linear", test_weight_only},
        {"trellis", test_trellis},
        {"calls in turn", test_calls_in_turn},
        {"concurrent callers", test_concurrent_callers},
        {"transforms", test_transforms},
        {"special rows", test_special_rows},
        {"quantize", test_quantize_bits},
    };
    for (const auto &[name, test] : tests) {
        const int before = failures;
        const int64_t checks_before = checks;
        const std::clock_t start = std::clock();
        test();
        std::printf("%-20s %8lld checks, %d failed, %.1f s of CPU time\n", name,
                    static_cast<long long>(checks - checks_before), failures - before,
                    static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
        std::fflush(stdout);
    }
    return failures != 0;
}
