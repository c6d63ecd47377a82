// One persistent thread pool for all kernels of the process. See pool.cpp for how it behaves.
#pragma once
#include <atomic>

#include "base/common.h"

namespace mlxeff {

// The threads that execute one parallel region together. A member may arrive at any time: it runs through the steps
// that are done already and takes part from there.
class Team {
 public:
  int count;  // the most members there can be; the same number for each of them

  // Run body(context, begin, end) over [0, n) in pieces of `chunk`, and return when all of it is done. Members take
  // pieces as they become free, so a member that the system has suspended delays the others by the piece that it
  // holds, or not at all. Each member must call for_chunks the same number of times, in the same order, with the same n
  // and chunk. A member that arrives when the work is already done returns at once: between two for_chunks, code may
  // not assume that all members passed the first.
  void for_chunks(int64_t n, int64_t chunk, void (*body)(void* context, int64_t begin, int64_t end), void* context);

  template <class Body>
  void for_chunks(int64_t n, int64_t chunk, Body&& body) {
    for_chunks(
        n, chunk, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
  }

  // The same with body(row) for each of `rows` rows.
  template <class Body>
  void for_rows(int64_t rows, Body&& body) {
    for_chunks(rows, row_chunk(rows), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(row);
    });
  }
  // A piece of rows that each take about as long: several for each member, so that they end together.
  int64_t row_chunk(int64_t rows) const { return max_of(1, rows / (8 * count)); }

 private:
  friend class Pool;
  Team(int count, class Pool* pool) : count(count), pool_(pool) {}
  class Pool* pool_;  // null for a team of one
  uint32_t phase_ = 0;
};

// Run function(team, context) on each member of a team: the caller, and idle threads as they wake. It returns when the
// caller's call and those of all who joined have. From inside a region, or while another thread uses the pool, the team
// is the caller alone.
void team_run(void (*function)(Team& team, void* context), void* context);

// body(context, begin, end) over [0, n) in pieces of `chunk`, by as many threads as are free. Idle threads may join at
// any time.
void parallel_for(int64_t n, int64_t chunk, void (*body)(void* context, int64_t begin, int64_t end), void* context);

int num_threads();

// A buffer of at least `bytes` bytes, 64-byte aligned, that belongs to the calling thread; its content lasts until the
// thread asks for the same slot again. Null when memory is exhausted.
enum class Scratch { shared_input, strip, panel, accumulator, count };
void* scratch(Scratch slot, size_t bytes);

// The same for callables.
template <class Body>
static inline void team_run(Body&& body) {
  team_run([](Team& team, void* context) { (*static_cast<Body*>(context))(team); }, &body);
}
template <class Body>
static inline void parallel_for(int64_t n, int64_t chunk, Body&& body) {
  parallel_for(
      n, chunk, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

}  // namespace mlxeff
