// CUDA for a CPU, as far as one_kernel.cu needs it: each thread of a block is a thread of the system,
// and those of a warp meet at every exchange. Slow, and only for a few small blocks.

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#define EMULATED
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)

using std::max;
using std::min;

constexpr int kThreads = 128;
constexpr int kBlocks = 6;
constexpr int kLeastKeys = 40;
constexpr int kSharedBytes = 1 << 20;

struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
struct Index {
  int x;
};

inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }

// ---- threads ------------------------------------------------------------------------------------

class Meeting {
 public:
  explicit Meeting(int threads) { pthread_barrier_init(&barrier, nullptr, threads); }
  ~Meeting() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }

 private:
  pthread_barrier_t barrier;
};

struct Block {
  std::vector<float> memory = std::vector<float>(kSharedBytes / 4, NAN);
  Meeting all{kThreads};
  std::vector<std::unique_ptr<Meeting>> warps;
  float exchanged[kThreads];
};

inline thread_local Index threadIdx, blockIdx, gridDim;
inline thread_local Block* block;

inline char* shared_memory() { return (char*)block->memory.data(); }
inline void __syncthreads() { block->all.wait(); }
inline void __syncwarp() { block->warps[threadIdx.x / 32]->wait(); }
inline float __shfl_xor_sync(unsigned, float v, int mask) {
  Meeting& warp = *block->warps[threadIdx.x / 32];
  block->exchanged[threadIdx.x] = v;
  warp.wait();
  float other = block->exchanged[threadIdx.x ^ mask];
  warp.wait();
  return other;
}

// Copies arrive as late as they may: what is read too early is not there.
struct Copies {
  struct Copy {
    uint4* to;
    const void* from;
    int group;
  };
  std::vector<Copy> under_way;
  int groups = 0;
};
inline thread_local Copies copies;
inline void copy_ahead(uint4* to, const void* from) {
  copies.under_way.push_back({to, from, copies.groups});
}
inline void end_of_group() { copies.groups++; }
template <int most>
void wait_for_copies() {
  auto& all = copies.under_way;
  while (!all.empty() && all.front().group < copies.groups - most) {
    std::memcpy(all.front().to, all.front().from, 16);
    all.erase(all.begin());
  }
}

inline void touch(const void*) {}
inline thread_local int looks = 0;
inline float shared_by_all(const float* from) {
  // who waits for a number that nobody writes would wait for ever
  if (++looks > 10'000'000) std::abort();
  std::this_thread::yield();
  return std::atomic_ref(*const_cast<float*>(from)).load(std::memory_order_relaxed);
}
inline float4 shared_by_all(const float4* from) {
  auto numbers = (const float*)from;
  return {shared_by_all(numbers), shared_by_all(numbers + 1), shared_by_all(numbers + 2),
          shared_by_all(numbers + 3)};
}
inline void share_with_all(float* to, float v) {
  std::atomic_ref(*to).store(v, std::memory_order_relaxed);
}

// ---- the runtime --------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum Attribute {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaFuncAttributeMaxDynamicSharedMemorySize,
};
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, Attribute which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? kBlocks : kSharedBytes;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, Attribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}

template <class Task>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Task), int blocks, int threads,
                                        void** arguments, size_t, cudaStream_t) {
  std::vector<Block> all(blocks);
  std::vector<std::thread> running;
  for (int b = 0; b < blocks; b++) {
    for (int w = 0; w < threads / 32; w++) all[b].warps.push_back(std::make_unique<Meeting>(32));
    for (int i = 0; i < threads; i++)
      running.emplace_back([=, &all] {
        threadIdx = {i}, blockIdx = {b}, gridDim = {blocks}, block = &all[b];
        kernel(*(const Task*)arguments[0]);
      });
  }
  for (auto& thread : running) thread.join();
  return cudaSuccess;
}

// on a CPU XLA hands over no stream
struct Stream {};
namespace xla::ffi {
template <>
struct CtxDecoding<Stream> {
  using Type = cudaStream_t;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return nullptr;
  }
};
}  // namespace xla::ffi
