// One token of one row through all layers as one kernel: an experiment, for decoding on a GPU.
//
// A token reads every weight once, so memory's speed is the bound. As some 300 kernels it waits for
// each of them to begin, and memory waits with it. Here each block of threads has its share of
// every matrix's outputs, and asks for weights far ahead of the sums that it is at, also while it
// waits for other blocks. The formulas are those of transformer.block, in float32 but for weights
// and rings, and so are the letters. Called by one_kernel.py, which compiles this file.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// ---- what can be left out, to see what is waited for --------------------------------------------

#ifdef WITHOUT_WAITS
constexpr bool kWaits = false;
#else
constexpr bool kWaits = true;
#endif
#ifdef WITHOUT_COPIES
constexpr bool kCopies = false;
#else
constexpr bool kCopies = true;
#endif

// ---- what the hardware does ---------------------------------------------------------------------

#ifndef EMULATED
#include <cuda_runtime.h>

using Stream = ffi::PlatformStream<cudaStream_t>;
constexpr int kThreads = 512;
constexpr int kLeastKeys = 256;  // for which a ring is split among blocks

__device__ inline char* shared_memory() {
  extern __shared__ uint4 memory[];
  return (char*)memory;
}

// 16 bytes on their way into shared memory, for which nobody waits yet
__device__ inline void copy_ahead(uint4* to, const void* from) {
  auto place = (uint32_t)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
}
__device__ inline void end_of_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// until all groups of this thread's copies but the last `most` have arrived
template <int most>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(most) : "memory");
}

// brings a number closer
__device__ inline void touch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// what all blocks see, and not an older copy
__device__ inline float shared_by_all(const float* from) {
  float v;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(from));
  return v;
}
__device__ inline float4 shared_by_all(const float4* from) {
  float4 v;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(from));
  return v;
}
__device__ inline void share_with_all(float* to, float v) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(v));
}
#endif

constexpr int kWarps = kThreads / 32;

__device__ inline int warp() { return threadIdx.x / 32; }
__device__ inline int lane() { return threadIdx.x % 32; }

// the sum over `lanes` neighbouring lanes, in each of them
__device__ inline float sum_over(int lanes, float v) {
  for (int far = lanes / 2; far; far /= 2) v += __shfl_xor_sync(~0u, v, far);
  return v;
}

// ---- numbers as they are stored -----------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

__device__ inline float as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
__device__ inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
__device__ inline float widened(float v) { return v; }
__device__ inline float widened(BFloat16 v) { return as_float((uint32_t)v.bits << 16); }

__device__ inline void store(float* to, float v) { *to = v; }
__device__ inline void store(BFloat16* to, float v) {
  // to the nearest, of two the even one
  uint32_t bits = bits_of(v);
  to->bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// numbers in 16 bytes, which a lane reads at once, and in what a warp reads at once
template <class E>
constexpr int kWide = 16 / sizeof(E);
template <class E>
constexpr int kPiece = 32 * kWide<E>;

template <class E>
__device__ inline void widen(uint4 stored, float* to) {
  const uint32_t words[4] = {stored.x, stored.y, stored.z, stored.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(E) == 4) {
      to[i] = as_float(words[i]);
    } else {
      to[2 * i] = as_float(words[i] << 16);
      to[2 * i + 1] = as_float(words[i] & 0xffff0000u);
    }
  }
}

template <class E>
__device__ inline float rounded(float v) {
  E stored;
  store(&stored, v);
  return widened(stored);
}

// ---- what there is to do ------------------------------------------------------------------------

// the products of a layer, in order; attention itself comes behind the first
enum Product { kQkv, kAttentionOut, kMlpIn, kMlpOut, kProducts };
enum Mlp { kRelu2, kGelu, kSwiglu };

constexpr int kMostLayers = 64;
constexpr int kMostSplits = 8;

template <class E>
struct Layer {
  const E* matrices[kProducts][3];  // q, k, v; output; in, gate; out: (outputs, inputs) each
  const E* value_gate;              // (channels, K), or null
  const E* value_embed;             // (K, H)
  const float *resid_scale, *x0_scale;  // or null
  E *k, *v;                             // rings (K, slots, H)
  int slots, window, splits;

  // what blocks tell each other: see `receive`
  const float* read[kProducts];
  float* written[kProducts];
  float* gates;         // of value embeddings (K)
  float *parts, *lses;  // attention by parts of a ring (N, splits, H), (N, splits)
};

