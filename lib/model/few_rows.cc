// y (M, O) = x (M, I) w (O, I)^T for a few rows M, with weights read as they are stored: float32,
// bfloat16 or int8. Decoding is bound by reading weights, and XLA:CPU first writes narrow ones out
// wide. Called by few_rows.py, which compiles this file.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// ---- as many numbers as a register holds --------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr bool kManyRegisters = true;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr bool kManyRegisters = false;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr bool kManyRegisters = true;
#else
constexpr int kLanes = 4;
constexpr bool kManyRegisters = false;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

// inputs that a turn of the innermost loop takes: four registers of x
constexpr int kTurn = 4 * kLanes;

// Weights are asked for a tile and so many bytes ahead, and into L2: L1 waits for too few lines at
// once to hide main memory (measured, LOG.md).
constexpr int kAhead = 4096;
constexpr int kIntoL2 = 2;

template <class Vector>
static inline Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// every other lane of a, then of b, from the first or from the second on
template <int from, int... lane>
static inline Floats every_other(Floats a, Floats b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (from + 2 * lane)...);
#else
  return __builtin_shuffle(a, b, Ints{(from + 2 * lane)...});
#endif
}

// The sum of each of `count` registers, as many as one has lanes, in a lane of its own. A turn adds
// neighbouring lanes, which leaves half as many registers.
template <int count = kLanes>
static inline Floats lane_sums(const Floats* v) {
  if constexpr (count == 1) {
    return *v;
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
    Floats halves[count / 2];
    for (int i = 0; i < count / 2; i++) {
      Floats a = v[2 * i], b = v[2 * i + 1];
      halves[i] = every_other<0>(a, b, lanes) + every_other<1>(a, b, lanes);
    }
    return lane_sums<count / 2>(halves);
  }
}

// ---- weights as they are stored -----------------------------------------------------------------
//
// A 32-bit word holds one, two or four weights. The j-th of every word in a register is widened by
// one or two shifts, and meets inputs that were brought into the same order before.

struct Float32 {
  using Stored = float;
  static constexpr int kInWord = 1;
  static Floats widen(Words w, int) { return (Floats)w; }
  static float widen(float w) { return w; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static constexpr int kInWord = 2;
  static Floats widen(Words w, int j) { return (Floats)(j ? w & 0xffff0000u : w << 16); }
  static float widen(uint16_t w) {
    uint32_t word = uint32_t(w) << 16;
    return load<float>(&word);
  }
};

struct Int8 {
  using Stored = int8_t;
  static constexpr int kInWord = 4;
  static Floats widen(Words w, int j) {
    Ints whole = (Ints)(w << (24 - 8 * j)) >> 24;
    return __builtin_convertvector(whole, Floats);
  }
  static float widen(int8_t w) { return w; }
};

// how many of M rows are multiplied at once
static int group_of(int64_t M) { return M >= 8 ? 8 : M >= 4 ? 4 : M >= 2 ? 2 : 1; }

// The rows in the order in which `tile` reads them: of each group of rows, a register of the first,
// one of the second, and so on. What is left behind the last whole word stays out.
template <class Weight>
static std::vector<float> ordered(const float* x, int64_t X, int64_t M, int64_t I) {
  constexpr int W = Weight::kInWord;
  std::vector<float> result(X * M * I);
  float* to = result.data();
  for (int64_t done = 0, rows; done < X * M; done += rows, x += rows * I, to += rows * I) {
    rows = group_of(M - done % M);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t i = 0; i + W * kLanes <= I; i += W * kLanes)
        for (int j = 0; j < W; j++)
          for (int lane = 0; lane < kLanes; lane++)
            to[(i + j * kLanes) * rows + m * kLanes + lane] = x[m * I + i + lane * W + j];
  }
  return result;
}

// ---- products -----------------------------------------------------------------------------------

