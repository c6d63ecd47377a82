// When each thread worked and waited, for profiles. Nothing is noted unless it is asked for.
#pragma once
#include <vector>

#include "base/common.h"

namespace mlxeff {

// One thread in one call of Team::for_chunks. Times are in nanoseconds of one clock.
struct StepTime {
  uint32_t region;  // number of the parallel region; 0 where a thread is alone
  uint32_t step;    // number of the call in its region, the same for all threads
  int32_t thread;   // 0 is the caller of the region
  int64_t begin;    // when the thread came
  int64_t worked;   // when it had no more work; 0 where it found none
  int64_t end;      // when it went on
};

// Begins to note times, at most `most` of them; 0 ends it. What was noted before is lost.
void note_step_times(int64_t most);

// What was noted since.
std::vector<StepTime> step_times();

}  // namespace mlxeff