template <class E>
struct Task {
  int layers, width, heads, kv_heads, head_width, mlp_width, gate_channels, mlp;
  bool qk_norm;
  float qk_scale, eps;
  // of each product: what it reads, that in pieces, its matrices' outputs, and all of them
  int inputs[kProducts], pieces[kProducts], outputs[kProducts][3], rows[kProducts];
  int most_read, most_rows;

  const float *x0, *cos, *sin;
  const int* length;
  Layer<E> layer[kMostLayers];
};

// ---- who does what ------------------------------------------------------------------------------

// rows that a warp takes together, which read the same inputs
constexpr int kRows = 2;

// a layer's scales of its stream, and of the embedding that is mixed in
struct Scales {
  float resid, x0;
};

// the rows of this block of a product
struct Rows {
  int first, count;
};

// A warp's part of a product: from a piece of a row on so many. Rows come by `kRows`, each in
// pieces, one behind the other, an equal number for each warp.
struct Share {
  int row, piece, left;
};

constexpr int kSumsOfRow = kWarps + 1;  // one more, for banks of memory

// shared memory behind the weights
struct Room {
  float* x;             // what a product reads
  float* sums;          // of each row of this block and each warp; zeros between products
  float* by_warp;       // a number of each warp
  float* part_weights;  // of each head and part of its ring
  Scales* scales;       // of each layer
  Rows* rows;           // of each product
  Share* shares;        // of each product, for this warp
};

template <class E>
static int room_bytes(const Task<E>& t) {
  int floats = t.most_read + t.most_rows * kSumsOfRow + kWarps + t.heads * kMostSplits;
  int bytes = floats * sizeof(float) + t.layers * sizeof(Scales);
  return bytes + kProducts * (sizeof(Rows) + kWarps * sizeof(Share));
}

template <class E>
__device__ inline Room room_at(const Task<E>& t, char* memory) {
  Room room;
  room.x = (float*)memory;
  room.sums = room.x + t.most_read;
  room.by_warp = room.sums + t.most_rows * kSumsOfRow;
  room.part_weights = room.by_warp + kWarps;
  room.scales = (Scales*)(room.part_weights + t.heads * kMostSplits);
  room.rows = (Rows*)(room.scales + t.layers);
  room.shares = (Share*)(room.rows + kProducts);

  for (int i = threadIdx.x; i < t.most_rows * kSumsOfRow; i += kThreads) room.sums[i] = 0;
  for (int i = threadIdx.x; i < t.layers; i += kThreads) {
    const Layer<E>& l = t.layer[i];
    room.scales[i] = {l.resid_scale ? *l.resid_scale : 1, l.x0_scale ? *l.x0_scale : 0};
  }
  int w = threadIdx.x / kProducts, p = threadIdx.x % kProducts;
  if (w < kWarps) {
    int first = t.rows[p] * blockIdx.x / gridDim.x;
    int count = t.rows[p] * (blockIdx.x + 1) / gridDim.x - first;
    int all = (count + kRows - 1) / kRows * t.pieces[p], begin = all * w / kWarps;
    Share& share = room.shares[threadIdx.x];
    share.row = first + begin / t.pieces[p] * kRows;
    share.piece = begin % t.pieces[p];
    share.left = all * (w + 1) / kWarps - begin;
    room.rows[p] = {first, count};
  }
  __syncthreads();
  room.shares += warp() * kProducts;
  return room;
}

// ---- weights, asked for ahead -------------------------------------------------------------------

// A warp's weights of all products of all layers, in the order in which it needs them. Each lane
// has copies of its own under way, and reads what it has copied itself: nobody waits for another.
template <class E, int kDepth>
class Queue {
 public:
  static constexpr int kBytes = kDepth * kRows * kThreads * 16;

  __device__ Queue(const Task<E>& t, const Room& room, char* memory)
      : t(t), room(room), slots((uint4*)memory + threadIdx.x) {
    begin();
#pragma unroll 1
    for (int i = 0; i < kDepth - 1; i++) ask();
  }

  // a piece of each row, the oldest that was asked for; where the one before it was, the next is
  // asked for
  __device__ void take(uint4* taken) {
    wait_for_copies<kDepth - 2>();
#pragma unroll
    for (int i = 0; i < kRows; i++) taken[i] = slots[oldest + i * kThreads];
    oldest = behind(oldest);
    ask();
  }

 private:
  static constexpr int kSlot = kRows * kThreads;

  __device__ static int behind(int slot) { return slot == (kDepth - 1) * kSlot ? 0 : slot + kSlot; }

