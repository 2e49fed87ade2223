// Vectors of one instruction set, with the compilers' vector extension: loads that widen to the accumulate type, and
// stores that round once.
#if defined(FUSEDLOSS_VEC_INL) == defined(FUSEDLOSS_ISA_TOGGLE)
#ifdef FUSEDLOSS_VEC_INL
#undef FUSEDLOSS_VEC_INL
#else
#define FUSEDLOSS_VEC_INL
#endif

#include <cstdint>
#include <type_traits>

#include "kernels/cpu/instruction_set.h"
#include "kernels/cpu/instruction_set_macros.h"
#include "kernels/dtypes.h"

FUSEDLOSS_BEGIN_NAMESPACE

template <typename A>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kLanes = FUSEDLOSS_VECTOR_BYTES / 4;
  typedef float V __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
  typedef uint16_t H __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES / 2)));  // 16-bit elements as stored
};

template <>
struct Simd<double> {
  static constexpr int kLanes = FUSEDLOSS_VECTOR_BYTES / 8;
  typedef double V __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES)));
};

using FloatV = Simd<float>::V;
using FloatI = Simd<float>::I;
using FloatU = Simd<float>::U;
using FloatH = Simd<float>::H;
using DoubleV = Simd<double>::V;
using DoubleI = Simd<double>::I;

// The vector in which elements of type T are computed, and its number of lanes.
template <typename T>
using VectorOf = typename Simd<AccumulateType<T>>::V;
template <typename T>
constexpr int kLanesOf = Simd<AccumulateType<T>>::kLanes;
// The same number of elements as they are stored.
template <typename T>
using StoredVectorOf = std::conditional_t<std::is_same_v<T, AccumulateType<T>>, VectorOf<T>, FloatH>;

// Calls body(is_whole, i) for each vector of elements of type T in [begin, end), where i is its first element. is_whole
// is std::true_type, or std::false_type for the elements at the end that do not fill a vector.
template <typename T, typename Index, typename Body>
FUSEDLOSS_INLINE void for_each_vector(Index begin, Index end, Body body) {
  Index i = begin;
  for (; i + kLanesOf<T> <= end; i += kLanesOf<T>) body(std::true_type{}, i);
  if (i < end) body(std::false_type{}, i);
}

// Calls body(is_whole, i, k) for each vector of [0, n), unrolled: k numbers the vectors in each group of kUnroll
// neighbouring ones. It is 0 for the vectors at the end that do not fill a group.
template <typename T, int kUnroll, typename Body>
FUSEDLOSS_INLINE void for_each_vector_unrolled(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kUnroll * kLanesOf<T> <= n; i += kUnroll * kLanesOf<T>)
    FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k) body(std::true_type{}, i + k * kLanesOf<T>, k);
  for_each_vector<T>(i, n, [&](auto whole, int64_t rest) __attribute__((always_inline)) { body(whole, rest, 0); });
}

// ---- 16-bit floats to float and back, round to nearest even ----

FUSEDLOSS_INLINE FloatV widen(FloatH bits, bfloat16) {
#if FUSEDLOSS_VECTOR_BYTES == 64  // the compiler would convert two halves and join them
  const FloatU widened = (FloatU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);
#else
  const FloatU widened = __builtin_convertvector(bits, FloatU);
#endif
  return (FloatV)(widened << 16);
}

FUSEDLOSS_INLINE FloatH narrow(FloatV v, bfloat16) {
#if FUSEDLOSS_VECTOR_BYTES == 64
  // The instruction flushes subnormal numbers to 0, so these are rounded by the code below. It is written in assembly,
  // because the compiler has it in an instruction set that not every machine with AVX-512 has.
  if (has_bfloat16_instructions && _mm512_fpclass_ps_mask((__m512)v, /*subnormal*/ 0x20) == 0) {
    FloatH narrowed;
    asm("vcvtneps2bf16 %1, %0" : "=v"(narrowed) : "v"(v));
    return narrowed;
  }
#endif
  const FloatU bits = (FloatU)v;
  const FloatU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const FloatU nan = FloatU{} + 0x7fc0u;
  return __builtin_convertvector(v == v ? rounded : nan, FloatH);
}

