// The SeedLM encoder: for each block of C weights w it finds, among all 65,535 seeds, the seed, the P coefficients and
// the exponent with the least error sum_c h[c] (w[c] - decoded[c])^2, h being the metric. mlxeff/seedlm/search.py
// defines the method and its terms; its result and that of cpu/seedlm/seedlm_search*.cpp is the same to the bit.
//
// Seeds are numbered by their place n in the register's cycle, in which the states of seed n are the states n, n + 1,
// …; u[n] is state n minus 32768, divided by 32768. Then for each block
//
//   d[n] = sum_c u[n + c P] h[c] w[c], which is computed once and serves P seeds,
//   energy[n] = b^T G[n]^-1 b with b = (d[n] … d[n + P - 1]), where G[n] is the Gram matrix of seed n under h.
//
// No coefficients of seed n have an error below |w|^2 - energy[n], where |w|^2 is sum_c h[c] w[c]^2. Only seeds that
// can still be better than the best one by this bound are evaluated with rounded coefficients: some ten per block.
//
// There are three kernels. `write_inverse` computes G^-1 of every seed, once for each metric, with one thread per seed.
// `scan` computes all energies and keeps the largest one in each class of 64 neighbouring seeds. `choose` has one
// simdgroup per block: it computes the energies again in the classes that can contain the best seed, and evaluates
// seeds. Most of the time is spent in the scan, which needs 65,536 (C + P (P + 1) / 2 + P) operations per block, or 19
// float operations per seed for C = 8 and P = 3. A threadgroup scans 2048 seeds for 32 blocks: it reads each entry of
// the tables once from device memory for these 32 blocks, and once from threadgroup memory for 4 of them.
//
// Energies may be computed in any order and with any fusing of operations: they are off by at most `slack` of |w|^2.
// The evaluation is exact to the bit instead. It consists of float32 additions, multiplications, divisions and fma in a
// fixed order, which IEEE 754 rounds in the same way everywhere. A product is added to another number only by fma, and
// nothing underflows that could change the result. MLX compiles without fast math.
//
// Inputs: `states`, u of 65,536 + 64 places; `words` (65,536), the first 63 bits of the stream of each seed; both
// repeat the first seed at place 65,535. `table` (E, 65,536), E = P (P + 1) / 2: the upper triangle of G^-1, with the
// elements beside the diagonal doubled. `scaled` (blocks, C): the blocks, each scaled by a power of two so that its
// largest weight is in [1/2, 1). `base`: the exponent that the code 0 means for the scaled block. `metric` (C): h.

using namespace metal;

constant constexpr const uint seeds_count = 65535, table_width = 65536, class_size = 64, class_count = 1024;
constant constexpr const uint pitch = 36;          // distance of the entries of a step; 4 more against bank conflicts
constant constexpr const int stage = 8;            // steps whose table entries are in threadgroup memory at a time
constant constexpr const int together = 4;         // blocks that a thread scans together
constant constexpr const uint most_pending = 96;   // seeds that can wait for evaluation
constant constexpr const float slack = 6e-4f;      // largest error of an energy, as a share of |w|^2
constant constexpr const float most_condition = 4000.0f;  // seeds with a larger trace(G) trace(G^-1) are not evaluated
constant constexpr const float excluded = 4200.0f;  // the same limit in the table, where rounding must exclude no seed
constant constexpr const float least_miss = 8.8817842e-16f;  // 2^-50: smaller differences w - decoded count as 0
constant constexpr const int least_exponent = -24;           // a scaled block gets no smaller exponent

// 2^exponent, for normal floats.
inline float power_of_two(int exponent) { return as_type<float>(uint(exponent + 127) << 23); }

// The factors of a Gram matrix G = L D L^T, where L has ones on its diagonal, and the least-squares coefficients t.
template <int P>
struct Fit {
  float L[P][P], D[P], t[P];
};