  __device__ void begin() {
    Share share = room.shares[product];
    row = share.row, left = share.left;
    inputs = t.inputs[product];
    column = share.piece * kPiece<E> + lane() * kWide<E>;
    is_new = true;
  }

  __device__ void find_rows() {
    is_new = false;
    int last = room.rows[product].first + room.rows[product].count - 1;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      // none behind the last: that one once more
      int r = min(row + i, last), m = 0;
      for (; m < 2 && r >= t.outputs[product][m]; m++) r -= t.outputs[product][m];
      at[i] = t.layer[layer].matrices[product][m] + (int64_t)r * inputs + column;
    }
  }

  __device__ void ask() {
    while (!left && layer < t.layers) {
      if (++product == kProducts) product = 0, layer++;
      if (layer < t.layers) begin();
    }
    if (left) {
      if (is_new) find_rows();
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        if (kCopies && column < inputs) copy_ahead(slots + newest + i * kThreads, at[i]);
        at[i] += kPiece<E>;
      }
      column += kPiece<E>;
      left--;
      if (column - lane() * kWide<E> >= inputs && left) {
        column = lane() * kWide<E>;
        row += kRows;
        is_new = true;
      }
    }
    // without a copy too, for groups are counted
    end_of_group();
    newest = behind(newest);
  }

  const Task<E>& t;
  const Room& room;
  uint4* slots;
  const E* at[kRows];
  bool is_new;  // rows that are not found yet
  int row, column, left, inputs, oldest = 0, newest = 0, layer = 0, product = 0;
};

// ---- what blocks tell each other ----------------------------------------------------------------
//
// Every number has a place of its own, which holds `kMissing` until it is written. Who needs it
// looks there until it has come: that is half the way of a barrier, and holds up nothing else.

constexpr uint32_t kMissing = 0xffffffff;  // no arithmetic here makes this NaN

__device__ inline bool is_missing(float v) { return bits_of(v) == kMissing; }

__device__ inline float receive(const float* from) {
  float v;
  do v = shared_by_all(from);
  while (kWaits && is_missing(v));
  return v;
}

__device__ inline bool is_missing(float4 v) {
  return is_missing(v.x) || is_missing(v.y) || is_missing(v.z) || is_missing(v.w);
}

// v = the numbers `begin`, `begin + step`, ... of n, all asked for at once
template <int kMost, class Numbers>
__device__ inline void receive(Numbers* v, const Numbers* from, int begin, int step, int n) {
  bool missing;
  do {
    missing = false;
#pragma unroll
    for (int j = 0; j < kMost; j++)
      if (begin + j * step < n) v[j] = shared_by_all(from + begin + j * step);
#pragma unroll
    for (int j = 0; j < kMost; j++)
      if (begin + j * step < n) missing |= is_missing(v[j]);
  } while (kWaits && missing);
}

// to[i] = number i of all heads' outputs, from what the parts of their rings gave
template <class E>
__device__ inline void receive_merged(const Task<E>& t, const Layer<E>& l, Room room) {
  int H = t.head_width, splits = l.splits;
  for (int n = threadIdx.x; n < t.heads; n += kThreads) {
    float v[kMostSplits], highest = -INFINITY, sum = 0;
    receive<kMostSplits>(v, l.lses + n * splits, 0, 1, splits);
#pragma unroll
    for (int p = 0; p < kMostSplits; p++)
      if (p < splits) highest = fmaxf(highest, v[p]);
#pragma unroll
    for (int p = 0; p < kMostSplits; p++)
      if (p < splits) sum += v[p] = __expf(v[p] - highest);
#pragma unroll
    for (int p = 0; p < kMostSplits; p++)
      if (p < splits) room.part_weights[n * kMostSplits + p] = v[p] / sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < t.heads * H; i += kThreads) {
    int n = i / H;
    float v[kMostSplits], sum = 0;
    receive<kMostSplits>(v, l.read[kAttentionOut] + n * splits * H, i % H, H, splits * H);
#pragma unroll
    for (int p = 0; p < kMostSplits; p++)
      if (p < splits) sum += room.part_weights[n * kMostSplits + p] * v[p];
    room.x[i] = sum;
  }
}

// ---- products -----------------------------------------------------------------------------------

