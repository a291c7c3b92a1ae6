// The hash and the geometry of pyeff.Sketch, version 1: docs/sketches.md defines them, reference/sketch_grads.py states
// them in torch and triton_kernels/sketch_grads.py in Triton. Integers only, so all of them give the same bits.
#pragma once
#include <cstdint>

#include "common/lane.h"

namespace pyeff {

// Elements of a cell at most: 128 rows of 64 columns.
constexpr int64_t SKETCH_CELL = 8192, SKETCH_COLUMNS = 64;
// Rows that share a word of signs, one bit each.
constexpr int64_t SKETCH_SIGN_ROWS = 32;
// What a hash is for.
enum : uint32_t { SKETCH_SIGNS = 0, SKETCH_ROTATIONS = 1 };

// A bijection of 32 bits (Wellons' lowbias32).
template <class U>
PYEFF_LANE U mixed(U x) {
    x = x ^ (x >> 16);
    x = x * broadcast(uint32_t{0x7feb352d}, x);
    x = x ^ (x >> 15);
    x = x * broadcast(uint32_t{0x846ca68b}, x);
    return x ^ (x >> 16);
}

// What all hashes of one row of words share: 64 bits, so that two rows have the same words with probability 2^-64.
struct SketchRow {
    uint32_t first, second;
};

PYEFF_LANE SketchRow sketch_row(uint64_t key, uint32_t purpose, uint64_t row) {
    const uint32_t low = static_cast<uint32_t>(row), high = static_cast<uint32_t>(row >> 32);
    const uint32_t a = static_cast<uint32_t>(key), b = static_cast<uint32_t>(key >> 32);
    return {mixed(mixed(mixed(low ^ a) ^ high) + purpose + b), mixed(mixed(mixed(low + b) ^ high) ^ (a + ~purpose))};
}

template <class U>
PYEFF_LANE U sketch_word(SketchRow row, U column) {
    return mixed(mixed(column ^ broadcast(row.first, column)) + broadcast(row.second, column));
}

// The shape of a cell: as many elements as a power of two not above dim or SKETCH_CELL.
struct SketchCell {
    int64_t rows, columns;
};

PYEFF_LANE SketchCell sketch_cell(int64_t dim) {
    int64_t elements = 1;
    while (2 * elements <= dim && 2 * elements <= SKETCH_CELL) elements *= 2;
    const int64_t columns = elements < SKETCH_COLUMNS ? elements : SKETCH_COLUMNS;
    return {elements / columns, columns};
}

// Where the first element of a cell goes; element (r, c) of it follows r * columns + c later, around the end.
PYEFF_LANE int64_t sketch_rotation(uint64_t key, uint64_t cell_row, uint32_t cell_column, int64_t dim) {
    const uint32_t word = sketch_word(sketch_row(key, SKETCH_ROTATIONS, cell_row), cell_column);
    return static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(dim)) >> 32);
}

}  // namespace pyeff
