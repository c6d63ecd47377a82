#include "decoder/expert_router.h"

#include <math.h>

#include "decoder/decoder_kernels.h"

namespace mlxeff {
namespace {

// Comparisons with NaN are false, so that an expert whose cost is not a number is never picked.
int64_t least_cost(const float* scores, const std::vector<float>& prices, float dial) {
  int64_t best = int64_t(prices.size()) - 1;
  float least = dial * prices[size_t(best)];
  for (int64_t e = best - 1; e >= 0; --e) {
    const float cost = expf(scores[e]) + dial * prices[size_t(e)];
    if (!(cost < least)) continue;
    least = cost;
    best = e;
  }
  return best;
}

int64_t least_tail(const float* scores, int64_t experts, float dial) {
  float most = scores[0], total = 0, powers[ExpertRouter::most_experts];
  for (int64_t e = 1; e < experts; ++e) most = scores[e] > most ? scores[e] : most;
  for (int64_t e = 0; e < experts; ++e) total += powers[e] = expf(scores[e] - most);
  int64_t best = experts - 1;
  for (float sum = powers[best] / total; best > 0 && sum <= dial; sum += powers[best] / total) --best;
  return best;
}

}  // namespace

int64_t ExpertRouter::pick(const float* x, float dial) const {
  const DecoderKernels& kernels = MLXEFF_DISPATCH(decoder_kernels);
  float values[most_experts];
  for (int64_t s = 0; s < scores(); ++s) values[s] = kernels.dot(weight + s * dim, x, dim) + bias[s];
  return rule == Rule::lagrangian ? least_cost(values, prices, dial) : least_tail(values, experts(), dial);
}

}  // namespace mlxeff
