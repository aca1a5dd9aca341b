// One phase of the table of key ranges as the order in which keys are packed, and as tiles of query rows.

namespace {

struct Tile {
  int64_t first_block, last_block;  // query blocks [first, last) ...
  int64_t start, end;               // ... and rows [start, end) of them
  bool dense;
};

// The order in which keys are packed, and which packed keys each query block attends.
struct Plan {
  std::vector<Range> order;               // ranges of keys, in packed order
  int64_t keys = 0;                       // packed keys
  int64_t shared = 0;                     // the first of them, that all sparse blocks attend
  std::vector<int64_t> bounds;            // rows of query blocks
  std::vector<std::vector<Range>> own;    // per query block: runs of packed keys beside the shared ones
  std::vector<Tile> tiles;

  Plan(const int32_t* query_bounds, const int32_t* key_ranges, int64_t blocks, int64_t ranges, int64_t query_length, int64_t key_length) {
    for (int64_t b = 0; b <= blocks; ++b) bounds.push_back(std::min<int64_t>(query_bounds[b], query_length));
    std::vector<int64_t> cuts{0, key_length};
    for (int64_t i = 0; i < blocks * ranges * 2; ++i) cuts.push_back(std::min<int64_t>(key_ranges[i], key_length));
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    const int64_t intervals = int64_t(cuts.size()) - 1;

    std::vector<std::vector<char>> attends(blocks, std::vector<char>(std::max<int64_t>(intervals, 0), 0));
    std::vector<char> dense(blocks);
    std::vector<int64_t> attended_by(std::max<int64_t>(intervals, 0), 0);
    int64_t sparse_blocks = 0;
    bool any_dense = false;
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t r = 0; r < ranges; ++r) {
        const int32_t* range = key_ranges + (b * ranges + r) * 2;
        const int64_t start = range[0], end = std::min<int64_t>(range[1], key_length);
        if (start >= end) continue;
        const int64_t first = std::lower_bound(cuts.begin(), cuts.end(), start) - cuts.begin();
        for (int64_t i = first; i < intervals && cuts[i] < end; ++i) attends[b][i] = 1;
      }
      dense[b] = std::all_of(attends[b].begin(), attends[b].end(), [](char a) { return a; });
      if (bounds[b] == bounds[b + 1]) continue;
      any_dense |= dense[b];
      if (dense[b]) continue;
      ++sparse_blocks;
      for (int64_t i = 0; i < intervals; ++i) attended_by[i] += attends[b][i];
    }

    std::vector<int64_t> place(intervals, -1);
    const auto take = [&](auto wanted) {
      for (int64_t i = 0; i < intervals; ++i) {
        if (!wanted(i)) continue;
        place[i] = keys;
        keys += cuts[i + 1] - cuts[i];
        if (!order.empty() && order.back().end == cuts[i]) order.back().end = cuts[i + 1];
        else order.push_back({cuts[i], cuts[i + 1]});
      }
    };
    if (sparse_blocks) take([&](int64_t i) { return attended_by[i] == sparse_blocks; });
    shared = keys;
    take([&](int64_t i) { return attended_by[i] > 0 && attended_by[i] < sparse_blocks; });
    if (any_dense) take([&](int64_t i) { return attended_by[i] == 0; });

    own.resize(blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      if (dense[b]) continue;
      for (int64_t i = 0; i < intervals; ++i) {
        if (!attends[b][i] || place[i] < shared) continue;
        const int64_t start = place[i], end = start + cuts[i + 1] - cuts[i];
        if (!own[b].empty() && own[b].back().end == start) own[b].back().end = end;
        else own[b].push_back({start, end});
      }
    }
    for (int64_t b = 0; b < blocks;) b = add_tiles(b, blocks, dense);
    std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& x, const Tile& y) { return x.dense > y.dense; });  // the heaviest first
  }

  // Tiles of block b, or of it and its small neighbours; returns the next block.
  int64_t add_tiles(int64_t b, int64_t blocks, const std::vector<char>& dense) {
    int64_t next = b + 1;
    while (next < blocks && dense[next] == dense[b] && bounds[next + 1] - bounds[b] <= kTileRows) ++next;
    const int64_t rows = bounds[next] - bounds[b], parts = (rows + kTileRows - 1) / kTileRows;
    for (int64_t part = 0; part < parts; ++part)
      tiles.push_back({b, next, bounds[b] + rows * part / parts, bounds[b] + rows * (part + 1) / parts, bool(dense[b])});
    return next;
  }
};

}  // namespace
