// Quantised matmul, one row of x, 4- and 8-bit weights, and with byte products 5- and 6-bit ones: the product of a
// decoding step, limited by reading W.
//
// W is read in the order of its addresses, a row at a time, with the values of K in the lanes and a horizontal sum at
// the end of each row. (The strips of qmatmul_strip.h would need the scales transposed, a third of the work here.)
//
//   EXACT  y[n] = sum over groups of scale * sum(q * x) + bias * sum(x). Where there are byte products, x is rounded to
//   24 bits
//          of the group's largest |x|, an error of half a unit in the last place of that, and kept as three signed
//          bytes: sums of four or eight products q * x are exact in integers, and scaled and added in fp32. x is stored
//          as [vector][byte, highest first][even, odd (4 bits)]. Elsewhere in fp32: a vector of VL words holds 32 /
//          bits values a lane, value j of every lane is q[j] = word >> (j * bits), so x is stored as [vector][j][lane].
//   INT8   the formula and rounding of qmatmul_strip.h; sums of 32 values in integers. 4-bit weights give the even
//   values of
//          a vector's bytes by a mask and the odd ones by a shift, so x is stored as [vector][even, odd].
//
// Weights of 5 and 6 bits are spread to bytes as they are read, and are then multiplied like those of 8 bits.
//
// To be included by per-level sources only.
#pragma once
#include "products/qmatmul_spread.h"
#include "products/qmatmul_strip.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr int64_t prefetch_distance = 4096;  // bytes in use between what is read and what is asked for

// Lanes and vector types of the int8 products: 256 bits suffice to keep ahead of the memory and have three ports.
#if defined(__AVX2__)
constexpr int BL = 8;
#else
constexpr int BL = 4;
#endif
typedef uint32_t bu __attribute__((vector_size(BL * 4)));
typedef int32_t bi __attribute__((vector_size(BL * 4)));
typedef float bf __attribute__((vector_size(BL * 4)));

// Bits that a weight takes in a vector.
template <int bits>
constexpr int held_bits = bits == 5 || bits == 6 ? 8 : bits;
// Values of K that one vector holds, and that a row is padded to (with x = 0).
template <int bits>
constexpr int exact_step = VL * 32 / held_bits<bits>;
template <int bits>
constexpr int int8_step = BL * 32 / held_bits<bits>;
constexpr int64_t row_padding = 128;  // the largest step

// Whether EXACT reads x as integers of three bytes. AVX2's products of bytes saturate beyond 6 bits.
constexpr int digits = 3;
#if defined(__AVX512F__) || defined(__ARM_FEATURE_DOTPROD)
template <int bits>
constexpr bool by_digits = true;
#elif defined(__AVX2__)
template <int bits>
constexpr bool by_digits = bits <= 6;
#else
template <int bits>
constexpr bool by_digits = false;
#endif

// Whether there are kernels for one row of x here.
template <int bits>
constexpr bool row_kernels = bits == 4 || bits == 8 || ((bits == 5 || bits == 6) && by_digits<bits>);

// The first `count` of a vector of words, a multiple of 4; the rest are zero, and nothing beyond is read.
template <class Vector>
MLXEFF_INLINE Vector load_words_up_to(const char* p, int64_t count) {
  constexpr int lanes = int(sizeof(Vector) / 4);
  Vector v = {};
  if (count >= lanes) {
    memcpy(&v, p, sizeof v);
    return v;
  }
#if defined(__AVX512F__)
  if constexpr (lanes == 16) return (Vector)_mm512_maskz_loadu_epi32(first_lanes(count), p);
#endif
  if (count > 0) memcpy(&v, p, 16);  // a vector of 8 words
  return v;
}

