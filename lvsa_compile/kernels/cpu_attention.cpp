// Attention of query blocks over ranges of keys on the CPU: the kernel of the lowering "cpu".
//
// Keys that all sparse query blocks attend (anchors, text) are packed first, the other keys behind them, so that what a latent frame
// attends is two or three runs of packed keys.  A tile of query rows walks its runs with the online softmax of FlashAttention
// (arXiv 2205.14135): nothing is gathered per frame, and nothing is merged afterwards.  Packing is also what the matrix products want.
//
// Written with the vector extensions of GCC and Clang; widths follow from the flags of the compilation.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 12;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRows = 6;  // 12 of 16
#else
constexpr int kVectorBytes = 16, kRows = 8;  // 16 of 32 (NEON)
#endif
constexpr int64_t kLanes = kVectorBytes / 4;
constexpr int64_t kTileRows = 120;   // query rows that share one pass over the keys
constexpr int64_t kTileKeys = 256;   // keys scored before each softmax
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kStride = 272;     // of rows in a tile's buffers; no power of two, so that rows do not share cache sets
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
static_assert(kStride >= kMaxHeadDim && kStride >= kTileKeys);

typedef float Vector __attribute__((vector_size(kVectorBytes)));
typedef int32_t Lanes __attribute__((vector_size(kVectorBytes)));

inline Vector load(const float* p) { Vector v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }
inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Range { int64_t start, end; };

// ---------------------------------------------------------------------------------------------------------------- elements

struct BFloat16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { uint32_t bits = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &bits, 4); return f; }
inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out.bits = std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}
#ifdef __FLT16_MAX__
inline float to_float(_Float16 x) { return float(x); }
inline void from_float(float x, _Float16& out) { out = _Float16(x); }
#endif

// ---------------------------------------------------------------------------------------------------------------- products

// How the factors of a product lie in 32-bit words: one in each, widened to float32.
template <typename T>
struct Factors {
  static constexpr int64_t kPerWord = 1;
  static void put(float* word, int64_t, T x) { *word = to_float(x); }
  static Vector add_product(Vector sum, float a, Vector column) { return sum + a * column; }
  static void take_weights(float*, int64_t) {}
};

#ifdef __AVX512BF16__
// Two neighbours along the depth of the product in each, for the dot products that accumulate pairs of bfloat16 in float32.
template <>
struct Factors<BFloat16> {
  static constexpr int64_t kPerWord = 2;
  static void put(float* word, int64_t place, BFloat16 x) { std::memcpy(reinterpret_cast<char*>(word) + 2 * place, &x, 2); }
  static Vector add_product(Vector sum, float a, Vector column) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)column);
  }
  // Rounds a row of weights, panels * kLanes of float32, in place.
  static void take_weights(float* row, int64_t panels) {
    for (int64_t p = 0; p < panels; ++p) {
      const __m256bh half = _mm512_cvtneps_pbh((__m512)load(row + p * kLanes));
      std::memcpy(row + p * kLanes / 2, &half, sizeof half);
    }
  }
};
#endif

template <typename T>
constexpr int64_t words(int64_t factors) { return (factors + Factors<T>::kPerWord - 1) / Factors<T>::kPerWord; }

// C[rows, panels * kLanes] (+)= A[rows, depth] B, where B is panels of kLanes columns: B[panel][depth][kLanes]; depth in words.
template <typename T, int ROWS, int PANELS>
void multiply_block(const float* a, const float* b, int64_t panel_stride, int64_t depth, float* c, bool accumulate) {
  Vector sum[ROWS][PANELS];
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p) sum[r][p] = Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[PANELS];
    for (int p = 0; p < PANELS; ++p) column[p] = load(b + p * panel_stride + k * kLanes);
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < PANELS; ++p) sum[r][p] = Factors<T>::add_product(sum[r][p], a[r * kStride + k], column[p]);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int p = 0; p < PANELS; ++p) {
      float* to = c + r * kStride + p * kLanes;
      store(to, accumulate ? load(to) + sum[r][p] : sum[r][p]);  // added last, as sums of sums lose less
    }
}

typedef void (*MultiplyBlock)(const float*, const float*, int64_t, int64_t, float*, bool);

