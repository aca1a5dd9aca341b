// Matrix products of bfloat16 on tile registers (AMX), where the machine has them and its kernel lets the process use them.

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define LVSA_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef LVSA_TILES
constexpr int64_t kTileSide = 16;  // rows, and words of a row, of a tile register

// Asked once: a process that may not use tiles is killed when it does.
inline bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return allowed;
}

// Tile registers for products of so many rows over so many words of depth: sums in 0 to 3, rows in 4 and 5, columns in 6 and 7.
inline void configure_tiles(int64_t rows, int64_t depth) {
  alignas(64) uint8_t configuration[64] = {1};
  for (int tile = 0; tile < 8; ++tile) {
    configuration[16 + 2 * tile] = tile == 4 || tile == 5 ? uint8_t(4 * depth) : 64;
    configuration[48 + tile] = uint8_t(tile < 6 ? rows : depth);
  }
  asm volatile("" : : "r"(configuration) : "memory");  // GCC takes the instruction to read 8 bytes alone
  _tile_loadconfig(configuration);
}

// Tile registers of a thread, configured for whole tiles, from here to the end of the scope.
struct Tiles {
  Tiles() { configure_tiles(kTileSide, kTileSide); }
  ~Tiles() { _tile_release(); }
};

// C[16 ROWS, 16 PANELS] (+)= A B over `chunks` times 16 words of two bfloat16 each: the layout of panels is the one that tiles want.
template <int ROWS, int PANELS>
inline void multiply_tiles(const float* a, const float* b, int64_t panel_stride, int64_t chunks, float* c, bool accumulate) {
  constexpr int64_t bytes = kStride * sizeof(float), down = kTileSide * kStride;
  if (accumulate) {
    _tile_loadd(0, c, bytes);
    if constexpr (PANELS > 1) _tile_loadd(1, c + kTileSide, bytes);
    if constexpr (ROWS > 1) _tile_loadd(2, c + down, bytes);
    if constexpr (ROWS > 1 && PANELS > 1) _tile_loadd(3, c + down + kTileSide, bytes);
  } else {
    _tile_zero(0);
    if constexpr (PANELS > 1) _tile_zero(1);
    if constexpr (ROWS > 1) _tile_zero(2);
    if constexpr (ROWS > 1 && PANELS > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < chunks * kTileSide; k += kTileSide) {
    _tile_loadd(4, a + k, bytes);
    _tile_loadd(6, b + k * kLanes, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (PANELS > 1) {
      _tile_loadd(7, b + panel_stride + k * kLanes, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (ROWS > 1) {
      _tile_loadd(5, a + down + k, bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (ROWS > 1 && PANELS > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  if constexpr (PANELS > 1) _tile_stored(1, c + kTileSide, bytes);
  if constexpr (ROWS > 1) _tile_stored(2, c + down, bytes);
  if constexpr (ROWS > 1 && PANELS > 1) _tile_stored(3, c + down + kTileSide, bytes);
}

// C[rows, panels * 16], where rows and words of the depth are multiples of 16, or as many as tiles are configured for.
inline void multiply_in_tiles(const float* a, int64_t rows, const float* b, int64_t panels, int64_t panel_stride, int64_t depth, float* c,
                              bool accumulate) {
  const int64_t chunks = (depth + kTileSide - 1) / kTileSide;
  for (int64_t p = 0; p < panels; p += 2) {
    const bool two_panels = p + 1 < panels;
    for (int64_t r = 0; r < rows; r += 2 * kTileSide) {
      const float *from = a + r * kStride, *columns = b + p * panel_stride;
      float* to = c + r * kStride + p * kLanes;
      if (r + kTileSide < rows) {
        if (two_panels) multiply_tiles<2, 2>(from, columns, panel_stride, chunks, to, accumulate);
        else multiply_tiles<2, 1>(from, columns, panel_stride, chunks, to, accumulate);
      } else if (two_panels) multiply_tiles<1, 2>(from, columns, panel_stride, chunks, to, accumulate);
      else multiply_tiles<1, 1>(from, columns, panel_stride, chunks, to, accumulate);
    }
  }
}
#else
inline bool tiles_allowed() { return false; }
struct Tiles {};
#endif

}  // namespace
