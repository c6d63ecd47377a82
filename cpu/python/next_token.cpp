// The step from logits to the next token. It is computed at once, on the thread that calls it: as three operators of
// MLX's graph it takes several times as long as the arithmetic.
#include "python/next_token.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <optional>

#include "python/at_once.h"

namespace mlxeff {
namespace {

std::tuple<mx::array, mx::array, mx::array> next_token(const mx::array& given, float temp, int64_t top_k, float top_p,
                                                       float min_p, const std::optional<mx::array>& u) {
  if (given.ndim() != 2 || given.shape(1) < 1) refuse("next_token", "logits of shape (B, V)", given);
  if (u && (u->shape() != mx::Shape{given.shape(0)} || u->dtype() != mx::float32))
    refuse("next_token", "u in [0, 1), float32 (B)", *u);
  if (!u && temp > 0) throw std::invalid_argument("next_token: wanted u for a temperature above 0");
  const int dtype = dtype_of(given);
  const mx::array logits = in_memory(given);
  const std::optional<mx::array> draws = u ? std::optional(in_memory(*u)) : u;
  const int64_t rows = logits.shape(0), n = logits.shape(1);
  mx::array tokens = new_array({int(rows)}, mx::uint32), own = new_array({int(rows)}, logits.dtype());
  mx::array logprobs = new_array(logits.shape(), logits.dtype());
  const nb::gil_scoped_release unlocked;
  const size_t size = logits.itemsize();
  check(mlxeff_log_softmax(logits.data<char>(), n, dtype, logprobs.data<char>(), n, dtype, rows, n), "log_softmax: ");
  for (int64_t row = 0; row < rows; ++row) {
    const char* const from = logprobs.data<char>() + size_t(row * n) * size;
    int32_t* const token = tokens.data<int32_t>() + row;
    check(mlxeff_sample(from, dtype, n, temp, top_k, top_p, min_p, draws ? double(draws->data<float>()[row]) : 0.0,
                        token),
          "sample: ", "wanted logits without NaN and +inf, one above -inf");
    memcpy(own.data<char>() + size_t(row) * size, from + size_t(*token) * size, size);
  }
  return {tokens, logprobs, own};
}

}  // namespace

void bind_next_token(nb::module_& m) {
  m.def("next_token", &next_token, nb::arg("logits"), nb::arg("temp"), nb::arg("top_k"), nb::arg("top_p"),
        nb::arg("min_p"), nb::arg("u") = nb::none(),
        "logits (B, V) -> (tokens, uint32 (B,); log-probabilities (B, V); those of the tokens (B,)). Samples as "
        "`sample` does, with u in [0, 1) (B,), which a temperature of 0 does not need. Computes at once.");
}

}  // namespace mlxeff
