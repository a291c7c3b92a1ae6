// Each row is read once, from the first level of cache where it is needed again, and joins the sum of its chunk there.
#include "cpu/vector_grad.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu/simd.h"

namespace pyeff {
namespace PYEFF_LEVEL {
namespace {

constexpr int64_t STEP = 4 * LANES;

struct Chunk {
    int64_t sample, from, to;
};

struct Chunks {
    std::vector<Chunk> list;
    std::vector<int64_t> first;  // [samples + 1]

    explicit Chunks(const VectorSamples& s) {
        const int64_t rows = s.d == 1 ? SCALAR_CHUNK : VECTOR_CHUNK_ROWS;
        first.push_back(0);
        for (int64_t sample = 0; sample < s.samples; ++sample) {
            for (int64_t t = s.borders[sample]; t < s.borders[sample + 1]; t += rows)
                list.push_back({sample, t, std::min(t + rows, s.borders[sample + 1])});
            first.push_back(static_cast<int64_t>(list.size()));
        }
    }
    int64_t count() const { return static_cast<int64_t>(list.size()); }
};

// Rows are padded to whole steps, so that nothing below minds a tail.
int64_t padded(int64_t d) { return (d + STEP - 1) / STEP * STEP; }

using Buffer = std::unique_ptr<float[]>;
Buffer buffer(int64_t n) { return Buffer(new float[static_cast<size_t>(n)]); }

void widen(const float* p, int64_t d, float* to) { std::memcpy(to, p, sizeof(float) * static_cast<size_t>(d)); }
void widen(const uint16_t* p, int64_t d, float* to) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) store(to + i, load_bf16(p + i));
    for (; i < d; ++i) to[i] = float_of_bf16(p[i]);
}
void narrow(const float* p, int64_t d, float* to) { std::memcpy(to, p, sizeof(float) * static_cast<size_t>(d)); }
void narrow(const float* p, int64_t d, uint16_t* to) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) store_bf16(to + i, load(p + i));
    for (; i < d; ++i) to[i] = bf16_of_float(p[i]);
}

// A row as floats with zeros up to the padding: itself where it is that already, else a copy.
template <class T>
const float* row_at(const VectorRows& rows, int64_t t, int64_t d, float* copy) {
    const T* p = static_cast<const T*>(rows.rows) + t * rows.stride;
    if (std::is_same<T, float>::value && d % STEP == 0) return reinterpret_cast<const float*>(p);
    widen(p, d, copy);
    std::fill(copy + d, copy + padded(d), 0.0f);
    return copy;
}

template <bool SCALE>
PYEFF_LANE F16 term(const float* g, const float* x) {
    return SCALE ? load(g) * load(x) : load(g);
}

// Rows join the sum four at a time, which spares it three of four trips to the cache.
template <class T, bool SCALE>
void sum_chunk(const VectorProblem& p, const Chunk& chunk, float* sum, float* copies) {
    const int64_t d = p.s.d, n = padded(d);
    std::fill(sum, sum + n, 0.0f);
    int64_t t = chunk.from;
    const float *g[4], *x[4];
    for (; t + 4 <= chunk.to; t += 4) {
        for (int i = 0; i < 4; ++i) {
            g[i] = row_at<T>(p.g, t + i, d, copies + i * n);
            x[i] = SCALE ? row_at<T>(p.x, t + i, d, copies + (4 + i) * n) : g[i];
        }
        for (int64_t j = 0; j < n; j += LANES) {
            const F16 front = term<SCALE>(g[0] + j, x[0] + j) + term<SCALE>(g[1] + j, x[1] + j);
            const F16 back = term<SCALE>(g[2] + j, x[2] + j) + term<SCALE>(g[3] + j, x[3] + j);
            store(sum + j, load(sum + j) + (front + back));
        }
    }
    for (; t < chunk.to; ++t) {
        g[0] = row_at<T>(p.g, t, d, copies);
        x[0] = SCALE ? row_at<T>(p.x, t, d, copies + n) : g[0];
        for (int64_t j = 0; j < n; j += LANES) store(sum + j, load(sum + j) + term<SCALE>(g[0] + j, x[0] + j));
    }
}

// Four partial sums of sixteen lanes hide the latency of the addition.
struct Sum {
    F16 lanes[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    void add(int i, F16 x) { lanes[i] = lanes[i] + x; }
    float whole() const { return sum_of((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])); }
};

void add_to(float* sum, const float* x, int64_t n) {
    for (int64_t j = 0; j < n; j += LANES) store(sum + j, load(sum + j) + load(x + j));
}

// Rows of one number that stand side by side are a vector themselves.
template <class T, bool SCALE>
void sum_scalars(const VectorProblem& p, const Chunk& chunk, float* sum, float* copies) {
    const int64_t block = 4 * STEP;
    float *g = copies, *x = SCALE ? copies + block : g;
    Sum whole;
    for (int64_t t = chunk.from; t < chunk.to; t += block) {
        const int64_t n = std::min(block, chunk.to - t);
        widen(static_cast<const T*>(p.g.rows) + t, n, g);
        std::fill(g + n, g + padded(n), 0.0f);
        if (SCALE) widen(static_cast<const T*>(p.x.rows) + t, n, x);
        if (SCALE) std::fill(x + n, x + padded(n), 0.0f);
        for (int64_t j = 0; j < n; j += STEP)
            for (int i = 0; i < 4; ++i) whole.add(i, term<SCALE>(g + j + i * LANES, x + j + i * LANES));
    }
    std::fill(sum, sum + padded(1), 0.0f);
    sum[0] = whole.whole();
}

