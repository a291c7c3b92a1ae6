#include <pybind11/pybind11.h>

#include <cstdint>

#include "address.h"
#include "cpu/sketch_grads.h"

namespace py = pybind11;

using pyeff::at;

void bind_sketch_grads(py::module_& m) {
    m.def(
        "sketch_grads",
        [](uintptr_t x, bool bf16, int64_t samples, int64_t rows, int64_t columns, int64_t sample_stride,
           int64_t row_stride, int64_t first_row, uint64_t key, int64_t dim, float scale, uintptr_t exp_avg,
           uintptr_t exp_avg_sq, float keep_first, float take_first, float keep_second, float take_second, float eps,
           uintptr_t out, int threads) {
            const auto kernel = PYEFF_AT_LEVEL(sketch_grads);
            py::gil_scoped_release unlocked;
            kernel({at<const void>(x),
                    bf16,
                    samples,
                    rows,
                    columns,
                    sample_stride,
                    row_stride,
                    first_row,
                    key,
                    dim,
                    scale,
                    {at<const float>(exp_avg), at<const float>(exp_avg_sq), keep_first, take_first, keep_second,
                     take_second, eps},
                    at<float>(out)},
                   threads);
        },
        py::arg("x"), py::arg("bf16"), py::arg("samples"), py::arg("rows"), py::arg("columns"),
        py::arg("sample_stride"), py::arg("row_stride"), py::arg("first_row"), py::arg("key"), py::arg("dim"),
        py::arg("scale"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("keep_first"), py::arg("take_first"),
        py::arg("keep_second"), py::arg("take_second"), py::arg("eps"), py::arg("out"), py::arg("threads"));
}
