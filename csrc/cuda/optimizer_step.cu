// One thread owns 16 consecutive elements, so that its codes are one 16-byte vector and its bf16 values one 32-byte
// sector; block_size / 16 threads share a block and find its largest moments together. Everything stays in registers
// between the read and the write. Dtypes differ from tensor to tensor in one launch: the branches on them are the same
// for all threads of a block.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/optimizer_step.h"

namespace pyeff {
namespace {

constexpr int OWN = 16, THREADS = static_cast<int>(OPTIMIZER_CHUNK) / OWN, WARP = 32, WARPS = THREADS / WARP;
constexpr unsigned EVERYONE = 0xffffffffu;

// An address from a table could be of any memory. __ldca and __stwb say that it is global and else do what a
// plain access does, so they become LDG and STG.
template <class T>
__device__ __forceinline__ T* at_index(int64_t address, int64_t index) {
    return reinterpret_cast<T*>(address) + index;
}

// Sixteen elements of any of the types, as 16-byte vectors where that is allowed, else one by one.
union Own {
    uint4 vectors[OWN * sizeof(float) / sizeof(uint4)];
    float floats[OWN];
    uint16_t halves[OWN];
    uint8_t bytes[OWN];
};
__device__ __forceinline__ float& element(Own& own, int i, float) { return own.floats[i]; }
__device__ __forceinline__ uint16_t& element(Own& own, int i, uint16_t) { return own.halves[i]; }
__device__ __forceinline__ uint8_t& element(Own& own, int i, uint8_t) { return own.bytes[i]; }

template <class T>
__device__ __forceinline__ void read(Own& own, int64_t address, int64_t at, int count) {
    const T* from = at_index<const T>(address, at);
    if (count == OWN && (reinterpret_cast<uintptr_t>(from) & 15) == 0) {
#pragma unroll
        for (int i = 0; i < OWN * static_cast<int>(sizeof(T)) / 16; ++i)
            own.vectors[i] = __ldca(reinterpret_cast<const uint4*>(from) + i);
    } else {
#pragma unroll
        for (int i = 0; i < OWN; ++i) element(own, i, T()) = i < count ? __ldca(from + i) : T(0);
    }
}

template <class T>
__device__ __forceinline__ void write(int64_t address, int64_t at, Own& own, int count) {
    T* to = at_index<T>(address, at);
    if (count == OWN && (reinterpret_cast<uintptr_t>(to) & 15) == 0) {
#pragma unroll
        for (int i = 0; i < OWN * static_cast<int>(sizeof(T)) / 16; ++i)
            __stwb(reinterpret_cast<uint4*>(to) + i, own.vectors[i]);
    } else {
#pragma unroll
        for (int i = 0; i < OWN; ++i)
            if (i < count) __stwb(to + i, element(own, i, T()));
    }
}

__device__ __forceinline__ void widen(Own& own) {
#pragma unroll
    for (int i = OWN - 1; i >= 0; --i) own.floats[i] = widened(static_cast<uint32_t>(own.halves[i]));
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

// Three thread blocks on a multiprocessor with codes, two with four times as many bytes of states in flight.
template <int RULE, bool CODED>
__global__ void __launch_bounds__(THREADS, CODED ? 3 : 2)
    step_kernel(const OptimizerTensor* __restrict__ tensors, const OptimizerChunk* __restrict__ chunks,
                const StepScalars* __restrict__ scalars, int block_bits, bool nesterov) {
    constexpr bool ADAM = RULE == RULE_ADAM;
    const OptimizerChunk chunk = chunks[blockIdx.x];
    const OptimizerTensor& t = tensors[chunk.tensor];
    const StepScalars& s = scalars[chunk.tensor];
    if (s.skip) return;
    // Chunks count rows as if their last blocks were full.
    const int64_t padded = chunk.index * OPTIMIZER_CHUNK + threadIdx.x * OWN, block = padded >> block_bits;
    int64_t at = padded, left = t.size - padded;
    if (t.row != t.size) {
        const int64_t in_row = (t.row + (int64_t{1} << block_bits) - 1) >> block_bits, row = block / in_row;
        const int64_t column = padded - ((row * in_row) << block_bits);
        at = row * t.row + column;
        left = at < t.size ? t.row - column : 0;
    }
    const int count = left >= OWN ? OWN : left > 0 ? static_cast<int>(left) : 0;
    const int64_t weight = t.weight;
    const bool exact = weight == WEIGHT_FLOAT32 || weight == WEIGHT_MASTER;

    // All reads are queued before the first is waited for.
    Own p, g, first, second, error;
    if (exact)
        read<float>(p, weight == WEIGHT_MASTER ? t.master : t.p, at, count);
    else
        read<uint16_t>(p, t.p, at, count);
    if (t.g_dtype == DTYPE_FLOAT32)
        read<float>(g, t.g, at, count);
    else
        read<uint16_t>(g, t.g, at, count);
    float first_by = 0.0f, second_by = 0.0f;
    if (CODED) {
        read<uint8_t>(first, t.first, at, count);
        if (count) first_by = first_factor<RULE>(__ldca(at_index<float>(t.first_scale, block)), s);
        if (ADAM) {
            read<uint8_t>(second, t.second, at, count);
            if (count) second_by = root_factor(__ldca(at_index<float>(t.second_scale, block)), s);
        }
    } else {
        read<float>(first, t.first, at, count);
        if (ADAM) read<float>(second, t.second, at, count);
    }
    if (weight == WEIGHT_ECC8) {
        read<uint8_t>(error, t.master, at, count);
#pragma unroll
        for (int i = OWN - 1; i >= 0; --i)
            p.floats[i] =
                joined_from_24_bits(static_cast<uint32_t>(p.halves[i]), static_cast<uint32_t>(error.bytes[i]) << 24);
    } else if (!exact) {
        widen(p);
    }
    if (t.g_dtype != DTYPE_FLOAT32) widen(g);
    if (s.clip != 1.0f) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) g.floats[i] = clipped(g.floats[i], s);
    }
    if (s.l2 != 0.0f) {
#pragma unroll
        for (int i = 0; i < OWN; ++i) g.floats[i] = decayed(g.floats[i], p.floats[i], s);
    }

