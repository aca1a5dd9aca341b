// Attention of query blocks over ranges of keys on the CPU: the kernel of the lowering "cpu".
//
// Keys that all sparse query blocks attend (anchors, text) are packed first, the other keys behind them, so that what a latent frame
// attends is two or three runs of packed keys.  A tile of query rows walks its runs with the online softmax of FlashAttention
// (arXiv 2205.14135): nothing is gathered per frame, and nothing is merged afterwards.  Packing is also what the matrix products want.
//
// Written with the vector extensions of GCC and Clang; widths follow from the flags of the compilation.

#include "vectors.h"
#include "products.h"
#include "softmax.h"
#include "plan.h"

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
        for (int64_t d = 0; d < call.head_dim; ++d)
          Factors<T>::put(key_to + d / kPerWord * kLanes, d % kPerWord, k[d * call.key_strides[3]]);
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
        const float* added = call.mask + b * call.mask_strides[0] + h * group * call.mask_strides[1] + source * call.mask_strides[3];
        for (int64_t m = 0; m < masks_per_slot; ++m) to.mask(slot, m)[i] = kLog2e * added[m * call.mask_strides[1]];
      }
      at += length;
    }
    for (int64_t i = std::max(at, first); i < last; ++i) {  // behind the last key
      float* key_to = to.key(slot) + i / kLanes * kLanes * depth + i % kLanes;
      for (int64_t d = 0; d < depth; ++d) key_to[d * kLanes] = 0;
      for (int64_t p = 0; p < value_panels; ++p) {
        float* row = value_to + (p * words<T>(packed_keys) + i / kPerWord) * kLanes;
        for (int64_t d = 0; d < kLanes; ++d) Factors<T>::put(row + d, i % kPerWord, T{});
      }
      for (int64_t m = 0; m < masks_per_slot; ++m) to.mask(slot, m)[i] = kMinusInfinity;
    }
  }

  // Rows [first, last) of the tile attend packed keys [start, end).
  void attend(Workspace& work, int64_t first, int64_t last, Range run, const float* key, const float* value, const float* mask) const {
    for (int64_t base = run.start / kLanes * kLanes; base < run.end; base += kTileKeys) {
      const int64_t start = std::max(base, run.start), end = std::min(base + kTileKeys, run.end);
      const int64_t panels = (end - base + kLanes - 1) / kLanes;
      const Masking masking = mask ? masking_of(mask + base, panels) : Masking::none;
      if (masking == Masking::all) continue;
      float *query = work.query + first * kStride, *scores = work.score + first * kStride, *output = work.output + first * kStride;
      multiply<T>(query, last - first, key + base * depth, panels, kLanes * depth, depth, scores, false);
      for (int64_t row = first; row < last; ++row) {
        float* score = work.score + row * kStride;
        std::fill_n(score, start - base, kMinusInfinity);
        std::fill(score + (end - base), score + panels * kLanes, kMinusInfinity);
        soften_row(work, row, panels, scale, masking == Masking::some ? mask + base : nullptr, value_panels);
        Factors<T>::take_weights(score, panels);
      }
      const int64_t word = start / kPerWord;  // what shares a word with the first or last key has weight 0
      multiply<T>(scores + word - base / kPerWord, last - first, value + word * kLanes, value_panels, words<T>(packed_keys) * kLanes,
                  words<T>(end) - word, output, true);
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
        const int64_t first = std::max(plan.bounds[block], tile.start) - tile.start;
        const int64_t last = std::min(plan.bounds[block + 1], tile.end) - tile.start;
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