// M rows with O outputs next to each other, all of whose sums stay in registers
template <class Weight, int M, int O>
static inline void tile(const float* x, const float* x_ordered, const typename Weight::Stored* w,
                        float* y, int64_t I, int64_t y_stride) {
  constexpr int W = Weight::kInWord;
  // few sums would wait for each other: then several for each result
  constexpr int kSums = M * O >= 4 ? 1 : 4 / (M * O);
  Floats sums[M][O][kSums] = {};

  // as many bytes as are read, one after the other, whichever outputs they belong to
  auto next = (const char*)(w + O * I) + kAhead;
  int64_t i = 0;
  for (; i + kTurn <= I; i += kTurn) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      Floats w_wide[O];
      for (int o = 0; o < O; o++) {
        if (r % W == 0) {
          __builtin_prefetch(next, 0, kIntoL2);
          next += sizeof(Words);
        }
        Words stored = load<Words>(w + o * I + i + r / W * W * kLanes);
        w_wide[o] = Weight::widen(stored, r % W);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        Floats x_m = load<Floats>(x_ordered + (i + r * kLanes) * M + m * kLanes);
        for (int o = 0; o < O; o++) sums[m][o][r % kSums] += x_m * w_wide[o];
      }
    }
  }

  // the sums of a result, and as many results as a register has lanes
  constexpr int count = (M * O + kLanes - 1) / kLanes * kLanes;
  Floats results[count] = {};
  for (int m = 0; m < M; m++)
    for (int o = 0; o < O; o++)
      for (int s = 0; s < kSums; s++) results[m * O + o] += sums[m][o][s];
  float totals[count];
  for (int first = 0; first < count; first += kLanes) {
    Floats lanes = lane_sums(results + first);
    std::memcpy(totals + first, &lanes, sizeof lanes);
  }

  for (int m = 0; m < M; m++)
    for (int o = 0; o < O; o++) {
      float total = totals[m * O + o];
      for (int64_t rest = i; rest < I; rest++)
        total += x[m * I + rest] * Weight::widen(w[o * I + rest]);
      y[m * y_stride + o] = total;
    }
}

// outputs of a tile, whose sums with so many rows fit in registers
constexpr int width_of(int rows) {
  return rows == 8 ? (kManyRegisters ? 3 : 1) : rows == 1 ? 1 : kManyRegisters ? 4 : 2;
}
// outputs that are whole tiles of every width
constexpr int kBlock = 12;

// a group of rows with outputs [from, to), a tile at a time
template <class Weight, int M>
static void outputs(const float* x, const float* x_ordered, const typename Weight::Stored* w,
                    float* y, int64_t I, int64_t O, int64_t from, int64_t to) {
  constexpr int N = width_of(M);
  int64_t o = from;
  for (; o + N <= to; o += N) tile<Weight, M, N>(x, x_ordered, w + o * I, y + o, I, O);
  for (; o < to; o++) tile<Weight, M, 1>(x, x_ordered, w + o * I, y + o, I, O);
}

// all rows with outputs [from, to), a group after the other
template <class Weight>
static void product(const float* x, const float* x_ordered, const typename Weight::Stored* w,
                    float* y, int64_t M, int64_t I, int64_t O, int64_t from, int64_t to) {
  for (int64_t rows; M; M -= rows, x += rows * I, x_ordered += rows * I, y += rows * O) {
    rows = group_of(M);
    auto group = rows == 8   ? outputs<Weight, 8>
                 : rows == 4 ? outputs<Weight, 4>
                 : rows == 2 ? outputs<Weight, 2>
                             : outputs<Weight, 1>;
    group(x, x_ordered, w, y, I, O, from, to);
  }
}

// y (M, O) = x (M, I) w (I, O): what attention makes of values, whose inputs come first
template <int M>
static void weighed(const float* x, const float* w, float* y, int64_t I, int64_t O) {
  constexpr int kWide = 4;
  int64_t o = 0;
  for (; o + kWide * kLanes <= O; o += kWide * kLanes) {
    Floats sums[M][kWide] = {};
    for (int64_t i = 0; i < I; i++)
      for (int c = 0; c < kWide; c++) {
        Floats w_c = load<Floats>(w + i * O + o + c * kLanes);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) sums[m][c] += x[m * I + i] * w_c;
      }
    for (int m = 0; m < M; m++) std::memcpy(y + m * O + o, sums[m], sizeof sums[m]);
  }
  for (int m = 0; m < M; m++)
    for (int64_t rest = o; rest < O; rest++) {
      float total = 0;
      for (int64_t i = 0; i < I; i++) total += x[m * I + i] * w[i * O + rest];
      y[m * O + rest] = total;
    }
}

// ---- all cores ----------------------------------------------------------------------------------

