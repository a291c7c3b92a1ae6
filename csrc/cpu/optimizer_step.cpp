// A block of a tensor is taken through four passes while it lies in the first level of cache: gradients and weights to
// fp32 where they are not, the step, weights back to bf16, and moments to codes once the scale is known. Each byte of
// memory is read once and written once.
#include "cpu/optimizer_step.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/simd.h"

namespace pyeff {
namespace PYEFF_LEVEL {
namespace {

constexpr int64_t LARGEST_BLOCK = 2048;
constexpr int64_t NORM_CHUNK = 4096, NORM_GROUP = 256;  // as in csrc/cuda/optimizer_step.cu

// What a pass does is written once, for sixteen elements or for one at the ragged end of a tensor: `like` arguments
// choose. The end takes one lane at a time, as the GPU does.
PYEFF_LANE F16 load_like(const float* p, F16) { return load(p); }
PYEFF_LANE float load_like(const float* p, float) { return *p; }
PYEFF_LANE U16 half_like(const uint16_t* p, U16) { return load_u16(p); }
PYEFF_LANE uint32_t half_like(const uint16_t* p, uint32_t) { return *p; }
PYEFF_LANE U16 byte_like(const uint8_t* p, U16) { return load_u8(p); }
PYEFF_LANE uint32_t byte_like(const uint8_t* p, uint32_t) { return *p; }
PYEFF_LANE U16 high_byte_like(const uint8_t* p, U16) { return load_high_u8(p); }
PYEFF_LANE uint32_t high_byte_like(const uint8_t* p, uint32_t) { return uint32_t{*p} << 24; }
PYEFF_LANE void keep(float* p, F16 x) { store(p, x); }
PYEFF_LANE void keep(float* p, float x) { *p = x; }
PYEFF_LANE void keep_half(uint16_t* p, U16 x) { store_u16(p, x); }
PYEFF_LANE void keep_half(uint16_t* p, uint32_t x) { *p = static_cast<uint16_t>(x); }
PYEFF_LANE void keep_byte(uint8_t* p, U16 x) { store_u8(p, x & splat(0xffu)); }
PYEFF_LANE void keep_byte(uint8_t* p, uint32_t x) { *p = static_cast<uint8_t>(x); }
PYEFF_LANE void keep_bytes(uint8_t* p, U16 x, uint8_t* q, U16 y) { store_low_bytes(p, x, q, y); }
PYEFF_LANE void keep_bytes(uint8_t* p, uint32_t x, uint8_t* q, uint32_t y) {
    *p = static_cast<uint8_t>(x);
    *q = static_cast<uint8_t>(y);
}
PYEFF_LANE U16 index_like(int64_t i, U16) {
    alignas(64) static constexpr uint8_t COUNT[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load_u8(COUNT) + splat(static_cast<uint32_t>(i));
}
PYEFF_LANE uint32_t index_like(int64_t i, uint32_t) { return static_cast<uint32_t>(i); }

#define PYEFF_INLINE __attribute__((always_inline))

template <class Body>
PYEFF_LANE void for_lanes(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) body(i, F16{}, U16{});
    for (; i < n; ++i) body(i, float{}, uint32_t{});
}

// The largest magnitude, as an integer: that puts Inf above all numbers and NaN above Inf.
struct Largest {
    U16 lanes = splat(0u);
    uint32_t rest = 0;
    PYEFF_INLINE void see(F16 x) { lanes = max_of(bits_of(abs_of(x)), lanes); }
    PYEFF_INLINE void see(float x) { rest = max_of(bits_of(abs_of(x)), rest); }
    uint32_t bits() const { return max_of(max_of_lanes(lanes), rest); }
};

// The arrays of a block would all start at the same place in a page, where the cache has few ways and a load waits for
// the store it looks like.
struct Buffers {
    alignas(64) float first[LARGEST_BLOCK + 16];
    alignas(64) float second[LARGEST_BLOCK + 32];
    alignas(64) float g[LARGEST_BLOCK + 64];
    alignas(64) float p[LARGEST_BLOCK];
};

// One block of one tensor: addresses moved to its start.
struct Block {
    int64_t n, index;
    void* p;
    const void* g;
    void *first, *second, *master;
    float *first_scale, *second_scale;
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

// Weights in bf16 with what stands beside them.
template <int64_t WEIGHT>
struct Halves {
    uint16_t* p;
    uint8_t* errors;
    uint64_t key = 0;

