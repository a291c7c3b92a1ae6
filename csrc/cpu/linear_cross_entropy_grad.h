// The gradient of a token's loss by its logits, in place of the logits.
#pragma once
#include <cstdint>

#include "level.h"

namespace pyeff {

// Of every row: the target, log sum exp of its (capped) logits, 1 - p(target), and the gradient of the loss by the
// row's nll. The target's own entry is -missing, not p - 1, which would cancel where p is near 1.
struct LossRows {
    const int64_t* targets;
    const float *lse, *missing, *scale;
};

}  // namespace pyeff

// logits [rows, columns], those of the classes from first_class on, become scale (p - onehot(y)) dz/dx.
// bias [columns] may be null; softcap 0 means none.
PYEFF_DECLARE(void logit_grads(float* logits, int64_t rows, int64_t columns, int64_t first_class,
                               const LossRows& of_rows, const float* bias, float softcap, int threads))
