// Cross entropy where neighbouring rows lie side by side, as in (N, C, d1, …): a vector holds one class of
// neighbouring rows, so that loads stay contiguous without a transposed copy. Included inside the namespace of each
// instruction set, so without include guard.

// Classes that are swept twice while L1 still holds this many of each of a tile's rows; and classes that are added up
// apart from the others: one sum over all of them in a row would round as often as there are classes.
constexpr int64_t kColumnBlock = 16, kColumnPart = 1024;

// Up to kTile neighbouring rows, and within them groups of as many as a vector holds.
template <typename T>
struct Tile {
  int64_t row;    // the first one's number
  int n;          // how many
  const T* x;     // [classes, n], classes logits_strides.classes apart
  const T* t;     // [classes, n], classes target_strides.classes apart; probabilities only
  T* grad;        // [classes, n], classes grad_strides.classes apart; backward only

  Tile(const Problem<T>& p, ChunkRange range)
      : row(range.outer * p.o.inner + range.begin),
        n(int(range.end - range.begin)),
        x(p.logits + range.outer * p.o.logits_strides.outer + range.begin),
        t(p.probability ? p.probability + range.outer * p.o.target_strides.outer + range.begin : nullptr),
        grad(p.o.grad_logits
                 ? static_cast<T*>(p.o.grad_logits) + range.outer * p.o.grad_strides.outer + range.begin
                 : nullptr) {}
};

// q of class c for the group that starts at column i, without the target class's own part; of a smoothed target in
// units of smoothing.uniform.
template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE typename Simd<Statistic<T>>::V column_coefficients(const Problem<T>& p, const Tile<T>& tile,
                                                                    int64_t c, int i) {
  using V = typename Simd<Statistic<T>>::V;
  if constexpr (!kSpread) return V{};
  const V w = V{} + p.weight_of(c);
  if (has_class<kSpread>(p)) return w;
  return probability_coefficient(load_lanes<kWhole>(tile.t + c * p.o.target_strides.classes + i, tile.n - i), w,
                                 p.smoothing);
}

template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE RowState<typename Simd<Statistic<T>>::V> sweep_group(const Problem<T>& p, const Tile<T>& tile,
                                                                      int64_t begin, int64_t end, int i) {
  using V = typename Simd<Statistic<T>>::V;
  const int64_t stride = p.o.logits_strides.classes;
  auto s = empty_row_state<V>();
  for (int64_t c = begin; c < end; ++c) {
    const V v = load_lanes<kWhole>(tile.x + c * stride + i, tile.n - i);
    s.max = v > s.max ? v : s.max;
  }
  const V relative_to = shift(s.max);
  for (int64_t c = begin; c < end; ++c) {
    const V d = load_lanes<kWhole>(tile.x + c * stride + i, tile.n - i) - relative_to;
    s.sum += math::exp(d);
    if constexpr (kSpread) {
      const V q = column_coefficients<kWhole, T, kSpread>(p, tile, c, i);
      s.dot += q * d;
      s.mass += q;
    }
  }
  return s;
}

template <typename T, bool kSpread>
void forward_columns(const Problem<T>& p, ChunkRange range, ChunkResult& chunk) {
  using A = Statistic<T>;
  using V = typename Simd<A>::V;
  constexpr int kLanes = kLanesOf<T>;
  const Tile<T> tile(p, range);
  constexpr int kGroups = kTile / kLanes;
  RowState<V> state[kGroups], part[kGroups];
  for (auto& s : state) s = empty_row_state<V>();
  for (int64_t first = 0; first < p.o.classes; first += kColumnPart) {
    const int64_t last = std::min(first + kColumnPart, p.o.classes);
    for (auto& s : part) s = empty_row_state<V>();
    for (int64_t c = first; c < last; c += kColumnBlock) {
      const int64_t end = std::min(c + kColumnBlock, last);
      int i = 0;
      for (; i + kLanes <= tile.n; i += kLanes)
        part[i / kLanes] = merge(part[i / kLanes], sweep_group<true, T, kSpread>(p, tile, c, end, i));
      if (i < tile.n)
        part[i / kLanes] = merge(part[i / kLanes], sweep_group<false, T, kSpread>(p, tile, c, end, i));
    }
    for (int g = 0; g * kLanes < tile.n; ++g) state[g] = merge(state[g], part[g]);
  }
  V logsum = V{}, inverse_sum = V{};  // of the group at hand
  double loss = 0;
  for (int i = 0; i < tile.n; ++i) {
    const RowState<V>& s = state[i / kLanes];
    const int lane = i % kLanes;
    if (lane == 0) {
      logsum = math::log(s.sum);
      inverse_sum = 1 / s.sum;
    }
    if (has_class<kSpread>(p) && !p.counts(tile.row + i)) {
      skip_row(p, tile.row + i, chunk);
    } else {
      const RowState<Wide<A>> row = {s.max[lane], s.sum[lane], s.dot[lane], s.mass[lane]};
      finish_row<T, kSpread>(p, tile.row + i, tile.x + i, row, logsum[lane], inverse_sum[lane], loss);
    }
    if (lane + 1 == kLanes || i + 1 == tile.n) {
      chunk.loss.add(loss);
      loss = 0;
    }
  }
}

