// Runs CUDA kernels on the CPU, a fiber for each thread of a block, to check what they compute.
//
// Clusters run one after the other, of one block mostly, and fibers switch only where threads wait for one another: at
// barriers, mbarriers, operations of warps and of warp groups. Asynchronous copies happen at once or
// as late as they can, by dice that always fall alike. So many races are not seen, but uninitialised
// shared memory, threads that wait for ever, writes behind shared memory, and copies and products
// that nobody waits for are. Covers what the generated code uses; the rest is refused when the source
// is translated.
#include "../include/emulator.h"
#include "fibers.h"
#include "barriers.h"
#include "warps.h"
#include "memory.h"
#include "wgmma.h"
#include "tensors.h"
#include "runtime.h"
