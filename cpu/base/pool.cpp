// The thread pool. A process has one pool, which is created at the first parallel region and never destroyed.
//
// Joining: one atomic word, the gate, announces a region. It holds a generation number, an open flag and the number of
// members so far. Idle workers see the open gate and join by compare-and-swap, until the caller has finished its own
// part and closes the gate. A worker that the operating system has not scheduled does not join, so a region never waits
// for a thread that has not started on it. A worker that joins late shares the remaining work.
//
// Work: the pieces of a step are split into one range for each thread of the pool, and an atomic counter hands out the
// pieces of a range in order. A member takes those of its own range first, so that it reads memory in order and what it
// prefetches is what it needs next; then it helps with the other ranges. So a member that is slowed down takes fewer
// pieces.
//
// Waiting: every wait spins for a bounded time and then sleeps on a condition variable. Waking costs a system call only
// if a thread sleeps.
//
// Placement: Linux often wakes a worker on the CPU of the thread that woke it, where it waits for milliseconds until
// that thread yields. Before a worker is woken, that CPU is therefore removed from its affinity mask (within the
// caller's mask).
//
// Exclusion: one region runs at a time. A nested call, or a call from a second thread, runs on its own thread alone.
//
// Fork: a child process has no workers, so it abandons the pool (and leaks it, since its mutexes are in an unknown
// state) and makes a new one when needed.
//
// Exit: the pool is leaked on purpose, because workers may still sleep in it while the process ends.
#include "base/pool.h"

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "base/cpu_count.h"
#include "base/step_times.h"

namespace mlxeff {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto idle_spin = std::chrono::microseconds(50);
constexpr auto step_spin =
    std::chrono::microseconds(200);  // for waits inside a region: a piece of work rarely takes longer
constexpr int max_threads = 256;

thread_local bool inside_region = false;
thread_local int thread_number = 0;  // of a worker; the threads that call regions have 0

// What `step_times` returns. A thread takes a place, and then writes it.
struct Notes {
  std::atomic<bool> wanted{false};
  std::atomic<int64_t> taken{0};
  std::vector<StepTime> all;
};
Notes notes;

int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count();
}

// Notes one call of for_chunks, from its construction to its end.
class StepNote {
 public:
  StepNote(uint32_t region, uint32_t step) : on_(notes.wanted.load(std::memory_order_relaxed)) {
    if (on_) time_ = {region, step, thread_number, nanoseconds(), 0, 0};
  }
  ~StepNote() {
    if (!on_) return;
    time_.end = nanoseconds();
    const int64_t place = notes.taken.fetch_add(1);
    if (place < int64_t(notes.all.size())) notes.all[size_t(place)] = time_;
  }
  void worked() {
    if (on_) time_.worked = nanoseconds();
  }

 private:
  const bool on_;
  StepTime time_;
};

inline void relax() {
#if defined(MLXEFF_X86)
  __builtin_ia32_pause();
#elif defined(MLXEFF_ARM64)
  __asm__ volatile("yield");
#endif
}

template <class Ready>
bool spin_until(Ready ready, Clock::duration limit) {
  for (int i = 0; i < 16; ++i, relax())
    if (ready()) return true;
  const Clock::time_point deadline = Clock::now() + limit;
  do {
    for (int i = 0; i < 16; ++i, relax())
      if (ready()) return true;
  } while (Clock::now() < deadline);
  return false;
}

