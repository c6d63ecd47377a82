// The Python module mlxeff._native: the native kernels as MLX primitives. Only this folder of cpu/ depends on MLX and
// Python.
//
// A primitive submits its work to the stream's command encoder as a task with raw pointers; MLX keeps inputs and
// outputs alive until the task is done. Graphs therefore stay lazy, and the operators compose with mx.eval,
// mx.async_eval and streams.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "mlx/version.h"
#include "python/decoder_model.h"
#include "python/feed_forwards.h"
#include "python/kv_stores.h"
#include "python/mlx_seedlm.h"

namespace nb = nanobind;
namespace mx = mlx::core;

// A copy of an array that begins at a cache line, so that lines of 64 bytes hold whole tiles of a matrix. MLX's own
// arrays begin anywhere on a CPU.
static mx::array aligned(mx::array given) {
  given = mx::contiguous(given);
  mx::array bytes = mx::zeros({int(given.nbytes()) + 64}, mx::uint8);
  mx::eval(given, bytes);
  const int first = int((64 - reinterpret_cast<uintptr_t>(bytes.data<uint8_t>()) % 64) % 64);
  std::memcpy(bytes.data<uint8_t>() + first, given.data<char>(), given.nbytes());
  const mx::array part = mx::slice(bytes, {first}, {first + int(given.nbytes())});
  mx::array made = mx::reshape(mx::view(part, given.dtype()), given.shape());
  mx::eval(made);
  return made;
}

NB_MODULE(_native, m) {
  using mlxeff::check;
  m.attr("mlx_version") = std::to_string(MLX_VERSION_MAJOR) + "." + std::to_string(MLX_VERSION_MINOR) + "." +
                          std::to_string(MLX_VERSION_PATCH);
  m.def("aligned", &aligned, nb::arg("array"), "A copy of an array that begins at a cache line.");
  m.def("accepts", [](const mx::array&) {}, "Fails where arrays of this MLX are unknown here.");
  m.attr("EXACT") = int(MLXEFF_EXACT);
  m.attr("COMPUTE_BF16") = int(MLXEFF_COMPUTE_BF16);
  m.attr("COMPUTE_INT8") = int(MLXEFF_COMPUTE_INT8);
  m.attr("store_kinds") = mlxeff::store_kinds();
  m.attr("feed_forward_kinds") = mlxeff::feed_forward_kinds();
  m.def("isa", [] { return std::string(mlxeff_isa()); }, "Name of the instruction-set level in use.");
  m.def(
      "isa_available", [] { return std::string(mlxeff_isa_available()); },
      "Names of the levels usable here, lowest first.");
  m.def(
      "set_isa", [](std::optional<std::string> name) { check(mlxeff_set_isa(name ? name->c_str() : nullptr)); },
      nb::arg("name").none());
  m.def("num_threads", [] { return mlxeff_num_threads(); });
  m.def("set_num_threads", [](int n) { check(mlxeff_set_num_threads(n)); }, "0 restores the default.");
  mlxeff::bind_seedlm(m);
  mlxeff::bind_decoder(m);
  mlxeff::bind_passes(m);
  mlxeff::bind_ops(m);
}
