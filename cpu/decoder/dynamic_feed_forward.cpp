// A routed pass, in steps of the team (PassTeam). The rows of x are called tokens here, to tell them from the rows of
// matrices. Group e holds the tokens of expert e; sorted tokens are those of the widest expert's group first, in their
// own order within a group, so that the first needed[e] of them need the neurons of expert e.
//
//   1. tokens are made and routed
//   2. tokens are sorted, and their inputs prepared in that order
//   3. the products of gate and up: of block e, the neurons that expert e has and expert e - 1 has not, for the first
//      needed[e] tokens only
//   4. activations, prepared for the products of their expert
//   5. the products of down, and of right, of each group
//   6. the products of left of each group, where an expert has them
//
// Few tokens get the same bits together as alone, and decoding no step more than the gated feed-forward: steps 1 and 2
// are then one, tokens keep their order up to step 4, and step 3 has a single block, as wide as the widest of their
// experts.
//
// How many pieces a step has depends on the largest matrices that it may need. A product takes as many of its share of
// them as it has rows for; the rest are empty.
#include "decoder/dynamic_feed_forward.h"

#include "decoder/decoder_kernels.h"
#include "rows/swiglu_kernels.h"

namespace mlxeff {
namespace {

constexpr int64_t few_tokens = 8;  // the products of so many tokens read the weights directly, see "Few rows" in README

int64_t padded(int64_t floats) { return round_up(floats, 16); }

WeightMatrix rows_of(const WeightMatrix& w, int64_t begin, int64_t end) {
  WeightMatrix part = w;
  slice_rows(w, begin, end - begin, &part);
  return part;
}

// A product, or two products with the same input.
class ProductPair {
 public:
  explicit ProductPair(const Product& first) : first_(first) {}
  ProductPair(const Product& first, const Product& second)
      : first_(first), second_(second), two_(true), shares_(second_.same_input(first_)) {}

  int64_t workspace_bytes() const {
    return first_.workspace_bytes() + (two_ && !shares_ ? second_.workspace_bytes() : 0);
  }
  // Takes its workspace from `memory`, and returns where that of others begins.
  char* bind(char* memory) {
    first_.bind(memory);
    if (!two_) return memory + first_.workspace_bytes();
    if (shares_) second_.share_input(first_);
    else second_.bind(memory + first_.workspace_bytes());
    return memory + workspace_bytes();
  }
  void prepare(int64_t begin, int64_t end) const {
    first_.prepare(begin, end);
    if (two_ && !shares_) second_.prepare(begin, end);
  }
  const Product& first() const { return first_; }
  const Product& second() const { return second_; }
  int64_t least_piece(int threads) const { return min_of(first_.piece(threads), second_.piece(threads)); }

 private:
  Product first_, second_;
  bool two_ = false, shares_ = false;
};

// The rows [begin, end) of a matrix.
struct Range {
  int64_t begin, end;
};

// The rows of the product's matrix that make up piece `index`, if the product may take `most` pieces. They are at least
// as many as the product wants for a piece; the last pieces may be empty.
Range share_of(const Product& product, int64_t index, int64_t most, int threads) {
  const int64_t N = product.matrix().N, unit = product.piece(threads);
  const int64_t size = unit * ceil_div(ceil_div(N, unit), most);
  return {min_of(N, index * size), min_of(N, (index + 1) * size)};
}

// The largest workspace of products with `matrices`: of all that have at most `rows` rows; and of those with at most
// 31, for which all kinds of products may need more for each row.
struct Largest {
  int64_t all, few;
};
Largest largest_workspace(std::initializer_list<const WeightMatrix*> matrices, int64_t rows, int mode) {
  Largest most = {0, 0};
  const auto bytes = [&](int64_t count) {
    int64_t total = 0;
    for (const WeightMatrix* w : matrices)
      if (w->N) total += Product(*w, nullptr, nullptr, count, mode).workspace_bytes();
    return total;
  };
  most.few = bytes(min_of(rows, few_tokens));
  if (rows > few_tokens) most.few = max_of(most.few, bytes(min_of(rows, 31)));
  most.all = rows > 31 ? max_of(most.few, bytes(rows)) : most.few;
  return most;
}

}  // namespace

// The steps of one routed pass, as one member of the team takes them. Only the bodies of steps read the workspace; what
// they derive from it they keep for later steps.
class DynamicFeedForward::Routed {
 public:
  Routed(DynamicFeedForward& layer, PassTeam& pass, const FeedForwardRows& rows, void* workspace)
      : layer_(layer), pass_(pass), given_(rows), threads_(pass.team.count), tokens_(rows.rows),
        buffers_(layer, rows.rows, workspace) {}

