// The forms of x that the quantised matmul reads: rounding to integers, and the order in which the kernels of
// qmatmul_row.h and qmatmul_rows.h meet the values.
//
// To be included by per-level sources only.
#pragma once
#include "products/qmatmul_rows.h"

namespace mlxeff {
namespace MLXEFF_ISA {

typedef int8_t Bytes32 __attribute__((vector_size(32)));

// The bytes of a block in the order in which Block<bits>::bytes gives the weights.
static inline void store_in_decoder_order(const int8_t natural[32], int bits, int8_t* out) {
  Bytes32 v;
  memcpy(&v, natural, 32);
  if (bits == 4)
    v = __builtin_shufflevector(v, v, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 16, 18, 20, 22, 17, 19, 21,
                                23, 24, 26, 28, 30, 25, 27, 29, 31);
  if (bits == 2)
    v = __builtin_shufflevector(v, v, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 16, 20, 24, 28, 17, 21, 25,
                                29, 18, 22, 26, 30, 19, 23, 27, 31);
  memcpy(out, &v, 32);
}

// x = xq * scale with |xq| <= 127, rounded to nearest: adding 1.5 * 2^23 leaves the integer in the low bits of the sum.
static inline void round_to_int8(const float* x, int count, int bits, int8_t* out, float* scale, float* sum) {
  vf most = zero();
  for (int k = 0; k < count; k += VL) most = max(most, abs(load(x + k)));
  const float largest = max(most);
  const vf inverse = broadcast(largest > 0 ? 127.0f / largest : 0.0f), magic = broadcast(0x1.8p23f);
  vi total = {};
  for (int block = 0; block < count; block += 32) {
    int32_t values[32];
    int8_t natural[32];
#pragma GCC unroll 8
    for (int i = 0; i < 32; i += VL) {
      const vi rounded = (vi)(load(x + block + i) * inverse + magic) - (vi)magic;
      total += rounded;
      memcpy(values + i, &rounded, sizeof rounded);
    }
    for (int i = 0; i < 32; ++i) natural[i] = int8_t(values[i]);
    store_in_decoder_order(natural, bits, out + block);
  }
  *scale = largest / 127.0f;
  *sum = *scale * MLXEFF_ISA::sum(__builtin_convertvector(total, vf));
}

// x = xd * scale, rounded to nearest, with |xd| as large as three signed bytes allow; where all x are below 2^-100, as
// if one were not. `not_zero` is not 0 any more where an x is not finite.
static inline void round_to_digits(const float* x, int count, int32_t* out, float* scale, float* sum, vf* not_zero) {
  constexpr float limit = 8355700;
  vf most = broadcast(0x1p-100f);
  for (int k = 0; k < count; k += VL) most = max(most, abs(load(x + k)));
  const float largest = max(most);
  const vf inverse = broadcast(limit / largest);
  vi total = {};
  for (int k = 0; k < count; k += VL) {
    *not_zero += load(x + k) - load(x + k);
    const vf v = load(x + k) * inverse, half = (vf)(((vu)v & 0x80000000u) | float_to_bits(0.5f));
    const vi rounded = __builtin_convertvector(v + half, vi);
    total += rounded;
    memcpy(out + k, &rounded, sizeof rounded);
  }
  *scale = largest / limit;
  *sum = *scale * MLXEFF_ISA::sum(__builtin_convertvector(total, vf));
}

// The fp32 form of x: padded with zeros, and its values in the order in which row_exact meets them.
template <int bits>
static void arrange_exact(const void* x, int dtype, int64_t K, float* out) {
  constexpr int per_word = 32 / bits, step = row_step<bits>;
  for (int64_t k = 0; k < K; k += step, out += step) {
    float natural[step] = {};
    to_floats(natural, static_cast<const char*>(x) + k * int64_t(dtype_size(dtype)), dtype, min_of(step, K - k));
    for (int j = 0; j < per_word; ++j)
      for (int lane = 0; lane < VL; ++lane) out[j * VL + lane] = natural[lane * per_word + j];
  }
}
// The lanes with even and with odd index of two vectors, one after the other.
#if defined(__AVX512F__)
MLXEFF_INLINE vu even_lanes(vu a, vu b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
MLXEFF_INLINE vu odd_lanes(vu a, vu b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#elif defined(__AVX2__)
MLXEFF_INLINE vu even_lanes(vu a, vu b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
MLXEFF_INLINE vu odd_lanes(vu a, vu b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15); }
#else
MLXEFF_INLINE vu even_lanes(vu a, vu b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6); }
MLXEFF_INLINE vu odd_lanes(vu a, vu b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7); }
#endif

// out [byte, highest first][step] = the three bytes of values of 24 bits. Adding 0x8080 carries out of the lower bytes
// as if they were signed.
MLXEFF_INLINE void store_digits(vu values, int8_t* out, int64_t step) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  const vu carried = (values + 0x8080u) ^ 0x8080u;
#pragma GCC unroll 4
  for (int lane = 0; lane < VL; lane += 4) {
    Bytes b;
    memcpy(&b, reinterpret_cast<const char*>(&carried) + lane * 4, sizeof b);
    b = __builtin_shufflevector(b, b, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12, 3, 7, 11, 15);
#pragma GCC unroll 3
    for (int d = 0; d < digits; ++d) memcpy(out + d * step + lane, reinterpret_cast<const char*>(&b) + d * 4, 4);
  }
}

// 32 values of 24 bits, from k on, put where row_digits meets them.
template <int bits>
static void arrange_digits(const int32_t* values, int64_t k, int8_t* out) {
  constexpr int step = row_step<bits>, taken = bits == 4 ? 2 * VL : VL;
  for (int i = 0; i < 32; i += taken) {
    int8_t* const vector = out + (k + i) / step * digits * step;
    vu v[taken / VL];
    memcpy(v, values + i, sizeof v);
    if constexpr (bits == 4) {
      store_digits(even_lanes(v[0], v[1]), vector + (k + i) % step / 2, step);
      store_digits(odd_lanes(v[0], v[1]), vector + (k + i) % step / 2 + step / 2, step);
    } else {
      store_digits(v[0], vector + (k + i) % step, step);
    }
  }
}
// 32 rounded values, from k on, put where row_int8 meets them.
template <int bits>
static void arrange_int8(const int8_t* natural, int64_t k, int8_t* out) {
  if (bits != 4) {
    memcpy(out + k, natural, 32);
    return;
  }
  constexpr int step = row_step<4>;
  int8_t* const even = out + k / step * step + k % step / 2;
  for (int i = 0; i < 16; ++i) even[i] = natural[2 * i], even[step / 2 + i] = natural[2 * i + 1];
}

// Row m of x in the form that the kernels of qmatmul_row.h read.
template <int bits>
static void prepare_direct_row(const QmmArgs& args, int64_t m) {
  const int64_t K = args.w.K, group = args.w.group, groups = K / group, size = int64_t(dtype_size(args.x_dtype));
  const bool int8 = args.mode == MLXEFF_COMPUTE_INT8, integers = int8 || by_digits<bits>;
  const int64_t x_size = int8 ? 1 : digits, x_bytes = row_x_bytes(K, integers ? x_size : 4);
  const char* const x = static_cast<const char*>(args.x) + m * args.ldx * size;
  int8_t* const out = args.x_int8 + m * x_bytes;  // also where x_f32 begins
  float *const sums = args.x_sum + m * row_groups(args.w), *const scales = args.x_scale + m * row_groups(args.w);
  if (integers) memset(out, 0, size_t(x_bytes));
  else arrange_exact<bits>(x, args.x_dtype, K, reinterpret_cast<float*>(out));
  vf not_zero = zero();
  for (int64_t g = 0; g < groups; ++g) {
    float values[128];
    to_floats(values, x + g * group * size, args.x_dtype, group);
    if (int8) {
      int8_t rounded[128];
      round_to_int8(values, int(group), 8, rounded, scales + g, sums + g);
      for (int64_t i = 0; i < group; i += 32) arrange_int8<bits>(rounded + i, g * group + i, out);
    } else if (by_digits<bits>) {
      int32_t rounded[128];
      round_to_digits(values, int(group), rounded, scales + g, sums + g, &not_zero);
      for (int64_t i = 0; i < group; i += 32) arrange_digits<bits>(rounded + i, g * group + i, out);
    } else {
      vf total = zero();
      for (int64_t i = 0; i < group; i += VL) total += load(values + i);
      sums[g] = sum(total);
    }
  }
  const float poison = sum(not_zero);
  for (int64_t g = 0; poison != 0 && g < groups; ++g) sums[g] = scales[g] = poison;
  for (int64_t g = groups; g % VL != 0; ++g) {
    sums[g] = 0;
    if (integers) scales[g] = 0;
  }
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
