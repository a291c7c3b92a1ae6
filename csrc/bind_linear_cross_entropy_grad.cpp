// logit_grads of cpu/linear_cross_entropy_grad.h, by address.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "address.h"
#include "cpu/linear_cross_entropy_grad.h"

namespace py = pybind11;

using pyeff::at;

void bind_linear_cross_entropy_grad(py::module_& m) {
    m.def(
        "logit_grads",
        [](uintptr_t logits, int64_t rows, int64_t columns, int64_t first_class, uintptr_t targets, uintptr_t lse,
           uintptr_t missing, uintptr_t scale, uintptr_t bias, float softcap, int threads) {
            const auto kernel = PYEFF_AT_LEVEL(logit_grads);
            py::gil_scoped_release unlocked;
            kernel(at<float>(logits), rows, columns, first_class,
                   {at<const int64_t>(targets), at<const float>(lse), at<const float>(missing), at<const float>(scale)},
                   at<const float>(bias), softcap, threads);
        },
        py::arg("logits"), py::arg("rows"), py::arg("columns"), py::arg("first_class"), py::arg("targets"),
        py::arg("lse"), py::arg("missing"), py::arg("scale"), py::arg("bias"), py::arg("softcap"), py::arg("threads"));
}