  Routed(const Routed&) = delete;
  // Counters are shared by the members, who would wait for each other if they counted every piece in them.
  ~Routed() {
    if (bytes_) layer_.bytes_.fetch_add(bytes_, std::memory_order_relaxed);
  }

  static int64_t workspace_floats(const DynamicFeedForward& layer, int64_t tokens) {
    return Buffers(layer, tokens, nullptr).floats;
  }

  void run() {
    if (few()) enter_few();
    else enter_many();
    activate();
    leave();
  }

 private:
  struct Buffers {
    Buffers(const DynamicFeedForward& layer, int64_t tokens, void* workspace) : base(static_cast<float*>(workspace)) {
      experts = reinterpret_cast<int32_t*>(part(tokens));
      order = reinterpret_cast<int32_t*>(part(tokens));
      gates = part(tokens * layer.width());
      ups = part(tokens * layer.width());
      hidden = tokens > few_tokens ? gates : part(tokens * layer.width());
      sorted = part(tokens * layer.dim());
      ranks = part(tokens * layer.widest_rank_);
    }
    float* part(int64_t count) {
      float* const at = base ? base + floats : nullptr;
      floats += padded(count);
      return at;
    }

    float* base;
    int64_t floats = 0;
    int32_t* experts;             // of each token
    int32_t* order;               // token of each place in the sorted order, for many tokens
    float *gates, *ups, *hidden;  // (tokens, width): hidden, the activations, in the sorted order
    float* sorted;                // (tokens, dim): inputs in the sorted order, later outputs
    float* ranks;                 // (tokens, widest rank): what `right` gives, in the sorted order
  };
  // The neurons of gate and up from `begin` on, for the first `tokens` tokens.
  struct Block {
    int64_t tokens;
    ProductPair products;
  };
  // Tokens [begin, begin + tokens) of the sorted order, and the products of their expert.
  struct Group {
    int64_t expert, begin, tokens;
    ProductPair products;  // down and right
  };

  bool few() const { return tokens_ <= few_tokens; }
  int64_t width_of(int64_t expert) const { return layer_.experts_[size_t(expert)].width(); }
  int64_t most_groups() const { return min_of(layer_.experts(), tokens_); }

  Range run_piece(const Product& product, int64_t index, int64_t most) {
    const Range range = share_of(product, index, most, threads_);
    if (range.begin == range.end) return range;
    pass_.check(product.run(range.begin, range.end));
    bytes_ += (range.end - range.begin) * bytes_of_row(product.matrix());
    return range;
  }

  void make_and_route(int64_t token) {
    given_.make_row(token);
    const int64_t expert = layer_.router_.pick(given_.x + token * layer_.dim(), pass_.options.dial);
    buffers_.experts[token] = int32_t(expert);
    layer_.tokens_[size_t(expert)].fetch_add(1, std::memory_order_relaxed);
    if (token == 0) bytes_ += layer_.router_.weight_bytes();
  }

  // The products of gate and up with the neurons [begin, end).
  ProductPair gate_and_up(int64_t begin, int64_t end, const float* x, int64_t tokens) const {
    const auto product = [&](const Linear& linear, float* y) {
      return Product(rows_of(linear.weight, begin, end), x, y + begin, tokens, pass_.options.mode, false, 0,
                     layer_.width());
    };
    return {product(layer_.gate_, buffers_.gates), product(layer_.up_, buffers_.ups)};
  }

  void enter_few() {
    ProductPair whole = gate_and_up(0, layer_.width(), given_.x, tokens_);
    whole.bind(pass_.prepared());
    pass_.team.for_rows(tokens_, [&](int64_t token) {
      layer_.router_.prefetch();
      make_and_route(token);
      whole.prepare(token, token + 1);
    });
    const int64_t most = ceil_div(layer_.width(), whole.least_piece(threads_));
    pass_.team.for_chunks(2 * most, 1, [&](int64_t begin, int64_t end) {
      if (blocks_.empty()) make_single_block(whole);
      for (int64_t p = begin; p < end; ++p) run_block(blocks_[0], p, most);
    });
  }