// The weights of a row from value k on, `held_bits` each; zeros from value K on.
template <int bits>
MLXEFF_INLINE vu load_codes(const char* row, int64_t k, int64_t K) {
  if constexpr (held_bits<bits> == bits) return load_words_up_to<vu>(row + k * bits / 8, (K - k) * bits / 32);
  else return load_spread<bits>(row, k, K);
}
template <int bits>
MLXEFF_INLINE bu load_codes_int8(const char* row, int64_t k, int64_t K) {
  if constexpr (held_bits<bits> == bits) return load_words_up_to<bu>(row + k * bits / 8, (K - k) * bits / 32);
#if defined(__AVX2__)
  else return (bu)spread_codes<bits>(row + k / 32 * 4 * bits);
#else
  else return (bu)load_spread<bits>(row, k, K);
#endif
}

// Lane i = scale of the group that word first + i belongs to, a group having `group_words` words; first is a multiple
// of VL (of BL in the int8 form).
template <int group_words>
MLXEFF_INLINE vf spread_scales(const float* scales, int64_t first) {
#if defined(__AVX2__)
  if constexpr (group_words < VL) {
    const vf v = load(scales + first / group_words);
#if defined(__AVX512F__)
    if (group_words == 4) return __builtin_shufflevector(v, v, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return __builtin_shufflevector(v, v, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
#else
    return __builtin_shufflevector(v, v, 0, 0, 0, 0, 1, 1, 1, 1);
#endif
  }
#endif
  return broadcast(scales[first / group_words]);
}
template <int group_words>
MLXEFF_INLINE bf spread_scales_int8(const float* scales, int64_t first) {
#if defined(__AVX2__)
  if constexpr (group_words == 4) {
    const __m256d pair = _mm256_broadcast_sd((const double*)(scales + first / 4));
    return (bf)_mm256_permutevar_ps(_mm256_castpd_ps(pair), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  }
#endif
  return scales[first / group_words] - bf{};
}

// scales[g] = scale of group g of a row, times its factor if there are any; returns bias * x_sum, whose lanes are to be
// summed.
template <class T>
MLXEFF_INLINE vf load_row_scales(const T* row_scales, const T* row_biases, int64_t groups, const float* x_sum,
                                 float bias_shift, const float* factors, float* scales) {
  vf total = zero();
  for (int64_t g = 0; g < groups; g += VL) {
    const vf scale = load_up_to(row_scales + g, groups - g), bias = load_up_to(row_biases + g, groups - g);
    total = fma(bias_shift * scale + bias, load(x_sum + g), total);
    store(scales + g, factors ? scale * load(factors + g) : scale);
  }
  return total;
}

template <int bits>
MLXEFF_INLINE vf word_value(vu words, int j) {
  return __builtin_convertvector((vi)((words >> (bits * j)) & ((1u << bits) - 1)), vf);
}

template <int bits, int group>
static float row_exact(const QmmArgs& args, const char* packed, int64_t distance, const float* scales, vf total) {
  const int64_t words = args.w.K * bits / 32;
  const float* x = args.x_f32;
  for (int64_t i = 0; i < words; i += VL, x += exact_step<bits>) {
    __builtin_prefetch(packed + i * 4 + distance, 0, 3);
    const vu q = load_words_up_to<vu>(packed + i * 4, words - i);
    vf even = word_value<bits>(q, 0) * load(x), odd = word_value<bits>(q, 1) * load(x + VL);
#pragma GCC unroll 8
    for (int j = 2; j < 32 / bits; j += 2) {
      even = fma(word_value<bits>(q, j), load(x + j * VL), even);
      odd = fma(word_value<bits>(q, j + 1), load(x + (j + 1) * VL), odd);
    }
    total = fma(even + odd, spread_scales<bits * group / 32>(scales, i), total);
  }
  return sum(total);
}

MLXEFF_INLINE float sum_lanes(bf v) {
#if defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return sum(v);
#endif
}

// acc + products of the unsigned bytes of w and the signed bytes at x, four to a lane.
template <int bits>
MLXEFF_INLINE bi dot_vector(bi acc, bu w, const int8_t* x) {
#if defined(__AVX2__)
  return (bi)dot_quads<bits>((__m256i)acc, (__m256i)w, _mm256_loadu_si256((const __m256i*)x));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (bi)dot_quads<bits>((int32x4_t)acc, (uint8x16_t)w, vld1q_s8(x));
#else
  int32_t factors[BL];
  memcpy(factors, x, sizeof factors);
  const bu packed = {uint32_t(factors[0]), uint32_t(factors[1]), uint32_t(factors[2]), uint32_t(factors[3])};
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b) acc += (bi)(w >> (8 * b) & 0xffu) * ((bi)(packed << (24 - 8 * b)) >> 24);
  return acc;
#endif
}

#if defined(__AVX512F__)
template <int bits>
MLXEFF_INLINE vi dot_wide(vi acc, vu w, const int8_t* x) {
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_loadu_si512(x));
}
#else
template <int bits>
MLXEFF_INLINE vi dot_wide(vi acc, vu w, const int8_t* x) {
  return dot_vector<bits>(acc, w, x);
}
#endif
// The same for the nibbles of 4-bit weights, eight to a lane.
MLXEFF_INLINE vi dot_nibbles(vi acc, vu even, vu odd, const int8_t* x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i first = _mm256_maddubs_epi16((__m256i)even, _mm256_loadu_si256((const __m256i*)x));
  const __m256i second = _mm256_maddubs_epi16((__m256i)odd, _mm256_loadu_si256((const __m256i*)(x + VL * 4)));
  return acc + (vi)_mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1));
