// The bit stream of SeedLM's shift register (16 bits, taps 0, 1, 3, 12), computed at compile time.
//
// State n of a seed is the window of bits n … n + 15; bits 0 … 15 are the seed, and the later ones are linear in it over GF(2): the
// exclusive-or of a table entry for each group of its bits.
#pragma once
#include "common.h"

namespace mlxeff {
namespace {

constexpr uint32_t next_state(uint32_t s) { return s >> 1 | ((s ^ s >> 1 ^ s >> 3 ^ s >> 12) & 1u) << 15; }

// Bits 16 … 62 of the stream of a seed.
constexpr uint64_t later_bits(uint32_t seed) {
  uint64_t bits = 0;
  for (int n = 0; n < 47; ++n) {
    seed = next_state(seed);
    bits |= uint64_t(seed >> 15) << n;
  }
  return bits;
}

// Entry [i][v]: the later bits of a seed whose only bits are v, at bit i * width. Word 0 holds bits 16 … 47, word 1 bits 32 … 62.
template <int width>
struct StreamTables {
  static constexpr int count = (16 + width - 1) / width, entries = 1 << width;
  alignas(64) uint32_t word[2][count][entries];

  constexpr StreamTables() : word() {
    for (int i = 0; i < count; ++i)
      for (int v = 0; v < entries; ++v) {
        const uint64_t bits = later_bits((uint32_t(v) << (i * width)) & 0xffffu);
        word[0][i][v] = uint32_t(bits);
        word[1][i][v] = uint32_t(bits >> 16);
      }
  }
};

}  // namespace
}  // namespace mlxeff