// Waits for a condition on sequentially consistent atomics. The thread that makes the condition true must call wake()
// afterwards.
class WaitPoint {
 public:
  explicit WaitPoint(Clock::duration spin) : spin_(spin) {}
  template <class Ready>
  void wait(Ready ready) {
    if (spin_until(ready, spin_)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    while (!ready()) changed_.wait(lock);
    --sleepers_;
  }
  bool has_sleepers() const { return sleepers_.load() != 0; }
  void wake() {
    if (!has_sleepers()) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    changed_.notify_all();
  }

 private:
  const Clock::duration spin_;
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace

class Pool {
 public:
  static Team team_of_one() { return Team(1, 0, nullptr); }

  std::mutex running;  // held by the thread whose region uses the pool

  // The caller of these two functions must hold `running`.
  void resize(int threads);
  void run(void (*function)(Team&, void*), void* context);

  void for_chunks(int member, uint32_t phase, int64_t n, int64_t chunk, void (*body)(void*, int64_t, int64_t),
                  void* context);

 private:
  static constexpr uint64_t open_flag = 1u << 16, member_mask = 0xffff;
  static uint32_t generation(uint64_t gate) { return uint32_t(gate >> 32); }
  void work(uint32_t seen);
  void keep_off_this_cpu();
  void execute();

  int threads_ = 1;
  std::thread workers_[max_threads];
  int avoided_cpu_[max_threads];
  std::atomic<bool> stopping_{false};

  // State of the current region.
  void (*function_)(Team&, void*) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> gate_{0};  // generation << 32 | open flag | members
  alignas(64) std::atomic<int> left_{0};       // workers that have finished with the region

  // A phase is one call of for_chunks. Phase p uses slot p % ring, which holds (p mod 2^32) << 32 | pieces finished,
  // and for each range of its pieces a counter, p << 32 | pieces taken. The first member to reach a phase or a range
  // resets the slot or the counter for it. A late member sees from the phase number that a later phase uses them, so
  // that its own phase is complete.
  static constexpr uint32_t ring = 16;
  static constexpr uint64_t count_mask = 0xffffffff;
  struct alignas(64) Word {
    std::atomic<uint64_t> value{0};
  };
  static uint64_t word(uint32_t phase, uint64_t count = 0) { return uint64_t(phase) << 32 | count; }
  static uint32_t phase_of(uint64_t word) { return uint32_t(word >> 32); }
  static int64_t take(std::atomic<uint64_t>& counter, uint32_t phase, uint64_t first, uint64_t stop);
  Word slots_[ring];
  std::unique_ptr<Word[]> counters_{new Word[ring]};  // ring times one for each thread

  WaitPoint idle_{idle_spin}, progress_{step_spin};
};

void Pool::resize(int threads) {
  threads = int(max_of(1, min_of(threads, max_threads)));
  if (threads == threads_) return;
  stopping_ = true;
  idle_.wake();
  for (int i = 1; i < threads_; ++i) workers_[i].join();
  stopping_ = false;
  sigset_t all, previous;  // workers block all signals: only the program's own threads handle them
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &previous);
  threads_ = 1;
  counters_.reset(new Word[size_t(ring) * size_t(threads)]);
  try {
    const uint32_t seen = generation(gate_.load());
    for (int i = 1; i < threads; ++i, ++threads_) {
      avoided_cpu_[i] = -1;
      workers_[i] = std::thread([this, seen, i] {
        thread_number = i;
        work(seen);
      });
    }
  } catch (const std::system_error&) {  // continue with the threads that have been started
  }
  pthread_sigmask(SIG_SETMASK, &previous, nullptr);
}

void Pool::work(uint32_t seen) {
  inside_region = true;
  while (true) {
    idle_.wait([&] { return generation(gate_.load()) != seen || stopping_.load(); });
    if (stopping_.load()) return;
    uint64_t gate = gate_.load();
    while ((gate & open_flag) && !gate_.compare_exchange_weak(gate, gate + 1)) relax();
    seen = generation(gate);
    if (!(gate & open_flag)) continue;
    execute();
    ++left_;
    progress_.wake();
  }
}

void Pool::keep_off_this_cpu() {
#if defined(__linux__)
  const int here = sched_getcpu();
  cpu_set_t others;
  bool known = false;
  for (int i = 1; i < threads_; ++i) {
    if (avoided_cpu_[i] == here) continue;
    if (!known) {
      if (here < 0 || sched_getaffinity(0, sizeof others, &others) != 0 || CPU_COUNT(&others) < 2) return;
      CPU_CLR(here, &others);
      known = true;
    }
    if (pthread_setaffinity_np(workers_[i].native_handle(), sizeof others, &others) == 0) avoided_cpu_[i] = here;
  }
#endif
}

void Pool::execute() {
  Team team(threads_, thread_number, this);
  function_(team, context_);
}

void Pool::run(void (*function)(Team&, void*), void* context) {
  function_ = function;
  context_ = context;
  left_ = 0;
  for (uint32_t i = 0; i < ring; ++i) {
    slots_[i].value.store(word(i - ring), std::memory_order_relaxed);
    for (int range = 0; range < threads_; ++range)
      counters_[i * uint32_t(threads_) + uint32_t(range)].value.store(word(i - ring), std::memory_order_relaxed);
  }
  gate_ = uint64_t(generation(gate_.load()) + 1) << 32 | open_flag | 1;
  if (idle_.has_sleepers()) keep_off_this_cpu();
  idle_.wake();
  execute();
  const int members = int(gate_.fetch_and(~open_flag) & member_mask);
  progress_.wait([&] { return left_.load() == members - 1; });
}

// Returns the next piece of the range [first, stop) of a phase, or -1 if all are taken.
int64_t Pool::take(std::atomic<uint64_t>& counter, uint32_t phase, uint64_t first, uint64_t stop) {
  uint64_t value = counter.load();
  while (true) {
    const int32_t later = int32_t(phase_of(value) - phase);
    const uint64_t taken = later < 0 ? 0 : value & count_mask;
    if (later > 0 || first + taken >= stop) return -1;
    if (counter.compare_exchange_weak(value, word(phase, taken + 1))) return int64_t(first + taken);
  }
}

void Pool::for_chunks(int member, uint32_t phase, int64_t n, int64_t chunk, void (*body)(void*, int64_t, int64_t),
                      void* context) {
  const uint64_t pieces = uint64_t(ceil_div(n, chunk)), threads = uint64_t(threads_);
  const uint64_t ranges = pieces < 2 * threads ? 1 : threads;
  std::atomic<uint64_t>& state = slots_[phase % ring].value;
  StepNote note(generation(gate_.load(std::memory_order_relaxed)), phase);
  uint64_t value = state.load();
  while (int32_t(phase_of(value) - phase) < 0)
    if (state.compare_exchange_weak(value, word(phase))) value = word(phase);
  if (phase_of(value) != phase) return;
  for (uint64_t i = 0; i < ranges; ++i) {
    const uint64_t range = (uint64_t(member) + i) % ranges;
    const uint64_t first = pieces * range / ranges, stop = pieces * (range + 1) / ranges;
    std::atomic<uint64_t>& counter = counters_[phase % ring * threads + range].value;
    for (int64_t piece; (piece = take(counter, phase, first, stop)) >= 0;) {
      body(context, piece * chunk, min_of(n, (piece + 1) * chunk));
      value = state.fetch_add(1) + 1;
      note.worked();
      if ((value & count_mask) == pieces) return progress_.wake();
    }
  }
  progress_.wait([&] {
    const uint64_t now = state.load();
    return phase_of(now) != phase || (now & count_mask) == pieces;
  });
}

namespace {

std::atomic<Pool*> current_pool{nullptr};
std::atomic<int> wanted_threads{0};  // 0 selects the default number

Pool* pool() {
  if (Pool* existing = current_pool.load()) return existing;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current_pool = nullptr; });
  (void)registered;
  Pool *created = new Pool, *expected = nullptr;
  if (current_pool.compare_exchange_strong(expected, created)) return created;
  delete created;
  return expected;
}

