// The search for the best seed of a block: its tables, its state, and the table of kernels of one instruction-set level
// that scan all seeds.
//
// Let U[n] be the state at position n of the shift register's cycle of 65,535 states, scaled to [-1, 1], and let u[n] =
// (U[n], U[n + P], …) with one element for each column of the block. The columns of the matrix of the seed at position
// n are u[n], …, u[n + P - 1], so each inner product d[n] = u[n] . (h w) serves P seeds. Let b = (d[n], …, d[n + P -
// 1]), and let G[n] be the Gram matrix of the seed's columns under the metric h. No coefficients give seed n an error
// below the bound |w|^2 - b^T G[n]^-1 b, where |w|^2 is the squared norm under h. Only the few seeds per block whose
// bound is below the best error so far are evaluated with quantised coefficients.
//
// Vector lane l scans the seeds [l * segment, (l + 1) * segment) of the cycle, so that all reads are aligned and each d
// is computed once.
#pragma once
#include "base/isa.h"

namespace mlxeff {

constexpr int cycle_length = 65535;
constexpr int most_columns = 12, most_states = 4, most_windows = most_columns * most_states;

// The tables that do not depend on the weights. The layout of `states` and `inverse` is that of the level whose kernels
// filled them.
struct SearchTables {
  int columns, states_per_row;  // C, P
  float metric[most_columns];   // h, scaled to mean 1
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
  int64_t steps;  // number of steps in a segment
  int lanes;
  void (*fill_states)(const uint16_t* cycle, float* states);
  void (*fill_inverse)(const SearchTables& tables, int64_t step_begin, int64_t step_end);
  int (*search)(const SearchArgs& args, int64_t block_begin, int64_t block_end);
};

MLXEFF_DECLARE_FAMILY(SearchKernels, search_kernels)

constexpr float most_condition = 4000;    // largest trace(G) * trace(G^-1) of a usable seed
constexpr float least_weight = 0x1p-40f;  // smaller scaled weights are treated as zeros
constexpr float least_metric =
    0x1p-7f;  // lower limit of h, whose mean is 1; it keeps a column from making every seed ill-conditioned
constexpr float least_miss = 0x1p-50f;  // smaller differences of scaled weights are treated as zero
constexpr int least_exponent = -24;     // lowest exponent of coefficients, for scaled weights
// These limits keep every relevant intermediate value in the normal range, so flushing subnormal numbers to zero does
// not change the result.

// A block, scaled by a power of two so that its largest weight lies in [1/2, 1), and the best seed found for it. Among
// seeds with the same error the lowest is kept; if no seed is better than all zeros, the block stays zero.
struct BlockSearch {
  int columns, states_per_row;
  bool refine;
  int base;             // exponent that code 0 stands for, for the scaled block
  int lowest, highest;  // range of exponents to try
  float w[most_columns], h[most_columns], hw[most_columns];
  float norm;     // sum of h w^2
  float error;    // error of the best seed; initially `norm`
  uint16_t seed;  // the best seed; 0 if there is none
  int exponent;
  int8_t coefficients[most_states];
};

#if defined(MLXEFF_ISA)
namespace MLXEFF_ISA {
// Evaluates the seed states[0] with rounded coefficients and keeps it if it is better than the best one so far. Defined
// in seedlm_evaluate.cpp.
void evaluate_seed(BlockSearch& block, const uint16_t* states);
}  // namespace MLXEFF_ISA
#endif

}  // namespace mlxeff
