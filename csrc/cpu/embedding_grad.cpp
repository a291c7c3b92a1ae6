// Tokens sorted by index are runs, in which those of one sample stand side by side: a row of the table is written by
// the one thread that has its run, and a gradient is read once.
#include "cpu/embedding_grad.h"

#include <algorithm>
#include <vector>

#include "cpu/simd.h"

namespace pyeff {
namespace PYEFF_LEVEL {
namespace {

PYEFF_LANE F16 load_any(const float* p) { return load(p); }
PYEFF_LANE F16 load_any(const uint16_t* p) { return load_bf16(p); }
PYEFF_LANE float load_one(const float* p) { return *p; }
PYEFF_LANE float load_one(const uint16_t* p) { return float_of_bf16(*p); }
PYEFF_LANE void store_any(float* p, F16 x) { store(p, x); }
PYEFF_LANE void store_any(uint16_t* p, F16 x) { store_bf16(p, x); }
PYEFF_LANE void store_one(float* p, float x) { *p = x; }
PYEFF_LANE void store_one(uint16_t* p, float x) { *p = bf16_of_float(x); }

// Columns up to the next whole vector hold zeros.
template <class T>
void add_row(const T* row, int64_t n, float* sum, bool first) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) store(sum + j, first ? load_any(row + j) : load(sum + j) + load_any(row + j));
    for (; j < n; ++j) sum[j] = first ? load_one(row + j) : sum[j] + load_one(row + j);
}

float square_of(const float* x, int64_t n) {
    F16 sum[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    int64_t i = 0;
    for (int64_t j = 0; j < n; j += LANES, i = (i + 1) % 4) sum[i] = sum[i] + load(x + j) * load(x + j);
    return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
void write_row(const float* sum, int64_t n, T* to) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) store_any(to + j, load(sum + j));
    for (; j < n; ++j) store_one(to + j, sum[j]);
}

template <class T>
struct Table {
    const EmbeddingProblem& p;
    const std::vector<int64_t>& sample;  // of each token
    float* squares;                      // [blocks, tokens]: of a sample's sum, at the first token it has in a run

    // Columns [from, from + n) of the run [begin, end).
    void sum_run(int64_t begin, int64_t end, int64_t block) const {
        const int64_t from = block * EMBEDDING_COLUMNS, n = std::min(EMBEDDING_COLUMNS, p.d - from);
        alignas(64) float total[EMBEDDING_COLUMNS], own[EMBEDDING_COLUMNS];
        const int64_t lanes = (n + LANES - 1) / LANES * LANES;
        std::fill(total + n, total + lanes, 0.0f);
        std::fill(own + n, own + lanes, 0.0f);
        const T* g = static_cast<const T*>(p.g) + from;
        for (int64_t i = begin; i < end;) {
            const int64_t s = sample[p.order[i]], first = i;
            // The run of one sample alone is its own total.
            float* sum = first == begin ? total : own;
            for (; i < end && sample[p.order[i]] == s; ++i) add_row(g + p.order[i] * p.stride, n, sum, i == first);
            if (squares != nullptr) squares[block * p.tokens + p.order[first]] = square_of(sum, lanes);
            if (sum == own) add_row(own, n, total, false);
        }
        if (p.table != nullptr) write_row(total, n, static_cast<T*>(p.table) + p.index[begin] * p.d + from);
    }
};

template <class T>
void run(const EmbeddingProblem& p, int threads) {
    const int64_t blocks = (p.d + EMBEDDING_COLUMNS - 1) / EMBEDDING_COLUMNS;
    std::vector<int64_t> sample(static_cast<size_t>(p.tokens)), starts;
    for (int64_t s = 0; s < p.samples; ++s)
        std::fill(sample.begin() + p.borders[s], sample.begin() + p.borders[s + 1], s);
    for (int64_t i = 0; i < p.tokens; ++i)
        if (i == 0 || p.index[i] != p.index[i - 1]) starts.push_back(i);
    const int64_t runs = static_cast<int64_t>(starts.size());
    starts.push_back(p.tokens);
    std::vector<float> squares(p.norms_sq == nullptr ? 0 : static_cast<size_t>(blocks * p.tokens), 0.0f);
    const Table<T> table{p, sample, p.norms_sq == nullptr ? nullptr : squares.data()};
    // Waking a thread costs as much as some ten thousand elements.
    const int team = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(p.tokens * p.d / 16384, 1)));
#pragma omp parallel for num_threads(team) schedule(dynamic, 16)
    for (int64_t i = 0; i < runs; ++i) {
        if (p.index[starts[i]] == p.padding) continue;
        for (int64_t block = 0; block < blocks; ++block) table.sum_run(starts[i], starts[i + 1], block);
    }
    for (int64_t s = 0; p.norms_sq != nullptr && s < p.samples; ++s) {
        double whole = 0.0;
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t t = p.borders[s]; t < p.borders[s + 1]; ++t) whole += squares[block * p.tokens + t];
        p.norms_sq[s] = static_cast<float>(whole);
    }
}

}  // namespace

void embedding_grad(const EmbeddingProblem& p, int threads) {
    if (p.half)
        run<uint16_t>(p, threads);
    else
        run<float>(p, threads);
}

}  // namespace PYEFF_LEVEL
}  // namespace pyeff