// gelu, or swiglu with its gates behind
template <class E>
__device__ inline void activate(const Task<E>& t, float* x) {
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < t.mlp_width; i += kThreads) {
    float v = x[i];
    if (t.mlp == kGelu)
      v = v / 2 * (1 + tanhf(0.7978845608f * (v + 0.044715f * v * v * v)));
    else
      v *= x[t.mlp_width + i] / (1 + expf(-x[t.mlp_width + i]));
    x[i] = v;
  }
}

// room.x = what this product reads, a stream without its norm; room.by_warp = its squares
template <class E>
__device__ inline void read_inputs(const Task<E>& t, const Layer<E>& l, int product, Scales scales,
                                   Room room) {
  if (product == kAttentionOut && l.splits > 1) return receive_merged(t, l, room);
  constexpr int kAtOnce = 3;
  auto from = (const float4*)l.read[product], x0 = (const float4*)t.x0;
  auto to = (float4*)room.x;
  bool is_relu2 = product == kMlpOut && t.mlp == kRelu2;
  int n = t.inputs[product] / 4;
  if (product == kMlpOut && t.mlp == kSwiglu) n *= 2;

  float squares = 0;
#pragma unroll 1
  for (int begin = threadIdx.x; begin < n; begin += kAtOnce * kThreads) {
    float4 v[kAtOnce];
    receive<kAtOnce>(v, from, begin, kThreads, n);
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) {
      int i = begin + j * kThreads;
      if (i >= n) break;
      float a[] = {v[j].x, v[j].y, v[j].z, v[j].w};
      if (product == kQkv) {
        float4 b = scales.x0 ? x0[i] : float4{};
        a[0] = scales.resid * a[0] + scales.x0 * b.x, a[1] = scales.resid * a[1] + scales.x0 * b.y;
        a[2] = scales.resid * a[2] + scales.x0 * b.z, a[3] = scales.resid * a[3] + scales.x0 * b.w;
      }
#pragma unroll
      for (int c = 0; c < 4; c++) {
        squares += a[c] * a[c];
        if (is_relu2) a[c] = a[c] > 0 ? a[c] * a[c] : 0;
      }
      to[i] = {a[0], a[1], a[2], a[3]};
    }
  }
  squares = sum_over(32, squares);
  if (lane() == 0) room.by_warp[warp()] = squares;
  if (product == kMlpOut && !is_relu2) activate(t, room.x);
}

// one over the root mean square of a stream, 1 for what is not normed
template <class E>
__device__ inline float norm(const Task<E>& t, int product, Room room) {
  if (product == kAttentionOut || product == kMlpOut) return 1;
  float squares = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w++) squares += room.by_warp[w];
  return rsqrtf(squares / t.width + t.eps);
}

// what is added to a row of a product: the stream before it
template <class E>
__device__ inline float stream(const Task<E>& t, const Layer<E>& l, int product, Scales scales,
                               int row) {
  if (product == kMlpOut) return receive(l.read[kMlpIn] + row);
  if (product != kAttentionOut) return 0;
  return scales.resid * receive(l.read[kQkv] + row) + scales.x0 * t.x0[row];
}

// room.sums = the rows of this block with room.x, a warp's part each
template <class E, int kDepth>
__device__ inline void multiply(int inputs, int product, Queue<E, kDepth>& weights, Room room) {
  float sums[kRows] = {};
  Share share = room.shares[product];
  Rows rows = room.rows[product];
  int row = share.row - rows.first, column = share.piece * kPiece<E> + lane() * kWide<E>;
#pragma unroll 1
  for (int left = share.left; left; left--) {
    uint4 stored[kRows];
    weights.take(stored);
    if (column < inputs) {
      float w[kRows][kWide<E>], x[kWide<E>];
#pragma unroll
      for (int i = 0; i < kWide<E>; i += 4) *(float4*)(x + i) = *(float4*)(room.x + column + i);
#pragma unroll
      for (int r = 0; r < kRows; r++) widen<E>(stored[r], w[r]);
#pragma unroll
      for (int i = 0; i < kWide<E>; i++)
#pragma unroll
        for (int r = 0; r < kRows; r++) sums[r] += w[r][i] * x[i];
    }
    column += kPiece<E>;
    bool through = column - lane() * kWide<E> >= inputs;
    if (through || left == 1) {
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        float sum = sum_over(32, sums[r]);
        if (lane() == 0 && row + r < rows.count)
          room.sums[(row + r) * kSumsOfRow + warp()] = sum;
        sums[r] = 0;
      }
      column = lane() * kWide<E>;
      row += kRows;
    }
  }
}

// ---- attention ----------------------------------------------------------------------------------

