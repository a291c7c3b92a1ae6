// Sketches of many samples' matrices in one read of them.
#include "cpu/sketch_grads.h"

#include <algorithm>
#include <vector>

#include "common/sketch.h"
#include "cpu/simd.h"

namespace pyeff {
namespace PYEFF_LEVEL {
namespace {

// A part is what one thread sums into a sketch of its own: results do not depend on the number of threads.
constexpr int64_t PART_ELEMENTS = 1 << 17, MOST_PARTS = 16;
PYEFF_LANE F16 load_lanes(const float* p, int n) { return n == LANES ? load(p) : load_first(p, n, 0.0f); }
PYEFF_LANE F16 load_lanes(const uint16_t* p, int n) {
    if (n == LANES) return load_bf16(p);
    alignas(64) uint16_t lanes[LANES] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load_bf16(lanes);
}

// The map's numbers for one vector.
struct MapLanes {
    F16 keep_first, take_first, keep_second, take_second, eps;
};

PYEFF_LANE F16 step_of(F16 g, const SketchMap& map, const MapLanes& lanes, int64_t at, int n) {
    F16 numerator = lanes.take_first * g;
    if (map.exp_avg != nullptr) numerator = lanes.keep_first * load_lanes(map.exp_avg + at, n) + numerator;
    const F16 second = lanes.keep_second * load_lanes(map.exp_avg_sq + at, n) + lanes.take_second * (g * g);
    const F16 step = divide(numerator, sqrt_of(second) + lanes.eps);
    if (n == LANES) return step;
    alignas(64) float kept[LANES];  // what lies beyond the columns is 0 / eps, or worse
    store(kept, step);
    return load_first(kept, n, 0.0f);
}

// The signs of the rows of a group in turn: bit 0 moves to the place of the sign, and the next one to bit 0.
PYEFF_LANE F16 signed_by(F16 x, U16& words) {
    const U16 sign = words << 31;
    words = words >> 1;
    return float_of_bits(bits_of(x) ^ sign);
}

// Rows row..end of one group of signs, VECTORS of their vectors at a time, whose words stay in registers: each row is a
// read, a sign and an addition. The last vector has `last` lanes.
template <class T, bool MAPPED, int VECTORS, bool WHOLE>
PYEFF_LANE void sketch_rows_of(const SketchTask& t, const T* x, const MapLanes& lanes, int64_t row, int64_t end,
                               int64_t column, int last, int64_t cell_columns, U16 count, float* target) {
    const SketchRow base = sketch_row(t.key, SKETCH_SIGNS, static_cast<uint64_t>(row / SKETCH_SIGN_ROWS));
    U16 words[VECTORS];
    for (int i = 0; i < VECTORS; ++i)
        words[i] = sketch_word(base, count + splat(static_cast<uint32_t>(column + i * LANES))) >>
                   static_cast<int>(row % SKETCH_SIGN_ROWS);
    const T* source = x + (row - t.first_row) * t.row_stride + column;
    int64_t at = (row - t.first_row) * t.columns + column;
    for (int64_t r = row; r < end; ++r, source += t.row_stride, target += cell_columns, at += t.columns)
        for (int i = 0; i < VECTORS; ++i) {
            const int n = WHOLE ? LANES : last;
            F16 value = load_lanes(source + i * LANES, n);
            if (MAPPED) value = step_of(value, t.map, lanes, at + i * LANES, n);
            float* sum = target + i * LANES;
            add_to(sum, signed_by(value, words[i]));
        }
}

// One sample's cells from..to, added to `sums`. The words are formed anew for each sample: twenty operations for 512
// elements, while the sums of one sample stay in the first level of cache and its elements come as one stream.
template <class T, bool MAPPED>
void sketch_part(const SketchTask& t, const T* x, int64_t from, int64_t to, float* sums) {
    const SketchCell cell = sketch_cell(t.dim);
    const int64_t last = t.first_row + t.rows;
    const MapLanes lanes{splat(t.map.keep_first), splat(t.map.take_first), splat(t.map.keep_second),
                         splat(t.map.take_second), splat(t.map.eps)};
    alignas(64) float counted[LANES];
    for (uint32_t i = 0; i < LANES; ++i) counted[i] = float_of_bits(i);
    const U16 count = bits_of(load(counted));
    const int64_t across = (t.columns + cell.columns - 1) / cell.columns;
    for (int64_t index = from; index < to; ++index) {
        const int64_t i_row = t.first_row / cell.rows + index / across, i_column = index % across;
        const int64_t begin = i_row * cell.rows, column = i_column * cell.columns;
        const int64_t end = std::min(begin + cell.rows, last);
        const int64_t width = std::min(cell.columns, t.columns - column);
        const int64_t rotation =
            sketch_rotation(t.key, static_cast<uint64_t>(i_row), static_cast<uint32_t>(i_column), t.dim);
        for (int64_t row = std::max(begin, t.first_row), stop; row < end; row = stop) {
            stop = std::min(end, (row / SKETCH_SIGN_ROWS + 1) * SKETCH_SIGN_ROWS);
            float* target = sums + rotation + (row - begin) * cell.columns;
            if (width == SKETCH_COLUMNS) {
                sketch_rows_of<T, MAPPED, SKETCH_COLUMNS / LANES, true>(t, x, lanes, row, stop, column, LANES,
                                                                        cell.columns, count, target);
                continue;
            }
            for (int64_t c = 0; c < width; c += LANES)
                sketch_rows_of<T, MAPPED, 1, false>(t, x, lanes, row, stop, column + c,
                                                    static_cast<int>(std::min<int64_t>(LANES, width - c)), cell.columns,
                                                    count, target + c);
        }
    }
}

}  // namespace

void sketch_grads(const SketchTask& t, int threads) {
    if (t.samples == 0 || t.rows == 0 || t.columns == 0) return;
    const SketchCell cell = sketch_cell(t.dim);
    const int64_t cells_down = (t.first_row + t.rows - 1) / cell.rows - t.first_row / cell.rows + 1;
    const int64_t cells = cells_down * ((t.columns + cell.columns - 1) / cell.columns);
    const int64_t parts = std::max<int64_t>(1, std::min({MOST_PARTS, t.rows * t.columns / PART_ELEMENTS, cells}));
    // A cell is added without a look at where the sketch ends: what goes beyond is brought round afterwards.
    const int64_t wide = t.dim + cell.rows * cell.columns + LANES;
    std::vector<float> sums(static_cast<size_t>(parts * t.samples * wide), 0.0f);
    const bool mapped = t.map.exp_avg_sq != nullptr;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < t.samples * parts; ++task) {
        const int64_t s = task / parts, part = task % parts;
        const int64_t from = cells * part / parts, to = cells * (part + 1) / parts;
        float* target = sums.data() + task * wide;
        const float* x = static_cast<const float*>(t.x) + s * t.sample_stride;
        const uint16_t* h = static_cast<const uint16_t*>(t.x) + s * t.sample_stride;
        if (t.bf16)
            mapped ? sketch_part<uint16_t, true>(t, h, from, to, target)
                   : sketch_part<uint16_t, false>(t, h, from, to, target);
        else
            mapped ? sketch_part<float, true>(t, x, from, to, target)
                   : sketch_part<float, false>(t, x, from, to, target);
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t s = 0; s < t.samples; ++s) {
        float* all = sums.data() + s * parts * wide;
        for (int64_t part = 1; part < parts; ++part) {
            const float* other = all + part * wide;
            for (int64_t j = 0; j < wide; ++j) all[j] += other[j];
        }
        for (int64_t j = t.dim; j < wide - LANES; ++j) all[j - t.dim] += all[j];
        float* out = t.out + s * t.dim;
        for (int64_t j = 0; j < t.dim; ++j) out[j] += t.scale * all[j];
    }
}

}  // namespace PYEFF_LEVEL
}  // namespace pyeff