    Own moment, root;
    float largest_first = 0.0f, largest_root = 0.0f;
    const float infinite = float_of_bits(BITS_OF_INFINITY);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
        float before = CODED ? decode_signed(static_cast<uint32_t>(first.bytes[i]) << 24, first_by) : first.floats[i];
        float before2 = 0.0f;
        if (ADAM) before2 = CODED ? decode_root(static_cast<uint32_t>(second.bytes[i]), second_by) : second.floats[i];
        const Updated<float> lane = updated<RULE, CODED>(p.floats[i], g.floats[i], before, before2, nesterov, s);
        p.floats[i] = lane.p;
        moment.floats[i] = CODED && ADAM ? beside_root(lane.first, lane.second) : lane.first;
        if (ADAM) root.floats[i] = lane.second;
        // NaN and Inf belong to their element alone; elements beyond the end do not count.
        if (CODED && i < count && abs_of(moment.floats[i]) < infinite)
            largest_first = max_of(abs_of(moment.floats[i]), largest_first);
        if (CODED && ADAM && i < count && lane.second < infinite) largest_root = max_of(lane.second, largest_root);
    }

    if (exact) {
        write<float>(weight == WEIGHT_MASTER ? t.master : t.p, at, p, count);
    }
    if (weight != WEIGHT_FLOAT32) {
        const uint64_t key = random_key(s, t.first_block + block);
        const uint32_t index = threadIdx.x * OWN & ((1u << block_bits) - 1);
        if (weight == WEIGHT_STOCHASTIC) {
#pragma unroll
            for (int i = 0; i < OWN; ++i)
                p.halves[i] = static_cast<uint16_t>(
                    rounded_at_random(p.floats[i], random_bits(random_count(index + i, key), key)) >> 16);
        } else if (weight == WEIGHT_ECC8) {
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                uint32_t half, rest;
                split_in_24_bits(p.floats[i], random_bits(random_count(index + i, key), key), half, rest);
                p.halves[i] = static_cast<uint16_t>(half);
                error.bytes[i] = static_cast<uint8_t>(rest);
            }
            write<uint8_t>(t.master, at, error, count);
        } else {
#pragma unroll
            for (int i = 0; i < OWN; ++i) p.halves[i] = static_cast<uint16_t>(rounded_to_nearest(p.floats[i]) >> 16);
        }
        write<uint16_t>(t.p, at, p, count);
    }
    if (!CODED) {
        write<float>(t.first, at, moment, count);
        if (ADAM) write<float>(t.second, at, root, count);
        return;
    }

    __shared__ float shared_first[WARPS], shared_root[WARPS];
    const int threads = (1 << block_bits) / OWN;
    const float new_scale = first_scale(largest_of(largest_first, threads, shared_first), s);
    const float divisor = first_divisor(new_scale, s), around = first_offset(s, t.first_block + block);
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        first.bytes[i] =
            static_cast<uint8_t>(encode_signed(clamped(moment.floats[i] * divisor, LARGEST_CODED), around, 0u));
    write<uint8_t>(t.first, at, first, count);
    // Every thread of the block has read the old scales: the new ones are made of what they computed with them.
    const bool writes_scales = count && threadIdx.x % threads == 0;
    if (writes_scales) __stwb(at_index<float>(t.first_scale, block), new_scale);
    if (ADAM) {
        const float new_scale2 = root_scale(largest_of(largest_root, threads, shared_root), s);
        const float divisor2 = root_divisor(new_scale2, s), offset = root_offset(s, t.first_block + block);
#pragma unroll
        for (int i = 0; i < OWN; ++i)
            second.bytes[i] = static_cast<uint8_t>(encode_root(clamped(root.floats[i] * divisor2, 1.0f), offset, 0u));
        write<uint8_t>(t.second, at, second, count);
        if (writes_scales) __stwb(at_index<float>(t.second_scale, block), new_scale2);
    }
}

