// Metal's scalar, integer and geometric functions, of float and of vectors component by component.
#pragma once

#include "types.h"

namespace metal {

#define METAL_ON_CPU_UNARY(name, expression)                            \
  inline float name(float x) { return static_cast<float>(expression); } \
  template <typename F>                                                 \
  inline Float16<F> name(Float16<F> x) {                                \
    return Float16<F>(name(float(x)));                                  \
  }                                                                     \
  template <typename T, int N>                                          \
  inline vec<T, N> name(const vec<T, N>& x) {                           \
    return each(x, x, [](T l, T) { return static_cast<T>(name(l)); });  \
  }
METAL_ON_CPU_UNARY(exp, std::exp(x))
METAL_ON_CPU_UNARY(exp2, std::exp2(x))
METAL_ON_CPU_UNARY(exp10, std::pow(10.0f, x))
METAL_ON_CPU_UNARY(log, std::log(x))
METAL_ON_CPU_UNARY(log2, std::log2(x))
METAL_ON_CPU_UNARY(log10, std::log10(x))
METAL_ON_CPU_UNARY(sqrt, std::sqrt(x))
METAL_ON_CPU_UNARY(rsqrt, 1.0f / std::sqrt(x))
METAL_ON_CPU_UNARY(sin, std::sin(x))
METAL_ON_CPU_UNARY(cos, std::cos(x))
METAL_ON_CPU_UNARY(tan, std::tan(x))
METAL_ON_CPU_UNARY(tanh, std::tanh(x))
METAL_ON_CPU_UNARY(sinh, std::sinh(x))
METAL_ON_CPU_UNARY(cosh, std::cosh(x))
METAL_ON_CPU_UNARY(asin, std::asin(x))
METAL_ON_CPU_UNARY(acos, std::acos(x))
METAL_ON_CPU_UNARY(atan, std::atan(x))
METAL_ON_CPU_UNARY(floor, std::floor(x))
METAL_ON_CPU_UNARY(ceil, std::ceil(x))
METAL_ON_CPU_UNARY(trunc, std::trunc(x))
METAL_ON_CPU_UNARY(rint, std::nearbyint(x))
METAL_ON_CPU_UNARY(round, std::round(x))
METAL_ON_CPU_UNARY(fract, x - std::floor(x))
METAL_ON_CPU_UNARY(fabs, std::fabs(x))
METAL_ON_CPU_UNARY(sign, x > 0 ? 1 : x < 0 ? -1 : 0)
METAL_ON_CPU_UNARY(saturate, x > 0 ? (x < 1 ? x : 1) : 0)
#undef METAL_ON_CPU_UNARY

inline bool isnan(float x) { return x != x; }
inline bool isinf(float x) { return std::isinf(x); }
inline bool isfinite(float x) { return std::isfinite(x); }
inline bool signbit(float x) { return std::signbit(x); }
inline float pow(float x, float y) { return std::pow(x, y); }
inline float powr(float x, float y) { return std::pow(x, y); }
inline float fmod(float x, float y) { return std::fmod(x, y); }
inline float atan2(float y, float x) { return std::atan2(y, x); }
inline float copysign(float x, float y) { return std::copysign(x, y); }
inline float ldexp(float x, int n) { return std::ldexp(x, n); }
inline int ilogb(float x) { return std::ilogb(x); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <typename F>
inline Float16<F> fma(Float16<F> a, Float16<F> b, Float16<F> c) {
  return Float16<F>(static_cast<float>(double(float(a)) * float(b) + float(c)));
}
template <typename T, int N>
inline vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result[i] = fma(a[i], b[i], c[i]);
  return result;
}

template <typename T>
inline T abs(T x) {
  return x < T(0) ? T(-x) : x;
}
template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
inline float fmin(float a, float b) { return std::fmin(a, b); }
inline float fmax(float a, float b) { return std::fmax(a, b); }
template <typename T, int N>
inline vec<T, N> min(const vec<T, N>& a, const vec<T, N>& b) {
  return each(a, b, [](T l, T r) { return min(l, r); });
}
template <typename T, int N>
inline vec<T, N> max(const vec<T, N>& a, const vec<T, N>& b) {
  return each(a, b, [](T l, T r) { return max(l, r); });
}
template <typename T>
inline T mix(T a, T b, T t) {
  return a + (b - a) * t;
}
template <typename T>
inline T select(T a, T b, bool second) {
  return second ? b : a;
}
template <typename T, int N>
inline T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum = sum + a[i] * b[i];
  return sum;
}
template <typename T, int N>
inline bool any(const vec<T, N>& a) {
  for (int i = 0; i < N; i++)
    if (a[i]) return true;
  return false;
}
template <typename T, int N>
inline bool all(const vec<T, N>& a) {
  for (int i = 0; i < N; i++)
    if (!a[i]) return false;
  return true;
}

