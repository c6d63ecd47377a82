// The C entry point that samples one token from a row of logits, without sorting the row.
//
// Tokens are ranked by logit, largest first; tokens with equal logits are ranked by id, smallest first. Each filter
// keeps a prefix of the ranking:
//   top-p   tokens whose predecessors' probabilities sum to less than top_p (softmax at temperature 1)
//   min-p   tokens with logit >= max + log(min_p)
//   top-k   the first k tokens
// The filters together keep the shortest of the three prefixes, and at least the first token. The temperature `temp` is
// applied to the kept tokens: the result is the first token, in the order of ids, at which the running sum of
// exp((logit - max) / temp) over the kept tokens exceeds u times their total. Below a temperature of 1e-6 the result is
// the first token of the ranking.
//
// The algorithm first finds a lower bound of the kept logits. Each filter gives one: min-p directly; top-p because
// tokens less probable than (1 - top_p) / V sum to less than 1 - top_p; and top-k by the k-th largest of the maxima of
// groups of 64 logits. The tokens above the bound (usually a few hundred of V) are gathered, and quickselect on counts
// and probability sums finds the end of the prefix in linear time.
//
// Logits in fp16 and bf16 are converted to fp32. Probabilities are fp32 and their sums fp64.
#include "rows/sampling_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/pool.h"
#include "rows/softmax_kernels.h"

