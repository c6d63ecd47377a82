// The native kernels as single MLX operators with gradients: shared helpers and the matrix products.
//
//   linear            y (..., N) = x (..., K) w (N, K)^T; each operand keeps its dtype, y has the wider one
//   quantized_matmul  the same with an affine-quantised w, which has no gradient; `mode` rounds x in y, not in dx
#include "python/mlx_ops.h"

#include <sstream>

#include "base/pool.h"

namespace mlxeff {

std::string text_of(const mx::Shape& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << (shape.size() == 1 ? ",)" : ")");
  return text.str();
}

void refuse(const char* origin, const std::string& wanted, const mx::array& got) {
  std::ostringstream text;
  text << origin << ": wanted " << wanted << ", got " << got.dtype() << " " << text_of(got.shape());
  throw std::invalid_argument(text.str());
}

// The copy is made on this primitive's stream before the work that reads it, and the command encoder keeps it alive
// until that work is done.
mx::array NativePrimitive::row_contiguous(const mx::array& x) {
  mx::array copy = mx::contiguous(x, false, stream());
  std::vector<mx::array> outputs = {copy};
  copy.primitive().eval_cpu({x}, outputs);
  mx::cpu::get_command_encoder(stream()).add_temporary(copy);
  return copy;
}

// True if all axes but the last can be merged into one axis with a constant stride, which is written to *ld.
static bool collapses(const mx::array& x, int64_t* ld) {
  const int last = int(x.ndim()) - 1;
  if (x.shape(last) != 1 && x.strides(last) != 1) return false;
  int64_t expected = -1;
  *ld = x.shape(last);
  for (int axis = last - 1; axis >= 0; --axis) {
    if (x.shape(axis) == 1) continue;
    if (expected < 0) *ld = x.strides(axis);
    else if (x.strides(axis) != expected) return false;
    expected = x.strides(axis) * x.shape(axis);
  }
  return *ld >= x.shape(last);
}

MatrixView NativePrimitive::matrix(const mx::array& x) {
  int64_t ld;
  if (!collapses(x, &ld)) return matrix(row_contiguous(x));
  const int64_t columns = x.shape(-1);
  return {const_cast<char*>(x.data<char>()), ld, columns ? int64_t(x.size()) / columns : 0, columns, dtype_of(x)};
}

static mlxeff_heads heads_of(const mx::array& x) {
  return {const_cast<char*>(x.data<char>()), x.strides(0), x.strides(1), x.strides(2), dtype_of(x)};
}

mlxeff_heads NativePrimitive::heads(const mx::array& x) {
  const bool strided = x.shape(3) == 1 || x.strides(3) == 1;
  return heads_of(strided ? x : row_contiguous(x));
}

void allocate(mx::array& out) { out.set_data(mx::allocator::malloc(out.nbytes())); }

void allocate(mx::array& out, const mx::array& reused) {
  const bool fits = reused.is_donatable() && reused.flags().row_contiguous && reused.dtype() == out.dtype() &&
                    reused.size() == out.size();
  if (fits) out.copy_shared_buffer(reused);
  else allocate(out);
}

mlxeff_heads allocate_heads(mx::array& out) {
  const int64_t H = out.shape(1), S = out.shape(2), E = out.shape(3);
  mx::array::Flags flags = {};
  flags.contiguous = true;
  flags.row_contiguous = H == 1 || S == 1;
  out.set_data(mx::allocator::malloc(out.nbytes()), out.size(), {S * H * E, E, H * E, 1}, flags);
  return heads_of(out);
}

MatrixView matrix_of(mx::array& out) {
  const int64_t columns = out.shape(-1);
  return {out.data<char>(), columns, columns ? int64_t(out.size()) / columns : 0, columns, dtype_of(out)};
}

constexpr int64_t decoded_floats = 8 << 20;  // most weights that blocked_dx decodes at a time

void blocked_dx(int64_t N, int64_t K, const MatrixView& dy, const MatrixView& dx,
                const std::function<int(int64_t, int64_t, float*)>& decode) {
  const int64_t rows = max_of(1, min_of(N, decoded_floats / K)), count = dy.rows * K;
  const bool direct = dx.dtype == MLXEFF_F32;
  const std::unique_ptr<float[]> weights(new float[size_t(rows * K)]),
      widened(direct ? nullptr : new float[size_t(count)]);
  const std::unique_ptr<float[]> part(rows < N ? new float[size_t(count)] : nullptr);
  float* const sum = direct ? reinterpret_cast<float*>(dx.data) : widened.get();
  for (int64_t row = 0; row < N; row += rows) {
    const int64_t n = min_of(rows, N - row);
    check(decode(row, n, weights.get()), "gradient: ");
    const char* const columns = dy.data + row * int64_t(dtype_size(dy.dtype));
    check(mlxeff_matmul_dx(columns, dy.ld, dy.dtype, weights.get(), K, MLXEFF_F32, row ? part.get() : sum, K,
                           MLXEFF_F32, dy.rows, n, K, MLXEFF_EXACT, 0),
          "gradient: ");
    if (row)
      for (int64_t i = 0; i < count; ++i) sum[i] += part[size_t(i)];
  }
  for (int64_t i = 0; i < count && !direct; ++i) {
    if (dx.dtype == MLXEFF_F16) from_float(sum[i], reinterpret_cast<f16*>(dx.data) + i);
    else from_float(sum[i], reinterpret_cast<bf16*>(dx.data) + i);
  }
}

namespace {

// The product that a primitive computes: y = x w^T from inputs (x, w), or one of its gradients, dx = dy w from (dy, w)
// and dw = dy^T x from (dy, x).
enum class Product { y, dx, dw };

class LinearProduct : public NativePrimitive {
 public:
  LinearProduct(mx::Stream stream, Product product) : NativePrimitive(stream, "native linear"), product_(product) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    if (outputs[0].size() == 0) return;
    const MatrixView a = matrix(inputs[0]), b = matrix(inputs[1]), c = matrix_of(outputs[0]);
    const auto kernel = product_ == Product::y    ? mlxeff_matmul
                        : product_ == Product::dx ? mlxeff_matmul_dx
                                                  : mlxeff_matmul_dw;
    // M, N, K of the forward product: x (M, K), w (N, K), y (M, N).
    const int64_t M = product_ == Product::dw ? a.rows : c.rows;
    const int64_t N = product_ == Product::y ? c.columns : a.columns,
                  K = product_ == Product::y ? a.columns : c.columns;
    dispatch([=] {
      check(kernel(a.data, a.ld, a.dtype, b.data, b.ld, b.dtype, c.data, c.ld, c.dtype, M, N, K, MLXEFF_EXACT, 0),
            "linear: ");
    });
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    if (product_ != Product::y) refuse_to("be differentiated twice");
    std::vector<mx::array> gradients;
    for (int argument : argnums) {
      const mx::array &wanted = primals[size_t(argument)], &other = primals[size_t(1 - argument)];
      gradients.push_back(
          mx::array(wanted.shape(), wanted.dtype(),
                    std::make_shared<LinearProduct>(stream(), argument == 0 ? Product::dx : Product::dw),
                    {cotangents[0], other}));
    }
    return gradients;
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return product_ == static_cast<const LinearProduct&>(other).product_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    if (product_ == Product::dw) return {{inputs[0].shape(-1), inputs[1].shape(-1)}};
    mx::Shape shape = inputs[0].shape();
    shape.back() = inputs[1].shape(product_ == Product::y ? 0 : 1);
    return {shape};
  }

