// Checks of every C function without Python, for the sanitizers and for machines that are emulated: on every level, with
// heap buffers of exactly the needed size, against plain loops in double.
//   mlxeff_driver [nofork]
#include <cstring>

#include "checks.h"
#include "attention.h"
#include "cpu_count_checks.h"
#include "pool_checks.h"
#include "products.h"
#include "rows.h"

namespace {

void check_levels() {
  const std::string levels = mlxeff_isa_available(), best = mlxeff_isa();
  CHECK(levels.substr(0, 6) == "scalar" && levels.substr(levels.size() - best.size()) == best);
  CHECK(mlxeff_set_isa("no such level") == MLXEFF_UNSUPPORTED && mlxeff_isa() == best);
  for (int code = MLXEFF_OK; code <= MLXEFF_BUSY; ++code) CHECK(std::strcmp(mlxeff_error_string(code), "unknown code") != 0);
  CHECK(std::strcmp(mlxeff_error_string(-1), "unknown code") == 0);
}

}  // namespace

int main(int count, char** arguments) {
  check_levels();
  check_cpu_count();
  check_pool();
  if (count < 2 || std::strcmp(arguments[1], "nofork") != 0) check_fork();
  check_products();
  check_heads();
  check_rows();
  std::printf("ok: %s\n", mlxeff_isa_available());
}
