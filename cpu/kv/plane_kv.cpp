// The store of plane_kv.h. Few queries attend to the planes directly. For many queries, those of a prompt, the keys and
// values are first decoded to fp32, of one head at a time, so that the blocked dense kernel, which is bound by
// arithmetic, reads them without decoding. Both compute in the rotated space: queries are rotated first, and the output
// last.
#include "kv/plane_kv.h"

namespace mlxeff {
namespace {

constexpr int64_t few_rows = 32;  // rows of a KV head for which the planes are read directly

bool few(const Span& span, const AttentionSizes& sizes) {
  return span.length * (sizes.heads / sizes.groups) <= few_rows;
}

int64_t first_seen_tile(const Span& span, const AttentionSizes& sizes) {
  return sizes.window > 0 ? max_of(0, span.position(0) + 1 - sizes.window) / tile_tokens : 0;
}

// The arguments of the dense kernels for many queries of one KV head and sequence, which see the tokens from the first
// seen tile on.
AttentionArgs dense_args(const Span& span, const AttentionSizes& sizes, const RunOptions& options) {
  AttentionArgs args =
      attention_args({1, span.length, span.end}, {sizes.heads / sizes.groups, 1, sizes.size, sizes.window}, options);
  args.T -= first_seen_tile(span, sizes) * tile_tokens;
  args.q = args.out = {nullptr, 0, sizes.size, sizes.heads * sizes.size, MLXEFF_F32};
  args.k = args.v = {nullptr, 0, 0, sizes.size, MLXEFF_F32};
  return args;
}

}  // namespace

PlaneArgs PlaneKv::plane_args(const Span& span, const AttentionSizes& sizes) const {
  PlaneArgs args = {};
  args.planes = planes_;
  args.span = span;
  args.sizes = sizes;
  args.first_part = first_seen_tile(span, sizes) / plane_part_tiles;
  args.parts = ceil_div(span.end, plane_part_tokens) - args.first_part;
  return args;
}

int64_t PlaneKv::workspace_bytes(const Span& span, const AttentionSizes& sizes, const RunOptions& options,
                                 int threads) const {
  int64_t most = span.length > 1 ? span.rows() * sizes.groups * 2 * group_bytes(sizes.size) : 0;
  // `attend` may be called with fewer queries than `append`.
  const int64_t lengths[] = {span.length, 1};
  for (const int64_t length : lengths) {
    const Span part = {span.batch, length, span.end};
    const int64_t rows = part.rows() * sizes.heads;
    if (few(part, sizes)) {
      most = max_of(most, rows * plane_args(part, sizes).parts * (sizes.size + 2) * 4);
    } else {
      const AttentionArgs args = dense_args(part, sizes, options);
      most = max_of(most, (2 * args.T * sizes.size + rows * sizes.size) * 4 + plan_attention(args, threads).workspace);
    }
  }
  return most;
}

int PlaneKv::append(Team& team, const NewRows& rows, const RunOptions&, void* workspace) {
  const Span& span = rows.span;
  const int64_t groups = rows.sizes.groups, size = rows.sizes.size, bytes = group_bytes(size);
  const PlaneKernels& kernels = MLXEFF_DISPATCH(plane_kernels);
  uint8_t* const encoded = static_cast<uint8_t*>(workspace);  // (rows, groups, key and value)
  bool failed = false;                                        // a piece of work of this team member ran out of memory
  team.for_rows(span.rows(), [&](int64_t r) {
    const NewRow row = rows.finish(r);
    float* const keys = static_cast<float*>(scratch(Scratch::panel, size_t(groups * size) * 4));
    if (!keys) {
      failed = true;
      return;
    }
    rows.rotate(r, row, {keys, 0, size, 0, MLXEFF_F32});
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t own[2 * group_bytes(largest_plane_head)];
      uint8_t* const key = span.length > 1 ? encoded + (r * groups + g) * 2 * bytes : own;
      kernels.encode(keys + g * size, size, key);
      kernels.encode(row.values + g * row.value_step, size, key + bytes);
      if (span.length == 1) kernels.put(planes_, size, r * groups + g, span.end - 1, key, key + bytes);
    }
  });
  if (span.length > 1) {  // tokens of one tile share bytes
    const int64_t start = span.end - span.length, first = start / tile_tokens,
                  tiles = ceil_div(span.end, tile_tokens) - first;
    team.for_rows(span.batch * groups * tiles, [&](int64_t task) {
      const int64_t head = task / tiles, b = head / groups, g = head % groups, tile = first + task % tiles;
      const int64_t end = min_of(span.end, (tile + 1) * tile_tokens);
      for (int64_t token = max_of(start, tile * tile_tokens); token < end; ++token) {
        const int64_t r = b * span.length + token - start;
        const uint8_t* const key = encoded + (r * groups + g) * 2 * bytes;
        kernels.put(planes_, size, head, token, key, key + bytes);
      }
    });
  }
  return failed ? MLXEFF_NO_MEMORY : MLXEFF_OK;
}

