// Where a thread is in the grid: the values of Metal's kernel attributes.
#pragma once

#include "runtime.h"

namespace metal_on_cpu {

inline Triple minimum(Triple a, Triple b) {
  return {a.x < b.x ? a.x : b.x, a.y < b.y ? a.y : b.y, a.z < b.z ? a.z : b.z};
}
inline uint64_t volume(Triple t) { return uint64_t(t.x) * t.y * t.z; }
inline uint32_t divide_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// Thread number `index` of the threadgroup at `place`; threadgroups at the grid's ends are cut off.
inline Attributes attributes_of(uint32_t index, Triple place, Triple grid, Triple nominal, Triple groups) {
  Triple origin{place.x * nominal.x, place.y * nominal.y, place.z * nominal.z};
  Triple size = minimum(nominal, {grid.x - origin.x, grid.y - origin.y, grid.z - origin.z});
  Triple at{index % size.x, index / size.x % size.y, index / (size.x * size.y)};
  uint32_t actual_size = static_cast<uint32_t>(volume(size)), nominal_size = static_cast<uint32_t>(volume(nominal));
  Attributes a{};
  a.thread_position_in_grid = {origin.x + at.x, origin.y + at.y, origin.z + at.z};
  a.thread_position_in_threadgroup = at;
  a.threadgroup_position_in_grid = place;
  a.threads_per_grid = a.grid_size = grid;
  a.threads_per_threadgroup = size;
  a.dispatch_threads_per_threadgroup = nominal;
  a.threadgroups_per_grid = groups;
  a.thread_index_in_threadgroup = index;
  a.thread_index_in_simdgroup = index % simd_width;
  a.thread_index_in_quadgroup = index % 4;
  a.simdgroup_index_in_threadgroup = index / simd_width;
  a.quadgroup_index_in_threadgroup = index / 4;
  a.simdgroups_per_threadgroup = divide_up(actual_size, simd_width);
  a.quadgroups_per_threadgroup = divide_up(actual_size, 4);
  a.dispatch_simdgroups_per_threadgroup = divide_up(nominal_size, simd_width);
  a.dispatch_quadgroups_per_threadgroup = divide_up(nominal_size, 4);
  a.thread_execution_width = a.threads_per_simdgroup = simd_width;
  return a;
}

}  // namespace metal_on_cpu
