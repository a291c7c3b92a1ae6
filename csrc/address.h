// Python hands memory over as integers; this is the one place that makes them pointers.
#pragma once

#include <cstdint>

namespace pyeff {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace pyeff
