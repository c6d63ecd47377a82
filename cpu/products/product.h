// Product: y = x W^T for a weight matrix of any kind, behind one interface. It selects the kernel table of the matrix's
// kind (quantised, SeedLM or dense) or of the BLAS. x and y are fp32.
#pragma once
#include "products/blas_product.h"
#include "products/matmul_kernels.h"
#include "products/qmatmul_kernels.h"
#include "seedlm/seedlm_kernels.h"

namespace mlxeff {

// The functions must be called in the order of product_kernels.h: bind (or share_input), prepare for all rows of x, run
// for all rows of W.
class Product {
  // Calls f(kernel table, arguments) for the kernels that this product uses.
  template <class Self, class F>
  static auto visit(Self& self, F&& f) {
    if (self.blas_) return f(*self.blas_, self.b_);
    switch (self.matrix().kind()) {
      case WeightMatrix::Kind::quantised: return f(*self.quantised_, self.q_);
      case WeightMatrix::Kind::seeds: return f(*self.seeds_, self.s_);
      case WeightMatrix::Kind::dense: break;
    }
    return f(*self.dense_, self.d_);
  }

 public:
  Product() = default;
  // `mode` is MLXEFF_EXACT, MLXEFF_COMPUTE_BF16 or MLXEFF_COMPUTE_INT8; a dense matrix treats INT8 as BF16. With
  // `accumulate` the product is added to y. The rows of x and of y are ldx and ldy floats apart; 0 stands for K and N,
  // rows without gaps.
  Product(const WeightMatrix& w, const float* x, float* y, int64_t rows, int mode, bool accumulate = false,
          int64_t ldx = 0, int64_t ldy = 0)
      : quantised_(&MLXEFF_DISPATCH(qmatmul_kernels)), seeds_(&MLXEFF_DISPATCH(seedlm_kernels)),
        dense_(&MLXEFF_DISPATCH(matmul_kernels)) {
    const int float_mode = mode == MLXEFF_EXACT ? MLXEFF_EXACT : MLXEFF_COMPUTE_BF16;
    const bool rounds = w.kind() == WeightMatrix::Kind::quantised && mode == MLXEFF_COMPUTE_INT8;
    if (!rounds && (mode == MLXEFF_EXACT || active_isa() != Isa::amx)) blas_ = blas_kernels(rows);
    if (!ldx) ldx = w.K;
    if (!ldy) ldy = w.N;
    b_ = {w, x, y, ldx, ldy, rows, accumulate};
    const ProductOutput out = {y, ldy, MLXEFF_F32, accumulate};
    switch (w.kind()) {
      case WeightMatrix::Kind::quantised:
        q_ = {w.quantised, x, ldx, MLXEFF_F32, out, rows, mode};
        lower_ = {w.lower, x, ldx, MLXEFF_F32, {y, ldy, MLXEFF_F32, true}, rows, mode};
        break;
      case WeightMatrix::Kind::seeds: s_ = {w.seeds, x, ldx, MLXEFF_F32, out, rows, mode}; break;
      case WeightMatrix::Kind::dense:
        d_ = {{x, ldx, MLXEFF_F32, false}, {w.dense, w.ld, w.dtype, true}, out, rows, w.N, w.K, float_mode};
    }
  }

  const WeightMatrix& matrix() const { return b_.w; }
  int64_t workspace_bytes() const {
    return round_up(
        int64_t(visit(*this, [](const auto& kernels, const auto& args) { return kernels.workspace_bytes(args); })), 64);
  }
  void bind(void* workspace) {
    visit(*this, [&](const auto& kernels, auto& args) { kernels.bind(args, workspace); });
    read_as(lower_, q_);
  }
  void prepare(int64_t begin, int64_t end) const {
    visit(*this, [&](const auto& kernels, const auto& args) { kernels.prepare(args, begin, end); });
  }
  int64_t piece(int threads) const {
    return visit(*this, [&](const auto& kernels, const auto& args) { return kernels.piece(args, threads); });
  }
  int run(int64_t begin, int64_t end) const {
    const int error =
        visit(*this, [&](const auto& kernels, const auto& args) { return kernels.run(args, begin, end); });
    return error || blas_ || !matrix().lower.packed ? error : quantised_->run(lower_, begin, end);
  }

  // True if this product and `other`, which has the same x, read x in the same layout. Then one of them can call
  // share_input with the other instead of bind and prepare.
  bool same_input(const Product& other) const {
    const WeightMatrix &a = matrix(), &b = other.matrix();
    if (a.kind() != b.kind()) return false;
    switch (a.kind()) {
      case WeightMatrix::Kind::quantised:
        return a.quantised.bits == b.quantised.bits && a.quantised.group == b.quantised.group;
      case WeightMatrix::Kind::seeds: return a.seeds.columns == b.seeds.columns && a.seeds.states == b.seeds.states;
      case WeightMatrix::Kind::dense: break;
    }
    return true;
  }
  void share_input(const Product& owner) {
    d_.a_f32 = owner.d_.a_f32;
    d_.a_bf16 = owner.d_.a_bf16;
    s_.x_f32 = owner.s_.x_f32;
    s_.x_bf16 = owner.s_.x_bf16;
    s_.x_int8 = owner.s_.x_int8;
    s_.ldx_few = owner.s_.ldx_few;
    read_as(q_, owner.q_);
    read_as(lower_, owner.q_);
  }

 private:
  // Lets `args` read the form of x that `owner` reads.
  static void read_as(QmmArgs& args, const QmmArgs& owner) {
    args.x_f32 = owner.x_f32;
    args.ldx_f32 = owner.ldx_f32;
    args.x_sum = owner.x_sum;
    args.x_int8 = owner.x_int8;
    args.x_scale = owner.x_scale;
    args.x_bf16 = owner.x_bf16;
  }

  const QmatmulKernels* quantised_ = nullptr;
  const SeedlmKernels* seeds_ = nullptr;
  const MatmulKernels* dense_ = nullptr;
  const ProductKernels<BlasArgs>* blas_ = nullptr;
  QmmArgs q_ = {}, lower_ = {};  // lower_: of the second matrix of a sum, whose product is added
  SeedArgs s_ = {};
  MatmulArgs d_ = {};
  BlasArgs b_ = {};
};

}  // namespace mlxeff
