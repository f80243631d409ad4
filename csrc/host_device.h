// What the headers that nvcc and the host compiler share need of CUDA, without the CUDA headers.
#pragma once

#ifdef __CUDACC__
#define WSSS_HOST_DEVICE __host__ __device__
#else
#define WSSS_HOST_DEVICE
#endif

struct CUstream_st;  // what cudaStream_t points to

namespace wsss {

using DeviceStream = CUstream_st*;

}  // namespace wsss
