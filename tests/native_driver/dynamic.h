// Checks of the dynamic feed-forward, called as a pass calls it, on every member of a team: against plain loops, of few
// tokens together against the same tokens alone, and of the widest expert against the gated feed-forward.
#pragma once
#include <unistd.h>

#include <cstring>

#include "decoder/dynamic_feed_forward.h"
#include "products.h"
#include "seedlm.h"

// A matrix of one of several kinds, and its values.
struct AnyMatrix {
  std::vector<Matrix> dense;
  std::vector<QuantizedMatrix> quantised;
  std::vector<SeedMatrix> seeds;
  mlxeff::Linear linear;
  std::vector<float> values;

  static constexpr const char* kinds[] = {"f32", "f16", "bf16", "4 bits", "3 bits", "8 bits", "planes", "seeds"};

  AnyMatrix(const std::string& kind, int64_t N, int64_t K) {
    using mlxeff::WeightMatrix;
    if (kind == "seeds") {
      seeds.emplace_back(8, 3, Matrix::random(N, K, MLXEFF_F32, 0, 0.3f));
      linear.weight = WeightMatrix::of(seeds[0].c());
    } else if (kind == "f32" || kind == "f16" || kind == "bf16") {
      dense.push_back(Matrix::random(N, K, kind == "f32" ? MLXEFF_F32 : kind == "f16" ? MLXEFF_F16 : MLXEFF_BF16));
      linear.weight = WeightMatrix::of(dense[0].data(), dense[0].dtype, N, K);
    } else {
      for (int i = 0; i < (kind == "planes" ? 2 : 1); ++i)
        quantised.emplace_back(N, K, kind == "3 bits" ? 3 : kind == "8 bits" ? 8 : 4, 32, MLXEFF_F16);
      linear.weight = WeightMatrix::of(quantised[0].c());
      if (kind == "planes") linear.weight.lower = quantised[1].c();
    }
    values.resize(size_t(N * K));
    for (int64_t n = 0; n < N; ++n) mlxeff::read_row(linear.weight, n, values.data() + n * K);
  }
  double at(int64_t n, int64_t k) const { return double(values[size_t(n * linear.weight.K + k)]); }
};

// A dynamic feed-forward of three experts: the narrowest shares the widest one's down, the second has its own and a
// low-rank correction. A token's first value decides on its expert: the router weighs nothing else.
struct DynamicCase {
  static constexpr int64_t dim = 64, width = 160, rank = 24, widths[] = {32, 96, 160};
  AnyMatrix gate, up, down, second, left, right;
  Matrix gate_bias = Matrix::random(1, width), up_bias = Matrix::random(1, width), router = Matrix(2, dim),
         router_bias = Matrix(1, 2);
  std::vector<int32_t> order = shuffled();
  std::unique_ptr<mlxeff::DynamicFeedForward> dynamic;
  std::unique_ptr<mlxeff::GatedFeedForward> gated;

  DynamicCase(const std::string& kind, const std::string& other)
      : gate(kind, width, dim), up(other, width, dim), down(kind, dim, width), second(other, dim, widths[1]),
        left("f32", dim, rank), right(kind, rank, widths[1]) {
    gate.linear.bias = gate_bias.floats(), up.linear.bias = up_bias.floats();
    for (int64_t e = 0; e < 2; ++e) {
      for (int64_t k = 0; k < dim; ++k) router.set(e, k, k ? 0 : e ? 4 : 12);
      router_bias.set(0, e, e ? 0 : 4);
    }
    mlxeff::DynamicExpert first = {}, corrected = {second.linear.weight, left.linear.weight, right.linear.weight};
    RUN(mlxeff::slice_columns(down.linear.weight, 0, widths[0], &first.down));
    dynamic.reset(new mlxeff::DynamicFeedForward(
        gate.linear, up.linear, down.linear, {first, corrected},
        {mlxeff::ExpertRouter::Rule::lagrangian, router.floats(), router_bias.floats(), dim, {1, 2, 4}}, order));
    gated.reset(new mlxeff::GatedFeedForward(gate.linear, up.linear, down.linear, order.data()));
  }

  // The column of `down` that belongs to each neuron of the widest expert.
  static std::vector<int32_t> shuffled() {
    std::vector<int32_t> columns;
    for (int64_t i = 0; i < width; ++i) columns.push_back(int32_t((7 * i + 3) % width));
    return columns;
  }

