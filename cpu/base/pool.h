// The interface of the thread pool that all kernels of the process share: parallel regions, their teams, and per-thread
// scratch memory. pool.cpp describes how the pool works.
#pragma once
#include <atomic>

#include "base/common.h"

namespace mlxeff {

// The threads that execute one parallel region together, as one of its members sees them. A thread may join at any
// time: it passes through the steps that are already complete and takes part in the remaining ones.
class Team {
 public:
  int count;  // largest possible number of members; every member sees the same number

  // Runs body(context, begin, end) over [0, n) in pieces of `chunk`, and returns when all pieces are complete. A member
  // takes the next piece when it is free, first of a range of its own, so a suspended member delays the others by at
  // most the one piece that it holds. Each member must call for_chunks the same number of times, in the same order,
  // with the same n and chunk. A member that joins when all pieces are complete returns at once, so code between two
  // calls of for_chunks must not assume that every member has passed the first.
  void for_chunks(int64_t n, int64_t chunk, void (*body)(void* context, int64_t begin, int64_t end), void* context);

  template <class Body>
  void for_chunks(int64_t n, int64_t chunk, Body&& body) {
    for_chunks(
        n, chunk, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
  }

  // Runs body(row) for each of `rows` rows in the same way.
  template <class Body>
  void for_rows(int64_t rows, Body&& body) {
    for_chunks(rows, row_chunk(rows), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(row);
    });
  }
  // A chunk size for rows of about equal cost: each member gets several pieces, so that all members finish at about the
  // same time.
  int64_t row_chunk(int64_t rows) const { return max_of(1, rows / (8 * count)); }

 private:
  friend class Pool;
  Team(int count, int member, class Pool* pool) : count(count), member_(member), pool_(pool) {}
  int member_;        // its number in the pool; 0 is the caller of the region
  class Pool* pool_;  // null for a team of one
  uint32_t phase_ = 0;
};

// Runs function(team, context) on each member of a team: the calling thread, and idle threads as they wake. It returns
// when the calls on all threads that joined have returned. Inside another region, or while another thread uses the
// pool, the calling thread is the only member.
void team_run(void (*function)(Team& team, void* context), void* context);

// Runs body(context, begin, end) over [0, n) in pieces of `chunk`, on all threads that are free. Idle threads may join
// at any time.
void parallel_for(int64_t n, int64_t chunk, void (*body)(void* context, int64_t begin, int64_t end), void* context);

int num_threads();

// Returns a buffer of at least `bytes` bytes, 64-byte aligned, that belongs to the calling thread. Its content stays
// valid until the thread requests the same slot again. Returns null if memory is exhausted.
enum class Scratch { shared_input, strip, panel, accumulator, count };
void* scratch(Scratch slot, size_t bytes);

// Overloads of team_run and parallel_for that take any callable.
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