double square_of(const float* x, int64_t n) {
    double whole = 0.0;
    for (int64_t from = 0; from < n; from += 4096) {
        Sum sum;
        const int64_t end = std::min(from + 4096, n);
        for (int64_t j = from; j < end; j += STEP)
            for (int i = 0; i < 4; ++i) sum.add(i, load(x + j + i * LANES) * load(x + j + i * LANES));
        whole += sum.whole();
    }
    return whole;
}

// The chunks' sums [chunks, padded d] become the samples', each in the row of the sample's first chunk, and the result.
void finish(const VectorSamples& s, const Chunks& chunks, float* sums, const VectorResult& result, int threads) {
    if (!result.wanted()) return;
    const int64_t d = s.d, n = padded(d);
#pragma omp parallel for num_threads(threads) schedule(static) if (chunks.count() * n > 65536)
    for (int64_t sample = 0; sample < s.samples; ++sample) {
        float* sum = sums + chunks.first[sample] * n;
        const bool empty = chunks.first[sample] == chunks.first[sample + 1];
        // Two levels of sums, here and below: one loses the digits of many summands.
        for (int64_t first = chunks.first[sample]; first < chunks.first[sample + 1]; first += 64) {
            float* part = sums + first * n;
            for (int64_t chunk = first + 1; chunk < std::min(first + 64, chunks.first[sample + 1]); ++chunk)
                add_to(part, sums + chunk * n, n);
            if (part != sum) add_to(sum, part, n);
        }
        if (result.norms_sq != nullptr) result.norms_sq[sample] = empty ? 0.0f : static_cast<float>(square_of(sum, n));
        if (result.sums != nullptr) {
            float* to = result.sums + sample * d;
            if (empty)
                std::fill(to, to + d, 0.0f);
            else
                std::copy(sum, sum + d, to);
        }
    }
    if (result.total == nullptr) return;
    const int64_t blocks = n / STEP;
#pragma omp parallel for num_threads(threads) schedule(static) if (s.samples * n > 65536)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = block * STEP;
        alignas(64) float whole[STEP] = {}, part[STEP];
        for (int64_t first = 0; first < s.samples; first += 64) {
            std::fill(part, part + STEP, 0.0f);
            for (int64_t sample = first; sample < std::min(first + 64, s.samples); ++sample) {
                if (chunks.first[sample] == chunks.first[sample + 1]) continue;
                const float* sum = sums + chunks.first[sample] * n + from;
                add_to(part, sum, STEP);
            }
            add_to(whole, part, STEP);
        }
        std::copy(whole, whole + std::min(STEP, d - from), result.total + from);
    }
}

// Calls work(chunk, scratch) for every chunk; scratch holds `rows` padded rows of the thread's own.
template <class Work>
void for_chunks(const Chunks& chunks, int64_t elements, int64_t rows, int64_t n, int threads, const Work& work) {
    // Waking a thread costs as much as some ten thousand elements.
    const int team = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(elements / 16384, 1)));
#pragma omp parallel num_threads(team)
    {
        const Buffer scratch = buffer(rows * n);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < chunks.count(); ++i) work(i, scratch.get());
    }
}

template <class T>
void sum_chunks(const VectorProblem& p, const Chunks& chunks, float* sums, int threads) {
    const int64_t n = padded(p.s.d);
    const bool scalars = p.s.d == 1 && p.g.stride == 1 && (p.x.rows == nullptr || p.x.stride == 1);
    const auto sum = p.x.rows != nullptr ? (scalars ? sum_scalars<T, true> : sum_chunk<T, true>)
                                         : (scalars ? sum_scalars<T, false> : sum_chunk<T, false>);
    for_chunks(chunks, p.s.borders[p.s.samples] * n, 8, n, threads,
               [&](int64_t i, float* copies) { sum(p, chunks.list[i], sums + i * n, copies); });
}

// x - mean in place of x, and the inverse deviation.
template <bool CENTER>
float centre_row(const NormLayerProblem& p, int64_t t, const float* x, float* centred) {
    const int64_t d = p.s.d, n = padded(d);
    const auto by_d = [d](const Sum& sum) { return divide(sum.whole(), static_cast<float>(d)); };
    if (CENTER) {
        float mean;
        if (p.mean != nullptr) {
            mean = p.mean[t];
        } else {
            Sum sum;
            for (int64_t j = 0; j < n; j += STEP)
                for (int i = 0; i < 4; ++i) sum.add(i, load(x + j + i * LANES));
            mean = by_d(sum);
        }
        const F16 lanes = splat(mean);
        for (int64_t j = 0; j < n; j += LANES) store(centred + j, load(x + j) - lanes);
        std::fill(centred + d, centred + n, 0.0f);
        x = centred;
    }
    if (p.rstd != nullptr) return p.rstd[t];
    Sum square;
    for (int64_t j = 0; j < n; j += STEP)
        for (int i = 0; i < 4; ++i) square.add(i, load(x + j + i * LANES) * load(x + j + i * LANES));
    return divide(1.0f, sqrt_of(by_d(square) + p.eps));
}

