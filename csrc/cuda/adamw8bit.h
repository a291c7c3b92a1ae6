// The launch of AdamW with 8-bit moments, without CUDA's headers.
#pragma once
#include <cstdint>
#include <string>

#include "common/adamw8bit.h"

namespace pyeff {

// What one thread block works on: elements [index * CHUNK, (index + 1) * CHUNK) of tensors[tensor].
struct AdamWChunk {
    int32_t tensor, index;
};
constexpr int64_t ADAMW_CHUNK = 4096;  // a multiple of every block size

// Queues one launch for all chunks; `tensors` and `chunks` are on the device, and all tensors have these dtypes.
// Empty, or what went wrong.
std::string adamw8bit_step_cuda(const AdamWTensor* tensors, const AdamWChunk* chunks, int64_t chunk_count,
                                int64_t p_dtype, int64_t g_dtype, int64_t block_size, const AdamWScalars& scalars,
                                void* stream);

}  // namespace pyeff
