// Block mass: the sum of softmax probabilities in each block of queries and keys of the video.

namespace {

// Of one tile.  While it walks its keys the softmax's largest score still grows, so that sums are kept as they were, with the largest score
// of that time, and weighed when the log-sum-exp is known: one pass over the keys does.
struct Mass {
  struct Segment {
    int64_t column, end, key_block;  // columns [column, end) of a batch
  };

  void clear() {
    segments.clear();
    of_batch.assign(1, 0);
    rows.clear();
    used = 0;
  }

  // A batch begins: which of its columns are in which key blocks.
  template <typename B>
  void begin(const B& batch, const Blocks& blocks) {
    for (const auto& piece : batch) {
      const int64_t shift = piece.column + piece.start - piece.base - piece.source;  // from a key to its column
      const int64_t first = std::max(piece.source, blocks.key_first);
      const int64_t last = std::min(piece.source + piece.end - piece.start, blocks.key_first + blocks.tokens);
      for (int64_t at = first; at < last;) {
        const int64_t block = (at - blocks.key_first) / blocks.key_block;
        const int64_t next = std::min(last, blocks.key_first + (block + 1) * blocks.key_block);
        segments.push_back({at + shift, next + shift, block});
        at = next;
      }
    }
    rows.push_back({batch.row_lo, batch.row_hi});
    of_batch.push_back(int64_t(segments.size()));
    begun = of_batch[of_batch.size() - 2];
    const size_t wanted = size_t(used + (int64_t(segments.size()) - begun + 1) * kTileRows);
    if (sums.size() < wanted) sums.resize(wanted);
    largest = used, used += kTileRows;
    std::fill_n(sums.data() + largest, kTileRows, kMinusInfinity);
    first_sum = used, used += (int64_t(segments.size()) - begun) * kTileRows;
    starts.resize(of_batch.size() - 1);
    starts.back() = largest;
  }

  // The batch has no weights.
  void nothing() { std::fill_n(sums.data() + first_sum, (segments.size() - begun) * kTileRows, 0.0f); }

  // The weights of a row of the batch, before they are rounded for the next product.
  void note(const Rows& work, int64_t row) {
    const float* score = work.score + row * kStride;
    sums[largest + row] = work.largest[row];
    float* to = sums.data() + first_sum + row;
    for (size_t s = begun; s < segments.size(); ++s, to += kTileRows) {
      const Segment& segment = segments[s];
      if (segment.column % kLanes == 0 && segment.end % kLanes == 0) {
        Vector sum = Vector{};
        for (int64_t c = segment.column; c < segment.end; c += kLanes) sum += load(score + c);
        *to = sum_of(sum);
      } else {
        float sum = 0;
        for (int64_t c = segment.column; c < segment.end; ++c) sum += score[c];
        *to = sum;
      }
    }
  }

  // Adds the tile's part to the mass of its head.
  void give(const float* own, const float* known, const Tile& tile, const Blocks& blocks, float* mass) {
    const int64_t tile_rows = tile.end - tile.start;
    for (int64_t row = 0; row < tile_rows;) {
      const int64_t number = blocks.of_query(tile.start + row);
      int64_t stop = row + 1;
      while (stop < tile_rows && blocks.of_query(tile.start + stop) == number) ++stop;
      if (number >= 0) give(own, known, row, stop, blocks, mass + number * blocks.key_blocks);
      row = stop;
    }
  }

 private:
  std::vector<Segment> segments;
  std::vector<int64_t> of_batch, starts;  // the first segment of each batch, and where its numbers begin in `sums`
  std::vector<Range> rows;                // of each batch
  std::vector<float> sums, total;
  int64_t used = 0, largest = 0, first_sum = 0;
  size_t begun = 0;

  void give(const float* own, const float* known, int64_t from, int64_t to, const Blocks& blocks, float* mass) {
    total.assign(blocks.key_blocks, 0.0f);
    for (size_t batch = 0; batch + 1 < of_batch.size(); ++batch) {
      const float* most = sums.data() + starts[batch];
      const int64_t lo = std::max(from, rows[batch].start), hi = std::min(to, rows[batch].end);
      float factor[kTileRows];
      for (int64_t row = lo; row < hi; ++row) {
        const float weighed_by = known ? known[row] : own[row];
        factor[row] = most[row] == kMinusInfinity ? 0.0f : std::exp2(most[row] - weighed_by * kLog2e);
      }
      const float* sum = most + kTileRows;
      for (int64_t s = of_batch[batch]; s < of_batch[batch + 1]; ++s, sum += kTileRows) {
        float all = 0;
        for (int64_t row = lo; row < hi; ++row) all += factor[row] * sum[row];
        total[segments[s].key_block] += all;
      }
    }
    for (int64_t block = 0; block < blocks.key_blocks; ++block) {
#pragma omp atomic
      mass[block] += total[block];
    }
  }
};

}  // namespace