// a thread's waking pays for so many bytes of weights, and so many parts share them evenly
constexpr int64_t kLeastBytes = 1 << 16;
constexpr int64_t kPartsPerThread = 4;

// part(0), ..., part(count - 1), by this thread and by those of the pool that come in time, `most`
// threads at the most
static void in_parallel(ffi::ThreadPool& pool, int64_t count, int64_t most,
                        std::function<void(int64_t)> part) {
  struct Progress {
    std::atomic<int64_t> taken{0}, done{0};
  };
  // a thread that comes too late finds nothing left, when this function has returned
  auto progress = std::make_shared<Progress>();
  std::function<void()> work = [progress, count, part] {
    for (int64_t i; (i = progress->taken++) < count;) {
      part(i);
      progress->done++;
    }
  };
  int64_t threads = std::min({pool.num_threads(), count, most});
  for (int64_t t = 1; t < threads; t++) pool.Schedule(std::function<void()>(work));
  work();
  while (progress->done < count) std::this_thread::yield();
}

// ---- what XLA calls -----------------------------------------------------------------------------

// x (X, M, I) and w (X, O, I), each x with its own w
template <class Weight>
static void multiply(ffi::ThreadPool& pool, const float* x, const void* w_stored, float* y,
                     int64_t X, int64_t M, int64_t I, int64_t O) {
  auto w = (const typename Weight::Stored*)w_stored;
  std::vector<float> storage;
  const float* x_ordered = x;
  if (M > 1 || Weight::kInWord > 1) {
    storage = ordered<Weight>(x, X, M, I);
    x_ordered = storage.data();
  }

  int64_t bytes = X * O * I * sizeof *w;
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  int64_t most = std::clamp<int64_t>(bytes / kLeastBytes, 1, kPartsPerThread * threads);
  int64_t parts = (most + X - 1) / X;  // of each x
  // whole blocks, so that no sum depends on the number of threads
  int64_t each = (O + parts - 1) / parts;
  each = (each + kBlock - 1) / kBlock * kBlock;
  parts = (O + each - 1) / each;
  in_parallel(pool, X * parts, most, [=](int64_t part) {
    int64_t n = part / parts, from = part % parts * each, to = std::min(O, from + each);
    product<Weight>(x + n * M * I, x_ordered + n * M * I, w + n * O * I, y + n * M * O, M, I, O,
                    from, to);
  });
}

using Rows = ffi::BufferR3<ffi::F32>;

static ffi::Error few_rows(ffi::ThreadPool pool, Rows x, ffi::AnyBuffer w, ffi::Result<Rows> y) {
  int64_t X = x.dimensions()[0], M = x.dimensions()[1], I = x.dimensions()[2];
  int64_t O = y->dimensions()[2];
  auto run = w.element_type() == ffi::F32    ? multiply<Float32>
             : w.element_type() == ffi::BF16 ? multiply<BFloat16>
             : w.element_type() == ffi::S8   ? multiply<Int8>
                                             : nullptr;
  if (!run) return ffi::Error::InvalidArgument("weights are float32, bfloat16 or int8");
  run(pool, x.typed_data(), w.untyped_data(), y->typed_data(), X, M, I, O);
  return ffi::Error::Success();
}

static ffi::Error few_rows_by_input(ffi::ThreadPool pool, Rows x, Rows w, ffi::Result<Rows> y) {
  int64_t X = x.dimensions()[0], M = x.dimensions()[1], I = x.dimensions()[2];
  int64_t O = y->dimensions()[2];
  const float *xs = x.typed_data(), *ws = w.typed_data();
  float* ys = y->typed_data();
  int64_t most = std::max<int64_t>(1, 4 * X * I * O / kLeastBytes);
  in_parallel(pool, X, most, [=](int64_t n) {
    for (int64_t m = 0, rows; m < M; m += rows) {
      rows = std::min<int64_t>(4, group_of(M - m));
      auto group = rows == 4 ? weighed<4> : rows == 2 ? weighed<2> : weighed<1>;
      group(xs + (n * M + m) * I, ws + n * I * O, ys + (n * M + m) * O, I, O);
    }
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FewRows, few_rows,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Rows>().Arg<ffi::AnyBuffer>().Ret<Rows>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FewRowsByInput, few_rows_by_input,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Rows>().Arg<Rows>().Ret<Rows>());
