// What a file holds, beside what memory does.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "lowbit.h"

namespace lowbit {

bool file_holds(int file, const uint8_t* bytes, int64_t count, int64_t at) {
    constexpr int64_t most = 1 << 17;  // read into the second level of the cache, and compared there
    auto room = std::make_unique<uint8_t[]>(size_t(std::min(most, count)));
    for (int64_t done = 0; done < count;) {
        int64_t found = pread(file, room.get(), size_t(std::min(most, count - done)), off_t(at + done));
        if (found <= 0 || std::memcmp(room.get(), bytes + done, size_t(found)) != 0) return false;
        done += found;
    }
    return true;
}

}  // namespace lowbit
