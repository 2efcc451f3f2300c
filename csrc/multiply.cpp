// Products that share their inputs, on several threads; inputs are put in order and rounded first where weights take them so.
#include <algorithm>
#include <deque>
#include <vector>

#include "decoder.h"
#include "pool.h"

namespace lowbit {
namespace {

// Bytes of a weight that a thread takes at a time: so many that taking them costs nothing, and fewer to the end, so that
// nobody waits long for the last.
constexpr int64_t bytes_of_piece = 1 << 20, last_bytes = 1 << 16, least_bytes = 1 << 14;

// As what products read inputs: floats, bytes, words of 16 bits, of one token or of many; or bytes of many tokens as words,
// or 128 above what they are.
enum class As { floats, bytes, words, fours, widened, lifted };
bool takes_bytes(As as) { return as == As::bytes || as == As::widened || as == As::lifted; }
bool takes_fours(As as) { return as == As::fours || as == As::widened; }

// The inputs as some weights take them.
struct Inputs {
    const int64_t* order;
    int64_t cols, sub, step;  // sub and step are 0 where they are not rounded
    As as;
    const float* values;
    std::vector<float> filled, scale;
    std::vector<int16_t> step_sum, words;
    std::vector<int8_t> rounded;
    std::vector<uint8_t> fours;

