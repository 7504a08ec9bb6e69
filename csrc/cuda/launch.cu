// Launching planned kernels, and what is asked of the CUDA runtime.

#include "cuda/launch.h"

#include <cuda_runtime.h>

namespace cnncomp::cuda {
namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  throw CudaError(what + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device == previous_) return;
    check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

uint32_t shared_of(const Launch& launch, int device) {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  return major < 8 ? launch.shared_turing : launch.shared;
}

std::string describe(const Launch& l, int device, uint32_t shared) {
  return l.kernel + " on device " + std::to_string(device) + ", grid (" + std::to_string(l.grid[0]) + ", " +
         std::to_string(l.grid[1]) + ", " + std::to_string(l.grid[2]) + "), " + std::to_string(l.block) + " threads, " +
         std::to_string(shared) + " bytes of shared memory";
}

constexpr uint32_t kSharedByDefault = 48 << 10;

}  // namespace

void run(const Launch& launch, int device, void* stream) {
  DeviceGuard guard(device);
  void* params = const_cast<char*>(launch.params.data());
  const dim3 grid(launch.grid[0], launch.grid[1], launch.grid[2]);
  // The error comes back from the call itself; an older one of somebody else stays theirs.
  cudaError_t error = cudaSuccess;
  const uint32_t shared = shared_of(launch, device);
  if (shared > kSharedByDefault)  // no work on a stream: allowed while one is captured
    error = cudaFuncSetAttribute(launch.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared));
  if (error == cudaSuccess)
    error = cudaLaunchKernel(launch.function, grid, dim3(launch.block), &params, shared,
                             static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return;
  cudaGetLastError();  // ours, and reported: don't let the next caller find it
  check(error, describe(launch, device, shared));
}

uint64_t capture_id(int device, void* stream) {
  if (stream == nullptr) return 0;  // can't be captured, nor asked while another stream is
  DeviceGuard guard(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id), "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

bool supports(int device) {
  DeviceGuard guard(device);
  // A plan is the only place that knows kernels' addresses; any one will do, as all are built for the same architectures.
  Conv2d conv = {};
  conv.n = conv.h = conv.w = conv.c = conv.k = conv.r = conv.s = 1;
  conv.stride_h = conv.stride_w = conv.dil_h = conv.dil_w = conv.groups = 1;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, plan_conv2d_int8(conv, 1).function);
  if (error == cudaSuccess) return true;
  cudaGetLastError();
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) return false;
  check(error, "cudaFuncGetAttributes");
  return false;
}

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  cudaGetLastError();
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) return 0;
  check(error, "cudaGetDeviceCount");
  return 0;
}

DeviceInfo device_info(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties(" + std::to_string(device) + ")");
  return {properties.name, properties.major, properties.minor, properties.multiProcessorCount};
}

}  // namespace cnncomp::cuda