// Factors G, of which the lower triangle is read, into `fit`, and inverts L. Returns trace(G) trace(G^-1), or infinity
// for a singular matrix.
template <int P>
inline float factor(thread const float (&G)[P][P], thread Fit<P>& fit, thread float (&inverse)[P][P]) {
  float trace = 0, inverse_trace = 0;
#pragma unroll
  for (int j = 0; j < P; j++) {  // in this loop, `inverse` contains L D
    float pivot = G[j][j];
#pragma unroll
    for (int k = 0; k < j; k++) pivot = fma(-inverse[j][k], fit.L[j][k], pivot);
    if (!(pivot > 0)) return INFINITY;
    fit.D[j] = pivot;
    trace += G[j][j];
#pragma unroll
    for (int i = j + 1; i < P; i++) {
      float sum = G[i][j];
#pragma unroll
      for (int k = 0; k < j; k++) sum = fma(-inverse[i][k], fit.L[j][k], sum);
      inverse[i][j] = sum;
      fit.L[i][j] = sum / pivot;
    }
  }
#pragma unroll
  for (int j = 0; j < P; j++) {
    inverse[j][j] = 1;
    inverse_trace += 1.0f / fit.D[j];
#pragma unroll
    for (int i = j + 1; i < P; i++) {
      float sum = fit.L[i][j];
#pragma unroll
      for (int k = j + 1; k < i; k++) sum = fma(fit.L[i][k], inverse[k][j], sum);
      inverse[i][j] = -sum;
      inverse_trace = fma(sum / fit.D[i], sum, inverse_trace);
    }
  }
  return trace * inverse_trace;
}

// Adds one column of a block, with the states u (P) and the metric of the column, to the Gram matrix G.
template <int P>
inline void add_column(float metric, thread const float* u, thread float (&G)[P][P]) {
#pragma unroll
  for (int i = 0; i < P; i++) {
    float hu = metric * u[i];
#pragma unroll
    for (int j = 0; j <= i; j++) G[i][j] = fma(hu, u[j], G[i][j]);
  }
}

// Writes the entries of one seed, number `index`, into the table: G^-1, or zeros, hence no energy, where G is almost
// singular.
template <int C, int P, typename States, typename Metric>
inline void write_inverse(States states, Metric metric, uint index, device float* table) {
  float G[P][P] = {}, N[P][P];
  for (int c = 0; c < C; c++) {
    float u[P];
#pragma unroll
    for (int p = 0; p < P; p++) u[p] = states[index + c * P + p];
    add_column<P>(metric[c], u, G);
  }
  Fit<P> fit;
  bool good = index < seeds_count && factor<P>(G, fit, N) < excluded;
  int entry = 0;
#pragma unroll
  for (int i = 0; i < P; i++)
#pragma unroll
    for (int j = i; j < P; j++, entry++) {
      float sum = 0;
#pragma unroll
      for (int k = j; k < P; k++) sum = fma(N[k][i] / fit.D[k], N[k][j], sum);
      table[entry * table_width + index] = !good ? 0.0f : i == j ? sum : 2 * sum;
    }
}

// ---- Scan --------------------------------------------------------------------------------------------------------

// b^T G^-1 b, where the entries of G^-1 are `distance` apart.
template <int P, typename Entries>
inline float energy_of(Entries entries, uint distance, thread const float* b) {
  float energy = 0;
  int entry = 0;
#pragma unroll
  for (int i = 0; i < P; i++) {
    float row = entries[entry++ * distance] * b[i];
#pragma unroll
    for (int j = i + 1; j < P; j++) row = fma(entries[entry++ * distance], b[j], row);
    energy = fma(row, b[i], energy);
  }
  return energy;
}

// The place of state k in threadgroup memory. An unused place after each 64 states lets the 32 lanes, which are 64
// states apart, read from different banks.
inline uint padded(uint k) { return k + (k >> 6); }

// Computes d for place k of the cycle and N blocks into d[…][at]; hw are the products h w of the blocks.
template <int C, int P, int N>
inline void products(const threadgroup float* states, uint k, thread const float* hw, thread float (*d)[P], int at) {
#pragma unroll
  for (int c = 0; c < C; c++) {
    float u = states[padded(k + c * P)];
#pragma unroll
    for (int i = 0; i < N; i++) d[i][at] = c == 0 ? u * hw[i * C] : fma(u, hw[i * C + c], d[i][at]);
  }
}

// One step of the scan, for the seed at place k and N blocks: computes the newest value of d and the energies, updates
// the largest energies, and moves d, which has P values for each block, to the next seed.
template <int C, int P, int N>
inline void scan_step(const threadgroup float* states, const threadgroup float* entries, uint k, thread const float* hw,
                      thread float (*d)[P], thread float* largest) {
  products<C, P, N>(states, k + P - 1, hw, d, P - 1);
#pragma unroll
  for (int i = 0; i < N; i++) {
    largest[i] = max(largest[i], energy_of<P>(entries, stage * pitch, d[i]));
#pragma unroll
    for (int p = 0; p + 1 < P; p++) d[i][p] = d[i][p + 1];
  }
}