  // With a dial of 1 the costs are exp(12 v + 4) + 1, exp(4 v) + 2 and 4, for the token's first value v.
  static float value_for(int64_t expert) { return expert == 0 ? -1.0f : expert == 1 ? -0.25f : 0.9f; }

  std::vector<double> want(const Matrix& input, int64_t token, int64_t expert) const {
    const int64_t k = widths[expert];
    std::vector<double> hidden, ranks(size_t(rank), 0), out(size_t(dim), 0);
    for (int64_t n = 0; n < k; ++n) {
      double g = gate_bias.at(0, n), u = up_bias.at(0, n);
      for (int64_t i = 0; i < dim; ++i) g += gate.at(n, i) * input.at(token, i), u += up.at(n, i) * input.at(token, i);
      hidden.push_back(g / (1 + std::exp(-g)) * u);
    }
    const AnyMatrix& last = expert == 1 ? second : down;
    for (int64_t n = 0; n < dim; ++n)
      for (int64_t i = 0; i < k; ++i)
        out[size_t(n)] += last.at(n, expert == 2 ? order[size_t(i)] : i) * hidden[size_t(i)];
    if (expert != 1) return out;
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t i = 0; i < k; ++i) ranks[size_t(r)] += right.at(r, i) * hidden[size_t(i)];
    for (int64_t n = 0; n < dim; ++n)
      for (int64_t r = 0; r < rank; ++r) out[size_t(n)] += left.at(n, r) * ranks[size_t(r)];
    return out;
  }

  // The bytes that tokens of `experts` read, with one product for each matrix or part of one that some of them need.
  int64_t bytes(const std::vector<int64_t>& experts) const {
    using mlxeff::bytes_of_row;
    const int64_t widest = widths[*std::max_element(experts.begin(), experts.end())];
    const auto& [g, u, d] = std::tie(gate.linear.weight, up.linear.weight, down.linear.weight);
    int64_t total = 2 * dim * 4 + widest * (bytes_of_row(g) + bytes_of_row(u));
    for (int64_t e = 0; e < 3; ++e) {
      if (std::find(experts.begin(), experts.end(), e) == experts.end()) continue;
      mlxeff::WeightMatrix part = second.linear.weight;
      if (e != 1) RUN(mlxeff::slice_columns(d, 0, widths[e], &part));
      total += dim * bytes_of_row(part);
      if (e == 1) total += rank * bytes_of_row(right.linear.weight) + dim * bytes_of_row(left.linear.weight);
    }
    return total;
  }
};

// Runs a feed-forward on tokens [first, first + tokens) of the inputs.
inline Matrix run_feed_forward(mlxeff::FeedForward& feed_forward, const Matrix& input, int64_t first, int64_t tokens,
                               const mlxeff::RunOptions& options) {
  const int64_t dim = input.columns;
  const mlxeff::FeedForward::Needs needs = feed_forward.needs(tokens, options);
  Workspace workspace(needs.workspace), prepared(needs.prepared);
  Matrix x(tokens, dim), out(tokens, dim);
  std::memcpy(out.data(), static_cast<const float*>(input.data()) + first * dim, size_t(tokens * dim) * 4);
  std::atomic<int> error{MLXEFF_OK};
  mlxeff::team_run([&](mlxeff::Team& team) {
    mlxeff::PassTeam pass(team, options, prepared.data(), error);
    const auto make_row = [&](int64_t r) {
      for (int64_t k = 0; k < dim; ++k) x.set(r, k, float(x.at(r, k) == x.at(r, k) ? NAN : out.at(r, k)));
    };
    feed_forward.run(pass, {x.floats(), out.floats(), tokens, &make_row}, workspace.data());
  });
  CHECK(error == MLXEFF_OK);
  return out;
}

inline bool same_bits(const Matrix& a, const Matrix& b) {
  return std::memcmp(a.data(), b.data(), size_t(a.rows * a.columns) * 4) == 0;
}

