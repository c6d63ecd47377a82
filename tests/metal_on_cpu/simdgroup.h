// What the threads of a group do together: exchanges in a simdgroup, matrices of 8 by 8, barriers, atomics.
#pragma once

#include "functions.h"
#include "runtime.h"

namespace metal {

using metal_on_cpu::Exchanged;

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return static_cast<mem_flags>(int(a) | int(b)); }
inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  metal_on_cpu::threadgroup_barrier(flags != mem_flags::mem_none, line);
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  metal_on_cpu::simdgroup_barrier(flags != mem_flags::mem_none, line);
}

// What `threadgroup T name[...];` in a kernel's body becomes, with a number for each such variable.
template <typename T>
inline T& threadgroup_variable(int id) {
  return *static_cast<T*>(metal_on_cpu::threadgroup_memory(id, sizeof(T)));
}

inline uint lane() { return metal_on_cpu::attributes().thread_index_in_simdgroup; }
template <typename T>
inline T value_of(const Exchanged& all, uint index) {
  T value;
  std::memcpy(static_cast<void*>(&value), all.slots + index * metal_on_cpu::slot_bytes, sizeof(T));
  return value;
}
inline bool took_part(const Exchanged& all, uint index) { return index < 32 && (all.active >> index & 1); }
template <typename T>
inline Exchanged exchange(const T& value, const char* operation, int line) {
  static_assert(sizeof(T) <= metal_on_cpu::slot_bytes, "exchange: the value is too wide");
  return metal_on_cpu::exchange(&value, sizeof(T), operation, line);
}

