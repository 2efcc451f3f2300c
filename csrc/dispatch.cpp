// Which instruction set runs: asked of the CPU once, the one place that knows.
#include <cstdlib>
#include <stdexcept>

#include "lowbit.h"

#if defined(LOWBIT_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(LOWBIT_ARM) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace lowbit {

extern const Kernels scalar_kernels;
#if defined(LOWBIT_X86)
extern const Kernels avx2_kernels, avx512_kernels;
void avx512_vnni_product(const Product& of, int64_t first, int64_t last);
#elif defined(LOWBIT_ARM)
extern const Kernels neon_kernels;
void neon_dotprod_product(const Product& of, int64_t first, int64_t last);
#endif

// Some processors add four products of bytes at once; what is no product is as it is without.
[[maybe_unused]] static Kernels with_product(Kernels made, const char* isa, bool lifts, decltype(Kernels::product) product) {
    made.isa = isa, made.product = product, made.crosses = false, made.lifts = lifts;
    return made;
}

#if defined(LOWBIT_ARM)
static bool has_dotprod() {
#if defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 && found != 0;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return false;
#endif
}
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
    if (!avx512) return found;
    found.push_back(&avx512_kernels);
    static const Kernels vnni = with_product(avx512_kernels, "avx512_vnni", true, avx512_vnni_product);
    if (__builtin_cpu_supports("avx512vnni")) found.push_back(&vnni);
#elif defined(LOWBIT_ARM)
    found.push_back(&neon_kernels);  // every AArch64 processor has it
    static const Kernels dotprod = with_product(neon_kernels, "neon_dotprod", false, neon_dotprod_product);
    if (has_dotprod()) found.push_back(&dotprod);
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