namespace mlxeff {
namespace {

constexpr float coldest = 1e-6f;
constexpr int64_t block = 1024;
constexpr float infinity = std::numeric_limits<float>::infinity();

bool ranks_before(const Candidate& a, const Candidate& b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// A row of logits, which is read in blocks, converted to fp32 and padded with -inf.
class Row {
 public:
  Row(const void* x, int dtype, int64_t n) : x_(static_cast<const char*>(x)), dtype_(dtype), n_(n) {}
  int64_t blocks() const { return ceil_div(n_, block); }
  const float* load(int64_t index, int64_t* count) {
    const int64_t begin = index * block;
    *count = min_of(block, n_ - begin);
    const char* const p = x_ + begin * int64_t(dtype_size(dtype_));
    if (dtype_ == MLXEFF_F32) memcpy(values_, p, size_t(*count) * 4);
    else
      for (int64_t i = 0; i < *count; ++i)
        values_[i] = dtype_ == MLXEFF_F16 ? to_float(reinterpret_cast<const f16*>(p)[i])
                                          : to_float(reinterpret_cast<const bf16*>(p)[i]);
    for (int64_t i = *count; i < min_of(block, *count + 16); ++i) values_[i] = -infinity;
    return values_;
  }

 private:
  const char* x_;
  int dtype_;
  int64_t n_;
  float values_[block];
};

// Returns a bound such that at least k logits are not below it; -inf if there are fewer than k groups.
float floor_of_top_k(Row& row, const SamplingKernels& kernels, int64_t V, int64_t k) {
  const int64_t groups = ceil_div(V, sampling_group);
  if (k > groups) return -infinity;
  float* const maxima = static_cast<float*>(scratch(Scratch::accumulator, size_t(groups) * 4));
  if (!maxima) return -infinity;
  for (int64_t i = 0; i < row.blocks(); ++i) {
    int64_t count;
    const float* const values = row.load(i, &count);
    kernels.group_maxima(values, count, maxima + i * (block / sampling_group));
  }
  std::nth_element(maxima, maxima + (k - 1), maxima + groups, [](float a, float b) { return a > b; });
  return maxima[k - 1];
}

// Returns the last kept token of the ranking. A token is kept exactly if it is this token or ranks before it.
Candidate last_kept(Candidate* candidates, int64_t n, int64_t most, double mass, float max) {
  const auto probability = [max](const Candidate& c) { return double(std::exp(c.value - max)); };
  Candidate *begin = candidates, *end = candidates + n;
  Candidate last = *std::min_element(begin, end, ranks_before);
  int64_t count = 0;  // number of candidates known to be kept, which are those before `begin`
  double sum = 0;
  while (end - begin > 32) {
    Candidate* const middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, ranks_before);
    double half = 0;
    for (Candidate* c = begin; c < middle; ++c) half += probability(*c);
    // The candidate `middle` is kept exactly if the count and the probability sum of those ranked before it are below
    // the limits.
    if (count + (middle - begin) < most && sum + half < mass) {
      count += middle - begin + 1;
      sum += half + probability(*middle);
      last = *middle;
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  std::sort(begin, end, ranks_before);
  for (Candidate* c = begin; c < end && count < most && sum < mass; ++c, ++count) {
    sum += probability(*c);
    last = *c;
  }
  return last;
}

}  // namespace
}  // namespace mlxeff

using namespace mlxeff;

extern "C" int mlxeff_sample(const void* logits, int dtype, int64_t V, float temp, int64_t top_k, float top_p,
                             float min_p, double u, int32_t* token) {
  if (!logits || !token || V < 1 || V > INT32_MAX) return MLXEFF_BAD_ARGUMENT;
  if (!(temp >= 0 && temp < infinity) || top_k < 0 || !(top_p >= 0 && top_p <= 1) || !(min_p >= 0 && min_p <= 1) ||
      !(u >= 0 && u < 1))
    return MLXEFF_BAD_ARGUMENT;
  if (!dtype_known(dtype)) return MLXEFF_BAD_DTYPE;
  const SoftmaxKernels& softmax = MLXEFF_DISPATCH(softmax_kernels);
  const SamplingKernels& kernels = MLXEFF_DISPATCH(sampling_kernels);
  if (temp < coldest) {
    *token = int32_t(softmax.argmax(logits, dtype, V));
    return MLXEFF_OK;
  }
  float max, total;
  softmax.statistics(logits, dtype, V, &max, &total);
  if (!std::isfinite(max) || std::isnan(total)) return MLXEFF_BAD_ARGUMENT;

  const bool by_mass = top_p > 0 && top_p < 1, by_count = top_k > 0 && top_k < V;
  float floor = min_p > 0 ? max + std::log(min_p) : -infinity;
  Candidate last = {floor, INT32_MAX};
  Row row(logits, dtype, V);
  int64_t count;
  if (by_mass || by_count) {
    // Lower the bound slightly, so that rounding cannot exclude a token that has to be kept.
    if (by_mass) floor = std::max(floor, max + std::log((1 - top_p) * total / float(V)) - 1e-3f);
    if (by_count) floor = std::max(floor, floor_of_top_k(row, kernels, V, top_k));
    Candidate* const candidates = static_cast<Candidate*>(scratch(Scratch::panel, size_t(V + 1) * sizeof(Candidate)));
    if (!candidates) return MLXEFF_NO_MEMORY;
    int64_t n = 0;
    for (int64_t i = 0; i < row.blocks(); ++i) {
      const float* const values = row.load(i, &count);
      n += kernels.gather(values, count, int32_t(i * block), floor, candidates + n);
    }
    last =
        last_kept(candidates, n, by_count ? top_k : V, by_mass ? double(top_p) * double(total) : double(infinity), max);
  }

  // Kept tokens have a logit above last.value, or a logit equal to it and an id up to last.id.
  const float above = std::nextafter(last.value, infinity), inverse_temperature = 1 / temp;
  float weights[block];
  const auto block_weights = [&](int64_t i) {
    const float* const values = row.load(i, &count);
    const int64_t with_equals = max_of(0, min_of(count, int64_t(last.id) + 1 - i * block));
    if (with_equals == 0 || with_equals == count)
      return kernels.weights(values, weights, count, max, inverse_temperature, with_equals ? last.value : above);
    kernels.weights(values, weights, count, max, inverse_temperature, last.value);
    double sum = 0;
    for (int64_t j = 0; j < count; ++j) {
      if (j >= with_equals && values[j] == last.value) weights[j] = 0;
      sum += double(weights[j]);
    }
    return sum;
  };
  double* const sums = static_cast<double*>(scratch(Scratch::accumulator, size_t(row.blocks()) * sizeof(double)));
  if (!sums) return MLXEFF_NO_MEMORY;
  double mass = 0;
  for (int64_t i = 0; i < row.blocks(); ++i) mass += sums[i] = block_weights(i);
  double left = u * mass;
  int64_t chosen = 0;
  while (chosen + 1 < row.blocks() && left >= sums[chosen]) left -= sums[chosen++];
  while (sums[chosen] <= 0) --chosen;  // rounding led past the last block with kept tokens
  block_weights(chosen);
  for (int64_t j = 0; j < count; ++j) {
    if (weights[j] <= 0) continue;
    *token = int32_t(chosen * block + j);
    if ((left -= double(weights[j])) < 0) break;
  }
  return MLXEFF_OK;
}
