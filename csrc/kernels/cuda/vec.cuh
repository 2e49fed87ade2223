// Memory access, 16 bytes at a time where alignment allows, and the conversion between a stored type T and the type
// that is computed in.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/launch.cuh"
#include "kernels/dtypes.h"

namespace fusedloss::cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// Rounds only once, also from double to 16 bits.
template <typename T, typename A>
__device__ __forceinline__ T narrow(A x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (std::is_same_v<A, double>) return __double2bfloat16(x);
    else return __float2bfloat16(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    if constexpr (std::is_same_v<A, double>) return __double2half(x);
    else return __float2half(x);
  } else {
    return T(x);
  }
}

// The number of elements of T in one vector, which one instruction loads.
template <typename T>
constexpr int kVectorSize = kVectorBytes / sizeof(T);

// Neighbouring elements as loaded: kVectorSize<T> of them, or one. They stay in 32-bit words until they are computed
// with. If 16-bit halves were extracted sooner, that would wait for their load before the next load is issued.
template <typename T, int kWidth>
struct Vector {
  static_assert(kWidth == kVectorSize<T>);
  uint32_t words[4];

  __device__ __forceinline__ uint4 as_uint4() const { return {words[0], words[1], words[2], words[3]}; }
  __device__ __forceinline__ void from_uint4(uint4 v) {
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  }

  // 16-bit elements are compared two at a time.
  __device__ __forceinline__ AccumulateType<T> max() const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return max_of_pairs<__nv_bfloat162>();
    else if constexpr (std::is_same_v<T, __half>) return max_of_pairs<__half2>();
    else if constexpr (sizeof(T) == 8) return ::fmax((*this)[0], (*this)[1]);
    else return ::fmaxf(::fmaxf((*this)[0], (*this)[1]), ::fmaxf((*this)[2], (*this)[3]));
  }

  __device__ __forceinline__ AccumulateType<T> operator[](int i) const {
    if constexpr (sizeof(T) == 8) return as<double>(words[2 * i] | uint64_t(words[2 * i + 1]) << 32);
    else if constexpr (sizeof(T) == 4) return as<float>(words[i]);
    else if constexpr (std::is_same_v<T, __half>) return widen(__half(__half_raw{half_word(i)}));
    else return as<float>(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
  }

 private:
  template <typename To, typename From>
  static __device__ __forceinline__ To as(From bits) {
    static_assert(sizeof(To) == sizeof(From));
    To value;
    memcpy(static_cast<void*>(&value), &bits, sizeof(To));
    return value;
  }
  template <typename Pair>
  __device__ __forceinline__ float max_of_pairs() const {
    const Pair max =
        __hmax2(__hmax2(as<Pair>(words[0]), as<Pair>(words[1])), __hmax2(as<Pair>(words[2]), as<Pair>(words[3])));
    return ::fmaxf(widen(max.x), widen(max.y));
  }
  __device__ __forceinline__ uint16_t half_word(int i) const { return uint16_t(words[i / 2] >> i % 2 * 16); }
};

template <typename T>
struct Vector<T, 1> {
  T element;

  __device__ __forceinline__ AccumulateType<T> max() const { return widen(element); }
  __device__ __forceinline__ AccumulateType<T> operator[](int) const { return widen(element); }
};

template <int kWidth, typename T>
__device__ __forceinline__ Vector<T, kWidth> load(const T* p) {
  Vector<T, kWidth> vector;
  if constexpr (kWidth == 1) {
    vector.element = *p;
  } else {
    vector.from_uint4(*reinterpret_cast<const uint4*>(p));
  }
  return vector;
}

// A vector in which every element is `value`.
template <int kWidth, typename T>
__device__ __forceinline__ Vector<T, kWidth> splat(T value) {
  Vector<T, kWidth> vector;
  if constexpr (kWidth == 1) {
    vector.element = value;
  } else {
    alignas(16) T values[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) values[j] = value;
    vector.from_uint4(*reinterpret_cast<const uint4*>(values));
  }
  return vector;
}

// In plain C++ the compiler splits some vector stores into four.
__device__ __forceinline__ void store_vector(void* p, uint4 v) {
#if FUSEDLOSS_CUDA_ARCH
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#else
  *static_cast<uint4*>(p) = v;
#endif
}

