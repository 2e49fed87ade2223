// Cross entropy where a row's classes lie side by side: a vector holds neighbouring classes of one row. Included
// inside the namespace of each instruction set, so without include guard.

// Classes that are swept twice, for the maximum and for the sums, while L1 still holds them: memory is read once. Their
// sums go on in a wider type. Doubles fill L1 sooner.
template <typename A>
constexpr int64_t kRowBlock = std::is_same_v<A, double> ? 512 : 2048;
// Rows up to here are taken several at a time, which L1 then holds between the two sweeps.
constexpr int64_t kShortRow = 512;
// Independent accumulators, to hide the latency of an addition and of exp.
constexpr int kUnroll = 4;

// q of neighbouring classes, without the target class's own part; of a smoothed target in units of smoothing.uniform, in
// which the sums of equal weights are exact.
template <typename T, Target kTarget>
struct RowCoefficients {
  using A = Statistic<T>;
  using V = typename Simd<A>::V;

  const T* probability;  // [classes] of this row
  const A* weight;       // [classes]
  Smoothing<A> smoothing;

  RowCoefficients(const Problem<T>& p, int64_t row)
      : probability(p.probability + (kTarget == Target::kProbability ? p.offset(p.o.target_strides, row) : 0)),
        weight(p.weight),
        smoothing(p.smoothing) {}

  // Lanes n and up are 0.
  template <bool kWhole>
  FUSEDLOSS_INLINE V at(int64_t c, int n) const {
    V q = V{};
    if constexpr (kTarget != Target::kOneClass) {
      const V w = weight ? load_lanes<kWhole>(weight + c, n) : V{} + 1;
      if constexpr (kTarget == Target::kSmoothed) {
        q = w;
      } else {
        q = probability_coefficient(load_lanes<kWhole>(probability + c, n), w, smoothing);
      }
      if constexpr (!kWhole) q = lanes_from(n, A{}) ? V{} : q;
    }
    return q;
  }
};

// The largest of every kLanes-th class; of lanes without a class -inf.
template <typename T>
FUSEDLOSS_INLINE typename Simd<Statistic<T>>::V max_of_block(const T* x, int n) {
  using A = Statistic<T>;
  using V = typename Simd<A>::V;
  constexpr int kLanes = kLanesOf<T>;
  V best[kUnroll];
  FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k) best[k] = V{} - INFINITY;
  int c = 0;
  for (; c + kUnroll * kLanes <= n; c += kUnroll * kLanes) {
    FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k) best[k] = Larger::of(load(x + c + k * kLanes), best[k]);
  }
  for (; c + kLanes <= n; c += kLanes) best[0] = Larger::of(load(x + c), best[0]);
  if (c < n) best[0] = Larger::of(lanes_from(n - c, A{}) ? V{} - INFINITY : load_first(x + c, n - c), best[0]);
  FUSEDLOSS_UNROLL for (int k = 1; k < kUnroll; ++k) best[0] = Larger::of(best[k], best[0]);
  return best[0];
}

template <bool kWhole, typename T, Target kTarget>
FUSEDLOSS_INLINE void add_classes(RowState<typename Simd<Statistic<T>>::V>& s, const T* x,
                                  const RowCoefficients<T, kTarget>& q, int64_t c, int n, Statistic<T> relative_to) {
  using A = Statistic<T>;
  using V = typename Simd<A>::V;
  const V d = load_lanes<kWhole>(x + c, n) - relative_to;
  V e = math::exp(d);
  if constexpr (!kWhole) e = lanes_from(n, A{}) ? V{} : e;
  s.sum += e;
  if constexpr (kTarget != Target::kOneClass) {
    const V q_c = q.template at<kWhole>(c, n);
    s.dot += q_c * d;
    s.mass += q_c;
  }
}

