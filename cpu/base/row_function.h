// RowFunction: a non-owning reference to a callable that processes one row. Virtual functions take it as a parameter,
// since they cannot be templates over the callable's type.
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