template <typename T>
inline T popcount(T x) {
  return static_cast<T>(__builtin_popcountll(std::make_unsigned_t<T>(x)));
}
template <typename T>
inline T clz(T x) {
  int width = 8 * sizeof(T);
  return static_cast<T>(x == 0 ? width : __builtin_clzll(std::make_unsigned_t<T>(x)) - (64 - width));
}
template <typename T>
inline T ctz(T x) {
  return static_cast<T>(x == 0 ? 8 * sizeof(T) : __builtin_ctzll(std::make_unsigned_t<T>(x)));
}
template <typename T>
inline T extract_bits(T x, uint offset, uint bits) {
  constexpr uint width = 8 * sizeof(T);
  if (bits == 0) return 0;
  if (offset + bits > width) __builtin_trap();  // undefined in Metal
  return static_cast<T>(static_cast<T>(static_cast<std::make_unsigned_t<T>>(x) << (width - offset - bits)) >>
                        (width - bits));
}
template <typename T>
inline T insert_bits(T base, T inserted, uint offset, uint bits) {
  using U = std::make_unsigned_t<T>;
  if (offset + bits > 8 * sizeof(T)) __builtin_trap();  // undefined in Metal
  U mask = static_cast<U>((bits == 8 * sizeof(T) ? ~U(0) : static_cast<U>((U(1) << bits) - 1)) << offset);
  return static_cast<T>((U(base) & ~mask) | ((U(inserted) << offset) & mask));
}
template <typename T>
inline T reverse_bits(T x) {
  T result = 0;
  for (size_t i = 0; i < 8 * sizeof(T); i++) result = static_cast<T>(result << 1 | (x >> i & 1));
  return result;
}
template <typename T>
inline T rotate(T x, T by) {
  constexpr uint width = 8 * sizeof(T);
  using U = std::make_unsigned_t<T>;
  uint left = static_cast<uint>(by) % width;
  return static_cast<T>(left == 0 ? U(x) : static_cast<U>(U(x) << left | U(x) >> (width - left)));
}
inline uint mulhi(uint a, uint b) { return static_cast<uint>(static_cast<ulong>(a) * b >> 32); }

namespace precise {
using namespace metal;
}
namespace fast {
using namespace metal;
}

}  // namespace metal

// What MLX puts in front of every custom kernel: its type names and the index arithmetic of strided arrays.
using float16_t = metal::half;
using bfloat16_t = metal::bfloat;

template <typename U>
struct Limits {
  static constexpr U max = std::numeric_limits<U>::max(), min = std::numeric_limits<U>::lowest();
  static constexpr U finite_max = max, finite_min = min;
};
template <>
struct Limits<float> {
  static constexpr float max = std::numeric_limits<float>::infinity(), min = -max;
  static constexpr float finite_max = std::numeric_limits<float>::max(), finite_min = -finite_max;
};

template <typename Index = std::int64_t>
inline Index elem_to_loc(Index element, const int* shape, const std::int64_t* strides, int ndim) {
  Index place = 0;
  for (int i = ndim - 1; i >= 0 && element > 0; --i) {
    place += (element % shape[i]) * Index(strides[i]);
    element /= shape[i];
  }
  return place;
}
template <typename Index = std::int64_t>
inline Index elem_to_loc(metal::uint element, const int* shape, const std::int64_t* strides, int ndim) {
  return elem_to_loc<Index>(static_cast<Index>(element), shape, strides, ndim);
}
template <typename T, typename U>
inline T ceildiv(T a, U b) {
  return (a + b - 1) / b;
}