// x: [classes]. The sums over classes [begin, begin + n), of every kLanes-th one; without their maximum.
template <typename T, Target kTarget>
FUSEDLOSS_INLINE RowState<typename Simd<Statistic<T>>::V> sweep_block(const T* x, const RowCoefficients<T, kTarget>& q,
                                                                      int64_t begin, int n, Statistic<T> relative_to) {
  using V = typename Simd<Statistic<T>>::V;
  constexpr int kLanes = kLanesOf<T>;
  RowState<V> s[kUnroll];
  FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k) s[k] = empty_row_state<V>();
  int c = 0;
  for (; c + kUnroll * kLanes <= n; c += kUnroll * kLanes) {
    FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k)
        add_classes<true>(s[k], x, q, begin + c + k * kLanes, kLanes, relative_to);
  }
  for (; c + kLanes <= n; c += kLanes) add_classes<true>(s[0], x, q, begin + c, kLanes, relative_to);
  if (c < n) add_classes<false>(s[0], x, q, begin + c, n - c, relative_to);
  FUSEDLOSS_UNROLL for (int k = 1; k < kUnroll; ++k) {
    s[0].sum += s[k].sum;
    s[0].dot += s[k].dot;
    s[0].mass += s[k].mass;
  }
  return s[0];
}

template <typename T, Target kTarget>
FUSEDLOSS_INLINE void forward_long_row(const Problem<T>& p, int64_t row, ChunkResult& chunk) {
  using A = Statistic<T>;
  const T* x = p.logits + p.offset(p.o.logits_strides, row);
  const RowCoefficients<T, kTarget> q(p, row);
  auto state = empty_row_state<Wide<A>>();
  for (int64_t c = 0; c < p.o.classes; c += kRowBlock<A>) {
    const int n = int(std::min(kRowBlock<A>, p.o.classes - c));
    const A max = max_of_lanes<A>(max_of_block(x + c, n));
    const auto s = sweep_block(x, q, c, n, shift(max));
    RowState<Wide<A>> block = {max, sum_of_lanes<A>(s.sum), 0, 0};
    if constexpr (kTarget != Target::kOneClass) {
      block.dot = sum_of_lanes<A>(s.dot);
      block.mass = sum_of_lanes<A>(s.mass);
    }
    state = merge(state, block);
  }
  finish_row<T, kTarget>(p, row, x, state, std::log(state.sum), chunk);
}

// Rows of one block, so many that their maxima and their sums each fill a vector: what comes after the classes, which
// would take longer than a short row's classes do, is computed for all of them at once.
template <typename T, Target kTarget>
FUSEDLOSS_INLINE void forward_short_rows(const Problem<T>& p, const int64_t* rows, int count, ChunkResult& chunk) {
  using A = Statistic<T>;
  using V = typename Simd<A>::V;
  constexpr int kLanes = kLanesOf<T>;
  const int classes = int(p.o.classes);
  const T* x[kLanes];
  V max[kLanes], sum[kLanes], dot[kLanes], mass[kLanes];
  for (int i = count; i < kLanes; ++i) max[i] = sum[i] = dot[i] = mass[i] = V{};
  for (int i = 0; i < count; ++i) {
    x[i] = p.logits + p.offset(p.o.logits_strides, rows[i]);
    max[i] = max_of_block(x[i], classes);
  }
  RowState<V> state = {fold_each<Larger, A>(max), V{}, V{}, V{}};
  const V relative_to = shift(state.max);
  for (int i = 0; i < count; ++i) {
    const RowState<V> s = sweep_block(x[i], RowCoefficients<T, kTarget>(p, rows[i]), 0, classes, relative_to[i]);
    sum[i] = s.sum;
    dot[i] = s.dot;
    mass[i] = s.mass;
  }
  state.sum = fold_each<Add, A>(sum);
  if constexpr (kTarget != Target::kOneClass) {
    state.dot = fold_each<Add, A>(dot);
    state.mass = fold_each<Add, A>(mass);
  }
  const V logsum = math::log(state.sum);
  for (int i = 0; i < count; ++i) {
    const RowState<Wide<A>> row = {state.max[i], state.sum[i], state.dot[i], state.mass[i]};
    finish_row<T, kTarget>(p, rows[i], x[i], row, logsum[i], chunk);
  }
}

