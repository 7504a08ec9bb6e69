// The int8 kernels as the host sees them: plain C++, no CUDA headers, raw device pointers.
//
// A call is planned first (which kernel, grid, parameters: no device is touched) and launched then. Launching allocates
// nothing and never synchronises, so it may be captured into a CUDA graph.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace cnncomp::cuda {

enum class DType : int32_t { kUint8 = 0, kInt8 = 1, kFloat32 = 2, kFloat16 = 3, kBfloat16 = 4 };

inline bool is_half(DType type) { return type == DType::kFloat16 || type == DType::kBfloat16; }
inline int size_of(DType type) { return type == DType::kFloat32 ? 4 : is_half(type) ? 2 : 1; }

// Besides a clamp.
enum class Activation : int32_t { kNone = 0, kSilu = 1, kHardswish = 2 };

// The one epilogue of docs/design.md. residual may be null; it is laid out like out.
struct Epilogue {
  const float* constants;  // (3, k): scale, bias, hi
  const void* residual;
  void* out;
  DType residual_dtype;
  DType out_dtype;
  float residual_scale;
  float lo;
  Activation activation;
  float out_factor;  // with an activation: 1 / the step of the output
};

// Zeros that a kernel may use and leaves as zeros: room for the sums of blocks that share a tile's reduction. Kernels that run at
// the same time must not have the same.
struct Workspace {
  void* data;
  int64_t bytes;
};

// What all layers of well-known networks can use on the largest GPU.
constexpr int64_t kWorkspaceBytes = int64_t{12} << 20;

// What a caller who has measured wants; what is empty or 0 is chosen by a rule.
struct Wish {
  std::string tile;   // "128x64"
  int32_t parts = 0;  // blocks that share a tile's reduction, if there is workspace and reduction enough
};

// A convolution of NHWC images with weights (k, r, s, c / groups). A linear layer is one with 1 x 1 images.
struct Conv2d {
  const void* x;
  const int8_t* weight;
  Epilogue epilogue;
  DType x_dtype;
  bool x_signed;  // x_dtype is int8
  int32_t n, h, w, c, k, r, s;
  int32_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int32_t groups;
  bool out_units;       // out and residual lie in units of images, as x does; of kernels that gather alone
  Workspace workspace;  // null: no reduction is shared between blocks
  Wish wish;

  int32_t p() const { return (h + 2 * pad_h - dil_h * (r - 1) - 1) / stride_h + 1; }
  int32_t q() const { return (w + 2 * pad_w - dil_w * (s - 1) - 1) / stride_w + 1; }
  bool pointwise() const {
    return r == 1 && s == 1 && stride_h == 1 && stride_w == 1 && pad_h == 0 && pad_w == 0 && groups == 1;
  }
};

// A kernel and all that its launch needs. Every kernel takes one struct by value: `params`.
struct Launch {
  std::string kernel;
  const void* function = nullptr;
  uint32_t grid[3] = {1, 1, 1};
  uint32_t block = 0;
  uint32_t shared = 0;         // bytes of dynamic shared memory
  uint32_t shared_turing = 0;  // the same on sm_75
  uint32_t whole = 0;          // where tiles' reductions are shared by `parts` blocks: blocks before those, with a tile each
  int32_t parts = 1;
  std::vector<char> params;

  template <typename Params>
  void set_params(const Params& value) {
    static_assert(std::is_trivially_copyable_v<Params>, "kernel parameters are copied as bytes");
    params.resize(sizeof(Params));
    std::memcpy(params.data(), &value, sizeof(Params));
  }
};

// A CUDA call that failed; the text names the kernel, its launch and CUDA's own reason.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceInfo {
  std::string name;
  int major, minor, multiprocessors;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Picks kernel, tile and parts (plan.h); `multiprocessors` of the device decide how large a tile still fills it.
// Throws std::invalid_argument for sizes beyond the grid's limits.
Launch plan_conv2d_int8(const Conv2d& conv, int multiprocessors);
Launch plan_gemm_int8(const Conv2d& conv, int multiprocessors);
Launch plan_depthwise_int8(const Conv2d& conv);

// Kernels for some layers only, where they are faster, and whether they can run a layer.
Launch plan_conv2d_runs_int8(const Conv2d& conv, int multiprocessors);
Launch plan_depthwise3x3_int8(const Conv2d& conv, int multiprocessors);
bool conv2d_runs_fits(const Conv2d& conv);
bool depthwise3x3_fits(const Conv2d& conv);

// With weights packed by cnncomp/sparsity/two_four.py, for sm_80 and later. shared: bytes of a multiprocessor.
Launch plan_conv2d_sparse24_int8(const Conv2d& conv, int multiprocessors, int shared);
Launch plan_conv2d_sparse24_f16(const Conv2d& conv, int multiprocessors, int shared);  // x float16 or bfloat16, as the weights

// With weights packed by cnncomp/sparsity/gathered.py, for sm_80 and later.
Launch plan_conv2d_blocks_int8(const Conv2d& conv, int multiprocessors, int shared);
Launch plan_conv2d_blocks_f16(const Conv2d& conv, int multiprocessors, int shared);  // x float16 or bfloat16, as the weights

// With weights packed by cnncomp/sparsity/vectors.py and x in units of eight images (vectors_tile.cuh), for sm_80 and later. With
// out_units, out and residual are of x's size, batches of whole units, and channels of a group of whole vectors.
Launch plan_conv2d_vectors_int8(const Conv2d& conv, int multiprocessors, int shared);
Launch plan_conv2d_vectors_f16(const Conv2d& conv, int multiprocessors, int shared);  // x float16 or bfloat16, as the weights

// With weights packed by cnncomp/sparsity/vnm.py and x in units of images of a channel (vnm_tile.cuh), for sm_80 and later.
Launch plan_conv2d_vnm_int8(const Conv2d& conv, int multiprocessors, int shared);
Launch plan_conv2d_vnm_f16(const Conv2d& conv, int multiprocessors, int shared);  // x float16 or bfloat16, as the weights

// Copies x into such units, to epilogue.out; channels in whole pieces of 16 bytes. Those of vnm are others for 8 bits alone.
Launch plan_to_units(const Conv2d& conv);
Launch plan_to_byte_units(const Conv2d& conv);

// Launches on `stream` of `device`, which is made current for the call. Throws CudaError.
void run(const Launch& launch, int device, void* stream);

// A number of the graph that the stream is captured into; 0 if it isn't captured. Throws CudaError.
uint64_t capture_id(int device, void* stream);

// Whether this build holds machine code for the device.
bool supports(int device);

int device_count();
DeviceInfo device_info(int device);

}  // namespace cnncomp::cuda
