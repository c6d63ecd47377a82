// Helpers shared by all MLX primitives of the native kernels: views of arrays for the C ABI, error checks, output
// allocation, and the base class of the primitives.
//
// A primitive submits its work to the stream's command encoder as a task with raw pointers; MLX keeps inputs, outputs
// and temporaries alive until the task is done. A task must not own Python objects, because it may outlive the
// interpreter.
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

// Returns the dtype code of the array: MLXEFF_F32, MLXEFF_F16 or MLXEFF_BF16.
inline int dtype_of(const mx::array& a) {
  if (a.dtype() == mx::float32) return MLXEFF_F32;
  if (a.dtype() == mx::float16) return MLXEFF_F16;
  if (a.dtype() == mx::bfloat16) return MLXEFF_BF16;
  throw std::invalid_argument("wanted a float32, float16 or bfloat16 array");
}

// Throws the exception that belongs to an MLXEFF_* error code. `bad_argument` is the message for MLXEFF_BAD_ARGUMENT,
// for arguments that only the kernel can check.
inline void check(int code, const char* origin = "", const char* bad_argument = nullptr) {
  if (code == MLXEFF_OK) return;
  throw std::runtime_error(std::string("native kernel: ") + origin +
                           (code == MLXEFF_BAD_ARGUMENT && bad_argument ? bad_argument : mlxeff_error_string(code)));
}

// Throws a Python ValueError with a message such as "origin: wanted ..., got float32 (2, 3)".
[[noreturn]] void refuse(const char* origin, const std::string& wanted, const mx::array& got);
std::string text_of(const mx::Shape& shape);

inline mx::Stream cpu_stream() { return mx::default_stream(mx::Device::cpu); }

// A matrix in memory: rows of `columns` contiguous elements, whose starts are `ld` elements apart.
struct MatrixView {
  char* data;
  int64_t ld, rows, columns;
  int dtype;
};

// The base class of an operator that runs on the CPU only. Evaluation on a GPU and unsupported transformations throw an
// error that names the operator.
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

  // Views an array (..., columns) as a matrix; copies it first if its layout does not allow that.
  MatrixView matrix(const mx::array& x);
  // Views an array (B, heads, tokens, E) through its strides; copies it first if its last axis is not contiguous.
  mlxeff_heads heads(const mx::array& x);

 private:
  mx::array row_contiguous(const mx::array& x);

  const char* name_;
};

// Gives an output row-contiguous memory. The second form reuses the memory of `reused` if the size fits and nothing
// else refers to it.
void allocate(mx::array& out);
void allocate(mx::array& out, const mx::array& reused);
// Gives an output (B, heads, tokens, E) memory in the order (B, tokens, heads, E), so that the output projection can
// read the result of attention without a copy.
mlxeff_heads allocate_heads(mx::array& out);
MatrixView matrix_of(mx::array& row_contiguous_output);

// Computes dx (M, K) = dy (M, N) @ W (N, K) for a compressed W, which is decoded in blocks of rows; the products of the
// blocks are summed in order, in fp32. decode(row, rows, out) writes `rows` rows of W, from row `row` on, and returns
// an MLXEFF_* code.
void blocked_dx(int64_t N, int64_t K, const MatrixView& dy, const MatrixView& dx,
                const std::function<int(int64_t, int64_t, float*)>& decode);

void bind_ops(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_rows(nb::module_& m);

}  // namespace mlxeff
