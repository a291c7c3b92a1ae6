#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/adamw8bit.h"
#ifdef PYEFF_CUDA
#include "cuda/adamw8bit.h"
#endif

namespace py = pybind11;

namespace {

constexpr size_t FIELDS = sizeof(pyeff::AdamWTensor) / sizeof(int64_t);

// The fields of AdamWTensor, one tensor after the other.
std::vector<pyeff::AdamWTensor> tensors_of(const py::list& fields) {
    std::vector<pyeff::AdamWTensor> tensors(fields.size() / FIELDS);
    auto* to = reinterpret_cast<int64_t*>(tensors.data());
    for (size_t i = 0; i < tensors.size() * FIELDS; ++i) to[i] = PyLong_AsLongLong(fields[i].ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return tensors;
}

pyeff::AdamWScalars scalars_of(const py::tuple& s) {
    const auto number = [&s](int i) { return s[i].cast<float>(); };
    return {number(0), number(1), number(2), number(3), number(4), number(5), number(6)};
}

}  // namespace

void bind_adamw8bit(py::module_& m) {
    m.def(
        "adamw8bit_step",
        [](const py::list& fields, int64_t block_size, const py::tuple& scalars, int threads) {
            const auto kernel = PYEFF_AT_LEVEL(adamw8bit_step);
            const auto tensors = tensors_of(fields);
            const auto numbers = scalars_of(scalars);
            py::gil_scoped_release unlocked;
            kernel(tensors.data(), static_cast<int64_t>(tensors.size()), block_size, numbers, threads);
        },
        py::arg("fields"), py::arg("block_size"), py::arg("scalars"), py::arg("threads"));
#ifdef PYEFF_CUDA
    // Every address is the device's. Returns once the kernel is in the queue of `stream`.
    m.def(
        "adamw8bit_step_cuda",
        [](uintptr_t tensors, uintptr_t chunks, int64_t chunk_count, int64_t p_dtype, int64_t g_dtype,
           int64_t block_size, const py::tuple& scalars, uintptr_t stream) {
            const std::string problem =
                pyeff::adamw8bit_step_cuda(reinterpret_cast<const pyeff::AdamWTensor*>(tensors),
                                           reinterpret_cast<const pyeff::AdamWChunk*>(chunks), chunk_count, p_dtype,
                                           g_dtype, block_size, scalars_of(scalars), reinterpret_cast<void*>(stream));
            if (!problem.empty()) throw std::runtime_error("adamw8bit_step: " + problem);
        },
        py::arg("tensors"), py::arg("chunks"), py::arg("chunk_count"), py::arg("p_dtype"), py::arg("g_dtype"),
        py::arg("block_size"), py::arg("scalars"), py::arg("stream"));
#endif
}
