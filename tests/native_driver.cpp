// Stand-alone checks for the sanitizer builds: the pool, and both matmul families over awkward shapes on every level with
// heap buffers of exactly the needed size, compared with plain loops in double.
//   mlxeff_driver [nofork]
#include <cmath>
#include <cstring>
#include <string>

#include "mlxeff_cpu.h"
#include "pool_driver.h"

namespace {

unsigned random_state = 1;
float uniform() {
  random_state = random_state * 1664525u + 1013904223u;
  return float(random_state >> 8) / 8388608.0f - 1;
}

std::vector<float> random_values(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = uniform();
  return values;
}

void compare(const std::vector<float>& got, const std::vector<double>& want, double tolerance, const char* what) {
  for (size_t i = 0; i < got.size(); ++i)
    if (!(std::fabs(got[i] - want[i]) <= tolerance)) {
      std::fprintf(stderr, "%s (%s): element %zu is %g, want %g\n", what, mlxeff_isa(), i, got[i], want[i]);
      std::exit(1);
    }
}

void check_qmm(int bits, int group, int64_t M, int64_t N, int64_t K, int mode) {
  std::vector<uint32_t> packed(static_cast<size_t>(N * K * bits / 32), 0);
  std::vector<float> scales = random_values(N * K / group), biases = random_values(N * K / group), x = random_values(M * K);
  std::vector<double> w(static_cast<size_t>(N * K)), want(static_cast<size_t>(M * N), 0);
  for (float& scale : scales) scale = std::fabs(scale) / float(1 << bits);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; ++k) {
      const uint32_t q = uint32_t((uniform() + 1) * 0.5f * float(1 << bits)) & ((1u << bits) - 1);
      for (int b = 0; b < bits; ++b) {
        const int64_t at = k * bits + b;
        packed[size_t(n * K * bits / 32 + at / 32)] |= (q >> b & 1) << (at % 32);
      }
      const size_t g = size_t((n * K + k) / group);
      w[size_t(n * K + k)] = double(q) * double(scales[g]) + double(biases[g]);
    }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) want[size_t(m * N + n)] += double(x[size_t(m * K + k)]) * w[size_t(n * K + k)];
  const mlxeff_qweight weight = {packed.data(), scales.data(), biases.data(), N, K, bits, group, MLXEFF_F32};
  std::vector<float> y(static_cast<size_t>(M * N));
  CHECK(mlxeff_qmm(&weight, x.data(), K, MLXEFF_F32, y.data(), N, MLXEFF_F32, M, mode) == MLXEFF_OK);
  if (std::getenv("MLXEFF_DRIVER_VERBOSE")) std::fprintf(stderr, "bits %d group %d M %d N %d K %d mode %d\n", bits, group, int(M), int(N), int(K), mode);
  compare(y, want, (mode == MLXEFF_EXACT ? 1e-5 : 3e-2) * std::sqrt(double(K)), "qmm");
  std::vector<float> dense(static_cast<size_t>(N * K));
  CHECK(mlxeff_dequantize(&weight, dense.data(), K, MLXEFF_F32) == MLXEFF_OK);
  compare(dense, w, 1e-6, "dequantize");
}

void check_matmul(int64_t M, int64_t N, int64_t K, int mode) {
  const std::vector<float> x = random_values(M * K), w = random_values(N * K), dy = random_values(M * N);
  std::vector<double> y(size_t(M * N), 0), dx(size_t(M * K), 0), dw(size_t(N * K), 0);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) {
        y[size_t(m * N + n)] += double(x[size_t(m * K + k)]) * double(w[size_t(n * K + k)]);
        dx[size_t(m * K + k)] += double(dy[size_t(m * N + n)]) * double(w[size_t(n * K + k)]);
        dw[size_t(n * K + k)] += double(dy[size_t(m * N + n)]) * double(x[size_t(m * K + k)]);
      }
  const double tolerance = (mode == MLXEFF_EXACT ? 1e-5 : 3e-2) * std::sqrt(double(K + M + N));
  std::vector<float> got_y(y.size()), got_dx(dx.size()), got_dw(dw.size());
  CHECK(mlxeff_matmul(x.data(), K, 0, w.data(), K, 0, got_y.data(), N, 0, M, N, K, mode) == MLXEFF_OK);
  CHECK(mlxeff_matmul_dx(dy.data(), N, 0, w.data(), K, 0, got_dx.data(), K, 0, M, N, K, mode) == MLXEFF_OK);
  CHECK(mlxeff_matmul_dw(dy.data(), N, 0, x.data(), K, 0, got_dw.data(), K, 0, M, N, K, mode) == MLXEFF_OK);
  compare(got_y, y, tolerance, "matmul");
  compare(got_dx, dx, tolerance, "matmul_dx");
  compare(got_dw, dw, tolerance, "matmul_dw");
}

void check_kernels() {
  std::string levels = mlxeff_isa_available();
  for (size_t begin = 0, end; begin < levels.size(); begin = end + 1) {
    end = levels.find(' ', begin);
    if (end == std::string::npos) end = levels.size();
    CHECK(mlxeff_set_isa(levels.substr(begin, end - begin).c_str()) == MLXEFF_OK);
    for (int bits : {2, 3, 4, 5, 6, 8})
      for (int group : {32, 64, 128})
        for (int64_t M : {1, 2, 5, 13})
          for (int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_BF16, MLXEFF_COMPUTE_INT8}) check_qmm(bits, group, M, 2 + 7 * M, 3 * group, mode);
    for (int64_t M : {1, 3, 9, 33})
      for (int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_BF16}) {
        check_matmul(M, 1, 1, mode);
        check_matmul(M, 35, 67, mode);
        check_matmul(M, 70, 300, mode);
      }
  }
}

}  // namespace

int main(int count, char** arguments) {
  check_pool();
  if (count < 2 || std::strcmp(arguments[1], "nofork") != 0) check_fork();
  for (int threads : {1, 3}) {
    CHECK(mlxeff_set_num_threads(threads) == MLXEFF_OK);
    check_kernels();
  }
  std::printf("ok: %s\n", mlxeff_isa_available());
}
