// What tiles of query rows attend, as flat lists of packed keys: one phase of the table of key ranges, and blocks that are left out of it.

namespace {

struct Tile {
  int64_t first_block, last_block;  // query blocks [first, last) of the table ...
  int64_t start, end;               // ... and rows [start, end) of them
  bool dense;
};

// Rows [row_lo, row_hi) of a tile attend packed keys [first, first + valid), which begin with key `source` of the sequence.
struct Item {
  int64_t first, valid, row_lo, row_hi, source;
};

// Blocks of the video's queries and keys, and which of them are kept: a bit for each key block, by sample, head and query block.
struct Blocks {
  const uint8_t* kept;  // null: all
  int64_t query_block, key_block, query_first, key_first, tokens, key_blocks, bytes;
  bool any() const { return query_block > 0; }
  int64_t of_query(int64_t row) const { return row < query_first || row >= query_first + tokens ? -1 : (row - query_first) / query_block; }
};

// The order in which keys are packed, what each query block of the table attends of them, and the tiles.
struct Schedule {
  std::vector<Range> order;                     // ranges of keys, in packed order
  int64_t keys = 0;                             // packed keys
  std::vector<int64_t> bounds;                  // rows of query blocks
  std::vector<std::vector<Range>> attended;     // per query block: ranges of keys of the sequence
  std::vector<Tile> tiles;
  std::vector<std::vector<Item>> items;         // per tile, where no blocks are left out

  Schedule(const int32_t* query_bounds, const int32_t* key_ranges, int64_t table_blocks, int64_t ranges, int64_t query_length,
           int64_t key_length, const Blocks& blocks) {
    for (int64_t b = 0; b <= table_blocks; ++b) bounds.push_back(std::min<int64_t>(query_bounds[b], query_length));
    cuts = {0, key_length};
    for (int64_t i = 0; i < table_blocks * ranges * 2; ++i) cuts.push_back(std::min<int64_t>(key_ranges[i], key_length));
    const Range video{blocks.key_first, blocks.any() ? blocks.key_first + blocks.tokens : blocks.key_first};
    if (blocks.any()) cuts.insert(cuts.end(), {video.start, video.end});
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    const int64_t intervals = int64_t(cuts.size()) - 1;

    std::vector<std::vector<char>> attends(table_blocks, std::vector<char>(std::max<int64_t>(intervals, 0), 0));
    std::vector<char> dense(table_blocks);
    std::vector<int64_t> attended_by(std::max<int64_t>(intervals, 0), 0);
    int64_t sparse_blocks = 0;
    bool any_dense = false;
    for (int64_t b = 0; b < table_blocks; ++b) {
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

    // What all sparse query blocks attend (anchors, text) comes first, so that a block's keys are few runs.  Of blocks of the video some are
    // left out by head, so that it comes first and they begin where vectors do.
    place.assign(std::max<int64_t>(intervals, 0), -1);
    const auto take = [&](auto wanted) {
      for (int64_t i = 0; i < intervals; ++i) {
        if (place[i] >= 0 || !wanted(i)) continue;
        place[i] = keys;
        keys += cuts[i + 1] - cuts[i];
        if (!order.empty() && order.back().end == cuts[i]) order.back().end = cuts[i + 1];
        else order.push_back({cuts[i], cuts[i + 1]});
      }
    };
    if (blocks.any()) take([&](int64_t i) { return cuts[i] >= video.start && cuts[i] < video.end && (attended_by[i] || any_dense); });
    if (sparse_blocks) take([&](int64_t i) { return attended_by[i] == sparse_blocks; });
    const int64_t shared = blocks.any() ? 0 : keys;
    take([&](int64_t i) { return attended_by[i] > 0; });
    if (any_dense) take([](int64_t) { return true; });

    attended.resize(table_blocks);
    for (int64_t b = 0; b < table_blocks; ++b)
      for (int64_t i = 0; i < intervals; ++i) {
        if (!attends[b][i]) continue;
        if (!attended[b].empty() && attended[b].back().end == cuts[i]) attended[b].back().end = cuts[i + 1];
        else attended[b].push_back({cuts[i], cuts[i + 1]});
      }
    for (int64_t b = 0; b < table_blocks;) b = add_tiles(b, table_blocks, dense);
    std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& x, const Tile& y) { return x.dense > y.dense; });  // the heaviest first
    if (!blocks.any())
      for (const Tile& tile : tiles) items.push_back(items_of(tile, shared));
  }

