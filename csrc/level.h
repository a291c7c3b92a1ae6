// Which instruction level the CPU kernels of this process run at.
#pragma once

namespace pyeff {

enum class Level { baseline = 0, avx2 = 1, avx512 = 2 };

const char* name_of(Level level);
// The highest level that was built and that this processor (and its operating system) supports.
Level highest_level();
// What runs: the highest, or the lower one asked for with PYEFF_CPU_LEVEL. Throws std::runtime_error if the
// variable names no level or one that cannot run here.
Level current_level();

}  // namespace pyeff

// The function `f` of the namespace of the current level.
#if defined(PYEFF_LEVEL_AVX512)
#define PYEFF_AT_LEVEL(f)                                                     \
    (::pyeff::current_level() == ::pyeff::Level::avx512 ? &::pyeff::avx512::f \
     : ::pyeff::current_level() == ::pyeff::Level::avx2 ? &::pyeff::avx2::f   \
                                                        : &::pyeff::baseline::f)
// Declares a kernel once for each level.
#define PYEFF_DECLARE(...)      \
    namespace pyeff::baseline { \
    __VA_ARGS__;                \
    }                           \
    namespace pyeff::avx2 {     \
    __VA_ARGS__;                \
    }                           \
    namespace pyeff::avx512 {   \
    __VA_ARGS__;                \
    }
#else
#define PYEFF_AT_LEVEL(f) (&::pyeff::baseline::f)
#define PYEFF_DECLARE(...)      \
    namespace pyeff::baseline { \
    __VA_ARGS__;                \
    }
#endif
