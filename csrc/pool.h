// Threads that share the chunks of one loop at a time.
#pragma once

#include <cstdint>
#include <functional>

namespace lowbit {

// body(first, last) for pieces of 0 to count, on `threads` threads, this one included; returns when all is done. Pieces
// are taken one by one, so that a thread that is held up delays its own piece alone, and nobody spins for it. One loop
// runs at a time: a second caller waits.
void share(int64_t count, int64_t piece, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace lowbit
