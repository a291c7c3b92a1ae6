#pragma once
#include <cstdint>

#include "common/adamw8bit.h"
#include "level.h"

// One AdamW step for `count` tensors. Threads share the blocks of all tensors evenly; the result does not depend
// on how many there are.
PYEFF_DECLARE(void adamw8bit_step(const AdamWTensor* tensors, int64_t count, int64_t block_size,
                                  const AdamWScalars& scalars, int threads))
