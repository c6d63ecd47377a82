// SeedLM (arXiv 2410.10714): products with weights that are decoded from seeds inside the kernel. The stored layouts
// are in mlxeff/seedlm/format.py; a block stands for the C weights
//
//   w[c] = fl32(isum[c] * fl32(2^e / 32767)),  isum[c] = sum_p q[p] (V[c][p] - 32768),  V[c][p] = state number c P + p.
//
// State n is the 16-bit window of one bit stream at bit n. The stream is the seed (16 bits) and an extension, which
// depends linearly over GF(2) on the seed: XOR of two table entries. A window that ends below bit 23 of a word becomes
// the float 1 + V 2^(k-23) with one AND, since the exponent bits are already there: no shift, no conversion, and those
// are the slow instructions of Apple's GPUs.
//
// Letters: C columns and P states a block, R rows a simdgroup computes. Sums are float32 whatever the inputs' type.
// Input pointers are template parameters: MLX passes arrays of fewer than 8 elements in the constant address space.

using namespace metal;

struct Block {
  uint seed;          // 16 bits
  uint coefficients;  // 4 bits each from bit 0, two's complement; higher bits are undefined
  uint code;          // 4 bits
};

// Format "4": one word a block.
template <typename Words>
struct Packed {
  static constant constexpr const int C = 8;
  static constant constexpr const int P = 3;
  using Entry = uint;

  Words blocks;
  uint count;  // blocks a row

  Block load(uint index) const {
    uint word = blocks[index];
    return Block{word & 0xFFFF, word >> 16, word >> 28};
  }
};

// Formats "4.5" and "3": three arrays.
template <int C_, int P_, typename Entry_, typename Seeds, typename Coefficients, typename Exponents>
struct Planar {
  static constant constexpr const int C = C_;
  static constant constexpr const int P = P_;
  using Entry = Entry_;

  Seeds seeds;
  Coefficients coefficients;
  Exponents exponents;
  uint count;

  Block load(uint index) const {  // count is even: the index has the block's parity
    uint pair = exponents[index >> 1];
    return Block{seeds[index], coefficients[index], (index & 1) != 0 ? pair >> 4 : pair & 15};
  }
};

inline float power_of_two(int exponent) { return as_type<float>(uint(exponent + 127) << 23); }

// The 4 stream bits that follow a register state; taps 0, 1, 3, 12.
inline uint next_four(uint state) { return (state ^ state >> 1 ^ state >> 3 ^ state >> 12) & 15; }

// Up to 32 stream bits after the state, lowest first; the state becomes the one that ends with them.
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

// The extension: bits 16 ... C P + 14 of the stream; `uint` holds 32 of them, `uint2` 64.
template <int states>
inline void extend(uint seed, thread uint& bits) {
  bits = next_bits(seed, states - 1);
}
template <int states>
inline void extend(uint seed, thread uint2& bits) {
  bits.x = next_bits(seed, 32);
  bits.y = next_bits(seed, states - 33);
}

// Entries 0 ... 255 for the low byte of a seed, 256 ... 511 for the high one. Ends with a barrier.
template <typename Store, typename Entry>
inline void fill_tables(threadgroup Entry* tables, uint thread_index, uint thread_count) {
  for (uint i = thread_index; i < 512; i += thread_count) {
    Entry bits;
    extend<Store::C * Store::P>(i < 256 ? i : (i - 256) << 8, bits);
    tables[i] = bits;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// words[j] holds the stream's bits 8 j ... 8 j + 22 from bit 0: windows j 8 + k are its bits k ... k + 15.
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
template <typename Store, typename Entry>
inline void look_up(uint seed, const threadgroup Entry* tables, thread uint* words) {
  stream_words<Store::C * Store::P / 8>(seed, tables[seed & 255] ^ tables[256 + (seed >> 8)], words);
}

// q[p] 2^(4p - 23), exact: the nibble becomes the mantissa of 1 + (q + 8) 2^(4p - 23).
inline float coefficient(uint coefficients, int p) {
  uint bits = (coefficients & 15u << 4 * p) ^ (0x3F800000u | 8u << 4 * p);
  return as_type<float>(bits) - (1.0f + power_of_two(4 * p - 20));
}

// 2^(e + shift): the scale of a block before the division by 32767.
inline float block_power(uint code, int bias, int shift) {
  return as_type<float>((code << 23) + (uint(bias - 8 + 127 + shift) << 23));
}

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

// The C weights of a block, to the bit: every step before the last product is exact.
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

// One block of `row` to out[0 ... cols - 1]. A thread a block; no tables, since a group would use them only once.
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

// What a product needs of C columns of x, for all rows, in the AND-only form. With f = 1 + V 2^(k-23) and
// xs = x 2^(23-k-4p), sum_c f xs - offset = 2^(-4p) sum_c x (V - 32768); 2^(-4p) meets the 2^(4p-23) of `coefficient`.
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

  // 32767 sum_c w[c] x[c]
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

// The plain form: a shift and a conversion a state. Slower on Apple's GPUs, more accurate: no large offsets cancel.
template <int C, int P>
struct Shifts {
  float x[C];

  void prepare(thread const float* columns) {
#pragma unroll
    for (int c = 0; c < C; c++) x[c] = columns[c];
  }

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

// Index of the first block of each of R rows; rows beyond the last one repeat it.
template <int R>
inline void row_starts(uint first, uint rows, uint count, thread uint* starts) {
#pragma unroll
  for (int r = 0; r < R; r++) starts[r] = min(first + r, rows - 1) * count;
}

// Adds the products of one block column to the sums of R rows, times 32767.
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

// out (rows) = W x. Threadgroups of 256 threads, R rows a simdgroup, the lanes over the blocks of a row: 32 neighbours
// read one line. Every lane keeps x ready for its block and uses it for R rows.
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

// Adds the products of one block column, decoded once, to the sums of N tokens and R rows.
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

// out (N, rows) = vectors (N, cols) W^T. As matvec, but the weights are decoded first and used N times.
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

// Columns a step, and the distance of rows in threadgroup memory: 4 more, against bank conflicts.
template <typename Store>
struct Tile {
  static constant constexpr const int rows = 64;
  static constant constexpr const int depth = 2 * Store::C;
  static constant constexpr const int pitch = 2 * Store::C + 4;
};

template <int M, typename Store, typename Vectors>
inline void load_tokens(Vectors vectors, uint token, uint column, uint tokens, uint cols, threadgroup float* tile,
                        uint thread_index) {
  for (uint i = thread_index; i < M * Tile<Store>::depth; i += 128) {
    uint t = i / Tile<Store>::depth, c = i % Tile<Store>::depth;
    bool inside = token + t < tokens && column + c < cols;
    tile[t * Tile<Store>::pitch + c] = inside ? float(vectors[(token + t) * cols + column + c]) : 0.0f;
  }
}

// 64 rows, two blocks of each: one block a thread. Beyond the last block, zero; beyond the last row, the last row.
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

// out (tokens, rows) = vectors (tokens, cols) W^T. A threadgroup of 128 threads makes M x 64 outputs, each of its 2 x 2
// simdgroups M/2 x 32 of them as 8 x 8 matrices in float32; a step decodes 64 x 2C weights once into threadgroup
// memory, unrounded.
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
  // The two neighbours that a lane holds of an 8 x 8 matrix.
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
