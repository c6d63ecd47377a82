// Attention over 4-bit planes. Scales and zeros are not applied to each element: those of a channel of keys are folded
// into the query, once a block, and those of a token of values into its weight.
//
//   score(t) = sum over e of (q_e scale_e) code(e, t) + sum over e of q_e zero_e
//   out(e)   = sum over t of (weight_t scale_t) code(t, e) + sum over t of weight_t zero_t
//
// All rows of a group, the R query heads and the S queries, share the codes that were loaded. The division of the
// blocks into parts depends on their number alone, and each row is computed as if it were the only one, so a row has
// the same bits whatever other rows there are. Memory is read once, in sequence: per token and head E bytes with both
// planes, half of that with one, and the scales.
#include "kv/plane_kernels.h"

#include "attention/attention_rows.h"
#include "base/pool.h"

namespace mlxeff {
namespace MLXEFF_ISA {

constexpr int unit = 2 * VL;  // codes in VL bytes
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int tile_rows = 4;
#else
constexpr int tile_rows = 2;
#endif
constexpr float middle = 7.5f / 16.0f;

// VL bytes, each as an integer of 32 bits. The compilers make slow code of a conversion of vector types.
MLXEFF_INLINE vi load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#elif defined(__ARM_NEON)
  uint32_t word;
  memcpy(&word, p, sizeof word);
  return (vi)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(word))));
#else
  vi values;
  for (int i = 0; i < VL; ++i) values[i] = p[i];
  return values;
#endif
}

// The codes at even and at odd places of one unit.
template <bool full>
MLXEFF_INLINE void load_codes(const uint8_t* upper, const uint8_t* lower, vf* even, vf* odd) {
  const vi u = load_bytes(upper);
  if (full) {
    const vi l = load_bytes(lower);
    *even = __builtin_convertvector((u & 15) << 4 | (l & 15), vf);
    *odd = __builtin_convertvector((u & 0xf0) | l >> 4, vf);
  } else {
    *even = __builtin_convertvector(u & 15, vf);
    *odd = __builtin_convertvector(u >> 4, vf);
  }
}

// The factor of a scale, and the part of it that is added to a zero.
template <bool full>
struct View {
  static constexpr float factor = full ? 1.0f / 16.0f : 1.0f, shift = full ? 0.0f : middle;
};

// What one task needs of one group of heads. Rows are numbered as in attention_kernels.h.
struct Task {
  const PlaneArgs& a;
  int64_t rows, width, places;  // rows; floats of a row of queries; floats of a row of sums
  float *queries, *scaled, *scores, *sums, *zeros;
  RowState* states;
};

