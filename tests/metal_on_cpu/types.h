// Metal's scalar and vector types. half and bfloat round after every operation, as on the GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace metal {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using size_t = unsigned long;
using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

template <typename To, typename From>
inline To as_type(const From& value) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  To result;
  std::memcpy(static_cast<void*>(&result), &value, sizeof(To));
  return result;
}

// float32 bits → the nearest value with `mantissa` bits and exponents from `lowest`, ties to even, as an exact float.
inline float round_to(float value, int mantissa, int lowest) {
  if (value == 0 || !std::isfinite(value)) return value;
  int exponent = std::ilogb(value);
  int step = (exponent < lowest ? lowest : exponent) - mantissa;
  return std::ldexp(std::nearbyint(std::ldexp(value, -step)), step);
}

struct HalfFormat {
  static uint16_t encode(float value) {
    uint32_t sign = as_type<uint32_t>(value) >> 16 & 0x8000;
    if (value != value) return static_cast<uint16_t>(sign | 0x7E00);
    float rounded = std::fabs(round_to(value, 10, -14));
    if (rounded > 65504.0f) return static_cast<uint16_t>(sign | 0x7C00);
    if (rounded < 6.103515625e-05f) return static_cast<uint16_t>(sign | static_cast<uint32_t>(rounded * 16777216.0f));
    return static_cast<uint16_t>(sign | ((as_type<uint32_t>(rounded) - 0x38000000u) >> 13));
  }
  static float decode(uint16_t bits) {
    uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7FFF;
    if (rest < 0x400) return as_type<float>(as_type<uint32_t>(rest * 5.9604644775390625e-08f) | sign);
    return as_type<float>(sign | (rest >= 0x7C00 ? 0x7F800000u | rest << 13 : (rest << 13) + 0x38000000u));
  }
};

struct BfloatFormat {
  static uint16_t encode(float value) {
    uint32_t bits = as_type<uint32_t>(value);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
  }
  static float decode(uint16_t bits) { return as_type<float>(static_cast<uint32_t>(bits) << 16); }
};

template <typename Format>
struct Float16 {
  uint16_t bits;

  Float16() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  Float16(T value) : bits(Format::encode(static_cast<float>(value))) {}
  template <typename Other, typename = std::enable_if_t<!std::is_same_v<Format, Other>>>
  explicit Float16(Float16<Other> value) : bits(Format::encode(static_cast<float>(value))) {}
  operator float() const { return Format::decode(bits); }

  template <typename T>
  Float16& operator+=(const T& other) {
    return *this = Float16(float(*this) + float(other));
  }
  template <typename T>
  Float16& operator-=(const T& other) {
    return *this = Float16(float(*this) - float(other));
  }
  template <typename T>
  Float16& operator*=(const T& other) {
    return *this = Float16(float(*this) * float(other));
  }
  template <typename T>
  Float16& operator/=(const T& other) {
    return *this = Float16(float(*this) / float(other));
  }
};

using half = Float16<HalfFormat>;
using bfloat = Float16<BfloatFormat>;

// half op half and half op integer are half; half op float is float, by conversion.
#define METAL_ON_CPU_OPERATOR(op)                                                       \
  template <typename F>                                                                 \
  inline Float16<F> operator op(Float16<F> a, Float16<F> b) {                           \
    return Float16<F>(float(a) op float(b));                                            \
  }                                                                                     \
  template <typename F, typename T, typename = std::enable_if_t<std::is_integral_v<T>>> \
  inline Float16<F> operator op(Float16<F> a, T b) {                                    \
    return Float16<F>(float(a) op float(b));                                            \
  }                                                                                     \
  template <typename F, typename T, typename = std::enable_if_t<std::is_integral_v<T>>> \
  inline Float16<F> operator op(T a, Float16<F> b) {                                    \
    return Float16<F>(float(a) op float(b));                                            \
  }
METAL_ON_CPU_OPERATOR(+)
METAL_ON_CPU_OPERATOR(-)
METAL_ON_CPU_OPERATOR(*)
METAL_ON_CPU_OPERATOR(/)
#undef METAL_ON_CPU_OPERATOR
template <typename F>
inline Float16<F> operator-(Float16<F> a) {
  return as_type<Float16<F>>(static_cast<uint16_t>(a.bits ^ 0x8000));
}
inline half operator""h(long double value) { return half(static_cast<float>(value)); }

template <typename T, int N>
struct Components;
template <typename T>
struct alignas(2 * sizeof(T)) Components<T, 2> {
  T x, y;
};
template <typename T>
struct alignas(4 * sizeof(T)) Components<T, 3> {
  T x, y, z;
};
template <typename T>
struct alignas(4 * sizeof(T)) Components<T, 4> {
  T x, y, z, w;
};

