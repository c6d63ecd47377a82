// DynaMoE (arXiv 2502.12325): a gated feed-forward layer, down (silu(gate x) up x), of which each token uses the first
// k of the F hidden neurons. Nested experts have widths k that rise, the last one's is F; a router picks one for each
// token. The number of the picked expert stays in device memory: `gate_up` and `down` read it there, so that the host
// never waits for the router. The grids are those of the widest expert, and simdgroups without work return at once.
//
// A simdgroup computes R rows of a matrix for all tokens: a row's weights are read once. Its lanes take neighbouring
// chunks of 8 columns, which fall into few cache lines, and add their sums by simd_sum. Sums are float32. A token has
// the same bits alone and among others: it adds the same products in the same order whatever N, the number of tokens
// that a kernel has room for, and R are. A product is added to another number only by fma, so that no compiler can
// fuse them differently in two instances of a template.
//
// The types of input pointers are template parameters, because MLX passes arrays of fewer than 8 elements in the
// constant address space and others in device memory.
//
// Cost, of a token whose expert has k neurons of D channels: the bytes of 3 k D weights instead of 3 F D, and of the
// router's R D, in three launches. Several tokens read the rows of gate and up below their largest width once, and the
// down matrix of each expert that one of them uses once. A simdgroup has the loads of 8 rows (gate and up) or 4 (down)
// in flight for one token, of half as many for several, and reads x for them from the cache. A weight of 4 or 8 bits
// takes some 3 instructions to unpack, and one more for each token. Never measured.

using namespace metal;

constant constexpr const uint chunk = 8;              // columns that a lane takes together
constant constexpr const uint simdgroups = 4;         // of a threadgroup, but for the router's
constant constexpr const uint router_simdgroups = 8;  // of a threadgroup of the router

// 8 columns of a row: a weight is scale value + bias.
struct Chunk {
  float values[chunk];
  float scale, bias;
};

// A matrix in float16, bfloat16 or float32.
template <typename Weights>
struct Dense {
  Weights weights;
  uint columns;

  // The columns from `column` on; zeros in place of those from `end` on, which are not read.
  Chunk load(uint row, uint column, uint end) const {
    Chunk loaded;
    ulong at = ulong(row) * columns + column;
    if (column + chunk <= end) {
#pragma unroll
      for (uint i = 0; i < chunk; i++) loaded.values[i] = float(weights[at + i]);
    } else {
#pragma unroll
      for (uint i = 0; i < chunk; i++) loaded.values[i] = column + i < end ? float(weights[at + i]) : 0.0f;
    }
    loaded.scale = 1;
    loaded.bias = 0;
    return loaded;
  }

  // sum + the products with the first `count` of 8 numbers, whose sum is `total`.
  static float add(thread const Chunk& loaded, thread const float* x, float total, uint count, float sum) {
    if (count >= chunk) {
#pragma unroll
      for (uint i = 0; i < chunk; i++) sum = fma(loaded.values[i], x[i], sum);
    } else {  // a weight after the last column may be one that only another token uses, and not finite
#pragma unroll
      for (uint i = 0; i < chunk; i++) sum = i < count ? fma(loaded.values[i], x[i], sum) : sum;
    }
    return sum;
  }
};

// A matrix in MLX's affine quantisation: `bits`, 4 or 8, for a code, the first one in a word's lowest bits; a weight is
// scale code + bias, with a scale and a bias for each `group` columns.
template <int bits, int group, typename Words, typename Scales>
struct Affine {
  Words words;
  Scales scales;
  Scales biases;
  uint columns;

  // The columns from `column` on. All 8 are there, since `columns` is a multiple of `group`.
  Chunk load(uint row, uint column, uint end) const {
    Chunk loaded;
    ulong first = (ulong(row) * columns + column) / (32 / bits), at = ulong(row) * (columns / group) + column / group;
#pragma unroll
    for (uint i = 0; i < chunk; i++) {
      // Codes are taken from half words. Where it lies, at bit `shift`, a code is the mantissa of a float from
      // 2^(23 - shift) on, which is 2^(23 - shift) + code: it needs no shift and no conversion of its own.
      uint half_word = i * bits / 16, shift = i * bits % 16;
      uint word = words[first + half_word / 2] >> half_word % 2 * 16;
      uint code = (word & ((1u << bits) - 1) << shift) | (150 - shift) << 23;
      loaded.values[i] = as_type<float>(code) - as_type<float>((150 - shift) << 23);
    }
    loaded.scale = float(scales[at]);
    loaded.bias = float(biases[at]);
    return loaded;
  }