// Tokens whose experts follow each other in the pattern, their outputs and the counters.
inline void check_dynamic(DynamicCase& given, int64_t tokens, const std::vector<int64_t>& pattern) {
  std::vector<int64_t> experts, counts(3, 0);
  Matrix input = Matrix::random(tokens, DynamicCase::dim);
  std::vector<std::vector<double>> want;
  double size = 1;
  for (int64_t t = 0; t < tokens; ++t) {
    experts.push_back(pattern[size_t(t) % pattern.size()]);
    ++counts[size_t(experts.back())];
    input.set(t, 0, DynamicCase::value_for(experts.back()));
    want.push_back(given.want(input, t, experts.back()));
    for (const double each : want.back()) size = std::max(size, std::fabs(each));
  }
  const mlxeff::FeedForward::Usage before = *given.dynamic->usage();
  int64_t passes = 0;
  each_setting([&] {
    for (const int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_BF16, MLXEFF_COMPUTE_INT8}) {
      const Matrix out = run_feed_forward(*given.dynamic, input, 0, tokens, {mode, true, 1});
      out.check("dynamic feed-forward", size * (mode == MLXEFF_EXACT ? 1e-5 : 8e-2),
                [&](int64_t r, int64_t n) { return want[size_t(r)][size_t(n)]; });
      ++passes;
    }
  });
  const mlxeff::FeedForward::Usage after = *given.dynamic->usage();
  for (size_t e = 0; e < 3; ++e) CHECK(after.counts[e] - before.counts[e] == passes * counts[e]);
  CHECK(after.bytes - before.bytes == passes * given.bytes(experts));
}

// Up to 8 tokens of mixed experts have the bits that each has alone.
inline void check_dynamic_alone(DynamicCase& given) {
  Matrix input = Matrix::random(8, DynamicCase::dim);
  for (int64_t t = 0; t < 8; ++t) input.set(t, 0, DynamicCase::value_for(t * 5 % 3));
  each_setting([&] {
    for (const int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_INT8}) {
      const mlxeff::RunOptions options = {mode, true, 1};
      for (int64_t first : {0, 3})
        for (int64_t count = 2; first + count <= 8; count += 3) {
          const Matrix together = run_feed_forward(*given.dynamic, input, first, count, options);
          for (int64_t t = 0; t < count; ++t) {
            const Matrix alone = run_feed_forward(*given.dynamic, input, first + t, 1, options);
            for (int64_t k = 0; k < DynamicCase::dim; ++k) CHECK(alone.at(0, k) == together.at(t, k));
          }
        }
    }
  });
}

// Without a dial, and of few tokens also where all are routed to the widest expert, the bits are those of the gated
// feed-forward.
inline void check_dynamic_widest(DynamicCase& given, int64_t tokens) {
  Matrix input = Matrix::random(tokens, DynamicCase::dim);
  for (int64_t t = 0; t < tokens; ++t) input.set(t, 0, DynamicCase::value_for(2));
  each_setting([&] {
    for (const int mode : {MLXEFF_EXACT, MLXEFF_COMPUTE_BF16, MLXEFF_COMPUTE_INT8}) {
      const mlxeff::FeedForward::Usage before = *given.dynamic->usage();
      const Matrix want = run_feed_forward(*given.gated, input, 0, tokens, {mode, true, 1});
      CHECK(same_bits(run_feed_forward(*given.dynamic, input, 0, tokens, {mode}), want));
      const mlxeff::FeedForward::Usage between = *given.dynamic->usage();
      CHECK(between.bytes - before.bytes == given.bytes({2}) - 2 * DynamicCase::dim * 4);
      CHECK(between.counts[2] - before.counts[2] == tokens && between.counts[0] == before.counts[0]);
      if (tokens <= 8) CHECK(same_bits(run_feed_forward(*given.dynamic, input, 0, tokens, {mode, true, 1}), want));
    }
  });
  CHECK(!given.gated->usage());
}

