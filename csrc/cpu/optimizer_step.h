#pragma once
#include <cstdint>

#include "common/optimizer_step.h"
#include "level.h"

// One step for `count` tensors. Threads share the blocks of all tensors evenly; the result does not depend on how many
// there are. `norm` is that of all gradients, or anything finite. Whether the step was taken: it is not when `norm` is
// not finite, and then nothing is written.
PYEFF_DECLARE(bool optimizer_step(const OptimizerTensor* tensors, int64_t count, const OptimizerRule& rule, double norm,
                                  int threads))

// The 2-norm of all gradients together; only g, g_dtype and size of a tensor are read.
PYEFF_DECLARE(double global_norm(const OptimizerTensor* tensors, int64_t count, int threads))