  // What a tile attends of the blocks that are kept for a sample and head: `kept` are the bytes of its query blocks.
  void items_in_blocks(const Tile& tile, const Blocks& blocks, const uint8_t* kept, std::vector<Item>& found) const {
    found.clear();
    const int64_t video_end = blocks.key_first + blocks.tokens;
    for (int64_t b = tile.first_block; b < tile.last_block; ++b) {
      const int64_t lo = std::max(bounds[b], tile.start), hi = std::min(bounds[b + 1], tile.end);
      if (lo >= hi) continue;
      const int64_t number = blocks.of_query(lo), row_lo = lo - tile.start, row_hi = hi - tile.start;
      const uint8_t* bits = kept && number >= 0 ? kept + number * blocks.bytes : nullptr;
      const size_t from = found.size();
      for (const Range& range : attended[b]) {
        if (!bits) {
          add(range, row_lo, row_hi, from, found);
          continue;
        }
        add({range.start, std::min(range.end, blocks.key_first)}, row_lo, row_hi, from, found);
        const int64_t start = std::max(range.start, blocks.key_first), end = std::min(range.end, video_end);
        for (int64_t at = start; at < end;) {
          const int64_t block = (at - blocks.key_first) / blocks.key_block;
          const int64_t next = std::min(end, blocks.key_first + (block + 1) * blocks.key_block);
          if (bits[block / 8] >> block % 8 & 1) add({at, next}, row_lo, row_hi, from, found);
          at = next;
        }
        add({std::max(range.start, video_end), range.end}, row_lo, row_hi, from, found);
      }
    }
  }

 private:
  std::vector<int64_t> cuts, place;

  // Adds a range of keys of the sequence as packed keys, joined to the last item where it goes on from there.
  void add(Range range, int64_t row_lo, int64_t row_hi, size_t from, std::vector<Item>& found) const {
    if (range.start >= range.end) return;
    for (int64_t i = std::upper_bound(cuts.begin(), cuts.end(), range.start) - cuts.begin() - 1; cuts[i] < range.end; ++i) {
      const int64_t start = std::max(cuts[i], range.start), end = std::min(cuts[i + 1], range.end), first = place[i] + start - cuts[i];
      Item* last = found.size() > from ? &found.back() : nullptr;
      if (last && last->first + last->valid == first && last->source + last->valid == start) last->valid += end - start;
      else found.push_back({first, end - start, row_lo, row_hi, start});
      if (i + 2 == int64_t(cuts.size())) break;
    }
  }

  // What a tile attends where no blocks are left out: first what all its rows do.
  std::vector<Item> items_of(const Tile& tile, int64_t shared) const {
    const int64_t rows = tile.end - tile.start, common = tile.dense ? keys : shared;
    std::vector<Item> found;
    if (common) found.push_back({0, common, 0, rows, 0});
    for (int64_t b = tile.first_block; b < tile.last_block && !tile.dense; ++b) {
      const int64_t lo = std::max(bounds[b], tile.start), hi = std::min(bounds[b + 1], tile.end);
      const size_t from = found.size();
      if (lo >= hi) continue;
      std::vector<Item> own;
      for (const Range& range : attended[b]) add(range, lo - tile.start, hi - tile.start, 0, own);
      std::sort(own.begin(), own.end(), [](const Item& x, const Item& y) { return x.first < y.first; });
      for (const Item& item : own) {
        const int64_t first = std::max(item.first, shared), valid = item.first + item.valid - first;
        if (valid <= 0) continue;
        if (found.size() > from && found.back().first + found.back().valid == first) found.back().valid += valid;
        else found.push_back({first, valid, item.row_lo, item.row_hi, item.source + first - item.first});
      }
    }
    return found;
  }

  // Tiles of block b, or of it and its small neighbours; returns the next block.
  int64_t add_tiles(int64_t b, int64_t table_blocks, const std::vector<char>& dense) {
    int64_t next = b + 1;
    while (next < table_blocks && dense[next] == dense[b] && bounds[next + 1] - bounds[b] <= kTileRows) ++next;
    const int64_t rows = bounds[next] - bounds[b], parts = (rows + kTileRows - 1) / kTileRows;
    const auto cut = [&](int64_t part) { return std::min(rows, rounded_up(rows * part / parts, 16)); };  // what tile registers hold
    for (int64_t part = 0; part < parts; ++part)
      tiles.push_back({b, next, bounds[b] + cut(part), bounds[b] + cut(part + 1), bool(dense[b])});
    return next;
  }
};

}  // namespace
