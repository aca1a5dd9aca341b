// Matrix products of tiles: registers full of sums, panels of columns, one or two factors in each word.

namespace {

// How the factors of a product lie in 32-bit words: one in each, widened to float32.
template <typename T>
struct Factors {
  static constexpr int64_t kPerWord = 1;
  static void put(float* word, int64_t, T x) { *word = to_float(x); }
  static void put_row(float* words, const T* row, int64_t length) {
    if constexpr (std::is_same_v<T, float>) std::memcpy(words, row, length * sizeof(float));
    else
      for (int64_t i = 0; i < length; ++i) words[i] = to_float(row[i]);
  }
  static Vector add_product(Vector sum, float a, Vector column) { return sum + a * column; }
  static void put_beside(float* words, int64_t place, const T* row) {
    for (int64_t i = 0; i < kLanes; ++i) put(words + i, place, row[i]);
  }
  static void take_weights(float*, int64_t) {}
};

#ifdef __AVX512BF16__
// Two neighbours along the depth of the product in each, for the dot products that accumulate pairs of bfloat16 in float32.
template <>
struct Factors<BFloat16> {
  static constexpr int64_t kPerWord = 2;
  static void put(float* word, int64_t place, BFloat16 x) { std::memcpy(reinterpret_cast<char*>(word) + 2 * place, &x, 2); }
  static void put_row(float* words, const BFloat16* row, int64_t length) { std::memcpy(words, row, length * sizeof(BFloat16)); }
  // A row of values beside the one that shares its words: `place` says which of the two it is.
  static void put_beside(float* words, int64_t place, const BFloat16* row) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    const __m512i other = _mm512_loadu_si512(words);
    _mm512_storeu_si512(words, place ? _mm512_or_si512(_mm512_and_si512(other, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(wide, 16))
                                     : _mm512_or_si512(_mm512_and_si512(other, _mm512_set1_epi32(int(0xffff0000))), wide));
  }
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
struct Groups {
  static void fill(MultiplyBlock (*table)[2]) {
    table[ROWS][0] = multiply_block<T, ROWS, 1>;
    table[ROWS][1] = multiply_block<T, ROWS, 2>;
    Groups<T, ROWS - 1>::fill(table);
  }
};
template <typename T>
struct Groups<T, 0> {
  static void fill(MultiplyBlock (*)[2]) {}
};

template <typename T>
struct Multiplications {
  MultiplyBlock of[kRows + 1][2];
  Multiplications() { Groups<T, kRows>::fill(of); }
};

template <typename T>
void multiply_in_registers(const float* a, int64_t rows, const float* b, int64_t panels, int64_t panel_stride, int64_t depth, float* c,
                           bool accumulate) {
  typedef std::conditional_t<Factors<T>::kPerWord == 1, float, T> Kind;  // all that are widened share their code
  static const Multiplications<Kind> multiplications;
  const int64_t groups = (rows + kRows - 1) / kRows;
  for (int64_t p = 0; p < panels; p += 2) {
    const int64_t wide = std::min<int64_t>(2, panels - p);
    for (int64_t g = 0, r = 0; g < groups; ++g) {
      const int64_t next = rows * (g + 1) / groups;
      const MultiplyBlock block = multiplications.of[next - r][wide - 1];
      block(a + r * kStride, b + p * panel_stride, panel_stride, depth, c + r * kStride + p * kLanes, accumulate);
      r = next;
    }
  }
}

#ifdef LVSA_TILES
constexpr int64_t kLeastInTiles = 4;  // rows, and words of depth, that are worth configuring tiles for

// As `multiply`, of rows that are a multiple of 16, or `of_tile` of them.
inline void multiply_rows_in_tiles(const float* a, int64_t rows, int64_t of_tile, const float* b, int64_t panels, int64_t panel_stride,
                                   int64_t depth, float* c, bool accumulate) {
  const int64_t tiled = depth / kTileSide * kTileSide, rest = depth - tiled;
  if (tiled) {
    if (of_tile < kTileSide) configure_tiles(of_tile, kTileSide);
    multiply_in_tiles(a, rows, b, panels, panel_stride, tiled, c, accumulate);
  }
  a += tiled, b += tiled * kLanes, accumulate |= tiled > 0;
  if (rest >= kLeastInTiles) {
    configure_tiles(of_tile, rest);
    multiply_in_tiles(a, rows, b, panels, panel_stride, rest, c, accumulate);
  } else if (rest) {
    multiply_in_registers<BFloat16>(a, rows, b, panels, panel_stride, rest, c, accumulate);
  }
  if (of_tile < kTileSide || rest >= kLeastInTiles) configure_tiles(kTileSide, kTileSide);
}
#endif

template <typename T>
void multiply(const float* a, int64_t rows, const float* b, int64_t panels, int64_t panel_stride, int64_t depth, float* c,
              bool accumulate, bool tiles) {
#ifdef LVSA_TILES
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (tiles && depth >= kLeastInTiles) {
      const int64_t tiled = rows / kTileSide * kTileSide, rest = rows - tiled;
      if (tiled) multiply_rows_in_tiles(a, tiled, kTileSide, b, panels, panel_stride, depth, c, accumulate);
      a += tiled * kStride, c += tiled * kStride, rows = rest;
      if (rest >= kLeastInTiles) multiply_rows_in_tiles(a, rest, rest, b, panels, panel_stride, depth, c, accumulate);
      if (!rest || rest >= kLeastInTiles) return;
    }
  }
#endif
  multiply_in_registers<T>(a, rows, b, panels, panel_stride, depth, c, accumulate);
}

// Writes a row of float32 times a factor.
template <typename T>
void store_row(const float* from, float factor, T* to, int64_t length) {
  int64_t d = 0;
  if constexpr (std::is_same_v<T, float>)
    for (; d + kLanes <= length; d += kLanes) store(to + d, load(from + d) * factor);
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, BFloat16>)
    for (; d + kLanes <= length; d += kLanes) {
      const __m256bh half = _mm512_cvtneps_pbh((__m512)(load(from + d) * factor));
      std::memcpy(to + d, &half, sizeof half);
    }
#endif
  for (; d < length; ++d) from_float(from[d] * factor, to[d]);
}

}  // namespace