int default_threads() {
  static const int count = [] {
    const char* text = std::getenv("MLXEFF_NUM_THREADS");
    const int wanted = text ? std::atoi(text) : 0;
    return int(min_of(wanted >= 1 ? wanted : usable_cpus(), max_threads));
  }();
  return count;
}

}  // namespace

void team_run(void (*function)(Team&, void*), void* context) {
  Team alone = Pool::team_of_one();
  if (inside_region || num_threads() == 1) return function(alone, context);
  Pool* const pool = mlxeff::pool();
  if (!pool->running.try_lock()) return function(alone, context);
  inside_region = true;
  pool->resize(num_threads());
  pool->run(function, context);
  inside_region = false;
  pool->running.unlock();
}

int num_threads() {
  const int wanted = wanted_threads.load(std::memory_order_relaxed);
  return wanted ? wanted : default_threads();
}

void Team::for_chunks(int64_t n, int64_t chunk, void (*body)(void*, int64_t, int64_t), void* context) {
  if (pool_ && n > 0) return pool_->for_chunks(member_, phase_++, n, chunk, body, context);
  if (n <= 0) return;
  StepNote note(0, phase_++);
  body(context, 0, n);
  note.worked();
}

void parallel_for(int64_t n, int64_t chunk, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= 0) return;
  if (n <= chunk || inside_region) return body(context, 0, n);
  team_run([&](Team& team) { team.for_chunks(n, chunk, body, context); });
}

void note_step_times(int64_t most) {
  notes.wanted = false;
  notes.all.assign(size_t(most), {});
  notes.taken = 0;
  notes.wanted = most > 0;
}

std::vector<StepTime> step_times() {
  const auto end = notes.all.begin() + min_of(notes.taken.load(), int64_t(notes.all.size()));
  return {notes.all.begin(), end};
}

void* scratch(Scratch slot, size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffers[int(Scratch::count)];
  Buffer& buffer = buffers[int(slot)];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = size_t(round_up(int64_t(bytes), 4096));
    buffer.data = std::aligned_alloc(64, buffer.size);
    if (!buffer.data) buffer.size = 0;
  }
  return buffer.data;
}

}  // namespace mlxeff

extern "C" {

int mlxeff_num_threads(void) { return mlxeff::num_threads(); }

int mlxeff_set_num_threads(int n) {
  if (n < 0) return MLXEFF_BAD_ARGUMENT;
  if (mlxeff::inside_region) return MLXEFF_BUSY;
  mlxeff::wanted_threads = int(mlxeff::min_of(n, mlxeff::max_threads));
  return MLXEFF_OK;
}
}
