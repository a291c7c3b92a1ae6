#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "address.h"
#include "cpu/optimizer_step.h"
#ifdef PYEFF_CUDA
#include "cuda/optimizer_step.h"
#endif

namespace py = pybind11;

namespace {

using pyeff::at;

// Tables of tensors are int64 memory, a row of these many numbers each.
constexpr int64_t FIELDS = sizeof(pyeff::OptimizerTensor) / sizeof(int64_t);

// (lr, beta1, beta2, eps, weight_decay, dampening, clip_norm, seed, block_size, rule, coded, coupled, nesterov)
pyeff::OptimizerRule rule_of(const py::tuple& r) {
    const auto real = [&r](int i) { return r[i].cast<double>(); };
    const auto flag = [&r](int i) { return r[i].cast<int32_t>(); };
    return {real(0), real(1),  real(2),  real(3), real(4), real(5), real(6), r[7].cast<int64_t>(), r[8].cast<int64_t>(),
            flag(9), flag(10), flag(11), flag(12)};
}

#ifdef PYEFF_CUDA
void raise_if(const std::string& problem, const char* operation) {
    if (!problem.empty()) throw std::runtime_error(std::string(operation) + ": " + problem);
}
#endif

}  // namespace

void bind_optimizer_step(py::module_& m) {
    m.attr("OPTIMIZER_TENSOR_FIELDS") = FIELDS;
    m.attr("OPTIMIZER_SCALARS_BYTES") = sizeof(pyeff::StepScalars);
    m.def(
        "optimizer_step",
        [](uintptr_t tensors, int64_t count, const py::tuple& rule, double norm, int threads) {
            const auto kernel = PYEFF_AT_LEVEL(optimizer_step);
            const auto numbers = rule_of(rule);
            py::gil_scoped_release unlocked;
            return kernel(at<const pyeff::OptimizerTensor>(tensors), count, numbers, norm, threads);
        },
        py::arg("tensors"), py::arg("count"), py::arg("rule"), py::arg("norm"), py::arg("threads"));
    m.def(
        "global_norm",
        [](uintptr_t tensors, int64_t count, int threads) {
            const auto kernel = PYEFF_AT_LEVEL(global_norm);
            py::gil_scoped_release unlocked;
            return kernel(at<const pyeff::OptimizerTensor>(tensors), count, threads);
        },
        py::arg("tensors"), py::arg("count"), py::arg("threads"));
#ifdef PYEFF_CUDA
    m.attr("OPTIMIZER_CHUNK") = pyeff::OPTIMIZER_CHUNK;
    // `rows` is the host's, every other address the device's. Each returns once its work is in the queue of `stream`.
    m.def(
        "optimizer_table_cuda",
        [](uintptr_t rows, int64_t count, uintptr_t tensors, uintptr_t chunks, int64_t chunk_count, uintptr_t stream) {
            raise_if(pyeff::optimizer_table_cuda(at<const pyeff::OptimizerTensor>(rows), count,
                                                 at<pyeff::OptimizerTensor>(tensors), at<pyeff::OptimizerChunk>(chunks),
                                                 chunk_count, at<void>(stream)),
                     "optimizer_table");
        },
        py::arg("rows"), py::arg("count"), py::arg("tensors"), py::arg("chunks"), py::arg("chunk_count"),
        py::arg("stream"));
    m.def(
        "optimizer_step_cuda",
        [](uintptr_t tensors, int64_t count, uintptr_t chunks, int64_t chunk_count, const py::tuple& rule, uintptr_t lr,
           uintptr_t norm, uintptr_t skipped, uintptr_t scalars, uintptr_t stream) {
            raise_if(pyeff::optimizer_step_cuda(at<const pyeff::OptimizerTensor>(tensors), count,
                                                at<const pyeff::OptimizerChunk>(chunks), chunk_count, rule_of(rule),
                                                at<const float>(lr), at<const double>(norm), at<int64_t>(skipped),
                                                at<pyeff::StepScalars>(scalars), at<void>(stream)),
                     "optimizer_step");
        },
        py::arg("tensors"), py::arg("count"), py::arg("chunks"), py::arg("chunk_count"), py::arg("rule"), py::arg("lr"),
        py::arg("norm"), py::arg("skipped"), py::arg("scalars"), py::arg("stream"));
    m.def(
        "global_norm_cuda",
        [](uintptr_t tensors, uintptr_t chunks, int64_t chunk_count, uintptr_t squares, uintptr_t norm,
           uintptr_t stream) {
            raise_if(pyeff::global_norm_cuda(at<const pyeff::OptimizerTensor>(tensors),
                                             at<const pyeff::OptimizerChunk>(chunks), chunk_count, at<double>(squares),
                                             at<double>(norm), at<void>(stream)),
                     "global_norm");
        },
        py::arg("tensors"), py::arg("chunks"), py::arg("chunk_count"), py::arg("squares"), py::arg("norm"),
        py::arg("stream"));
#endif
}
