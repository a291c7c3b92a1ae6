// What the bindings need to know of the CUDA side without including its headers.
#pragma once
#include <string>

namespace pyeff {

// Empty when this build's kernels can run on the current device; otherwise the reason in one sentence. Any
// error of the driver counts as "no GPU": the extension must load and answer on a machine without one.
std::string cuda_problem();

}  // namespace pyeff
