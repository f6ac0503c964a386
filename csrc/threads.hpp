// A small pool of threads that share one list of pieces.
#pragma once

#include <cstddef>

namespace olmfast {

// Runs `piece(context, i)` for every i below `n_pieces` on up to `threads()` threads, the caller's included,
// and returns when all are done. A pool that is busy is not waited for: the caller then does the work alone.
void parallel(size_t n_pieces, void (*piece)(void*, size_t), void* context);

// Threads in use at most; one per core that this process may run on unless set. Setting throws nothing and
// accepts 1 and more.
size_t threads();
void set_threads(size_t n);

}  // namespace olmfast