    bool serves(const Inputs& of) const {
        return order == of.order && cols == of.cols && sub == of.sub && step == of.step && as == of.as;
    }
};

void fill(Inputs& of, const float* from, int64_t inputs, int64_t tokens) {
    of.values = from;
    if (!of.order && of.cols == inputs) return;
    of.filled.resize(size_t(tokens * of.cols));
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < inputs; i++)
            of.filled[size_t(t * of.cols + i)] = from[t * inputs + (of.order ? of.order[i] : i)];
    of.values = of.filled.data();
}

// A token of many on the way to where it belongs.
struct Alone {
    std::vector<int8_t> bytes;
    std::vector<int16_t> words, sums;
    std::vector<int32_t> crossed;
    std::vector<float> scale;
};

// A token as bytes, and what there is of it beside them.
void round_bytes(Inputs& of, int64_t token, Alone& alone, float* scale) {
    const bool many = !alone.bytes.empty(), in_fours = many && of.step < of.sub && of.as != As::widened;
    const int64_t steps = of.cols / of.step, blocks = of.cols / of.sub, four = token / 4 * 4;
    int8_t* bytes = many ? alone.bytes.data() : of.rounded.data();
    int16_t* sums = in_fours ? alone.sums.data() : of.step_sum.data() + token * steps;
    if (in_fours) scale = alone.scale.data();
    kernels().round_inputs({of.cols, of.sub, of.step}, of.values + token * of.cols, bytes, scale, sums);
    if (of.as == As::widened) return kernels().widen(of.cols, of.sub, bytes, alone.words.data(), alone.crossed.data());
    if (of.as == As::lifted)
        for (int64_t i = 0; i < of.cols; i++) bytes[i] ^= int8_t(-128);
    if (many) put_in_fours(of.cols, bytes, token % 4, of.rounded.data() + four * of.cols);
    if (!in_fours) return;
    put_in_fours(2 * steps, sums, token % 4, of.step_sum.data() + four * steps);
    put_in_fours(4 * blocks, scale, token % 4, of.scale.data() + four * blocks);
}

void round_token(Inputs& of, int64_t token, Alone& alone) {
    float* scale = of.scale.data() + token * ((of.cols + of.sub - 1) / of.sub);
    int16_t* words = of.as == As::words ? of.words.data() : alone.words.data();
    if (takes_bytes(of.as)) round_bytes(of, token, alone, scale);
    else kernels().round_wide(of.cols, of.sub, of.values + token * of.cols, words, scale, alone.crossed.data());
    if (takes_fours(of.as))
        put_in_fours(of.cols, of.sub, words, scale, alone.crossed.data(), token % 4,
                     of.fours.data() + token / 4 * bytes_of_fours(of.cols, of.sub));
}

void round(Inputs& of, int64_t tokens, int threads) {
    const auto cols = size_t(of.cols), blocks = size_t((of.cols + of.sub - 1) / of.sub), steps = size_t(of.cols / of.step);
    const bool bytes = takes_bytes(of.as), fours = takes_fours(of.as), many = tokens > 1;
    const size_t all = size_t(many ? (tokens + 3) / 4 * 4 : 1);
    of.scale.resize(all * blocks + 15);
    if (bytes) of.step_sum.resize(all * steps + 15);
    if (bytes && !fours) of.rounded.resize(all * cols);
    if (of.as == As::words) of.words.resize(cols);
    if (fours) of.fours.resize(all / 4 * size_t(bytes_of_fours(of.cols, of.sub)));
    share(tokens, 16, threads, [&](int64_t first, int64_t last) {
        Alone alone{std::vector<int8_t>(bytes && many ? cols : 0), std::vector<int16_t>(fours ? cols : 0),
                    std::vector<int16_t>(bytes && many ? steps : 0), std::vector<int32_t>(blocks), std::vector<float>(blocks)};
        for (int64_t token = first; token < last; token++) round_token(of, token, alone);
    });
}

As taken(const Product& of, int64_t tokens) {
    if (of.way == Way::wide) return tokens > 1 ? As::fours : As::words;
    if (of.way == Way::small && tokens >= small_many) return As::fours;
    if (of.way != Way::codes && of.way != Way::table) return As::floats;
    if (tokens > 1 && kernels().crosses && crosses(of)) return As::widened;
    return tokens > 1 && kernels().lifts && lifts(of) ? As::lifted : As::bytes;
}

const Inputs& prepare(std::deque<Inputs>& all, const Matrix& matrix, const float* from, int64_t tokens, int threads) {
    Inputs wanted{};
    wanted.order = matrix.order, wanted.cols = matrix.of.cols, wanted.as = taken(matrix.of, tokens);
    wanted.sub = wanted.as == As::floats ? 0 : matrix.of.sub;
    wanted.step = wanted.sub && matrix.of.fine ? matrix.of.step : wanted.sub;
    for (const Inputs& each : all)
        if (each.serves(wanted)) return each;
    Inputs& made = all.emplace_back(std::move(wanted));
    fill(made, from, matrix.inputs, tokens);
    if (made.sub) round(made, tokens, threads);
    return made;
}

struct Piece {
    const Product* of;
    int64_t first, last;
};

int64_t panels_of(const Product& of) { return (of.rows + 15) / 16; }
int64_t panel_bytes(const Product& of) { return std::max<int64_t>(2 * of.cols * of.bits, 1); }

std::vector<Piece> pieces_of(const std::vector<Product>& products, int threads) {
    std::vector<Piece> pieces;
    int64_t left = 0;
    for (const Product& of : products) left += panels_of(of) * panel_bytes(of);
    // Many threads share a small product too.
    const int64_t least = std::clamp(left / (8 * threads), least_bytes, last_bytes);
    for (const Product& of : products) {
        int64_t bytes = panel_bytes(of), panels = panels_of(of);
        for (int64_t first = 0, last; first < panels; first = last, left -= (last - first) * bytes) {
            int64_t some = std::clamp(left / (2 * threads), least, bytes_of_piece);
            last = std::min(first + std::max<int64_t>(some / bytes, 1), panels);
            pieces.push_back({&of, first, last});
        }
    }
    return pieces;
}

void add_bias(const Matrix& matrix, int64_t tokens, float* out) {
    for (int64_t t = 0; matrix.bias && t < tokens; t++)
        for (int64_t i = 0; i < matrix.of.rows; i++) out[t * matrix.of.rows + i] += matrix.bias[i];
}

}  // namespace

void multiply(const float* inputs, int64_t tokens, const std::vector<Task>& tasks, int threads) {
    std::deque<Inputs> prepared;
    std::vector<Product> products;
    for (const Task& task : tasks) {
        const Inputs& from = prepare(prepared, *task.matrix, inputs, tokens, threads);
        Product& of = products.emplace_back(task.matrix->of);
        of.tokens = tokens, of.input = from.values, of.out = task.out;
        of.rounded = from.rounded.data(), of.input_scale = from.scale.data();
        of.step_sum = from.step_sum.data(), of.words = from.words.data(), of.fours = from.fours.data();
    }
    std::vector<Piece> pieces = pieces_of(products, threads);
    share(int64_t(pieces.size()), 1, threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) kernels().product(*pieces[size_t(i)].of, pieces[size_t(i)].first, pieces[size_t(i)].last);
    });
    for (const Task& task : tasks) add_bias(*task.matrix, tokens, task.out);
}

}  // namespace lowbit