  // Its products read the inputs that those of the whole matrices have prepared: their form does not depend on how many
  // rows a matrix has.
  void make_single_block(const ProductPair& whole) {
    int64_t widest = 0;
    for (int64_t token = 0; token < tokens_; ++token) widest = max_of(widest, buffers_.experts[token]);
    if (widest + 1 == layer_.experts()) return blocks_.push_back({tokens_, whole});
    blocks_.push_back({tokens_, gate_and_up(0, width_of(widest), given_.x, tokens_)});
    blocks_[0].products.bind(pass_.prepared());
  }

  void enter_many() {
    pass_.team.for_rows(tokens_, [&](int64_t token) { make_and_route(token); });
    pass_.team.for_chunks(1, 1, [&](int64_t, int64_t) { sort(buffers_.order); });
    pass_.team.for_rows(tokens_, [&](int64_t place) {
      if (blocks_.empty()) make_blocks();
      const int64_t dim = layer_.dim();
      memcpy(buffers_.sorted + place * dim, given_.x + buffers_.order[place] * dim, size_t(dim) * sizeof(float));
      for (const Block& block : blocks_)
        if (place < block.tokens) block.products.prepare(place, place + 1);
    });
    const int64_t piece = gate_and_up(0, layer_.width(), given_.x, tokens_).least_piece(threads_);
    int64_t most[ExpertRouter::most_experts], total = 0;
    for (int64_t e = 0; e < layer_.experts(); ++e) {
      most[e] = ceil_div(width_of(e) - (e ? width_of(e - 1) : 0), piece);
      total += 2 * most[e];
    }
    pass_.team.for_chunks(total, 1, [&](int64_t begin, int64_t end) {
      if (blocks_.empty()) make_blocks();
      for (int64_t p = begin; p < end; ++p) {
        int64_t e = 0, index = p;
        while (index >= 2 * most[e]) index -= 2 * most[e++];
        if (size_t(e) < blocks_.size()) run_block(blocks_[size_t(e)], index, most[e]);
      }
    });
  }

  // Counts the tokens that need each expert's neurons, and writes the sorted order.
  void sort(int32_t* order) {
    count_needed();
    int64_t next[ExpertRouter::most_experts];
    for (int64_t e = 0; e < layer_.experts(); ++e) next[e] = needed_[e + 1];
    for (int64_t token = 0; token < tokens_; ++token) order[next[buffers_.experts[token]]++] = int32_t(token);
  }
  void count_needed() {
    for (int64_t& each : needed_) each = 0;
    for (int64_t token = 0; token < tokens_; ++token) ++needed_[buffers_.experts[token]];
    for (int64_t e = layer_.experts() - 1; e >= 0; --e) needed_[e] += needed_[e + 1];
  }

  // Blocks that no token needs are left out; they are the last ones.
  void make_blocks() {
    count_needed();
    char* memory = pass_.prepared();
    for (int64_t e = 0; e < layer_.experts() && needed_[e]; ++e) {
      blocks_.push_back({needed_[e], gate_and_up(e ? width_of(e - 1) : 0, width_of(e), buffers_.sorted, needed_[e])});
      memory = blocks_.back().products.bind(memory);
    }
  }

  // Piece `index` of a block's products, each of which may take `most` pieces.
  void run_block(const Block& block, int64_t index, int64_t most) {
    if (index < most) run_piece(block.products.first(), index, most);
    else run_piece(block.products.second(), index - most, most);
  }

  // Step 4. A token's activations go to its place in the sorted order. For many tokens, gates and ups have that order
  // already.
  void activate() {
    pass_.team.for_rows(tokens_, [&](int64_t place) {
      if (groups_.empty()) make_groups();
      const Group& group = group_of(place);
      activate(few() ? order_[place] : place, place, width_of(group.expert));
      group.products.prepare(place - group.begin, place - group.begin + 1);
    });
  }
  void activate(int64_t from, int64_t to, int64_t width) {
    const DecoderKernels& row = MLXEFF_DISPATCH(decoder_kernels);
    float *const gate = buffers_.gates + from * layer_.width(), *const up = buffers_.ups + from * layer_.width();
    if (layer_.gate_.bias) row.add(gate, layer_.gate_.bias, width);
    if (layer_.up_.bias) row.add(up, layer_.up_.bias, width);
    float* const hidden = buffers_.hidden + to * layer_.width();
    const bool reorders = !layer_.order_.empty() && width == layer_.width();
    MLXEFF_DISPATCH(swiglu_kernels).forward(gate, up, reorders ? up : hidden, width, MLXEFF_F32);
    if (reorders) reorder(up, layer_.order_.data(), width, hidden);
  }

