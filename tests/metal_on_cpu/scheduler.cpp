// Runs the threads of a threadgroup: each GPU thread a fiber, the lanes of a simdgroup in lockstep at every operation
// that exchanges values.
#define _XOPEN_SOURCE 700
#include "grid.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef METAL_ON_CPU_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef METAL_ON_CPU_THREAD
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace metal_on_cpu {
namespace {

constexpr size_t stack_bytes = 1 << 18;
constexpr size_t arena_bytes = 1 << 17;  // of one threadgroup: its variables, each between poisoned gaps
constexpr size_t gap = 64;

#ifdef METAL_ON_CPU_THREAD
void acquire(void* address) { __tsan_acquire(address); }
void release(void* address) { __tsan_release(address); }
#else
void acquire(void*) {}
void release(void*) {}
#endif

// Not memcpy: the thread sanitizer would take it for an access of the kernel's thread.
void put(volatile unsigned char* target, const unsigned char* source, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) target[i] = source[i];
}

struct Fiber {
  ucontext_t context;
  const void* stack = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
  void* identity = nullptr;  // the thread sanitizer's
};

// A meeting of threads: all `alive` members arrive, then all go on.
struct Meeting {
  const char* operation = nullptr;
  int line = 0;
  uint32_t alive = 0, arrived = 0, phase = 0;
  uint32_t mask = 0, active[2] = {};
  char order[2] = {};  // addresses that stand for "before the meeting happens before after it"
};

struct Simdgroup {
  Meeting meeting;
  alignas(16) unsigned char slots[2][simd_width * slot_bytes];
};

enum class State { ready, waiting, done };

struct Thread {
  Fiber fiber;
  Attributes attributes;
  State state = State::done;
  const Meeting* waits_for = nullptr;
};

struct Group {
  Meeting meeting;
  Simdgroup simdgroups[max_threads / simd_width];
  uint32_t size = 0, done = 0;
  unsigned char* arena = nullptr;
  size_t used = 0, held = 0;
  std::vector<void*> variables;
};

Thread threads[max_threads];
Group group;
Fiber scheduler;
Thread* current = nullptr;
void** buffers = nullptr;
char group_begins, launch_ends;  // the scheduler's preparations before a group, the threads' work before the end

void switch_fiber(Fiber& from, Fiber& to) {
#ifdef METAL_ON_CPU_ADDRESS
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);
#endif
#ifdef METAL_ON_CPU_THREAD
  __tsan_switch_to_fiber(to.identity, 1);  // 1: a switch orders nothing
#endif
  swapcontext(&from.context, &to.context);
#ifdef METAL_ON_CPU_ADDRESS
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void pause_thread() { switch_fiber(current->fiber, scheduler); }

Simdgroup& simdgroup_of(const Thread& thread) {
  return group.simdgroups[thread.attributes.simdgroup_index_in_threadgroup];
}

void open(Meeting& meeting) {
  meeting.active[meeting.phase & 1] = meeting.mask;
  meeting.arrived = meeting.mask = 0;
  meeting.phase++;
  for (uint32_t i = 0; i < group.size; i++)
    if (threads[i].state == State::waiting && threads[i].waits_for == &meeting) threads[i].state = State::ready;
}

// Arrives and waits for the others; returns the parity of this meeting.
uint32_t meet(Meeting& meeting, const char* operation, int line, bool orders_memory) {
  const Attributes& me = current->attributes;
  if (meeting.arrived == 0) {
    meeting.operation = operation;
    meeting.line = line;
  } else if (meeting.line != line || strcmp(meeting.operation, operation) != 0) {
    fail("thread %u is at %s in line %d, others of its group are at %s in line %d", me.thread_index_in_threadgroup,
         operation, line, meeting.operation, meeting.line);
  }
  uint32_t parity = meeting.phase & 1;
  if (orders_memory) release(&meeting.order[parity]);
  meeting.mask |= 1u << me.thread_index_in_simdgroup;
  if (++meeting.arrived == meeting.alive) {
    open(meeting);
  } else {
    current->state = State::waiting;
    current->waits_for = &meeting;
    pause_thread();
  }
  if (orders_memory) acquire(&meeting.order[parity]);
  return parity;
}

void leave(Meeting& meeting) {
  if (--meeting.alive > 0 && meeting.arrived == meeting.alive) open(meeting);
}

[[noreturn]] void run_thread() {
#ifdef METAL_ON_CPU_ADDRESS
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  if (scheduler.stack == nullptr) {
    scheduler.stack = stack;
    scheduler.size = size;
  }
#endif
  for (;;) {
    acquire(&group_begins);
    metal_kernel_entry(buffers);
    if (group.meeting.arrived > 0)
      fail("thread %u returned, others wait at threadgroup_barrier in line %d",
           current->attributes.thread_index_in_threadgroup, group.meeting.line);
    current->state = State::done;
    group.done++;
    group.meeting.alive--;
    leave(simdgroup_of(*current).meeting);
    release(&launch_ends);
    pause_thread();
  }
}

void create(Thread& thread) {
  void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) fail("no memory for the stack of a thread");
  thread.fiber.stack = stack;
  thread.fiber.size = stack_bytes;
#ifdef METAL_ON_CPU_THREAD
  thread.fiber.identity = __tsan_create_fiber(0);
#endif
  getcontext(&thread.fiber.context);
  thread.fiber.context.uc_stack.ss_sp = stack;
  thread.fiber.context.uc_stack.ss_size = stack_bytes;
  thread.fiber.context.uc_link = nullptr;
  makecontext(&thread.fiber.context, reinterpret_cast<void (*)()>(run_thread), 0);
}

