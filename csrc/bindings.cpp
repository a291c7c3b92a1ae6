// The Python module pyeff._native.
//
// Arguments are integers (addresses, sizes, dtype codes, a stream) and floats: no torch header is needed, and
// one build serves every torch. Nothing here checks shapes; pyeff/ops does, before it calls. Every function
// gives up the GIL.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "level.h"

#ifdef PYEFF_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

void bind_embedding_grad(py::module_& m);
void bind_linear_cross_entropy_grad(py::module_& m);
void bind_linear_cross_entropy_scores(py::module_& m);
void bind_linear_grad(py::module_& m);
void bind_optimizer_step(py::module_& m);
void bind_sketch_grads(py::module_& m);
void bind_vector_grad(py::module_& m);

namespace {

py::dict build_info() {
    py::dict info;
    info["version"] = PYEFF_VERSION;
#if defined(__clang__)
    info["compiler"] = std::string("clang ") + __clang_version__;
#else
    info["compiler"] = std::string("gcc ") + __VERSION__;
#endif
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    info["cpu_level"] = pyeff::name_of(pyeff::current_level());
    info["highest_cpu_level"] = pyeff::name_of(pyeff::highest_level());
#ifdef PYEFF_CUDA
    info["cuda"] = PYEFF_CUDA_VERSION;
    info["cuda_archs"] = PYEFF_CUDA_ARCHS;
#else
    info["cuda"] = py::none();
    info["cuda_archs"] = "";
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of pyeff; called through pyeff.ops.";
    m.def("build_info", &build_info);
    bind_embedding_grad(m);
    bind_linear_cross_entropy_grad(m);
    bind_linear_cross_entropy_scores(m);
    bind_linear_grad(m);
    bind_optimizer_step(m);
    bind_sketch_grads(m);
    bind_vector_grad(m);
#ifdef PYEFF_CUDA
    // None when a kernel of this build can run on the current device, else the reason.
    m.def("cuda_problem", []() -> py::object {
        const std::string problem = pyeff::cuda_problem();
        return problem.empty() ? py::object(py::none()) : py::object(py::str(problem));
    });
#endif
}
