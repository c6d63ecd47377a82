// The router of a dynamic feed-forward: it picks an expert for each row.
#pragma once
#include <vector>

#include "base/isa.h"

namespace mlxeff {

// Scores are weight x + bias, in fp32. `prices` holds one value for each expert; experts rise in width.
//
// lagrangian  score e of a narrower expert is the logarithm of the error that it would make. Its cost is exp(score) +
//             dial * price, that of the widest expert dial * price. The expert with the least cost is picked, of equal
//             ones the wider.
// tail        the softmax of the scores of all experts is summed from the widest on. The narrowest expert is picked for
//             which the sum of the wider ones is at most `dial`.
struct ExpertRouter {
  enum class Rule { lagrangian, tail };

  Rule rule;
  const float *weight, *bias;  // (scores, dim), (scores)
  int64_t dim;
  std::vector<float> prices;

  static constexpr int64_t most_experts = 16;

  int64_t experts() const { return int64_t(prices.size()); }
  int64_t scores() const { return rule == Rule::lagrangian ? experts() - 1 : experts(); }
  int64_t weight_bytes() const { return scores() * dim * int64_t(sizeof(float)); }

  // Asks for the weight, so that it arrives while the row is made.
  void prefetch() const {
    const char* const first = reinterpret_cast<const char*>(weight);
    for (int64_t i = 0; i < weight_bytes(); i += 64) __builtin_prefetch(first + i, 0, 3);
  }
  // Returns the expert of the row x (dim).
  int64_t pick(const float* x, float dial) const;
};

}  // namespace mlxeff