  // sum + the products with 8 numbers, whose sum is `total`; those from `count` on are zeros.
  static float add(thread const Chunk& loaded, thread const float* x, float total, uint count, float sum) {
    float part = 0;
#pragma unroll
    for (uint i = 0; i < chunk; i++) part = fma(loaded.values[i], x[i], part);
    return fma(loaded.scale, part, fma(loaded.bias, total, sum));
  }
};

// The bias of a layer that has none.
struct Zeros {
  float operator[](uint row) const { return 0; }
};

// The columns of the widest expert's down matrix where they are in the order of the neurons.
struct SameOrder {
  uint operator[](uint neuron) const { return neuron; }
};

// The experts of the tokens. A number beyond the last expert counts as the last one's.
template <typename Chosen, typename Widths>
struct Experts {
  Chosen chosen;  // of each token: the number of its expert
  Widths widths;  // of each expert: how many neurons it has
  uint tokens, count, neurons;

  uint expert(uint token) const { return min(uint(chosen[token]), count - 1); }
  uint width(uint token) const { return min(uint(widths[expert(token)]), neurons); }
};

// Adds the products of N tokens with R rows of M matrices of one shape, from row `first` on, to a lane's sums. The
// token t uses the columns before ends[t]. In place of rows beyond `last` that row is read. The lane takes the chunks
// at the columns `column`, `column` + `step`, … x: (tokens, stride).
template <int N, int M, int R, typename Weights, typename Vectors>
inline void add_products(thread const Weights (&matrices)[M], Vectors x, uint stride, thread const uint* ends,
                         uint first, uint last, uint column, uint step, thread float (&sums)[N][M][R]) {
  uint end = 0;
#pragma unroll
  for (int t = 0; t < N; t++) end = max(end, ends[t]);
  for (; column < end; column += step) {
    Chunk loaded[M][R];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < R; r++) loaded[m][r] = matrices[m].load(min(first + r, last), column, end);
#pragma unroll
    for (int t = 0; t < N; t++) {
      if (column >= ends[t]) continue;
      uint count = ends[t] - column;
      float values[chunk], total = 0;
      if (count >= chunk) {
#pragma unroll
        for (uint i = 0; i < chunk; i++) values[i] = float(x[t * stride + column + i]);
      } else {
#pragma unroll
        for (uint i = 0; i < chunk; i++) values[i] = i < count ? float(x[t * stride + column + i]) : 0.0f;
      }
#pragma unroll
      for (uint i = 0; i < chunk; i++) total += values[i];
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < R; r++) sums[t][m][r] = Weights::add(loaded[m][r], values, total, count, sums[t][m][r]);
    }
  }
}

// ---- The router --------------------------------------------------------------------------------------------------

// Of R + 1 experts the one that costs least: a smaller one its predicted loss, exp(score), and dial times its price,
// the widest one dial times its price. The wider one where costs are the same, the widest one where a score is NaN.
template <int R, typename Prices>
inline uint cheapest(thread const float* scores, Prices prices, float dial) {
  uint best = R;
  float least = dial * prices[R];
  bool known = true;
#pragma unroll
  for (int e = R - 1; e >= 0; e--) {
    float cost = fma(dial, prices[e], exp(scores[e]));
    known = known && scores[e] == scores[e];
    if (cost < least) {
      least = cost;
      best = e;
    }
  }
  return known ? best : R;
}

// The first of R experts for which the sum of the wider experts' probabilities is at most `dial`; the widest one where
// a score is NaN, since all probabilities are NaN then.
template <int R>
inline uint least_tail(thread const float* scores, float dial) {
  float powers[R], largest = scores[0], total = 0, tail = 0;
#pragma unroll
  for (int e = 1; e < R; e++) largest = max(largest, scores[e]);
#pragma unroll
  for (int e = 0; e < R; e++) {
    powers[e] = exp(scores[e] - largest);
    total += powers[e];
  }
  uint found = R - 1;
#pragma unroll
  for (int e = R - 1; e > 0; e--) {
    tail += powers[e] / total;
    if (tail <= dial) found = e - 1;
  }
  return found;
}

