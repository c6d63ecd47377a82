// The C entry point of the SeedLM encoder: argument checks, the search tables, threading, and the decoded values and
// errors of the encoded blocks.
#include <math.h>

#include <map>
#include <memory>
#include <mutex>
#include <new>

#include "base/pool.h"
#include "seedlm/seedlm_search_kernels.h"
#include "seedlm/seedlm_stream.h"

namespace mlxeff {
namespace {

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
typedef std::unique_ptr<float[], FreeAligned> AlignedFloats;

AlignedFloats aligned_floats(int64_t count) {
  return AlignedFloats(static_cast<float*>(::operator new[](size_t(count) * 4, std::align_val_t(64))));
}

// The shift register's states in the layout that the kernels of one level read: 400 KB, kept until the process ends.
struct Register {
  uint16_t cycle[cycle_length + most_windows];
  AlignedFloats states;

  explicit Register(const SearchKernels& kernels)
      : states(aligned_floats((kernels.steps + most_windows) * kernels.lanes)) {
    uint32_t state = 1;
    for (uint16_t& each : cycle) each = uint16_t(state), state = next_state(state);
    kernels.fill_states(cycle, states.get());
  }

  static const Register& of(const SearchKernels& kernels) {
    static std::mutex& mutex = *new std::mutex;
    static auto& held = *new std::map<const SearchKernels*, std::unique_ptr<Register>>;
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<Register>& entry = held[&kernels];
    if (!entry) entry = std::make_unique<Register>(kernels);
    return *entry;
  }
};

// Builds the tables for one metric, in scratch memory that the calling thread reuses, because a conversion needs
// thousands of them one after the other.
SearchTables tables_for(const SearchKernels& kernels, int C, int P, const float* diagonal) {
  float* const inverse =
      static_cast<float*>(scratch(Scratch::shared_input, size_t(kernels.steps * kernels.lanes * P * (P + 1) / 2) * 4));
  if (!inverse) throw std::bad_alloc();
  const Register& shared = Register::of(kernels);
  double mean = 0;
  for (int c = 0; c < C; ++c) mean += diagonal ? double(diagonal[c]) / C : 1.0 / C;
  SearchTables tables = {C, P, {}, shared.cycle, shared.states.get(), inverse};
  for (int c = 0; c < C; ++c)
    tables.metric[c] = diagonal ? fmaxf(float(double(diagonal[c]) / mean), least_metric) : 1.0f;
  parallel_for(kernels.steps, 256, [&](int64_t begin, int64_t end) { kernels.fill_inverse(tables, begin, end); });
  return tables;
}

// Decodes the stored block to C values. Returns its error, the sum of diagonal * (w - decoded)^2 over the block's
// columns that lie inside the matrix.
double decode_block(const SearchArgs& args, const float* diagonal, int64_t index, float* decoded) {
  const int C = args.tables->columns, P = args.tables->states_per_row;
  const int64_t first = index % args.blocks_a_row * C;
  const float* const w = args.weights + index / args.blocks_a_row * args.ld + first;
  const float scale = ldexpf(1.0f / 32767.0f, int(args.codes[index]) - 8 + args.exponent_bias);
  uint32_t state = args.seeds[index];
  double error = 0;
  for (int c = 0; c < C; ++c) {
    int sum = 0;
    for (int p = 0; p < P; ++p, state = next_state(state))
      sum += int(args.coefficients[index * P + p]) * (int(state) - 32768);
    decoded[c] = float(sum) * scale;
    if (first + c >= args.cols) continue;
    const double miss = double(w[c]) - double(decoded[c]);
    error += (diagonal ? double(diagonal[c]) : 1.0) * miss * miss;
  }
  return error;
}

int check(const mlxeff_seedlm_encode_args* a) {
  if (!a || !a->weights || !a->seeds || !a->coefficients || !a->codes || a->rows < 0 || a->cols <= 0)
    return MLXEFF_BAD_ARGUMENT;
  if ((a->rows > 1 && a->ld < a->cols) || a->exponent_bias < -96 || a->exponent_bias > 96) return MLXEFF_BAD_ARGUMENT;
  if (!(a->columns == 8 && (a->states == 3 || a->states == 4)) && !(a->columns == 12 && a->states == 4))
    return MLXEFF_BAD_ARGUMENT;
  if (a->diagonal && a->cols > a->columns) return MLXEFF_BAD_ARGUMENT;
  for (int c = 0; a->diagonal && c < a->columns; ++c)
    if (!(a->diagonal[c] > 0) || !isfinite(a->diagonal[c])) return MLXEFF_BAD_ARGUMENT;
  return MLXEFF_OK;
}

}  // namespace
}  // namespace mlxeff

using namespace mlxeff;

extern "C" int mlxeff_seedlm_encode(const mlxeff_seedlm_encode_args* a) try {
  if (const int error = check(a)) return error;
  const int64_t blocks = ceil_div(a->cols, a->columns),
                a_row = a->states == 4 && !a->diagonal ? round_up(blocks, 2) : blocks;
  const SearchKernels& kernels = MLXEFF_DISPATCH(search_kernels);
  const SearchTables tables = tables_for(kernels, a->columns, a->states, a->diagonal);
  const SearchArgs args = {&tables,          a->weights,     a->ld,    a->cols,         a_row,
                           a->exponent_bias, a->refine != 0, a->seeds, a->coefficients, a->codes};
  std::atomic<int> result{MLXEFF_OK};
  parallel_for(a->rows * a_row, 32, [&](int64_t begin, int64_t end) {
    if (const int error = kernels.search(args, begin, end)) {
      result = error;
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      float decoded[most_columns];
      const double error = decode_block(args, a->diagonal, i, decoded);
      const int64_t first = i % a_row * a->columns, count = max_of(0, min_of(a->columns, a->cols - first));
      if (a->errors) a->errors[i] = error;
      if (a->decoded) memcpy(a->decoded + i / a_row * a->cols + first, decoded, size_t(count) * 4);
    }
  });
  return result;
} catch (const std::bad_alloc&) {
  return MLXEFF_NO_MEMORY;
}
