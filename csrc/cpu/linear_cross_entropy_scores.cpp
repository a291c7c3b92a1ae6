// A tile of logits is read from the cache it was just written to: once for its maximum, once for the sums.
#include "cpu/linear_cross_entropy_scores.h"

#include <cfloat>
#include <cmath>
#include <limits>

#include "common/exp.h"
#include "cpu/simd.h"

namespace pyeff {
namespace PYEFF_LEVEL {
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float UNDEFINED = std::numeric_limits<float>::quiet_NaN();
// A row of a piece, and its slopes under a softcap, stay in the first two levels of cache.
constexpr int64_t PIECE = 8192;

// logits = softcap tanh((logits + bias) / softcap), slopes = its derivative. F is one lane or sixteen.
template <class F>
PYEFF_LANE F capped(F x, float softcap, F* slope) {
    const F c = broadcast(softcap, x);
    const TanhOf<F> t = tanh_of(divide(x, c));
    *slope = t.slope;
    return c * t.value;
}

void add_bias(float* z, const float* bias, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(z + i, load(z + i) + load(bias + i));
    for (; i < n; ++i) z[i] = z[i] + bias[i];
}

void cap(float* z, float* slopes, float softcap, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        F16 slope;
        store(z + i, capped(load(z + i), softcap, &slope));
        store(slopes + i, slope);
    }
    for (; i < n; ++i) z[i] = capped(z[i], softcap, slopes + i);
}

// NaN is passed over here; the sums meet it again and keep it.
float max_of_row(const float* z, int64_t n) {
    F16 a = splat(-INFINITE), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        a = max_of(load(z + i), a);
        b = max_of(load(z + i + LANES), b);
        c = max_of(load(z + i + 2 * LANES), c);
        d = max_of(load(z + i + 3 * LANES), d);
    }
    for (; i + LANES <= n; i += LANES) a = max_of(load(z + i), a);
    if (i < n) b = max_of(load_first(z + i, static_cast<int>(n - i), -INFINITE), b);
    return max_of_lanes(max_of(max_of(a, b), max_of(c, d)));
}

struct Sums {
    F16 s1, s2, zs1, sd2;
};

template <bool CAPPED>
PYEFF_LANE void add_to(Sums& sums, F16 z, F16 slope, F16 peak) {
    const F16 t = z - peak;
    const F16 e = exp_of_nonpositive(t);
    sums.s1 = sums.s1 + e;
    sums.s2 = sums.s2 + e * e;
    // A logit of -inf adds 0, not the NaN of -inf * 0.
    sums.zs1 = sums.zs1 + max_of(splat(EXP_LOWEST), t) * e;
    if (CAPPED) {
        const F16 de = slope * e;
        sums.sd2 = sums.sd2 + de * de;
    }
}

template <bool CAPPED>
Sums sums_of_row(const float* z, const float* slopes, float peak, int64_t n) {
    const F16 zero = splat(0.0f), p = splat(peak);
    Sums sums{zero, zero, zero, zero};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) add_to<CAPPED>(sums, load(z + i), CAPPED ? load(slopes + i) : zero, p);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        add_to<CAPPED>(sums, load_first(z + i, rest, -INFINITE), CAPPED ? load_first(slopes + i, rest, 0.0f) : zero, p);
    }
    if (!CAPPED) sums.sd2 = sums.s2;
    return sums;
}

// The sums of two sets of logits relative to the larger of their peaks.
void join(ScoreState& state, float peak, const Sums& sums) {
    const float top = max_of(peak, state.peak);
    const float old_scale = exp_of_nonpositive(state.peak - top), new_scale = exp_of_nonpositive(peak - top);
    // Where the scale is 0 the shift may be infinite; it must only stay finite.
    const float old_shift = max_of(EXP_LOWEST, state.peak - top), new_shift = max_of(EXP_LOWEST, peak - top);
    const float s1 = sum_of(sums.s1);
    state.zs1 = old_scale * (state.zs1 + old_shift * state.s1) + new_scale * (sum_of(sums.zs1) + new_shift * s1);
    state.s1 = old_scale * state.s1 + new_scale * s1;
    state.s2 = (old_scale * old_scale) * state.s2 + (new_scale * new_scale) * sum_of(sums.s2);
    state.sd2 = (old_scale * old_scale) * state.sd2 + (new_scale * new_scale) * sum_of(sums.sd2);
    state.peak = top;
}

