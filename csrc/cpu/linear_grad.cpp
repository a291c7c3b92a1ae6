// One pass over a panel of per-sample gradients: squares, dots and their sum.
#include "cpu/linear_grad.h"

#include <vector>

#include "cpu/simd.h"

namespace pyeff {
namespace PYEFF_LEVEL {
namespace {

// Four partial sums of sixteen lanes hide the latency of the addition.
struct Sum {
    F16 a = splat(0.0f), b = splat(0.0f), c = splat(0.0f), d = splat(0.0f);
    float whole() const { return sum_of((a + b) + (c + d)); }
};

struct ChunkSums {
    float square, dot;
};

template <bool SQUARE, bool DOT, bool TOTAL, bool START>
PYEFF_LANE void meet(F16 x, const float* r, float* total, F16& square, F16& dot) {
    if (SQUARE) square = square + x * x;
    if (DOT) dot = dot + x * load(r);
    if (TOTAL) store(total, START ? x : load(total) + x);
}

template <bool SQUARE, bool DOT, bool TOTAL, bool START>
ChunkSums sums_of_chunk(const float* x, const float* r, float* total, int64_t n) {
    Sum square, dot;
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        const int64_t j = i + LANES, k = j + LANES, l = k + LANES;
        meet<SQUARE, DOT, TOTAL, START>(load(x + i), r + i, total + i, square.a, dot.a);
        meet<SQUARE, DOT, TOTAL, START>(load(x + j), r + j, total + j, square.b, dot.b);
        meet<SQUARE, DOT, TOTAL, START>(load(x + k), r + k, total + k, square.c, dot.c);
        meet<SQUARE, DOT, TOTAL, START>(load(x + l), r + l, total + l, square.d, dot.d);
    }
    for (; i + LANES <= n; i += LANES) meet<SQUARE, DOT, TOTAL, START>(load(x + i), r + i, total + i, square.a, dot.a);
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        const F16 tail = load_first(x + i, rest, 0.0f);
        if (SQUARE) square.b = square.b + tail * tail;
        if (DOT) dot.b = dot.b + tail * load_first(r + i, rest, 0.0f);
        if (TOTAL)
            for (; i < n; ++i) total[i] = START ? x[i] : total[i] + x[i];
    }
    return {SQUARE ? square.whole() : 0.0f, DOT ? dot.whole() : 0.0f};
}

template <bool SQUARE, bool DOT>
ChunkSums meet_chunk(const float* x, const float* r, float* total, bool start, int64_t n) {
    if (total == nullptr) return sums_of_chunk<SQUARE, DOT, false, false>(x, r, total, n);
    return start ? sums_of_chunk<SQUARE, DOT, true, true>(x, r, total, n)
                 : sums_of_chunk<SQUARE, DOT, true, false>(x, r, total, n);
}

}  // namespace

void reduce_panel(const SamplePanel& p, int threads) {
    const int64_t chunks = (p.elements + GRAD_CHUNK - 1) / GRAD_CHUNK;
    std::vector<ChunkSums> sums(static_cast<size_t>(chunks * p.samples));
    const bool squares = p.norms_sq != nullptr, has_dots = p.dots != nullptr;
    const auto reduce = squares ? (has_dots ? meet_chunk<true, true> : meet_chunk<true, false>)
                                : (has_dots ? meet_chunk<false, true> : meet_chunk<false, false>);
    // A chunk of the total takes all samples in their order; without it every one is on its own.
    const int64_t together = p.total == nullptr ? 1 : p.samples;
    const int64_t tasks = p.samples == 0 ? 0 : chunks * (p.samples / together);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t chunk = task % chunks, first = task / chunks * together;
        const int64_t from = chunk * GRAD_CHUNK;
        const int64_t n = p.elements - from < GRAD_CHUNK ? p.elements - from : GRAD_CHUNK;
        float* total = p.total == nullptr ? nullptr : p.total + from;  // stays in the first level of cache
        for (int64_t s = first; s < first + together; ++s) {
            const float* x = p.panel + s * p.elements + from;
            const float* r = has_dots ? p.reference + s * p.reference_stride + from : x;
            sums[chunk * p.samples + s] = reduce(x, r, total, p.start_total && s == 0, n);
        }
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t s = 0; s < p.samples; ++s) {
            if (squares) p.norms_sq[s] += sums[chunk * p.samples + s].square;
            if (has_dots) p.dots[s] += sums[chunk * p.samples + s].dot;
        }
}

}  // namespace PYEFF_LEVEL
}  // namespace pyeff
