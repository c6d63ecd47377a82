// PlaneKv: a store whose older tokens lie in planes of 4 bits (plane_kernels.h), and whose newest tokens, the tail, are
// fp16. A pass appends to the tail; whoever owns the arrays moves full blocks from the tail into the planes between two
// passes.
#pragma once
#include "kv/plane_kernels.h"

namespace mlxeff {

class PlaneKv : public KvStore {
 public:
  // `planes` describes the planes: its fields from upper to blocks. The tail is a row-major (2, batch, groups,
  // tail_capacity, size) array of fp16: the keys, stored after RoPE, and the values.
  PlaneKv(const PlaneArgs& planes, f16* tail, int64_t tail_capacity)
      : planes_(planes), tail_(tail), tail_capacity_(tail_capacity) {}

  bool fits(const Span& span) const override;
  int64_t workspace_bytes(const Span& span, const AttentionSizes& sizes, const RunOptions& options,
                          int threads) const override;
  int append(Team& team, const NewRows& rows, const RunOptions& options, void* workspace) override;
  int attend(Team& team, const Queries& queries, const RunOptions& options, void* workspace) override;

 private:
  int64_t stored() const { return planes_.blocks * planes_.block; }  // tokens in the planes
  PlaneArgs plane_args(const Span& span, const AttentionSizes& sizes, const float* queries, float* partial) const;
  AttentionArgs tail_args(const Span& span, const AttentionSizes& sizes, const RunOptions& options) const;
  int attend_few(Team& team, const Queries& queries, const RunOptions& options, float* workspace) const;
  int attend_many(Team& team, const Queries& queries, const RunOptions& options, float* workspace) const;

  PlaneArgs planes_;
  // The tail's keys and values, of a batch of this size.
  f16* keys() const { return tail_; }
  f16* values(int64_t batch, const AttentionSizes& sizes) const {
    return tail_ + batch * sizes.groups * tail_capacity_ * sizes.size;
  }
  f16* tail_;
  int64_t tail_capacity_;
};

}  // namespace mlxeff
