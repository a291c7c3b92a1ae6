#include <cuda_runtime.h>

#include "cuda/device.h"

namespace pyeff {

namespace {
__global__ void probe() {}
}  // namespace

std::string cuda_problem() {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        cudaGetLastError();  // clears it: a later launch must not report this one
        return std::string("no usable CUDA device (") + cudaGetErrorString(error) + ")";
    }
    if (count == 0) return "no CUDA device";
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return std::string("this build has no code for the current device (") + cudaGetErrorString(error) + ")";
    }
    return "";
}

}  // namespace pyeff