// Loads the table entries for `stage` steps of the 32 lanes from device memory: rows [entry][step] of 32 lanes, `pitch`
// apart.
template <int E, typename Table>
inline void load_entries(Table table, uint first, threadgroup float* entries, uint thread_index) {
  for (uint i = thread_index; i < E * stage * 32; i += 256) {
    uint step = i % stage, lane = i / stage % 32, entry = i / (stage * 32);
    entries[(entry * stage + step) * pitch + lane] = table[entry * table_width + first + lane * class_size + step];
  }
}

// Computes maxima (blocks, 1024), the largest energy of each block in each class. A threadgroup of 8 simdgroups scans
// 32 classes, those that its y in the grid says. Each lane scans one class, for the 4 blocks of its simdgroup.
// Threadgroup memory: `own_states`, 2144 floats, and `entries`, E * stage * pitch floats.
template <int C, int P, typename States, typename Table, typename Scaled, typename Metric>
inline void scan(States states, Table table, Scaled scaled, Metric metric, uint blocks, device float* maxima,
                 threadgroup float* own_states, threadgroup float* entries, uint2 group, uint simdgroup, uint lane) {
  constexpr int E = P * (P + 1) / 2;
  uint thread_index = simdgroup * 32 + lane, first = group.y * 32 * class_size;
  uint block = (group.x * 8 + simdgroup) * together;
  for (uint i = thread_index; i < 32 * class_size + C * P - 1; i += 256) own_states[padded(i)] = states[first + i];
  float hw[together * C], d[together][P], largest[together] = {};
#pragma unroll
  for (int i = 0; i < together; i++)
#pragma unroll
    for (int c = 0; c < C; c++) hw[i * C + c] = metric[c] * scaled[min(block + i, blocks - 1) * C + c];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const threadgroup float* lane_states = own_states + lane * (class_size + 1);
#pragma unroll
  for (int p = 0; p + 1 < P; p++) products<C, P, together>(lane_states, p, hw, d, p);
  for (uint k = 0; k < class_size; k += stage) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_entries<E>(table, first + k, entries, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint step = 0; step < stage; step++)
      scan_step<C, P, together>(lane_states, entries + step * pitch + lane, k + step, hw, d, largest);
  }
#pragma unroll
  for (int i = 0; i < together; i++)
    if (block + i < blocks) maxima[(block + i) * class_count + group.y * 32 + lane] = largest[i];
}

// ---- Evaluation --------------------------------------------------------------------------------------------------

// A scaled block; every lane of its simdgroup has a copy.
template <int C>
struct Problem {
  float w[C], h[C], hw[C];  // weights, metric, their product
  float norm;               // |w|^2
  int lowest, highest;      // limits of the exponent
  bool refine;              // whether neighbours of rounded coefficients are tried too
};

// Rounded coefficients q for an exponent; the cost is by how much they increase the error over that of unrounded ones.
template <int P>
struct Rounded {
  float cost;
  int exponent, q[P];
};

// The best encoding that a lane has found. `word` is the stream of the seed, which begins with the seed; the word 0
// stands for a block of zeros. Of seeds with the same error the lowest is kept.
template <int P>
struct Best {
  float error;
  ulong word;
  Rounded<P> rounded;

  uint seed() const { return uint(word) & 0xFFFF; }
};

// State n of a stream, minus 32768.
inline int state_of(ulong word, int n) { return int(uint(word >> n) & 0xFFFF) - 32768; }

// The least-squares coefficients of a block for the seed of `word`; false where its Gram matrix is almost singular.
template <int C, int P>
inline bool solve(thread const Problem<C>& block, ulong word, thread Fit<P>& fit) {
  float G[P][P] = {}, N[P][P], b[P] = {};
#pragma unroll
  for (int c = 0; c < C; c++) {
    float u[P];
#pragma unroll
    for (int p = 0; p < P; p++) {
      u[p] = float(state_of(word, c * P + p)) * (1.0f / 32768.0f);
      b[p] = fma(block.hw[c], u[p], b[p]);
    }
    add_column<P>(block.h[c], u, G);
  }
  if (!(factor<P>(G, fit, N) < most_condition)) return false;
#pragma unroll
  for (int i = 0; i < P; i++)
#pragma unroll
    for (int k = 0; k < i; k++) b[i] = fma(-fit.L[i][k], b[k], b[i]);
#pragma unroll
  for (int i = P - 1; i >= 0; i--) {
    fit.t[i] = b[i] / fit.D[i];
#pragma unroll
    for (int j = i + 1; j < P; j++) fit.t[i] = fma(-fit.L[j][i], fit.t[j], fit.t[i]);
  }
#pragma unroll
  for (int i = 0; i < P; i++) fit.t[i] = fma(-1.0f / 32768.0f, fit.t[i], fit.t[i]);  // blocks decode with / 32767
  return true;
}

