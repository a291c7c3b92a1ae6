// A block is updated in one pass, its moments waiting in the first level of cache for the scale they will be
// coded with; then they are coded. Each byte of memory is read once and written once.
#include "cpu/adamw8bit.h"

#include <algorithm>
#include <limits>

#include "cpu/simd.h"

namespace pyeff {
namespace PYEFF_LEVEL {
namespace {

constexpr int64_t LARGEST_BLOCK = 2048;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

PYEFF_LANE F16 load_any(const float* p) { return load(p); }
PYEFF_LANE F16 load_any(const uint16_t* p) { return load_bf16(p); }
PYEFF_LANE void store_any(float* p, F16 x) { store(p, x); }
PYEFF_LANE void store_any(uint16_t* p, F16 x) { store_bf16(p, x); }

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

template <bool CLAMP>
void encode_block(uint8_t* m_code, uint8_t* v_code, float m_divisor, float v_divisor, int64_t padded,
                  const Moments& moments) {
    const F16 by_m = splat(m_divisor), by_v = splat(v_divisor);
    const U16 like = splat(0u);
    for (int64_t i = 0; i < padded; i += LANES) {
        F16 m = load(moments.m + i) * by_m, root = load(moments.root + i) * by_v;
        if (CLAMP) {
            m = clamped(m, LARGEST_M);
            root = clamped(root, 1.0f);
        }
        store_low_bytes(m_code + i, encode_exp_avg(m, like), v_code + i, encode_root(root, like));
    }
}

// Whole vectors of one block. `valid` of the `padded` elements count for the scales.
template <class P, class G>
void update_block(P* p, const G* g, uint8_t* m_code, float* m_scale, uint8_t* v_code, float* v_scale, int64_t padded,
                  int64_t valid, const AdamWScalars& s, Moments& moments) {
    const F16 by_m = splat(exp_avg_factor(*m_scale, s)), by_v = splat(root_factor(*v_scale, s));
    // Magnitudes are compared as integers, which puts Inf above all numbers and NaN above Inf.
    U16 largest_m = splat(0u), largest_root = largest_m;
    for (int64_t i = 0; i < padded; i += LANES) {
        const AdamWLane<F16> lane =
            adamw_update(load_any(p + i), load_any(g + i), decode_exp_avg(load_i8(m_code + i), by_m),
                         decode_root(load_u8(v_code + i), by_v), s);
        store_any(p + i, lane.p);
        store(moments.m + i, lane.m);
        store(moments.root + i, lane.root);
        largest_m = max_of(bits_of(abs_of(lane.m)), largest_m);
        largest_root = max_of(bits_of(lane.root), largest_root);
    }
    float m_top = float_of_bits(max_of_lanes(largest_m)), v_top = float_of_bits(max_of_lanes(largest_root));
    const bool finite = m_top < INFINITE && v_top < INFINITE;
    if (!finite || valid < padded) {
        m_top = largest_finite(moments.m, valid);
        v_top = largest_finite(moments.root, valid);
    }
    *m_scale = exp_avg_scale(m_top, s);
    *v_scale = root_scale(v_top, s);
    const auto encode = finite ? &encode_block<false> : &encode_block<true>;
    encode(m_code, v_code, exp_avg_divisor(*m_scale, s), root_divisor(*v_scale, s), padded, moments);
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
        if (n % LANES == 0) {
            update_block(p + at, g + at, m_code + at, m_scale + block, v_code + at, v_scale + block, n, n, s, moments);
            continue;
        }
        // The end of a tensor, in padded copies.
        P p_copy[LARGEST_BLOCK] = {};
        G g_copy[LARGEST_BLOCK] = {};
        uint8_t m_copy[LARGEST_BLOCK] = {}, v_copy[LARGEST_BLOCK] = {};
        std::copy_n(p + at, n, p_copy);
        std::copy_n(g + at, n, g_copy);
        std::copy_n(m_code + at, n, m_copy);
        std::copy_n(v_code + at, n, v_copy);
        const int64_t padded = (n + LANES - 1) / LANES * LANES;
        update_block(p_copy, g_copy, m_copy, m_scale + block, v_copy, v_scale + block, padded, n, s, moments);
        std::copy_n(p_copy, n, p + at);
        std::copy_n(m_copy, n, m_code + at);
        std::copy_n(v_copy, n, v_code + at);
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