// a head rotated to its position, normed and sharpened, by one warp
template <class E>
__device__ inline void turn(const Task<E>& t, float* head) {
  int half = t.head_width / 2;
  float squares = 0;
  for (int i = lane(); i < half; i += 32) {
    float a = head[i], b = head[half + i];
    head[i] = a * t.cos[i] + b * t.sin[i];
    head[half + i] = b * t.cos[half + i] + a * t.sin[half + i];
    squares += a * a + b * b;
  }
  // rotation leaves lengths as they are
  squares = sum_over(32, squares);
  float factor = t.qk_scale;
  if (t.qk_norm) factor *= rsqrtf(squares / t.head_width + t.eps);
  for (int i = lane(); i < half; i += 32) head[i] *= factor, head[half + i] *= factor;
}

// keys and values that a lane asks for at once
constexpr int kKeysAhead = 4;

// Query head n over a part of its ring.
template <class E>
__device__ inline void attend(const Task<E>& t, const Layer<E>& l, int n, int part, float* memory) {
  int H = t.head_width, group = t.heads / t.kv_heads, k = n / group;
  float *q_new = memory, *k_new = q_new + H, *v_new = k_new + H, *merged = v_new + H;

  // this block's slots of the ring; in each turn a few neighbouring lanes for each key
  int position = *t.length, slot_new = position % l.slots;
  int held = min(position + 1, l.slots);
  int first = held * part / l.splits, last = held * (part + 1) / l.splits;
  E* k_ring = l.k + (int64_t)k * l.slots * H;
  E* v_ring = l.v + (int64_t)k * l.slots * H;
  int lanes = H / kWide<E>, teams = kThreads / lanes;
  int team = threadIdx.x / lanes, column = threadIdx.x % lanes * kWide<E>;

  uint4 keys[kKeysAhead], values[kKeysAhead];
  auto read = [&](int begin) {
#pragma unroll
    for (int j = 0; j < kKeysAhead; j++) {
      int slot = min(begin + j * teams + team, l.slots - 1);
      keys[j] = *(const uint4*)(k_ring + slot * H + column);
      values[j] = *(const uint4*)(v_ring + slot * H + column);
    }
  };
  int ahead = threadIdx.x * kWide<E>;
  if (l.value_gate && ahead < H) touch(l.value_embed + k * H + ahead);
  read(first);

  // the new token's own, while the first of the ring are on their way: query, key, value by a warp
  // each
  for (int who = warp(); who < 3; who += kWarps) {
    int of_heads[] = {n, t.heads + k, t.heads + t.kv_heads + k};
    float* head = memory + who * H;
    float4 v[2];
    receive<2>(v, (const float4*)(l.written[kQkv] + of_heads[who] * H), lane(), 32, H / 4);
#pragma unroll
    for (int j = 0; j < 2; j++)
      if (lane() + 32 * j < H / 4) ((float4*)head)[lane() + 32 * j] = v[j];
    __syncwarp();
    if (who < 2) turn(t, head);
    __syncwarp();
    float gate = who == 2 && l.value_gate ? receive(l.gates + k) : 0;
#pragma unroll 1
    for (int i = lane(); i < H && who; i += 32) {
      if (gate) head[i] += gate * widened(l.value_embed[k * H + i]);
      head[i] = rounded<E>(head[i]);
    }
  }
  __syncthreads();

  float q[kWide<E>], out[kWide<E>] = {}, top = -INFINITY, total = 0;
#pragma unroll
  for (int i = 0; i < kWide<E>; i++) q[i] = q_new[column + i] * rsqrtf(H);

#pragma unroll 1
  for (int begin = first; begin < last; begin += kKeysAhead * teams) {
    if (begin > first) read(begin);
    float scores[kKeysAhead], highest = fmaxf(top, -1e30f);  // finite: -infinity less it is no NaN
#pragma unroll
    for (int j = 0; j < kKeysAhead; j++) {
      int slot = begin + j * teams + team;
      float key[kWide<E>], score = 0;
      widen<E>(keys[j], key);
#pragma unroll
      for (int i = 0; i < kWide<E>; i++)
        // the new one is not in the ring yet
        score += q[i] * (slot == slot_new ? k_new[column + i] : key[i]);
      scores[j] = score;
    }
    for (int far = lanes / 2; far; far /= 2)
#pragma unroll
      for (int j = 0; j < kKeysAhead; j++) scores[j] += __shfl_xor_sync(~0u, scores[j], far);
#pragma unroll
    for (int j = 0; j < kKeysAhead; j++) {
      int slot = begin + j * teams + team;
      // how long ago its token came
      int age = slot_new - slot + (slot > slot_new ? l.slots : 0);
      if (slot >= last || age > l.window) scores[j] = -INFINITY;
      highest = fmaxf(highest, scores[j]);
    }
    float before = __expf(top - highest);
    top = highest;
    total *= before;
#pragma unroll
    for (int i = 0; i < kWide<E>; i++) out[i] *= before;
#pragma unroll
    for (int j = 0; j < kKeysAhead; j++) {
      int slot = begin + j * teams + team;
      float value[kWide<E>], weight = __expf(scores[j] - highest);
      widen<E>(values[j], value);
      total += weight;
#pragma unroll
      for (int i = 0; i < kWide<E>; i++)
        out[i] += weight * (slot == slot_new ? v_new[column + i] : value[i]);
    }
  }

  // for the next token
  if (n % group == 0 && first <= slot_new && slot_new < last) {
    for (int i = threadIdx.x; i < H; i += kThreads) {
      store(k_ring + slot_new * H + i, k_new[i]);
      store(v_ring + slot_new * H + i, v_new[i]);
    }
  }

  // what all teams found
  float *team_tops = merged, *team_totals = team_tops + teams, *team_outs = team_totals + teams;
  if (column == 0) team_tops[team] = top, team_totals[team] = total;
#pragma unroll
  for (int i = 0; i < kWide<E>; i++) team_outs[team * H + column + i] = out[i];
  __syncthreads();
  for (int i = threadIdx.x; i < H; i += kThreads) {
    float highest = -1e30f, sum = 0, weighed = 0;
#pragma unroll 8
    for (int j = 0; j < teams; j++) highest = fmaxf(highest, team_tops[j]);
#pragma unroll 8
    for (int j = 0; j < teams; j++) {
      float weight = __expf(team_tops[j] - highest);
      sum += weight * team_totals[j];
      weighed += weight * team_outs[j * H + i];
    }
    // a part that sees nothing counts nothing
    share_with_all(l.parts + (n * l.splits + part) * H + i, sum > 0 ? weighed / sum : 0);
    if (i == 0) share_with_all(l.lses + n * l.splits + part, highest + logf(sum));
  }
}

