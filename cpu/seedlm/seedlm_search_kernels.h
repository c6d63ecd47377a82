// The search for the seed of a block: tables, and the kernels of one instruction-set level that scan all seeds.
//
// The columns of every seed's matrix U are among the 65,535 vectors u[n] = (U[n], U[n + P], …) along the register's
// cycle, so one inner product a seed, d[n] = u[n] . (h w), serves P seeds. With b = (d[n], …, d[n + P - 1]) and the
// Gram matrix G[n] of the seed's columns under the metric h, no coefficients of seed n reach an error below |w|^2 - b^T
// G^-1 b, the bound. Only seeds whose bound is below the best error found so far are evaluated with quantised
// coefficients: a handful a block.
//
// Vector lane l scans the seeds [l * segment, (l + 1) * segment) of the cycle, so all reads are aligned and d is
// computed once.
#pragma once
#include "base/isa.h"

namespace mlxeff {

constexpr int cycle_length = 65535;
constexpr int most_columns = 12, most_states = 4, most_windows = most_columns * most_states;

// What does not depend on the weights. `states` and `inverse` are laid out by the level that built them.
struct SearchTables {
  int columns, states_per_row;  // C, P
  float metric[most_columns];   // h, of mean 1
  const uint16_t* cycle;  // (cycle_length + most_windows): the register's states from 1 on, and the first ones again
  const float* states;    // (segment + most_windows, VL): (state - 32768) / 32767
  float* inverse;         // (segment, P (P + 1) / 2, VL): the upper part of G^-1, off-diagonals doubled
};

struct SearchArgs {
  const SearchTables* tables;
  const float* weights;
  int64_t ld, cols, blocks_a_row;
  int exponent_bias;
  bool refine;
  uint16_t* seeds;       // (blocks)
  int8_t* coefficients;  // (blocks, P)
  uint8_t* codes;        // (blocks)
};

struct SearchKernels {
  int64_t steps;  // of a segment
  int lanes;
  void (*fill_states)(const uint16_t* cycle, float* states);
  void (*fill_inverse)(const SearchTables& tables, int64_t step_begin, int64_t step_end);
  int (*search)(const SearchArgs& args, int64_t block_begin, int64_t block_end);
};

MLXEFF_DECLARE_FAMILY(SearchKernels, search_kernels)

constexpr float most_condition = 4000;    // trace(G) trace(G^-1) of the seeds that are considered
constexpr float least_weight = 0x1p-40f;  // of the scaled weights: smaller ones count as zeros
constexpr float least_metric =
    0x1p-7f;  // of h, whose mean is 1: smaller ones count as this, lest one column leave every seed ill-conditioned
constexpr float least_miss = 0x1p-50f;  // differences of scaled weights: smaller ones count as none
constexpr int least_exponent = -24;     // of coefficients of the scaled weights
// (With these limits nothing underflows that matters, so it makes no difference whether subnormal numbers are flushed
// to zero.)

// A block scaled by a power of two so that its largest weight lies in [1/2, 1), and the best seed found for it. Of
// seeds with the same error the lowest is kept, and zeros if no seed is better.
struct BlockSearch {
  int columns, states_per_row;
  bool refine;
  int base;             // exponent of code 0, of the scaled block
  int lowest, highest;  // exponents that are tried
  float w[most_columns], h[most_columns], hw[most_columns];
  float norm;     // sum of h w^2
  float error;    // of the best: `norm` at first
  uint16_t seed;  // of the best; 0: none
  int exponent;
  int8_t coefficients[most_states];
};

#if defined(MLXEFF_ISA)
namespace MLXEFF_ISA {
// Evaluates the seed states[0], with the coefficients rounded by the rule in force, and keeps it if it is better.
// seedlm_evaluate.cpp
void evaluate_seed(BlockSearch& block, const uint16_t* states);
}  // namespace MLXEFF_ISA
#endif

}  // namespace mlxeff
