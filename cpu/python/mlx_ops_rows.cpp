// Row-wise kernels as MLX operators: RMSNorm, SwiGLU, cross-entropy and logsumexp with gradients; argmax and sampling
// without.
#include <nanobind/stl/optional.h>

#include <memory>
#include <optional>

#include "base/pool.h"
#include "python/mlx_ops.h"

namespace mlxeff {
namespace {

// Computes (dx, dw) from the inputs (x, weight, dy); dw is fp32.
class RmsNormGradient : public NativePrimitive {
 public:
  RmsNormGradient(mx::Stream stream, float eps) : NativePrimitive(stream, "native rms_norm (gradient)"), eps_(eps) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    for (mx::array& out : outputs) allocate(out);
    if (outputs[1].size() == 0) return;
    float* const dw = outputs[1].data<float>();
    if (inputs[0].size() == 0) return void(memset(dw, 0, outputs[1].nbytes()));
    const MatrixView x = matrix(inputs[0]), dy = matrix(inputs[2]), dx = matrix_of(outputs[0]);
    const void* const weight = inputs[1].data<char>();
    dispatch([=, weight_dtype = dtype_of(inputs[1]), eps = eps_] {
      check(mlxeff_rms_norm_backward(x.data, x.ld, x.dtype, weight, weight_dtype, dy.data, dy.ld, dy.dtype, dx.data,
                                     dx.ld, dx.dtype, dw, x.rows, x.columns, eps),
            "rms_norm: ");
    });
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return eps_ == static_cast<const RmsNormGradient&>(other).eps_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape(), inputs[1].shape()};
  }

 private:
  float eps_;
};

// Computes y from the inputs (x, weight).
class RmsNorm : public NativePrimitive {
 public:
  RmsNorm(mx::Stream stream, float eps) : NativePrimitive(stream, "native rms_norm"), eps_(eps) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const mx::array& x = inputs[0];
    const void* const weight = inputs[1].data<char>();
    const int weight_dtype = dtype_of(inputs[1]);
    const float eps = eps_;
    if (x.ndim() == 4 && !x.flags().row_contiguous) {  // heads of a transposed array: rows with two strides
      allocate(outputs[0]);
      if (x.size() == 0) return;
      const int64_t B = x.shape(0), H = x.shape(1), S = x.shape(2), E = x.shape(3);
      const mlxeff_heads in = heads(x), out = {outputs[0].data<char>(), H * S * E, S * E, E, dtype_of(outputs[0])};
      return dispatch([=] { check(mlxeff_head_norm(&in, &out, B, H, S, E, weight, weight_dtype, eps), "rms_norm: "); });
    }
    allocate(outputs[0], x);
    if (x.size() == 0) return;
    const MatrixView in = matrix(x), out = matrix_of(outputs[0]);
    dispatch([=] {
      check(mlxeff_rms_norm(in.data, in.ld, in.dtype, weight, weight_dtype, out.data, out.ld, out.dtype, in.rows,
                            in.columns, eps),
            "rms_norm: ");
    });
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    const mx::array &x = primals[0], &weight = primals[1];
    const auto both =
        mx::array::make_arrays({x.shape(), weight.shape()}, {x.dtype(), mx::float32},
                               std::make_shared<RmsNormGradient>(stream(), eps_), {x, weight, cotangents[0]});
    std::vector<mx::array> gradients;
    for (int argument : argnums)
      gradients.push_back(argument == 0 ? both[0] : mx::astype(both[1], weight.dtype(), stream()));
    return gradients;
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return eps_ == static_cast<const RmsNorm&>(other).eps_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {inputs[0].shape()}; }

 private:
  float eps_;
};

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  if (weight.ndim() != 1 || weight.size() == 0) refuse("rms_norm", "a weight of shape (n,)", weight);
  if (x.ndim() < 1 || x.shape(-1) != weight.shape(0))
    refuse("rms_norm", "x of shape (..., " + std::to_string(weight.shape(0)) + ")", x);
  dtype_of(x), dtype_of(weight);
  const mx::Stream stream = cpu_stream();
  return mx::array(x.shape(), mx::promote_types(x.dtype(), weight.dtype()), std::make_shared<RmsNorm>(stream, eps),
                   {x, mx::contiguous(weight, false, stream)});
}

// Computes (dgate, dup) from the inputs (gate, up, dy).
class SwigluGradient : public NativePrimitive {
 public:
  explicit SwigluGradient(mx::Stream stream) : NativePrimitive(stream, "native swiglu (gradient)") {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    for (mx::array& out : outputs) allocate(out);
    if (outputs[0].size() == 0) return;
    const MatrixView gate = matrix(inputs[0]), up = matrix(inputs[1]), dy = matrix(inputs[2]);
    const MatrixView dgate = matrix_of(outputs[0]), dup = matrix_of(outputs[1]);
    dispatch([=] {
      check(mlxeff_swiglu_backward(gate.data, gate.ld, up.data, up.ld, dy.data, dy.ld, dgate.data, dgate.ld, dup.data,
                                   dup.ld, gate.rows, gate.columns, gate.dtype),
            "swiglu: ");
    });
  }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape(), inputs[1].shape()};
  }
};

