// PlaneKv: a store that encodes each token when it is appended, in one or two planes of 4 bits (plane_layout.h).
#pragma once
#include "kv/plane_kernels.h"

namespace mlxeff {

class PlaneKv : public KvStore {
 public:
  explicit PlaneKv(const Planes& planes) : planes_(planes) {}

  bool fits(const Span& span) const override { return planes_.hold(span.end); }
  int64_t workspace_bytes(const Span& span, const AttentionSizes& sizes, const RunOptions& options,
                          int threads) const override;
  int append(Team& team, const NewRows& rows, const RunOptions& options, void* workspace) override;
  int attend(Team& team, const Queries& queries, const RunOptions& options, void* workspace) override;

 private:
  PlaneArgs plane_args(const Span& span, const AttentionSizes& sizes) const;
  int attend_few(Team& team, const Queries& queries, float* workspace) const;
  int attend_many(Team& team, const Queries& queries, const RunOptions& options, float* workspace) const;

  Planes planes_;
};

}  // namespace mlxeff
