// Reading mapped files without dying of them.
//
// A mapped page that cannot be had any more (the file shrank, the disk failed) raises SIGBUS. `guarded` runs a
// piece of work and turns such a fault, if it lies in the stated range, into a return value.
#pragma once

#include <cstddef>

namespace olmfast {

// Runs `work(context)`; false if reading [begin, begin + n_bytes) raised SIGBUS on this thread meanwhile.
// The work is then left where it stood, so it must own nothing: no locks, no heap, no destructors.
// `install_guard` must have been called before. Frames nest.
bool guarded(const void* begin, size_t n_bytes, void (*work)(void*), void* context);

// Make ours the process's SIGBUS handler if it is not already. A fault that is not ours goes to the handler
// that stood there before.
void install_guard();

}  // namespace olmfast