#else
  return dot_wide<4>(dot_wide<4>(acc, even, x), odd, x + VL * 4);
#endif
}

// Lane by lane sum(q * x), x in the form of arrange_digits. Sums of eight products of 4 and 24 bits fit 32 bits; of
// four products of 8 and 24 bits, only those of the two higher bytes do.
template <int bits>
MLXEFF_INLINE vf dot_digits(vu q, const int8_t* x) {
  constexpr int step = exact_step<bits>;
  if constexpr (bits == 4) {
    const vu even = q & 0x0f0f0f0fu, odd = (q >> 4) & 0x0f0f0f0fu;
    vi sum = dot_nibbles(vi{}, even, odd, x);
    sum = dot_nibbles((vi)((vu)sum << 8), even, odd, x + step);
    sum = dot_nibbles((vi)((vu)sum << 8), even, odd, x + 2 * step);
    return __builtin_convertvector(sum, vf);
  } else {
    const vi high = dot_wide<bits>((vi)((vu)dot_wide<bits>(vi{}, q, x) << 8), q, x + step);
    const vi low = dot_wide<bits>(vi{}, q, x + 2 * step);
    return fma(__builtin_convertvector(high, vf), broadcast(256), __builtin_convertvector(low, vf));
  }
}

template <int bits, int group>
static float row_digits(const QmmArgs& args, const char* packed, int64_t distance, const float* scales, vf total) {
  constexpr int held = held_bits<bits>;
  const int8_t* x = args.x_int8;
  for (int64_t k = 0; k < args.w.K; k += exact_step<bits>, x += digits * exact_step<bits>) {
    __builtin_prefetch(packed + k * bits / 8 + distance, 0, 3);
    const vf dot = dot_digits<bits>(load_codes<bits>(packed, k, args.w.K), x);
    total = fma(dot, spread_scales<held * group / 32>(scales, k * held / 32), total);
  }
  return sum(total);
}

template <int bits, int group>
static float row_int8(const QmmArgs& args, const char* packed, int64_t distance, const float* scales, vf bias) {
  constexpr int held = held_bits<bits>;
  const int8_t* x = args.x_int8;
  bf total[2] = {};
  for (int64_t k = 0; k < args.w.K; k += 2 * int8_step<bits>, x += 2 * int8_step<bits>) {
    __builtin_prefetch(packed + k * bits / 8 + distance, 0, 3);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = k + half * int8_step<bits>;
      if (at >= args.w.K) break;
      const bu q = load_codes_int8<bits>(packed, at, args.w.K);
      const int8_t* const values = x + half * int8_step<bits>;
      bi dot;
      if constexpr (bits == 4) {
        dot = dot_vector<bits>(bi{}, q & 0x0f0f0f0fu, values);
        dot = dot_vector<bits>(dot, (q >> 4) & 0x0f0f0f0fu, values + BL * 4);
      } else {
        dot = dot_vector<bits>(bi{}, q, values);
      }
      total[half] += __builtin_convertvector(dot, bf) * spread_scales_int8<held * group / 32>(scales, at * held / 32);
    }
  }
  return sum_lanes(total[0] + total[1]) + sum(bias);
}

