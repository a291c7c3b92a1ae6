// The gradient of a table whose rows are looked up by index, and every sample's squared norm of it.
#pragma once
#include <cstdint>

#include "level.h"

namespace pyeff {

// Columns that a thread sums at a time; norms are sums over these blocks in their order.
constexpr int64_t EMBEDDING_COLUMNS = 512;

// `index` [tokens] rises; `order` [tokens] says which row of the gradient each stands for, falling nowhere among equal
// indices. Rows are of float, or of bfloat16 if `half`, and so is the table.
struct EmbeddingProblem {
    const int64_t *index, *order;
    int64_t tokens;
    const void* g;
    int64_t stride, d;
    bool half;
    const int64_t* borders;
    int64_t samples;
    int64_t padding;  // the row of the table without a gradient; -1 for none
    void* table;      // [rows, d], zeros before; may be null
    float* norms_sq;  // [samples], may be null
};

}  // namespace pyeff

PYEFF_DECLARE(void embedding_grad(const EmbeddingProblem& problem, int threads))