[[noreturn]] void report_deadlock() {
  for (uint32_t i = 0; i < group.size; i++)
    if (threads[i].state == State::waiting)
      fprintf(stderr, "thread %u waits at %s in line %d\n", i, threads[i].waits_for->operation,
              threads[i].waits_for->line);
  fail("the threads of a threadgroup wait for each other at different places");
}

// A fresh arena for each group: what one group left behind is not seen by the next, and is no race with it.
void renew_arena() {
  if (group.arena != nullptr) munmap(group.arena, arena_bytes);
  void* arena = mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (arena == MAP_FAILED) fail("no memory for threadgroup variables");
  group.arena = static_cast<unsigned char*>(arena);
#ifdef METAL_ON_CPU_ADDRESS
  __asan_poison_memory_region(group.arena, arena_bytes);
#endif
  group.used = group.held = 0;
  group.variables.assign(group.variables.size(), nullptr);
}

void begin_group(Triple place, Triple grid, Triple nominal, Triple groups) {
  group.size = static_cast<uint32_t>(volume(attributes_of(0, place, grid, nominal, groups).threads_per_threadgroup));
  group.done = 0;
  group.meeting = Meeting{};
  group.meeting.alive = group.size;
  for (Simdgroup& simdgroup : group.simdgroups) simdgroup.meeting = Meeting{};
  for (uint32_t i = 0; i < group.size; i++) {
    if (threads[i].fiber.stack == nullptr) create(threads[i]);
    threads[i].attributes = attributes_of(i, place, grid, nominal, groups);
    threads[i].state = State::ready;
    simdgroup_of(threads[i]).meeting.alive++;
  }
  renew_arena();
}

void run_group(bool descending) {
  while (group.done < group.size) {
    bool progress = false;
    for (uint32_t i = 0; i < group.size; i++) {
      Thread& thread = threads[descending ? group.size - 1 - i : i];
      if (thread.state != State::ready) continue;
      progress = true;
      current = &thread;
      switch_fiber(scheduler, thread.fiber);
    }
    if (!progress) report_deadlock();
  }
}

}  // namespace

void begin(void** kernel_buffers) {
  buffers = kernel_buffers;
#ifdef METAL_ON_CPU_THREAD
  scheduler.identity = __tsan_get_current_fiber();
#endif
}

void run_threadgroup(Triple place, Triple grid, Triple nominal, Triple groups, bool descending) {
  begin_group(place, grid, nominal, groups);
  release(&group_begins);
  run_group(descending);
}

void end() { acquire(&launch_ends); }

const Attributes& attributes() { return current->attributes; }

Exchanged exchange(const void* value, size_t bytes, const char* operation, int line) {
  Simdgroup& simdgroup = simdgroup_of(*current);
  uint32_t parity = simdgroup.meeting.phase & 1;
  unsigned char* slot = simdgroup.slots[parity] + current->attributes.thread_index_in_simdgroup * slot_bytes;
  put(slot, static_cast<const unsigned char*>(value), bytes);
  meet(simdgroup.meeting, operation, line, false);
  return {simdgroup.slots[parity], simdgroup.meeting.active[parity]};
}

void simdgroup_barrier(bool orders_memory, int line) {
  meet(simdgroup_of(*current).meeting, "simdgroup_barrier", line, orders_memory);
}

void threadgroup_barrier(bool orders_memory, int line) {
  if (group.done > 0)
    fail("thread %u is at threadgroup_barrier in line %d, %u threads of its group have returned",
         current->attributes.thread_index_in_threadgroup, line, group.done);
  meet(group.meeting, "threadgroup_barrier", line, orders_memory);
}

void* threadgroup_memory(int id, size_t bytes) {
  if (group.variables.size() <= static_cast<size_t>(id)) group.variables.resize(id + 1);
  if (group.variables[id] != nullptr) return group.variables[id];
  group.held += bytes;
  if (group.held > threadgroup_limit) fail("threadgroup memory: %zu bytes, at most %zu", group.held, threadgroup_limit);
  unsigned char* data = group.arena + group.used + gap;
  group.used += (bytes + 2 * gap) / gap * gap + gap;
  if (group.used > arena_bytes) fail("more than %zu threadgroup variables", group.variables.size());
#ifdef METAL_ON_CPU_ADDRESS
  __asan_unpoison_memory_region(data, bytes);
#endif
  for (size_t i = 0; i < bytes; i++) static_cast<volatile unsigned char*>(data)[i] = 0xFF;
  return group.variables[id] = data;
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("metal_on_cpu: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  fflush(stderr);
  _Exit(3);
}

}  // namespace metal_on_cpu
