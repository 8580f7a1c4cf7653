// The device that a call runs on: what it allows, how it becomes the current one, and what its errors mean.
#pragma once

#include "kernels.h"

namespace anl {
namespace gpu {

// Throws for any error, which is then reported here and by nobody else.
void check(cudaError_t error, const char* what);

// Whether CUDA has only refused a launch: nothing has run, and the context is as it was.
bool is_refusal(cudaError_t error);

// Makes the device of a call the current one while the call is launched. It pushes that device's primary context, since
// cudaSetDevice, which would be needed to go back, makes a context on a device that had none. -1: whichever is current.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  int index() const { return device_; }

 private:
  int device_ = 0;
  bool pushed_ = false;
};

// 90: compute capability 9.0. Makes no context.
int arch_of(int device);

// The current device's, whose index this is. `protocols` are all.
Limits limits_of(int device);

}  // namespace gpu
}  // namespace anl
