// Attention of query blocks over ranges of keys on the CPU: the kernel of the lowering "cpu".
//
// Keys that all sparse query blocks attend (anchors, text) are packed first, the other keys behind them, so that what a latent frame
// attends is two or three runs of packed keys.  A tile of query rows walks its runs with the online softmax of FlashAttention
// (arXiv 2205.14135): nothing is gathered per frame, and nothing is merged afterwards.  Packing is also what the matrix products want.
//
// Written with the vector extensions of GCC and Clang; widths follow from the flags of the compilation.

#include "vectors.h"
#include "tiles.h"
#include "products.h"
#include "softmax.h"
#include "schedule.h"
#include "mass.h"
#include "workspace.h"

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
  // Blocks of the video, where query_block is not 0.
  const uint8_t* kept;             // [batch, heads, query blocks, bytes]: a bit for each key block; null: all
  const float* known_log_sum_exp;  // [batch, heads, tokens] of the video's queries, to weigh the mass by; null: that of this call
  float* mass;                     // [batch, heads, query blocks, key blocks], zero before; null: not wanted
  int64_t query_block, key_block, query_first, key_first, tokens;
};

namespace {

constexpr int64_t kAhead = 8;  // rows fetched before they are read: rows of one head lie far apart, where no hardware looks ahead

template <typename T>
inline void fetch(const T* row, int64_t elements) {
  for (int64_t at = 0; at < elements; at += int64_t(64 / sizeof(T))) __builtin_prefetch(row + at);
}

// Packed keys and values of some heads; of some size the memory is kept between calls, as fresh pages cost what a small call costs.
struct Packed {
  static constexpr int64_t kKept = int64_t(8) << 20;  // floats
  std::unique_ptr<float[], decltype(&std::free)> memory{nullptr, &std::free};
  int64_t key_size = 0, value_size = 0, mask_size = 0, masks = 0, slot_size = 0, held = 0;

  template <typename T>
  void allocate(int64_t slots, const Schedule& schedule, const LvsaAttention& call, int64_t masks_per_slot) {
    mask_size = rounded_up(schedule.keys, kLanes);
    key_size = mask_size * words<T>(call.head_dim);
    value_size = words<T>(mask_size) * rounded_up(call.value_dim, kLanes);
    masks = masks_per_slot;
    slot_size = rounded_up(key_size + value_size + masks * mask_size, 16);
    const int64_t wanted = rounded_up(std::max<int64_t>(slots * slot_size, 16), 16);
    if (wanted <= held) return;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, wanted * sizeof(float))));
    held = memory ? wanted : 0;
    if (!memory) throw std::bad_alloc();
  }
  void give_up_what_is_large() {
    if (held > kKept) memory.reset(), held = 0;
  }
  float* key(int64_t slot) const { return memory.get() + slot * slot_size; }
  float* value(int64_t slot) const { return key(slot) + key_size; }
  float* mask(int64_t slot, int64_t number) const { return value(slot) + value_size + number * mask_size; }
};

template <typename T>
struct Attention {
  const LvsaAttention& call;
  const Schedule& schedule;
  const Blocks& blocks;
  const int64_t group = call.heads / call.key_heads;
  static constexpr int64_t kPerWord = Factors<T>::kPerWord;
  const int64_t packed_keys = rounded_up(schedule.keys, kLanes);
  const int64_t depth = words<T>(call.head_dim);
  const int64_t value_panels = rounded_up(call.value_dim, kLanes) / kLanes;
  const int64_t masks_per_slot = !call.mask ? 0 : call.mask_strides[1] ? group : 1;
  const bool tiles = std::is_same_v<T, BFloat16> && tiles_allowed();
  const float sign = call.scale < 0 ? -1.0f : 1.0f;
  const float scale = float(std::fabs(call.scale) * 1.44269504088896340736);