#if FUSEDLOSS_VECTOR_BYTES == 64
FUSEDLOSS_INLINE FloatV widen(FloatH bits, float16) {
  return (FloatV)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);  // g++ 12 warns about the unmasked intrinsics
}
FUSEDLOSS_INLINE FloatH narrow(FloatV v, float16) {
  return (FloatH)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif FUSEDLOSS_VECTOR_BYTES == 32
FUSEDLOSS_INLINE FloatV widen(FloatH bits, float16) { return (FloatV)_mm256_cvtph_ps((__m128i)bits); }
FUSEDLOSS_INLINE FloatH narrow(FloatV v, float16) {
  return (FloatH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
FUSEDLOSS_INLINE FloatV widen(FloatH bits, float16) {
  const FloatU half = __builtin_convertvector(bits, FloatU);
  const FloatU sign = (half & 0x8000u) << 16;
  // With the exponent and the fraction moved into place, the float is the value times 2^-112, for subnormals too.
  const FloatU magnitude = (FloatU)((FloatV)((half & 0x7fffu) << 13) * 0x1p112f);
  const FloatU infinite = (half & 0x7c00u) == 0x7c00u ? FloatU{} + 0x7f800000u : FloatU{};
  return (FloatV)(sign | magnitude | infinite);
}
FUSEDLOSS_INLINE FloatH narrow(FloatV v, float16) {
  const FloatU bits = (FloatU)v;
  const FloatU sign = (bits >> 16) & 0x8000u;
  const FloatU magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias the exponent by 127 - 15, and round off the lowest 13 bits.
  const FloatU normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal halves: adding 0.5 rounds their bits and leaves them in the fraction of the sum.
  const FloatU subnormal = (FloatU)((FloatV)magnitude + 0.5f) - 0x3f000000u;
  FloatU half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? FloatU{} + 0x7c00u : half;
  half = v == v ? half : FloatU{} + 0x7e00u;
  return __builtin_convertvector(half | sign, FloatH);
}
#endif

// ---- loads and stores ----

template <typename T>
FUSEDLOSS_INLINE VectorOf<T> load(const T* p) {
  StoredVectorOf<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  if constexpr (std::is_same_v<T, AccumulateType<T>>) {
    return v;
  } else {
    return widen(v, T{});
  }
}

FUSEDLOSS_INLINE DoubleI load_indices(const int64_t* p) {
  DoubleI v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
FUSEDLOSS_INLINE void store(T* p, VectorOf<T> v) {
  if constexpr (std::is_same_v<T, AccumulateType<T>>) {
    __builtin_memcpy(p, &v, sizeof v);
  } else {
    const FloatH bits = narrow(v, T{});
    __builtin_memcpy(p, &bits, sizeof bits);
  }
}

// Loads (or stores) the vector that begins at element i. `dtype` is known only at run time, and its accumulate type is
// A. The branch always goes the same way, and its cost is smaller than that of compiling all code between load and
// store for each type.
template <typename A>
FUSEDLOSS_INLINE typename Simd<A>::V load_stored(const void* p, int64_t i, DType dtype) {
  if constexpr (std::is_same_v<A, double>) {
    return load(static_cast<const double*>(p) + i);
  } else if (dtype == DType::kFloat32) {
    return load(static_cast<const float*>(p) + i);
  } else if (dtype == DType::kBFloat16) {
    return load(static_cast<const bfloat16*>(p) + i);
  } else {
    return load(static_cast<const float16*>(p) + i);
  }
}
template <typename A>
FUSEDLOSS_INLINE void store_as(void* p, int64_t i, typename Simd<A>::V v, DType dtype) {
  if constexpr (std::is_same_v<A, double>) {
    store(static_cast<double*>(p) + i, v);
  } else if (dtype == DType::kFloat32) {
    store(static_cast<float*>(p) + i, v);
  } else if (dtype == DType::kBFloat16) {
    store(static_cast<bfloat16*>(p) + i, v);
  } else {
    store(static_cast<float16*>(p) + i, v);
  }
}

// A mask in which lanes n and up are set.
template <typename A>
FUSEDLOSS_INLINE typename Simd<A>::I lanes_from(int n) {
  typename Simd<A>::I index;
  for (int lane = 0; lane < Simd<A>::kLanes; ++lane) index[lane] = lane;
  return index >= n;
}

#if FUSEDLOSS_VECTOR_BYTES == 32
// Load and store fewer than 8 16-bit elements, in pieces that go directly into registers: with a buffer in memory, the
// load of the vector would wait for the stores to the buffer.
FUSEDLOSS_INLINE FloatH load_first_halves(const void* p, int n) {
  const char* from = static_cast<const char*>(p);
  uint64_t four = 0, rest = 0;
  uint32_t two = 0;
  uint16_t one = 0;
  if (n & 4) __builtin_memcpy(&four, from, sizeof four), from += sizeof four;
  if (n & 2) __builtin_memcpy(&two, from, sizeof two), from += sizeof two;
  if (n & 1) __builtin_memcpy(&one, from, sizeof one);
  rest = n & 2 ? two | uint64_t(one) << 32 : one;
  return (FloatH)(n & 4 ? _mm_set_epi64x(int64_t(rest), int64_t(four)) : _mm_set_epi64x(0, int64_t(rest)));
}
FUSEDLOSS_INLINE void store_first_halves(void* p, FloatH v, int n) {
  char* to = static_cast<char*>(p);
  uint64_t rest = uint64_t(_mm_cvtsi128_si64((__m128i)v));
  if (n & 4) {
    __builtin_memcpy(to, &rest, 8);
    to += 8;
    rest = uint64_t(_mm_extract_epi64((__m128i)v, 1));
  }
  if (n & 2) {
    __builtin_memcpy(to, &rest, 4);
    to += 4;
    rest >>= 32;
  }
  if (n & 1) __builtin_memcpy(to, &rest, 2);
}
#endif

// Loads the first n elements, n < lanes, and reads no byte beyond them. The other lanes are 0.
template <typename T>
FUSEDLOSS_INLINE VectorOf<T> load_first(const T* p, int n) {
#if FUSEDLOSS_VECTOR_BYTES == 64
  const __mmask16 mask = __mmask16((1u << n) - 1u);
  if constexpr (std::is_same_v<T, double>) {
    return (DoubleV)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  } else if constexpr (std::is_same_v<T, float>) {
    return (FloatV)_mm512_maskz_loadu_ps(mask, p);
  } else {
    return widen((FloatH)_mm256_maskz_loadu_epi16(mask, p), T{});
  }
#elif FUSEDLOSS_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<T, double>) {
    return (DoubleV)_mm256_maskload_pd(p, (__m256i)~lanes_from<double>(n));
  } else if constexpr (std::is_same_v<T, float>) {
    return (FloatV)_mm256_maskload_ps(p, (__m256i)~lanes_from<float>(n));
  } else {
    return widen(load_first_halves(p, n), T{});
  }
#else
  T buffer[kLanesOf<T>] = {};
  for (int lane = 0; lane < n; ++lane) buffer[lane] = p[lane];
  return load(buffer);
#endif
}

template <typename T>
FUSEDLOSS_INLINE void store_first(T* p, VectorOf<T> v, int n) {
#if FUSEDLOSS_VECTOR_BYTES == 64
  const __mmask16 mask = __mmask16((1u << n) - 1u);
  if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)v);
  } else if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, mask, (__m512)v);
  } else {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(v, T{}));
  }
