// A tensor of shape (C), (N, C) or (N, C, d1, …) seen as [outer, classes, inner], so that kernels know three strides
// and no dimensions.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "kernels/options.h"
#include "ops/huge_pages.h"

namespace fusedloss {

// Sizes or strides. Up to eight of them need no allocation.
using Dimensions = c10::SmallVector<int64_t, 8>;

enum class Layout {
  kRows,     // classes lie side by side
  kColumns,  // inner positions do
  kSwapped   // (N, C) stored as (C, N): columns too, once outer and inner change places
};

struct RowSizes {
  int64_t outer = 1, classes = 1, inner = 1;
};

inline RowSizes row_sizes(const at::Tensor& t) {
  RowSizes sizes;
  if (t.dim() == 1) {
    sizes.classes = t.size(0);
  } else {
    sizes.outer = t.size(0);
    sizes.classes = t.size(1);
    for (int64_t d = 2; d < t.dim(); ++d) sizes.inner *= t.size(d);
  }
  return sizes;
}

// The shape of one value a row: (), (N) or (N, d1, …).
inline Dimensions sizes_of_rows(const at::Tensor& t) {
  Dimensions sizes(t.sizes().begin(), t.sizes().end());
  sizes.erase(sizes.begin() + (t.dim() == 1 ? 0 : 1));
  return sizes;
}

// May two of its elements be the same memory? Yes only where the strides leave that open: dimensions from the smallest
// stride to the largest, each must step over all of the one before.
inline bool may_overlap(const at::Tensor& t) {
  c10::SmallVector<std::pair<int64_t, int64_t>, 8> dims;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < extent) return true;
    extent += stride * (size - 1);
  }
  return false;
}

// The stride that serves all of d1, …, dK at once, if one does.
inline std::optional<int64_t> inner_stride(const at::Tensor& t) {
  int64_t stride = 0, size = 0;  // of the dimensions joined so far; size 0 is none yet
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (size == 0) {
      stride = t.stride(d);
      size = t.size(d);
    } else if (t.stride(d) == stride * size) {
      size *= t.size(d);
    } else {
      return std::nullopt;
    }
  }
  return stride;
}

inline std::optional<Strides> row_strides(const at::Tensor& t) {
  if (t.numel() == 0) return Strides{0, 1, 0};  // whatever it says, it has no elements to be apart
  if (t.dim() == 1) return Strides{0, t.size(0) == 1 ? 1 : t.stride(0), 0};
  const auto inner = inner_stride(t);
  if (!inner.has_value()) return std::nullopt;
  return Strides{t.size(0) == 1 ? 0 : t.stride(0), t.size(1) == 1 ? 1 : t.stride(1), *inner};
}

inline std::optional<Layout> layout_of(const at::Tensor& t, const RowSizes& sizes) {
  const auto strides = row_strides(t);
  if (!strides.has_value()) return std::nullopt;
  if (strides->classes == 1) return Layout::kRows;
  if (sizes.inner > 1) return strides->inner == 1 ? std::optional(Layout::kColumns) : std::nullopt;
  return sizes.outer > 1 && strides->outer == 1 ? std::optional(Layout::kSwapped) : std::nullopt;
}

// Uninitialised, of t's shape and dtype, dense, in the given layout.
inline at::Tensor empty_in_layout(const at::Tensor& t, Layout layout) {
  Dimensions order;  // dimensions, the one with stride 1 first
  if (layout == Layout::kSwapped) {
    order = {0, 1};
  } else {
    for (int64_t d = t.dim() - 1; d >= 0; --d)
      if (layout == Layout::kColumns || t.dim() == 1 || d != 1) order.push_back(d);
    if (layout == Layout::kRows && t.dim() > 1) order.insert(order.begin(), 1);
  }
  Dimensions strides(t.dim());
  int64_t stride = 1;
  for (const int64_t d : order) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, t.size(d));
  }
  return t.new_empty_strided(t.sizes(), strides);
}

// t itself where it has the layout, else a copy that has.
inline at::Tensor in_layout(const at::Tensor& t, const RowSizes& sizes, Layout layout) {
  if (layout_of(t, sizes) == layout) return t;
  return empty_in_layout(t, layout).copy_(t);
}

// The strides that the kernels are told.
inline Strides kernel_strides(const at::Tensor& t, Layout layout) {
  const Strides s = *row_strides(t);
  return layout == Layout::kSwapped ? Strides{0, s.classes, s.outer} : s;
}

// A gradient, and what the kernels write: the same memory, or a copy of it that has the layout.
struct GradientInLayout {
  at::Tensor grad, written;

  GradientInLayout(const at::Tensor& gradient, Layout layout)
      : grad(gradient),
        written(layout_of(gradient, row_sizes(gradient)) == layout ? gradient : empty_in_layout(gradient, layout)) {
    if (!written.is_same(grad)) prefer_huge_pages(written);
  }

  at::Tensor take() const { return written.is_same(grad) ? grad : grad.copy_(written); }
};

}  // namespace fusedloss
