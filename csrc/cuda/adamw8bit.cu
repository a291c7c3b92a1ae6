// One thread owns 16 consecutive elements, so that its codes are one 16-byte vector and its bf16 values one
// 32-byte sector; block_size / 16 threads share a block and find its largest moments together. Everything stays
// in registers between the read and the write.
#include <cuda_runtime.h>

#include "cuda/adamw8bit.h"

namespace pyeff {
namespace {

constexpr int OWN = 16, THREADS = static_cast<int>(ADAMW_CHUNK) / OWN, WARP = 32, WARPS = THREADS / WARP;
constexpr unsigned EVERYONE = 0xffffffffu;

// An address from a table could be of any memory. __ldca and __stwb say that it is global and else do what a
// plain access does, so they become LDG and STG.
template <class T>
__device__ __forceinline__ T* at_index(int64_t address, int64_t index) {
    return reinterpret_cast<T*>(address) + index;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(uint16_t x) { return float_of_bf16(x); }
__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, uint16_t& to) { to = bf16_of_float(x); }

// Sixteen elements as 16-byte vectors where that is allowed, else one by one and zeros beyond `count`.
template <class T>
union Own {
    uint4 vectors[OWN * sizeof(T) / sizeof(uint4)];
    T elements[OWN];
};

template <class T>
__device__ __forceinline__ void read(Own<T>& own, const T* from, bool whole, int count) {
    if (whole) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof own / sizeof(uint4)); ++i)
            own.vectors[i] = __ldca(reinterpret_cast<const uint4*>(from) + i);
    } else {
#pragma unroll
        for (int i = 0; i < OWN; ++i) own.elements[i] = i < count ? __ldca(from + i) : T(0);
    }
}

template <class T>
__device__ __forceinline__ void write(T* to, const Own<T>& own, bool whole, int count) {
    if (whole) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof own / sizeof(uint4)); ++i)
            __stwb(reinterpret_cast<uint4*>(to) + i, own.vectors[i]);
    } else {
#pragma unroll
        for (int i = 0; i < OWN; ++i)
            if (i < count) __stwb(to + i, own.elements[i]);
    }
}

// The largest over the threads of a block of the quantisation; `threads` is a power of two. Values are not NaN.
__device__ __forceinline__ float largest_of(float x, int threads, float (&shared)[WARPS]) {
    for (int distance = min(threads, WARP) / 2; distance > 0; distance /= 2)
        x = max_of(x, __shfl_xor_sync(EVERYONE, x, distance));
    if (threads > WARP) {
        const int warp = threadIdx.x / WARP, warps = threads / WARP, first = warp / warps * warps;
        if (threadIdx.x % WARP == 0) shared[warp] = x;
        __syncthreads();
        for (int i = 0; i < warps; ++i) x = max_of(shared[first + i], x);
    }
    return x;
}

template <class P, class G>
__global__ void __launch_bounds__(THREADS, 3)
    step_kernel(const AdamWTensor* __restrict__ tensors, const AdamWChunk* __restrict__ chunks, int block_bits,
                AdamWScalars s) {
    const AdamWChunk chunk = chunks[blockIdx.x];
    const AdamWTensor t = tensors[chunk.tensor];
    const int64_t at = chunk.index * ADAMW_CHUNK + threadIdx.x * OWN, left = t.size - at;
    const int count = left >= OWN ? OWN : left > 0 ? static_cast<int>(left) : 0;
    const bool whole = count == OWN && ((t.p | t.g | t.exp_avg_code | t.exp_avg_sq_code) & 15) == 0;

    Own<P> p;
    Own<G> g;
    Own<uint8_t> m_code, v_code;
    read(p, at_index<const P>(t.p, at), whole, count);
    read(g, at_index<const G>(t.g, at), whole, count);
    read(m_code, at_index<const uint8_t>(t.exp_avg_code, at), whole, count);
    read(v_code, at_index<const uint8_t>(t.exp_avg_sq_code, at), whole, count);
    float* m_scale = at_index<float>(t.exp_avg_scale, at >> block_bits);
    float* v_scale = at_index<float>(t.exp_avg_sq_scale, at >> block_bits);
    const float by_m = count ? exp_avg_factor(__ldca(m_scale), s) : 0.0f;
    const float by_v = count ? root_factor(__ldca(v_scale), s) : 0.0f;

    float m[OWN], root[OWN], largest_m = 0.0f, largest_root = 0.0f;
    const float infinite = float_of_bits(BITS_OF_INFINITY);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        const AdamWLane<float> lane =
            adamw_update(to_float(p.elements[i]), to_float(g.elements[i]),
                         decode_exp_avg(static_cast<uint32_t>(m_code.elements[i]) << 24, by_m),
                         decode_root(static_cast<uint32_t>(v_code.elements[i]), by_v), s);
        from_float(lane.p, p.elements[i]);
        m[i] = lane.m;
        root[i] = lane.root;
        // NaN and Inf belong to their element alone; elements beyond the end do not count.
        if (i < count && abs_of(lane.m) < infinite) largest_m = max_of(abs_of(lane.m), largest_m);
        if (i < count && lane.root < infinite) largest_root = max_of(lane.root, largest_root);
    }
    write(at_index<P>(t.p, at), p, whole, count);

    __shared__ float shared_m[WARPS], shared_root[WARPS];
    const int threads = (1 << block_bits) / OWN;
    const float new_m_scale = exp_avg_scale(largest_of(largest_m, threads, shared_m), s);
    const float new_v_scale = root_scale(largest_of(largest_root, threads, shared_root), s);
    const float m_divisor = exp_avg_divisor(new_m_scale, s), v_divisor = root_divisor(new_v_scale, s);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        m_code.elements[i] = static_cast<uint8_t>(encode_exp_avg(clamped(m[i] * m_divisor, LARGEST_M), 0u));
        v_code.elements[i] = static_cast<uint8_t>(encode_root(clamped(root[i] * v_divisor, 1.0f), 0u));
    }
    write(at_index<uint8_t>(t.exp_avg_code, at), m_code, whole, count);
    write(at_index<uint8_t>(t.exp_avg_sq_code, at), v_code, whole, count);
    // Every thread of the block has read the old scales: the new ones are made of what they computed with them.
    if (count && threadIdx.x % threads == 0) {
        __stwb(m_scale, new_m_scale);
        __stwb(v_scale, new_v_scale);
    }
}

}  // namespace

std::string adamw8bit_step_cuda(const AdamWTensor* tensors, const AdamWChunk* chunks, int64_t chunk_count,
                                int64_t p_dtype, int64_t g_dtype, int64_t block_size, const AdamWScalars& scalars,
                                void* stream) {
    if (chunk_count == 0) return "";
    int block_bits = 0;
    while ((int64_t{1} << block_bits) < block_size) ++block_bits;
    const bool p_half = p_dtype == DTYPE_BFLOAT16, g_half = g_dtype == DTYPE_BFLOAT16;
    const auto kernel = p_half ? (g_half ? &step_kernel<uint16_t, uint16_t> : &step_kernel<uint16_t, float>)
                               : (g_half ? &step_kernel<float, uint16_t> : &step_kernel<float, float>);
    kernel<<<static_cast<unsigned>(chunk_count), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(tensors, chunks,
                                                                                                  block_bits, scalars);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace pyeff