// Reductions over the active lanes with numbers in [begin, end), combined in pairs that are `stride` apart.
template <typename T, typename F>
inline T reduce(const Exchanged& all, uint begin, uint end, F combine) {
  T values[32];
  uint count = 0;
  for (uint i = begin; i < end; i++)
    if (took_part(all, i)) values[count++] = value_of<T>(all, i);
  for (uint stride = 1; stride < count; stride *= 2)
    for (uint i = 0; i + stride < count; i += 2 * stride) values[i] = combine(values[i], values[i + stride]);
  return values[0];
}
#define METAL_ON_CPU_REDUCTION(name, expression)                                                           \
  template <typename T>                                                                                    \
  inline T simd_##name(T value, int line = __builtin_LINE()) {                                             \
    return reduce<T>(exchange(value, "simd_" #name, line), 0, 32, [](T a, T b) { return T(expression); }); \
  }                                                                                                        \
  template <typename T>                                                                                    \
  inline T quad_##name(T value, int line = __builtin_LINE()) {                                             \
    Exchanged all = exchange(value, "quad_" #name, line);                                                  \
    return reduce<T>(all, lane() & ~3u, (lane() & ~3u) + 4, [](T a, T b) { return T(expression); });       \
  }
METAL_ON_CPU_REDUCTION(sum, a + b)
METAL_ON_CPU_REDUCTION(product, a* b)
METAL_ON_CPU_REDUCTION(max, metal::max(a, b))
METAL_ON_CPU_REDUCTION(min, metal::min(a, b))
METAL_ON_CPU_REDUCTION(and, a& b)
METAL_ON_CPU_REDUCTION(or, a | b)
METAL_ON_CPU_REDUCTION(xor, a ^ b)
#undef METAL_ON_CPU_REDUCTION

template <typename T>
inline T simd_prefix_inclusive_sum(T value, int line = __builtin_LINE()) {
  return reduce<T>(exchange(value, "simd_prefix_inclusive_sum", line), 0, lane() + 1,
                   [](T a, T b) { return T(a + b); });
}
template <typename T>
inline T simd_prefix_exclusive_sum(T value, int line = __builtin_LINE()) {
  Exchanged all = exchange(value, "simd_prefix_exclusive_sum", line);
  bool first = lane() == 0 || (all.active & ((1u << lane()) - 1)) == 0;
  return first ? T(0) : reduce<T>(all, 0, lane(), [](T a, T b) { return T(a + b); });
}

// Shuffles. Reading a lane that does not take part is undefined in Metal: an error here.
template <typename T>
inline T read_lane(const Exchanged& all, uint from, const char* operation, int line) {
  if (!took_part(all, from))
    metal_on_cpu::fail("%s in line %d: lane %u reads lane %u, which does not take part", operation, line, lane(), from);
  return value_of<T>(all, from);
}
template <typename T>
inline T simd_shuffle(T value, ushort from, int line = __builtin_LINE()) {
  return read_lane<T>(exchange(value, "simd_shuffle", line), from, "simd_shuffle", line);
}
template <typename T>
inline T simd_broadcast(T value, ushort from, int line = __builtin_LINE()) {
  return read_lane<T>(exchange(value, "simd_broadcast", line), from, "simd_broadcast", line);
}
template <typename T>
inline T simd_broadcast_first(T value, int line = __builtin_LINE()) {
  Exchanged all = exchange(value, "simd_broadcast_first", line);
  return value_of<T>(all, __builtin_ctz(all.active));
}
template <typename T>
inline T simd_shuffle_xor(T value, ushort mask, int line = __builtin_LINE()) {
  return read_lane<T>(exchange(value, "simd_shuffle_xor", line), lane() ^ mask, "simd_shuffle_xor", line);
}
template <typename T>
inline T quad_shuffle_xor(T value, ushort mask, int line = __builtin_LINE()) {
  return read_lane<T>(exchange(value, "quad_shuffle_xor", line), lane() ^ (mask & 3), "quad_shuffle_xor", line);
}
// The lanes that would read past an end keep their own value, as Metal defines.
template <typename T>
inline T simd_shuffle_up(T value, ushort delta, int line = __builtin_LINE()) {
  Exchanged all = exchange(value, "simd_shuffle_up", line);
  return lane() < delta ? value : read_lane<T>(all, lane() - delta, "simd_shuffle_up", line);
}
template <typename T>
inline T simd_shuffle_down(T value, ushort delta, int line = __builtin_LINE()) {
  Exchanged all = exchange(value, "simd_shuffle_down", line);
  return lane() + delta > 31 ? value : read_lane<T>(all, lane() + delta, "simd_shuffle_down", line);
}
template <typename T>
inline T simd_shuffle_rotate_down(T value, ushort delta, int line = __builtin_LINE()) {
  Exchanged all = exchange(value, "simd_shuffle_rotate_down", line);
  return read_lane<T>(all, (lane() + delta) & 31, "simd_shuffle_rotate_down", line);
}
inline bool simd_any(bool value, int line = __builtin_LINE()) {
  return reduce<bool>(exchange(value, "simd_any", line), 0, 32, [](bool a, bool b) { return a || b; });
}
inline bool simd_all(bool value, int line = __builtin_LINE()) {
  return reduce<bool>(exchange(value, "simd_all", line), 0, 32, [](bool a, bool b) { return a && b; });
}

// An 8 by 8 matrix held by 32 lanes, two neighbours of a row each, in the arrangement that MLX's own kernels rely on.
template <typename T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "simdgroup_matrix: 8 by 8");
  vec<T, 2> held;

  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    for (int i = 0; i < 2; i++) held[i] = row() == column() + i ? diagonal : T(0);
  }
  vec<T, 2>& thread_elements() { return held; }
  static int row() { return (lane() / 4 & 4) + lane() / 2 % 4; }
  static int column() { return (lane() / 4 & 2) * 2 + lane() % 2 * 2; }
  static uint holder(int row, int column) { return (row / 4 * 4 + column / 4 * 2) * 4 + row % 4 * 2 + column / 2 % 2; }
};
template <typename T, int Rows, int Columns>
inline simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> result;
  result.held = vec<T, 2>(value, value);
  return result;
}
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <typename T, int R, int C>
inline size_t matrix_place(ulong stride, ulong2 origin, bool transposed, int element) {
  using M = simdgroup_matrix<T, R, C>;
  size_t row = M::row(), column = M::column() + element;
  return transposed ? (origin.y + column) * stride + origin.x + row : (origin.y + row) * stride + origin.x + column;
}
template <typename T, int R, int C>
inline void simdgroup_load(simdgroup_matrix<T, R, C>& m, const T* source, ulong stride = 8,
                           ulong2 origin = ulong2(0, 0), bool transposed = false) {
  for (int i = 0; i < 2; i++) m.held[i] = source[matrix_place<T, R, C>(stride, origin, transposed, i)];
}
template <typename T, int R, int C>
inline void simdgroup_store(const simdgroup_matrix<T, R, C>& m, T* target, ulong stride = 8,
                            ulong2 origin = ulong2(0, 0), bool transposed = false) {
  for (int i = 0; i < 2; i++) target[matrix_place<T, R, C>(stride, origin, transposed, i)] = m.held[i];
}
template <typename D, typename A, typename B, typename E>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<E, 8, 8>& c,
                                          int line = __builtin_LINE()) {
  struct Both {
    vec<A, 2> a;
    vec<B, 2> b;
  };
  using M = simdgroup_matrix<D, 8, 8>;
  Exchanged all = exchange(Both{a.held, b.held}, "simdgroup_multiply_accumulate", line);
  if (all.active != ~0u) metal_on_cpu::fail("simdgroup_multiply_accumulate in line %d: not all lanes are there", line);
  for (int i = 0; i < 2; i++) {
    float sum = float(c.held[i]);
    int row = M::row(), column = M::column() + i;
    for (int k = 0; k < 8; k++) {
      float left = float(value_of<Both>(all, M::holder(row, k)).a[k % 2]);
      float right = float(value_of<Both>(all, M::holder(k, column)).b[column % 2]);
      sum = fma(left, right, sum);
    }
    d.held[i] = D(sum);
  }
}
template <typename D, typename A, typename B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                               const simdgroup_matrix<B, 8, 8>& b, int line = __builtin_LINE()) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8, 8>(D(0)), line);
}

