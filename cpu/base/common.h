// Definitions shared by all kernel sources: element types, scalar conversions between them, and small integer helpers.
//
// The sources of a kernel family are compiled once for each instruction-set level, with the compiler flags of that
// level. The linker may merge equal inline functions of several object files into one copy, and could keep the copy
// that uses instructions the CPU lacks. Therefore every function here is `static` (one copy per object file), and
// templates live in the per-level namespace `mlxeff::MLXEFF_ISA` or in an unnamed namespace. For the same reason
// kernels use no templates of the C++ standard library.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "mlxeff_cpu.h"

#if defined(__x86_64__)
#define MLXEFF_X86 1
#elif defined(__aarch64__)
#define MLXEFF_ARM64 1
#endif

#define MLXEFF_INLINE static inline __attribute__((always_inline))
#define MLXEFF_RESTRICT __restrict__

namespace mlxeff {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

MLXEFF_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
MLXEFF_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

MLXEFF_INLINE float to_float(float value) { return value; }
MLXEFF_INLINE float to_float(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
MLXEFF_INLINE float to_float(f16 value) {
  // Shifts exponent and mantissa to their positions in fp32; multiplying by 2^112 then corrects the exponent bias and
  // normalises subnormals exactly. Infinities and NaNs get the largest exponent instead.
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

// Conversions to half precision round to nearest, ties to even; NaN stays NaN.
MLXEFF_INLINE void from_float(float value, float* out) { *out = value; }
MLXEFF_INLINE void from_float(float value, bf16* out) {
  const uint32_t bits = float_to_bits(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = uint16_t(nan ? (bits >> 16 | 0x40u) : ((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16));
}
MLXEFF_INLINE void from_float(float value, f16* out) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to more than 65504, the largest fp16 number: infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal half: adding 0.5 leaves the rounded mantissa in the low bits
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

static inline size_t dtype_size(int dtype) { return dtype == MLXEFF_F32 ? 4 : 2; }
static inline bool dtype_known(int dtype) { return dtype == MLXEFF_F32 || dtype == MLXEFF_F16 || dtype == MLXEFF_BF16; }

MLXEFF_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
MLXEFF_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
MLXEFF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MLXEFF_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace mlxeff
