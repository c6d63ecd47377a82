// The bit stream of SeedLM's shift register (16 bits, taps 0, 1, 3, 12), computed at compile time.
//
// State n of a seed is the window of bits n … n + 15 of its stream. Bits 0 … 15 are the seed itself. The later bits are
// a linear function of the seed over GF(2), so they are the exclusive-or of one table entry for each group of seed
// bits.
#pragma once
#include "base/common.h"

namespace mlxeff {
namespace {

constexpr uint32_t next_state(uint32_t s) { return s >> 1 | ((s ^ s >> 1 ^ s >> 3 ^ s >> 12) & 1u) << 15; }

// Returns bits 16 … 62 of the stream of a seed.
constexpr uint64_t later_bits(uint32_t seed) {
  uint64_t bits = 0;
  for (int n = 0; n < 47; ++n) {
    seed = next_state(seed);
    bits |= uint64_t(seed >> 15) << n;
  }
  return bits;
}

// Tables for 32 bits of a seed's stream, which begin at bit 8 (word 0), 16 (word 1) or 32 (word 2). Entry [i][v] holds
// these bits for the seed v << (i * width).
template <int width>
struct StreamTables {
  static constexpr int count = (16 + width - 1) / width, entries = 1 << width;
  alignas(64) uint32_t word[3][count][entries];

  constexpr StreamTables() : word() {
    constexpr int first[3] = {8, 16, 32};
    for (int i = 0; i < count; ++i)
      for (int v = 0; v < entries; ++v) {
        const uint32_t seed = (uint32_t(v) << (i * width)) & 0xffffu;
        const uint64_t stream = later_bits(seed) << 16 | seed;
        for (int k = 0; k < 3; ++k) word[k][i][v] = uint32_t(stream >> first[k]);
      }
  }
};

}  // namespace
}  // namespace mlxeff