// The counts of steps go on here, and not if the gradients are not finite.
__global__ void scalars_kernel(const OptimizerTensor* __restrict__ tensors, int64_t count, OptimizerRule rule,
                               const float* lr, const double* norm, int64_t* skipped, StepScalars* scalars) {
    const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const double size = norm ? *norm : 0.0;
    const bool skip = !(size <= LARGEST_DOUBLE);
    if (i == 0 && skip && skipped) *skipped += 1;
    if (i >= count) return;
    auto* step = reinterpret_cast<double*>(tensors[i].step);
    auto* powers = reinterpret_cast<double*>(tensors[i].beta_powers);
    if (!skip) {
        *step += 1.0;
        if (powers) {
            powers[0] *= rule.beta1;
            powers[1] *= rule.beta2;
        }
    }
    scalars[i] = scalars_of(rule, lr ? static_cast<double>(*lr) : rule.lr, *step, powers ? powers[0] : 1.0,
                            powers ? powers[1] : 1.0, size, tensors[i].key);
}

// The squares of one chunk, in the order of csrc/cpu/optimizer_step.cpp: thread t adds elements i * 16 + t % 16 of
// group t / 16.
constexpr int GROUP = 256, LANES = 16;

template <class T>
__device__ __forceinline__ T halved(T x, T (&shared)[THREADS]) {
    shared[threadIdx.x] = x;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] = shared[threadIdx.x] + shared[threadIdx.x + half];
    }
    __syncthreads();
    return shared[0];
}

template <class T>
__device__ __forceinline__ T squares_of(const OptimizerTensor& t, int64_t at, T (&shared)[THREADS]) {
    float x[GROUP / LANES];
    const int64_t start = at + threadIdx.x / LANES * GROUP + threadIdx.x % LANES;
#pragma unroll
    for (int i = 0; i < GROUP / LANES; ++i) {
        const int64_t index = start + i * LANES;
        x[i] = 0.0f;
        if (index < t.size)
            x[i] = t.g_dtype == DTYPE_FLOAT32
                       ? __ldca(at_index<const float>(t.g, index))
                       : widened(static_cast<uint32_t>(__ldca(at_index<const uint16_t>(t.g, index))));
    }
    T sum = 0;
#pragma unroll
    for (int i = 0; i < GROUP / LANES; ++i) sum = sum + static_cast<T>(x[i]) * static_cast<T>(x[i]);
    return halved(sum, shared);
}

__global__ void __launch_bounds__(THREADS) squares_kernel(const OptimizerTensor* __restrict__ tensors,
                                                          const OptimizerChunk* __restrict__ chunks, double* squares) {
    __shared__ float shared[THREADS];
    __shared__ double shared2[THREADS];
    const OptimizerChunk chunk = chunks[blockIdx.x];
    const OptimizerTensor& t = tensors[chunk.tensor];
    const int64_t at = chunk.index * OPTIMIZER_CHUNK;
    double sum = squares_of<float>(t, at, shared);
    // A square of a finite gradient may be beyond fp32, and is never beyond double. All threads see the same sum.
    if (!(sum <= LARGEST_FLOAT)) sum = squares_of<double>(t, at, shared2);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(THREADS) norm_kernel(const double* squares, int64_t count, double* norm) {
    __shared__ double shared[THREADS];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += THREADS) sum = sum + squares[i];
    sum = halved(sum, shared);
    if (threadIdx.x == 0) *norm = sqrt_of(sum);
}

