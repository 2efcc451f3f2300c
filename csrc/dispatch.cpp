// Which instruction set runs: asked of the CPU once, the one place that knows.
#include <cstdlib>
#include <stdexcept>

#include "lowbit.h"

namespace lowbit {

extern const Kernels scalar_kernels;
#if defined(LOWBIT_X86)
extern const Kernels avx2_kernels, avx512_kernels;
#elif defined(LOWBIT_ARM)
extern const Kernels neon_kernels;
#endif

std::vector<const Kernels*> supported_kernels() {
    std::vector<const Kernels*> found{&scalar_kernels};
#if defined(LOWBIT_X86)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
    if (!avx2) return found;
    found.push_back(&avx2_kernels);
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512) found.push_back(&avx512_kernels);
#elif defined(LOWBIT_ARM)
    found.push_back(&neon_kernels);  // every AArch64 processor has it
#endif
    return found;
}

static const Kernels& choose() {
    auto found = supported_kernels();
    const char* asked = std::getenv("LOWBIT_ISA");
    if (!asked || !*asked) return *found.back();
    std::string names;
    for (const Kernels* kernels : found) {
        if (std::string(asked) == kernels->isa) return *kernels;
        names += std::string(names.empty() ? "" : ", ") + kernels->isa;
    }
    throw std::runtime_error("LOWBIT_ISA=" + std::string(asked) + " is not available on this CPU; it has " + names);
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace lowbit
