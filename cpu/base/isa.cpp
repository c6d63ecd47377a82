// Selects the instruction-set level that this process uses.
//
// A level is usable if the CPU reports every feature that the compiler flags of the level require, and the operating
// system saves the registers that the level uses (XCR0; AMX also needs a permission that Linux grants through
// arch_prctl). CPU family and model numbers are ignored, because virtual machines report them wrongly. The environment
// variable MLXEFF_CPU_ISA sets an upper limit; an unknown value is ignored with a warning on stderr. This file is
// compiled with the platform's base flags only.
#include "base/isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>

#if defined(MLXEFF_X86)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#if defined(MLXEFF_ARM64)
#include <sys/auxv.h>
#endif
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace mlxeff {
namespace {

struct Level {
  Isa isa;
  const char* name;
  bool (*usable)();
};

bool always() { return true; }

#if defined(MLXEFF_X86)
struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Cpuid(unsigned leaf, unsigned subleaf) {
    if (__get_cpuid_max(0, nullptr) >= leaf) __cpuid_count(leaf, subleaf, a, b, c, d);
  }
};
bool bit(unsigned word, int index) { return word >> index & 1u; }

uint64_t enabled_register_state() {
  if (!bit(Cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}
bool state_enabled(uint64_t mask) { return (enabled_register_state() & mask) == mask; }

bool has_avx2() {
  const Cpuid one(1, 0), seven(7, 0);
  return state_enabled(0x6) && bit(one.c, 28) && bit(one.c, 12) && bit(one.c, 29)  // AVX, FMA, F16C
         && bit(seven.b, 5) && bit(seven.b, 3) && bit(seven.b, 8);                 // AVX2, BMI1, BMI2
}
bool has_avx512() {
  const Cpuid seven(7, 0);
  return has_avx2() && state_enabled(0xe6) && bit(seven.b, 16) && bit(seven.b, 17)  // F, DQ
         && bit(seven.b, 30) && bit(seven.b, 31) && bit(seven.c, 11);               // BW, VL, VNNI
}
bool has_avx512bf16() { return has_avx512() && bit(Cpuid(7, 1).a, 5); }

bool has_amx() {
#if defined(MLXEFF_AMX_EMULATED)
  return has_avx512bf16();
#elif defined(__linux__)
  const Cpuid seven(7, 0);
  if (!has_avx512bf16() || !bit(seven.d, 22) || !bit(seven.d, 24)) return false;  // AMX-BF16, AMX-TILE
  if (!state_enabled(0x60000)) return false;
  const long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

const Level levels[] = {{Isa::scalar, "scalar", always},
                        {Isa::avx2, "avx2", has_avx2},
                        {Isa::avx512, "avx512", has_avx512},
                        {Isa::amx, "amx", has_amx}};
#elif defined(MLXEFF_ARM64)
#if defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd") && has_feature("hw.optional.arm.FEAT_FP16"); }
bool has_i8mm() { return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#elif defined(__linux__)
bool has_dotprod() {
  const unsigned long caps = getauxval(AT_HWCAP);
  return (caps >> 20 & 1) && (caps >> 10 & 1);  // ASIMDDP, ASIMDHP
}
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif
const Level levels[] = {{Isa::scalar, "scalar", always},
                        {Isa::neon, "neon", always},
                        {Isa::dotprod, "dotprod", has_dotprod},
                        {Isa::i8mm, "i8mm", has_i8mm}};
#else
const Level levels[] = {{Isa::scalar, "scalar", always}};
#endif

constexpr int level_count = sizeof levels / sizeof levels[0];

int find_level(const char* name) {
  for (int i = 0; i < level_count; ++i)
    if (std::string(name) == levels[i].name) return i;
  return -1;
}

struct Choice {
  std::string available;
  int best = 0;  // the highest usable level that MLXEFF_CPU_ISA allows
  std::atomic<int> current{0};

  Choice() {
    int cap = level_count - 1;
    if (const char* wanted = std::getenv("MLXEFF_CPU_ISA"); wanted && *wanted) {
      const int level = find_level(wanted);
      if (level >= 0) cap = level;
      else
        std::fprintf(stderr, "mlxeff: MLXEFF_CPU_ISA=%s is not an instruction set of this platform; ignored\n", wanted);
    }
    for (int i = 0; i <= cap; ++i) {
      if (!levels[i].usable()) continue;
      available += (available.empty() ? "" : " ") + std::string(levels[i].name);
      best = i;
    }
    current = best;
  }
};

Choice& choice() {
  static Choice& instance = *new Choice;
  return instance;
}

}  // namespace

bool has_byte_permutes() {
#if defined(MLXEFF_X86)
  static const bool has = has_avx512() && bit(Cpuid(7, 0).c, 1);
  return has;
#else
  return false;
#endif
}

Isa active_isa() { return levels[choice().current.load(std::memory_order_relaxed)].isa; }

}  // namespace mlxeff

extern "C" {

const char* mlxeff_isa(void) { return mlxeff::levels[mlxeff::choice().current.load()].name; }
const char* mlxeff_isa_available(void) { return mlxeff::choice().available.c_str(); }

int mlxeff_set_isa(const char* name) {
  mlxeff::Choice& choice = mlxeff::choice();
  const int level = name ? mlxeff::find_level(name) : choice.best;
  if (level < 0 || level > choice.best || !mlxeff::levels[level].usable()) return MLXEFF_UNSUPPORTED;
  choice.current = level;
  return MLXEFF_OK;
}

const char* mlxeff_error_string(int code) {
  switch (code) {
    case MLXEFF_OK: return "ok";
    case MLXEFF_BAD_ARGUMENT:
      return "bad argument: a null pointer, a negative size, an unsupported bit width or an index out of range";
    case MLXEFF_BAD_DTYPE: return "unknown dtype or compute mode";
    case MLXEFF_UNSUPPORTED: return "not supported on this machine or by this build";
    case MLXEFF_NO_MEMORY: return "out of memory";
    case MLXEFF_BUSY: return "not allowed inside a parallel region";
  }
  return "unknown code";
}
}