// The gate of a head's value embedding, by a warp each: a lane's weight, long before it is needed,
// and what comes of all.
template <class E>
__device__ inline float gate_weight(const Task<E>& t, const Layer<E>& l, int k) {
  bool is_there = l.value_gate && k < t.kv_heads && lane() < t.gate_channels;
  return is_there ? widened(l.value_gate[lane() * t.kv_heads + k]) : 0;
}
template <class E>
__device__ inline void open_gate(const Layer<E>& l, int k, float weight, Room room, float scale) {
  float sum = sum_over(32, weight * room.x[lane()] * scale);
  if (lane() == 0) share_with_all(l.gates + k, 3 / (1 + expf(-sum)));
}

// ---- where the time goes ------------------------------------------------------------------------

// Cycles at `kStamps` places of some steps, by the first and the last warp of two blocks. On a large
// card the first has a part in attention, and the other has not.
constexpr int kStamps = 6, kFirstStep = 40, kSteps = 8, kOtherBlock = 100;
#ifdef CLOCKS
__device__ long long stamps[2][2][kSteps][kStamps];

__device__ inline void stamp(int step, int place) {
  int which = step - kFirstStep, block = blockIdx.x == kOtherBlock;
  bool is_here = lane() == 0 && (blockIdx.x == 0 || block) && (warp() == 0 || warp() == kWarps - 1);
  if (is_here && 0 <= which && which < kSteps) stamps[block][warp() > 0][which][place] = clock64();
}
extern "C" int Stamps(long long* to) { return cudaMemcpyFromSymbol(to, stamps, sizeof stamps); }
#else
__device__ inline void stamp(int, int) {}
#endif

// ---- the layers ---------------------------------------------------------------------------------