  // Packs kLanes keys at once, where all of them are there; true where that is done, or was when the first of them was packed.
  bool transposed(int64_t i, int64_t place, int64_t length, int64_t first, int64_t last, int64_t source, const T* key, float* to) const {
#ifdef LVSA_TRANSPOSES
    if constexpr (sizeof(T) * kPerWord == sizeof(float)) {
      const int64_t lane = i % kLanes;
      if (call.key_strides[3] != 1 || call.head_dim % kPerWord || i - lane < first || place < lane || place - lane + kLanes > length || i - lane + kLanes > last)
        return false;
      if (lane) return true;
      const int64_t full = depth / kLanes * kLanes;
      for (int64_t d = 0; d < full; d += kLanes) {
        Vector rows[kLanes];
        for (int64_t r = 0; r < kLanes; ++r) std::memcpy(&rows[r], key + (source + r) * call.key_strides[2] + d * kPerWord, sizeof rows[r]);
        transpose(rows);
        for (int64_t r = 0; r < kLanes; ++r) store(to + (d + r) * kLanes, rows[r]);
      }
      for (int64_t d = full; d < depth; ++d)
        for (int64_t r = 0; r < kLanes; ++r)
          std::memcpy(to + d * kLanes + r, key + (source + r) * call.key_strides[2] + d * kPerWord, sizeof(float));
      return true;
    }
#endif
    return false;
  }