  const Group& group_of(int64_t place) const {
    size_t i = 0;
    while (place >= groups_[i].begin + groups_[i].tokens) ++i;
    return groups_[i];
  }

  // Makes the groups that have tokens. The order of few tokens is derived once more by each member, that of many was
  // written in a step of its own.
  void make_groups() {
    if (few()) sort(few_order_);
    else count_needed();
    order_ = few() ? few_order_ : buffers_.order;
    groups_.reserve(size_t(most_groups()));
    char* memory = pass_.prepared();
    for (int64_t e = layer_.experts() - 1; e >= 0; --e) {
      const int64_t begin = needed_[e + 1], tokens = needed_[e] - begin;
      if (!tokens) continue;
      groups_.push_back({e, begin, tokens, down_and_right(e, begin, tokens)});
      memory = groups_.back().products.bind(memory);
    }
  }
  ProductPair down_and_right(int64_t e, int64_t begin, int64_t tokens) const {
    const DynamicExpert& expert = layer_.experts_[size_t(e)];
    const float* const hidden = buffers_.hidden + begin * layer_.width();
    const Product down(expert.down, hidden, output(begin, tokens), tokens, pass_.options.mode, false, layer_.width());
    if (!expert.rank()) return ProductPair(down);
    return {down, Product(expert.right, hidden, buffers_.ranks + begin * layer_.widest_rank_, tokens,
                          pass_.options.mode, false, layer_.width(), layer_.widest_rank_)};
  }
  ProductPair left(const Group& group) const {
    return ProductPair(Product(layer_.experts_[size_t(group.expert)].left,
                               buffers_.ranks + group.begin * layer_.widest_rank_, output(group.begin, group.tokens),
                               group.tokens, pass_.options.mode, true, layer_.widest_rank_));
  }

  // Where the outputs of a group are computed. A group of all tokens has them in their own order.
  float* output(int64_t begin, int64_t tokens) const {
    return tokens == tokens_ ? given_.out : buffers_.sorted + begin * layer_.dim();
  }
  // Moves columns of a group's finished outputs to where its tokens belong.
  void unsort(const Group& group, const Range& columns) const {
    if (group.tokens == tokens_) return;
    const int64_t dim = layer_.dim();
    for (int64_t place = group.begin; place < group.begin + group.tokens; ++place)
      memcpy(given_.out + order_[place] * dim + columns.begin, buffers_.sorted + place * dim + columns.begin,
             size_t(columns.end - columns.begin) * sizeof(float));
  }

  // Steps 5 and 6.
  void leave() {
    const Product widest(layer_.experts_.back().down, nullptr, nullptr, tokens_, pass_.options.mode);
    const bool corrected = layer_.widest_rank_ > 0;
    const int64_t downs = ceil_div(layer_.dim(), widest.piece(threads_)), rights = corrected ? 4 * threads_ : 0;
    pass_.team.for_chunks(most_groups() * (downs + rights), 1, [&](int64_t begin, int64_t end) {
      if (groups_.empty()) make_groups();
      for (int64_t p = begin; p < end; ++p)
        run_group(size_t(p / (downs + rights)), p % (downs + rights), downs, rights);
    });
    if (corrected) correct();
  }
  void run_group(size_t i, int64_t index, int64_t downs, int64_t rights) {
    if (i >= groups_.size()) return;
    const Group& group = groups_[i];
    const bool corrected = layer_.experts_[size_t(group.expert)].rank() > 0;
    if (index >= downs) {
      if (corrected) run_piece(group.products.second(), index - downs, rights);
      return;
    }
    const Range columns = run_piece(group.products.first(), index, downs);
    if (!corrected) unsort(group, columns);
  }