// Tries integers for the coefficients p, p - 1, … 0, at most `reach` away from the rounded t / 2^exponent, and keeps
// the best combination. `cost` is the contribution of the coefficients after p, which are already chosen.
template <int P, int p>
struct Choose {
  static inline void run(thread const Fit<P>& fit, int exponent, int reach, float cost, thread int* q,
                         thread float* misses, thread Rounded<P>& best) {
    float unit = power_of_two(exponent);
    int middle = int(clamp(rint(fit.t[p] * power_of_two(-exponent)), -8.0f, 7.0f));
    for (int step = 0; step <= 2 * reach; step++) {  // offsets 0, -1, +1
      q[p] = middle + (step + 1) / 2 * (step % 2 != 0 ? -1 : 1);
      if (q[p] < -8 || q[p] > 7) continue;
      misses[p] = fma(float(q[p]), unit, -fit.t[p]);
      float miss = misses[p];
#pragma unroll
      for (int j = p + 1; j < P; j++) miss = fma(fit.L[j][p], misses[j], miss);
      float sum = fma(fit.D[p] * miss, miss, cost);
      if (sum < best.cost) Choose<P, p - 1>::run(fit, exponent, reach, sum, q, misses, best);
    }
  }
};
template <int P>
struct Choose<P, -1> {
  static inline void run(thread const Fit<P>&, int exponent, int, float cost, thread int* q, thread float*,
                         thread Rounded<P>& best) {
    best.cost = cost;
    best.exponent = exponent;
#pragma unroll
    for (int p = 0; p < P; p++) best.q[p] = q[p];
  }
};

// isum[c] = sum_p q[p] (V[c][p] - 32768).
template <int P>
inline float column_sum(ulong word, int c, thread const int* q) {
  int sum = 0;
#pragma unroll
  for (int p = 0; p < P; p++) sum += q[p] * state_of(word, c * P + p);
  return float(sum);
}

// The error of the block that the seed of `word` and these coefficients decode to.
template <int C, int P>
inline float error_of(thread const Problem<C>& block, ulong word, thread const Rounded<P>& rounded) {
  float scale = power_of_two(rounded.exponent) * (1.0f / 32767.0f), error = 0;
#pragma unroll
  for (int c = 0; c < C; c++) {
    float miss = fma(-column_sum<P>(word, c, rounded.q), scale, block.w[c]);
    if (fabs(miss) < least_miss) miss = 0;
    error = fma(block.h[c] * miss, miss, error);
  }
  return error;
}

// Evaluates the seed of `word` with rounded coefficients, and keeps it in `best` if it is better.
template <int C, int P>
inline void evaluate(thread const Problem<C>& block, ulong word, thread Best<P>& best) {
  Fit<P> fit;
  if (!solve<C, P>(block, word, fit)) return;
  float largest = 0;
#pragma unroll
  for (int p = 0; p < P; p++) largest = max(largest, fabs(fit.t[p]));
  int exponent = clamp(int(as_type<uint>(largest) >> 23) - 129, block.lowest, block.highest);
  Rounded<P> rounded = {INFINITY, exponent, {}};
  int q[P];
  float misses[P];
  Choose<P, P - 1>::run(fit, exponent, int(block.refine), 0.0f, q, misses, rounded);
  if (block.refine && exponent > block.lowest)
    Choose<P, P - 1>::run(fit, exponent - 1, 1, 0.0f, q, misses, rounded);
  float error = error_of<C, P>(block, word, rounded);
  Best<P> found = {error, word, rounded};
  if (error < best.error || (error == best.error && found.seed() < best.seed())) best = found;
}

// ---- Choice ------------------------------------------------------------------------------------------------------

// The search for the best seed of one block, by one simdgroup. `pending` are places of seeds that wait for evaluation,
// until there is one for each lane.
template <int C, int P, typename Words, typename States, typename Table>
struct Search {
  Words words;
  States states;
  Table table;
  threadgroup uint* pending;
  uint lane;
  Problem<C> block;
  Best<P> best;  // the best encoding that this lane has found
  float least;   // a seed with this energy or less cannot be better than the best one of the simdgroup
  uint count;    // number of pending seeds

  // The energy of the seed at place `index`.
  float energy(uint index) const {
    float b[P];
#pragma unroll
    for (int p = 0; p < P; p++) {
      b[p] = 0;
#pragma unroll
      for (int c = 0; c < C; c++) b[p] = fma(states[index + p + c * P], block.hw[c], b[p]);
    }
    return energy_of<P>(table + index, table_width, b);
  }

  // Sets `least` after the best encoding of a lane has changed.
  void update() { least = (1 - slack) * block.norm - simd_min(best.error); }

