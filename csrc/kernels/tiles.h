// Divides a tensor [outer, classes, inner] into tiles that threads fill. Either the classes or the inner positions of
// the tensor are contiguous. For both devices.
#pragma once

#include "kernels/integers.h"
#include "kernels/options.h"

namespace fusedloss {

struct Tile {
  int64_t outer, classes, inner;                  // sizes
  int64_t first_outer, first_class, first_inner;  // the position of its first element
};

// A tile's memory: count[0] * count[1] runs of `length` contiguous elements. Runs that are adjacent are joined.
struct Runs {
  int64_t start, length, count[2], step[2];
};

struct Tiling {
  int64_t outer, classes, inner;  // of the tensor
  Strides strides;
  Tile tile;  // the first tile; no other is larger
  int64_t inner_tiles, class_tiles, count;

  FUSEDLOSS_ANYWHERE Tile at(int64_t number) const {
    Tile t;
    t.first_class = number % class_tiles * tile.classes;
    t.first_inner = number / class_tiles % inner_tiles * tile.inner;
    t.first_outer = number / class_tiles / inner_tiles * tile.outer;
    t.outer = smaller(tile.outer, outer - t.first_outer);
    t.classes = smaller(tile.classes, classes - t.first_class);
    t.inner = smaller(tile.inner, inner - t.first_inner);
    return t;
  }

  FUSEDLOSS_ANYWHERE Runs runs_of(const Tile& t) const {
    const bool in_rows = strides.classes == 1;
    Runs r;
    r.start = t.first_outer * strides.outer + t.first_class * strides.classes + t.first_inner * strides.inner;
    r.length = in_rows ? t.classes : t.inner;
    r.count[0] = in_rows ? t.inner : t.classes;
    r.step[0] = in_rows ? strides.inner : strides.classes;
    r.count[1] = t.outer;
    r.step[1] = strides.outer;
    for (int joined = 0; joined < 2 && (r.count[0] == 1 || r.step[0] == r.length); ++joined) {
      r.length *= r.count[0];
      r.count[0] = r.count[1];
      r.step[0] = r.step[1];
      r.count[1] = 1;
    }
    return r;
  }
};

// No tile has more than about `elements` elements. The tensor must not be empty.
inline Tiling make_tiling(int64_t outer, int64_t classes, int64_t inner, const Strides& strides, int64_t elements) {
  Tiling g = {outer, classes, inner, strides, {}, 0, 0, 0};
  Tile& t = g.tile;
  if (strides.classes == 1) {
    t.classes = smaller(classes, elements);
    t.inner = smaller(inner, larger(1, elements / t.classes));
  } else {  // runs have at least elements / 32 inner positions if there are as many: shorter runs do not pay off
    t.inner = smaller(inner, larger(elements / classes, elements / 32));
    t.classes = smaller(classes, larger(1, elements / t.inner));
  }
  const bool whole = t.classes == classes && t.inner == inner;
  t.outer = whole ? smaller(outer, larger(1, elements / (classes * inner))) : 1;
  g.inner_tiles = divide_up(inner, t.inner);
  g.class_tiles = divide_up(classes, t.classes);
  g.count = divide_up(outer, t.outer) * g.inner_tiles * g.class_tiles;
  return g;
}

}  // namespace fusedloss
