// One member of the team that runs a pass, and the matrix products that the team does together.
#pragma once
#include <atomic>
#include <initializer_list>

#include "base/pool.h"
#include "base/row_function.h"
#include "base/run_options.h"
#include "products/product.h"

namespace mlxeff {

// y = x W^T + bias; bias (N) is fp32 or null. Who uses the product adds the bias.
struct Linear {
  WeightMatrix weight = {};
  const float* bias = nullptr;
};

// y (rows, N) fp32 = x W^T.
struct Output {
  const Linear* linear;
  float* y;
};

// Bytes for one x of `rows` rows in the forms that its products with `linears` read.
int64_t prepared_bytes(std::initializer_list<const Linear*> linears, int64_t rows, const RunOptions& options);

class PassTeam {
 public:
  static constexpr int most_products = 3;  // that read the same input

  // `prepared` has the prepared_bytes of every multiply; `error` takes the code of a step that fails.
  PassTeam(Team& team, const RunOptions& options, char* prepared, std::atomic<int>& error)
      : team(team), options(options), prepared_(prepared), error_(error) {}

  Team& team;
  const RunOptions& options;

  // Two steps: make_row(r) writes row r of x (rows, K), for each row; then outputs[i].y = x W_i^T, at most
  // most_products of them, without their biases. With no outputs only the rows are made.
  void multiply(const float* x, std::initializer_list<Output> outputs, int64_t rows, RowFunction<void> make_row);

  void check(int code) {
    if (code != MLXEFF_OK) error_ = code;
  }

 private:
  char* prepared_;
  std::atomic<int>& error_;
};

}  // namespace mlxeff
