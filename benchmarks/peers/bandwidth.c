/* Read bandwidth: sums a large array, a contiguous part a thread, and prints the best GB/s (10^9 bytes) of the passes.

   bandwidth MIB THREADS PASSES; compiled by benchmarks/peers/measure.py with -O3 -march=native -pthread. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { LANES = 32 }; /* independent sums, so that additions never wait for each other */

typedef struct {
  const uint64_t* begin;
  size_t count;
  uint64_t sum;
} part;

static void* sum_part(void* argument) {
  part* mine = argument;
  uint64_t sums[LANES] = {0};
  for (size_t i = 0; i + LANES <= mine->count; i += LANES)
    for (int lane = 0; lane < LANES; ++lane) sums[lane] += mine->begin[i + lane];
  mine->sum = 0;
  for (int lane = 0; lane < LANES; ++lane) mine->sum += sums[lane];
  return NULL;
}

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const size_t bytes = (size_t)atoi(argv[1]) << 20;
  const int threads = atoi(argv[2]), passes = atoi(argv[3]);
  if (bytes == 0 || threads < 1 || threads > 256 || passes < 1) return 2;
  uint64_t* data = malloc(bytes);
  part parts[256];
  pthread_t handles[256];
  if (!data) return 1;
  memset(data, 1, bytes);
  double best = 0;
  uint64_t total = 0;
  for (int pass = 0; pass < passes; ++pass) {
    const double began = seconds();
    for (int i = 0; i < threads; ++i) {
      const size_t words = bytes / 8 / threads;
      parts[i].begin = data + i * words;
      parts[i].count = words;
      if (pthread_create(&handles[i], NULL, sum_part, &parts[i])) return 1;
    }
    for (int i = 0; i < threads; ++i) {
      pthread_join(handles[i], NULL);
      total += parts[i].sum;
    }
    const double rate = bytes / (seconds() - began) / 1e9;
    if (rate > best) best = rate;
  }
  printf("%.3f\n", best);
  return total == 0; /* the sums are used: the reads cannot be left out */
}
