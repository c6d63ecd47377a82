// What the MLX primitives of the single operators share: views of arrays for the C ABI, and a base class.
//
// A primitive's work is handed to the stream's command encoder with raw pointers; MLX keeps inputs, outputs and
// temporaries alive until it is done. A task owns nothing of Python: it may outlive the interpreter.
#pragma once
#include <nanobind/nanobind.h>

#include <functional>
#include <stdexcept>
#include <string>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "mlxeff_cpu.h"

namespace mlxeff {

namespace nb = nanobind;
namespace mx = mlx::core;

// MLXEFF_F32, MLXEFF_F16 or MLXEFF_BF16.
inline int dtype_of(const mx::array& a) {
  if (a.dtype() == mx::float32) return MLXEFF_F32;
  if (a.dtype() == mx::float16) return MLXEFF_F16;
  if (a.dtype() == mx::bfloat16) return MLXEFF_BF16;
  throw std::invalid_argument("wanted a float32, float16 or bfloat16 array");
}

// `bad_argument` says what an argument that only the kernel can judge should have been.
inline void check(int code, const char* origin = "", const char* bad_argument = nullptr) {
  if (code == MLXEFF_OK) return;
  throw std::runtime_error(std::string("native kernel: ") + origin +
                           (code == MLXEFF_BAD_ARGUMENT && bad_argument ? bad_argument : mlxeff_error_string(code)));
}

// "origin: wanted ..., got float32 (2, 3)", as ValueError.
[[noreturn]] void refuse(const char* origin, const std::string& wanted, const mx::array& got);
std::string text_of(const mx::Shape& shape);

inline mx::Stream cpu_stream() { return mx::default_stream(mx::Device::cpu); }

// Rows of `columns` contiguous elements, `ld` elements apart.
struct MatrixView {
  char* data;
  int64_t ld, rows, columns;
  int dtype;
};

// One operator on the CPU. What it cannot do, it refuses by name.
class NativePrimitive : public mx::Primitive {
 public:
  NativePrimitive(mx::Stream stream, const char* name) : mx::Primitive(stream), name_(name) {}
  const char* name() const override { return name_; }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override { refuse_to("run on a GPU"); }
  std::vector<mx::array> jvp(const std::vector<mx::array>&, const std::vector<mx::array>&,
                             const std::vector<int>&) override {
    refuse_to("be differentiated forwards (jvp)");
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>&, const std::vector<mx::array>&, const std::vector<int>&,
                             const std::vector<mx::array>&) override {
    refuse_to("be differentiated");
  }
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>&,
                                                           const std::vector<int>&) override {
    refuse_to("be mapped over an axis (vmap)");
  }

 protected:
  [[noreturn]] void refuse_to(const char* what) const {
    throw std::invalid_argument(std::string(name_) + " cannot " + what +
                                "; inside `with mlxeff.ops.mlx_only():` MLX's own operation can");
  }

  template <class Task>
  void dispatch(Task&& task) {
    mx::cpu::get_command_encoder(stream()).dispatch(std::forward<Task>(task));
  }

  // The array (..., columns) as a matrix; a copy in place of one that is not laid out so.
  MatrixView matrix(const mx::array& x);
  // The array (B, heads, tokens, E) by its strides; a copy of one whose last axis is not contiguous.
  mlxeff_heads heads(const mx::array& x);

 private:
  mx::array row_contiguous(const mx::array& x);

  const char* name_;
};

// Memory for an output, row-contiguous: that of `reused` if it fits and nobody else holds it.
void allocate(mx::array& out);
void allocate(mx::array& out, const mx::array& reused);
// Memory for (B, heads, tokens, E) in the order (B, tokens, heads, E): what follows attention reads it so without a
// copy.
mlxeff_heads allocate_heads(mx::array& out);
MatrixView matrix_of(mx::array& row_contiguous_output);

// dx (M, K) = dy (M, N) @ W (N, K) of a W that is decoded in blocks of rows, whose products are summed in order, in
// fp32. decode(row, rows, out) writes `rows` rows of W and returns an MLXEFF_* code.
void blocked_dx(int64_t N, int64_t K, const MatrixView& dy, const MatrixView& dx,
                const std::function<int(int64_t, int64_t, float*)>& decode);

void bind_ops(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_rows(nb::module_& m);

}  // namespace mlxeff
