// A Python dict at the boundary: every value is asked for by its name, and what does not fit is a ValueError of one
// line that says where and what ("decoder: head: missing scales; unknown scale").
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "python/mlx_ops.h"

namespace mlxeff {

class Named {
 public:
  // `where` begins every error; `given` must be a dict.
  Named(nb::handle given, std::string where);

  // Refuses a dict that lacks one of `required`, or has a name that is in neither list and is not "kind" where that was
  // read. To be called before the values are read.
  void expect(const std::vector<const char*>& required, const std::vector<const char*>& optional = {}) const;

  bool has(const char* name) const;
  // Values by name, of names that `expect` found.
  const mx::array& array(const char* name) const;
  int64_t integer(const char* name) const;
  double number(const char* name) const;
  Named dict(const char* name) const;
  // An array, or nothing for None and for a name that is not there.
  std::optional<mx::array> array_or_none(const char* name) const;
  // An array of this shape and a floating type.
  const mx::array& array(const char* name, const mx::Shape& shape) const;
  std::optional<mx::array> array_or_none(const char* name, const mx::Shape& shape) const;

  // The element of `kinds`, pointers to things with a `name`, that the value of "kind" names.
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
  nb::handle find(const char* name) const;  // null where it is not there
  nb::handle get(const char* name) const;
  std::string read_kind();
  [[noreturn]] void refuse_value(const char* name, const std::string& wanted, nb::handle got) const;

  nb::dict given_;
  std::string where_;
  bool has_kind_ = false;
};

}  // namespace mlxeff