// The R scores of a token, in the thread 0 alone. A threadgroup has 256 threads. weights: (R, columns), memory: 8 R.
template <int R, typename Vectors, typename Weights, typename Biases>
inline void router_scores(Vectors x, Weights weights, Biases biases, uint token, uint columns,
                          threadgroup float* memory, uint simdgroup, uint lane, thread float* scores) {
  const Dense<Weights> matrices[1] = {Dense<Weights>{weights, columns}};
  const uint ends[1] = {columns};
  float sums[1][1][R] = {{{0}}};
  add_products<1, 1, R>(matrices, x + token * columns, columns, ends, 0, R - 1, (simdgroup * 32 + lane) * chunk,
                        router_simdgroups * 32 * chunk, sums);
#pragma unroll
  for (int r = 0; r < R; r++) {
    float sum = simd_sum(sums[0][0][r]);
    if (lane == 0) memory[simdgroup * R + r] = sum;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup != 0 || lane != 0) return;
#pragma unroll
  for (int r = 0; r < R; r++) {
    float sum = 0;
    for (uint i = 0; i < router_simdgroups; i++) sum += memory[i * R + r];
    scores[r] = sum + float(biases[r]);
  }
}

// ---- The feed-forward layer --------------------------------------------------------------------------------------

// out (tokens, neurons) = silu(gate x + gate_bias) (up x + up_bias), in each token's row the first numbers, as many as
// its expert is wide. The others are not written, and weights beyond the largest width not read. Of a token of the
// widest expert the number of neuron n is written at order[n]. A threadgroup has 128 threads, its simdgroups compute R
// rows each. x: (tokens, columns).
template <int N, int R, typename Weights, typename GateBias, typename UpBias, typename Order, typename Vectors,
          typename Picked, typename T>
inline void gate_up(Weights gate, Weights up, GateBias gate_bias, UpBias up_bias, Order order, Vectors x, uint columns,
                    Picked experts, device T* out, uint group, uint simdgroup, uint lane) {
  uint first = (group * simdgroups + simdgroup) * R, ends[N], widest = 0;
#pragma unroll
  for (uint t = 0; t < N; t++) {
    uint width = t < experts.tokens ? experts.width(t) : 0;
    ends[t] = first < width ? columns : 0;
    widest = max(widest, width);
  }
  if (first >= widest) return;
  const Weights matrices[2] = {gate, up};
  float sums[N][2][R] = {{{0}}};
  add_products<N, 2, R>(matrices, x, columns, ends, first, widest - 1, lane * chunk, 32 * chunk, sums);
  // A lane writes at most one number.
  float own_gate = 0, own_up = 0;
#pragma unroll
  for (uint t = 0; t < N; t++)
#pragma unroll
    for (uint r = 0; r < R; r++) {
      float gate_sum = simd_sum(sums[t][0][r]), up_sum = simd_sum(sums[t][1][r]);
      own_gate = lane == t * R + r ? gate_sum : own_gate;
      own_up = lane == t * R + r ? up_sum : own_up;
    }
  uint token = lane / R, row = first + lane % R;
  if (token >= experts.tokens || row >= experts.width(token)) return;
  own_gate += float(gate_bias[row]);
  own_up += float(up_bias[row]);
  uint column = experts.expert(token) + 1 == experts.count ? uint(order[row]) : row;
  out[token * experts.neurons + column] = T(own_gate / (1.0f + exp(-own_gate)) * own_up);
}

// The rows of one simdgroup of a product of N tokens with matrices of which each expert has its own, or all share one.
template <int N, int R>
struct Rows {
  uint first, rows, lane;
  float sums[N][1][R];

  // Adds the products with a matrix. `columns`: of it; a token uses those below its expert's width, or all where
  // `whole`. `expert`: the number of the expert whose matrix it is; -1: all experts' matrix.
  template <typename Weights, typename Vectors, typename Picked>
  void add(Weights weights, uint columns, bool whole, int expert, Vectors x, uint stride, Picked experts) {
    uint ends[N];
#pragma unroll
    for (uint t = 0; t < N; t++) {
      bool used = t < experts.tokens && (expert < 0 || experts.expert(t) == uint(expert));
      ends[t] = !used ? 0 : whole ? columns : min(columns, experts.width(t));
    }
    const Weights matrices[1] = {weights};
    add_products<N, 1, R>(matrices, x, stride, ends, first, rows - 1, lane * chunk, 32 * chunk, sums);
  }

  // Writes out (tokens, rows).
  template <typename Bias, typename T>
  void write(Bias bias, uint tokens, device T* out) const {
    float own = 0;
#pragma unroll
    for (uint t = 0; t < N; t++)
#pragma unroll
      for (uint r = 0; r < R; r++) {
        float sum = simd_sum(sums[t][0][r]);
        own = lane == t * R + r ? sum : own;
      }
    uint token = lane / R, row = first + lane % R;
    if (token < tokens && row < rows) out[token * rows + row] = T(own + float(bias[row]));
  }
};
