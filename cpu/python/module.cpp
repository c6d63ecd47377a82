// The Python module mlxeff._native: the native kernels as MLX primitives, and the native decoder, whose calls compute
// at once (decoder_passes.cpp). Only this folder of cpu/ depends on MLX and Python.
//
// A primitive submits its work to the stream's command encoder as a task with raw pointers; MLX keeps inputs and
// outputs alive until the task is done. Graphs therefore stay lazy, and the operators compose with mx.eval,
// mx.async_eval and streams.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>

#include "base/step_times.h"
#include "mlx/version.h"
#include "python/decoder_model.h"
#include "python/feed_forwards.h"
#include "python/kv_stores.h"
#include "python/mlx_seedlm.h"
#include "python/next_token.h"

namespace nb = nanobind;
namespace mx = mlx::core;

// A copy of an array that begins at a cache line, so that lines of 64 bytes hold whole tiles of a matrix. MLX's own
// arrays begin anywhere on a CPU.
static bool holds(const nb::list& entries) {
  for (const nb::handle entry : entries) {
    PyObject* const three = entry.ptr();
    const bool fits = PyTuple_Check(three) && PyTuple_Size(three) == 3 && PyDict_Check(PyTuple_GetItem(three, 0));
    if (!fits) throw nb::type_error("wanted tuples (dict, key, value)");
    PyObject* const found = PyDict_GetItemWithError(PyTuple_GetItem(three, 0), PyTuple_GetItem(three, 1));
    if (!found && PyErr_Occurred()) throw nb::python_error();
    if (found != PyTuple_GetItem(three, 2)) return false;
  }
  return true;
}

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
  m.def("holds", &holds, nb::arg("entries"),
        "Whether each of the entries (dict, key, value) finds this very object under its key.");
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
  m.def("note_step_times", &mlxeff::note_step_times, nb::arg("most"),
        "Begins to note when each thread worked and waited, at most `most` steps of threads; 0 ends it. Must not run "
        "beside "
        "kernels.");
  m.def(
      "step_times",
      [] {
        std::vector<std::tuple<uint32_t, uint32_t, int32_t, int64_t, int64_t, int64_t>> found;
        for (const auto& t : mlxeff::step_times())
          found.emplace_back(t.region, t.step, t.thread, t.begin, t.worked, t.end);
        return found;
      },
      "(Region, step, thread, when it came, had no more work (0: found none) and went on, in ns) of what was noted.");
  mlxeff::bind_seedlm(m);
  mlxeff::bind_decoder(m);
  mlxeff::bind_passes(m);
  mlxeff::bind_next_token(m);
  mlxeff::bind_ops(m);
}
