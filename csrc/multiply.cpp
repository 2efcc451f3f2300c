// A product on several threads, its inputs rounded first where it takes them so.
#include <algorithm>
#include <vector>

#include "lowbit.h"
#include "pool.h"

namespace lowbit {

// Pieces of a weight that a thread takes at a time: small enough that one that is held up costs little, large enough
// that taking them costs nothing.
static constexpr int64_t bytes_of_piece = 1 << 17;

void multiply(Product of, int threads) {
    const Kernels& table = kernels();
    std::vector<int8_t> rounded;
    std::vector<float> scale, sum;
    if (of.way == Way::codes || of.way == Way::table) {
        int64_t count = of.tokens * of.cols, blocks = of.cols / of.sub;
        rounded.resize(size_t(count)), scale.resize(size_t(count / of.sub)), sum.resize(size_t(count / of.sub));
        share(of.tokens, 16, threads, [&](int64_t first, int64_t last) {
            int64_t at = first * of.cols, block = first * blocks;
            table.round_inputs((last - first) * of.cols, of.sub, of.input + at, rounded.data() + at, scale.data() + block,
                               sum.data() + block);
        });
        of.rounded = rounded.data(), of.input_scale = scale.data(), of.input_sum = sum.data();
    }
    int64_t panel_bytes = 16 * of.cols * of.bits / 8;
    share((of.rows + 15) / 16, std::max<int64_t>(bytes_of_piece / std::max<int64_t>(panel_bytes, 1), 1), threads,
          [&](int64_t first, int64_t last) { table.product(of, first, last); });
}

}  // namespace lowbit
