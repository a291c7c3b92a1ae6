#include "level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyeff {

const char* name_of(Level level) {
    switch (level) {
        case Level::avx512: return "avx512";
        case Level::avx2: return "avx2";
        default: return "baseline";
    }
}

Level highest_level() {
#if defined(PYEFF_LEVEL_AVX512)
    // Asks the processor and whether the operating system saves the wide registers.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return Level::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::avx2;
#endif
    return Level::baseline;
}

Level current_level() {
    static const Level level = [] {
        const Level highest = highest_level();
        const char* wish = std::getenv("PYEFF_CPU_LEVEL");
        if (wish == nullptr || *wish == '\0') return highest;
        for (Level l : {Level::baseline, Level::avx2, Level::avx512})
            if (std::string(wish) == name_of(l)) {
                if (l > highest)
                    throw std::runtime_error(std::string("PYEFF_CPU_LEVEL=") + wish +
                                             " cannot run on this processor, whose highest level is " +
                                             name_of(highest) + ".");
                return l;
            }
        throw std::runtime_error(std::string("PYEFF_CPU_LEVEL must be baseline, avx2 or avx512, not '") + wish + "'.");
    }();
    return level;
}

}  // namespace pyeff