#elif FUSEDLOSS_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<T, double>) {
    _mm256_maskstore_pd(p, (__m256i)~lanes_from<double>(n), (__m256d)v);
  } else if constexpr (std::is_same_v<T, float>) {
    _mm256_maskstore_ps(p, (__m256i)~lanes_from<float>(n), (__m256)v);
  } else {
    store_first_halves(p, narrow(v, T{}), n);
  }
#else
  T buffer[kLanesOf<T>];
  store(buffer, v);
  for (int lane = 0; lane < n; ++lane) p[lane] = buffer[lane];
#endif
}

// Load and store a whole vector (n is ignored) if kWhole is true, else the first n elements.
template <bool kWhole, typename T>
FUSEDLOSS_INLINE VectorOf<T> load_lanes(const T* p, int n) {
  if constexpr (kWhole) {
    return load(p);
  } else {
    return load_first(p, n);
  }
}
template <bool kWhole, typename T>
FUSEDLOSS_INLINE void store_lanes(T* p, VectorOf<T> v, int n) {
  if constexpr (kWhole) {
    store(p, v);
  } else {
    store_first(p, v, n);
  }
}

// Load and store a single element. A vector is used so that the element is rounded like the others.
template <typename T>
FUSEDLOSS_INLINE AccumulateType<T> load_one(const T* p) {
  if constexpr (std::is_same_v<T, AccumulateType<T>>) {
    return *p;
  } else {
    return load_first(p, 1)[0];
  }
}
template <typename T>
FUSEDLOSS_INLINE void store_one(T* p, AccumulateType<T> value) {
  if constexpr (std::is_same_v<T, AccumulateType<T>>) {
    *p = value;
  } else {
    store_first(p, VectorOf<T>{} + value, 1);
  }
}

// Returns v, and keeps the compiler from fusing the product v with a later addition. If the same product is computed in
// two places, it is then rounded in both.
template <typename V>
FUSEDLOSS_INLINE V prevent_contraction(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// ---- the lanes of a vector as doubles, one DoubleV at a time: a vector of floats has parts 0 and 1, one of doubles
// has part 0 ----

template <typename A>
constexpr int kDoubleParts = sizeof(double) / sizeof(A);

FUSEDLOSS_INLINE DoubleV double_part(DoubleV v, int) { return v; }
FUSEDLOSS_INLINE DoubleV double_part(FloatV v, int part) {
  typedef float Half __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES / 2)));
  Half half;
  __builtin_memcpy(&half, reinterpret_cast<const char*>(&v) + part * sizeof half, sizeof half);
#if FUSEDLOSS_VECTOR_BYTES == 64
  return (DoubleV)_mm512_maskz_cvtps_pd(0xff, (__m256)half);  // g++ 12 splits the general conversion into two
#else
  return __builtin_convertvector(half, DoubleV);
#endif
}

template <typename A>
FUSEDLOSS_INLINE void store_double_part(A* p, DoubleV v, int part) {
  typedef A Part __attribute__((vector_size(Simd<double>::kLanes * sizeof(A))));
  const Part narrow = __builtin_convertvector(v, Part);
  __builtin_memcpy(p + part * Simd<double>::kLanes, &narrow, sizeof narrow);
}

FUSEDLOSS_END_NAMESPACE

#endif  // include guard
