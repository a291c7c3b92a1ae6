// The launches of the optimizer step, without CUDA's headers.
//
// Each function queues its work on `stream` and returns; nothing waits, nothing is copied from the host but kernel
// arguments, so that all of it can be captured in a graph. Every address but `rows` is the device's. The answer is
// empty, or what went wrong.
#pragma once
#include <cstdint>
#include <string>

#include "common/optimizer_step.h"

namespace pyeff {

// What one thread block works on: elements [index * CHUNK, (index + 1) * CHUNK) of tensors[tensor].
struct OptimizerChunk {
    int32_t tensor, index;
};
constexpr int64_t OPTIMIZER_CHUNK = 4096;  // a multiple of every block size

// Writes `count` rows of the host into `tensors`, and which chunk belongs to which row into `chunks`.
std::string optimizer_table_cuda(const OptimizerTensor* rows, int64_t count, OptimizerTensor* tensors,
                                 OptimizerChunk* chunks, int64_t chunk_count, void* stream);

// One step: a launch of one thread for each tensor that turns counts of steps into scalars, and one for all chunks.
// `lr` (float, or null: the rule's), `norm` and `skipped` (or null) are read and counted on the device.
std::string optimizer_step_cuda(const OptimizerTensor* tensors, int64_t count, const OptimizerChunk* chunks,
                                int64_t chunk_count, const OptimizerRule& rule, const float* lr, const double* norm,
                                int64_t* skipped, StepScalars* scalars, void* stream);

// The 2-norm of all gradients together; `squares` has room for a double each chunk.
std::string global_norm_cuda(const OptimizerTensor* tensors, const OptimizerChunk* chunks, int64_t chunk_count,
                             double* squares, double* norm, void* stream);

}  // namespace pyeff
