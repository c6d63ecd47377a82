#include "products/blas_product.h"

#include "base/pool.h"

#if defined(MLXEFF_BLAS) && defined(__APPLE__)
#define ACCELERATE_NEW_LAPACK
#include <Accelerate/Accelerate.h>
#elif defined(MLXEFF_BLAS)
extern "C" void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha,
                            const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc);
enum { CblasRowMajor = 101, CblasNoTrans = 111, CblasTrans = 112 };
#endif

namespace mlxeff {

#if defined(MLXEFF_BLAS)
namespace {

constexpr int64_t least_rows = 32;
constexpr int64_t block_floats = 1 << 20;  // most floats of W in the block of one thread
constexpr int64_t widest_block = 256;  // rows of W: enough work for each packing of x, enough blocks for the threads

// While an object of this class exists, Accelerate computes calls from this thread on this thread alone, and starts no
// threads of its own beside those of the pool. It has an effect on macOS 15 or newer.
class OneThread {
 public:
#if defined(__APPLE__) && __MAC_OS_X_VERSION_MAX_ALLOWED >= 150000
  OneThread() {
    if (__builtin_available(macOS 15.0, *)) {
      before_ = BLASGetThreading();
      BLASSetThreading(BLAS_THREADING_SINGLE_THREADED);
    }
  }
  ~OneThread() {
    if (__builtin_available(macOS 15.0, *)) BLASSetThreading(before_);
  }

 private:
  BLAS_THREADING before_ = BLAS_THREADING_MULTI_THREADED;
#else
  OneThread() {}
  ~OneThread() {}
#endif
};

size_t workspace_bytes(const BlasArgs&) { return 0; }
void bind(BlasArgs&, void*) {}
void prepare(const BlasArgs&, int64_t, int64_t) {}

int64_t piece(const BlasArgs& args, int) { return max_of(16, min_of(widest_block, block_floats / args.w.K / 16 * 16)); }

int run(const BlasArgs& args, int64_t n_begin, int64_t n_end) {
  const WeightMatrix& w = args.w;
  const float* block;
  int64_t ld = w.K;
  if (w.kind() == WeightMatrix::Kind::dense && w.dtype == MLXEFF_F32) {
    block = static_cast<const float*>(w.dense) + n_begin * w.ld;
    ld = w.ld;
  } else {
    float* const rows = static_cast<float*>(scratch(Scratch::panel, size_t((n_end - n_begin) * w.K) * 4));
    if (!rows) return MLXEFF_NO_MEMORY;
    for (int64_t n = n_begin; n < n_end; ++n) read_row(w, n, rows + (n - n_begin) * w.K);
    block = rows;
  }
  const OneThread one_thread;
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, int(args.M), int(n_end - n_begin), int(w.K), 1, args.x,
              int(args.ldx), block, int(ld), args.accumulate ? 1 : 0, args.y + n_begin, int(args.ldy));
  return MLXEFF_OK;
}

}  // namespace

const ProductKernels<BlasArgs>* blas_kernels(int64_t M) {
  static const ProductKernels<BlasArgs> table = {workspace_bytes, bind, prepare, piece, run};
  return M >= least_rows ? &table : nullptr;
}
#else
const ProductKernels<BlasArgs>* blas_kernels(int64_t) { return nullptr; }
#endif

}  // namespace mlxeff