// Computes y from the inputs (gate, up), which have the same dtype.
class Swiglu : public NativePrimitive {
 public:
  explicit Swiglu(mx::Stream stream) : NativePrimitive(stream, "native swiglu") {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0], inputs[0]);
    if (outputs[0].size() == 0) return;
    const MatrixView gate = matrix(inputs[0]), up = matrix(inputs[1]), y = matrix_of(outputs[0]);
    dispatch([=] {
      check(mlxeff_swiglu(gate.data, gate.ld, up.data, up.ld, y.data, y.ld, gate.rows, gate.columns, gate.dtype),
            "swiglu: ");
    });
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    const mx::array &gate = primals[0], &up = primals[1];
    const auto both = mx::array::make_arrays({gate.shape(), up.shape()}, {gate.dtype(), up.dtype()},
                                             std::make_shared<SwigluGradient>(stream()), {gate, up, cotangents[0]});
    std::vector<mx::array> gradients;
    for (int argument : argnums) gradients.push_back(both[size_t(argument)]);
    return gradients;
  }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {inputs[0].shape()}; }
};

mx::array swiglu(const mx::array& gate, const mx::array& up) {
  if (gate.ndim() < 1 || up.shape() != gate.shape()) refuse("swiglu", "up of shape " + text_of(gate.shape()), up);
  dtype_of(gate), dtype_of(up);
  const mx::Stream stream = cpu_stream();
  const mx::Dtype dtype = mx::promote_types(gate.dtype(), up.dtype());
  return mx::array(gate.shape(), dtype, std::make_shared<Swiglu>(stream),
                   {mx::astype(gate, dtype, stream), mx::astype(up, dtype, stream)});
}

// Computes dlogits from the inputs (logits, targets, lse, dloss).
class CrossEntropyGradient : public NativePrimitive {
 public:
  explicit CrossEntropyGradient(mx::Stream stream) : NativePrimitive(stream, "native cross_entropy (gradient)") {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0], inputs[0]);
    if (outputs[0].size() == 0) return;
    const MatrixView x = matrix(inputs[0]), dx = matrix_of(outputs[0]);
    dispatch([=, targets = inputs[1].data<int32_t>(), lse = inputs[2].data<float>(), dloss = inputs[3].data<float>()] {
      check(mlxeff_cross_entropy_backward(x.data, x.ld, x.dtype, targets, lse, dloss, dx.data, dx.ld, dx.dtype, x.rows,
                                          x.columns),
            "cross_entropy: ", "wanted targets below the size of the vocabulary");
    });
  }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {inputs[0].shape()}; }
};

// Computes (loss, lse), both fp32, from the inputs (logits, targets). `lse`, the logsumexp of each row, is saved for
// the gradient and is not differentiable itself.
class CrossEntropy : public NativePrimitive {
 public:
  explicit CrossEntropy(mx::Stream stream) : NativePrimitive(stream, "native cross_entropy") {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    for (mx::array& out : outputs) allocate(out);
    if (outputs[0].size() == 0) return;
    const MatrixView x = matrix(inputs[0]);
    dispatch([=, targets = inputs[1].data<int32_t>(), loss = outputs[0].data<float>(), lse = outputs[1].data<float>()] {
      check(mlxeff_cross_entropy(x.data, x.ld, x.dtype, targets, loss, lse, x.rows, x.columns),
            "cross_entropy: ", "wanted targets below the size of the vocabulary");
    });
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override {
    std::vector<mx::array> gradients;
    for (int argument : argnums) {
      if (argument == 0)
        gradients.push_back(
            mx::array(primals[0].shape(), primals[0].dtype(), std::make_shared<CrossEntropyGradient>(stream()),
                      {primals[0], primals[1], outputs[1], mx::contiguous(cotangents[0], false, stream())}));
      else gradients.push_back(mx::zeros_like(primals[1], stream()));  // the targets are integers: no gradient
    }
    return gradients;
  }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[1].shape(), inputs[1].shape()};
  }
};

mx::Shape leading(const mx::array& x) { return mx::Shape(x.shape().begin(), x.shape().end() - 1); }

void check_rows(const char* origin, const mx::array& x) {
  if (x.ndim() < 1 || x.shape(-1) < 1) refuse(origin, "rows of one element or more, (..., V)", x);
  dtype_of(x);
}

mx::array cross_entropy(const mx::array& logits, const mx::array& targets) {
  check_rows("cross_entropy", logits);
  const mx::Shape rows = leading(logits);
  if (targets.shape() != rows || !mx::issubdtype(targets.dtype(), mx::integer))
    refuse("cross_entropy", "whole-number targets of shape " + text_of(rows), targets);
  const mx::Stream stream = cpu_stream();
  return mx::array::make_arrays({rows, rows}, {mx::float32, mx::float32}, std::make_shared<CrossEntropy>(stream),
                                {logits, mx::contiguous(mx::astype(targets, mx::int32, stream), false, stream)})[0];
}

