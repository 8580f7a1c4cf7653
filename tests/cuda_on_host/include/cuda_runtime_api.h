// Found where the kernels are compiled for the host, in place of CUDA's header of this name.
#pragma once

#include "host_runtime.h"
