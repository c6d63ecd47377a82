// DenseKv: a store that holds unquantised keys and values in fp32, fp16 or bf16.
#pragma once
#include "kv/kv_store.h"

namespace mlxeff {

class DenseKv : public KvStore {
 public:
  // `keys`, stored after RoPE, and `values` are row-major (batch, groups, capacity, size) arrays of the same dtype.
  DenseKv(void* keys, void* values, int64_t capacity, int dtype)
      : keys_(static_cast<char*>(keys)), values_(static_cast<char*>(values)), capacity_(capacity), dtype_(dtype) {}

  bool fits(const Span& span) const override;
  int64_t workspace_bytes(const Span& span, const AttentionSizes& sizes, const RunOptions& options,
                          int threads) const override;
  int append(Team& team, const NewRows& rows, const RunOptions& options, void* workspace) override;
  int attend(Team& team, const Queries& queries, const RunOptions& options, void* workspace) override;

 private:
  char *keys_, *values_;
  int64_t capacity_;
  int dtype_;
};

}  // namespace mlxeff
