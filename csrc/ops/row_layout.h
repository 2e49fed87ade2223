// Describes a tensor of shape (C), (N, C) or (N, C, d1, …) as [outer, classes, inner], so that the kernels need only
// three sizes and three strides.
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
  kRows,     // the classes of a row are adjacent in memory
  kColumns,  // inner positions are adjacent
  kSwapped   // (N, C) stored as (C, N): outer positions are adjacent; columns once outer and inner are swapped
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

// The shape of a tensor with one value for each row: (), (N) or (N, d1, …).
inline Dimensions sizes_of_rows(const at::Tensor& t) {
  Dimensions sizes(t.sizes().begin(), t.sizes().end());
  sizes.erase(sizes.begin() + (t.dim() == 1 ? 0 : 1));
  return sizes;
}

// True unless the strides rule out that two elements share memory. They do if, for the dimensions in the order of their
// strides, each stride steps past all elements that the dimensions before it span.
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

// Returns the one stride that traverses d1, …, dK as a single dimension, or std::nullopt if there is none.
inline std::optional<int64_t> inner_stride(const at::Tensor& t) {
  int64_t stride = 0, size = 0;  // of the dimensions merged so far; size 0: none yet
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
  if (t.numel() == 0) return Strides{0, 1, 0};  // any strides are right for a tensor without elements
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

// Returns an uninitialised, dense tensor in the given layout, with the shape and dtype of t.
inline at::Tensor empty_in_layout(const at::Tensor& t, Layout layout) {
  Dimensions order;  // of the dimensions: the one with stride 1 first
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

// Returns t itself if it has the layout, else a copy that has it.
inline at::Tensor in_layout(const at::Tensor& t, const RowSizes& sizes, Layout layout) {
  if (layout_of(t, sizes) == layout) return t;
  return empty_in_layout(t, layout).copy_(t);
}

// Returns the strides that are passed to the kernels.
inline Strides kernel_strides(const at::Tensor& t, Layout layout) {
  const Strides s = *row_strides(t);
  return layout == Layout::kSwapped ? Strides{0, s.classes, s.outer} : s;
}

// A gradient (grad) and the tensor that the kernels write (written): the same tensor if grad has the layout, else a
// temporary that has it. take() copies the temporary into grad.
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