  // Packs the keys at [first, last) of the packed order, first a multiple of kLanes.
  void pack(const Packed& to, int64_t slot, int64_t pair, int64_t first, int64_t last) const {
    const int64_t b = pair / call.key_heads, h = pair % call.key_heads;
    const T* key = static_cast<const T*>(call.key) + b * call.key_strides[0] + h * call.key_strides[1];
    const T* value = static_cast<const T*>(call.value) + b * call.value_strides[0] + h * call.value_strides[1];
    float* value_to = to.value(slot);
    int64_t at = 0;
    for (const Range& range : schedule.order) {
      const int64_t length = range.end - range.start;
      for (int64_t i = std::max(at, first); i < std::min(at + length, last); ++i) {
        const int64_t source = range.start + i - at;
        const T* k = key + source * call.key_strides[2];
        if (source + kAhead < range.end) {
          fetch(k + kAhead * call.key_strides[2], call.head_dim);
          fetch(value + (source + kAhead) * call.value_strides[2], call.value_dim);
        }
        float* key_to = to.key(slot) + i / kLanes * kLanes * depth + i % kLanes;
        if (!transposed(i, i - at, length, first, last, source, key, key_to)) {
          for (int64_t d = 0; d < call.head_dim; ++d)
            Factors<T>::put(key_to + d / kPerWord * kLanes, d % kPerWord, k[d * call.key_strides[3]]);
          if (call.head_dim % kPerWord) Factors<T>::put(key_to + (depth - 1) * kLanes, kPerWord - 1, T{});
        }
        const T* v = value + source * call.value_strides[2];
        for (int64_t p = 0; p < value_panels; ++p) {
          float* row = value_to + (p * words<T>(packed_keys) + i / kPerWord) * kLanes;
          const int64_t columns = std::min(kLanes, call.value_dim - p * kLanes);
          if (call.value_strides[3] == 1 && kPerWord == 1) {
            Factors<T>::put_row(row, v + p * kLanes, columns);
          } else if (call.value_strides[3] == 1 && columns == kLanes) {
            Factors<T>::put_beside(row, i % kPerWord, v + p * kLanes);
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

  // Rows of a tile attend some items at once: as many keys as are scored before each softmax.
  void attend(Workspace& work, const Batch& batch, const float* key, const float* value, const float* mask, Mass* mass) const {
    const int64_t lo = batch.row_lo, rows = batch.row_hi - lo, panels = batch.columns / kLanes;
    alignas(64) float added[kTileKeys];
    Masking masking = Masking::none;
    if (mask) {
      for (const Piece& piece : batch) std::copy_n(mask + piece.base, piece.panels * kLanes, added + piece.column);
      masking = masking_of(added, panels);
      if (masking == Masking::all) {
        if (mass) mass->nothing();
        return;
      }
    }
    float *query = work.query + lo * kStride, *scores = work.score + lo * kStride, *output = work.output + lo * kStride;
    for (const Piece& piece : batch) {
      multiply<T>(query, rows, key + piece.base * depth, piece.panels, kLanes * depth, depth, scores + piece.column, false,
                  tiles);
      const int64_t before = piece.start - piece.base, after = piece.end - piece.base, all = piece.panels * kLanes;
      for (int64_t row = 0; row < rows && (before > 0 || after < all); ++row) {
        float* score = scores + row * kStride + piece.column;
        std::fill_n(score, before, kMinusInfinity);
        std::fill(score + after, score + all, kMinusInfinity);
      }
    }
    for (int64_t row = lo; row < batch.row_hi; ++row) {
      soften_row(work, row, panels, scale, masking == Masking::some ? added : nullptr, value_panels);
      if (mass) mass->note(work, row);
      Factors<T>::take_weights(work.score + row * kStride, panels);
    }
    for (const Piece& piece : batch) {  // what shares a word with the first or last key has weight 0
      const int64_t word = piece.start / kPerWord;
      multiply<T>(scores + piece.column / kPerWord + word - piece.base / kPerWord, rows, value + word * kLanes, value_panels,
                  words<T>(packed_keys) * kLanes, words<T>(piece.end) - word, output, true, tiles);
    }
  }

  // A tile walks its items.
  void walk(Workspace& work, const std::vector<Item>& items, const float* key, const float* value, const float* mask, Mass* mass) const {
    Batch batch;
    const auto flush = [&] {
      if (!batch.count) return;
      if (mass) mass->begin(batch, blocks);
      attend(work, batch, key, value, mask, mass);
      batch.count = batch.columns = 0;
    };
    for (const Item& item : items) {
      if (batch.count && (item.row_lo != batch.row_lo || item.row_hi != batch.row_hi)) flush();
      batch.row_lo = item.row_lo, batch.row_hi = item.row_hi;
      for (int64_t at = item.first, end = item.first + item.valid; at < end;) {
        if (batch.full()) flush();
        at = batch.add(at, end, item.source + at - item.first);
      }
    }
    flush();
  }

  void compute(Workspace& work, const Packed& from, int64_t slot, int64_t pair, int64_t member, int64_t number) const {
    const Tile& tile = schedule.tiles[number];
    const int64_t b = pair / call.key_heads, h = pair % call.key_heads * group + member, rows = tile.end - tile.start;
    const T* query = static_cast<const T*>(call.query) + b * call.query_strides[0] + h * call.query_strides[1];
    for (int64_t r = 0; r < rows; ++r) {
      const T* q = query + (tile.start + r) * call.query_strides[2];
      if (r + kAhead < rows) fetch(q + kAhead * call.query_strides[2], call.head_dim);
      float* query_to = work.query + r * kStride;
      query_to[depth - 1] = 0;
      if (sign > 0 && call.query_strides[3] == 1) {
        Factors<T>::put_row(query_to, q, call.head_dim);
      } else {
        for (int64_t d = 0; d < call.head_dim; ++d) {
          T signed_one;
          from_float(sign * to_float(q[d * call.query_strides[3]]), signed_one);
          Factors<T>::put(query_to + d / kPerWord, d % kPerWord, signed_one);
        }
      }
      std::fill_n(work.output + r * kStride, value_panels * kLanes, 0.0f);
      work.largest[r] = kMinusInfinity;
      work.total[r] = 0;
    }
    const float* mask = masks_per_slot ? from.mask(slot, masks_per_slot > 1 ? member : 0) : nullptr;
    const int64_t row_of_head = b * call.heads + h, query_blocks = blocks.any() ? (blocks.tokens - 1) / blocks.query_block + 1 : 0;
    if (blocks.any()) {
      const uint8_t* kept = blocks.kept ? blocks.kept + row_of_head * query_blocks * blocks.bytes : nullptr;
      schedule.items_in_blocks(tile, blocks, kept, work.items);
    }
    Mass* mass = call.mass ? &work.mass : nullptr;
    if (mass) mass->clear();
    walk(work, blocks.any() ? work.items : schedule.items[number], from.key(slot), from.value(slot), mask, mass);
    T* output = static_cast<T*>(call.output) + b * call.output_strides[0] + h * call.output_strides[1];
    float* log_sum_exp = call.log_sum_exp + row_of_head * call.query_length + tile.start;
    for (int64_t r = 0; r < rows; ++r) {
      const float total = work.total[r], factor = total == 0 ? 0.0f : 1.0f / total;
      T* out = output + (tile.start + r) * call.output_strides[2];
      const float* row = work.output + r * kStride;
      if (call.output_strides[3] == 1) {
        store_row(row, factor, out, call.value_dim);
      } else {
        for (int64_t d = 0; d < call.value_dim; ++d) from_float(row[d] * factor, out[d * call.output_strides[3]]);
      }
      log_sum_exp[r] = total == 0 ? kMinusInfinity : (work.largest[r] + std::log2(total)) / kLog2e;
    }
    if (mass) {
      const float* known = call.known_log_sum_exp ? call.known_log_sum_exp + row_of_head * blocks.tokens - blocks.query_first : nullptr;
      mass->give(log_sum_exp, known ? known + tile.start : nullptr, tile, blocks,
                 call.mass + row_of_head * query_blocks * blocks.key_blocks);
    }
  }

  // Waves of heads: while some threads still compute one wave, others pack the next.
  void run() const {
    const int64_t pairs = call.batch * call.key_heads, tiles = int64_t(schedule.tiles.size()), per_pair = tiles * group;
    if (!pairs || !per_pair) return;
    const int64_t enough = (32 * call.threads + per_pair - 1) / per_pair;  // tiles to share out between barriers
    const int64_t wave = std::max<int64_t>(1, enough >= pairs ? pairs : std::min(enough, pairs / 2));
    const int64_t chunk = 16 * kLanes, chunks = (packed_keys + chunk - 1) / chunk;
    static thread_local Packed kept_buffers[2];
    Packed* const buffers = kept_buffers;
    buffers[0].allocate<T>(wave, schedule, call, masks_per_slot);
    if (wave < pairs) buffers[1].allocate<T>(wave, schedule, call, masks_per_slot);
    const auto packs = [&](int64_t first) { return std::min(wave, pairs - first) * chunks; };
    const auto pack_one = [&](int64_t first, int64_t number) {
      const int64_t slot = number / chunks, start = number % chunks * chunk;
      pack(buffers[first / wave % 2], slot, first + slot, start, std::min(start + chunk, packed_keys));
    };
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(int(call.threads))
    {
      [[maybe_unused]] std::conditional_t<std::is_same_v<T, BFloat16>, std::optional<Tiles>, int> registers{};
      if constexpr (std::is_same_v<T, BFloat16>)
        if (tiles) registers.emplace();
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
          if (work) compute(*work, buffers[first / wave % 2], slot, first + slot, member, tile);
        }
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < next_packs; ++n) pack_one(next, n);
      }
    }
    for (Packed& buffer : kept_buffers) buffer.give_up_what_is_large();
    if (failed) throw std::bad_alloc();
  }
};

template <typename T>
void run(const LvsaAttention& call, const Schedule& schedule, const Blocks& blocks) {
  Attention<T>{call, schedule, blocks}.run();
}

}  // namespace

extern "C" int lvsa_knows_float16() {
#ifdef __FLT16_MAX__
  return 1;
#else
  return 0;
#endif
}

// Whether bfloat16 is multiplied on tile registers.
extern "C" int lvsa_has_tiles() { return tiles_allowed(); }

// 0: done; 1: out of memory; 2: a dtype this build does not know.
extern "C" int lvsa_attention(const LvsaAttention* call) try {
  const int64_t key_blocks = call->query_block ? (call->tokens - 1) / call->key_block + 1 : 0;
  const Blocks blocks{call->kept,      call->query_block, call->key_block, call->query_first,
                      call->key_first, call->tokens,      key_blocks,      (key_blocks + 7) / 8};
  const Schedule schedule(call->query_bounds, call->key_ranges, call->blocks, call->ranges, call->query_length, call->key_length, blocks);
  if (call->dtype == 0) run<float>(*call, schedule, blocks);
  else if (call->dtype == 1) run<BFloat16>(*call, schedule, blocks);
#ifdef __FLT16_MAX__
  else if (call->dtype == 2) run<_Float16>(*call, schedule, blocks);
#endif
  else return 2;
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}