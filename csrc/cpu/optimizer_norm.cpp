#include <cmath>
#include <vector>

#include "cpu/optimizer_lanes.h"
#include "cpu/optimizer_step.h"

namespace pyeff {
namespace PYEFF_LEVEL {
namespace {

constexpr int64_t NORM_CHUNK = 4096, NORM_GROUP = 256;  // as in csrc/cuda/optimizer_step.cu

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
        for_lanes(0, n,
                  [&](int64_t i, auto, auto u) PYEFF_INLINE { keep(buffer + i, widened(half_like(half + i, u))); });
        g = buffer;
    }
    const double sum = n == NORM_CHUNK ? fast_squares(g) : squares_of<float>(g, n);
    // A square of a finite gradient may be beyond fp32, and is never beyond double.
    return sum <= LARGEST_FLOAT ? sum : squares_of<double>(g, n);
}

}  // namespace

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
