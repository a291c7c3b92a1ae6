// meet_logits and finish_scores of cpu/linear_cross_entropy_scores.h, by address.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "address.h"
#include "cpu/linear_cross_entropy_scores.h"

namespace py = pybind11;

using pyeff::at;

void bind_linear_cross_entropy_scores(py::module_& m) {
    using pyeff::ScoreState;
    m.attr("SCORE_STATE_BYTES") = sizeof(ScoreState);
    m.def(
        "meet_logits",
        [](uintptr_t logits, int64_t rows, int64_t columns, int64_t first_class, uintptr_t targets, uintptr_t bias,
           float softcap, uintptr_t states, int threads) {
            const auto kernel = PYEFF_AT_LEVEL(meet_logits);
            py::gil_scoped_release unlocked;
            kernel(at<float>(logits), rows, columns, first_class, at<const int64_t>(targets), at<const float>(bias),
                   softcap, at<ScoreState>(states), threads);
        },
        py::arg("logits"), py::arg("rows"), py::arg("columns"), py::arg("first_class"), py::arg("targets"),
        py::arg("bias"), py::arg("softcap"), py::arg("states"), py::arg("threads"));
    m.def(
        "finish_scores",
        [](uintptr_t states, uintptr_t hidden_norms, int64_t rows, bool one_class, uintptr_t scores,
           int64_t score_stride) {
            const auto kernel = PYEFF_AT_LEVEL(finish_scores);
            py::gil_scoped_release unlocked;
            kernel(at<const ScoreState>(states), at<const float>(hidden_norms), rows, one_class, at<float>(scores),
                   score_stride);
        },
        py::arg("states"), py::arg("hidden_norms"), py::arg("rows"), py::arg("one_class"), py::arg("scores"),
        py::arg("score_stride"));
}
