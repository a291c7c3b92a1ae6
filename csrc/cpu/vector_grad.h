// Gradients of vectors that act on every token (gains, offsets, norm layers), sample by sample.
#pragma once
#include <cstdint>

#include "level.h"

namespace pyeff {

// Rows of one sample are summed in chunks of so many (of rows of one number, of so many numbers): the unit of work of a
// thread, so that results do not depend on the number of threads.
constexpr int64_t VECTOR_CHUNK_ROWS = 64, SCALAR_CHUNK = 8192;

// What is written of a vector [d]; each may be null. With D_s the sum over the tokens of sample s:
//     total [d] = sum_s D_s,   norms_sq [samples] = |D_s|^2,   sums [samples, d] = D_s
struct VectorResult {
    float *total, *norms_sq, *sums;
    bool wanted() const { return total != nullptr || norms_sq != nullptr || sums != nullptr; }
};

// Rows [N, d] of float or, if `half`, of bfloat16, `stride` elements from one to the next.
struct VectorRows {
    const void* rows;
    int64_t stride;
};

struct VectorSamples {
    const int64_t* borders;  // [samples + 1]
    int64_t samples, d;
    bool half;
};

// D_s = sum_t g_t, or sum_t g_t x_t where x is given.
struct VectorProblem {
    VectorSamples s;
    VectorRows g, x;
    VectorResult result;
};

// With r_t the inverse deviation (about the mean m_t if `center`, else about zero) and n_t = (x_t - m_t) r_t:
//     grad_x [N, d] = r (g w - n mean(g w n) - [center] mean(g w)),
// D_s = sum_t g_t n_t of the gain `weight`, sum_t g_t of the offset `bias`. `w` [d] may be null (ones), so may mean and
// rstd [N] (computed), and grad_x.
struct NormLayerProblem {
    VectorSamples s;
    VectorRows g, x;
    const float *w, *mean, *rstd;
    float eps;
    bool center;
    void* grad_x;
    VectorResult weight, bias;
};

}  // namespace pyeff

PYEFF_DECLARE(void vector_grad(const VectorProblem& problem, int threads);
              void norm_layer_grad(const NormLayerProblem& problem, int threads))
