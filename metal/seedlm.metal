// SeedLM (arXiv 2410.10714): kernels that decode a seed-encoded matrix W, and multiply by it without storing the
// decoded weights. mlxeff/seedlm/format.py defines the stored form. A block decodes to the C weights
//
//   w[c] = fl32(isum[c] * fl32(2^e / 32767)),  isum[c] = sum_p q[p] (V[c][p] - 32768),  V[c][p] = state number c P + p.
//
// State n consists of the bits n ... n + 15 of a stream of bits. The stream is the seed (16 bits) and its extension,
// which is the XOR of two table entries, one for each byte of the seed (mlxeff/seedlm/lfsr.py).
//
// On Apple's GPUs, shifts and conversions from integer to float are slow instructions. The kernel for one token avoids
// them: a word with the stream's bits in its lower 23 bits and the exponent of 1.0 above them is a float, and one AND
// that clears all stream bits but those of a state V, from bit k of the word on, leaves the float 1 + V 2^(k-23).
//
// Letters: C columns and P states per block, R rows of W that a simdgroup computes together. Sums are float32 whatever
// the type of the inputs. The types of input pointers are template parameters, because MLX passes arrays of fewer than
// 8 elements in the constant address space and others in device memory.

using namespace metal;

// A stored block.
struct Block {
  uint seed;          // 16 bits
  uint coefficients;  // P numbers of 4 bits in two's complement, from bit 0 on; the bits above them are undefined
  uint code;          // exponent code, 4 bits
};

// Reads the blocks of format "4": one word per block.
template <typename Words>
struct Packed {
  static constant constexpr const int C = 8;
  static constant constexpr const int P = 3;
  using Entry = uint;

  Words blocks;
  uint count;  // blocks per row

  Block load(uint index) const {
    uint word = blocks[index];
    return Block{word & 0xFFFF, word >> 16, word >> 28};
  }
};

// Reads the blocks of the formats "4.5" and "3": three arrays. Entry is the type of a table entry, see `extend`.
template <int C_, int P_, typename Entry_, typename Seeds, typename Coefficients, typename Exponents>
struct Planar {
  static constant constexpr const int C = C_;
  static constant constexpr const int P = P_;
  using Entry = Entry_;

  Seeds seeds;
  Coefficients coefficients;
  Exponents exponents;
  uint count;  // blocks per row, an even number, so `index` is even exactly where the block's number in its row is

  Block load(uint index) const {
    uint pair = exponents[index >> 1];
    return Block{seeds[index], coefficients[index], (index & 1) != 0 ? pair >> 4 : pair & 15};
  }
};

// 2^exponent, for normal floats.
inline float power_of_two(int exponent) { return as_type<float>(uint(exponent + 127) << 23); }

// The 4 bits of the stream that follow a register state. The taps of the register are the bits 0, 1, 3 and 12.
inline uint next_four(uint state) { return (state ^ state >> 1 ^ state >> 3 ^ state >> 12) & 15; }

// The next `count` bits of the stream after the state, up to 32, lowest first. `state` moves past them.
inline uint next_bits(thread uint& state, int count) {
  uint bits = 0;
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    uint four = next_four(state);
    bits |= four << i;
    state = state >> 4 | four << 12;
  }
  return bits;
}

// The extension of a seed: the bits from 16 on that a block of `states` states needs, `states` - 1 bits. A uint has
// room for 32 of them, a uint2 for 64.
template <int states>
inline void extend(uint seed, thread uint& bits) {
  bits = next_bits(seed, states - 1);
}
template <int states>
inline void extend(uint seed, thread uint2& bits) {
  bits.x = next_bits(seed, 32);
  bits.y = next_bits(seed, states - 33);
}