// Vectors. Swizzles of several components are read only; the translator writes them as pick<...>().
template <typename T, int N>
struct vec : Components<T, N> {
  vec() = default;
  template <typename U, typename = std::enable_if_t<std::is_convertible_v<U, T>>>
  vec(U value) {
    for (int i = 0; i < N; i++) (*this)[i] = static_cast<T>(value);
  }
  template <typename U>
  explicit vec(const vec<U, N>& other) {
    for (int i = 0; i < N; i++) (*this)[i] = static_cast<T>(other[i]);
  }
  template <typename A, typename B, typename... Rest>
  vec(const A& a, const B& b, const Rest&... rest) {
    int at = 0;
    put(at, a), put(at, b), (put(at, rest), ...);
    if (at != N) __builtin_trap();
  }
  T& operator[](int i) { return (&this->x)[i]; }
  const T& operator[](int i) const { return (&this->x)[i]; }
  template <int... I>
  const vec<T, sizeof...(I)> pick() const {
    return {(*this)[I]...};
  }

 private:
  template <typename U>
  void put(int& at, const U& value) {
    (*this)[at++] = static_cast<T>(value);
  }
  template <typename U, int M>
  void put(int& at, const vec<U, M>& value) {
    for (int i = 0; i < M; i++) (*this)[at++] = static_cast<T>(value[i]);
  }
};

template <typename T, int N, typename F>
inline auto each(const vec<T, N>& a, const vec<T, N>& b, F function) {
  vec<decltype(function(a[0], b[0])), N> result;
  for (int i = 0; i < N; i++) result[i] = function(a[i], b[i]);
  return result;
}
#define METAL_ON_CPU_OPERATOR(op)                                                                    \
  template <typename T, int N>                                                                       \
  inline auto operator op(const vec<T, N>& a, const vec<T, N>& b) {                                  \
    return each(a, b, [](T l, T r) { return l op r; });                                              \
  }                                                                                                  \
  template <typename T, int N, typename U, typename = std::enable_if_t<std::is_convertible_v<U, T>>> \
  inline auto operator op(const vec<T, N>& a, U b) {                                                 \
    return a op vec<T, N>(static_cast<T>(b));                                                        \
  }                                                                                                  \
  template <typename T, int N, typename U, typename = std::enable_if_t<std::is_convertible_v<U, T>>> \
  inline auto operator op(U a, const vec<T, N>& b) {                                                 \
    return vec<T, N>(static_cast<T>(a)) op b;                                                        \
  }
METAL_ON_CPU_OPERATOR(==)
METAL_ON_CPU_OPERATOR(!=)
METAL_ON_CPU_OPERATOR(<)
METAL_ON_CPU_OPERATOR(>)
METAL_ON_CPU_OPERATOR(<=)
METAL_ON_CPU_OPERATOR(>=)
#undef METAL_ON_CPU_OPERATOR
// The arithmetic ones keep the element type: a vector of short stays one.
#define METAL_ON_CPU_OPERATOR(op)                                                                    \
  template <typename T, int N>                                                                       \
  inline vec<T, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {                             \
    return each(a, b, [](T l, T r) { return static_cast<T>(l op r); });                              \
  }                                                                                                  \
  template <typename T, int N, typename U, typename = std::enable_if_t<std::is_convertible_v<U, T>>> \
  inline vec<T, N> operator op(const vec<T, N>& a, U b) {                                            \
    return a op vec<T, N>(static_cast<T>(b));                                                        \
  }                                                                                                  \
  template <typename T, int N, typename U, typename = std::enable_if_t<std::is_convertible_v<U, T>>> \
  inline vec<T, N> operator op(U a, const vec<T, N>& b) {                                            \
    return vec<T, N>(static_cast<T>(a)) op b;                                                        \
  }                                                                                                  \
  template <typename T, int N, typename U>                                                           \
  inline vec<T, N>& operator op## = (vec<T, N> & a, const U& b) {                                    \
    return a = a op b;                                                                               \
  }
METAL_ON_CPU_OPERATOR(+)
METAL_ON_CPU_OPERATOR(-)
METAL_ON_CPU_OPERATOR(*)
METAL_ON_CPU_OPERATOR(/)
METAL_ON_CPU_OPERATOR(%)
METAL_ON_CPU_OPERATOR(&)
METAL_ON_CPU_OPERATOR(|)
METAL_ON_CPU_OPERATOR(^)
METAL_ON_CPU_OPERATOR(<<)
METAL_ON_CPU_OPERATOR(>>)
#undef METAL_ON_CPU_OPERATOR
template <typename T, int N>
inline vec<T, N> operator-(const vec<T, N>& a) {
  return vec<T, N>(T(0)) - a;
}
template <typename T, int N>
inline vec<T, N> operator~(const vec<T, N>& a) {
  return each(a, a, [](T l, T) { return static_cast<T>(~l); });
}

#define METAL_ON_CPU_VECTORS(type) \
  using type##2 = vec<type, 2>;    \
  using type##3 = vec<type, 3>;    \
  using type##4 = vec<type, 4>;
METAL_ON_CPU_VECTORS(bool)
METAL_ON_CPU_VECTORS(char)
METAL_ON_CPU_VECTORS(uchar)
METAL_ON_CPU_VECTORS(short)
METAL_ON_CPU_VECTORS(ushort)
METAL_ON_CPU_VECTORS(int)
METAL_ON_CPU_VECTORS(uint)
METAL_ON_CPU_VECTORS(long)
METAL_ON_CPU_VECTORS(ulong)
METAL_ON_CPU_VECTORS(float)
METAL_ON_CPU_VECTORS(half)
METAL_ON_CPU_VECTORS(bfloat)
#undef METAL_ON_CPU_VECTORS

}  // namespace metal
