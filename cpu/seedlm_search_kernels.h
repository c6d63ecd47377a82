// The search for the seed of a block: tables, and the kernels of one instruction-set level that scan all seeds.
//
// The columns of every seed's matrix U are among the 65,535 vectors u[n] = (U[n], U[n + P], …) along the register's cycle, so one inner
// product a seed, d[n] = u[n] . (h w), serves P seeds. With b = (d[n], …, d[n + P - 1]) and the Gram matrix G[n] of the seed's columns under
// the metric h, no coefficients of seed n reach an error below |w|^2 - b^T G^-1 b, the bound. Only seeds whose bound is
// below the best error found so far are evaluated with quantised coefficients: a handful a block.
//
// Vector lane l scans the seeds [l * segment, (l + 1) * segment) of the cycle, so all reads are aligned and d is computed once.
#pragma once
#include "isa.h"

namespace mlxeff {

constexpr int cycle_length = 65535;
constexpr int most_columns = 12, most_states = 4, most_windows = most_columns * most_states;

// What does not depend on the weights. `states` and `inverse` are laid out by the level that built them.
struct SearchTables {
  int columns, states_per_row;     // C, P
  float metric[most_columns];      // h, of mean 1
  const uint16_t* cycle;           // (cycle_length + most_windows): the register's states from 1 on, and the first ones again
  const float* states;             // (segment + most_windows, VL): (state - 32768) / 32767
  float* inverse;                  // (segment, P (P + 1) / 2, VL): the upper part of G^-1, off-diagonals doubled
};

struct SearchArgs {
  const SearchTables* tables;
  const float* weights;
  int64_t ld, cols, blocks_a_row;
  int exponent_bias;
  bool refine;
  uint16_t* seeds;        // (blocks)
  int8_t* coefficients;   // (blocks, P)
  uint8_t* codes;         // (blocks)
};

struct SearchKernels {
  int64_t steps;  // of a segment
  int lanes;
  void (*fill_states)(const uint16_t* cycle, float* states);
  void (*fill_inverse)(const SearchTables& tables, int64_t step_begin, int64_t step_end);
  int (*search)(const SearchArgs& args, int64_t block_begin, int64_t block_end);
};

MLXEFF_DECLARE_FAMILY(SearchKernels, search_kernels)

// A block scaled by a power of two, and the best seed found for it. seedlm_evaluate.cpp
struct BlockSearch {
  int columns, states_per_row;
  bool refine;
  int lowest, highest;           // exponents, of the scaled block
  double w[most_columns], h[most_columns];
  double norm;                   // sum of h w^2
  double error;                  // of the best; 0 coefficients at first
  int index;                     // of the best seed in the cycle
  int exponent;
  int8_t coefficients[most_states];
};

// Evaluates seed `index` of the cycle, with the coefficients rounded by the rule in force, and keeps it if it is better.
void evaluate_seed(BlockSearch& block, const uint16_t* cycle, int index);

}  // namespace mlxeff