// The fp32 form of x: padded with zeros, and its values in the order in which row_exact meets them.
template <int bits>
static void arrange_exact(const void* x, int dtype, int64_t K, float* out) {
  constexpr int per_word = 32 / bits, step = exact_step<bits>;
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
  constexpr int step = exact_step<bits>, taken = bits == 4 ? 2 * VL : VL;
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
  constexpr int step = BL * 8;
  int8_t* const even = out + k / step * step + k % step / 2;
  for (int i = 0; i < 16; ++i) even[i] = natural[2 * i], even[step / 2 + i] = natural[2 * i + 1];
}

template <int bits, int group, class T>
static int run_rows_as(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  const mlxeff_qweight& w = args.w;
  const bool int8 = args.mode == MLXEFF_COMPUTE_INT8;
  const bool integers = int8 || by_digits<bits>;
  const float shift = integers ? byte_offset<bits> : 0;
  const float* const factors = integers ? args.x_scale : nullptr;
  constexpr auto exact_product = [] {
    if constexpr (by_digits<bits>) return row_digits<bits, group>;
    else return row_exact<bits, group>;
  }();
  const auto row_product = int8 ? row_int8<bits, group> : exact_product;
  const int64_t groups = w.K / group, scale_step = w.ld / group, padded = round_up(groups, VL) + VL;
  const int64_t bytes = row_bytes(w), stride = row_stride(w), ahead = max_of(1, prefetch_distance / bytes);
  // Where rows have gaps: the same place of a later row.
  const int64_t distance = bytes == stride ? prefetch_distance : ceil_div(prefetch_distance, bytes) * stride;
  float* const scales = static_cast<float*>(scratch(Scratch::strip, size_t(padded) * 4));
  if (!scales) return MLXEFF_NO_MEMORY;
  memset(scales, 0, size_t(padded) * 4);
  const T* row_scales = static_cast<const T*>(w.scales) + n_begin * scale_step;
  const T* row_biases = static_cast<const T*>(w.biases) + n_begin * scale_step;
  float out[16];
  for (int64_t n = n_begin; n < n_end; ++n, row_scales += scale_step, row_biases += scale_step) {
    for (int64_t g = ahead * scale_step; g < ahead * scale_step + groups; g += 64 / int64_t(sizeof(T))) {
      __builtin_prefetch(row_scales + g, 0, 3);
      __builtin_prefetch(row_biases + g, 0, 3);
    }
    const vf bias = load_row_scales(row_scales, row_biases, groups, args.x_sum, shift, factors, scales);
    const char* const packed = reinterpret_cast<const char*>(w.packed) + n * stride;
    const int64_t slot = (n - n_begin) % 16;
    out[slot] = row_product(args, packed, distance, scales, bias);
    if (slot == 15 || n + 1 == n_end) store_block(out, 0, 1, slot + 1, args.y, 0, n - slot);
  }
  return MLXEFF_OK;
}

template <int bits, int group>
static int run_rows_of_group(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  if (args.w.scale_dtype == MLXEFF_F32) return run_rows_as<bits, group, float>(args, n_begin, n_end);
  if (args.w.scale_dtype == MLXEFF_F16) return run_rows_as<bits, group, f16>(args, n_begin, n_end);
  return run_rows_as<bits, group, bf16>(args, n_begin, n_end);
}

template <int bits>
static int run_rows(const QmmArgs& args, int64_t n_begin, int64_t n_end) {
  if (args.w.group == 32) return run_rows_of_group<bits, 32>(args, n_begin, n_end);
  if (args.w.group == 64) return run_rows_of_group<bits, 64>(args, n_begin, n_end);
  return run_rows_of_group<bits, 128>(args, n_begin, n_end);
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
