// A block is updated in one pass, its moments waiting in the first level of cache for the scale they will be
// coded with; then they are coded. Each byte of memory is read once and written once.
#include "cpu/adamw8bit.h"

#include <algorithm>

#include "cpu/simd.h"

namespace pyeff {
namespace PYEFF_LEVEL {
namespace {

constexpr int64_t LARGEST_BLOCK = 2048;

PYEFF_LANE F16 load_any(const float* p) { return load(p); }
PYEFF_LANE F16 load_any(const uint16_t* p) { return load_bf16(p); }
PYEFF_LANE void store_any(float* p, F16 x) { store(p, x); }
PYEFF_LANE void store_any(uint16_t* p, F16 x) { store_bf16(p, x); }
PYEFF_LANE float load_one(const float* p) { return *p; }
PYEFF_LANE float load_one(const uint16_t* p) { return float_of_bf16(*p); }
PYEFF_LANE void store_one(float* p, float x) { *p = x; }
PYEFF_LANE void store_one(uint16_t* p, float x) { *p = bf16_of_float(x); }

struct Moments {
    alignas(64) float m[LARGEST_BLOCK];
    alignas(64) float root[LARGEST_BLOCK];
};

// NaN and Inf belong to their element alone: a scale made of them would spoil the whole block.
float largest_finite(const float* x, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
        if (magnitude < BITS_OF_INFINITY) largest = max_of(magnitude, largest);
    }
    return float_of_bits(largest);
}

template <bool CLAMP, class F, class U>
PYEFF_LANE void encode_lanes(F& m, F& root, U& m_code, U& v_code) {
    if (CLAMP) {
        m = clamped(m, LARGEST_M);
        root = clamped(root, 1.0f);
    }
    m_code = encode_exp_avg(m, m_code);
    v_code = encode_root(root, v_code);
}

template <bool CLAMP>
void encode_block(uint8_t* m_code, uint8_t* v_code, float m_divisor, float v_divisor, int64_t n,
                  const Moments& moments) {
    const F16 by_m = splat(m_divisor), by_v = splat(v_divisor);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        F16 m = load(moments.m + i) * by_m, root = load(moments.root + i) * by_v;
        U16 m_lanes = splat(0u), v_lanes = m_lanes;
        encode_lanes<CLAMP>(m, root, m_lanes, v_lanes);
        store_low_bytes(m_code + i, m_lanes, v_code + i, v_lanes);
    }
    for (; i < n; ++i) {
        float m = moments.m[i] * m_divisor, root = moments.root[i] * v_divisor;
        uint32_t m_lane = 0, v_lane = 0;
        encode_lanes<CLAMP>(m, root, m_lane, v_lane);
        m_code[i] = static_cast<uint8_t>(m_lane);
        v_code[i] = static_cast<uint8_t>(v_lane);
    }
}

// The last block of a tensor may end within a vector; that end takes one lane at a time, as the GPU does.
template <class P, class G>
void update_block(P* p, const G* g, uint8_t* m_code, float* m_scale, uint8_t* v_code, float* v_scale, int64_t n,
                  const AdamWScalars& s, Moments& moments) {
    const float m_factor = exp_avg_factor(*m_scale, s), v_factor = root_factor(*v_scale, s);
    const F16 by_m = splat(m_factor), by_v = splat(v_factor);
    // Magnitudes are compared as integers, which puts Inf above all numbers and NaN above Inf.
    U16 largest_m = splat(0u), largest_root = largest_m;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const AdamWLane<F16> lane =
            adamw_update(load_any(p + i), load_any(g + i), decode_exp_avg(load_high_u8(m_code + i), by_m),
                         decode_root(load_u8(v_code + i), by_v), s);
        store_any(p + i, lane.p);
        store(moments.m + i, lane.m);
        store(moments.root + i, lane.root);
        largest_m = max_of(bits_of(abs_of(lane.m)), largest_m);
        largest_root = max_of(bits_of(lane.root), largest_root);
    }
    uint32_t m_bits = max_of_lanes(largest_m), v_bits = max_of_lanes(largest_root);
    for (; i < n; ++i) {
        const AdamWLane<float> lane =
            adamw_update(load_one(p + i), load_one(g + i), decode_exp_avg(uint32_t{m_code[i]} << 24, m_factor),
                         decode_root(uint32_t{v_code[i]}, v_factor), s);
        store_one(p + i, lane.p);
        moments.m[i] = lane.m;
        moments.root[i] = lane.root;
        m_bits = max_of(bits_of(abs_of(lane.m)), m_bits);
        v_bits = max_of(bits_of(lane.root), v_bits);
    }
    const bool finite = max_of(m_bits, v_bits) < BITS_OF_INFINITY;
    *m_scale = exp_avg_scale(finite ? float_of_bits(m_bits) : largest_finite(moments.m, n), s);
    *v_scale = root_scale(finite ? float_of_bits(v_bits) : largest_finite(moments.root, n), s);
    const auto encode = finite ? &encode_block<false> : &encode_block<true>;
    encode(m_code, v_code, exp_avg_divisor(*m_scale, s), root_divisor(*v_scale, s), n, moments);
}

