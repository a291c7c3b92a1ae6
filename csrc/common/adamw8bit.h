// AdamW with moments kept in 8 bits: decode, update, encode, for one lane or sixteen.
//
// The mathematics and the two codes are in pyeff/reference/adamw8bit_step.py, which gives the same bits. B(x),
// the bits of a positive float read as an integer, is a piecewise linear 2^23 (log2 x + 127): multiplying it
// takes a power, shifting it right takes a root, and one undoes the other.
#pragma once
#include <cstdint>

#include "common/lane.h"

namespace pyeff {

// What a step shares among all elements; rounded from double once, on the host.
struct AdamWScalars {
    float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, root_factor, eps;
};

// One parameter: addresses, so that a list of them is an array of integers.
struct AdamWTensor {
    int64_t p, g, exp_avg_code, exp_avg_scale, exp_avg_sq_code, exp_avg_sq_scale;
    int64_t size;
    int64_t p_dtype, g_dtype;
};

constexpr int64_t DTYPE_FLOAT32 = 0, DTYPE_BFLOAT16 = 1;

constexpr uint32_t BITS_OF_ONE = 0x3f800000u;
constexpr uint32_t BINADE = 1u << 23;
constexpr float LARGEST_M = 31.0f / 32.0f;  // what k = 127 stands for, relative to the scale
constexpr float INVERSE_LARGEST_M = 32.0f / 31.0f;
constexpr float SMALLEST_SCALE = 1.17549435e-38f;  // 2^-126: below it 1 / scale overflows

// A sign and k in 0..127: B(|m| / scale) = 4 B(k / 128) - 3 B(1), and 0 for k = 0.
template <class U, class F>
PYEFF_LANE F decode_exp_avg(U code, F scale) {
    const U k = code & broadcast(127u, code);
    const U sign = (code & broadcast(128u, code)) << 24;
    const F t = float_of_uint(k) * broadcast(1.0f / 128.0f, scale);
    const F magnitude = float_of_bits((bits_of(t) << 2) - broadcast(3u * BITS_OF_ONE, code)) * scale;
    const F zero = broadcast(0.0f, scale);
    return float_of_bits(bits_of(select(t == zero, zero, magnitude)) | sign);
}

PYEFF_LANE float exp_avg_scale(float largest) { return max_of(largest * INVERSE_LARGEST_M, SMALLEST_SCALE); }

// Only the low eight bits of the result count. NaN becomes the largest positive value.
template <class U, class F>
PYEFF_LANE U encode_exp_avg(F m, F inverse_scale, U like) {
    const F bound = broadcast(LARGEST_M, m);
    const F relative = max_of(min_of(m * inverse_scale, bound), broadcast(-LARGEST_M, m));
    const U bits = bits_of(relative);
    const U magnitude = bits & broadcast(0x7fffffffu, like);
    const F t = float_of_bits((magnitude + broadcast(3u * BITS_OF_ONE, like)) >> 2);
    // Adding 2^16 rounds t to nearest even 1/128 and leaves 128 t in the lowest bits.
    const U k = bits_of(t + broadcast(65536.0f, m));
    return (k | ((bits >> 24) & broadcast(128u, like))) & broadcast(255u, like);
}

// sqrt(v): t = (k + 1) / 256 in the top binade, four binades for each halving of t below it; never zero.
template <class U, class F>
PYEFF_LANE F decode_root(U code, F scale) {
    const F t = (float_of_uint(code) + broadcast(1.0f, scale)) * broadcast(1.0f / 256.0f, scale);
    const F quartic = float_of_bits((bits_of(t) << 2) - broadcast(3u * BITS_OF_ONE - 3u * BINADE, code));
    return min_of(t, quartic) * scale;
}

PYEFF_LANE float inverse_of_scale(float scale) { return divide(1.0f, max_of(scale, SMALLEST_SCALE)); }

// Only the low eight bits of the result count. NaN becomes the largest value.
template <class U, class F>
PYEFF_LANE U encode_root(F root, F inverse_scale, U like) {
    const F relative = min_of(root * inverse_scale, broadcast(1.0f, root));
    const U quarter = (bits_of(relative) + broadcast(3u * BITS_OF_ONE - 3u * BINADE, like)) >> 2;
    const F t = max_of(max_of(relative, float_of_bits(quarter)), broadcast(1.0f / 256.0f, root));
    // Rounds t to nearest even 1/256 and takes one off.
    return bits_of(t + broadcast(32768.0f - 1.0f / 256.0f, root)) & broadcast(255u, like);
}

template <class F>
struct AdamWLane {
    F p, m, root;
};

template <class F>
PYEFF_LANE AdamWLane<F> adamw_update(F p, F g, F m, F root, const AdamWScalars& s) {
    const F new_m = m + (g - m) * broadcast(s.one_minus_beta1, p);
    const F v = (root * root) * broadcast(s.beta2, p) + (g * g) * broadcast(s.one_minus_beta2, p);
    const F new_root = sqrt_of(v);
    const F denominator = new_root * broadcast(s.root_factor, p) + broadcast(s.eps, p);
    const F step = divide(new_m * broadcast(s.step_size, p), denominator);
    return {p * broadcast(s.decay, p) - step, new_m, new_root};
}

}  // namespace pyeff
