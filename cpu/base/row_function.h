// A reference to a callable that does something for one row: what a virtual call takes where a template would take the
// callable itself.
#pragma once
#include <stdint.h>

namespace mlxeff {

template <class Result>
class RowFunction {
 public:
  // `callable(row)` must outlive this reference.
  template <class Callable>
  RowFunction(const Callable* callable)
      : callable_(callable),
        call_([](const void* it, int64_t row) -> Result { return (*static_cast<const Callable*>(it))(row); }) {}

  Result operator()(int64_t row) const { return call_(callable_, row); }

 private:
  const void* callable_;
  Result (*call_)(const void* callable, int64_t row);
};

}  // namespace mlxeff
