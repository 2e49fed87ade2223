// Cross entropy where a row's classes lie side by side: a vector holds neighbouring classes of one row. Included
// inside the namespace of each instruction set, so without include guard.

// Classes that are swept twice, for the maximum and for the sums, while L1 still holds them: memory is read once.
constexpr int64_t kRowBlock = 2048;
// Independent accumulators, to hide the latency of an addition and of exp.
constexpr int kUnroll = 4;

// q of neighbouring classes, without the target class's own part.
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
        q = w * smoothing.uniform;
      } else {
        q = probability_coefficient(load_lanes<kWhole>(probability + c, n), w, smoothing);
      }
      if constexpr (!kWhole) q = lanes_from(n, A{}) ? V{} : q;
    }
    return q;
  }
};

template <typename T>
FUSEDLOSS_INLINE Statistic<T> max_of_block(const T* x, int n) {
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
  return max_of_lanes<A>(best[0]);
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

// x: [classes]. The sums over classes [begin, begin + n).
template <typename T, Target kTarget>
FUSEDLOSS_INLINE RowState<Statistic<T>> sweep_block(const T* x, const RowCoefficients<T, kTarget>& q, int64_t begin,
                                                    int n) {
  using A = Statistic<T>;
  using V = typename Simd<A>::V;
  constexpr int kLanes = kLanesOf<T>;
  const A max = max_of_block(x + begin, n);
  const A relative_to = shift(max);
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
  RowState<A> block = {max, sum_of_lanes<A>(s[0].sum), 0, 0};
  if constexpr (kTarget != Target::kOneClass) {
    block.dot = sum_of_lanes<A>(s[0].dot);
    block.mass = sum_of_lanes<A>(s[0].mass);
  }
  return block;
}

template <typename T, Target kTarget>
void forward_rows(const Problem<T>& p, ChunkRange range, ChunkResult& chunk) {
  for (int64_t row = range.begin; row < range.end; ++row) {
    if (kTarget != Target::kProbability && !p.counts(row)) {
      skip_row(p, row, chunk);
      continue;
    }
    const T* x = p.logits + p.offset(p.o.logits_strides, row);
    const RowCoefficients<T, kTarget> q(p, row);
    auto state = empty_row_state<Statistic<T>>();
    for (int64_t c = 0; c < p.o.classes; c += kRowBlock)
      state = merge(state, sweep_block(x, q, c, int(std::min(kRowBlock, p.o.classes - c))));
    finish_row<T, kTarget>(p, row, x, state, chunk);
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
void backward_rows(const Problem<T>& p, ChunkRange range) {
  using A = Statistic<T>;
  using V = typename Simd<A>::V;
  constexpr int kLanes = kLanesOf<T>;
  const int64_t classes = p.o.classes;
  for (int64_t row = range.begin; row < range.end; ++row) {
    T* grad = static_cast<T*>(p.o.grad_logits) + p.offset(p.o.grad_strides, row);
    if (kTarget != Target::kProbability && !p.counts(row)) {
      std::memset(grad, 0, size_t(classes) * sizeof(T));
      continue;
    }
    const T* x = p.logits + p.offset(p.o.logits_strides, row);
    const RowCoefficients<T, kTarget> q(p, row);
    const A g = upstream<T>(p.o, row), max = p.row_max[row], logsum = p.row_logsum[row];
    A mass;
    if constexpr (kTarget == Target::kProbability) {
      mass = mass_of_row<T>(q, classes);
    } else {
      mass = index_mass(p.weight_of(p.o.target_index[row]), p.weight_sum, p.smoothing);
    }
    int64_t c = 0;
    for (; c + kLanes <= classes; c += kLanes) {
      const V p_c = math::exp(load(x + c) - max - logsum);
      store(grad + c, logit_gradient(p_c, q.template at<true>(c, kLanes), mass, g));
    }
    if (c < classes) {
      const int n = int(classes - c);
      const V p_c = math::exp(load_first(x + c, n) - max - logsum);
      store_first(grad + c, logit_gradient(p_c, q.template at<false>(c, n), mass, g), n);
    }
    if constexpr (kTarget != Target::kProbability) finish_gradient<T, kTarget>(p, row, x, grad, mass, g);
  }
}
