// What the compiled kernel and the scheduler know of each other. Both are C++17; only the kernel is instrumented by the
// thread sanitizer, which learns of the scheduler's fibers and barriers by its annotations.
#pragma once

#include <cstddef>
#include <cstdint>

namespace metal_on_cpu {

constexpr uint32_t simd_width = 32;
constexpr uint32_t max_threads = 1024;       // a threadgroup, on every Apple GPU
constexpr size_t threadgroup_limit = 32768;  // bytes a threadgroup may hold on every Apple GPU
constexpr size_t slot_bytes = 64;            // the widest value that lanes exchange

struct Triple {
  uint32_t x, y, z;
};

// The values of Metal's kernel attributes for one thread.
struct Attributes {
  Triple thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  Triple threads_per_grid, threads_per_threadgroup, threadgroups_per_grid, dispatch_threads_per_threadgroup;
  Triple grid_size, grid_origin;
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, thread_index_in_quadgroup;
  uint32_t simdgroup_index_in_threadgroup, simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  uint32_t quadgroup_index_in_threadgroup, quadgroups_per_threadgroup, dispatch_quadgroups_per_threadgroup;
  uint32_t thread_execution_width, threads_per_simdgroup;
};

// The 32 values that the lanes of a simdgroup brought to one operation; valid until the second next one.
struct Exchanged {
  const unsigned char* slots;
  uint32_t active;  // bit i: lane i took part
};

const Attributes& attributes();
Exchanged exchange(const void* value, size_t bytes, const char* operation, int line);
void simdgroup_barrier(bool orders_memory, int line);
void threadgroup_barrier(bool orders_memory, int line);

// The threadgroup variable number `id` of the kernel: the same bytes for all threads of a group, filled with 0xFF
// before.
void* threadgroup_memory(int id, size_t bytes);

// A launch: begin, the threadgroups in turn, end. `descending`: the threads run from the last to the first.
void begin(void** buffers);
void run_threadgroup(Triple place, Triple grid, Triple nominal, Triple groups, bool descending);
void end();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace metal_on_cpu

// Generated for each kernel: calls it once, as the current thread.
extern "C" void metal_kernel_entry(void** buffers);