// Computes the logsumexp of each row: fp32 (..., 1) from x (..., V).
class LogSumExp : public NativePrimitive {
 public:
  explicit LogSumExp(mx::Stream stream) : NativePrimitive(stream, "native logsumexp") {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    if (outputs[0].size() == 0) return;
    const MatrixView x = matrix(inputs[0]);
    dispatch([=, out = outputs[0].data<float>()] {
      check(mlxeff_logsumexp(x.data, x.ld, x.dtype, out, x.rows, x.columns), "logsumexp: ");
    });
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>&, const std::vector<mx::array>& outputs) override {
    const mx::array softmax = mx::exp(mx::subtract(primals[0], outputs[0], stream()), stream());
    return {mx::astype(mx::multiply(softmax, cotangents[0], stream()), primals[0].dtype(), stream())};
  }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape.back() = 1;
    return {shape};
  }
};

mx::array logsumexp(const mx::array& x) {
  check_rows("logsumexp", x);
  mx::Shape shape = x.shape();
  shape.back() = 1;
  return mx::array(std::move(shape), mx::float32, std::make_shared<LogSumExp>(cpu_stream()), {x});
}

class Argmax : public NativePrimitive {
 public:
  explicit Argmax(mx::Stream stream) : NativePrimitive(stream, "native argmax") {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    if (outputs[0].size() == 0) return;
    const MatrixView x = matrix(inputs[0]);
    dispatch([=, out = outputs[0].data<int32_t>()] {
      check(mlxeff_argmax(x.data, x.ld, x.dtype, out, x.rows, x.columns), "argmax: ");
    });
  }
  bool is_equivalent(const mx::Primitive&) const override { return true; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {leading(inputs[0])}; }
};

mx::array argmax(const mx::array& x) {
  check_rows("argmax", x);
  return mx::array(leading(x), mx::uint32, std::make_shared<Argmax>(cpu_stream()), {x});
}

struct SamplingOptions {
  float temp;
  int64_t top_k;
  float top_p, min_p;
  bool operator==(const SamplingOptions& o) const {
    return temp == o.temp && top_k == o.top_k && top_p == o.top_p && min_p == o.min_p;
  }
};

// Samples one token per row from the inputs (logits, u); u holds uniform random numbers in [0, 1).
class Sample : public NativePrimitive {
 public:
  Sample(mx::Stream stream, SamplingOptions options) : NativePrimitive(stream, "native sample"), options_(options) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    allocate(outputs[0]);
    if (outputs[0].size() == 0) return;
    const MatrixView x = matrix(inputs[0]);
    dispatch([=, u = inputs[1].data<float>(), out = outputs[0].data<int32_t>(), o = options_] {
      const int64_t row_size = x.ld * int64_t(dtype_size(x.dtype));
      memset(out, 0,
             size_t(x.rows) * sizeof(int32_t));  // if a row is refused, later tasks still read valid token ids
      for (int64_t row = 0; row < x.rows; ++row)
        check(mlxeff_sample(x.data + row * row_size, x.dtype, x.columns, o.temp, o.top_k, o.top_p, o.min_p,
                            double(u[row]), out + row),
              "sample: ", "wanted logits without NaN and +inf, one above -inf");
    });
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    return options_ == static_cast<const Sample&>(other).options_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {leading(inputs[0])}; }

 private:
  SamplingOptions options_;
};

mx::array sample(const mx::array& logits, const mx::array& u, float temp, int64_t top_k, float top_p, float min_p) {
  check_rows("sample", logits);
  const mx::Shape rows = leading(logits);
  if (u.shape() != rows || u.dtype() != mx::float32) refuse("sample", "u in [0, 1), float32 " + text_of(rows), u);
  const mx::Stream stream = cpu_stream();
  return mx::array(rows, mx::uint32, std::make_shared<Sample>(stream, SamplingOptions{temp, top_k, top_p, min_p}),
                   {logits, mx::contiguous(u, false, stream)});
}

}  // namespace

void bind_rows(nb::module_& m) {
  m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"),
        "x (..., n) / sqrt(mean(x^2) + eps) * weight (n).");
  m.def("swiglu", &swiglu, nb::arg("gate"), nb::arg("up"), "gate * sigmoid(gate) * up.");
  m.def("cross_entropy", &cross_entropy, nb::arg("logits"), nb::arg("targets"),
        "logits (..., V), targets (...) -> float32 losses (...); 0 where the target is negative.");
  m.def("logsumexp", &logsumexp, nb::arg("x"), "x (..., V) -> float32 (..., 1).");
  m.def("argmax", &argmax, nb::arg("x"), "x (..., V) -> the first of the largest, uint32 (...).");
  m.def("sample", &sample, nb::arg("logits"), nb::arg("u"), nb::arg("temp"), nb::arg("top_k"), nb::arg("top_p"),
        nb::arg("min_p"), "logits (..., V), u in [0, 1) (...) -> tokens, uint32 (...).");
}

}  // namespace mlxeff