// Atomics on device and threadgroup memory; every order is relaxed, as Metal offers no other for them.
enum memory_order { memory_order_relaxed };
template <typename T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
using atomic_bool = atomic<bool>;

template <typename T>
inline T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  T result;
  __atomic_load(const_cast<T*>(&object->value), &result, __ATOMIC_RELAXED);
  return result;
}
template <typename T, typename U>
inline void atomic_store_explicit(volatile atomic<T>* object, U desired, memory_order) {
  T value = static_cast<T>(desired);
  __atomic_store(const_cast<T*>(&object->value), &value, __ATOMIC_RELAXED);
}
template <typename T, typename F>
inline T atomic_update(volatile atomic<T>* object, F function) {
  T* place = const_cast<T*>(&object->value);
  T expected, desired;
  __atomic_load(place, &expected, __ATOMIC_RELAXED);
  do desired = static_cast<T>(function(expected));
  while (!__atomic_compare_exchange(place, &expected, &desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return expected;
}
#define METAL_ON_CPU_ATOMIC(name, expression)                                              \
  template <typename T, typename U>                                                        \
  inline T atomic_##name##_explicit(volatile atomic<T>* object, U operand, memory_order) { \
    T o = static_cast<T>(operand);                                                         \
    return atomic_update(object, [o](T v) { return expression; });                         \
  }
METAL_ON_CPU_ATOMIC(exchange, ((void)v, o))
METAL_ON_CPU_ATOMIC(fetch_add, v + o)
METAL_ON_CPU_ATOMIC(fetch_sub, v - o)
METAL_ON_CPU_ATOMIC(fetch_min, metal::min(v, o))
METAL_ON_CPU_ATOMIC(fetch_max, metal::max(v, o))
METAL_ON_CPU_ATOMIC(fetch_and, v& o)
METAL_ON_CPU_ATOMIC(fetch_or, v | o)
METAL_ON_CPU_ATOMIC(fetch_xor, v ^ o)
#undef METAL_ON_CPU_ATOMIC
template <typename T>
inline bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object, T* expected, T desired, memory_order,
                                                  memory_order) {
  return __atomic_compare_exchange(const_cast<T*>(&object->value), expected, &desired, true, __ATOMIC_RELAXED,
                                   __ATOMIC_RELAXED);
}

}  // namespace metal