template <bool full, int rows, int units>
MLXEFF_INLINE void score_units(const Task& x, int64_t row, const uint8_t* upper, const uint8_t* lower,
                               const float* constants, float* scores) {
  const int64_t E = x.a.sizes.size, step = x.a.block / 2;
  vf sums[rows][units][2];
  for (int r = 0; r < rows; ++r)
    for (int u = 0; u < units; ++u) sums[r][u][0] = sums[r][u][1] = broadcast(constants[r]);
  for (int64_t e = 0; e < E; ++e) {
    vf codes[units][2];
    for (int u = 0; u < units; ++u)
      load_codes<full>(upper + e * step + u * VL, lower + e * step + u * VL, &codes[u][0], &codes[u][1]);
    for (int r = 0; r < rows; ++r) {
      const vf query = broadcast(x.scaled[(row + r) * x.width + e]);
      for (int u = 0; u < units; ++u)
        for (int half = 0; half < 2; ++half) sums[r][u][half] = fma(query, codes[u][half], sums[r][u][half]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int u = 0; u < units; ++u) {
      vf low, high;
      interleave(sums[r][u][0], sums[r][u][1], &low, &high);
      store(scores + r * x.a.block + u * unit, low);
      store(scores + r * x.a.block + u * unit + VL, high);
    }
}

// Computes the scores of all tokens of a block for the rows [row, row + rows).
template <bool full, int rows>
static inline void score_rows(const Task& x, int64_t row, const Plane& keys) {
  const PlaneArgs& a = x.a;
  const int64_t E = a.sizes.size;
  float constants[rows];
  for (int r = 0; r < rows; ++r) {
    const float* const query = x.queries + (row + r) * x.width;
    float* const scaled = x.scaled + (row + r) * x.width;
    vf constant = broadcast(0.0f);
    for (int64_t e = 0; e < E; e += VL) {
      const vf q = load(query + e), s = load(keys.scale + e);
      store(scaled + e, q * (s * View<full>::factor));
      constant = fma(q, fma(s, broadcast(View<full>::shift), load(keys.zero + e)), constant);
    }
    constants[r] = sum(constant);
  }
  const uint8_t *upper = keys.upper, *lower = full ? keys.lower : upper;
  float* const scores = x.scores + row * a.block;
  int64_t token = 0;
  for (; token + 2 * unit <= a.block; token += 2 * unit)
    score_units<full, rows, 2>(x, row, upper + token / 2, lower + token / 2, constants, scores + token);
  for (; token < a.block; token += unit)
    score_units<full, rows, 1>(x, row, upper + token / 2, lower + token / 2, constants, scores + token);
}

template <bool full, int rows, int units>
MLXEFF_INLINE void value_units(const Task& x, int64_t row, const uint8_t* upper, const uint8_t* lower, float* out) {
  const PlaneArgs& a = x.a;
  const float* const weights = x.scores + row * a.block;
  vf sums[rows][units][2];
  for (int r = 0; r < rows; ++r)
    for (int u = 0; u < units; ++u)
      for (int half = 0; half < 2; ++half) sums[r][u][half] = load(out + r * x.places + (2 * u + half) * VL);
  for (int64_t token = 0; token < a.block; ++token) {
    const int64_t byte = token * x.places / 2;
    vf codes[units][2];
    for (int u = 0; u < units; ++u)
      load_codes<full>(upper + byte + u * VL, lower + byte + u * VL, &codes[u][0], &codes[u][1]);
    for (int r = 0; r < rows; ++r) {
      const vf weight = broadcast(weights[r * a.block + token]);
      for (int u = 0; u < units; ++u)
        for (int half = 0; half < 2; ++half) sums[r][u][half] = fma(weight, codes[u][half], sums[r][u][half]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int u = 0; u < units; ++u)
      for (int half = 0; half < 2; ++half) store(out + r * x.places + (2 * u + half) * VL, sums[r][u][half]);
}

// Adds the weighted values of a block to the sums of the rows [row, row + rows). The weights lie where the scores were.
template <bool full, int rows>
static inline void value_rows(const Task& x, int64_t row, const Plane& values) {
  const PlaneArgs& a = x.a;
  for (int r = 0; r < rows; ++r) {
    float* const weights = x.scores + (row + r) * a.block;
    vf constant = broadcast(0.0f);
    for (int64_t t = 0; t < a.block; t += VL) {
      const vf weight = load(weights + t), s = load(values.scale + t);
      constant = fma(weight, fma(s, broadcast(View<full>::shift), load(values.zero + t)), constant);
      store(weights + t, weight * (s * View<full>::factor));
    }
    x.zeros[row + r] += sum(constant);
  }
  const uint8_t *upper = values.upper, *lower = full ? values.lower : upper;
  float* const out = x.sums + row * x.places;
  int64_t channel = 0;
  for (; channel + 2 * unit <= x.places; channel += 2 * unit)
    value_units<full, rows, 2>(x, row, upper + channel / 2, lower + channel / 2, out + channel);
  for (; channel < x.places; channel += unit)
    value_units<full, rows, 1>(x, row, upper + channel / 2, lower + channel / 2, out + channel);
}

static void run_block(const Task& x, int64_t group, int64_t index) {
  const PlaneArgs& a = x.a;
  const int64_t place = group * a.capacity + index, R = a.sizes.heads / a.sizes.groups, first = index * a.block;
  const Plane keys = key_plane(a, place), values = value_plane(a, place);
  for_row_tiles<tile_rows>(x.rows, [&](int64_t row, auto tile) {
    constexpr int rows = decltype(tile)::value;
    if (keys.lower) score_rows<true, rows>(x, row, keys);
    else score_rows<false, rows>(x, row, keys);
  });
  for (int64_t row = 0; row < x.rows; ++row) {
    const int64_t last = a.span.end - a.span.length + row / R + 1;
    const int64_t seen = a.sizes.window > 0 ? max_of(0, last - a.sizes.window) - first : 0;
    float* const scores = x.scores + row * a.block;
    const float factor = softmax_block(scores, scores, 0, a.block, seen, a.block, &x.states[row]);
    scale_row(x.sums + row * x.places, x.places, factor);
    x.zeros[row] *= factor;
  }
  for_row_tiles<tile_rows>(x.rows, [&](int64_t row, auto tile) {
    constexpr int rows = decltype(tile)::value;
    if (values.lower) value_rows<true, rows>(x, row, values);
    else value_rows<false, rows>(x, row, values);
  });
}

static float* partial_of(const PlaneArgs& a, int64_t b, int64_t h, int64_t i, int64_t part) {
  return a.partial + (((b * a.sizes.heads + h) * a.span.length + i) * a.parts + part) * (a.sizes.size + 2);
}

static bool attend_task(const PlaneArgs& a, int64_t task) {
  const int64_t part = task % a.parts, group = task / a.parts, b = group / a.sizes.groups, g = group % a.sizes.groups;
  const int64_t R = a.sizes.heads / a.sizes.groups, E = a.sizes.size, rows = a.span.length * R;
  const int64_t width = round_up(E, VL), places = a.width();
  const size_t floats = size_t(rows * (2 * width + a.block + places + 1));
  float* const memory = static_cast<float*>(scratch(Scratch::panel, floats * 4 + size_t(rows) * sizeof(RowState)));
  if (!memory) return false;
  Task x = {a,       rows,    width,  places, memory, memory + rows * width, memory + 2 * rows * width,
            nullptr, nullptr, nullptr};
  x.sums = x.scores + rows * a.block;
  x.zeros = x.sums + rows * places;
  x.states = reinterpret_cast<RowState*>(x.zeros + rows);
  const float scale = log2_e / sqrtf(float(E));
  for (int64_t row = 0; row < rows; ++row) {
    const float* const query = a.queries + ((b * a.span.length + row / R) * a.sizes.heads + g * R + row % R) * E;
    load_query(x.queries + row * width, width, reinterpret_cast<const char*>(query), MLXEFF_F32, E, scale);
    x.states[row] = {-INFINITY, 0.0f};
    x.zeros[row] = 0.0f;
  }
  memset(x.sums, 0, size_t(rows * places) * 4);
  for (int64_t index = part * a.part_blocks; index < min_of((part + 1) * a.part_blocks, a.blocks); ++index)
    run_block(x, group, index);
  for (int64_t row = 0; row < rows; ++row) {
    float* const partial = partial_of(a, b, g * R + row % R, row / R, part);
    partial[0] = x.states[row].max, partial[1] = x.states[row].sum;
    const float* const sums = x.sums + row * places;
    for (int64_t e = 0; e < E; ++e)  // sums hold the even places of a unit, then the odd ones
      partial[2 + e] = sums[e / unit * unit + e % 2 * VL + e % unit / 2] + x.zeros[row];
  }
  return true;
}

static bool attend(const PlaneArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    if (!attend_task(a, task)) return false;
  return true;
}

static void merge(const PlaneArgs& a, const float* tail, const float* tail_lse, const Heads& out, int64_t begin,
                  int64_t end) {
  const int64_t E = a.sizes.size, S = a.span.length, H = a.sizes.heads;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / (H * S), h = row / S % H, i = row % S;
    const float own = tail_lse[row] * log2_e;
    const float* const partial = partial_of(a, b, h, i, 0);
    float peak = own;
    for (int64_t part = 0; part < a.parts; ++part) peak = fmaxf(peak, partial[part * (E + 2)]);
    float total = exp2f(own - peak);
    float* const to = reinterpret_cast<float*>(head_row(out, b, h, i));
    for (int64_t e = 0; e < E; ++e) to[e] = tail[row * E + e] * total;
    for (int64_t part = 0; part < a.parts; ++part) {
      const float* const from = partial + part * (E + 2);
      const float factor = exp2f(from[0] - peak);
      total += from[1] * factor;
      for (int64_t e = 0; e < E; ++e) to[e] += from[2 + e] * factor;
    }
    const float inverse = 1.0f / total;
    for (int64_t e = 0; e < E; ++e) to[e] *= inverse;
  }
}

// Writes `count` numbers, a multiple of `unit`, of one group.
template <bool full>
static void decode_row(const uint8_t* upper, const uint8_t* lower, float scale, float zero, int64_t count, float* to) {
  const vf factor = broadcast(scale * View<full>::factor), shift = broadcast(zero + scale * View<full>::shift);
  for (int64_t i = 0; i < count; i += unit) {
    vf even, odd, low, high;
    load_codes<full>(upper + i / 2, lower + i / 2, &even, &odd);
    interleave(fma(even, factor, shift), fma(odd, factor, shift), &low, &high);
    store(to + i, low);
    store(to + i + VL, high);
  }
}

static void decode_group(const Plane& plane, int64_t group, int64_t count, float* to) {
  const int64_t byte = group * count / 2;
  const float scale = to_float(plane.scale[group]), zero = to_float(plane.zero[group]);
  if (plane.lower) decode_row<true>(plane.upper + byte, plane.lower + byte, scale, zero, count, to);
  else decode_row<false>(plane.upper + byte, plane.upper + byte, scale, zero, count, to);
}

static bool dequantise(const PlaneArgs& a, float* keys, float* values, int64_t tokens, int64_t begin, int64_t end) {
  const int64_t E = a.sizes.size, G = a.block;
  float* const buffer = static_cast<float*>(scratch(Scratch::panel, size_t(max_of(E * G, a.width())) * 4));
  if (!buffer) return false;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task / a.blocks, index = task % a.blocks, place = group * a.capacity + index;
    float *const to_keys = keys + (group * tokens + index * G) * E, *const to_values =
                                                                        values + (group * tokens + index * G) * E;
    const Plane of_keys = key_plane(a, place), of_values = value_plane(a, place);
    for (int64_t e = 0; e < E; ++e) decode_group(of_keys, e, G, buffer + e * G);
    for (int64_t e = 0; e < E; e += VL)
      for (int64_t t = 0; t < G; t += VL) {
        vf tile[VL];
        for (int i = 0; i < VL; ++i) tile[i] = load(buffer + (e + i) * G + t);
        transpose(tile);
        for (int i = 0; i < VL; ++i) store(to_keys + (t + i) * E + e, tile[i]);
      }
    for (int64_t t = 0; t < G; ++t) {
      decode_group(of_values, t, a.width(), buffer);
      memcpy(to_values + t * E, buffer, size_t(E) * 4);
    }
  }
  return true;
}

const PlaneKernels& plane_kernels() {
  static const PlaneKernels table = {attend, merge, dequantise};
  return table;
}

}  // namespace MLXEFF_ISA
}  // namespace mlxeff
