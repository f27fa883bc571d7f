// Tiles: eight registers of 16 rows of 64 bytes, and the products of AMX. A product of tiles has a tile of sums C, a tile A
// whose rows are tokens, and a tile B that has four inputs (bytes) or two (bfloat16) of 16 channels in each row.
//
// With LRQ_PLAIN_TILES the same operations are plain C++ on memory of the thread, so that what is built on them runs on any
// machine.
#pragma once

#include "vectors.h"

#if defined(LRQ_PLAIN_TILES) || defined(__AMX_INT8__)
#define LRQ_HAS_TILES
namespace lrq {
namespace LRQ_ISA {

constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 64 * TILE_ROWS;  // of one tile
constexpr int TILES = 8;

#if defined(LRQ_PLAIN_TILES)
struct PlainTiles {
    bool is_configured = false;
    uint8_t rows[TILES][TILE_ROWS][64];
};
inline thread_local PlainTiles plain_tiles;

// Tiles belong to whoever holds a Tiles; before and behind they hold nothing, and using one of them is an error.
class Tiles {
  public:
    Tiles() { poison(true); }
    ~Tiles() { poison(false); }
    Tiles(const Tiles &) = delete;

  private:
    static void poison(bool is_configured) {
        if (plain_tiles.is_configured == is_configured) __builtin_trap();
        plain_tiles.is_configured = is_configured;
        __builtin_memset(plain_tiles.rows, 0xa5, sizeof plain_tiles.rows);
    }
};

template <int T> LRQ_INLINE uint8_t (&plain_tile())[TILE_ROWS][64] {
    static_assert(T >= 0 && T < TILES, "no such tile");
    if (!plain_tiles.is_configured) __builtin_trap();
    return plain_tiles.rows[T];
}

template <int T> inline void tile_zero() { __builtin_memset(plain_tile<T>(), 0, TILE_BYTES); }

template <int T> inline void tile_load(const void *from, int64_t stride) {
    for (int64_t r = 0; r < TILE_ROWS; ++r)
        __builtin_memcpy(plain_tile<T>()[r], static_cast<const uint8_t *>(from) + r * stride, 64);
}

template <int T> inline void tile_stream(const void *from, int64_t stride) { tile_load<T>(from, stride); }

template <int T> inline void tile_store(void *to, int64_t stride) {
    for (int64_t r = 0; r < TILE_ROWS; ++r)
        __builtin_memcpy(static_cast<uint8_t *>(to) + r * stride, plain_tile<T>()[r], 64);
}

template <int C, int A, int B> inline void tile_dot() {
    const auto &a = plain_tile<A>(), &b = plain_tile<B>();
    for (int m = 0; m < TILE_ROWS; ++m) {
        uint32_t sums[16];  // wrap
        __builtin_memcpy(sums, plain_tile<C>()[m], 64);
        for (int k = 0; k < 64; ++k) {
            const int32_t token = static_cast<int8_t>(a[m][k]);
            for (int n = 0; token && n < 16; ++n)
                sums[n] += static_cast<uint32_t>(token * static_cast<int8_t>(b[k / 4][4 * n + k % 4]));
        }
        __builtin_memcpy(plain_tile<C>()[m], sums, 64);
    }
}

// Its sums may differ from the hardware's in the last bits: that says less of the order in which they are added.
template <int C, int A, int B> inline void tile_pairs() {
    const auto &a = plain_tile<A>(), &b = plain_tile<B>();
    const auto value = [](const uint8_t *at) {
        const uint32_t bits = static_cast<uint32_t>(load<uint16_t>(at)) << 16;
        return load<float>(&bits);
    };
    for (int m = 0; m < TILE_ROWS; ++m)
        for (int n = 0; n < 16; ++n) {
            float even = 0, odd = 0;
            for (int k = 0; k < 16; ++k) {
                even += value(a[m] + 4 * k) * value(b[k] + 4 * n);
                odd += value(a[m] + 4 * k + 2) * value(b[k] + 4 * n + 2);
            }
            store(plain_tile<C>()[m] + 4 * n, load<float>(plain_tile<C>()[m] + 4 * n) + (even + odd));
        }
}

#else
// Tiles belong to whoever holds a Tiles: it configures them and gives them back, so that no thread that waits or sleeps has
// their 8 KiB saved.
class Tiles {
  public:
    Tiles() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        static_assert(sizeof shapes == 64, "as the instruction reads it");
        __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
    }
    ~Tiles() { __asm__ volatile("tilerelease" : : : "memory"); }
    Tiles(const Tiles &) = delete;
};

template <int T> LRQ_INLINE void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" : : "i"(T)); }

template <int T> LRQ_INLINE void tile_load(const void *from, int64_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
}

// Loads what is read once, so that the first cache keeps what is read again.
template <int T> LRQ_INLINE void tile_stream(const void *from, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
}

template <int T> LRQ_INLINE void tile_store(void *to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(to), "r"(stride) : "memory");
}

// C += A B in int32, of signed bytes.
template <int C, int A, int B> LRQ_INLINE void tile_dot() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// C += A B in float32, of pairs of bfloat16.
template <int C, int A, int B> LRQ_INLINE void tile_pairs() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
#endif

}  // namespace LRQ_ISA
}  // namespace lrq
#endif
