// What a thread works in, and the keys that it scores at once.

namespace {

// Consecutive packed keys, all of one item: [start, end), in panels from `base` on, scored in columns from `column` on.
struct Piece {
  int64_t start, end, base, panels, column, source;
};

// Pieces that the same rows attend, as many as are scored before each softmax.
struct Batch {
  Piece pieces[kTileKeys / kLanes];
  int64_t count = 0, columns = 0, row_lo = 0, row_hi = 0;

  const Piece* begin() const { return pieces; }
  const Piece* end() const { return pieces + count; }
  bool full() const { return columns == kTileKeys; }

  // Adds what there is room for of packed keys [at, to); returns where it stopped.
  int64_t add(int64_t at, int64_t to, int64_t source) {
    const int64_t base = at / kLanes * kLanes, stop = std::min(to, base + kTileKeys - columns);
    const int64_t panels = (stop - base + kLanes - 1) / kLanes;
    pieces[count++] = {at, stop, base, panels, columns, source};
    columns += panels * kLanes;
    return stop;
  }
};

// Kept between calls, so that small calls do not pay for fresh pages.
struct Workspace : Rows {
  std::vector<Item> items;
  Mass mass;
  Workspace() {
    const size_t bytes = kTileRows * kStride * sizeof(float);
    query = static_cast<float*>(std::aligned_alloc(64, 3 * bytes));
    if (!query) throw std::bad_alloc();
    score = query + kTileRows * kStride;
    output = score + kTileRows * kStride;
  }
  ~Workspace() { std::free(query); }
};

}  // namespace
