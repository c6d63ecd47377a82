#include "decoder/pass_team.h"

namespace mlxeff {

int64_t prepared_bytes(std::initializer_list<const Linear*> linears, int64_t rows, const RunOptions& options) {
  int64_t bytes = 0;
  for (const Linear* linear : linears)
    bytes += Product(linear->weight, nullptr, nullptr, rows, options.mode).workspace_bytes();
  return bytes;
}

void PassTeam::multiply(const float* x, std::initializer_list<Output> outputs, int64_t rows,
                        RowFunction<void> make_row) {
  const int count = int(outputs.size());
  Product products[most_products];
  bool owner[most_products];
  int64_t pieces[most_products], piece[most_products], total = 0;
  char* workspace = prepared_;
  for (int i = 0; i < count; ++i) {
    const Output& output = outputs.begin()[i];
    products[i] = Product(output.linear->weight, x, output.y, rows, options.mode);
    int same = 0;
    while (same < i && !products[i].same_input(products[same])) ++same;
    owner[i] = same == i;
    if (owner[i]) {
      products[i].bind(workspace);
      workspace += products[i].workspace_bytes();
    } else {
      products[i].share_input(products[same]);
    }
    piece[i] = products[i].piece(team.count);
    pieces[i] = ceil_div(products[i].matrix().N, piece[i]);
    total += pieces[i];
  }
  team.for_chunks(rows, team.row_chunk(rows), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) make_row(r);
    for (int i = 0; i < count; ++i)
      if (owner[i]) products[i].prepare(begin, end);
  });
  team.for_chunks(total, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      int i = 0;
      int64_t index = p;
      while (index >= pieces[i]) index -= pieces[i++];
      const int64_t n = index * piece[i];
      check(products[i].run(n, min_of(n + piece[i], products[i].matrix().N)));
    }
  });
}

}  // namespace mlxeff