// Rows travel as kernel arguments, which may take 4 KB.
constexpr int ROWS = 31;
struct Rows {
    OptimizerTensor rows[ROWS];
};
static_assert(sizeof(Rows) <= 4000, "kernel arguments");

__global__ void rows_kernel(Rows rows, int count, OptimizerTensor* tensors) {
    if (threadIdx.x < count) tensors[threadIdx.x] = rows.rows[threadIdx.x];
}

__global__ void chunks_kernel(const OptimizerTensor* __restrict__ tensors, int64_t count, OptimizerChunk* chunks,
                              int64_t chunk_count) {
    const int64_t chunk = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (chunk >= chunk_count) return;
    // The last tensor that starts at this chunk or before; those without elements start where the next one does.
    int64_t low = 0, high = count;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (tensors[middle].first_chunk <= chunk ? low : high) = middle;
    }
    chunks[chunk] = {static_cast<int32_t>(low), static_cast<int32_t>(chunk - tensors[low].first_chunk)};
}

unsigned blocks_of(int64_t work, int threads) { return static_cast<unsigned>((work + threads - 1) / threads); }

std::string last_problem() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace

std::string optimizer_table_cuda(const OptimizerTensor* rows, int64_t count, OptimizerTensor* tensors,
                                 OptimizerChunk* chunks, int64_t chunk_count, void* stream) {
    const auto queue = static_cast<cudaStream_t>(stream);
    for (int64_t start = 0; start < count; start += ROWS) {
        Rows some = {};
        const int64_t n = std::min<int64_t>(ROWS, count - start);
        std::copy(rows + start, rows + start + n, some.rows);
        rows_kernel<<<1, 32, 0, queue>>>(some, static_cast<int>(n), tensors + start);
    }
    if (chunk_count) {
        constexpr int threads = 128;
        chunks_kernel<<<blocks_of(chunk_count, threads), threads, 0, queue>>>(tensors, count, chunks, chunk_count);
    }
    return last_problem();
}

std::string optimizer_step_cuda(const OptimizerTensor* tensors, int64_t count, const OptimizerChunk* chunks,
                                int64_t chunk_count, const OptimizerRule& rule, const float* lr, const double* norm,
                                int64_t* skipped, StepScalars* scalars, void* stream) {
    const auto queue = static_cast<cudaStream_t>(stream);
    constexpr int threads = 32;
    if (count)
        scalars_kernel<<<blocks_of(count, threads), threads, 0, queue>>>(tensors, count, rule, lr, norm, skipped,
                                                                         scalars);
    if (chunk_count) {
        int block_bits = 0;
        while ((int64_t{1} << block_bits) < rule.block_size) ++block_bits;
        const auto kernel =
            rule.rule == RULE_ADAM   ? (rule.coded ? &step_kernel<RULE_ADAM, true> : &step_kernel<RULE_ADAM, false>)
            : rule.rule == RULE_LION ? (rule.coded ? &step_kernel<RULE_LION, true> : &step_kernel<RULE_LION, false>)
                                     : (rule.coded ? &step_kernel<RULE_SGD, true> : &step_kernel<RULE_SGD, false>);
        kernel<<<static_cast<unsigned>(chunk_count), THREADS, 0, queue>>>(tensors, chunks, scalars, block_bits,
                                                                          rule.nesterov != 0);
    }
    return last_problem();
}

std::string global_norm_cuda(const OptimizerTensor* tensors, const OptimizerChunk* chunks, int64_t chunk_count,
                             double* squares, double* norm, void* stream) {
    const auto queue = static_cast<cudaStream_t>(stream);
    if (chunk_count)
        squares_kernel<<<static_cast<unsigned>(chunk_count), THREADS, 0, queue>>>(tensors, chunks, squares);
    norm_kernel<<<1, THREADS, 0, queue>>>(squares, chunk_count, norm);
    return last_problem();
}

}  // namespace pyeff
