// One copy of a function per instruction set, chosen when the library is loaded.
#pragma once

// WSSS_CLONES: with fused multiply-add, as far as the compiler can clone for it. WSSS_CLONES_UNFUSED: each operation
// rounds by itself, as in plain torch.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define WSSS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WSSS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#define WSSS_CLONES_UNFUSED __attribute__((target_clones("avx2", "default")))
#else
#define WSSS_CLONES
#define WSSS_CLONES_UNFUSED
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call: the helpers are always inlined
#endif
#define WSSS_INLINE inline __attribute__((always_inline))