// [size] contiguous elements: single ones up to the first 16-byte boundary, then vectors, then single ones again. Loops
// process them in units of kWidth: all vectors with kWidth = kVectorSize<T>, all single elements with kWidth = 1. Index
// is int32_t where sizes allow, because 64-bit addresses cost as much as the arithmetic.
template <typename T, typename Index>
struct VectorizedRange {
  Index size, head, vectors;

  template <int kWidth>
  __device__ __forceinline__ Index units() const {
    return kWidth == 1 ? size - vectors * kVectorSize<T> : vectors;
  }
  // The first element of a unit.
  template <int kWidth>
  __device__ __forceinline__ Index first(Index unit) const {
    if constexpr (kWidth == 1) return unit < head ? unit : unit + vectors * kVectorSize<T>;
    else return head + unit * kWidth;
  }
};

template <typename T, typename Index>
__device__ __forceinline__ VectorizedRange<T, Index> scalar_range(Index size) {
  return {size, 0, 0};
}

// Vectors are used only if they are aligned in `p` and in all `others`, which have as many elements or are null.
template <typename T, typename Index, typename... Others>
__device__ __forceinline__ VectorizedRange<T, Index> vectorized_range(Index size, const T* p, const Others*... others) {
  const Index to_boundary = Index(-reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
  const Index head = to_boundary < size ? to_boundary : size;
  const bool aligned = ((others == nullptr || reinterpret_cast<uintptr_t>(others + head) % 16 == 0) && ...);
  return aligned ? VectorizedRange<T, Index>{size, head, (size - head) / kVectorSize<T>} : scalar_range<T>(size);
}

// One thread's share of a row that several threads share: the units thread, thread + 2^step_shift, …
template <typename T>
struct ThreadRange : VectorizedRange<T, int> {
  int thread, step_shift;
};

// For numbers that are not negative. Where 32 bits suffice, a division takes a third of the time.
__device__ __forceinline__ bool fit_32_bits(int64_t a, int64_t b) { return (a | b) >> 32 == 0; }
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return fit_32_bits(a, b) ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}
__device__ __forceinline__ int64_t remainder(int64_t a, int64_t b) {
  return fit_32_bits(a, b) ? int64_t(uint32_t(a) % uint32_t(b)) : a % b;
}

// Loads kWidth elements from p on, in the type that is computed in. kWidth is 1, or the size of one or two vectors.
template <int kWidth, typename T, typename A>
__device__ __forceinline__ void load_values(const T* p, A (&values)[kWidth]) {
  constexpr int kPiece = kWidth == 1 ? 1 : kVectorSize<T>;
#pragma unroll
  for (int i = 0; i < kWidth; i += kPiece) {
    const auto vector = load<kPiece>(p + i);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) values[i + j] = vector[j];
  }
}

template <typename T, int kWidth, typename A>
__device__ __forceinline__ Vector<T, kWidth> narrow_vector(const A* values) {
  alignas(16) T narrowed[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) narrowed[j] = narrow<T>(values[j]);
  return load<kWidth>(narrowed);
}

template <typename T, int kWidth>
__device__ __forceinline__ void store(T* p, const Vector<T, kWidth>& vector) {
  if constexpr (kWidth == 1) *p = vector.element;
  else store_vector(p, vector.as_uint4());
}

template <int kWidth, typename T, typename A>
__device__ __forceinline__ void store_values(T* p, const A (&values)[kWidth]) {
  constexpr int kPiece = kWidth == 1 ? 1 : kVectorSize<T>;
#pragma unroll
  for (int i = 0; i < kWidth; i += kPiece) store(p + i, narrow_vector<T, kPiece>(values + i));
}

// The same for loss and grad_output, which hold T or, if `wide`, its accumulate type.
template <typename T, int kWidth>
__device__ __forceinline__ void load_loss(const void* losses, bool wide, int64_t i,
                                          AccumulateType<T> (&values)[kWidth]) {
  if (wide) load_values(static_cast<const AccumulateType<T>*>(losses) + i, values);
  else load_values(static_cast<const T*>(losses) + i, values);
}

// A is double for a sum over many rows or elements, so that the sum is rounded only once.
template <typename T, int kWidth, typename A>
__device__ __forceinline__ void store_loss(void* losses, bool wide, int64_t i, const A (&values)[kWidth]) {
  if (wide) store_values(static_cast<AccumulateType<T>*>(losses) + i, values);
  else store_values(static_cast<T*>(losses) + i, values);
}

}  // namespace fusedloss::cuda
