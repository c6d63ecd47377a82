// The kernels that scan all seeds for blocks of weights, at one instruction-set level. seedlm_search_kernels.h
// describes the method.
//
// A tile of blocks is scanned together, one chunk of 32 steps of the tables at a time, so that the chunk stays in the
// L1 cache. The scan keeps the largest energy b^T G^-1 b of each chunk and lane. Chunks that may contain a better seed
// than the best one so far are scanned again to find it. Energies are fp32 with an error of up to `slack` * |w|^2, and
// differ between levels within that error. The chosen seed depends only on the evaluation of candidates, which gives
// the same bits at every level.
#include "seedlm/seedlm_search_kernels.h"

#include <math.h>

#include "base/pool.h"
#include "base/simd.h"

namespace mlxeff {
namespace MLXEFF_ISA {
namespace {

constexpr int64_t segment = 65536 / VL;  // steps per lane; the last step of the last lane repeats the first seed
constexpr int chunk = 32;                // in steps
constexpr int64_t chunks = segment / chunk;
constexpr int tile = 32;        // in blocks
constexpr float slack = 6e-4f;  // error bound of an energy, relative to |w|^2
// The scan skips seeds whose condition trace(G) * trace(G^-1) exceeds this. The margin of 5 % covers the rounding of
// the scan, so that it never skips a seed that evaluation would accept.
constexpr float excluded = most_condition * 1.05f;

template <int P>
constexpr int entries = P * (P + 1) / 2;

void fill_states(const uint16_t* cycle, float* states) {
  for (int64_t i = 0; i < segment + most_windows; ++i)
    for (int lane = 0; lane < VL; ++lane)
      states[i * VL + lane] = float(int(cycle[(lane * segment + i) % cycle_length]) - 32768) / 32767.0f;
}

// Computes G^-1 for the seeds of one step from the factorisation G = L D L^T.
template <int C, int P>
void invert_step(const SearchTables& tables, int64_t step) {
  const float* const u = tables.states + step * VL;
  vf G[P][P] = {}, L[P][P], D[P], M[P][P];
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 4
      for (int j = 0; j <= i; ++j)
        G[i][j] = fma(load(u + (c * P + i) * VL) * tables.metric[c], load(u + (c * P + j) * VL), G[i][j]);
  vi good = (vi)zero() == 0;
  vf trace = zero(), inverse_trace = zero();
#pragma GCC unroll 4
  for (int j = 0; j < P; ++j) {
    D[j] = G[j][j];
    for (int k = 0; k < j; ++k) D[j] -= L[j][k] * L[j][k] * D[k];
    for (int i = j + 1; i < P; ++i) {
      L[i][j] = G[i][j];
      for (int k = 0; k < j; ++k) L[i][j] -= L[i][k] * L[j][k] * D[k];
      L[i][j] /= D[j];
    }
    good &= D[j] > 0.0f;
    trace += G[j][j];
  }
#pragma GCC unroll 4
  for (int j = 0; j < P; ++j) {
    M[j][j] = broadcast(1.0f);
    for (int i = j + 1; i < P; ++i) {
      M[i][j] = -L[i][j];
      for (int k = j + 1; k < i; ++k) M[i][j] -= L[i][k] * M[k][j];
    }
  }
  vf inverse[entries<P>];
  int at = 0;
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i)
    for (int j = i; j < P; ++j, ++at) {
      vf sum = zero();
      for (int k = j; k < P; ++k) sum += M[k][i] * M[k][j] / D[k];
      if (i == j) inverse_trace += sum;
      inverse[at] = i == j ? sum : sum + sum;
    }
  good &= trace * inverse_trace < excluded;
  for (at = 0; at < entries<P>; ++at)
    store(tables.inverse + (step * entries<P> + at) * VL, good ? inverse[at] : zero());
}

template <int C, int P>
void fill_inverse_of(const SearchTables& tables, int64_t begin, int64_t end) {
  for (int64_t step = begin; step < end; ++step) invert_step<C, P>(tables, step);
}

void fill_inverse(const SearchTables& tables, int64_t begin, int64_t end) {
  if (tables.states_per_row == 3) fill_inverse_of<8, 3>(tables, begin, end);
  else if (tables.columns == 8) fill_inverse_of<8, 4>(tables, begin, end);
  else fill_inverse_of<12, 4>(tables, begin, end);
}

// Computes the energies of one chunk for a block and calls body(step, energies of the lanes). `hw` is the metric times
// the weights.
template <int C, int P, class Body>
MLXEFF_INLINE void scan(const SearchTables& tables, int64_t first, const float* hw, Body body) {
  const float* u = tables.states + first * VL;
  const float* inverse = tables.inverse + first * entries<P> * VL;
  const auto product = [&](int64_t step) {
    vf sum = load(u + step * VL) * hw[0];
#pragma GCC unroll 12
    for (int c = 1; c < C; ++c) sum = fma(load(u + (step + c * P) * VL), broadcast(hw[c]), sum);
    return sum;
  };
  vf b[P];
#pragma GCC unroll 4
  for (int p = 0; p < P - 1; ++p) b[p] = product(p);
#pragma GCC unroll 4
  for (int step = 0; step < chunk; ++step, inverse += entries<P> * VL) {
    b[P - 1] = product(step + P - 1);
    vf energy = zero();
    int at = 0;
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) {
      vf row = load(inverse + at++ * VL) * b[i];
#pragma GCC unroll 4
      for (int j = i + 1; j < P; ++j) row = fma(load(inverse + at++ * VL), b[j], row);
      energy = i == 0 ? row * b[0] : fma(row, b[i], energy);
    }
    body(step, energy);
#pragma GCC unroll 4
    for (int p = 0; p < P - 1; ++p) b[p] = b[p + 1];
  }
}

// Writes the largest energy of each chunk and lane to largest[block][chunk][lane].
template <int C, int P>
void scan_tile(const SearchTables& tables, const BlockSearch* block, int blocks, float* largest) {
  for (int64_t i = 0; i < chunks; ++i)
    for (int j = 0; j < blocks; ++j) {
      vf most = zero();
      scan<C, P>(tables, i * chunk, block[j].hw, [&](int, vf energy) { most = max(most, energy); });
      store(largest + (j * chunks + i) * VL, most);
    }
}

// The least energy that a seed needs to be possibly better than the best one found.
MLXEFF_INLINE float least_energy(const BlockSearch& block) { return (1 - slack) * block.norm - block.error; }

// Scans a chunk again and evaluates the seeds that may be better than the best one found.
template <int C, int P>
void visit(const SearchTables& tables, int64_t index, const float* largest, BlockSearch& block) {
  float energies[chunk][VL];
  scan<C, P>(tables, index * chunk, block.hw, [&](int step, vf energy) { store(energies[step], energy); });
  for (int lane = 0; lane < VL; ++lane) {
    if (largest[lane] <= least_energy(block)) continue;
    for (int step = 0; step < chunk; ++step)
      if (energies[step][lane] > least_energy(block))
        evaluate_seed(block, tables.cycle + (lane * segment + index * chunk + step) % cycle_length);
  }
}

template <int C, int P>
void choose_seed(const SearchTables& tables, const float* largest, BlockSearch& block) {
  int64_t best = 0;
  float most = -1;
  for (int64_t i = 0; i < chunks; ++i)
    if (const float top = max(load(largest + i * VL)); top > most) most = top, best = i;
  visit<C, P>(tables, best, largest + best * VL, block);
  for (int64_t i = 0; i < chunks; ++i)
    if (i != best && max(load(largest + i * VL)) > least_energy(block)) visit<C, P>(tables, i, largest + i * VL, block);
}

// Loads and scales a block, and returns whether it has to be searched. A block stays zero if all its weights are
// smaller than the smallest coefficient step, or if its largest weight is more than 2^24 times the largest step.
// *finite is set to false if a weight is NaN or infinite.
bool load_block(const SearchArgs& args, int64_t index, BlockSearch& block, bool* finite) {
  const SearchTables& tables = *args.tables;
  const int64_t first = index % args.blocks_a_row * tables.columns;
  const float* const w = args.weights + index / args.blocks_a_row * args.ld + first;
  float values[most_columns] = {}, largest = 0;
  for (int c = 0; c < tables.columns; ++c) {
    if (first + c < args.cols) values[c] = w[c];
    if (!(fabsf(values[c]) <= 3.4028234e38f)) *finite = false;
    largest = fmaxf(largest, fabsf(values[c]));
  }
  int scale = 0;
  if (largest > 0) frexp(largest, &scale);
  block = {};
  block.columns = tables.columns;
  block.states_per_row = tables.states_per_row;
  block.refine = args.refine;
  block.base = args.exponent_bias - 8 - scale;
  block.lowest = int(max_of(block.base, least_exponent));
  block.highest = block.base + 15;
  for (int c = 0; c < tables.columns; ++c) {
    const float scaled = ldexpf(values[c], -scale);
    block.w[c] = fabsf(scaled) < least_weight ? 0 : scaled;
    block.h[c] = tables.metric[c];
    block.hw[c] = block.h[c] * block.w[c];
    block.norm = __builtin_fmaf(block.hw[c], block.w[c], block.norm);
  }
  block.error = block.norm;
  block.exponent = block.base;
  return largest > 0 && block.base < 0 && block.highest >= least_exponent;
}

template <int C, int P>
int search_blocks(const SearchArgs& args, int64_t begin, int64_t end) {
  const SearchTables& tables = *args.tables;
  float* const largest = static_cast<float*>(scratch(Scratch::panel, size_t(tile * chunks * VL) * 4));
  if (!largest) return MLXEFF_NO_MEMORY;
  for (int64_t first = begin; first < end; first += tile) {
    const int blocks = int(min_of(tile, end - first));
    BlockSearch block[tile];
    bool searched[tile], finite = true;
    for (int i = 0; i < blocks; ++i) searched[i] = load_block(args, first + i, block[i], &finite);
    if (!finite) return MLXEFF_BAD_ARGUMENT;
    scan_tile<C, P>(tables, block, blocks, largest);
    for (int i = 0; i < blocks; ++i) {
      if (searched[i]) choose_seed<C, P>(tables, largest + i * chunks * VL, block[i]);
      args.seeds[first + i] = block[i].seed ? block[i].seed : 1;
      memcpy(args.coefficients + (first + i) * P, block[i].coefficients, P);
      args.codes[first + i] = uint8_t(block[i].exponent - block[i].base);
    }
  }
  return MLXEFF_OK;
}

int search(const SearchArgs& args, int64_t begin, int64_t end) {
  if (args.tables->states_per_row == 3) return search_blocks<8, 3>(args, begin, end);
  if (args.tables->columns == 8) return search_blocks<8, 4>(args, begin, end);
  return search_blocks<12, 4>(args, begin, end);
}

}  // namespace

const SearchKernels& search_kernels() {
  static const SearchKernels table = {segment, VL, fill_states, fill_inverse, search};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
