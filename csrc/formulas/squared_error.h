// Squared error as arithmetic on scalars or vectors, for both devices: (x - t)^2 and its derivative by x; the
// derivative by t is the negative. Without include guard, as formulas/cross_entropy.h, and for the same reason.

struct SquaredError {
  template <typename V>
  static FUSEDLOSS_INLINE V value(V x, V t) {
    const V difference = x - t;
    return difference * difference;
  }
  template <typename V>
  static FUSEDLOSS_INLINE V derivative(V x, V t) {
    const V difference = x - t;
    return difference + difference;
  }
};