template <class P, class G>
void update_blocks(const AdamWTensor& t, int64_t first, int64_t last, int64_t block_size, const AdamWScalars& s) {
    Moments moments;
    auto* p = reinterpret_cast<P*>(t.p);
    const auto* g = reinterpret_cast<const G*>(t.g);
    auto* m_code = reinterpret_cast<uint8_t*>(t.exp_avg_code);
    auto* v_code = reinterpret_cast<uint8_t*>(t.exp_avg_sq_code);
    auto* m_scale = reinterpret_cast<float*>(t.exp_avg_scale);
    auto* v_scale = reinterpret_cast<float*>(t.exp_avg_sq_scale);
    for (int64_t block = first; block < last; ++block) {
        const int64_t at = block * block_size, n = std::min(block_size, t.size - at);
        update_block(p + at, g + at, m_code + at, m_scale + block, v_code + at, v_scale + block, n, s, moments);
    }
}

void update_any(const AdamWTensor& t, int64_t first, int64_t last, int64_t block_size, const AdamWScalars& s) {
    const bool p_half = t.p_dtype == DTYPE_BFLOAT16, g_half = t.g_dtype == DTYPE_BFLOAT16;
    if (p_half && g_half)
        update_blocks<uint16_t, uint16_t>(t, first, last, block_size, s);
    else if (p_half)
        update_blocks<uint16_t, float>(t, first, last, block_size, s);
    else if (g_half)
        update_blocks<float, uint16_t>(t, first, last, block_size, s);
    else
        update_blocks<float, float>(t, first, last, block_size, s);
}

int64_t blocks_of(const AdamWTensor& t, int64_t block_size) { return (t.size + block_size - 1) / block_size; }

// Blocks [first, last) of the concatenation of all tensors.
void update_range(const AdamWTensor* tensors, int64_t count, int64_t first, int64_t last, int64_t block_size,
                  const AdamWScalars& s) {
    int64_t start = 0;
    for (int64_t i = 0; i < count && start < last; ++i) {
        const int64_t blocks = blocks_of(tensors[i], block_size), end = start + blocks;
        if (end > first)
            update_any(tensors[i], std::max(first - start, int64_t{0}), std::min(last - start, blocks), block_size, s);
        start = end;
    }
}

}  // namespace

void adamw8bit_step(const AdamWTensor* tensors, int64_t count, int64_t block_size, const AdamWScalars& scalars,
                    int threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += blocks_of(tensors[i], block_size);
    // Waking a thread costs as much as some ten thousand elements.
    const int64_t useful = total * block_size / 16384 + 1;
    const int64_t team = std::max(std::min(static_cast<int64_t>(threads), useful), int64_t{1});
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(static, 1)
    for (int64_t i = 0; i < team; ++i)
        update_range(tensors, count, total * i / team, total * (i + 1) / team, block_size, scalars);
}

}  // namespace PYEFF_LEVEL
}  // namespace pyeff
