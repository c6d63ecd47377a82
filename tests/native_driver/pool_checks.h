// Checks of the thread pool for the sanitizer driver.
#pragma once
#include <sys/wait.h>
#include <unistd.h>

#include <thread>
#include <vector>

#include "base/pool.h"
#include "checks.h"

inline void check_parallel_for(int64_t n, int64_t chunk) {
  std::vector<int> hits(size_t(n), 0);
  mlxeff::parallel_for(n, chunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++hits[size_t(i)];
    mlxeff::parallel_for(3, 1, [](int64_t, int64_t) {});  // nested: runs inline
  });
  for (int hit : hits) CHECK(hit == 1);
}

// Each phase reads what the phase before wrote, on ranges cut differently; plain memory, so a race shows under TSan.
inline void check_team(int phases) {
  const int64_t n = 257;
  std::vector<int64_t> a(n, 1), b(n, 0);
  std::atomic<int> members{0}, team_size{0};
  mlxeff::team_run([&](mlxeff::Team& team) {
    ++members;
    team_size = team.count;
    for (int p = 0; p < phases; ++p) {
      std::vector<int64_t>&from = p % 2 ? b : a, &to = p % 2 ? a : b;
      team.for_chunks(n, 1 + p % 37, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) to[size_t(i)] = from[size_t(n - 1 - i)] + i % 3;
      });
    }
  });
  CHECK(members >= 1 && members <= team_size);
  std::vector<int64_t> c(n, 1), d(n, 0);
  for (int p = 0; p < phases; ++p)
    for (int64_t i = 0; i < n; ++i) {
      std::vector<int64_t>&from = p % 2 ? d : c, &to = p % 2 ? c : d;
      to[size_t(i)] = from[size_t(n - 1 - i)] + i % 3;
    }
  CHECK(a == c && b == d);
}

inline void check_pool() {
  for (int threads : {1, 2, 5, 3}) {
    CHECK(mlxeff_set_num_threads(threads) == MLXEFF_OK && mlxeff_num_threads() == threads);
    for (int repeat = 0; repeat < 50; ++repeat) {
      check_parallel_for(1 + repeat * 13, 1 + repeat % 5);
      check_team(1 + repeat);
      if (repeat % 10 == 0) usleep(200);  // workers fall asleep in between
    }
  }
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i)
    callers.emplace_back([] {
      for (int repeat = 0; repeat < 100; ++repeat) check_parallel_for(100, 7), check_team(5);
    });
  for (std::thread& caller : callers) caller.join();
}

inline void check_fork() {
  check_parallel_for(1000, 1);
  const pid_t child = fork();
  if (child == 0) {
    check_parallel_for(1000, 1);
    check_team(20);
    _exit(0);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  check_parallel_for(1000, 1);
}
