// The exponential and what is built on it: polynomials in single rounded steps, the same bits everywhere.
#pragma once
#include "common/lane.h"

namespace pyeff {

// exp_of clamps its argument to this range, within which e^x is a normal number.
constexpr float EXP_LOWEST = -87.3f;
constexpr float EXP_HIGHEST = 88.37f;

// e^x for x in [EXP_LOWEST, EXP_HIGHEST] to 1.5 units in the last place; NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln(2) / 2, and e^x = 2^n e^r. n ln 2 is subtracted in two parts, the first short
// enough to be exact; the polynomial is the minimax one of Cephes' expf (Moshier 1989).
template <class F>
PYEFF_LANE F exp_in_range(F x) {
    const auto k = [x](float c) { return broadcast(c, x); };
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const F shifted = x * k(1.44269504088896341f) + k(12582912.0f);
    const F n = shifted - k(12582912.0f);
    const F r = (x - n * k(0.693359375f)) - n * k(-2.12194440e-4f);
    F p = k(1.9875691500e-4f);
    p = p * r + k(1.3981999507e-3f);
    p = p * r + k(8.3334519073e-3f);
    p = p * r + k(4.1665795894e-2f);
    p = p * r + k(1.6666665459e-1f);
    p = p * r + k(5.0000001201e-1f);
    p = (p * (r * r) + r) + k(1.0f);
    // A product, not an integer addition to the exponent, so that NaN stays NaN.
    const auto bits = bits_of(shifted);
    return p * float_of_bits((bits << 23) + broadcast(0x3f800000u, bits));
}

// The operand that may be NaN comes second: max_of and min_of return it.
template <class F>
PYEFF_LANE F exp_of(F x) {
    return exp_in_range(min_of(broadcast(EXP_HIGHEST, x), max_of(broadcast(EXP_LOWEST, x), x)));
}

// e^x for x <= 0, and 0 below EXP_LOWEST: the weight of a logit beside that of the largest. NaN stays NaN.
template <class F>
PYEFF_LANE F exp_of_nonpositive(F x) {
    const F lowest = broadcast(EXP_LOWEST, x);
    return select(x < lowest, broadcast(0.0f, x), exp_in_range(max_of(lowest, x)));
}

// tanh u and its derivative.
template <class F>
struct TanhOf {
    F value;
    F slope;
};

// With q = e^(-2|u|): tanh|u| = (1 - q) / (1 + q) and the slope is 4 q / (1 + q)^2, which keeps its digits where
// tanh rounds to 1. Near 0, where 1 - q cancels, tanh u is u + u^3 P(u^2) (Cephes' tanhf).
template <class F>
PYEFF_LANE TanhOf<F> tanh_of(F u) {
    const auto k = [u](float c) { return broadcast(c, u); };
    const F a = abs_of(u);
    const F q = exp_of(a * k(-2.0f));
    const F inverse = divide(k(1.0f), k(1.0f) + q);
    const F slope = ((k(4.0f) * q) * inverse) * inverse;
    const F far = (k(1.0f) - q) * inverse;
    const F s = u * u;
    F p = k(-5.70498872745e-3f);
    p = p * s + k(2.06390887954e-2f);
    p = p * s + k(-5.37397155531e-2f);
    p = p * s + k(1.33314422036e-1f);
    p = p * s + k(-3.33332819422e-1f);
    const F near = u + u * (s * p);
    const auto sign = bits_of(u) & broadcast(0x80000000u, bits_of(u));
    return {select(a < k(0.625f), near, float_of_bits(bits_of(far) | sign)), slope};
}

}  // namespace pyeff
