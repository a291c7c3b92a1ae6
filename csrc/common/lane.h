// The vocabulary in which shared arithmetic is written.
//
// A function of csrc/common is a template over a lane type F: float on the GPU, sixteen floats on the CPU
// (csrc/cpu/simd.h). This header says what a scalar lane can do; simd.h says the same for sixteen. Every
// operation here rounds once, by IEEE 754, on every device and level, so equal inputs give equal bits: no
// fused multiply-add, no flush to zero, no call into a maths library.
#pragma once
#include <cstdint>
#include <cstring>

// `static` gives each translation unit its own copy: otherwise the linker keeps one of several, perhaps the
// AVX-512 one for the baseline.
#ifdef __CUDACC__
#define PYEFF_LANE static __host__ __device__ __forceinline__
#else
#define PYEFF_LANE static inline __attribute__((always_inline))
#endif

namespace pyeff {

PYEFF_LANE float broadcast(float x, float /*like*/) { return x; }
PYEFF_LANE uint32_t broadcast(uint32_t x, uint32_t /*like*/) { return x; }

PYEFF_LANE uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(x);
#else
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
#endif
}

PYEFF_LANE float float_of_bits(uint32_t u) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(u);
#else
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
#endif
}

PYEFF_LANE float sqrt_of(float x) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
}

PYEFF_LANE float divide(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

PYEFF_LANE double sqrt_of(double x) {
#ifdef __CUDA_ARCH__
    return __dsqrt_rn(x);
#else
    return __builtin_sqrt(x);
#endif
}

// sqrt(x) and 1 / (sqrt(x) + eps).
PYEFF_LANE void root_and_inverse(float x, float eps, float& root, float& inverse) {
    root = sqrt_of(x);
#ifdef __CUDA_ARCH__
    inverse = __frcp_rn(root + eps);
#else
    inverse = 1.0f / (root + eps);
#endif
}

PYEFF_LANE float select(bool condition, float yes, float no) { return condition ? yes : no; }
PYEFF_LANE uint32_t select(bool condition, uint32_t yes, uint32_t no) { return condition ? yes : no; }

// max and min in the sense of x86: the second operand when either is NaN. Spelled out so that every level
// agrees.
PYEFF_LANE float max_of(float a, float b) { return a > b ? a : b; }
PYEFF_LANE float min_of(float a, float b) { return a < b ? a : b; }
PYEFF_LANE float abs_of(float x) { return float_of_bits(bits_of(x) & 0x7fffffffu); }
PYEFF_LANE uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }
PYEFF_LANE uint32_t min_of(uint32_t a, uint32_t b) { return a < b ? a : b; }
// Of a number below 2^31, and of an integer in two's complement.
PYEFF_LANE float float_of_uint(uint32_t u) { return static_cast<float>(static_cast<int32_t>(u)); }
PYEFF_LANE float float_of_int(uint32_t u) { return float_of_uint(u); }

// bfloat16 <-> float32; to bfloat16 rounds to nearest even and keeps NaN a NaN.
PYEFF_LANE float float_of_bf16(uint16_t h) { return float_of_bits(static_cast<uint32_t>(h) << 16); }
PYEFF_LANE uint16_t bf16_of_float(float x) {
    const uint32_t u = bits_of(x);
    return (u & 0x7fffffffu) > 0x7f800000u ? static_cast<uint16_t>((u >> 16) | 0x40u)
                                           : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

}  // namespace pyeff
