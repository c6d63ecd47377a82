// The instruction-set levels, and the dispatch to the kernels of the level in use at run time.
#pragma once
#include "base/common.h"

namespace mlxeff {

enum class Isa { scalar, avx2, avx512, amx, neon, dotprod, i8mm };

// The level in use: the best one that the machine, the operating system, the build and MLXEFF_CPU_ISA allow.
Isa active_isa();

// True if the CPU has AVX-512 VBMI, which the level avx512 does not require.
bool has_byte_permutes();

}  // namespace mlxeff

// A family declares its table of kernels with MLXEFF_DECLARE_FAMILY(Table, getter) at namespace mlxeff, defines
// `const Table& getter()` in namespace mlxeff::MLXEFF_ISA, and calls MLXEFF_DISPATCH(getter) to obtain the table of
// the level in use.
#if defined(MLXEFF_X86)
#define MLXEFF_DECLARE_FAMILY(Table, getter) \
  namespace scalar {                         \
  const Table& getter();                     \
  }                                          \
  namespace avx2 {                           \
  const Table& getter();                     \
  }                                          \
  namespace avx512 {                         \
  const Table& getter();                     \
  }                                          \
  namespace amx {                            \
  const Table& getter();                     \
  }
#define MLXEFF_DISPATCH(getter)                                         \
  (::mlxeff::active_isa() == ::mlxeff::Isa::amx      ? amx::getter()    \
   : ::mlxeff::active_isa() == ::mlxeff::Isa::avx512 ? avx512::getter() \
   : ::mlxeff::active_isa() == ::mlxeff::Isa::avx2   ? avx2::getter()   \
                                                     : scalar::getter())
#elif defined(MLXEFF_ARM64)
#define MLXEFF_DECLARE_FAMILY(Table, getter) \
  namespace scalar {                         \
  const Table& getter();                     \
  }                                          \
  namespace neon {                           \
  const Table& getter();                     \
  }                                          \
  namespace dotprod {                        \
  const Table& getter();                     \
  }                                          \
  namespace i8mm {                           \
  const Table& getter();                     \
  }
#define MLXEFF_DISPATCH(getter)                                           \
  (::mlxeff::active_isa() == ::mlxeff::Isa::i8mm      ? i8mm::getter()    \
   : ::mlxeff::active_isa() == ::mlxeff::Isa::dotprod ? dotprod::getter() \
   : ::mlxeff::active_isa() == ::mlxeff::Isa::neon    ? neon::getter()    \
                                                      : scalar::getter())
#else
#define MLXEFF_DECLARE_FAMILY(Table, getter) \
  namespace scalar {                         \
  const Table& getter();                     \
  }
#define MLXEFF_DISPATCH(getter) scalar::getter()
#endif