  // Evaluates a first seed in each lane: the one with more energy of the lane's two seeds of the class.
  void begin(uint of_class) {
    uint index = of_class * class_size + lane;
    if (energy(index + 32) > energy(index)) index += 32;
    if (index < seeds_count) evaluate<C, P>(block, words[index], best);
    update();
  }

  // Adds the seeds of a class that can be better than the best one to `pending`.
  void visit(uint of_class) {
    for (uint half_class = 0; half_class < 64; half_class += 32) {
      uint index = of_class * class_size + half_class + lane;
      uint wanted = index < seeds_count && energy(index) > least ? 1 : 0;
      uint place = count + simd_prefix_exclusive_sum(wanted);
      if (wanted != 0) pending[place] = index;
      count += simd_sum(wanted);
    }
    if (count >= 32) evaluate_pending();
  }

  // Evaluates all pending seeds.
  void evaluate_pending() {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = lane; i < count; i += 32) evaluate<C, P>(block, words[pending[i]], best);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    count = 0;
    update();
  }

  // Searches all seeds. `maxima` are the largest energies of this block in the classes. The class with the largest of
  // them comes first, because a good first seed excludes most of the others.
  void run(const device float* maxima) {
    float most = -1;
    uint of_class = 0;
    for (uint i = lane; i < class_count; i += 32)
      if (maxima[i] > most) most = maxima[i], of_class = i;
    float top = simd_max(most);
    begin(simd_min(most == top ? of_class : class_count));
    for (uint i = 0; i < class_count; i += 32) {
      uint wanted = simd_or(maxima[i + lane] > least ? 1u << lane : 0u);
      for (; wanted != 0; wanted &= wanted - 1) visit(i + ctz(wanted));
    }
    evaluate_pending();
  }
};

// The scaled block number `block`.
template <int C, typename Scaled, typename Metric>
inline Problem<C> load_problem(Scaled scaled, Metric metric, int base, bool refine, uint block) {
  Problem<C> problem;
  problem.norm = 0;
#pragma unroll
  for (int c = 0; c < C; c++) {
    problem.w[c] = scaled[block * C + c];
    problem.h[c] = metric[c];
    problem.hw[c] = problem.h[c] * problem.w[c];
    problem.norm = fma(problem.hw[c], problem.w[c], problem.norm);
  }
  problem.lowest = max(base, least_exponent);
  problem.highest = base + 15;
  problem.refine = refine;
  return problem;
}

// Writes the stored values of a block, and the C weights that it decodes to.
template <int C, int P>
inline void write_block(thread const Best<P>& best, int base, int bias, uint block, device uint16_t* seeds,
                        device int8_t* coefficients, device uint8_t* codes, device float* decoded) {
  bool found = best.word != 0;
  int code = found ? best.rounded.exponent - base : 0, q[P];
  seeds[block] = found ? best.seed() : 1;
  codes[block] = code;
#pragma unroll
  for (int p = 0; p < P; p++) coefficients[block * P + p] = q[p] = found ? best.rounded.q[p] : 0;
  float scale = power_of_two(code - 8 + bias) * (1.0f / 32767.0f);
#pragma unroll
  for (int c = 0; c < C; c++) decoded[block * C + c] = column_sum<P>(best.word, c, q) * scale;
}

// Searches one block with one simdgroup and writes its best encoding. `maxima` is the result of `scan`. A block becomes
// zeros where no exponent from `base` to `base` + 15 can be used for it.
template <int C, int P, typename Words, typename States, typename Table, typename Scaled, typename Metric>
inline void choose(Words words, States states, Table table, Scaled scaled, Metric metric, int base, int bias,
                   bool refine, const device float* maxima, uint block, uint lane, threadgroup uint* pending,
                   device uint16_t* seeds, device int8_t* coefficients, device uint8_t* codes, device float* decoded) {
  Search<C, P, Words, States, Table> search;
  search.words = words, search.states = states, search.table = table;
  search.pending = pending, search.lane = lane, search.count = 0;
  search.block = load_problem<C>(scaled, metric, base, refine, block);
  search.best.error = search.block.norm, search.best.word = 0;
  if (base < 0 && search.block.highest >= least_exponent) search.run(maxima + block * class_count);
  float error = simd_min(search.best.error);
  uint seed = simd_min(search.best.error == error ? search.best.seed() : 65536);
  uint winner = simd_min(search.best.error == error && search.best.seed() == seed ? lane : 32);
  if (lane == winner) write_block<C, P>(search.best, base, bias, block, seeds, coefficients, codes, decoded);
}