 private:
  Product product_;
};

mx::array linear(const mx::array& x, const mx::array& w) {
  if (w.ndim() != 2) refuse("linear", "a matrix (N, K)", w);
  if (x.ndim() < 1 || x.shape(-1) != w.shape(1))
    refuse("linear", "x of shape (..., " + std::to_string(w.shape(1)) + ")", x);
  dtype_of(x), dtype_of(w);
  mx::Shape shape = x.shape();
  shape.back() = w.shape(0);
  return mx::array(std::move(shape), mx::promote_types(x.dtype(), w.dtype()),
                   std::make_shared<LinearProduct>(cpu_stream(), Product::y), {x, w});
}

// dx (M, K) = dy (M, N) @ W (N, K).
void quantized_dx(const mlxeff_qweight& w, const MatrixView& dy, const MatrixView& dx) {
  blocked_dx(w.N, w.K, dy, dx, [&](int64_t row, int64_t rows, float* out) {
    const int64_t groups = w.K / w.group, scale_size = int64_t(dtype_size(w.scale_dtype));
    mlxeff_qweight block = w;
    block.N = rows;
    block.packed += row * (w.K * w.bits / 32);
    block.scales = static_cast<const char*>(w.scales) + row * groups * scale_size;
    block.biases = static_cast<const char*>(w.biases) + row * groups * scale_size;
    return mlxeff_dequantize(&block, out, w.K, MLXEFF_F32);
  });
}

// Computes y from the inputs (x, packed, scales, biases), or dx from (dy, packed, scales, biases).
class QuantizedProduct : public NativePrimitive {
 public:
  QuantizedProduct(mx::Stream stream, int group, int bits, int mode, bool gradient)
      : NativePrimitive(stream, "native quantized_matmul"), group_(group), bits_(bits), mode_(mode),
        gradient_(gradient) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    if (outputs[0].size() == 0) return;
    const MatrixView a = matrix(inputs[0]), out = matrix_of(outputs[0]);
    // The function quantized_matmul has made the packed words, scales and biases row-contiguous.
    const mx::array &packed = inputs[1], &scales = inputs[2], &biases = inputs[3];
    const int64_t columns = packed.shape(1) * 32 / bits_;
    const mlxeff_qweight w = {packed.data<uint32_t>(),
                              scales.data<char>(),
                              biases.data<char>(),
                              packed.shape(0),
                              columns,
                              columns,
                              bits_,
                              group_,
                              dtype_of(scales)};
    if (gradient_) dispatch([=] { quantized_dx(w, a, out); });
    else
      dispatch([=, mode = mode_] {
        check(mlxeff_qmm(&w, a.data, a.ld, a.dtype, out.data, out.ld, out.dtype, a.rows, mode, 0),
              "quantized_matmul: ");
      });
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    if (gradient_) refuse_to("be differentiated twice");
    if (argnums.size() != 1 || argnums[0] != 0) refuse_to("be differentiated with respect to quantised weights");
    auto product = std::make_shared<QuantizedProduct>(stream(), group_, bits_, mode_, true);
    return {mx::array(primals[0].shape(), primals[0].dtype(), std::move(product),
                      {cotangents[0], primals[1], primals[2], primals[3]})};
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const QuantizedProduct&>(other);
    return group_ == o.group_ && bits_ == o.bits_ && mode_ == o.mode_ && gradient_ == o.gradient_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape.back() = gradient_ ? inputs[1].shape(1) * 32 / bits_ : inputs[1].shape(0);
    return {shape};
  }

