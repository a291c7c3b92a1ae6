// Sketches of many samples' matrices in one read of them.
#pragma once
#include <cstdint>

#include "level.h"

namespace pyeff {

// AdamW's step direction as a function of a gradient g: numerator / (sqrt(second) + eps) with
// numerator = keep_first m + take_first g and second = keep_second v + take_second g^2.
struct SketchMap {
    const float *exp_avg,
        *exp_avg_sq;  // [rows, columns] each; exp_avg_sq null: the identity; exp_avg null: no momentum
    float keep_first, take_first, keep_second, take_second, eps;
};

// out[s][j] += scale * sum over the elements (r, c) of matrix s that go to j of sign(r, c) x_s[r][c],
// where row r of memory is row first_row + r of the parameter, and its columns are complete.
struct SketchTask {
    const void* x;  // element (s, r, c) at s * sample_stride + r * row_stride + c
    bool bf16;      // else float32
    int64_t samples, rows, columns, sample_stride, row_stride, first_row;
    uint64_t key;
    int64_t dim;
    float scale;
    SketchMap map;
    float* out;  // [samples, dim]
};

}  // namespace pyeff

PYEFF_DECLARE(void sketch_grads(const SketchTask& task, int threads))
