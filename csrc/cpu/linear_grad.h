// What is taken from every sample's gradient while the cache still holds it.
#pragma once
#include <cstdint>

#include "level.h"

namespace pyeff {

// Elements that are reduced in float32 before the sum goes on in double: also the unit of work of a thread, so
// that results do not depend on the number of threads.
constexpr int64_t GRAD_CHUNK = 4096;

// For s < samples, with row s at panel + s * elements and its reference at reference + s * reference_stride
// (0: one for all):
//
//     norms_sq[s] += sum_i panel[s][i]^2,   dots[s] += sum_i panel[s][i] reference[s][i],
//     total[i] = (start_total ? 0 : total[i]) + sum_s panel[s][i]
//
// Any of norms_sq, dots (with reference) and total may be null and is then left out.
struct SamplePanel {
    const float* panel;
    int64_t samples, elements;
    const float* reference;
    int64_t reference_stride;
    float* total;
    bool start_total;
    double *norms_sq, *dots;
};

}  // namespace pyeff

PYEFF_DECLARE(void reduce_panel(const SamplePanel& panel, int threads))
