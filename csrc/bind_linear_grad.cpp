#include <pybind11/pybind11.h>

#include <cstdint>

#include "address.h"
#include "cpu/linear_grad.h"

namespace py = pybind11;

using pyeff::at;

void bind_linear_grad(py::module_& m) {
    m.def(
        "reduce_panel",
        [](uintptr_t panel, int64_t samples, int64_t elements, uintptr_t reference, int64_t reference_stride,
           uintptr_t total, bool start_total, uintptr_t norms_sq, uintptr_t dots, int threads) {
            const auto kernel = PYEFF_AT_LEVEL(reduce_panel);
            py::gil_scoped_release unlocked;
            kernel({at<const float>(panel), samples, elements, at<const float>(reference), reference_stride,
                    at<float>(total), start_total, at<double>(norms_sq), at<double>(dots)},
                   threads);
        },
        py::arg("panel"), py::arg("samples"), py::arg("elements"), py::arg("reference"), py::arg("reference_stride"),
        py::arg("total"), py::arg("start_total"), py::arg("norms_sq"), py::arg("dots"), py::arg("threads"));
}
