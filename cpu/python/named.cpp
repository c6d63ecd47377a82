#include "python/named.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>

#include "python/at_once.h"

namespace mlxeff {
namespace {

std::string type_of(nb::handle value) { return nb::cast<std::string>(nb::str(value.type().attr("__name__"))); }

bool contains(const std::vector<const char*>& names, const std::string& name) {
  return std::any_of(names.begin(), names.end(), [&](const char* each) { return name == each; });
}

void add_name(std::string& list, const std::string& name) { list += (list.empty() ? "" : ", ") + name; }

}  // namespace

Named::Named(nb::handle given, std::string where) : where_(std::move(where)) {
  if (!nb::isinstance<nb::dict>(given)) refuse("wanted a dict, got " + type_of(given));
  given_ = nb::borrow<nb::dict>(given);
}

void Named::expect(const std::vector<const char*>& required, const std::vector<const char*>& optional) const {
  std::string missing, unknown;
  size_t found = has_kind_ ? 1 : 0;
  for (const char* name : required) {
    if (find(name)) ++found;
    else add_name(missing, name);
  }
  for (const char* name : optional)
    if (find(name)) ++found;
  if (found != nb::len(given_))
    for (const auto [key, value] : given_) {
      const std::string name = nb::cast<std::string>(nb::str(key));
      if (!(has_kind_ && name == "kind") && !contains(required, name) && !contains(optional, name))
        add_name(unknown, name);
    }
  std::string what;
  if (!missing.empty()) what += "missing " + missing;
  if (!unknown.empty()) what += (what.empty() ? "unknown " : "; unknown ") + unknown;
  if (!what.empty()) refuse(what);
}

bool Named::has(const char* name) const {
  const nb::handle value = find(name);
  return value && !value.is_none();
}

const mx::array& Named::array(const char* name) const {
  const nb::handle value = get(name);
  if (!nb::isinstance<mx::array>(value)) refuse_value(name, "an mlx array", value);
  return nb::cast<const mx::array&>(value);
}

const mx::array& Named::array(const char* name, const mx::Shape& shape) const {
  const mx::array& value = array(name);
  if (value.shape() != shape || !mx::issubdtype(value.dtype(), mx::floating))
    mlxeff::refuse((where_ + ": " + name).c_str(), "floats of shape " + text_of(shape), value);
  return value;
}

const mx::array& Named::writable(const char* name) {
  const nb::handle value = get(name);
  const mx::array& given = nb::cast<const mx::array&>(value);
  if (Py_REFCNT(value.ptr()) <= 2 && given.is_donatable() && given.flags().row_contiguous) return given;
  mx::array source = in_memory(given), copy = new_array(given.shape(), given.dtype());
  memcpy(copy.data<void>(), source.data<void>(), given.nbytes());
  given_[name] = nb::cast(copy);
  return array(name);
}

std::optional<mx::array> Named::array_or_none(const char* name) const {
  return has(name) ? std::optional<mx::array>(array(name)) : std::nullopt;
}

std::optional<mx::array> Named::array_or_none(const char* name, const mx::Shape& shape) const {
  return has(name) ? std::optional<mx::array>(array(name, shape)) : std::nullopt;
}

int64_t Named::integer(const char* name) const {
  int64_t result;
  const nb::handle value = get(name);
  if (!nb::try_cast(value, result)) refuse_value(name, "an integer", value);
  return result;
}

double Named::number(const char* name) const {
  double result;
  const nb::handle value = get(name);
  if (!nb::try_cast(value, result)) refuse_value(name, "a number", value);
  return result;
}

Named Named::dict(const char* name) const { return Named(get(name), where_ + ": " + name); }

std::vector<Named> Named::dicts(const char* name) const {
  const nb::handle value = get(name);
  if (!nb::isinstance<nb::list>(value)) refuse_value(name, "a list", value);
  std::vector<Named> each;
  for (const nb::handle given : nb::borrow<nb::list>(value))
    each.emplace_back(given, where_ + ": " + name + " " + std::to_string(each.size()));
  return each;
}

std::string Named::text(const char* name) const {
  const nb::handle value = get(name);
  if (!nb::isinstance<nb::str>(value)) refuse_value(name, "a str", value);
  return nb::cast<std::string>(value);
}

std::string Named::read_kind() {
  has_kind_ = true;
  return text("kind");
}

nb::handle Named::find(const char* name) const {
  const nb::handle value = PyDict_GetItemString(given_.ptr(), name);
  return value;
}

nb::handle Named::get(const char* name) const {
  const nb::handle value = find(name);
  if (!value) refuse(std::string("missing ") + name);
  return value;
}

void Named::refuse(const std::string& what) const { throw std::invalid_argument(where_ + ": " + what); }

void Named::refuse_value(const char* name, const std::string& wanted, nb::handle got) const {
  refuse(std::string(name) + ": wanted " + wanted + ", got " + type_of(got));
}

}  // namespace mlxeff