// Several layers in one region, which share their workspace: members that join late, or are suspended between layers,
// find it overwritten, and may not take part in what is complete.
inline void check_dynamic_team(DynamicCase& given, int64_t tokens) {
  constexpr int layers = 4;
  const int64_t dim = DynamicCase::dim;
  const mlxeff::RunOptions options = {MLXEFF_EXACT, true, 1};
  std::vector<Matrix> inputs, want;
  RUN(mlxeff_set_num_threads(3));
  for (int i = 0; i < layers; ++i) {
    inputs.push_back(Matrix::random(tokens, dim));
    for (int64_t t = 0; t < tokens; ++t) inputs.back().set(t, 0, DynamicCase::value_for((t * 5 + i) % 3));
    want.push_back(run_feed_forward(*given.dynamic, inputs.back(), 0, tokens, options));
  }
  const mlxeff::FeedForward::Needs needs = given.dynamic->needs(tokens, options);
  Workspace workspace(needs.workspace), prepared(needs.prepared);
  std::atomic<int> error{MLXEFF_OK}, members{0};
  for (int repeat = 0; repeat < 20; ++repeat) {
    std::vector<Matrix> x, out = inputs;
    for (int i = 0; i < layers; ++i) x.emplace_back(tokens, dim);
    mlxeff::team_run([&](mlxeff::Team& team) {
      const int member = members++;
      if (member % 3 != 0) usleep(useconds_t(member % 7 * 20));
      mlxeff::PassTeam pass(team, options, prepared.data(), error);
      for (int i = 0; i < layers; ++i) {
        const auto make_row = [&](int64_t r) {
          for (int64_t k = 0; k < dim; ++k)
            x[size_t(i)].set(r, k, float(std::isnan(x[size_t(i)].at(r, k)) ? out[size_t(i)].at(r, k) : NAN));
        };
        given.dynamic->run(pass, {x[size_t(i)].floats(), out[size_t(i)].floats(), tokens, &make_row}, workspace.data());
        if (member % 3 == 1) usleep(50);
      }
    });
    CHECK(error == MLXEFF_OK);
    for (int i = 0; i < layers; ++i) CHECK(same_bits(out[size_t(i)], want[size_t(i)]));
  }
}

inline void check_router() {
  using mlxeff::ExpertRouter;
  const float weight[] = {1, 0, 0, 1, 0, 0}, bias[] = {0, 0, 0.5f};
  const auto lagrangian = [&](float first, float second, float dial, std::vector<float> prices) {
    const float x[] = {first, second};
    return ExpertRouter{ExpertRouter::Rule::lagrangian, weight, bias, 2, std::move(prices)}.pick(x, dial);
  };
  const auto tail = [&](float first, float second, float dial) {
    const float x[] = {first, second};
    return ExpertRouter{ExpertRouter::Rule::tail, weight, bias, 2, {1, 2, 3}}.pick(x, dial);
  };
  each_setting([&] {
    CHECK(lagrangian(0, 0, 1, {0, 2, 3}) == 0);    // costs 1, 3, 3
    CHECK(lagrangian(3, 0, 1, {0, 2, 4}) == 1);    // costs 20, 3, 4
    CHECK(lagrangian(3, 0, 1, {0, 2, 3}) == 2);    // costs 20, 3, 3: the wider of two
    CHECK(lagrangian(0, 0, 1, {1, 1, 9}) == 1);    // costs 2, 2, 9
    CHECK(lagrangian(-9, -9, 0, {0, 0, 0}) == 2);  // a dial of 0 never accepts an error
    CHECK(lagrangian(NAN, NAN, 1, {0, 1, 9}) == 2);
    CHECK(lagrangian(200, 200, 1, {0, 1, 9}) == 2);  // the exponential is infinite
    CHECK(tail(2, 0, 0.5f) == 0);  // 0.26 of the probability lies after the first, 0.16 after the second
    CHECK(tail(2, 0, 0.2f) == 1);
    CHECK(tail(2, 0, 0.1f) == 2);
    CHECK(tail(-2, 3, 0.5f) == 1);
    CHECK(tail(0, 40, 0) == 2);
    CHECK(tail(40, 0, 1e-15f) == 0);  // the probability of the first is 1 in fp32, what lies after it is 4e-18
    CHECK(tail(40, 0, 1e-19f) == 2);
    CHECK(tail(NAN, 0, 1) == 2);
  });
}

inline void check_dynamic_feed_forwards() {
  check_router();
  int shape = 0;
  for (size_t i = 0; i < 8; ++i) {
    DynamicCase given(AnyMatrix::kinds[i], AnyMatrix::kinds[(i + 3) % 8]);
    for (const int64_t tokens : {1, 2, 5, 8, 9, 40, 70})
      for (const std::vector<int64_t>& pattern : {std::vector<int64_t>{2, 0, 1}, {0, 0, 2}, {1, 1, 1, 0}, {1}, {0}})
        if (shape++ % shape_step == 0) check_dynamic(given, tokens, pattern);
    check_dynamic(given, 40, {0, 0, 0, 0, 2, 0, 0, 1, 0, 0});
    const bool exact = given.gate.seeds.empty() && given.up.seeds.empty();
    if (exact) check_dynamic_alone(given);
    for (const int64_t tokens : {1, 7, 40}) {
      check_dynamic_widest(given, tokens);
      check_dynamic_team(given, tokens);
    }
  }
}
