// Attention and rotary position embedding as MLX operators with gradients. Arrays are (B, heads, tokens, E) with any
// strides whose last axis is contiguous, so a slice of a cache buffer or a transposed (B, tokens, heads, E) array is
// read without a copy. Results are stored in the order (B, tokens, heads, E).
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "python/mlx_ops.h"

namespace mlxeff {
namespace {

// Computes (dq, dk, dv) from the inputs (q, k, v, out, lse, dout).
class AttentionGradient : public NativePrimitive {
 public:
  AttentionGradient(mx::Stream stream, float scale, int64_t window)
      : NativePrimitive(stream, "native attention (gradient)"), scale_(scale), window_(window) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    mlxeff_heads gradients[3];
    for (size_t i = 0; i < 3; ++i) gradients[i] = allocate_heads(outputs[i]);
    if (inputs[1].size() == 0) return;
    const mx::array &q = inputs[0], &k = inputs[1];
    mlxeff_attention_args forward = {heads(q),         heads(k),
                                     heads(inputs[2]), heads(inputs[3]),
                                     q.shape(0),       q.shape(1),
                                     k.shape(1),       q.shape(2),
                                     k.shape(2),       q.shape(3),
                                     scale_,           window_,
                                     MLXEFF_EXACT,     const_cast<float*>(inputs[4].data<float>())};
    const mlxeff_heads dout = heads(inputs[5]), dq = gradients[0], dk = gradients[1], dv = gradients[2];
    dispatch([=] { check(mlxeff_attention_backward(&forward, &dout, &dq, &dk, &dv), "attention: "); });
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const AttentionGradient&>(other);
    return scale_ == o.scale_ && window_ == o.window_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape(), inputs[1].shape(), inputs[2].shape()};
  }

 private:
  float scale_;
  int64_t window_;
};

// Computes (out, lse) from the inputs (q, k, v). `lse`, the logsumexp of each row of scores, fp32 (B, H, S), is saved
// for the gradient and is not differentiable itself.
class Attention : public NativePrimitive {
 public:
  Attention(mx::Stream stream, float scale, int64_t window)
      : NativePrimitive(stream, "native attention"), scale_(scale), window_(window) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const mlxeff_heads out = allocate_heads(outputs[0]);
    allocate(outputs[1]);
    if (outputs[0].size() == 0) return;
    const mx::array &q = inputs[0], &k = inputs[1];
    const mlxeff_attention_args args = {
        heads(q),   heads(k),   heads(inputs[2]), out,    q.shape(0), q.shape(1),   k.shape(1),
        q.shape(2), k.shape(2), q.shape(3),       scale_, window_,    MLXEFF_EXACT, outputs[1].data<float>()};
    dispatch([=] { check(mlxeff_attention(&args), "attention: "); });
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override {
    const mx::array &q = primals[0], &k = primals[1], &v = primals[2];
    const auto all = mx::array::make_arrays({q.shape(), k.shape(), v.shape()}, {q.dtype(), k.dtype(), v.dtype()},
                                            std::make_shared<AttentionGradient>(stream(), scale_, window_),
                                            {q, k, v, outputs[0], outputs[1], cotangents[0]});
    std::vector<mx::array> gradients;
    for (int argument : argnums) gradients.push_back(all[size_t(argument)]);
    return gradients;
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const Attention&>(other);
    return scale_ == o.scale_ && window_ == o.window_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    const mx::Shape& q = inputs[0].shape();
    return {q, {q[0], q[1], q[2]}};
  }

 private:
  float scale_;
  int64_t window_;
};

mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale, int64_t window) {
  if (q.ndim() != 4 || q.shape(3) < 1) refuse("attention", "queries of shape (B, H, S, E)", q);
  const bool fits = k.ndim() == 4 && k.shape(0) == q.shape(0) && k.shape(3) == q.shape(3) && k.shape(1) > 0 &&
                    q.shape(1) % k.shape(1) == 0 && k.shape(2) >= q.shape(2);
  if (!fits)
    refuse("attention", "keys (B, G, T, E) with G a divisor of H and T >= S for queries " + text_of(q.shape()), k);
  if (v.shape() != k.shape()) refuse("attention", "values of shape " + text_of(k.shape()), v);
  if (window < 0) throw std::invalid_argument("attention: wanted a window of 0 (none) or more tokens");
  dtype_of(q), dtype_of(k), dtype_of(v);
  const mx::Dtype dtype = mx::promote_types(q.dtype(), mx::promote_types(k.dtype(), v.dtype()));
  return mx::array::make_arrays({q.shape(), {q.shape(0), q.shape(1), q.shape(2)}}, {dtype, mx::float32},
                                std::make_shared<Attention>(cpu_stream(), scale, window), {q, k, v})[0];
}