template <typename T, Target kTarget>
void forward_rows(const Problem<T>& p, ChunkRange range, ChunkResult& chunk) {
  constexpr int kLanes = kLanesOf<T>;
  int64_t rows[kLanes];
  int count = 0;
  for (int64_t row = range.begin; row < range.end; ++row) {
    if (kTarget != Target::kProbability && !p.counts(row)) {
      skip_row(p, row, chunk);
    } else if (p.o.classes > kShortRow) {
      forward_long_row<T, kTarget>(p, row, chunk);
    } else {
      rows[count++] = row;
    }
    if (count == kLanes || (count > 0 && row + 1 == range.end)) {
      forward_short_rows<T, kTarget>(p, rows, count, chunk);
      count = 0;
    }
  }
}

template <typename T>
FUSEDLOSS_INLINE Statistic<T> mass_of_row(const RowCoefficients<T, Target::kProbability>& q, int64_t classes) {
  using V = typename Simd<Statistic<T>>::V;
  constexpr int kLanes = kLanesOf<T>;
  V mass = V{};
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes) mass += q.template at<true>(c, kLanes);
  if (c < classes) mass += q.template at<false>(c, int(classes - c));
  return sum_of_lanes<Statistic<T>>(mass);
}

// d loss/dx_c = mass * p_c - q_c, times the row's grad_output.
template <typename T, Target kTarget>
FUSEDLOSS_INLINE void backward_row(const Problem<T>& p, int64_t row, T* grad) {
  using A = Statistic<T>;
  using V = typename Simd<A>::V;
  constexpr int kLanes = kLanesOf<T>;
  const int64_t classes = p.o.classes;
  const T* x = p.logits + p.offset(p.o.logits_strides, row);
  const RowCoefficients<T, kTarget> q(p, row);
  const A g = upstream<T>(p.o, row), max = p.row_max[row], logsum = p.row_logsum[row];
  int64_t y = -1;
  A mass, kept = 0;
  if constexpr (kTarget == Target::kProbability) {
    mass = mass_of_row<T>(q, classes);
  } else {
    y = p.o.target_index[row];
    mass = index_mass(p.weight_of(y), p.weight_sum, p.smoothing);
    kept = p.smoothing.kept * p.weight_of(y);
  }
  const auto gradient = [&](int64_t c, V x_c, V q_c) {
    if constexpr (kTarget == Target::kSmoothed) q_c *= p.smoothing.uniform;
    // A branch that is taken once a row; adding 0 everywhere else costs a tenth of a long row's time.
    if (uint64_t(y - c) < uint64_t(kLanes)) q_c = add_to_lane<A>(q_c, int(y - c), kept);
    return logit_gradient(math::exp(x_c - max - logsum), q_c, mass, g);
  };
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes)
    store(grad + c, gradient(c, load(x + c), q.template at<true>(c, kLanes)));
  if (c < classes) {
    const int n = int(classes - c);
    store_first(grad + c, gradient(c, load_first(x + c, n), q.template at<false>(c, n)), n);
  }
}

template <typename T, Target kTarget>
void backward_rows(const Problem<T>& p, ChunkRange range) {
  for (int64_t row = range.begin; row < range.end; ++row) {
    T* grad = static_cast<T*>(p.o.grad_logits) + p.offset(p.o.grad_strides, row);
    if (kTarget != Target::kProbability && !p.counts(row)) {
      std::memset(grad, 0, size_t(p.o.classes) * sizeof(T));
    } else {
      backward_row<T, kTarget>(p, row, grad);
    }
  }
}