// Fills the look-up tables of a threadgroup: entries 0 ... 255 for the low byte of a seed, 256 ... 511 for the high
// byte. All threads of the threadgroup call it; it ends with a barrier.
template <typename Store, typename Entry>
inline void fill_tables(threadgroup Entry* tables, uint thread_index, uint thread_count) {
  for (uint i = thread_index; i < 512; i += thread_count) {
    Entry bits;
    extend<Store::C * Store::P>(i < 256 ? i : (i - 256) << 8, bits);
    tables[i] = bits;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Cuts the stream into words: words[j] has the stream's bits 8 j ... 8 j + 22 from its bit 0 on, so state 8 j + k is
// its bits k ... k + 15, for k < 8. Higher bits are undefined.
template <int count>
inline void stream_words(uint seed, uint extension, thread uint* words) {
  uint first = seed | extension << 16;
  words[0] = first;
  words[1] = first >> 8;
  words[2] = extension;
  if (count > 3) words[3] = extension >> 8;
}
template <int count>
inline void stream_words(uint seed, uint2 extension, thread uint* words) {
  stream_words<4>(seed, extension.x, words);
  words[4] = extension.x >> 16 | extension.y << 16;
  words[5] = extension.x >> 24 | extension.y << 8;
}
// The words of a seed's stream, with the extension from the tables.
template <typename Store, typename Entry>
inline void look_up(uint seed, const threadgroup Entry* tables, thread uint* words) {
  stream_words<Store::C * Store::P / 8>(seed, tables[seed & 255] ^ tables[256 + (seed >> 8)], words);
}

// q[p] 2^(4p-23), exactly and without a shift: with its sign bit inverted, the coefficient is q + 8, and where it lies
// it is the mantissa of the float 1 + (q + 8) 2^(4p-23).
inline float coefficient(uint coefficients, int p) {
  uint bits = (coefficients & 15u << 4 * p) ^ (0x3F800000u | 8u << 4 * p);
  return as_type<float>(bits) - (1.0f + power_of_two(4 * p - 20));
}

// 2^(e + shift), with e the exponent of a block: its scale before the division by 32767, if shift is 0.
inline float block_power(uint code, int bias, int shift) {
  return as_type<float>((code << 23) + (uint(bias - 8 + 127 + shift) << 23));
}

// The C columns of x from `column` on, of the token `row`; zeros beyond the last column.
template <int C, typename Vectors>
inline void load_columns(Vectors vectors, uint row, uint column, uint cols, thread float* values) {
  uint index = row * cols + column;
  if (column + C <= cols) {
#pragma unroll
    for (int c = 0; c < C; c++) values[c] = float(vectors[index + c]);
  } else {
#pragma unroll
    for (int c = 0; c < C; c++) values[c] = column + c < cols ? float(vectors[index + c]) : 0.0f;
  }
}

// ---- Decoding ----------------------------------------------------------------------------------------------------

// The C weights of a block, the same to the bit as from every other decoder: all steps before the last product are
// exact.
template <typename Store>
inline void decode_block(Block block, thread const uint* words, int bias, thread float* weights) {
  float q[Store::P];
#pragma unroll
  for (int p = 0; p < Store::P; p++) q[p] = coefficient(block.coefficients, p) * power_of_two(23 - 4 * p);
  float scale = block_power(block.code, bias, 15) * (1.0f / 32767.0f);
#pragma unroll
  for (int c = 0; c < Store::C; c++) {
    float sum = 0;
#pragma unroll
    for (int p = 0; p < Store::P; p++) {
      int n = c * Store::P + p, k = n & 7;
      uint bits = (words[n >> 3] & 0xFFFFu << k) | uint(127 + 8 - k) << 23;  // 2^(8-k) + V 2^-15
      sum = fma(q[p], as_type<float>(bits) - (power_of_two(8 - k) + 1.0f), sum);
    }
    weights[c] = sum * scale;
  }
}

// Decodes one block of the row `row` of W into out[0 ... cols - 1], which is the row. One thread per block. It computes
// the extension without tables, because a threadgroup would use the tables only once.
template <typename Store, typename T>
inline void decode_row_block(Store store, int bias, uint row, uint block, uint cols, device T* out) {
  if (block * Store::C >= cols) return;
  Block loaded = store.load(row * store.count + block);
  typename Store::Entry extension;
  extend<Store::C * Store::P>(loaded.seed, extension);
  uint words[Store::C * Store::P / 8];
  stream_words<Store::C * Store::P / 8>(loaded.seed, extension, words);
  float weights[Store::C];
  decode_block<Store>(loaded, words, bias, weights);
#pragma unroll
  for (int c = 0; c < Store::C; c++) {
    uint column = block * Store::C + c;
    if (column < cols) out[column] = T(weights[c]);
  }
}

// ---- One token ---------------------------------------------------------------------------------------------------

// The product of a block with C columns of x, without shifts and conversions. `prepare` computes what depends on x
// only, once for all rows. With the float f = 1 + V 2^(k-23) of a state (see the top of this file) and xs = x
// 2^(23-k-4p),
//
//   sum_c f xs - offset[p] = 2^(-4p) sum_c x (V - 32768),
//
// where the factor 2^(-4p) cancels with the 2^(4p-23) of `coefficient`, up to 2^(-23).
template <int C, int P>
struct Windows {
  float scaled[C * P];
  float offset[P];

  void prepare(thread const float* x) {
    float total = 0;
#pragma unroll
    for (int c = 0; c < C; c++) total += x[c];
#pragma unroll
    for (int p = 0; p < P; p++) {
      float sum = total * power_of_two(15 - 4 * p);
#pragma unroll
      for (int c = 0; c < C; c++) {
        int n = c * P + p;
        scaled[n] = x[c] * power_of_two(23 - (n & 7) - 4 * p);
        sum += scaled[n];
      }
      offset[p] = sum;
    }
  }

  // 32767 sum_c w[c] x[c].
  float dot(Block block, thread const uint* words, int bias) const {
    uint floats[C * P / 8];
#pragma unroll
    for (int j = 0; j < C * P / 8; j++) floats[j] = (words[j] & 0x007FFFFFu) | 0x3F800000u;
    float sum = 0;
#pragma unroll
    for (int p = 0; p < P; p++) {
      float along = -offset[p];
#pragma unroll
      for (int c = 0; c < C; c++) {
        int n = c * P + p;
        along = fma(as_type<float>(floats[n >> 3] & (0xFF800000u | 0xFFFFu << (n & 7))), scaled[n], along);
      }
      sum = fma(coefficient(block.coefficients, p), along, sum);
    }
    return sum * block_power(block.code, bias, 23);
  }
};

// The same product with a shift and a conversion for each state. It is slower on Apple's GPUs, and more accurate,
// because no large offsets cancel.
template <int C, int P>
struct Shifts {
  float x[C];

  void prepare(thread const float* columns) {
#pragma unroll
    for (int c = 0; c < C; c++) x[c] = columns[c];
  }

  // 32767 sum_c w[c] x[c].
  float dot(Block block, thread const uint* words, int bias) const {
    float sum = 0;
#pragma unroll
    for (int p = 0; p < P; p++) {
      float along = 0;
#pragma unroll
      for (int c = 0; c < C; c++) {
        int n = c * P + p;
        along = fma(float(int(words[n >> 3] >> (n & 7) & 0xFFFF) - 32768), x[c], along);
      }
      sum = fma(float((int(block.coefficients >> 4 * p & 15) ^ 8) - 8), along, sum);
    }
    return sum * block_power(block.code, bias, 0);
  }
};

// The index of the first block of each of R rows from `first` on. In place of rows beyond the last one, the last one.
template <int R>
inline void row_starts(uint first, uint rows, uint count, thread uint* starts) {
#pragma unroll
  for (int r = 0; r < R; r++) starts[r] = min(first + r, rows - 1) * count;
}

// Adds the products with block number `block` of R rows to the sums of these rows, times 32767.
template <typename Form, int R, typename Store, typename Vectors, typename Entry>
inline void add_block(Store store, Vectors vectors, int bias, uint block, uint cols, thread const uint* starts,
                      const threadgroup Entry* tables, thread float* sums) {
  float columns[Store::C];
  load_columns<Store::C>(vectors, 0, block * Store::C, cols, columns);
  Form form;
  form.prepare(columns);
#pragma unroll
  for (int r = 0; r < R; r++) {
    Block loaded = store.load(starts[r] + block);
    uint words[Store::C * Store::P / 8];
    look_up<Store>(loaded.seed, tables, words);
    sums[r] += form.dot(loaded, words, bias);
  }
}

// out (rows) = W x, for one token. A threadgroup has 256 threads in 8 simdgroups. A simdgroup computes R rows, and its
// lanes take neighbouring blocks of a row, so that their loads fall into one cache line. A lane prepares the columns of
// x for its block once and uses them for R rows.
template <typename Form, int R, typename Store, typename Vectors, typename T>
inline void matvec(Store store, Vectors vectors, int bias, uint rows, uint cols, device T* out,
                   threadgroup typename Store::Entry* tables, uint group, uint simdgroup, uint lane) {
  fill_tables<Store>(tables, simdgroup * 32 + lane, 256);
  uint first = (group * 8 + simdgroup) * R, starts[R];
  row_starts<R>(first, rows, store.count, starts);
  float sums[R] = {0};
  for (uint block = lane; block * Store::C < cols; block += 32)
    add_block<Form, R>(store, vectors, bias, block, cols, starts, tables, sums);
#pragma unroll
  for (int r = 0; r < R; r++) {
    float total = simd_sum(sums[r]);
    if (lane == 0 && first + r < rows) out[first + r] = T(total * (1.0f / 32767.0f));
  }
}

// ---- A few tokens ------------------------------------------------------------------------------------------------

// Adds the products with block number `block` of R rows to the sums of N tokens and R rows. Blocks are decoded once.
template <int N, int R, typename Store, typename Vectors, typename Entry>
inline void add_block_of_each(Store store, Vectors vectors, int bias, uint block, uint cols, thread const uint* starts,
                              const threadgroup Entry* tables, thread float* sums) {
  float weights[R][Store::C];
#pragma unroll
  for (int r = 0; r < R; r++) {
    Block loaded = store.load(starts[r] + block);
    uint words[Store::C * Store::P / 8];
    look_up<Store>(loaded.seed, tables, words);
    decode_block<Store>(loaded, words, bias, weights[r]);
  }
#pragma unroll
  for (int t = 0; t < N; t++) {
    float columns[Store::C];
    load_columns<Store::C>(vectors, t, block * Store::C, cols, columns);
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int c = 0; c < Store::C; c++) sums[t * R + r] = fma(weights[r][c], columns[c], sums[t * R + r]);
  }
}

// out (N, rows) = vectors (N, cols) W^T, for N tokens. Threads are used as in matvec, but weights are decoded and then
// used N times.
template <int N, int R, typename Store, typename Vectors, typename T>
inline void matvecs(Store store, Vectors vectors, int bias, uint rows, uint cols, device T* out,
                    threadgroup typename Store::Entry* tables, uint group, uint simdgroup, uint lane) {
  fill_tables<Store>(tables, simdgroup * 32 + lane, 256);
  uint first = (group * 8 + simdgroup) * R, starts[R];
  row_starts<R>(first, rows, store.count, starts);
  float sums[N * R] = {0};
  for (uint block = lane; block * Store::C < cols; block += 32)
    add_block_of_each<N, R>(store, vectors, bias, block, cols, starts, tables, sums);
#pragma unroll
  for (int i = 0; i < N * R; i++) {
    float total = simd_sum(sums[i]);
    uint row = first + i % R;
    if (lane == 0 && row < rows) out[i / R * rows + row] = T(total);
  }
}

// ---- Many tokens -------------------------------------------------------------------------------------------------

// A tile of W in threadgroup memory.
template <typename Store>
struct Tile {
  static constant constexpr const int rows = 64;
  static constant constexpr const int depth = 2 * Store::C;      // columns: two blocks
  static constant constexpr const int pitch = 2 * Store::C + 4;  // distance of rows; 4 more against bank conflicts
};

// Loads a tile of the inputs: M tokens from `token` on, and the columns of a tile of W from `column` on; zeros outside.
template <int M, typename Store, typename Vectors>
inline void load_tokens(Vectors vectors, uint token, uint column, uint tokens, uint cols, threadgroup float* tile,
                        uint thread_index) {
  for (uint i = thread_index; i < M * Tile<Store>::depth; i += 128) {
    uint t = i / Tile<Store>::depth, c = i % Tile<Store>::depth;
    bool inside = token + t < tokens && column + c < cols;
    tile[t * Tile<Store>::pitch + c] = inside ? float(vectors[(token + t) * cols + column + c]) : 0.0f;
  }
}

// Decodes a tile of W: 64 rows and two blocks of each, one block per thread. It has zeros in place of blocks beyond the
// last one, and the last row in place of rows beyond it.
template <typename Store>
inline void load_weights(Store store, int bias, uint row, uint block, uint rows, threadgroup float* tile,
                         const threadgroup typename Store::Entry* tables, uint thread_index) {
  uint r = thread_index / 2, at = block + thread_index % 2;
  threadgroup float* target = tile + r * Tile<Store>::pitch + thread_index % 2 * Store::C;
  float weights[Store::C] = {0};
  if (at < store.count) {
    Block loaded = store.load(min(row + r, rows - 1) * store.count + at);
    uint words[Store::C * Store::P / 8];
    look_up<Store>(loaded.seed, tables, words);
    decode_block<Store>(loaded, words, bias, weights);
  }
#pragma unroll
  for (int c = 0; c < Store::C; c++) target[c] = weights[c];
}

// out (tokens, rows) = vectors (tokens, cols) W^T, for many tokens. A threadgroup has 128 threads and computes outputs
// of M tokens and 64 rows of W. Its 2 x 2 simdgroups compute M/2 x 32 of them each, as float32 matrices of 8 x 8. Each
// step loads 2 C columns: the weights of a tile are decoded once into threadgroup memory, as float32.
template <int M, typename Store, typename Vectors, typename T>
inline void matmul(Store store, Vectors vectors, int bias, uint rows, uint cols, uint tokens, device T* out,
                   threadgroup typename Store::Entry* tables, threadgroup float* token_tile,
                   threadgroup float* weight_tile, uint2 group, uint simdgroup, uint lane) {
  constexpr int pitch = Tile<Store>::pitch;
  uint thread_index = simdgroup * 32 + lane;
  fill_tables<Store>(tables, thread_index, 128);
  uint row = group.x * Tile<Store>::rows, token = group.y * M;
  uint own_token = simdgroup / 2 * (M / 2), own_row = simdgroup % 2 * 32;
  simdgroup_matrix<float, 8, 8> sums[M / 16][4];
#pragma unroll
  for (int i = 0; i < M / 16; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (uint column = 0; column < cols; column += Tile<Store>::depth) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_tokens<M, Store>(vectors, token, column, tokens, cols, token_tile, thread_index);
    load_weights(store, bias, row, column / Store::C, rows, weight_tile, tables, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int k = 0; k < Tile<Store>::depth; k += 8) {
      simdgroup_matrix<float, 8, 8> left, right[4];
#pragma unroll
      for (int j = 0; j < 4; j++)
        simdgroup_load(right[j], weight_tile + (own_row + 8 * j) * pitch + k, pitch, ulong2(0, 0), true);
#pragma unroll
      for (int i = 0; i < M / 16; i++) {
        simdgroup_load(left, token_tile + (own_token + 8 * i) * pitch + k, pitch);
#pragma unroll
        for (int j = 0; j < 4; j++) simdgroup_multiply_accumulate(sums[i][j], left, right[j], sums[i][j]);
      }
    }
  }
  // Of an 8 x 8 matrix a lane has two neighbouring elements, at this row and column and the next column.
  uint at_token = token + own_token + (lane / 4 & 4) + lane / 2 % 4;
  uint at_row = row + own_row + (lane / 4 & 2) * 2 + lane % 2 * 2;
#pragma unroll
  for (int i = 0; i < M / 16; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        uint t = at_token + 8 * i, r = at_row + 8 * j + e;
        if (t < tokens && r < rows) out[t * rows + r] = T(sums[i][j].thread_elements()[e]);
      }
}
