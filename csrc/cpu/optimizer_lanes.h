// Passes over arrays, sixteen elements at a time, and shares of them for threads: what the optimizer's step and the
// norm of gradients have in common. Included by files that are compiled once per level.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/optimizer_step.h"
#include "cpu/simd.h"

namespace pyeff {
namespace PYEFF_LEVEL {
namespace {

// What a pass does is written once, for sixteen elements or for one at the ragged end of a tensor: `like` arguments
// choose. The end takes one lane at a time, as the GPU does.
PYEFF_LANE F16 load_like(const float* p, F16) { return load(p); }
PYEFF_LANE float load_like(const float* p, float) { return *p; }
PYEFF_LANE U16 half_like(const uint16_t* p, U16) { return load_u16(p); }
PYEFF_LANE uint32_t half_like(const uint16_t* p, uint32_t) { return *p; }
PYEFF_LANE U16 byte_like(const uint8_t* p, U16) { return load_u8(p); }
PYEFF_LANE uint32_t byte_like(const uint8_t* p, uint32_t) { return *p; }
PYEFF_LANE U16 high_byte_like(const uint8_t* p, U16) { return load_high_u8(p); }
PYEFF_LANE uint32_t high_byte_like(const uint8_t* p, uint32_t) { return uint32_t{*p} << 24; }
PYEFF_LANE void keep(float* p, F16 x) { store(p, x); }
PYEFF_LANE void keep(float* p, float x) { *p = x; }
PYEFF_LANE void keep_half(uint16_t* p, U16 x) { store_u16(p, x); }
PYEFF_LANE void keep_half(uint16_t* p, uint32_t x) { *p = static_cast<uint16_t>(x); }
PYEFF_LANE void keep_high_half(uint16_t* p, U16 x) { store_high_u16(p, x); }
PYEFF_LANE void keep_high_half(uint16_t* p, uint32_t x) { *p = static_cast<uint16_t>(x >> 16); }
PYEFF_LANE void keep_byte(uint8_t* p, U16 x) { store_u8(p, x & splat(0xffu)); }
PYEFF_LANE void keep_byte(uint8_t* p, uint32_t x) { *p = static_cast<uint8_t>(x); }
PYEFF_LANE void keep_bytes(uint8_t* p, U16 x, uint8_t* q, U16 y) { store_low_bytes(p, x, q, y); }
PYEFF_LANE void keep_bytes(uint8_t* p, uint32_t x, uint8_t* q, uint32_t y) {
    *p = static_cast<uint8_t>(x);
    *q = static_cast<uint8_t>(y);
}
PYEFF_LANE U16 lane_numbers() {
    alignas(64) static constexpr uint8_t COUNT[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load_u8(COUNT);
}

#define PYEFF_INLINE __attribute__((always_inline))

// Elements [i, end).
template <class Body>
PYEFF_LANE void for_lanes(int64_t i, int64_t end, Body body) {
    for (; i + LANES <= end; i += LANES) body(i, F16{}, U16{});
    for (; i < end; ++i) body(i, float{}, uint32_t{});
}

int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Parts [first, last) of the concatenation of all tensors, of which each has parts_of(tensor).
template <class Parts, class Body>
void for_parts(const OptimizerTensor* tensors, int64_t count, Parts parts_of, int64_t first, int64_t last, Body body) {
    int64_t start = 0;
    for (int64_t i = 0; i < count && start < last; ++i) {
        const int64_t parts = parts_of(tensors[i]), end = start + parts;
        if (end > first) body(i, std::max(first - start, int64_t{0}), std::min(last - start, parts), start);
        start = end;
    }
}

// Runs body(first, last) for shares of `total` parts.
template <class Body>
void share(int64_t total, int64_t part, int threads, Body body) {
    // Waking a thread costs as much as some ten thousand elements.
    const int64_t useful = total * part / 16384 + 1;
    const int64_t team = std::max(std::min(static_cast<int64_t>(threads), useful), int64_t{1});
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(static, 1)
    for (int64_t i = 0; i < team; ++i) body(total * i / team, total * (i + 1) / team);
}

template <class Parts>
int64_t all_parts(const OptimizerTensor* tensors, int64_t count, Parts parts_of) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += parts_of(tensors[i]);
    return total;
}

}  // namespace
}  // namespace PYEFF_LEVEL
}  // namespace pyeff
