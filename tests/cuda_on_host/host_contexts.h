// Devices' contexts on the host, and the errors that stay in them.
#pragma once

#include <atomic>

#include "host_devices.h"
#include "host_runtime.h"

// For the tests, by ctypes.
#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace anl {
namespace host {

extern std::atomic<cudaError_t> broken[NUM_DEVICES];  // what every later call in that device's context answers

int current_device();
bool exists(int device);

// Passes the error on, and keeps it for cudaGetLastError.
cudaError_t answer(cudaError_t error);

// For whatever cannot do without a context.
cudaError_t enter_context();

}  // namespace host
}  // namespace anl
