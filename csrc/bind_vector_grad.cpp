// vector_grad and norm_layer_grad of cpu/vector_grad.h, by address.
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

#include "address.h"
#include "cpu/vector_grad.h"

namespace py = pybind11;

namespace {

using pyeff::at;

pyeff::VectorRows rows_at(const py::tuple& rows) {
    return {at<const void>(rows[0].cast<uintptr_t>()), rows[1].cast<int64_t>()};
}

pyeff::VectorResult result_at(const py::tuple& r) {
    return {at<float>(r[0].cast<uintptr_t>()), at<float>(r[1].cast<uintptr_t>()), at<float>(r[2].cast<uintptr_t>())};
}

}  // namespace

// Rows come as (address, stride), results as the addresses (total, norms_sq, sums).
void bind_vector_grad(py::module_& m) {
    m.def(
        "vector_grad",
        [](const py::tuple& grad_outputs, const py::tuple& inputs, bool half, uintptr_t borders, int64_t samples,
           int64_t d, const py::tuple& result, int threads) {
            const auto kernel = PYEFF_AT_LEVEL(vector_grad);
            const pyeff::VectorProblem problem{{at<const int64_t>(borders), samples, d, half},
                                               rows_at(grad_outputs),
                                               rows_at(inputs),
                                               result_at(result)};
            py::gil_scoped_release unlocked;
            kernel(problem, threads);
        },
        py::arg("grad_outputs"), py::arg("inputs"), py::arg("half"), py::arg("borders"), py::arg("samples"),
        py::arg("d"), py::arg("result"), py::arg("threads"));
    m.def(
        "norm_layer_grad",
        [](const py::tuple& grad_outputs, const py::tuple& inputs, bool half, uintptr_t borders, int64_t samples,
           int64_t d, uintptr_t weight, uintptr_t mean, uintptr_t rstd, float eps, bool center, uintptr_t input_grad,
           const py::tuple& weight_result, const py::tuple& bias_result, int threads) {
            const auto kernel = PYEFF_AT_LEVEL(norm_layer_grad);
            const pyeff::NormLayerProblem problem{{at<const int64_t>(borders), samples, d, half},
                                                  rows_at(grad_outputs),
                                                  rows_at(inputs),
                                                  at<const float>(weight),
                                                  at<const float>(mean),
                                                  at<const float>(rstd),
                                                  eps,
                                                  center,
                                                  at<void>(input_grad),
                                                  result_at(weight_result),
                                                  result_at(bias_result)};
            py::gil_scoped_release unlocked;
            kernel(problem, threads);
        },
        py::arg("grad_outputs"), py::arg("inputs"), py::arg("half"), py::arg("borders"), py::arg("samples"),
        py::arg("d"), py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("eps"), py::arg("center"),
        py::arg("input_grad"), py::arg("weight_result"), py::arg("bias_result"), py::arg("threads"));
}