  void correct() {
    pass_.team.for_rows(tokens_, [&](int64_t place) {
      if (lefts_.empty()) make_lefts();
      const Group& group = group_of(place);
      if (layer_.experts_[size_t(group.expert)].rank())
        lefts_[size_t(&group - groups_.data())].prepare(place - group.begin, place - group.begin + 1);
    });
    const int64_t most = 4 * threads_;
    pass_.team.for_chunks(most_groups() * most, 1, [&](int64_t begin, int64_t end) {
      if (lefts_.empty()) make_lefts();
      for (int64_t p = begin; p < end; ++p) run_left(size_t(p / most), p % most, most);
    });
  }
  void make_lefts() {
    if (groups_.empty()) make_groups();
    char* memory = pass_.prepared();
    for (const Group& group : groups_) {
      lefts_.push_back(left(group));
      if (layer_.experts_[size_t(group.expert)].rank()) memory = lefts_.back().bind(memory);
    }
  }
  void run_left(size_t i, int64_t index, int64_t most) {
    if (i >= groups_.size() || !layer_.experts_[size_t(groups_[i].expert)].rank()) return;
    unsort(groups_[i], run_piece(lefts_[i].first(), index, most));
  }

  DynamicFeedForward& layer_;
  PassTeam& pass_;
  const FeedForwardRows& given_;
  const int threads_;
  const int64_t tokens_;
  const Buffers buffers_;
  int64_t bytes_ = 0;  // that this member has read
  std::vector<Block> blocks_;
  std::vector<Group> groups_;
  std::vector<ProductPair> lefts_;  // of the groups
  int64_t needed_[ExpertRouter::most_experts + 1];
  int32_t few_order_[few_tokens];
  const int32_t* order_ = nullptr;
};

DynamicFeedForward::DynamicFeedForward(const Linear& gate, const Linear& up, const Linear& down,
                                       std::vector<DynamicExpert> narrower, ExpertRouter router,
                                       std::vector<int32_t> order)
    : FeedForward(down.bias), gate_(gate), up_(up), experts_(std::move(narrower)), router_(std::move(router)),
      order_(std::move(order)), widest_(gate, up, down, order_.empty() ? nullptr : order_.data()),
      tokens_(experts_.size() + 1) {
  experts_.push_back({down.weight});
  for (const DynamicExpert& expert : experts_) widest_rank_ = max_of(widest_rank_, expert.rank());
}

FeedForward::Needs DynamicFeedForward::needs(int64_t rows, const RunOptions& options) const {
  if (!options.routed) return widest_.needs(rows, options);
  const Largest entering = largest_workspace({&gate_.weight, &up_.weight}, rows, options.mode);
  // Each block may have all rows, but groups share them: beyond a few rows each, they need no more than one group of
  // all rows would.
  const int64_t blocks = rows > few_tokens ? experts() * entering.all : entering.all;
  Largest leaving = {0, 0}, correcting = {0, 0};
  const auto share = [](Largest& sum, const Largest& group) {
    sum = {max_of(sum.all, group.all), sum.few + group.few};
  };
  for (const DynamicExpert& expert : experts_) {
    share(leaving, largest_workspace({&expert.down, &expert.right}, rows, options.mode));
    share(correcting, largest_workspace({&expert.left}, rows, options.mode));
  }
  const int64_t groups = max_of(leaving.few + leaving.all, correcting.few + correcting.all);
  return {Routed::workspace_floats(*this, rows) * int64_t(sizeof(float)), max_of(blocks, groups)};
}

void DynamicFeedForward::run(PassTeam& pass, const FeedForwardRows& rows, void* workspace) {
  if (pass.options.routed) Routed(*this, pass, rows, workspace).run();
  else run_widest(pass, rows, workspace);
}

void DynamicFeedForward::run_widest(PassTeam& pass, const FeedForwardRows& rows, void* workspace) {
  const auto make_row = [&](int64_t r) {
    rows.make_row(r);
    tokens_.back().fetch_add(1, std::memory_order_relaxed);
    if (r != 0) return;
    int64_t bytes = 0;
    for (const WeightMatrix* w : {&gate_.weight, &up_.weight, &experts_.back().down}) bytes += w->N * bytes_of_row(*w);
    bytes_.fetch_add(bytes, std::memory_order_relaxed);
  };
  widest_.run(pass, {rows.x, rows.out, rows.rows, &make_row}, workspace);
}

std::optional<FeedForward::Usage> DynamicFeedForward::usage() const {
  Usage usage = {{}, bytes_.load(std::memory_order_relaxed)};
  for (const std::atomic<int64_t>& each : tokens_) usage.counts.push_back(each.load(std::memory_order_relaxed));
  return usage;
}

}  // namespace mlxeff