int PlaneKv::attend(Team& team, const Queries& queries, const RunOptions& options, void* workspace) {
  float* const memory = static_cast<float*>(workspace);
  return few(queries.span, queries.sizes) ? attend_few(team, queries, memory)
                                          : attend_many(team, queries, options, memory);
}

int PlaneKv::attend_few(Team& team, const Queries& queries, float* workspace) const {
  const Span& span = queries.span;
  const AttentionSizes& sizes = queries.sizes;
  PlaneArgs args = plane_args(span, sizes);
  args.queries = queries.queries, args.attended = queries.attended, args.partial = workspace;
  const PlaneKernels& kernels = MLXEFF_DISPATCH(plane_kernels);
  bool failed = false;
  const int64_t tasks = span.batch * sizes.groups * args.parts;
  // Several tasks at a time, since what one reads is prefetched during the one before.
  team.for_chunks(tasks, max_of(1, tasks / (4 * team.count)), [&](int64_t begin, int64_t end) {
    if (!kernels.attend(args, begin, end)) failed = true;
  });
  if (args.parts > 1)
    team.for_chunks(span.rows() * sizes.heads, 8, [&](int64_t begin, int64_t end) { kernels.merge(args, begin, end); });
  return failed ? MLXEFF_NO_MEMORY : MLXEFF_OK;
}

int PlaneKv::attend_many(Team& team, const Queries& queries, const RunOptions& options, float* workspace) const {
  const Span& span = queries.span;
  const AttentionSizes& sizes = queries.sizes;
  const int64_t size = sizes.size, rows = span.rows() * sizes.heads, repeats = sizes.heads / sizes.groups;
  const int64_t first = first_seen_tile(span, sizes), tiles = ceil_div(span.end, tile_tokens) - first;
  AttentionArgs args = dense_args(span, sizes, options);
  float *const keys = workspace, *const values = keys + args.T * size, *const rotated = values + args.T * size,
               *const partial = rotated + rows * size;
  const PlaneArgs planes = plane_args(span, sizes);
  const PlaneKernels& kernels = MLXEFF_DISPATCH(plane_kernels);
  const AttentionPlan plan = plan_attention(args, team.count);
  const AttentionKernels& dense = MLXEFF_DISPATCH(attention_kernels);
  bool failed = false;
  team.for_rows(rows, [&](int64_t row) { kernels.rotate(queries.queries + row * size, rotated + row * size, size); });
  for (int64_t head = 0; head < span.batch * sizes.groups; ++head) {
    const int64_t at = (head / sizes.groups * span.length * sizes.heads + head % sizes.groups * repeats) * size;
    args.k.data = keys, args.v.data = values, args.q.data = rotated + at, args.out.data = queries.attended + at;
    team.for_rows(tiles, [&](int64_t tile) {
      const int64_t place = tile * tile_tokens * size;
      kernels.dequantise(planes, head, first + tile, keys + place, values + place);
    });
    team.for_chunks(plan.tasks, 1, [&](int64_t begin, int64_t end) {
      if (!dense.run(args, plan, partial, begin, end)) failed = true;
    });
    if (plan.parts > 1)
      team.for_chunks(span.length * repeats, 64,
                      [&](int64_t begin, int64_t end) { dense.merge(args, plan, partial, begin, end); });
  }
  team.for_rows(rows, [&](int64_t row) {
    float* const out = queries.attended + row * size;
    kernels.rotate(out, out, size);
  });
  return failed ? MLXEFF_NO_MEMORY : MLXEFF_OK;
}

}  // namespace mlxeff
