// Work that is cut into chunks for threads, and what a chunk of rows leaves for the reduction.
#pragma once

#include <cstdint>

namespace fusedloss::cpu {

// Elements of a chunk, roughly: what a thread should have to do before it is worth waking.
constexpr int64_t kChunkElements = 32768;
// A sum in double that keeps what each addition rounds off (Knuth, "The Art of Computer Programming", 4.2.2): for
// float64 a plain sum over thousands of rows would lose a digit.
class CompensatedSum {
 public:
  CompensatedSum() = default;
  CompensatedSum(double value, double lost) : value_(value), lost_(lost) {}

  void add(double x) {
    const double sum = value_ + x, taken = sum - value_;
    lost_ += (value_ - (sum - taken)) + (x - taken);
    value_ = sum;
  }
  void add(const CompensatedSum& other) {
    add(other.value_);
    lost_ += other.lost_;
  }
  double value() const { return lost_ - lost_ == 0 ? value_ + lost_ : value_; }  // infinity has lost NaN

 private:
  double value_ = 0, lost_ = 0;
};

struct ChunkResult {
  CompensatedSum loss, weight;
  int64_t bad_row = -1;  // the first row whose target is out of range, or -1
};

}  // namespace fusedloss::cpu