// Applies RoPE to x (B, heads, tokens, E). The inputs are (x, cos, sin); token i uses row offset + i of the tables.
class Rotation : public NativePrimitive {
 public:
  Rotation(mx::Stream stream, int64_t offset, bool inverse)
      : NativePrimitive(stream, "native rope"), offset_(offset), inverse_(inverse) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const mx::array& x = inputs[0];
    const mlxeff_heads out = allocate_heads(outputs[0]);
    if (x.size() == 0) return;
    const mlxeff_heads in = heads(x);
    const int64_t B = x.shape(0), H = x.shape(1), S = x.shape(2), E = x.shape(3), half = inputs[1].shape(1);
    const float *cos = inputs[1].data<float>() + offset_ * half, *sin = inputs[2].data<float>() + offset_ * half;
    dispatch([=, inverse = int(inverse_)] {
      check(mlxeff_rope(&in, &out, B, H, S, E, 2 * half, cos, sin, inverse), "rope: ");
    });
  }
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>&) override {
    if (argnums.size() != 1 || argnums[0] != 0) refuse_to("be differentiated with respect to its table");
    auto back = std::make_shared<Rotation>(stream(), offset_, !inverse_);
    return {
        mx::array(primals[0].shape(), primals[0].dtype(), std::move(back), {cotangents[0], primals[1], primals[2]})};
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const Rotation&>(other);
    return offset_ == o.offset_ && inverse_ == o.inverse_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {inputs[0].shape()}; }

 private:
  int64_t offset_;
  bool inverse_;
};

mx::array rope(const mx::array& x, const mx::array& cos, const mx::array& sin, int64_t offset) {
  if (cos.ndim() != 2 || cos.dtype() != mx::float32 || sin.shape() != cos.shape() || sin.dtype() != cos.dtype())
    refuse("rope", "cos and sin, float32 (positions, half), as rope_table makes them", cos);
  const int64_t half = cos.shape(1);
  if (x.ndim() != 4 || x.shape(3) < 2 * half)
    refuse("rope", "x of shape (B, heads, tokens, " + std::to_string(2 * half) + " or more)", x);
  if (offset < 0 || offset + x.shape(2) > cos.shape(0))
    refuse("rope", "a table of " + std::to_string(offset + x.shape(2)) + " positions", cos);
  dtype_of(x);
  const mx::Stream stream = cpu_stream();
  return mx::array(x.shape(), x.dtype(), std::make_shared<Rotation>(stream, offset, false),
                   {x, mx::contiguous(cos, false, stream), mx::contiguous(sin, false, stream)});
}

// Computes the tables of cosines and sines eagerly, so that a caller can reuse them in later calls even if this call is
// part of a function transformation such as a gradient.
std::pair<mx::array, mx::array> rope_table(const std::vector<double>& inverse_frequencies, int positions,
                                           double scale) {
  const int half = int(inverse_frequencies.size());
  const size_t count = size_t(positions < 0 ? 0 : positions) * size_t(half);
  std::vector<float> cos(count), sin(count);
  check(mlxeff_rope_table(inverse_frequencies.data(), half, 0, positions, scale, cos.data(), sin.data()),
        "rope_table: ");
  const mx::Shape shape = {positions, half};
  return {mx::array(cos.begin(), shape, mx::float32), mx::array(sin.begin(), shape, mx::float32)};
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention", &attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("scale"), nb::arg("window"),
        "Causal attention, aligned at the end: q (B, H, S, E), k and v (B, G, T, E) -> (B, H, S, E); window 0: all "
        "keys.");
  m.def("rope", &rope, nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("offset"),
        "x (B, heads, tokens, E), pairs (j, j + half) turned by rows `offset`, `offset` + 1, ... of the table.");
  m.def("rope_table", &rope_table, nb::arg("inverse_frequencies"), nb::arg("positions"), nb::arg("scale"),
        "(cos, sin), (positions, half), times scale.");
}

}  // namespace mlxeff
