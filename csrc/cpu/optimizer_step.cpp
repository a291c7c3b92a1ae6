// Consecutive blocks of a tensor are taken through passes while they lie in the first level of cache: gradients and
// weights to fp32 where they are not, the step, weights back to bf16, and moments to codes once the scales are known.
// Each byte of memory is read once and written once.
#include "cpu/optimizer_step.h"

#include <algorithm>
#include <vector>

#include "cpu/optimizer_lanes.h"

namespace pyeff {
namespace PYEFF_LEVEL {
namespace {

constexpr int64_t LARGEST_BLOCK = 2048;
// A block is coded when its last element has been updated and its largest moments are known, some 80 cycles later.
// Blocks are taken in runs of so many elements, updated one after the other and then coded, so that this is waited for
// once a run.
constexpr int64_t RUN = 1024, MOST_BLOCKS = 16;

// The largest magnitude, as an integer: that puts Inf above all numbers and NaN above Inf.
struct Largest {
    U16 lanes = splat(0u);
    uint32_t rest = 0;
    PYEFF_INLINE void see(F16 x) { lanes = max_of(bits_of(abs_of(x)), lanes); }
    PYEFF_INLINE void see(float x) { rest = max_of(bits_of(abs_of(x)), rest); }
    // Of a number that is not below zero, or NaN with any sign.
    PYEFF_INLINE void see_positive(F16 x) { lanes = max_of(bits_of(x), lanes); }
    PYEFF_INLINE void see_positive(float x) { rest = max_of(bits_of(x), rest); }
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

// Consecutive blocks of one tensor: addresses moved to their start.
struct Run {
    int64_t n, blocks, index;  // elements, blocks, and the number of the first block in its parameter
    void* p;
    const void* g;
    void *first, *second, *master;
    float *first_scales, *second_scales;
    int64_t starts[MOST_BLOCKS + 1];
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

// Weights in bf16 with what stands beside them, in one block where they are rounded at random.
constexpr bool at_random(int64_t weight) { return weight == WEIGHT_STOCHASTIC || weight == WEIGHT_ECC8; }

template <int64_t WEIGHT>
struct Halves {
    uint16_t* p;
    uint8_t* errors;
    uint64_t key = 0;
    int64_t start = 0;
    U16 counts = splat(0u);