// What the gradient needs of each row of a tile.
template <typename A>
struct TileGradient {
  A max[kTile], scale[kTile], g[kTile];  // as of RowGradient
  A unit;
  A at_target[kTile];  // the gradient at the target class, which the sweep over all classes gets wrong
  A counts[kTile];     // 0 for a row whose gradient is 0 whatever its logits are, NaN included; else 1
};

template <typename T, bool kSpread>
FUSEDLOSS_INLINE void fill_group(const Problem<T>& p, const Tile<T>& tile, TileGradient<Statistic<T>>& rows, int i) {
  using A = Statistic<T>;
  using V = typename Simd<A>::V;
  constexpr int kLanes = kLanesOf<T>;
  const int n = std::min(kLanes, tile.n - i);
  V x_y = V{}, q_y = V{};
  for (int lane = 0; lane < n; ++lane) {
    const int64_t row = tile.row + i + lane;
    rows.max[i + lane] = p.row_max[row];
    rows.scale[i + lane] = p.row_scale[row];
    rows.g[i + lane] = p.upstream(row);
    rows.counts[i + lane] = !has_class<kSpread>(p) || p.counts(row);
    if (has_class<kSpread>(p) && rows.counts[i + lane] != 0) {
      const int64_t y = p.o.target_index[row];
      x_y[lane] = load_one(tile.x + i + lane + y * p.o.logits_strides.classes);
      q_y[lane] = index_mass(p.weight_of(y), p.weight_of(y), p.smoothing);
    }
  }
  const V e_y = math::exp(x_y - load(rows.max + i));
  store(rows.at_target + i, logit_gradient(e_y, load(rows.scale + i), q_y, load(rows.g + i)));
}

template <bool kWhole, typename T, bool kSpread>
FUSEDLOSS_INLINE void gradient_group(const Problem<T>& p, const Tile<T>& tile, const TileGradient<Statistic<T>>& rows,
                                     int64_t c, int i) {
  using V = typename Simd<Statistic<T>>::V;
  const V x = load_lanes<kWhole>(tile.x + c * p.o.logits_strides.classes + i, tile.n - i);
  const V e = math::exp(x - load(rows.max + i));
  V grad = V{};
  if constexpr (kSpread) {
    const V q = column_coefficients<kWhole, T, kSpread>(p, tile, c, i) * rows.unit;
    grad = logit_gradient(e, load(rows.scale + i), q, load(rows.g + i));
  } else {
    grad = e * (load(rows.scale + i) * load(rows.g + i));
  }
  grad = load(rows.counts + i) == V{} ? V{} : grad;
  store_lanes<kWhole>(tile.grad + c * p.o.grad_strides.classes + i, grad, tile.n - i);
}

// grad may be x.
template <typename T, bool kSpread>
void backward_columns(const Problem<T>& p, ChunkRange range) {
  constexpr int kLanes = kLanesOf<T>;
  const Tile<T> tile(p, range);
  TileGradient<Statistic<T>> rows = {};
  rows.unit = has_class<kSpread>(p) ? p.smoothing.uniform : 1;
  for (int i = 0; i < tile.n; i += kLanes) fill_group<T, kSpread>(p, tile, rows, i);
  for (int64_t c = 0; c < p.o.classes; ++c) {
    int i = 0;
    for (; i + kLanes <= tile.n; i += kLanes) gradient_group<true, T, kSpread>(p, tile, rows, c, i);
    if (i < tile.n) gradient_group<false, T, kSpread>(p, tile, rows, c, i);
  }
  if (has_class<kSpread>(p)) {
    for (int i = 0; i < tile.n; ++i)
      if (rows.counts[i] != 0)
        store_one(tile.grad + i + p.o.target_index[tile.row + i] * p.o.grad_strides.classes, rows.at_target[i]);
  }
}
