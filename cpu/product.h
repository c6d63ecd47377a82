// y = x W^T for a weight matrix of any kind: one form over the kernel tables of the matrix families. x and y are fp32.
#pragma once
#include "matmul_kernels.h"
#include "qmatmul_kernels.h"

namespace mlxeff {

// W (N, K): affine-quantised, or dense (row-major, contiguous) where `quantised.packed` is null.
struct WeightMatrix {
  int64_t N, K;
  mlxeff_qweight quantised;
  const void* dense;
  int dtype;  // of dense

  bool is_dense() const { return quantised.packed == nullptr; }
};

// The calls come in the order of qmatmul_kernels.h: bind (or share_input), prepare over all rows of x, run over all rows of W.
class Product {
 public:
  Product() = default;
  Product(const WeightMatrix& w, const float* x, float* y, int64_t rows, int mode)
      : matrix_(&w), rows_(rows), quantised_(&MLXEFF_DISPATCH(qmatmul_kernels)), dense_(&MLXEFF_DISPATCH(matmul_kernels)) {
    if (w.is_dense()) {
      const int dense_mode = mode == MLXEFF_EXACT ? MLXEFF_EXACT : MLXEFF_COMPUTE_BF16;
      d_ = {{x, w.K, MLXEFF_F32, false}, {w.dense, w.K, w.dtype, true}, y, w.N, MLXEFF_F32, rows, w.N, w.K, dense_mode, nullptr, nullptr};
    } else {
      q_ = {w.quantised, x, w.K, MLXEFF_F32, y, w.N, MLXEFF_F32, rows, mode, nullptr, 0, nullptr, nullptr, nullptr, nullptr};
    }
  }

  const WeightMatrix& matrix() const { return *matrix_; }
  int64_t workspace_bytes() const {
    return round_up(int64_t(matrix_->is_dense() ? dense_->workspace_bytes(d_) : quantised_->workspace_bytes(q_)), 64);
  }
  void bind(void* workspace) {
    if (matrix_->is_dense()) dense_->bind(d_, workspace);
    else quantised_->bind(q_, workspace);
  }
  void prepare(int64_t begin, int64_t end) const {
    if (matrix_->is_dense()) dense_->prepare(d_, begin, end);
    else quantised_->prepare(q_, begin, end);
  }
  int64_t piece(int threads) const { return matrix_->is_dense() ? dense_->piece(d_, threads) : quantised_->piece(q_, threads); }
  int run(int64_t begin, int64_t end) const { return matrix_->is_dense() ? dense_->run(d_, begin, end) : quantised_->run(q_, begin, end); }

  // Whether `other`, of the same x, needs it in the same form; share_input then replaces its bind and prepare.
  bool same_input(const Product& other) const {
    const WeightMatrix &a = *matrix_, &b = *other.matrix_;
    if (a.is_dense() != b.is_dense()) return false;
    return a.is_dense() || (a.quantised.bits == b.quantised.bits && a.quantised.group == b.quantised.group);
  }
  void share_input(const Product& owner) {
    d_.a_f32 = owner.d_.a_f32;
    d_.a_bf16 = owner.d_.a_bf16;
    q_.x_f32 = owner.q_.x_f32;
    q_.ldx_f32 = owner.q_.ldx_f32;
    q_.x_sum = owner.q_.x_sum;
    q_.x_int8 = owner.q_.x_int8;
    q_.x_scale = owner.q_.x_scale;
    q_.x_bf16 = owner.q_.x_bf16;
  }

 private:
  const WeightMatrix* matrix_ = nullptr;
  int64_t rows_ = 0;
  const QmatmulKernels* quantised_ = nullptr;
  const MatmulKernels* dense_ = nullptr;
  QmmArgs q_ = {};
  MatmulArgs d_ = {};
};

}  // namespace mlxeff