template <typename T, int ROWS>
struct Blocks {
  static void fill(MultiplyBlock (*table)[2]) {
    table[ROWS][0] = multiply_block<T, ROWS, 1>;
    table[ROWS][1] = multiply_block<T, ROWS, 2>;
    Blocks<T, ROWS - 1>::fill(table);
  }
};
template <typename T>
struct Blocks<T, 0> {
  static void fill(MultiplyBlock (*)[2]) {}
};

template <typename T>
struct Multiplications {
  MultiplyBlock of[kRows + 1][2];
  Multiplications() { Blocks<T, kRows>::fill(of); }
};

template <typename T>
void multiply(const float* a, int64_t rows, const float* b, int64_t panels, int64_t panel_stride, int64_t depth, float* c, bool accumulate) {
  typedef std::conditional_t<Factors<T>::kPerWord == 1, float, T> Kind;  // all that are widened share their code
  static const Multiplications<Kind> multiplications;
  const int64_t groups = (rows + kRows - 1) / kRows;
  for (int64_t p = 0; p < panels; p += 2) {
    const int64_t wide = std::min<int64_t>(2, panels - p);
    for (int64_t g = 0, r = 0; g < groups; ++g) {
      const int64_t next = rows * (g + 1) / groups;
      multiplications.of[next - r][wide - 1](a + r * kStride, b + p * panel_stride, panel_stride, depth, c + r * kStride + p * kLanes, accumulate);
      r = next;
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------- softmax

// 2^x for x <= 0: a polynomial on [-1/2, 1/2] (error 1e-8) put at its power of two; exactly 0 below the normal numbers.
inline Vector exp2_of(Vector x) {
  const Vector shift = Vector{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Vector bounded = x < -126.0f ? Vector{} - 126.0f : x;  // not a number stays so
  const Vector shifted = bounded + shift;
  const Vector f = bounded - (shifted - shift);
  Vector y = f * 1.540353039338161e-4f + 1.333355814642844e-3f;
  y = y * f + 9.618129107628477e-3f;
  y = y * f + 5.550410866482158e-2f;
  y = y * f + 2.402265069591007e-1f;
  y = y * f + 6.931471805599453e-1f;
  y = y * f + 1.0f;
  const Vector powered = (Vector)((Lanes)y + ((Lanes)shifted << 23));
  return x < -126.0f ? Vector{} : powered;
}

inline float largest_of(Vector v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
inline float sum_of(Vector v) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}

// What a thread works in.  Kept between calls, so that small calls do not pay for fresh pages.
struct Workspace {
  float* query;
  float* score;
  float* output;
  float largest[kTileRows];  // of the scores so far, times log2(e)
  float total[kTileRows];
  Workspace() {
    const size_t bytes = kTileRows * kStride * sizeof(float);
    query = static_cast<float*>(std::aligned_alloc(64, 3 * bytes));
    if (!query) throw std::bad_alloc();
    score = query + kTileRows * kStride;
    output = score + kTileRows * kStride;
  }
  ~Workspace() { std::free(query); }
};

// Scores of one row become weights; the row's output and total move to the new largest score.
void soften_row(Workspace& work, int64_t row, int64_t panels, float scale, const float* mask, int64_t value_panels) {
  float* score = work.score + row * kStride;
  Vector most = Vector{} + kMinusInfinity;
  if (mask) {
    for (int64_t p = 0; p < panels; ++p) {
      const Vector s = load(score + p * kLanes) * scale + load(mask + p * kLanes);
      store(score + p * kLanes, s);
      most = s > most ? s : most;
    }
    scale = 1.0f;
  } else {
    for (int64_t p = 0; p < panels; ++p) {
      const Vector s = load(score + p * kLanes);
      most = s > most ? s : most;
    }
  }
  const float before = work.largest[row];
  const float largest = std::max(before, largest_of(most) * scale);
  if (largest > before) {
    const float shrink = std::exp2(before - largest);
    work.largest[row] = largest;
    work.total[row] *= shrink;
    float* output = work.output + row * kStride;
    for (int64_t p = 0; p < value_panels; ++p) store(output + p * kLanes, load(output + p * kLanes) * shrink);
  }
  const float base = largest == kMinusInfinity ? 0.0f : largest;
  Vector total = Vector{};
  for (int64_t p = 0; p < panels; ++p) {
    const Vector weight = exp2_of(load(score + p * kLanes) * scale - base);
    store(score + p * kLanes, weight);
    total += weight;
  }
  work.total[row] += sum_of(total);
}

// -------------------------------------------------------------------------------------------------------------------- plan

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
        for (int64_t i = std::lower_bound(cuts.begin(), cuts.end(), start) - cuts.begin(); i < intervals && cuts[i] < end; ++i) attends[b][i] = 1;
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

// -------------------------------------------------------------------------------------------------------------------- call

}  // namespace

extern "C" struct LvsaAttention {
  const void *query, *key, *value;
  const float* mask;  // added to the scores, or null
  void* output;
  float* log_sum_exp;  // [batch, heads, query_length]
  const int32_t *query_bounds, *key_ranges;
  int64_t batch, heads, key_heads, query_length, key_length, head_dim, value_dim, blocks, ranges;
  int64_t query_strides[4], key_strides[4], value_strides[4], output_strides[4], mask_strides[4];
  double scale;
  int64_t dtype;  // 0 float32, 1 bfloat16, 2 float16
  int64_t threads;
};

namespace {

constexpr int64_t kAhead = 8;  // rows fetched before they are read: rows of one head lie far apart, where no hardware looks ahead

template <typename T>
inline void fetch(const T* row, int64_t elements) {
  for (int64_t at = 0; at < elements; at += int64_t(64 / sizeof(T))) __builtin_prefetch(row + at);
}

// Packed keys and values of some heads.
struct Packed {
  std::unique_ptr<float[], decltype(&std::free)> memory{nullptr, &std::free};
  int64_t key_size = 0, value_size = 0, mask_size = 0, masks = 0, slot_size = 0;

  template <typename T>
  void allocate(int64_t slots, const Plan& plan, const LvsaAttention& call, int64_t masks_per_slot) {
    mask_size = rounded_up(plan.keys, kLanes);
    key_size = mask_size * words<T>(call.head_dim);
    value_size = words<T>(mask_size) * rounded_up(call.value_dim, kLanes);
    masks = masks_per_slot;
    slot_size = rounded_up(key_size + value_size + masks * mask_size, 16);
    memory.reset(static_cast<float*>(std::aligned_alloc(64, rounded_up(std::max<int64_t>(slots * slot_size, 16) * sizeof(float), 64))));
    if (!memory) throw std::bad_alloc();
  }
  float* key(int64_t slot) const { return memory.get() + slot * slot_size; }
  float* value(int64_t slot) const { return key(slot) + key_size; }
  float* mask(int64_t slot, int64_t number) const { return value(slot) + value_size + number * mask_size; }
};

template <typename T>
struct Attention {
  const LvsaAttention& call;
  const Plan& plan;
  const int64_t group = call.heads / call.key_heads;
  static constexpr int64_t kPerWord = Factors<T>::kPerWord;
  const int64_t packed_keys = rounded_up(plan.keys, kLanes);
  const int64_t depth = words<T>(call.head_dim);
  const int64_t value_panels = rounded_up(call.value_dim, kLanes) / kLanes;
  const int64_t masks_per_slot = !call.mask ? 0 : call.mask_strides[1] ? group : 1;
  const float sign = call.scale < 0 ? -1.0f : 1.0f;
  const float scale = float(std::fabs(call.scale) * 1.44269504088896340736);

  // Packs the keys at [first, last) of the packed order, first a multiple of kLanes.
  void pack(const Packed& to, int64_t slot, int64_t pair, int64_t first, int64_t last) const {
    const int64_t b = pair / call.key_heads, h = pair % call.key_heads;
    const T* key = static_cast<const T*>(call.key) + b * call.key_strides[0] + h * call.key_strides[1];
    const T* value = static_cast<const T*>(call.value) + b * call.value_strides[0] + h * call.value_strides[1];
    float* value_to = to.value(slot);
    int64_t at = 0;
    for (const Range& range : plan.order) {
      const int64_t length = range.end - range.start;
      for (int64_t i = std::max(at, first); i < std::min(at + length, last); ++i) {
        const int64_t source = range.start + i - at;
        const T* k = key + source * call.key_strides[2];
        if (source + kAhead < range.end) {
          fetch(k + kAhead * call.key_strides[2], call.head_dim);
          fetch(value + (source + kAhead) * call.value_strides[2], call.value_dim);
        }
        float* key_to = to.key(slot) + i / kLanes * kLanes * depth + i % kLanes;
        for (int64_t d = 0; d < call.head_dim; ++d) Factors<T>::put(key_to + d / kPerWord * kLanes, d % kPerWord, k[d * call.key_strides[3]]);
        if (call.head_dim % kPerWord) Factors<T>::put(key_to + (depth - 1) * kLanes, kPerWord - 1, T{});
        const T* v = value + source * call.value_strides[2];
        for (int64_t p = 0; p < value_panels; ++p) {
          float* row = value_to + (p * words<T>(packed_keys) + i / kPerWord) * kLanes;
          const int64_t columns = std::min(kLanes, call.value_dim - p * kLanes);
          if (call.value_strides[3] == 1) {
            for (int64_t d = 0; d < columns; ++d) Factors<T>::put(row + d, i % kPerWord, v[p * kLanes + d]);
          } else {
            for (int64_t d = 0; d < columns; ++d) Factors<T>::put(row + d, i % kPerWord, v[(p * kLanes + d) * call.value_strides[3]]);
          }
          for (int64_t d = columns; d < kLanes; ++d) Factors<T>::put(row + d, i % kPerWord, T{});
        }
        for (int64_t m = 0; m < masks_per_slot; ++m)
          to.mask(slot, m)[i] = kLog2e * call.mask[b * call.mask_strides[0] + (h * group + m) * call.mask_strides[1] + source * call.mask_strides[3]];
      }
      at += length;
    }
    for (int64_t i = std::max(at, first); i < last; ++i) {  // behind the last key
      float* key_to = to.key(slot) + i / kLanes * kLanes * depth + i % kLanes;
      for (int64_t d = 0; d < depth; ++d) key_to[d * kLanes] = 0;
      for (int64_t p = 0; p < value_panels; ++p)
        for (int64_t d = 0; d < kLanes; ++d) Factors<T>::put(value_to + (p * words<T>(packed_keys) + i / kPerWord) * kLanes + d, i % kPerWord, T{});
      for (int64_t m = 0; m < masks_per_slot; ++m) to.mask(slot, m)[i] = 0;
    }
  }

  // Rows [first, last) of the tile attend packed keys [start, end).
  void attend(Workspace& work, int64_t first, int64_t last, Range run, const float* key, const float* value, const float* mask) const {
    for (int64_t base = run.start / kLanes * kLanes; base < run.end; base += kTileKeys) {
      const int64_t start = std::max(base, run.start), end = std::min(base + kTileKeys, run.end);
      const int64_t panels = (end - base + kLanes - 1) / kLanes;
      multiply<T>(work.query + first * kStride, last - first, key + base * depth, panels, kLanes * depth, depth, work.score + first * kStride, false);
      for (int64_t row = first; row < last; ++row) {
        float* score = work.score + row * kStride;
        std::fill_n(score, start - base, kMinusInfinity);
        std::fill(score + (end - base), score + panels * kLanes, kMinusInfinity);
        soften_row(work, row, panels, scale, mask ? mask + base : nullptr, value_panels);
        Factors<T>::take_weights(score, panels);
      }
      const int64_t word = start / kPerWord;  // what shares a word with the first or last key has weight 0
      multiply<T>(work.score + first * kStride + word - base / kPerWord, last - first, value + word * kLanes, value_panels, words<T>(packed_keys) * kLanes, words<T>(end) - word, work.output + first * kStride, true);
    }
  }

  void compute(Workspace& work, const Packed& from, int64_t slot, int64_t pair, int64_t member, const Tile& tile) const {
    const int64_t b = pair / call.key_heads, h = pair % call.key_heads * group + member, rows = tile.end - tile.start;
    const T* query = static_cast<const T*>(call.query) + b * call.query_strides[0] + h * call.query_strides[1];
    for (int64_t r = 0; r < rows; ++r) {
      const T* q = query + (tile.start + r) * call.query_strides[2];
      if (r + kAhead < rows) fetch(q + kAhead * call.query_strides[2], call.head_dim);
      float* query_to = work.query + r * kStride;
      query_to[depth - 1] = 0;
      for (int64_t d = 0; d < call.head_dim; ++d) {
        T signed_one;
        from_float(sign * to_float(q[d * call.query_strides[3]]), signed_one);
        Factors<T>::put(query_to + d / kPerWord, d % kPerWord, signed_one);
      }
      std::fill_n(work.output + r * kStride, value_panels * kLanes, 0.0f);
      work.largest[r] = kMinusInfinity;
      work.total[r] = 0;
    }
    const float *key = from.key(slot), *value = from.value(slot);
    const float* mask = masks_per_slot ? from.mask(slot, masks_per_slot > 1 ? member : 0) : nullptr;
    const int64_t common = tile.dense ? plan.keys : plan.shared;
    if (common) attend(work, 0, rows, {0, common}, key, value, mask);
    if (!tile.dense) {
      for (int64_t block = tile.first_block; block < tile.last_block; ++block) {
        const int64_t first = std::max(plan.bounds[block], tile.start) - tile.start, last = std::min(plan.bounds[block + 1], tile.end) - tile.start;
        if (first >= last) continue;
        for (const Range& run : plan.own[block]) attend(work, first, last, run, key, value, mask);
      }
    }
    T* output = static_cast<T*>(call.output) + b * call.output_strides[0] + h * call.output_strides[1];
    float* log_sum_exp = call.log_sum_exp + (b * call.heads + h) * call.query_length + tile.start;
    for (int64_t r = 0; r < rows; ++r) {
      const float total = work.total[r], factor = total == 0 ? 0.0f : 1.0f / total;
      T* out = output + (tile.start + r) * call.output_strides[2];
      for (int64_t d = 0; d < call.value_dim; ++d) from_float(work.output[r * kStride + d] * factor, out[d * call.output_strides[3]]);
      log_sum_exp[r] = total == 0 ? kMinusInfinity : (work.largest[r] + std::log2(total)) / kLog2e;
    }
  }

  // Waves of heads: while some threads still compute one wave, others pack the next.
  void run() const {
    const int64_t pairs = call.batch * call.key_heads, tiles = int64_t(plan.tiles.size()), per_pair = tiles * group;
    if (!pairs || !per_pair) return;
    const int64_t enough = (32 * call.threads + per_pair - 1) / per_pair;  // tiles to share out between barriers
    const int64_t wave = std::max<int64_t>(1, enough >= pairs ? pairs : std::min(enough, pairs / 2));
    const int64_t chunk = 16 * kLanes, chunks = (packed_keys + chunk - 1) / chunk;
    Packed buffers[2];
    buffers[0].allocate<T>(wave, plan, call, masks_per_slot);
    if (wave < pairs) buffers[1].allocate<T>(wave, plan, call, masks_per_slot);
    const auto packs = [&](int64_t first) { return std::min(wave, pairs - first) * chunks; };
    const auto pack_one = [&](int64_t first, int64_t number) {
      const int64_t slot = number / chunks, start = number % chunks * chunk;
      pack(buffers[first / wave % 2], slot, first + slot, start, std::min(start + chunk, packed_keys));
    };
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(int(call.threads))
    {
      Workspace* work = nullptr;
      try {
        static thread_local Workspace mine;
        work = &mine;
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      const int64_t first_packs = packs(0);
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < first_packs; ++n) pack_one(0, n);
      for (int64_t first = 0; first < pairs && !failed; first += wave) {
        const int64_t items = std::min(wave, pairs - first) * per_pair, next = first + wave;
        const int64_t next_packs = next < pairs ? packs(next) : 0;
#pragma omp for schedule(dynamic) nowait
        for (int64_t n = 0; n < items; ++n) {
          const int64_t slot = n / per_pair, tile = n % per_pair / group, member = n % group;
          if (work) compute(*work, buffers[first / wave % 2], slot, first + slot, member, plan.tiles[tile]);
        }
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < next_packs; ++n) pack_one(next, n);
      }
    }
    if (failed) throw std::bad_alloc();
  }
};

template <typename T>
void run(const LvsaAttention& call, const Plan& plan) {
  Attention<T>{call, plan}.run();
}

}  // namespace

extern "C" int lvsa_knows_float16() {
#ifdef __FLT16_MAX__
  return 1;
#else
  return 0;
#endif
}

// 0: done; 1: out of memory; 2: a dtype this build does not know.
extern "C" int lvsa_attention(const LvsaAttention* call) try {
  const Plan plan(call->query_bounds, call->key_ranges, call->blocks, call->ranges, call->query_length, call->key_length);
  if (call->dtype == 0) run<float>(*call, plan);
  else if (call->dtype == 1) run<BFloat16>(*call, plan);
#ifdef __FLT16_MAX__
  else if (call->dtype == 2) run<_Float16>(*call, plan);
#endif
  else return 2;
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