// Written once for all products and all layers: instructions come from memory too.
template <class E, int kDepth>
__global__ void __launch_bounds__(kThreads) all_layers(const __grid_constant__ Task<E> t) {
  char* memory = shared_memory();
  Room room = room_at(t, memory + Queue<E, kDepth>::kBytes);
  Queue<E, kDepth> weights(t, room, memory);

#pragma unroll 1
  for (int step = 0; step < t.layers * kProducts; step++) {
    const Layer<E>& l = t.layer[step / kProducts];
    int product = step % kProducts, k = blockIdx.x * kWarps + warp();
    Scales scales = room.scales[step / kProducts];
    Rows rows = room.rows[product];

    stamp(step, 0);
    // what is there already, before what has to be waited for
    float before = 0, weight = 0;
    if (threadIdx.x < rows.count) before = stream(t, l, product, scales, rows.first + threadIdx.x);
    if (product == kQkv) weight = gate_weight(t, l, k);

    stamp(step, 1);
    read_inputs(t, l, product, scales, room);
    stamp(step, 2);
    __syncthreads();
    float scale = norm(t, product, room);
    if (product == kQkv && l.value_gate && k < t.kv_heads) open_gate(l, k, weight, room, scale);
    stamp(step, 3);
    multiply(t.inputs[product], product, weights, room);
    stamp(step, 4);
    __syncthreads();

#pragma unroll 1
    for (int i = threadIdx.x; i < rows.count; i += kThreads) {
      float total = 0, *sums = room.sums + i * kSumsOfRow;
#pragma unroll
      for (int w = 0; w < kWarps; w++) total += sums[w], sums[w] = 0;
      if (i >= kThreads) before = stream(t, l, product, scales, rows.first + i);
      share_with_all(l.written[product] + rows.first + i, before + scale * total);
    }

    stamp(step, 5);
    for (int i = blockIdx.x; i < t.heads * l.splits && product == kQkv; i += gridDim.x) {
      attend(t, l, i / l.splits, i % l.splits, room.x);
      __syncthreads();
    }
  }
}

// ---- what XLA calls -----------------------------------------------------------------------------

