// Vectors of one instruction set, by the compilers' own vector extension: loads that widen to the accumulate type,
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

// The vector that T are computed in, and how many of them it holds.
template <typename T>
using VectorOf = typename Simd<AccumulateType<T>>::V;
template <typename T>
constexpr int kLanesOf = Simd<AccumulateType<T>>::kLanes;
// The same elements as they are stored.
template <typename T>
using StoredVectorOf = std::conditional_t<std::is_same_v<T, AccumulateType<T>>, VectorOf<T>, FloatH>;

// body(is_whole, i) for each vector of the T in [begin, end), of which i is the first: is_whole is std::true_type, and
// std::false_type for the elements at the end that fill no vector.
template <typename T, typename Index, typename Body>
FUSEDLOSS_INLINE void for_each_vector(Index begin, Index end, Body body) {
  Index i = begin;
  for (; i + kLanesOf<T> <= end; i += kLanesOf<T>) body(std::true_type{}, i);
  if (i < end) body(std::false_type{}, i);
}

// The same for [0, n), with kUnroll neighbouring vectors at a time as long as there are as many: body(is_whole, i, k),
// where k numbers those; it is 0 for the others.
template <typename T, int kUnroll, typename Body>
FUSEDLOSS_INLINE void for_each_vector_unrolled(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kUnroll * kLanesOf<T> <= n; i += kUnroll * kLanesOf<T>)
    FUSEDLOSS_UNROLL for (int k = 0; k < kUnroll; ++k) body(std::true_type{}, i + k * kLanesOf<T>, k);
  for_each_vector<T>(i, n, [&](auto whole, int64_t rest) __attribute__((always_inline)) { body(whole, rest, 0); });
}

// ---- 16-bit floats to float and back, round to nearest even ----

FUSEDLOSS_INLINE FloatV widen(FloatH bits, bfloat16) {
#if FUSEDLOSS_VECTOR_BYTES == 64  // the compiler would convert halves and join them
  const FloatU widened = (FloatU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);
#else
  const FloatU widened = __builtin_convertvector(bits, FloatU);
#endif
  return (FloatV)(widened << 16);
}

FUSEDLOSS_INLINE FloatH narrow(FloatV v, bfloat16) {
#if FUSEDLOSS_VECTOR_BYTES == 64
  // The instruction makes 0 of subnormal numbers, so those go the long way. Written out: to the compiler it is one of
  // an instruction set that not every machine with AVX-512 has.
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
  return (FloatV)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);  // g++ 12 warns of the unmasked ones
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
  // Exponent and fraction in place are the value times 2^-112, subnormals included.
  const FloatU magnitude = (FloatU)((FloatV)((half & 0x7fffu) << 13) * 0x1p112f);
  const FloatU infinite = (half & 0x7c00u) == 0x7c00u ? FloatU{} + 0x7f800000u : FloatU{};
  return (FloatV)(sign | magnitude | infinite);
}
FUSEDLOSS_INLINE FloatH narrow(FloatV v, float16) {
  const FloatU bits = (FloatU)v;
  const FloatU sign = (bits >> 16) & 0x8000u;
  const FloatU magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias the exponent by 127 - 15 and round the 13 bits that go.
  const FloatU normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal halves: adding 0.5 leaves their bits, rounded by the addition, in the sum's fraction.
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

// The vector from element i on, of a type that is known only at run time and has A for its statistics. A branch that is
// always taken the same way costs less than another compile of all that is between load and store.
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

// Lanes n and up are all ones.
template <typename A>
FUSEDLOSS_INLINE typename Simd<A>::I lanes_from(int n) {
  typename Simd<A>::I index;
  for (int lane = 0; lane < Simd<A>::kLanes; ++lane) index[lane] = lane;
  return index >= n;
}

#if FUSEDLOSS_VECTOR_BYTES == 32
// Less than 8 16-bit elements, in pieces that a register takes: by way of memory the load would wait for the stores.
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

// The first n < lanes elements, and no byte beyond them; the other lanes are 0.
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

// kWhole: a vector's worth, n being ignored; else the first n.
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

// A single element, by way of a vector, so that it is rounded as its neighbours are.
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

// v, which the compiler may not join with a later addition into one operation: where the same product is computed in
// two places, both then round it.
template <typename V>
FUSEDLOSS_INLINE V prevent_contraction(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// ---- the lanes of a vector as doubles, a DoubleV at a time: parts 0 and 1 of floats, part 0 of doubles ----

template <typename A>
constexpr int kDoubleParts = sizeof(double) / sizeof(A);

FUSEDLOSS_INLINE DoubleV double_part(DoubleV v, int) { return v; }
FUSEDLOSS_INLINE DoubleV double_part(FloatV v, int part) {
  typedef float Half __attribute__((vector_size(FUSEDLOSS_VECTOR_BYTES / 2)));
  Half half;
  __builtin_memcpy(&half, reinterpret_cast<const char*>(&v) + part * sizeof half, sizeof half);
#if FUSEDLOSS_VECTOR_BYTES == 64
  return (DoubleV)_mm512_maskz_cvtps_pd(0xff, (__m256)half);  // g++ 12 makes two of the general conversion
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