template <class T, bool CENTER>
void norm_chunk(const NormLayerProblem& p, const float* w, const Chunk& chunk, float* w_sum, float* b_sum,
                float* scratch) {
    const int64_t d = p.s.d, n = padded(d);
    float *g_copy = scratch, *x_copy = scratch + n, *grad = scratch + 2 * n;
    if (w_sum != nullptr) std::fill(w_sum, w_sum + n, 0.0f);
    if (b_sum != nullptr) std::fill(b_sum, b_sum + n, 0.0f);
    for (int64_t t = chunk.from; t < chunk.to; ++t) {
        const float* g = row_at<T>(p.g, t, d, g_copy);
        const float* x = row_at<T>(p.x, t, d, x_copy);
        const float rstd = centre_row<CENTER>(p, t, x, x_copy);
        if (CENTER) x = x_copy;
        const F16 by_rstd = splat(rstd);
        if (p.grad_x != nullptr) {
            Sum along, level;
            for (int64_t j = 0; j < n; j += STEP)
                for (int i = 0; i < 4; ++i) {
                    const F16 inner = load(g + j + i * LANES) * load(w + j + i * LANES);
                    along.add(i, inner * (load(x + j + i * LANES) * by_rstd));
                    if (CENTER) level.add(i, inner);
                }
            const float size = static_cast<float>(d);
            const F16 slope = splat(divide(along.whole(), size));
            const F16 mean = splat(CENTER ? divide(level.whole(), size) : 0.0f);
            T* to = static_cast<T*>(p.grad_x) + t * d;
            // Straight into place where a row needs no padding.
            float* into = std::is_same<T, float>::value && d % STEP == 0 ? reinterpret_cast<float*>(to) : grad;
            for (int64_t j = 0; j < n; j += LANES) {
                const F16 inner = load(g + j) * load(w + j), normed = load(x + j) * by_rstd;
                F16 pulled = inner - normed * slope;
                if (CENTER) pulled = pulled - mean;
                store(into + j, pulled * by_rstd);
                if (w_sum != nullptr) store(w_sum + j, load(w_sum + j) + load(g + j) * normed);
                if (b_sum != nullptr) store(b_sum + j, load(b_sum + j) + load(g + j));
            }
            if (into == grad) narrow(grad, d, to);
        } else {
            for (int64_t j = 0; j < n; j += LANES) {
                if (w_sum != nullptr) store(w_sum + j, load(w_sum + j) + load(g + j) * (load(x + j) * by_rstd));
                if (b_sum != nullptr) store(b_sum + j, load(b_sum + j) + load(g + j));
            }
        }
    }
}

template <class T>
void norm_chunks(const NormLayerProblem& p, const Chunks& chunks, float* w_sums, float* b_sums, int threads) {
    const int64_t d = p.s.d, n = padded(d);
    const Buffer w = buffer(n);
    if (p.w != nullptr)
        std::copy(p.w, p.w + d, w.get());
    else
        std::fill(w.get(), w.get() + d, 1.0f);
    std::fill(w.get() + d, w.get() + n, 0.0f);
    const auto norm = p.center ? norm_chunk<T, true> : norm_chunk<T, false>;
    for_chunks(chunks, p.s.borders[p.s.samples] * n, 3, n, threads, [&](int64_t i, float* scratch) {
        norm(p, w.get(), chunks.list[i], w_sums == nullptr ? nullptr : w_sums + i * n,
             b_sums == nullptr ? nullptr : b_sums + i * n, scratch);
    });
}

}  // namespace

void vector_grad(const VectorProblem& p, int threads) {
    const Chunks chunks(p.s);
    const Buffer sums = buffer(chunks.count() * padded(p.s.d));
    if (p.s.half)
        sum_chunks<uint16_t>(p, chunks, sums.get(), threads);
    else
        sum_chunks<float>(p, chunks, sums.get(), threads);
    finish(p.s, chunks, sums.get(), p.result, threads);
}

void norm_layer_grad(const NormLayerProblem& p, int threads) {
    const Chunks chunks(p.s);
    const int64_t n = chunks.count() * padded(p.s.d);
    const Buffer w_sums = p.weight.wanted() ? buffer(n) : nullptr, b_sums = p.bias.wanted() ? buffer(n) : nullptr;
    if (p.s.half)
        norm_chunks<uint16_t>(p, chunks, w_sums.get(), b_sums.get(), threads);
    else
        norm_chunks<float>(p, chunks, w_sums.get(), b_sums.get(), threads);
    finish(p.s, chunks, w_sums.get(), p.weight, threads);
    finish(p.s, chunks, b_sums.get(), p.bias, threads);
}

}  // namespace PYEFF_LEVEL
}  // namespace pyeff