#define CHECK(call)                                                                   \
  if (cudaError_t error = call; error != cudaSuccess) {                               \
    return ffi::Error::Internal(std::string(#call ": ") + cudaGetErrorString(error)); \
  }

template <class E, int kDepth>
static ffi::Error launch(Task<E>& t, int blocks, int most, int room, cudaStream_t stream) {
  int bytes = Queue<E, kDepth>::kBytes + room;
  // as far ahead as this chip has room for
  if constexpr (kDepth > 3) {
    if (bytes > most) return launch<E, kDepth / 2>(t, blocks, most, room, stream);
  }
  CHECK(cudaFuncSetAttribute(all_layers<E, kDepth>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             bytes));
  void* arguments[] = {&t};
  // together, for they wait for each other
  CHECK(cudaLaunchCooperativeKernel(all_layers<E, kDepth>, blocks, kThreads, arguments, bytes,
                                    stream));
  return ffi::Error::Success();
}

using Floats = ffi::Buffer<ffi::F32>;

struct Settings {
  int64_t heads, kv_heads, head_width, mlp_width, gate_channels, mlp;
  bool qk_norm, resid_scales, x0_scales;
  float qk_scale, eps;
  ffi::Span<const int32_t> windows, has_values;  // of each layer
};

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    Settings, ffi::StructMember<int64_t>("heads"), ffi::StructMember<int64_t>("kv_heads"),
    ffi::StructMember<int64_t>("head_width"), ffi::StructMember<int64_t>("mlp_width"),
    ffi::StructMember<int64_t>("gate_channels"), ffi::StructMember<int64_t>("mlp"),
    ffi::StructMember<bool>("qk_norm"), ffi::StructMember<bool>("resid_scales"),
    ffi::StructMember<bool>("x0_scales"), ffi::StructMember<float>("qk_scale"),
    ffi::StructMember<float>("eps"), ffi::StructMember<ffi::Span<const int32_t>>("windows"),
    ffi::StructMember<ffi::Span<const int32_t>>("has_values"));

template <class E>
static ffi::Error run(cudaStream_t stream, const Settings& s, Floats x0, Floats cos, Floats sin,
                      ffi::Buffer<ffi::S32> length, ffi::RemainingArgs arrays,
                      ffi::Result<Floats> between, ffi::RemainingRets rings) {
  int device, blocks, most;
  CHECK(cudaGetDevice(&device));
  CHECK(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device));
  CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));

  int D = x0.element_count(), N = s.heads, K = s.kv_heads, H = s.head_width, F = s.mlp_width;
  int gates = s.mlp == kSwiglu ? F : 0, lanes = H / kWide<E>;
  bool is_broken = D % kWide<E> || F % kWide<E> || H % kWide<E>;
  if (is_broken || lanes & (lanes - 1) || lanes > 32 || D < 32)
    return ffi::Error::InvalidArgument(
        "a lane reads 16 bytes at once: widths are multiples of that, the stream's at least 32, "
        "and a head's is a power of two of them, 32 at most");

  Task<E> t{};
  t.layers = s.windows.size();
  t.width = D, t.heads = N, t.kv_heads = K, t.head_width = H, t.mlp_width = F;
  t.gate_channels = s.gate_channels, t.mlp = s.mlp;
  t.qk_norm = s.qk_norm, t.qk_scale = s.qk_scale, t.eps = s.eps;
  t.x0 = x0.typed_data(), t.cos = cos.typed_data(), t.sin = sin.typed_data();
  t.length = length.typed_data();

  const int inputs[] = {D, N * H, D, F};
  const int outputs[][3] = {{N * H, K * H, K * H}, {D}, {F, gates}, {D}};
  for (int p = 0; p < kProducts; p++) {
    t.inputs[p] = inputs[p];
    t.pieces[p] = (inputs[p] + kPiece<E> - 1) / kPiece<E>;
    for (int m = 0; m < 3; m++) t.rows[p] += t.outputs[p][m] = outputs[p][m];
    t.most_read = std::max(t.most_read, inputs[p]);
    t.most_rows = std::max(t.most_rows, (t.rows[p] + blocks - 1) / blocks);
  }
  // attention has its own there: three heads, and what each team found
  int teams = kThreads / lanes;
  t.most_read = std::max({t.most_read, F + gates, 3 * H + teams * (H + 2)});

  // nothing is there yet
  CHECK(cudaMemsetAsync(between->untyped_data(), 0xff, between->size_bytes(), stream));
  float* next = between->typed_data();
  auto room_for = [&next](int floats) { return std::exchange(next, next + floats); };
  size_t taken = 0;
  auto array = [&] { return arrays.get<ffi::AnyBuffer>(taken++)->untyped_data(); };

  // in the order of one_kernel.py
  for (int i = 0; i < t.layers; i++) {
    Layer<E>& l = t.layer[i];
    float *x = room_for(D), *x_between = room_for(D), *mlp_in = room_for(F + gates);
    float* qkv = room_for(t.rows[kQkv]);
    l.parts = room_for(N * kMostSplits * H);
    l.lses = room_for(N * kMostSplits);
    l.gates = room_for((K + 3) / 4 * 4);  // all begin at 16 bytes
    const float* x_before = i ? t.layer[i - 1].written[kMlpOut] : t.x0;
    const float* read[] = {x_before, l.parts, x_between, mlp_in};
    float* written[] = {qkv, x_between, mlp_in, x};
    std::copy(read, read + kProducts, l.read);
    std::copy(written, written + kProducts, l.written);

    for (int p = 0; p < kProducts; p++)
      for (int m = 0; m < 3; m++)
        if (outputs[p][m]) l.matrices[p][m] = (const E*)array();
    if (s.has_values[i]) l.value_gate = (const E*)array(), l.value_embed = (const E*)array();
    if (s.resid_scales) l.resid_scale = (const float*)array();
    if (s.x0_scales) l.x0_scale = (const float*)array();

    auto k = *rings.get<ffi::AnyBuffer>(2 * i), v = *rings.get<ffi::AnyBuffer>(2 * i + 1);
    l.k = (E*)k->untyped_data(), l.v = (E*)v->untyped_data();
    l.slots = k->dimensions()[1];
    l.window = s.windows[i];
    l.splits = std::max(1, std::min({l.slots / kLeastKeys, blocks / N, kMostSplits}));
  }
  return launch<E, 12>(t, blocks, most, room_bytes(t), stream);
}

static ffi::Error one_kernel(cudaStream_t stream, Settings s, Floats x0, Floats cos, Floats sin,
                          ffi::Buffer<ffi::S32> length, ffi::RemainingArgs arrays,
                          ffi::Result<Floats> between, ffi::RemainingRets rings) {
  auto type = arrays.get<ffi::AnyBuffer>(0)->element_type();
  auto run_it = type == ffi::F32 ? run<float> : type == ffi::BF16 ? run<BFloat16> : nullptr;
  if (!run_it) return ffi::Error::InvalidArgument("weights are float32 or bfloat16");
  if (s.windows.size() > kMostLayers) return ffi::Error::InvalidArgument("too many layers");
  return run_it(stream, s, x0, cos, sin, length, arrays, between, rings);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(OneKernel, one_kernel,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Attrs<Settings>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});