    Halves(const Block& b, const StepScalars& s)
        : p(static_cast<uint16_t*>(b.p)), errors(static_cast<uint8_t*>(b.master)) {
        if (WEIGHT == WEIGHT_STOCHASTIC) key = random_key(s, b.index);
    }
    template <class U>
    PYEFF_INLINE auto weight(int64_t i, U u) const {
        if constexpr (WEIGHT == WEIGHT_ECC8)
            return joined_from_24_bits(half_like(p + i, u), high_byte_like(errors + i, u));
        else
            return widened(half_like(p + i, u));
    }
    template <class F, class U>
    PYEFF_INLINE void keep_weight(int64_t i, F x, U u) {
        if constexpr (WEIGHT == WEIGHT_STOCHASTIC) {
            keep_half(p + i, rounded_at_random(x, random_bits(random_count(index_like(i, u), key), key)));
        } else if constexpr (WEIGHT == WEIGHT_ECC8) {
            U half = u, error = u;
            split_in_24_bits(x, half, error);
            keep_half(p + i, half);
            keep_byte(errors + i, error);
        } else {
            keep_half(p + i, rounded_to_nearest(x));
        }
    }
};

template <int64_t WEIGHT>
void widen(const Block& b, const StepScalars& s, float* to) {
    const Halves<WEIGHT> halves(b, s);
    for_lanes(b.n, [&](int64_t i, auto, auto u) PYEFF_INLINE { keep(to + i, halves.weight(i, u)); });
}

template <int64_t WEIGHT>
void narrow(const Block& b, const StepScalars& s, const float* from) {
    Halves<WEIGHT> halves(b, s);
    for_lanes(b.n, [&](int64_t i, auto f, auto u) PYEFF_INLINE { halves.keep_weight(i, load_like(from + i, f), u); });
}

float* weights_of(const Block& b, int64_t weight, const StepScalars& s, Buffers& buffers) {
    if (weight == WEIGHT_FLOAT32) return static_cast<float*>(b.p);
    if (weight == WEIGHT_MASTER) return static_cast<float*>(b.master);
    (weight == WEIGHT_ECC8 ? &widen<WEIGHT_ECC8> : &widen<WEIGHT_NEAREST>)(b, s, buffers.p);
    return buffers.p;
}

void return_weights(const Block& b, int64_t weight, const StepScalars& s, const float* from) {
    if (weight == WEIGHT_STOCHASTIC)
        narrow<WEIGHT_STOCHASTIC>(b, s, from);
    else if (weight == WEIGHT_ECC8)
        narrow<WEIGHT_ECC8>(b, s, from);
    else if (weight != WEIGHT_FLOAT32)
        narrow<WEIGHT_NEAREST>(b, s, from);
}

const float* gradients_of(const Block& b, int64_t g_dtype, const float* p, const StepScalars& s, Buffers& buffers) {
    const float* g = static_cast<const float*>(b.g);
    if (g_dtype == DTYPE_BFLOAT16) {
        const auto* half = static_cast<const uint16_t*>(b.g);
        for_lanes(b.n,
                  [&](int64_t i, auto, auto u) PYEFF_INLINE { keep(buffers.g + i, widened(half_like(half + i, u))); });
        g = buffers.g;
    }
    if (s.clip != 1.0f) {
        for_lanes(b.n,
                  [&](int64_t i, auto f, auto) PYEFF_INLINE { keep(buffers.g + i, clipped(load_like(g + i, f), s)); });
        g = buffers.g;
    }
    if (s.l2 != 0.0f) {
        for_lanes(b.n, [&](int64_t i, auto f, auto)
                           PYEFF_INLINE { keep(buffers.g + i, decayed(load_like(g + i, f), load_like(p + i, f), s)); });
        g = buffers.g;
    }
    return g;
}

template <int RULE, bool CLAMP>
void encode(const Block& b, float first_by, float second_by, const Buffers& buffers) {
    auto* first = static_cast<uint8_t*>(b.first);
    auto* second = static_cast<uint8_t*>(b.second);
    for_lanes(b.n, [&](int64_t i, auto f, auto u) PYEFF_INLINE {
        auto moment = load_like(buffers.first + i, f) * broadcast(first_by, f);
        if (CLAMP) moment = clamped(moment, LARGEST_CODED);
        if (RULE != RULE_ADAM) {
            keep_byte(first + i, encode_signed(moment, u));
            return;
        }
        auto root = load_like(buffers.second + i, f) * broadcast(second_by, f);
        if (CLAMP) root = clamped(root, 1.0f);
        keep_bytes(first + i, encode_signed(moment, u), second + i, encode_root(root, u));
    });
}

template <int RULE>
void update_coded(const Block& b, float* p, const float* g, bool nesterov, const StepScalars& s, Buffers& buffers) {
    const auto* first = static_cast<const uint8_t*>(b.first);
    const auto* second = static_cast<const uint8_t*>(b.second);
    const float by_first = first_factor<RULE>(*b.first_scale, s);
    const float by_second = RULE == RULE_ADAM ? root_factor(*b.second_scale, s) : 0.0f;
    Largest largest_first, largest_root;
    for_lanes(b.n, [&](int64_t i, auto f, auto u) PYEFF_INLINE {
        const auto moment = decode_signed(high_byte_like(first + i, u), broadcast(by_first, f));
        auto root = f;
        if (RULE == RULE_ADAM) root = decode_root(byte_like(second + i, u), broadcast(by_second, f));
        const auto lane = updated<RULE, true>(load_like(p + i, f), load_like(g + i, f), moment, root, nesterov, s);
        keep(p + i, lane.p);
        keep(buffers.first + i, lane.first);
        largest_first.see(lane.first);
        if (RULE == RULE_ADAM) {
            keep(buffers.second + i, lane.second);
            largest_root.see(lane.second);
        }
    });
    const uint32_t first_bits = largest_first.bits(), root_bits = largest_root.bits();
    const bool finite = max_of(first_bits, root_bits) < BITS_OF_INFINITY;
    *b.first_scale = first_scale(finite ? float_of_bits(first_bits) : largest_finite(buffers.first, b.n), s);
    float root_by = 0.0f;
    if (RULE == RULE_ADAM) {
        *b.second_scale = root_scale(finite ? float_of_bits(root_bits) : largest_finite(buffers.second, b.n), s);
        root_by = root_divisor(*b.second_scale, s);
    }
    const auto encoding = finite ? &encode<RULE, false> : &encode<RULE, true>;
    encoding(b, first_divisor(*b.first_scale, s), root_by, buffers);
}

template <int RULE>
void update_float(const Block& b, float* p, const float* g, bool nesterov, const StepScalars& s, Buffers&) {
    auto* first = static_cast<float*>(b.first);
    auto* second = static_cast<float*>(b.second);
    for_lanes(b.n, [&](int64_t i, auto f, auto u) PYEFF_INLINE {
        auto square = f;
        if (RULE == RULE_ADAM) square = load_like(second + i, f);
        const auto lane = updated<RULE, false>(load_like(p + i, f), load_like(g + i, f), load_like(first + i, f),
                                               square, nesterov, s);
        keep(p + i, lane.p);
        keep(first + i, lane.first);
        if (RULE == RULE_ADAM) keep(second + i, lane.second);
    });
}

using Update = void (*)(const Block&, float*, const float*, bool, const StepScalars&, Buffers&);

Update update_of(const OptimizerRule& rule) {
    switch (rule.rule) {
        case RULE_ADAM: return rule.coded ? &update_coded<RULE_ADAM> : &update_float<RULE_ADAM>;
        case RULE_LION: return rule.coded ? &update_coded<RULE_LION> : &update_float<RULE_LION>;
        default: return rule.coded ? &update_coded<RULE_SGD> : &update_float<RULE_SGD>;
    }
}

int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

int64_t blocks_of(const OptimizerTensor& t, int64_t block_size) {
    return t.row == t.size ? parts_of(t.size, block_size) : t.size / t.row * parts_of(t.row, block_size);
}

Block block_of(const OptimizerTensor& t, int64_t block, const OptimizerRule& rule) {
    int64_t at = block * rule.block_size, end = t.size;
    if (t.row != t.size) {
        const int64_t in_row = parts_of(t.row, rule.block_size), row = block / in_row;
        at = row * t.row + block % in_row * rule.block_size;
        end = (row + 1) * t.row;
    }
    const int64_t state_bytes = rule.coded ? 1 : 4;
    const auto moved = [&](int64_t address, int64_t bytes) {
        return address ? reinterpret_cast<char*>(address) + at * bytes : nullptr;
    };
    return {std::min(rule.block_size, end - at),
            t.first_block + block,
            moved(t.p, t.weight == WEIGHT_FLOAT32 ? 4 : 2),
            moved(t.g, t.g_dtype == DTYPE_FLOAT32 ? 4 : 2),
            moved(t.first, state_bytes),
            moved(t.second, state_bytes),
            moved(t.master, t.weight == WEIGHT_MASTER ? 4 : 1),
            reinterpret_cast<float*>(t.first_scale) + block,
            reinterpret_cast<float*>(t.second_scale) + block};
}

// Parts [first, last) of the concatenation of all tensors, of which each has parts_of(tensor).
template <class Parts, class Body>
void for_parts(const OptimizerTensor* tensors, int64_t count, Parts parts_of, int64_t first, int64_t last, Body body) {
    int64_t start = 0;
    for (int64_t i = 0; i < count && start < last; ++i) {
        const int64_t parts = parts_of(tensors[i]), end = start + parts;
        if (end > first) body(i, std::max(first - start, int64_t{0}), std::min(last - start, parts), start);
        start = end;
    }
}

// Runs body(first, last) for shares of `total` parts.
template <class Body>
void share(int64_t total, int64_t part, int threads, Body body) {
    // Waking a thread costs as much as some ten thousand elements.
    const int64_t useful = total * part / 16384 + 1;
    const int64_t team = std::max(std::min(static_cast<int64_t>(threads), useful), int64_t{1});
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(static, 1)
    for (int64_t i = 0; i < team; ++i) body(total * i / team, total * (i + 1) / team);
}

template <class Parts>
int64_t all_parts(const OptimizerTensor* tensors, int64_t count, Parts parts_of) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += parts_of(tensors[i]);
    return total;
}

// The squares of one chunk. Element i is added by lane i % 16 of group i / 256, in order of i; then groups and lanes
// are halved until one is left.
template <class T>
double squares_of(const float* g, int64_t n) {
    T sums[NORM_CHUNK / NORM_GROUP * LANES];
    for (int64_t group = 0; group < NORM_CHUNK / NORM_GROUP; ++group)
        for (int64_t lane = 0; lane < LANES; ++lane) {
            T sum = 0;
            for (int64_t i = group * NORM_GROUP + lane; i < std::min(n, (group + 1) * NORM_GROUP); i += LANES)
                sum = sum + static_cast<T>(g[i]) * static_cast<T>(g[i]);
            sums[group * LANES + lane] = sum;
        }
    for (int64_t half = NORM_CHUNK / NORM_GROUP * LANES / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    return sums[0];
}

double fast_squares(const float* g) {
    F16 sums[NORM_CHUNK / NORM_GROUP];
    for (int64_t group = 0; group < NORM_CHUNK / NORM_GROUP; ++group) {
        F16 sum = splat(0.0f);
        for (int64_t i = 0; i < NORM_GROUP; i += LANES) {
            const F16 x = load(g + group * NORM_GROUP + i);
            sum = sum + x * x;
        }
        sums[group] = sum;
    }
    for (int64_t half = NORM_CHUNK / NORM_GROUP / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    return sum_of(sums[0]);
}

double chunk_squares(const OptimizerTensor& t, int64_t chunk) {
    const int64_t at = chunk * NORM_CHUNK, n = std::min(NORM_CHUNK, t.size - at);
    alignas(64) float buffer[NORM_CHUNK];
    const float* g = reinterpret_cast<const float*>(t.g) + at;
    if (t.g_dtype == DTYPE_BFLOAT16) {
        const auto* half = reinterpret_cast<const uint16_t*>(t.g) + at;
        for_lanes(n, [&](int64_t i, auto, auto u) PYEFF_INLINE { keep(buffer + i, widened(half_like(half + i, u))); });
        g = buffer;
    }
    const double sum = n == NORM_CHUNK ? fast_squares(g) : squares_of<float>(g, n);
    // A square of a finite gradient may be beyond fp32, and is never beyond double.
    return sum <= LARGEST_FLOAT ? sum : squares_of<double>(g, n);
}

}  // namespace

bool optimizer_step(const OptimizerTensor* tensors, int64_t count, const OptimizerRule& rule, double norm,
                    int threads) {
    if (!(norm <= LARGEST_DOUBLE)) return false;
    std::vector<StepScalars> scalars(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
        auto* step = reinterpret_cast<double*>(tensors[i].step);
        auto* powers = reinterpret_cast<double*>(tensors[i].beta_powers);
        *step += 1.0;
        if (powers) {
            powers[0] *= rule.beta1;
            powers[1] *= rule.beta2;
        }
        scalars[i] =
            scalars_of(rule, rule.lr, *step, powers ? powers[0] : 1.0, powers ? powers[1] : 1.0, norm, tensors[i].key);
    }
    const Update update = update_of(rule);
    const auto blocks = [&](const OptimizerTensor& t) { return blocks_of(t, rule.block_size); };
    share(all_parts(tensors, count, blocks), rule.block_size, threads, [&](int64_t first, int64_t last) {
        Buffers buffers;
        for_parts(tensors, count, blocks, first, last, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
            const OptimizerTensor& t = tensors[i];
            const StepScalars& s = scalars[i];
            for (int64_t block = begin; block < end; ++block) {
                const Block b = block_of(t, block, rule);
                float* p = weights_of(b, t.weight, s, buffers);
                update(b, p, gradients_of(b, t.g_dtype, p, s, buffers), rule.nesterov != 0, s, buffers);
                return_weights(b, t.weight, s, p);
            }
        });
    });
    return true;
}

double global_norm(const OptimizerTensor* tensors, int64_t count, int threads) {
    const auto chunks_of = [](const OptimizerTensor& t) { return parts_of(t.size, NORM_CHUNK); };
    std::vector<double> squares(static_cast<size_t>(all_parts(tensors, count, chunks_of)));
    const auto chunks = static_cast<int64_t>(squares.size());
    share(chunks, NORM_CHUNK, threads, [&](int64_t first, int64_t last) {
        for_parts(tensors, count, chunks_of, first, last, [&](int64_t i, int64_t begin, int64_t end, int64_t start) {
            for (int64_t chunk = begin; chunk < end; ++chunk) squares[start + chunk] = chunk_squares(tensors[i], chunk);
        });
    });
    // As a thread block does it: every thread its share in order, then halving.
    double sums[NORM_GROUP] = {};
    for (int64_t i = 0; i < chunks; ++i) sums[i % NORM_GROUP] = sums[i % NORM_GROUP] + squares[i];
    for (int64_t half = NORM_GROUP / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
    return sqrt_of(sums[0]);
}

}  // namespace PYEFF_LEVEL
}  // namespace pyeff
