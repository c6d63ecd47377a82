// What a kernel's source includes by itself, for Clang's check of Metal's address spaces (address_spaces.py). It
// declares what this project's kernels need, and nothing here is ever run. Functions of numbers and vectors are
// templates of any type, since the check is of address spaces and not of overloads.
//
// `thread` is the space of local variables, of `this` and of what has no qualifier; but Metal wants the word written.
// With SPELLED it is a space of its own, so that a dump of the types tells where the word is missing. (Most of a source
// is wrong then; `auto` has a type of its own too, since the type that Clang would deduce lacks the word.)
#pragma once

#define device __attribute__((opencl_global))
#define threadgroup __attribute__((opencl_local))
#define constant const __attribute__((opencl_constant))
#ifdef SPELLED
#define thread __attribute__((opencl_private))
#define auto ::Deduced
struct Deduced {};
#else
#define thread
#endif
#define METAL_FUNC inline
#define MLX_MTL_PRAGMA_UNROLL
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using size_t = ulong;
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = uchar;
using uint16_t = ushort;
using uint32_t = uint;
using uint64_t = ulong;
// Words of the language: no variable has such a name. The second one is another type of 16 bits that converts to float.
#define half _Float16
#define bfloat __fp16
using float16_t = half;
using bfloat16_t = bfloat;

namespace metal {

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));
#define VECTORS(type)           \
  using type##2 = vec<type, 2>; \
  using type##3 = vec<type, 3>; \
  using type##4 = vec<type, 4>;
VECTORS(char)
VECTORS(uchar)
VECTORS(short)
VECTORS(ushort)
VECTORS(int)
VECTORS(uint)
VECTORS(long)
VECTORS(ulong)
VECTORS(float)
VECTORS(half)
VECTORS(bfloat)
#undef VECTORS

// What the translator writes for `float4(…)`, and for a threadgroup variable in the body of a kernel.
template <typename V, typename... A>
V make_vector(A...);
template <typename T>
threadgroup T& threadgroup_variable(int);

template <typename To, typename From>
To as_type(From);

#define OF_ONE(name)    \
  template <typename T> \
  T name(T);
#define OF_TWO(name)    \
  template <typename T> \
  T name(T, T);
#define OF_THREE(name)  \
  template <typename T> \
  T name(T, T, T);
// clang-format off
OF_ONE(abs) OF_ONE(fabs) OF_ONE(floor) OF_ONE(ceil) OF_ONE(rint) OF_ONE(round)
OF_ONE(exp) OF_ONE(exp2) OF_ONE(log) OF_ONE(log2) OF_ONE(sqrt) OF_ONE(rsqrt) OF_ONE(sin) OF_ONE(cos) OF_ONE(tanh)
OF_ONE(popcount) OF_ONE(clz) OF_ONE(ctz)
OF_TWO(min) OF_TWO(max) OF_TWO(pow)
OF_THREE(fma) OF_THREE(clamp)

OF_ONE(simd_sum) OF_ONE(simd_max) OF_ONE(simd_min) OF_ONE(simd_or) OF_ONE(simd_and)
OF_ONE(simd_prefix_inclusive_sum) OF_ONE(simd_prefix_exclusive_sum) OF_ONE(simd_broadcast_first)
#undef OF_ONE
#undef OF_TWO
#undef OF_THREE
template <typename T>
T simd_shuffle(T, ushort);
// clang-format on
template <typename T>
T simd_shuffle_xor(T, ushort);
template <typename T>
T simd_shuffle_down(T, ushort);
template <typename T>
T simd_shuffle_up(T, ushort);
template <typename T>
T simd_broadcast(T, ushort);

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <typename T, int R, int C>
struct simdgroup_matrix {
  thread vec<T, 2>& thread_elements();
};
template <typename T, int R, int C>
simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T);
template <typename T, int R, int C>
void simdgroup_load(thread simdgroup_matrix<T, R, C>&, const device T*, ulong = 8, ulong2 = 0, bool = false);
template <typename T, int R, int C>
void simdgroup_load(thread simdgroup_matrix<T, R, C>&, const threadgroup T*, ulong = 8, ulong2 = 0, bool = false);
template <typename T, int R, int C>
void simdgroup_store(const thread simdgroup_matrix<T, R, C>&, device T*, ulong = 8, ulong2 = 0, bool = false);
template <typename T, int R, int C>
void simdgroup_store(const thread simdgroup_matrix<T, R, C>&, threadgroup T*, ulong = 8, ulong2 = 0, bool = false);
template <typename D, typename A, typename B, typename E, int R, int K, int C>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, R, C>&, const thread simdgroup_matrix<A, R, K>&,
                                   const thread simdgroup_matrix<B, K, C>&, const thread simdgroup_matrix<E, R, C>&);

}  // namespace metal

// What MLX puts in front of every custom kernel.
template <typename Index = int64_t>
Index elem_to_loc(Index element, const constant int* shape, const constant int64_t* strides, int ndim);
