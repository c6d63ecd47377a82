// Checks of every C function without Python, for the sanitizers and for machines that are emulated: on every level,
// with heap buffers of exactly the needed size, against plain loops in double.
//   mlxeff_driver [nofork] [quick]
// quick: a fifth of the shapes, for emulators that are slow at vector instructions.
#include <chrono>
#include <cstring>

#include "attention.h"
#include "checks.h"
#include "cpu_count_checks.h"
#include "decoder_append.h"
#include "decoder_feed_forwards.h"
#include "decoder_passes.h"
#include "decoder_products.h"
#include "decoder_stores.h"
#include "dynamic.h"
#include "few_rows.h"
#include "plane_stores.h"
#include "pool_checks.h"
#include "products.h"
#include "rows.h"
#include "seedlm.h"
#include "sparse.h"

namespace {

void check_levels() {
  const std::string levels = mlxeff_isa_available(), best = mlxeff_isa();
  CHECK(levels.substr(0, 6) == "scalar" && levels.substr(levels.size() - best.size()) == best);
  CHECK(mlxeff_set_isa("no such level") == MLXEFF_UNSUPPORTED && mlxeff_isa() == best);
  for (int code = MLXEFF_OK; code <= MLXEFF_BUSY; ++code)
    CHECK(std::strcmp(mlxeff_error_string(code), "unknown code") != 0);
  CHECK(std::strcmp(mlxeff_error_string(-1), "unknown code") == 0);
}

void run(const char* name, void (*checks)()) {
  const auto start = std::chrono::steady_clock::now();
  checks();
  std::printf("%s: ok, %.1f s\n", name,
              std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  bool forks = true;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "nofork") == 0) forks = false;
    else if (std::strcmp(arguments[i], "quick") == 0) shape_step = 5;
    else return std::fprintf(stderr, "unknown argument %s\n", arguments[i]), 2;
  }
  std::printf("levels: %s\n", mlxeff_isa_available());
  run("levels", check_levels);
  run("CPU count", check_cpu_count);
  run("pool", check_pool);
  if (forks) run("fork", check_fork);
  run("products", check_products);
  run("few rows", check_few_rows);
  run("heads", check_heads);
  run("rows", check_rows);
  run("seedlm", check_seedlm);
  run("decoder products", check_decoder_products);
  run("decoder append", check_decoder_append);
  run("stores of keys and values", check_kv_stores);
  run("stores of 4-bit planes", check_plane_stores);
  run("feed-forwards", check_feed_forwards);
  run("dynamic feed-forwards", check_dynamic_feed_forwards);
  run("sparse feed-forward", check_sparse);
  run("decoder passes", check_decoder_pass);
}