void meet_row(float* z, int64_t n, int64_t target, const float* bias, float softcap, float* slopes, ScoreState& state) {
    if (bias != nullptr) add_bias(z, bias, n);
    if (softcap > 0) cap(z, slopes, softcap, n);
    if (target >= 0 && target < n) {
        state.target_logit = z[target];
        state.target_slope = softcap > 0 ? slopes[target] : 1.0f;
        z[target] = -INFINITE;
    }
    // A peak of -inf would make NaN of -inf - (-inf); against the lowest finite number the sums vanish instead.
    const float peak = max_of(max_of_row(z, n), -FLT_MAX);
    join(state, peak, softcap > 0 ? sums_of_row<true>(z, slopes, peak, n) : sums_of_row<false>(z, slopes, peak, n));
}

}  // namespace

void meet_logits(float* logits, int64_t rows, int64_t columns, int64_t first_class, const int64_t* targets,
                 const float* bias, float softcap, ScoreState* states, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        alignas(64) float slopes[PIECE];
        if (first_class == 0) states[row] = {-FLT_MAX, 0.0f, 0.0f, 0.0f, 0.0f, UNDEFINED, 1.0f};
        for (int64_t from = 0; from < columns; from += PIECE)
            meet_row(logits + row * columns + from, columns - from < PIECE ? columns - from : PIECE,
                     targets[row] - first_class - from, bias == nullptr ? nullptr : bias + from, softcap, slopes,
                     states[row]);
    }
}

void finish_scores(const ScoreState* states, const float* hidden_norms, int64_t rows, bool one_class, float* scores,
                   int64_t score_stride) {
    for (int64_t row = 0; row < rows; ++row) {
        const ScoreState& s = states[row];
        // In double, which costs nothing for a few numbers a row. Below, weights and sums are relative to e^top.
        const double z_y = s.target_logit, top = std::fmax(z_y, s.peak);
        const double target = std::exp(z_y - top), scale = std::exp(s.peak - top);
        const double rest = scale * s.s1, total = target + rest;
        const double p_rest = rest / total, scale_over_total = scale / total;
        const double log_total = z_y >= s.peak ? std::log1p(rest) : std::log(total);
        const double surprise = (target > 0 ? target * (top - z_y) : 0.0) + scale * ((top - s.peak) * s.s1 - s.zs1);
        const double pulled_target = p_rest * s.target_slope;
        const double pulled_rest = scale_over_total * scale_over_total * s.sd2;
        // An untouched peak means that every other logit is -inf, or that there is none.
        const bool alone = s.peak <= -FLT_MAX;

        double row_scores[SCORES];
        row_scores[NLL] = log_total + (top - z_y);
        row_scores[LSE] = top + log_total;
        row_scores[ENTROPY] = log_total + surprise / total;
        row_scores[EL2N] = std::sqrt(p_rest * p_rest + scale_over_total * scale_over_total * s.s2);
        row_scores[MARGIN] = one_class ? UNDEFINED : alone ? INFINITE : z_y - s.peak;
        row_scores[P_TARGET] = target / total;
        row_scores[HEAD_GRAD_NORM] = hidden_norms[row] * std::sqrt(pulled_target * pulled_target + pulled_rest);

        const bool defined = total < INFINITE && !(alone && z_y == -INFINITE);
        for (int score = 0; score < SCORES; ++score)
            scores[score * score_stride + row] = defined ? static_cast<float>(row_scores[score]) : UNDEFINED;
    }
}

}  // namespace PYEFF_LEVEL
}  // namespace pyeff
