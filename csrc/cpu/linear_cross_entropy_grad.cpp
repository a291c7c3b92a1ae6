// One pass over a panel of logits that the cache may still hold; no entry depends on another.
#include "cpu/linear_cross_entropy_grad.h"

#include "common/exp.h"
#include "cpu/simd.h"

namespace pyeff {
namespace PYEFF_LEVEL {
namespace {

// scale p dz/dx of the logit x, and scale dz/dx for the target. F is one lane or sixteen.
template <bool BIASED, bool CAPPED, class F>
PYEFF_LANE F pushed(F x, F b, float lse, float scale, float softcap, F* slope) {
    const auto k = [x](float c) { return broadcast(c, x); };
    if (BIASED) x = x + b;
    *slope = k(scale);
    if (CAPPED) {
        const TanhOf<F> t = tanh_of(divide(x, k(softcap)));
        x = k(softcap) * t.value;
        *slope = k(scale) * t.slope;
    }
    // Rounding may leave x a unit or two above lse.
    return *slope * exp_of_nonpositive(x - k(lse));
}

template <bool BIASED, bool CAPPED>
void grads_of_row(float* z, const float* bias, int64_t n, int64_t target, float lse, float missing, float scale,
                  float softcap) {
    const bool has_target = target >= 0 && target < n;
    const float target_logit = has_target ? z[target] : 0.0f;
    F16 slopes;
    float slope;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(z + i,
              pushed<BIASED, CAPPED>(load(z + i), BIASED ? load(bias + i) : splat(0.0f), lse, scale, softcap, &slopes));
    for (; i < n; ++i) z[i] = pushed<BIASED, CAPPED>(z[i], BIASED ? bias[i] : 0.0f, lse, scale, softcap, &slope);
    if (has_target) {
        pushed<BIASED, CAPPED>(target_logit, BIASED ? bias[target] : 0.0f, lse, scale, softcap, &slope);
        z[target] = -(slope * missing);
    }
}

}  // namespace

void logit_grads(float* logits, int64_t rows, int64_t columns, int64_t first_class, const LossRows& of_rows,
                 const float* bias, float softcap, int threads) {
    const auto of_row = bias != nullptr ? (softcap > 0 ? grads_of_row<true, true> : grads_of_row<true, false>)
                                        : (softcap > 0 ? grads_of_row<false, true> : grads_of_row<false, false>);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row)
        of_row(logits + row * columns, bias, columns, of_rows.targets[row] - first_class, of_rows.lse[row],
               of_rows.missing[row], of_rows.scale[row], softcap);
}

}  // namespace PYEFF_LEVEL
}  // namespace pyeff
