// PassTeam: one member of the thread team that executes a pass, with the matrix products that the team computes
// together.
#pragma once
#include <atomic>
#include <initializer_list>

#include "base/pool.h"
#include "base/row_function.h"
#include "base/run_options.h"
#include "products/product.h"

namespace mlxeff {

// A linear layer y = x W^T + bias; bias (N) is fp32 or null. The matrix product leaves the bias out, and its caller
// adds it.
struct Linear {
  WeightMatrix weight = {};
  const float* bias = nullptr;
};

// One output of PassTeam::multiply: y = x W^T, fp32 (rows, N), for the weight W of `linear`.
struct Output {
  const Linear* linear;
  float* y;
};

// Bytes of the buffer for an input of `rows` rows, converted to each of the layouts that its products with `linears`
// read.
int64_t prepared_bytes(std::initializer_list<const Linear*> linears, int64_t rows, const RunOptions& options);

class PassTeam {
 public:
  static constexpr int most_products = 3;  // the most outputs of one multiply

  // `prepared` is a buffer as large as the largest prepared_bytes of any multiply; `error` receives the code of a step
  // that fails.
  PassTeam(Team& team, const RunOptions& options, char* prepared, std::atomic<int>& error)
      : team(team), options(options), prepared_(prepared), error_(error) {}

  Team& team;
  const RunOptions& options;

  // Runs two steps: first make_row(r) writes row r of x (rows, K), for each row; then outputs[i].y = x W_i^T is
  // computed for at most most_products outputs, without biases. If `outputs` is empty, only the rows of x are made.
  void multiply(const float* x, std::initializer_list<Output> outputs, int64_t rows, RowFunction<void> make_row);

  // The buffer for prepared inputs, for a feed-forward that takes the steps of its products itself.
  char* prepared() const { return prepared_; }

  void check(int code) {  // records the MLXEFF_* code of a step if the step failed
    if (code != MLXEFF_OK) error_ = code;
  }

 private:
  char* prepared_;
  std::atomic<int>& error_;
};

}  // namespace mlxeff