 private:
  int group_, bits_, mode_;
  bool gradient_;
};

mx::array quantized_matmul(const mx::array& x, const mx::array& w, const mx::array& scales, const mx::array& biases,
                           int group, int bits, int mode) {
  if (w.ndim() != 2 || w.dtype() != mx::uint32)
    refuse("quantized_matmul", "packed weights, uint32 (N, K * bits / 32)", w);
  if (bits < 2 || bits == 7 || bits > 8 || (group != 32 && group != 64 && group != 128))
    throw std::invalid_argument("quantized_matmul: wanted 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128");
  const int columns = int(int64_t(w.shape(1)) * 32 / bits);
  const mx::Shape wanted = {w.shape(0), columns / group};
  if (columns % group || scales.shape() != wanted)
    refuse("quantized_matmul", "scales of shape " + text_of(wanted), scales);
  if (biases.shape() != wanted || biases.dtype() != scales.dtype())
    refuse("quantized_matmul", "biases like the scales", biases);
  if (x.ndim() < 1 || x.shape(-1) != columns)
    refuse("quantized_matmul", "x of shape (..., " + std::to_string(columns) + ")", x);
  dtype_of(x), dtype_of(scales);
  const mx::Stream stream = cpu_stream();
  mx::Shape shape = x.shape();
  shape.back() = w.shape(0);
  return mx::array(std::move(shape), mx::promote_types(x.dtype(), scales.dtype()),
                   std::make_shared<QuantizedProduct>(stream, group, bits, mode, false),
                   {x, mx::contiguous(w, false, stream), mx::contiguous(scales, false, stream),
                    mx::contiguous(biases, false, stream)});
}

}  // namespace

void bind_ops(nb::module_& m) {
  m.def("linear", &linear, nb::arg("x"), nb::arg("w"), "x (..., K), w (N, K) -> x w^T (..., N).");
  m.def("quantized_matmul", &quantized_matmul, nb::arg("x"), nb::arg("w"), nb::arg("scales"), nb::arg("biases"),
        nb::arg("group_size"), nb::arg("bits"), nb::arg("mode"), "x (..., K), w (N, K) packed -> x w^T (..., N).");
  bind_attention(m);
  bind_rows(m);
}

}  // namespace mlxeff
