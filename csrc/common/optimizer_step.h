// Adam, AdamW, Lion and SGD with momentum: one step for one lane or sixteen, states in 8 bits or fp32, weights in
// fp32 or bf16.
//
// The mathematics and the codes are in pyeff/reference/optimizer_step.py, which gives the same bits. B(x), the bits of
// a positive float read as an integer, is a piecewise linear 2^23 (log2 x + 127): multiplying it takes a power,
// shifting it right takes a root, and one undoes the other.
#pragma once
#include <cstdint>

#include "common/lane.h"

namespace pyeff {

constexpr int32_t RULE_ADAM = 0, RULE_LION = 1, RULE_SGD = 2;
// How a weight is kept: in fp32, or in bf16 with nothing, random bits, an error byte or an fp32 twin beside it.
constexpr int64_t WEIGHT_FLOAT32 = 0, WEIGHT_NEAREST = 1, WEIGHT_STOCHASTIC = 2, WEIGHT_ECC8 = 3, WEIGHT_MASTER = 4;
constexpr int64_t DTYPE_FLOAT32 = 0, DTYPE_BFLOAT16 = 1;

// One parameter: addresses, so that a list of them is an array of integers. Without codes the scales are 0, and so is
// what a rule or a weight does not need.
struct OptimizerTensor {
    int64_t p, g, first, first_scale, second, second_scale, master, step, beta_powers;
    int64_t size, weight, g_dtype;
    int64_t key;          // of the parameter's random bits
    int64_t first_block;  // where this piece starts in the whole parameter
    int64_t first_chunk;  // where it starts in the launch; CUDA only
    int64_t row;  // blocks are cut from rows of so many elements, the last of each ragged; `size` if that is one
};

// What all parameters of a group share. A clip_norm of infinity does not clip.
struct OptimizerRule {
    double lr, beta1, beta2, eps, weight_decay, dampening, clip_norm;
    int64_t seed, block_size;
    int32_t rule, coded, coupled, nesterov;
};

// What a step shares among all elements of a parameter; rounded from double once.
//
// With codes, Adam works on M = m / (1 - beta1) and R = sqrt(v / (1 - beta2)), so that a gradient is added as it is;
// what brings them back to m and sqrt(v) is applied to the scale of a block. The corrections for bias stand in
// step_size and eps.
struct StepScalars {
    float clip;           // of the gradient
    float l2;             // weight decay that is added to the gradient
    float decay;          // 1 - lr weight_decay where it is not
    float step_size;      // Adam: lr sqrt(1 - beta2^t) / (1 - beta1^t) in the units of M and R; else lr
    float eps;            // Adam: in units of R
    float first_in;       // beta1, in Adam's units
    float first_out;      // to the units in which the moment is kept
    float gradient_in;    // 1 - beta1; 1 - dampening in SGD
    float second_in;      // beta2, in Adam's units
    float second_out;     // as first_out
    float gradient_in2;   // 1 - beta2
    int32_t skip;         // the gradients are not finite
    uint32_t turn;        // how far this step's offsets of roots have gone round
    uint32_t first_turn;  // and those of first moments
    uint64_t pattern;     // of where they begin
    uint64_t stream;      // of this step's random bits
};

constexpr uint32_t BITS_OF_ONE = 0x3f800000u;
constexpr uint32_t BITS_OF_INFINITY = 0x7f800000u;
constexpr uint32_t BINADE = 1u << 23;
constexpr float LARGEST_CODED = 31.0f / 32.0f;  // what k = 127 stands for, relative to the scale
constexpr float INVERSE_LARGEST_CODED = 32.0f / 31.0f;
// Codes below 3 are not written: sqrt(v) would change by factors of 3 and 8 where one is rounded to another.
constexpr float SMALLEST_T = 1.0f / 64.0f;
constexpr double LARGEST_DOUBLE = 1.7976931348623157e308;
constexpr float LARGEST_FLOAT = 3.40282347e38f;
constexpr float SMALLEST_SCALE = 1.17549435e-38f;  // 2^-126: below it 1 / scale overflows

// ------------------------------------------------------------------------------------------------ once a parameter

constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15u;  // 2^64 and 2^32 by the golden section
constexpr uint32_t GOLDEN_SECTION = 0x9e3779b9u;
constexpr uint32_t ROOT_OF_TWO = 0x6a09e667u;  // what it is over one, in 2^32

PYEFF_LANE uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// `step` and the powers are those of the step about to be taken, counted from 1; `norm` is that of all gradients.
PYEFF_LANE StepScalars scalars_of(const OptimizerRule& r, double lr, double step, double beta1_power,
                                  double beta2_power, double norm, int64_t key) {
    StepScalars s = {};
    s.skip = !(norm <= LARGEST_DOUBLE);
    s.clip = 1.0f;
    if (r.clip_norm <= LARGEST_DOUBLE) {
        const double clip = r.clip_norm / (norm + 1e-6);
        s.clip = clip < 1.0 ? static_cast<float>(clip) : 1.0f;
    }
    s.l2 = r.coupled ? static_cast<float>(r.weight_decay) : 0.0f;
    s.decay = r.coupled ? 1.0f : static_cast<float>(1.0 - lr * r.weight_decay);
    s.first_out = s.second_out = 1.0f;
    if (r.rule == RULE_ADAM) {
        const double correction = sqrt_of(1.0 - beta2_power);
        if (r.coded) {
            const double root_out = sqrt_of(1.0 - r.beta2), unit = correction / root_out;
            s.first_in = static_cast<float>(r.beta1 / (1.0 - r.beta1));
            s.first_out = static_cast<float>(1.0 - r.beta1);
            s.second_in = static_cast<float>(sqrt_of(r.beta2) / root_out);
            s.second_out = static_cast<float>(root_out);
            s.gradient_in = s.gradient_in2 = 1.0f;
            s.step_size = static_cast<float>(lr * unit * (1.0 - r.beta1) / (1.0 - beta1_power));
            s.eps = static_cast<float>(r.eps * unit);
        } else {
            s.first_in = static_cast<float>(r.beta1);
            s.gradient_in = static_cast<float>(1.0 - r.beta1);
            s.second_in = static_cast<float>(r.beta2);
            s.gradient_in2 = static_cast<float>(1.0 - r.beta2);
            s.step_size = static_cast<float>(lr * correction / (1.0 - beta1_power));
            s.eps = static_cast<float>(r.eps * correction);
        }
    } else {
        s.step_size = static_cast<float>(lr);
        s.first_in = static_cast<float>(r.beta1);
        // As torch does, the first momentum is the gradient itself.
        s.gradient_in = r.rule == RULE_LION ? static_cast<float>(1.0 - r.beta1)
                        : step > 1.0        ? static_cast<float>(1.0 - r.dampening)
                                            : 1.0f;
        s.second_in = static_cast<float>(r.beta2);
        s.gradient_in2 = static_cast<float>(1.0 - r.beta2);
    }
    s.pattern = mixed(static_cast<uint64_t>(r.seed) + GOLDEN * (static_cast<uint64_t>(key) + 1));
    s.turn = static_cast<uint32_t>(static_cast<uint64_t>(step)) * GOLDEN_SECTION;
    s.first_turn = static_cast<uint32_t>(static_cast<uint64_t>(step)) * ROOT_OF_TWO;
    s.stream = mixed(s.pattern ^ static_cast<uint64_t>(step));
    return s;
}

// ------------------------------------------------------------------------------------------------ once a block
// What decoded values are multiplied by, the new scale, and what new values are multiplied by. Lion and SGD decode
// the moment itself, Adam what is left of it after a step.
template <int RULE>
PYEFF_LANE float first_factor(float scale, const StepScalars& s) {
    // An infinite factor would make NaN of the zeros of its block.
    return min_of((RULE == RULE_ADAM ? scale * s.first_in : scale) * 128.0f, LARGEST_FLOAT);
}
PYEFF_LANE float first_scale(float largest, const StepScalars& s) {
    return max_of(largest * s.first_out * INVERSE_LARGEST_CODED, SMALLEST_SCALE);
}
PYEFF_LANE float first_divisor(float scale, const StepScalars& s) { return divide(s.first_out, scale); }
PYEFF_LANE float root_factor(float scale, const StepScalars& s) {
    return scale * s.second_in * (-1.0f / 4194304.0f);  // decode_root's cubes are 2^22 times too large, and below zero
}
PYEFF_LANE float root_scale(float largest, const StepScalars& s) { return largest * s.second_out; }
PYEFF_LANE float root_divisor(float scale, const StepScalars& s) {
    return divide(s.second_out, max_of(scale, SMALLEST_SCALE));
}

// The two words that tell the random bits of a block from those of all others.
PYEFF_LANE uint64_t random_key(const StepScalars& s, int64_t block) {
    return mixed(s.stream + GOLDEN * static_cast<uint64_t>(block));
}
// What is added to a block's t, of which a moment and a root are made, before they are rounded to 1/128 and 1/256: half
// of that to either side, so that they are rounded up or down at random. Both must be: a moment that stays where it is
// beside a root that falls makes steps without bound. Steps go round the circle by the golden section, which fills it
// most evenly and adds less noise than independent draws; the moment's by the square root of two, which is as even and
// knows nothing of the other. The last 2^-12 of either side is kept free, so that what a scale is made of stays.
PYEFF_LANE float offset_of(uint32_t place) {
    return static_cast<float>(2 * static_cast<int32_t>(place >> 20) - 4095) * (1.0f / 2097152.0f);
}
PYEFF_LANE uint64_t start_of_offsets(const StepScalars& s, int64_t block) {
    return mixed(s.pattern + GOLDEN * static_cast<uint64_t>(block));
}
PYEFF_LANE float first_offset(const StepScalars& s, int64_t block) {
    return 2.0f * offset_of(static_cast<uint32_t>(start_of_offsets(s, block)) + s.first_turn);
}
PYEFF_LANE float root_offset(const StepScalars& s, int64_t block) {
    return offset_of(static_cast<uint32_t>(start_of_offsets(s, block) >> 32) + s.turn);
}

// ------------------------------------------------------------------------------------------------ the codes

// `code` is k in -127..127 in the highest byte: B(|m| / scale) = 4 B(|k| / 128) - 3 B(1), and 0 for k = 0.
template <class U, class F>
PYEFF_LANE F decode_signed(U code, F factor) {
    // The exponent of 2^24 k lies between 128 + 23 and 128 + 29. The shift multiplies it by 4 and drops 4 128 beside
    // the sign: what is left is (k / 128)^4 / 128, and zero for zero.
    const F magnitude = float_of_bits(bits_of(float_of_int(code)) << 2) * factor;
    return float_of_bits(bits_of(magnitude) | (code & broadcast(0x80000000u, code)));
}

// relative = m / scale, at most 31/32 in magnitude; `offset` is the block's. Only the low eight bits of the result
// count.
template <class U, class F>
PYEFF_LANE U encode_signed(F relative, float offset, U like) {
    // A sign would carry into bit 29 of the quarter of a negative number, which is set in that of every positive one:
    // both it and the sign come back with `bits`. Where bit 29 of `bits` is not set, the code is zero anyhow.
    const U bits = bits_of(relative);
    const U quarter = (bits + broadcast(3u * BITS_OF_ONE, like)) >> 2;
    const F t = float_of_bits(quarter | (bits & broadcast(0xa0000000u, like)));
    // Adding 1.5 2^16 rounds t to nearest even 1/128 and leaves 128 t in the lowest bits, in two's complement.
    return bits_of(t + broadcast(offset, relative) + broadcast(98304.0f, relative));
}

// sqrt(v): B(sqrt(v) / scale) = 3 B((code + 1) / 256) - 2 B(1); never zero.
template <class U, class F>
PYEFF_LANE F decode_root(U code, F factor) {
    // The exponent of code + 1 lies between 127 and 135. Three times that sets the sign and leaves 125 to 149, which is
    // -2^22 times the cube of (code + 1) / 256: a constant for `factor` to undo. Additions have more units of a
    // processor than shifts and products.
    const U t = bits_of(float_of_uint(code + broadcast(1u, code)));
    return float_of_bits(t + t + t) * factor;
}

// relative = sqrt(v) / scale, in [0, 1]; `offset` is the block's. Only the low eight bits of the result count.
template <class U, class F>
PYEFF_LANE U encode_root(F relative, float offset, U /*like*/) {
    // A third of the bits, taken in floats. Adding 2^31 leaves it in the lowest bits, in units of 2^8, two thirds of
    // B(1) with it; a code is 2^16 wide.
    const F third = float_of_uint(bits_of(relative)) * broadcast(1.0f / 3.0f, relative);
    const U bits = bits_of(third + broadcast(2147483648.0f + 0x2a555500, relative)) << 8;
    const F moved = float_of_bits(bits) + broadcast(offset, relative);
    // Rounds t to nearest even 1/256 and takes one off.
    return bits_of(max_of(moved, broadcast(SMALLEST_T, relative)) + broadcast(32768.0f - 1.0f / 256.0f, relative));
}

// For blocks that hold NaN or Inf: those saturate their codes, NaN as if it were positive. Adam's moment is zero beside
// a root that is not finite, as g^2 is for g beyond 1.8e19: the root will be coded as the block's largest, and without
// its moment a step by it is small.
template <class F>
PYEFF_LANE F beside_root(F moment, F root) {
    return select(root < broadcast(float_of_bits(BITS_OF_INFINITY), root), moment, broadcast(0.0f, moment));
}
template <class F>
PYEFF_LANE F clamped(F relative, float bound) {
    return max_of(min_of(relative, broadcast(bound, relative)), broadcast(-bound, relative));
}

// ------------------------------------------------------------------------------------------------ the weights
// A bf16 weight is sixteen bits in the low half of a lane.

template <class U>
PYEFF_LANE auto widened(U half) {
    return float_of_bits(half << 16);
}

// NaN of every kind becomes this one.
constexpr uint32_t BF16_NAN = 0x7fc0u;

// In the high half of a lane; the low one is to be dropped.
template <class F>
PYEFF_LANE auto rounded_to_nearest(F x) {
    const auto u = bits_of(x);
    const auto rounded = u + broadcast(0x7fffu, u) + ((u >> 16) & broadcast(1u, u));
    return select(x == x, rounded, broadcast(BF16_NAN << 16, u));
}

// Likewise. `random` in 0..65535: up with the probability of the part that is cut off.
template <class F, class U>
PYEFF_LANE U rounded_at_random(F x, U random) {
    return select(x == x, bits_of(x) + random, broadcast(BF16_NAN << 16, random));
}

// The weight to 24 bits: the nearest bf16, and the rest in units of 2^-8 of its last place, in two's complement.
// `random` in 0..65535; its upper half decides, as above.
template <class F, class U>
PYEFF_LANE void split_in_24_bits(F x, U random, U& half, U& error) {
    const U u = bits_of(x);
    const U kept = select(x == x, (u + (random >> 8)) >> 8, broadcast(BF16_NAN << 8, u));
    half = (kept + broadcast(0x80u, u)) >> 8;
    error = kept & broadcast(0xffu, u);
}

// `error` in the highest byte.
template <class U>
PYEFF_LANE auto joined_from_24_bits(U half, U error) {
    // 2^16 half + 2^8 error, error between -128 and 127: its sign takes one off the half.
    return float_of_bits((half << 16) + (error >> 16) - ((error >> 31) << 16));
}

// Sixteen random bits of element `index` of the block with this key, from the count of its element.
constexpr uint32_t RANDOM_STRIDE = GOLDEN_SECTION;

template <class U>
PYEFF_LANE U random_count(U index, uint64_t key) {
    return index * broadcast(RANDOM_STRIDE, index) + broadcast(static_cast<uint32_t>(key), index);
}
// The count of an element so many places on.
template <class U>
PYEFF_LANE U random_count_after(U count, uint32_t places) {
    return count + broadcast(places * RANDOM_STRIDE, count);
}
template <class U>
PYEFF_LANE U random_bits(U count, uint64_t key) {
    U x = (count ^ (count >> 16)) * broadcast(0x21f0aaadu, count);
    x = x ^ broadcast(static_cast<uint32_t>(key >> 32), count);
    return ((x ^ (x >> 15)) * broadcast(0x735a2d97u, count)) >> 16;
}

// ------------------------------------------------------------------------------------------------ the rules

template <class F>
struct Updated {
    F p, first, second;
};

// What follows takes this gradient: clipped, and with coupled weight decay. Neither is applied where it would only
// cost time, on any device: zero times an infinite weight is not zero.
template <class F>
PYEFF_LANE F clipped(F g, const StepScalars& s) {
    return g * broadcast(s.clip, g);
}
template <class F>
PYEFF_LANE F decayed(F g, F p, const StepScalars& s) {
    return g + p * broadcast(s.l2, p);
}

// Adam's step in two parts, between which stands `root_and_inverse` of the square.
template <class F>
struct Moments {
    F mean, square;
};
template <bool CODED, class F>
PYEFF_LANE Moments<F> adam_moments(F g, F first, F second, const StepScalars& s) {
    if (CODED) return {first + g, second * second + g * g};
    return {first + (g - first) * broadcast(s.gradient_in, g),
            second * broadcast(s.second_in, g) + (g * broadcast(s.gradient_in2, g)) * g};
}
template <class F>
PYEFF_LANE F adam_stepped(F p, F mean, F inverse, const StepScalars& s) {
    return p * broadcast(s.decay, p) - mean * broadcast(s.step_size, p) * inverse;
}

// `first` and `second` are decoded (beta1 M, sqrt(beta2) R) to (M, R) where CODED, else m and v as they are kept.
template <int RULE, bool CODED, class F>
PYEFF_LANE Updated<F> updated(F p, F g, F first, F second, bool nesterov, const StepScalars& s) {
    if (RULE == RULE_ADAM) {
        const Moments<F> moments = adam_moments<CODED>(g, first, second, s);
        F root, inverse;
        root_and_inverse(moments.square, broadcast(s.eps, g), root, inverse);
        return {adam_stepped(p, moments.mean, inverse, s), moments.mean, CODED ? root : moments.square};
    }
    const F beta1 = broadcast(s.first_in, g), gradient_in = broadcast(s.gradient_in, g);
    const F step_size = broadcast(s.step_size, g);
    const F mean = first * beta1 + g * gradient_in;
    if (RULE == RULE_LION) {
        const F zero = broadcast(0.0f, g);
        // The sign of zero is zero and of NaN is NaN.
        const F sign = select(mean > zero, broadcast(1.0f, g), select(zero > mean, broadcast(-1.0f, g), mean));
        const F moment = first * broadcast(s.second_in, g) + g * broadcast(s.gradient_in2, g);
        return {p * broadcast(s.decay, p) - sign * step_size, moment, moment};
    }
    return {p - (nesterov ? g + mean * beta1 : mean) * step_size, mean, mean};
}

}  // namespace pyeff
