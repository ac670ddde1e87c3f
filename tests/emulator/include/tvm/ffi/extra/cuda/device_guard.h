#pragma once
namespace tvm::ffi {
struct CUDADeviceGuard {
  explicit CUDADeviceGuard(long) {}
};
}  // namespace tvm::ffi
