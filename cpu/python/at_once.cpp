#include "python/at_once.h"

namespace mlxeff {

void evaluate(const std::vector<mx::array>& arrays) {
  std::vector<mx::array> pending;
  for (const mx::array& array : arrays) {
    if (array.is_tracer())
      throw std::invalid_argument(
          "native decoder: has no gradient; call model.train() first, which computes operator by operator");
    if (!array.is_available()) pending.push_back(array);
  }
  if (pending.empty()) return;
  const nb::gil_scoped_release unlocked;
  mx::eval(pending);
  for (mx::array& array : pending) array.wait();
}

mx::array in_memory(const mx::array& given) {
  evaluate({given});
  if (given.flags().row_contiguous) return given;
  const mx::array copy = mx::contiguous(given, false, cpu_stream());
  evaluate({copy});
  return copy;
}

mx::array new_array(mx::Shape shape, mx::Dtype dtype) {
  size_t count = 1;
  for (const int size : shape) count *= size_t(size);
  return mx::array(mx::allocator::malloc(count * size_of(dtype)), std::move(shape), dtype);
}

}  // namespace mlxeff
