// AdamW with moments kept in 8 bits: decode, update, encode, for one lane or sixteen.
//
// The mathematics and the two codes are in pyeff/reference/adamw8bit_step.py, which gives the same bits. B(x),
// the bits of a positive float read as an integer, is a piecewise linear 2^23 (log2 x + 127): multiplying it
// takes a power, shifting it right takes a root, and one undoes the other.
#pragma once
#include <cstdint>

#include "common/lane.h"

namespace pyeff {

// What a step shares among all elements; rounded from double once, on the host. The step works on M = m / (1 - beta1)
// and R = sqrt(v / (1 - beta2)), so that a gradient is added as it is; what brings them back to m and sqrt(v) is
// applied to the scale of a block. The corrections for bias stand in step_size and eps.
struct AdamWScalars {
    float decay;        // 1 - lr weight_decay
    float exp_avg_in;   // beta1 / (1 - beta1)
    float exp_avg_out;  // 1 - beta1
    float root_in;      // sqrt(beta2 / (1 - beta2))
    float root_out;     // sqrt(1 - beta2)
    float step_size;    // lr (1 - beta1) / (1 - beta1^t) sqrt(1 - beta2^t) / sqrt(1 - beta2)
    float eps;          // eps sqrt(1 - beta2^t) / sqrt(1 - beta2)
};

// One parameter: addresses, so that a list of them is an array of integers.
struct AdamWTensor {
    int64_t p, g, exp_avg_code, exp_avg_scale, exp_avg_sq_code, exp_avg_sq_scale;
    int64_t size;
    int64_t p_dtype, g_dtype;
};

constexpr int64_t DTYPE_FLOAT32 = 0, DTYPE_BFLOAT16 = 1;

constexpr uint32_t BITS_OF_ONE = 0x3f800000u;
constexpr uint32_t BITS_OF_INFINITY = 0x7f800000u;
constexpr uint32_t BINADE = 1u << 23;
constexpr float LARGEST_M = 31.0f / 32.0f;  // what k = 127 stands for, relative to the scale
constexpr float INVERSE_LARGEST_M = 32.0f / 31.0f;
constexpr float LARGEST_FLOAT = 3.40282347e38f;
constexpr float SMALLEST_SCALE = 1.17549435e-38f;  // 2^-126: below it 1 / scale overflows

// Once a block: what decoded values are multiplied by, the new scale, and what new values are multiplied by.
PYEFF_LANE float exp_avg_factor(float scale, const AdamWScalars& s) {
    // An infinite factor would make NaN of the zeros of its block.
    return min_of(scale * s.exp_avg_in * 128.0f, LARGEST_FLOAT);
}
PYEFF_LANE float exp_avg_scale(float largest, const AdamWScalars& s) {
    return max_of(largest * s.exp_avg_out * INVERSE_LARGEST_M, SMALLEST_SCALE);
}
PYEFF_LANE float exp_avg_divisor(float scale, const AdamWScalars& s) { return divide(s.exp_avg_out, scale); }
PYEFF_LANE float root_factor(float scale, const AdamWScalars& s) { return scale * s.root_in * (1.0f / 256.0f); }
PYEFF_LANE float root_scale(float largest, const AdamWScalars& s) { return largest * s.root_out; }
PYEFF_LANE float root_divisor(float scale, const AdamWScalars& s) {
    return divide(s.root_out, max_of(scale, SMALLEST_SCALE));
}

// `code` is k in -127..127 in the highest byte: B(|m| / scale) = 4 B(|k| / 128) - 3 B(1), and 0 for k = 0.
template <class U, class F>
PYEFF_LANE F decode_exp_avg(U code, F factor) {
    // The exponent of 2^24 k lies between 128 + 23 and 128 + 29. The shift multiplies it by 4 and drops 4 128 beside
    // the sign: what is left is (k / 128)^4 / 128, and zero for zero.
    const F magnitude = float_of_bits(bits_of(float_of_int(code)) << 2) * factor;
    return float_of_bits(bits_of(magnitude) | (code & broadcast(0x80000000u, code)));
}

// relative = m / scale, at most 31/32 in magnitude. Only the low eight bits of the result count.
template <class U, class F>
PYEFF_LANE U encode_exp_avg(F relative, U like) {
    const U bits = bits_of(relative), sign = broadcast(0x80000000u, like);
    const U magnitude = bits & broadcast(0x7fffffffu, like);
    const F t = float_of_bits(((magnitude + broadcast(3u * BITS_OF_ONE, like)) >> 2) | (bits & sign));
    // Adding 1.5 2^16 rounds t to nearest even 1/128 and leaves 128 t in the lowest bits, in two's complement.
    return bits_of(t + broadcast(98304.0f, relative));
}

// sqrt(v): t = (code + 1) / 256 in the top binade, four binades for each halving of t below it; never zero.
template <class U, class F>
PYEFF_LANE F decode_root(U code, F factor) {
    const F t = float_of_uint(code) + broadcast(1.0f, factor);
    const F quartic = float_of_bits((bits_of(t) << 2) - broadcast(3u * BITS_OF_ONE + 21u * BINADE, code));
    return min_of(t, quartic) * factor;
}

// relative = sqrt(v) / scale, in [0, 1]. Only the low eight bits of the result count.
template <class U, class F>
PYEFF_LANE U encode_root(F relative, U like) {
    const U quarter = (bits_of(relative) + broadcast(3u * BITS_OF_ONE - 3u * BINADE, like)) >> 2;
    const F t = max_of(max_of(relative, float_of_bits(quarter)), broadcast(1.0f / 256.0f, relative));
    // Rounds t to nearest even 1/256 and takes one off.
    return bits_of(t + broadcast(32768.0f - 1.0f / 256.0f, relative));
}

// For blocks that hold NaN or Inf: those saturate their codes, NaN as if it were positive.
template <class F>
PYEFF_LANE F clamped(F relative, float bound) {
    return max_of(min_of(relative, broadcast(bound, relative)), broadcast(-bound, relative));
}

template <class F>
struct AdamWLane {
    F p, m, root;
};

// From the decoded beta1 M and sqrt(beta2) R to the new M and R.
template <class F>
PYEFF_LANE AdamWLane<F> adamw_update(F p, F g, F m, F root, const AdamWScalars& s) {
    const F new_m = m + g;
    const F new_root = sqrt_of(root * root + g * g);
    const F step = divide(new_m * broadcast(s.step_size, p), new_root + broadcast(s.eps, p));
    return {p * broadcast(s.decay, p) - step, new_m, new_root};
}

}  // namespace pyeff
