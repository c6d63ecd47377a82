// Named: a checked view of a Python dict of arguments. Values are read by name. A missing, unknown or unsuitable value
// raises a ValueError whose one line states the place and the fault ("decoder: head: missing scales; unknown scale").
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "python/mlx_ops.h"

namespace mlxeff {

class Named {
 public:
  // `given` must be a dict. `where` is the prefix of every error message.
  Named(nb::handle given, std::string where);

  // Throws if the dict lacks a name of `required` or has a name that is in neither list; "kind" is allowed if kind()
  // was called. Must be called before the values are read.
  void expect(const std::vector<const char*>& required, const std::vector<const char*>& optional = {}) const;

  bool has(const char* name) const;
  // Return the value of a name whose presence `expect` has checked.
  const mx::array& array(const char* name) const;
  int64_t integer(const char* name) const;
  double number(const char* name) const;
  Named dict(const char* name) const;
  std::vector<Named> dicts(const char* name) const;  // of a list
  std::string text(const char* name) const;
  // Returns the array, or an empty optional if the value is None or the name is absent.
  std::optional<mx::array> array_or_none(const char* name) const;
  // Returns the array, which must be evaluated, with memory that may be written. Where something else refers to the
  // array or its memory than the dict and one owner, a copy takes its place in the dict.
  const mx::array& writable(const char* name);
  // The same as `array` and `array_or_none`, checking that the array has the given shape and a floating-point type.
  const mx::array& array(const char* name, const mx::Shape& shape) const;
  std::optional<mx::array> array_or_none(const char* name, const mx::Shape& shape) const;

  // Returns the element of `kinds` whose `name` equals the value of "kind". `kinds` is a sequence of pointers.
  template <class Kinds>
  auto kind(const Kinds& kinds) {
    const std::string name = read_kind();
    std::string known;
    for (const auto* kind : kinds) {
      if (name == kind->name) return kind;
      known += (known.empty() ? "" : ", ") + std::string(kind->name);
    }
    refuse("unknown kind '" + name + "', known are " + known);
  }

  [[noreturn]] void refuse(const std::string& what) const;

 private:
  nb::handle find(const char* name) const;  // null if the name is absent
  nb::handle get(const char* name) const;
  std::string read_kind();
  [[noreturn]] void refuse_value(const char* name, const std::string& wanted, nb::handle got) const;

  nb::dict given_;
  std::string where_;
  bool has_kind_ = false;
};

}  // namespace mlxeff
