// Sums and maxima over the lanes of a vector, always in the same order: one half is folded onto the other until one
// lane is left. Also sums that keep the rounding error of each addition.
#if defined(FUSEDLOSS_REDUCE_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_REDUCE_INL
#undef FUSEDLOSS_REDUCE_INL
#else
#define FUSEDLOSS_REDUCE_INL
#endif

#include <utility>

#include "kernels/cpu/chunks.h"
#include "kernels/cpu/vec-inl.h"

FUSEDLOSS_BEGIN_NAMESPACE

struct Add {
  template <typename V>
  static FUSEDLOSS_INLINE V of(V a, V b) {
    return a + b;
  }
};

// Returns b if one of them is NaN.
struct Larger {
  template <typename V>
  static FUSEDLOSS_INLINE V of(V a, V b) {
    return a > b ? a : b;
  }
};

template <typename A, int kLanes>
struct Lanes {
  typedef A V __attribute__((vector_size(kLanes * sizeof(A))));
};

template <typename Op, typename A, int kLanes>
FUSEDLOSS_INLINE A fold(typename Lanes<A, kLanes>::V v) {
  if constexpr (kLanes == 2) {
    return Op::of(A(v[0]), A(v[1]));
  } else {
    typename Lanes<A, kLanes / 2>::V low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return fold<Op, A, kLanes / 2>(Op::of(low, high));
  }
}

template <typename A>
FUSEDLOSS_INLINE A sum_of_lanes(typename Simd<A>::V v) {
  return fold<Add, A, Simd<A>::kLanes>(v);
}

template <typename A>
FUSEDLOSS_INLINE A max_of_lanes(typename Simd<A>::V v) {
  return fold<Larger, A, Simd<A>::kLanes>(v);
}

// Sums many vectors in double.
template <typename A>
class SumOfVectors {
 public:
  FUSEDLOSS_INLINE void add(typename Simd<A>::V v) {
    Part part[kParts];
    __builtin_memcpy(part, &v, sizeof v);
    FUSEDLOSS_UNROLL for (int k = 0; k < kParts; ++k) sum_[k] += __builtin_convertvector(part[k], DoubleV);
  }
  FUSEDLOSS_INLINE double value() const {
    return sum_of_lanes<double>(kParts == 1 ? sum_[0] : sum_[0] + sum_[kParts - 1]);
  }

 private:
  static constexpr int kParts = Simd<A>::kLanes / Simd<double>::kLanes;
  typedef A Part __attribute__((vector_size(Simd<double>::kLanes * sizeof(A))));
  DoubleV sum_[kParts] = {};
};

// Selects lanes by index: of a below kLanes, and of b from kLanes on.
template <typename A, int... kIndex>
FUSEDLOSS_INLINE typename Simd<A>::V shuffle(typename Simd<A>::V a, typename Simd<A>::V b,
                                             std::integer_sequence<int, kIndex...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, typename Simd<A>::I{kIndex...});
#endif
}

template <typename Op, typename A, int kBit, int... kLane>
FUSEDLOSS_INLINE typename Simd<A>::V fold_pair(typename Simd<A>::V a, typename Simd<A>::V b,
                                               std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = Simd<A>::kLanes;
  using Near = std::integer_sequence<int, (kLane & kBit ? kLanes + kLane - kBit : kLane)...>;
  using Far = std::integer_sequence<int, (kLane & kBit ? kLanes + kLane : kLane + kBit)...>;
  return Op::of(shuffle<A>(a, b, Near{}), shuffle<A>(a, b, Far{}));
}

// Folds as many vectors as there are lanes, each in the order of `fold`. The result of v[i] is left in lane i of v[0].
// This takes about as many steps as two single folds.
template <typename Op, typename A, int kBit>
FUSEDLOSS_INLINE void fold_pairs(typename Simd<A>::V* v) {
  FUSEDLOSS_UNROLL for (int i = 0; i < kBit; ++i) v[i] =
      fold_pair<Op, A, kBit>(v[i], v[i + kBit], std::make_integer_sequence<int, Simd<A>::kLanes>{});
  if constexpr (kBit > 1) fold_pairs<Op, A, kBit / 2>(v);
}
template <typename Op, typename A>
FUSEDLOSS_NOINLINE void fold_each(typename Simd<A>::V* v) {
  fold_pairs<Op, A, Simd<A>::kLanes / 2>(v);
}

// ---- sums that keep the rounding error of each addition (Knuth, "The Art of Computer Programming", 4.2.2)

template <typename V>
FUSEDLOSS_INLINE void add(CompensatedSum<V>& sum, V x) {
  const V value = sum.value + x, taken = value - sum.value;
  sum.lost += (sum.value - (value - taken)) + (x - taken);
  sum.value = value;
}
FUSEDLOSS_INLINE void add(CompensatedSum<double>& sum, const CompensatedSum<double>& other) {
  add(sum, other.value);
  sum.lost += other.lost;
}
FUSEDLOSS_INLINE void add_lanes(CompensatedSum<double>& sum, const CompensatedSum<DoubleV>& lanes) {
  for (int lane = 0; lane < Simd<double>::kLanes; ++lane)
    add(sum, CompensatedSum<double>{lanes.value[lane], lanes.lost[lane]});
}
FUSEDLOSS_INLINE double total(const CompensatedSum<double>& sum) {
  return sum.lost - sum.lost == 0 ? sum.value + sum.lost : sum.value;  // `lost` is NaN if the sum is infinite
}

// Adds the chunks' results in scratch, in the order of the chunks.
inline ChunkResult sum_of_chunks(const void* scratch, int64_t chunks) {
  ChunkResult all;
  for (int64_t k = 0; k < chunks; ++k) {
    const ChunkResult& chunk = static_cast<const ChunkResult*>(scratch)[k];
    add(all.loss, chunk.loss);
    add(all.target_weight, chunk.target_weight);
    if (all.bad_row < 0) all.bad_row = chunk.bad_row;
  }
  return all;
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