    explicit Halves(const Run& r) : p(static_cast<uint16_t*>(r.p)), errors(static_cast<uint8_t*>(r.master)) {}
    void enter(int64_t block, const Run& r, const StepScalars& s) {
        key = random_key(s, r.index + block);
        start = r.starts[block];
        counts = random_count(lane_numbers(), key);
    }
    PYEFF_INLINE U16 count(int64_t i, U16) const {
        return random_count_after(counts, static_cast<uint32_t>(i - start));
    }
    PYEFF_INLINE uint32_t count(int64_t i, uint32_t) const {
        return random_count(static_cast<uint32_t>(i - start), key);
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
            keep_high_half(p + i, rounded_at_random(x, random_bits(count(i, u), key)));
        } else if constexpr (WEIGHT == WEIGHT_ECC8) {
            U half = u, error = u;
            split_in_24_bits(x, random_bits(count(i, u), key), half, error);
            keep_half(p + i, half);
            keep_byte(errors + i, error);
        } else {
            keep_high_half(p + i, rounded_to_nearest(x));
        }
    }
};

template <int64_t WEIGHT>
void widen(const Run& r, float* to) {
    const Halves<WEIGHT> halves(r);
    for_lanes(0, r.n, [&](int64_t i, auto, auto u) PYEFF_INLINE { keep(to + i, halves.weight(i, u)); });
}

template <int64_t WEIGHT>
void narrow(const Run& r, const StepScalars& s, const float* from) {
    Halves<WEIGHT> halves(r);
    const auto keep_weights = [&](int64_t begin, int64_t end) PYEFF_INLINE {
        for_lanes(begin, end,
                  [&](int64_t i, auto f, auto u) PYEFF_INLINE { halves.keep_weight(i, load_like(from + i, f), u); });
    };
    if (!at_random(WEIGHT)) return keep_weights(0, r.n);
    for (int64_t block = 0; block < r.blocks; ++block) {
        halves.enter(block, r, s);
        keep_weights(r.starts[block], r.starts[block + 1]);
    }
}

float* weights_of(const Run& r, int64_t weight, Buffers& buffers) {
    if (weight == WEIGHT_FLOAT32) return static_cast<float*>(r.p);
    if (weight == WEIGHT_MASTER) return static_cast<float*>(r.master);
    (weight == WEIGHT_ECC8 ? &widen<WEIGHT_ECC8> : &widen<WEIGHT_NEAREST>)(r, buffers.p);
    return buffers.p;
}

void return_weights(const Run& r, int64_t weight, const StepScalars& s, const float* from) {
    if (weight == WEIGHT_STOCHASTIC)
        narrow<WEIGHT_STOCHASTIC>(r, s, from);
    else if (weight == WEIGHT_ECC8)
        narrow<WEIGHT_ECC8>(r, s, from);
    else if (weight != WEIGHT_FLOAT32)
        narrow<WEIGHT_NEAREST>(r, s, from);
}

const float* gradients_of(const Run& r, int64_t g_dtype, const float* p, const StepScalars& s, Buffers& buffers) {
    const float* g = static_cast<const float*>(r.g);
    if (g_dtype == DTYPE_BFLOAT16) {
        const auto* half = static_cast<const uint16_t*>(r.g);
        for_lanes(0, r.n,
                  [&](int64_t i, auto, auto u) PYEFF_INLINE { keep(buffers.g + i, widened(half_like(half + i, u))); });
        g = buffers.g;
    }
    if (s.clip != 1.0f) {
        for_lanes(0, r.n,
                  [&](int64_t i, auto f, auto) PYEFF_INLINE { keep(buffers.g + i, clipped(load_like(g + i, f), s)); });
        g = buffers.g;
    }
    if (s.l2 != 0.0f) {
        for_lanes(0, r.n, [&](int64_t i, auto f, auto) PYEFF_INLINE {
            keep(buffers.g + i, decayed(load_like(g + i, f), load_like(p + i, f), s));
        });
        g = buffers.g;
    }
    return g;
}

template <int RULE, bool CLAMP>
PYEFF_LANE void encode(const Run& r, int64_t begin, int64_t end, float first_by, float around, float second_by,
                       float offset, const Buffers& buffers) {
    auto* first = static_cast<uint8_t*>(r.first);
    auto* second = static_cast<uint8_t*>(r.second);
    for_lanes(begin, end, [&](int64_t i, auto f, auto u) PYEFF_INLINE {
        auto moment = load_like(buffers.first + i, f) * broadcast(first_by, f);
        if (CLAMP) moment = clamped(moment, LARGEST_CODED);
        if (RULE != RULE_ADAM) {
            keep_byte(first + i, encode_signed(moment, around, u));
            return;
        }
        auto root = load_like(buffers.second + i, f) * broadcast(second_by, f);
        if (CLAMP) root = clamped(root, 1.0f);
        keep_bytes(first + i, encode_signed(moment, around, u), second + i, encode_root(root, offset, u));
    });
}

template <int RULE>
__attribute__((noinline)) void encode_nonfinite(const Run& r, int64_t begin, int64_t end, float first_by, float around,
                                                float second_by, float offset, const Buffers& buffers) {
    encode<RULE, true>(r, begin, end, first_by, around, second_by, offset, buffers);
}

// The bits of the largest moment and of the largest root of a block.
struct LargestBits {
    uint32_t first, root;
};

template <int RULE>
PYEFF_LANE LargestBits update_block(const Run& r, int64_t block, float* p, const float* g, bool nesterov,
                                    const StepScalars& s, Buffers& buffers) {
    const auto* first = static_cast<const uint8_t*>(r.first);
    const auto* second = static_cast<const uint8_t*>(r.second);
    const float by_first = first_factor<RULE>(r.first_scales[block], s);
    const float by_second = RULE == RULE_ADAM ? root_factor(r.second_scales[block], s) : 0.0f;
    Largest largest_first, largest_root;
    int64_t begin = r.starts[block];
    const int64_t end = r.starts[block + 1];
    if (RULE == RULE_ADAM) {
        // The divider changes between roots and quotients at a cost, and what comes before them has few places to wait
        // in: so two of each, while the two moments after them are decoded.
        const auto moments = [&](int64_t i) PYEFF_INLINE {
            const F16 first_moment = decode_signed(load_high_u8(first + i), splat(by_first));
            return adam_moments<true>(load(g + i), first_moment, decode_root(load_u8(second + i), splat(by_second)), s);
        };
        const auto finish = [&](int64_t i, Moments<F16> m, F16 root, F16 inverse) PYEFF_INLINE {
            store(p + i, adam_stepped(load(p + i), m.mean, inverse, s));
            store(buffers.first + i, m.mean);
            store(buffers.second + i, root);
            largest_first.see(m.mean);
            largest_root.see_positive(root);
        };
        if (begin + 2 * LANES <= end) {
            Moments<F16> one = moments(begin), two = moments(begin + LANES);
            while (begin + 2 * LANES <= end) {
                const int64_t i = begin;
                begin += 2 * LANES;
                F16 root, other_root, inverse, other_inverse;
                roots_and_inverses(one.square, two.square, splat(s.eps), root, other_root, inverse, other_inverse);
                const Moments<F16> now = one, then = two;
                if (begin + 2 * LANES <= end) {
                    one = moments(begin);
                    two = moments(begin + LANES);
                }
                finish(i, now, root, inverse);
                finish(i + LANES, then, other_root, other_inverse);
            }
        }
    }
    for_lanes(begin, end, [&](int64_t i, auto f, auto u) PYEFF_INLINE {
        const auto moment = decode_signed(high_byte_like(first + i, u), broadcast(by_first, f));
        auto root = f;
        if (RULE == RULE_ADAM) root = decode_root(byte_like(second + i, u), broadcast(by_second, f));
        const auto lane = updated<RULE, true>(load_like(p + i, f), load_like(g + i, f), moment, root, nesterov, s);
        keep(p + i, lane.p);
        keep(buffers.first + i, lane.first);
        largest_first.see(lane.first);
        if (RULE == RULE_ADAM) {
            keep(buffers.second + i, lane.second);
            largest_root.see_positive(lane.second);
        }
    });
    return {largest_first.bits(), largest_root.bits()};
}

template <int RULE>
void update_coded(const Run& r, float* p, const float* g, bool nesterov, const StepScalars& shared, Buffers& buffers) {
    const StepScalars s = shared;  // no store can change them
    LargestBits largest[MOST_BLOCKS];
    for (int64_t block = 0; block < r.blocks; ++block)
        largest[block] = update_block<RULE>(r, block, p, g, nesterov, s, buffers);
    for (int64_t block = 0; block < r.blocks; ++block) {
        const int64_t begin = r.starts[block], end = r.starts[block + 1];
        const bool finite = max_of(largest[block].first, largest[block].root) < BITS_OF_INFINITY;
        if (RULE == RULE_ADAM && !finite) {
            for (int64_t i = begin; i < end; ++i) buffers.first[i] = beside_root(buffers.first[i], buffers.second[i]);
        }
        const auto scaled_to = [&](uint32_t bits, const float* moments) {
            return finite ? float_of_bits(bits) : largest_finite(moments + begin, end - begin);
        };
        float& scale = r.first_scales[block];
        scale = first_scale(scaled_to(largest[block].first, buffers.first), s);
        float root_by = 0.0f, offset = 0.0f;
        if (RULE == RULE_ADAM) {
            r.second_scales[block] = root_scale(scaled_to(largest[block].root, buffers.second), s);
            root_by = root_divisor(r.second_scales[block], s);
            offset = root_offset(s, r.index + block);
        }
        const float first_by = first_divisor(scale, s), around = first_offset(s, r.index + block);
        if (finite)
            encode<RULE, false>(r, begin, end, first_by, around, root_by, offset, buffers);
        else
            encode_nonfinite<RULE>(r, begin, end, first_by, around, root_by, offset, buffers);
    }
}

template <int RULE>
void update_float(const Run& r, float* p, const float* g, bool nesterov, const StepScalars& shared, Buffers&) {
    auto* first = static_cast<float*>(r.first);
    auto* second = static_cast<float*>(r.second);
    const StepScalars s = shared;
    for_lanes(0, r.n, [&](int64_t i, auto f, auto u) PYEFF_INLINE {
        auto square = f;
        if (RULE == RULE_ADAM) square = load_like(second + i, f);
        const auto lane = updated<RULE, false>(load_like(p + i, f), load_like(g + i, f), load_like(first + i, f),
                                               square, nesterov, s);
        keep(p + i, lane.p);
        keep(first + i, lane.first);
        if (RULE == RULE_ADAM) keep(second + i, lane.second);
    });
}

using Update = void (*)(const Run&, float*, const float*, bool, const StepScalars&, Buffers&);

Update update_of(const OptimizerRule& rule) {
    switch (rule.rule) {
        case RULE_ADAM: return rule.coded ? &update_coded<RULE_ADAM> : &update_float<RULE_ADAM>;
        case RULE_LION: return rule.coded ? &update_coded<RULE_LION> : &update_float<RULE_LION>;
        default: return rule.coded ? &update_coded<RULE_SGD> : &update_float<RULE_SGD>;
    }
}

int64_t blocks_of(const OptimizerTensor& t, int64_t block_size) {
    return t.row == t.size ? parts_of(t.size, block_size) : t.size / t.row * parts_of(t.row, block_size);
}

// The blocks from `block` on, before `last`, that make a run.
Run run_of(const OptimizerTensor& t, int64_t block, int64_t last, const OptimizerRule& rule) {
    const int64_t in_row = parts_of(t.row, rule.block_size), row = block / in_row;
    const int64_t at = row * t.row + block % in_row * rule.block_size;
    const int64_t state_bytes = rule.coded ? 1 : 4;
    const auto moved = [&](int64_t address, int64_t bytes) {
        return address ? reinterpret_cast<char*>(address) + at * bytes : nullptr;
    };
    Run r = {0,
             0,
             t.first_block + block,
             moved(t.p, t.weight == WEIGHT_FLOAT32 ? 4 : 2),
             moved(t.g, t.g_dtype == DTYPE_FLOAT32 ? 4 : 2),
             moved(t.first, state_bytes),
             moved(t.second, state_bytes),
             moved(t.master, t.weight == WEIGHT_MASTER ? 4 : 1),
             reinterpret_cast<float*>(t.first_scale) + block,
             reinterpret_cast<float*>(t.second_scale) + block,
             {}};
    const int64_t most = std::min(MOST_BLOCKS, last - block), longest = std::max(RUN, rule.block_size);
    int64_t row_end = (row + 1) * t.row - at;
    while (r.blocks < most) {
        const int64_t size = std::min(rule.block_size, row_end - r.n);
        if (r.n + size > longest) break;
        r.n += size;
        r.starts[++r.blocks] = r.n;
        if (r.n == row_end) row_end += t.row;
    }
    return r;
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
            for (int64_t block = begin; block < end;) {
                const Run r = run_of(t, block, end, rule);
                float* p = weights_of(r, t.weight, buffers);
                update(r, p, gradients_of(r, t.g_dtype, p, s, buffers), rule.nesterov != 0, s, buffers);
                return_weights(r, t.weight, s, p);
                block += r.blocks;
            }
        });
    });
    return true;
}

}  // namespace PYEFF_LEVEL
}  // namespace pyeff
