// The online softmax of a tile.

namespace {

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

#ifdef __AVX512F__
inline float largest_of(Vector v) { return _mm512_reduce_max_ps((__m512)v); }
inline float sum_of(Vector v) { return _mm512_reduce_add_ps((__m512)v); }
#else
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
#endif

// The rows of a tile as the walk goes on.
struct Rows {
  float* query;
  float* score;
  float* output;
  float largest[kTileRows];  // of the scores so far, times log2(e)
  float total[kTileRows];
};

// What a mask does to some panels of keys: nothing, something, or it leaves none of them.
enum class Masking { none, some, all };

inline Masking masking_of(const float* mask, int64_t panels) {
  bool none = true, all = true;
  for (int64_t i = 0; i < panels * kLanes; ++i) {
    none &= mask[i] == 0.0f;
    all &= mask[i] == kMinusInfinity;
  }
  return none ? Masking::none : all ? Masking::all : Masking::some;
}

// Scores of one row become weights; the row's output and total move to the new largest score.
void soften_row(Rows& work, int64_t row, int64_t panels, float scale, const float* mask, int64_t value_panels) {
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

}  // namespace
