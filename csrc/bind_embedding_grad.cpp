// embedding_grad of cpu/embedding_grad.h, by address.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "address.h"
#include "cpu/embedding_grad.h"

namespace py = pybind11;

using pyeff::at;

void bind_embedding_grad(py::module_& m) {
    m.def(
        "embedding_grad",
        [](uintptr_t index, uintptr_t order, int64_t tokens, uintptr_t grad_outputs, int64_t stride, int64_t d,
           bool half, uintptr_t borders, int64_t samples, int64_t padding_idx, uintptr_t weight_grad,
           uintptr_t norms_sq, int threads) {
            const auto kernel = PYEFF_AT_LEVEL(embedding_grad);
            py::gil_scoped_release unlocked;
            kernel({at<const int64_t>(index), at<const int64_t>(order), tokens, at<const void>(grad_outputs), stride, d,
                    half, at<const int64_t>(borders), samples, padding_idx, at<void>(weight_grad), at<float>(norms_sq)},
                   threads);
        },
        py::arg("index"), py::arg("order"), py::arg("tokens"), py::arg("grad_outputs"), py::arg("stride"), py::arg("d"),
        py::arg("half"), py::arg("borders"), py::arg("samples"), py::arg("padding_idx"), py::arg("weight_grad"),
        py::arg("norms_sq"), py::arg("threads"));
}
