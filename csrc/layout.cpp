// What needs no instruction set of its own: thresholds of level tables, and layouts made of packed rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "lowbit.h"

namespace lowbit {

namespace {

// The least float32 x that goes to the upper of two neighbouring levels.
float threshold_between(float below, float above, bool tie_goes_up) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    // the exact sum is sum + rest (Knuth's two-sum), so that a midpoint is never taken for another by rounding
    double a = below, b = above, sum = a + b, part = sum - a, rest = (a - (sum - part)) + (b - part);
    double middle = sum / 2;
    auto nearest = static_cast<float>(middle);
    bool exact = double(nearest) == middle && rest == 0;
    if (exact) return tie_goes_up ? nearest : std::nextafter(nearest, infinity);
    bool at_or_above = double(nearest) > middle || (double(nearest) == middle && rest < 0);
    return at_or_above ? nearest : std::nextafter(nearest, infinity);
}

bool tie_goes_up(float below, uint8_t code_below, float above, uint8_t code_above) {
    bool even_below = code_below % 2 == 0, even_above = code_above % 2 == 0;
    return even_below == even_above ? std::fabs(above) <= std::fabs(below) : even_above;
}

}  // namespace

Levels nearest_level(const float* sorted, const uint8_t* codes, int count) {
    Levels levels{count, {}, {}};
    for (int i = 0; i < 256; i++) {
        levels.threshold[i] = std::numeric_limits<float>::quiet_NaN();
        levels.code[i] = i < count ? codes[i] : 0;
    }
    for (int i = 0; i + 1 < count; i++) {
        bool up = tie_goes_up(sorted[i], codes[i], sorted[i + 1], codes[i + 1]);
        levels.threshold[i] = threshold_between(sorted[i], sorted[i + 1], up);
    }
    return levels;
}

// ---- transposed words ----

// Rows are packed in tiles of 64 x 128 words, which stay in L1. Lines of words are far apart, and each is read or written in
// runs of 256 bytes: of shorter ones the cache holds too few, since their addresses differ by powers of two.
namespace {

constexpr int64_t tile_rows = 64, tile_words = 128;
using Tile = uint32_t[tile_rows][tile_words];

// body(row, rows, first code, codes, first word, words) for each tile.
template <class Body>
void each_tile(int64_t rows, int64_t cols, int bits, Body body) {
    int64_t all_words = words_per_row(cols, bits), step = tile_words / bits * bits;  // a multiple of 32 codes
    for (int64_t row = 0; row < rows; row += tile_rows)
        for (int64_t word = 0; word < all_words; word += step) {
            int64_t col = word / bits * 32, words = std::min(step, all_words - word);
            body(row, std::min(tile_rows, rows - row), col, std::min(step / bits * 32, cols - col), word, words);
        }
}

}  // namespace

void pack_bits_transposed(const Kernels& kernels, const uint8_t* codes, int64_t rows, int64_t cols, int bits,
                          void* words, int64_t stride) {
    auto to = static_cast<uint8_t*>(words);
    Tile tile;
    each_tile(rows, cols, bits, [&](int64_t row, int64_t high, int64_t col, int64_t wide, int64_t word, int64_t count) {
        for (int64_t i = 0; i < high; i++) kernels.pack_bits(codes + (row + i) * cols + col, 1, wide, bits, tile[i]);
        kernels.transpose_words(tile, tile_words, high, count, to + 4 * (word * stride + row), stride);
    });
}

void unpack_bits_transposed(const Kernels& kernels, const void* words, int64_t stride, int64_t rows, int64_t cols,
                            int bits, uint8_t* codes) {
    auto from = static_cast<const uint8_t*>(words);
    Tile tile;
    each_tile(rows, cols, bits, [&](int64_t row, int64_t high, int64_t col, int64_t wide, int64_t word, int64_t count) {
        kernels.transpose_words(from + 4 * (word * stride + row), stride, count, high, tile, tile_words);
        for (int64_t i = 0; i < high; i++) kernels.unpack_bits(tile[i], 1, wide, bits, codes + (row + i) * cols + col);
    });
}

// Sixteen lines at a time are whole lines of the cache where they go to, in runs of 256 bytes of what they come from.
void transpose_lines(const Kernels& kernels, const void* from, int64_t from_stride, int64_t rows, int64_t cols, void* to,
                     int64_t to_stride) {
    auto source = static_cast<const uint8_t*>(from);
    auto target = static_cast<uint8_t*>(to);
    for (int64_t col = 0; col < cols; col += tile_rows)
        for (int64_t row = 0; row < rows; row += 16)
            kernels.transpose_words(source + 4 * (row * from_stride + col), from_stride, std::min<int64_t>(16, rows - row),
                                    std::min(tile_rows, cols - col), target + 4 * (col * to_stride + row), to_stride);
}

// ---- eight rows to a word ----

namespace {

constexpr int awq_rows[8] = {0, 2, 4, 6, 1, 3, 5, 7};

// body(first of up to 64 lines of words, lines, first column, columns) for each tile.
template <class Body>
void each_awq_tile(int64_t lines, int64_t cols, Body body) {
    for (int64_t line = 0; line < lines; line += tile_rows)
        for (int64_t col = 0; col < cols; col += tile_words)
            body(line, std::min(tile_rows, lines - line), col, std::min(tile_words, cols - col));
}

// Nibbles of eight rows side by side: first pairs of rows as bytes, then four of these; both loops become vectors.
void join_eight(const uint8_t* const (&rows)[8], int64_t count, uint32_t* words) {
    uint8_t pairs[4][tile_words];
    for (int k = 0; k < 4; k++)
        for (int64_t c = 0; c < count; c++) pairs[k][c] = uint8_t((rows[2 * k][c] & 15) | rows[2 * k + 1][c] << 4);
    auto to = reinterpret_cast<uint8_t*>(words);
    for (int64_t c = 0; c < count; c++)
        for (int k = 0; k < 4; k++) to[4 * c + k] = pairs[k][c];
}

void split_eight(const uint32_t* words, int64_t count, uint8_t* const (&rows)[8]) {
    uint8_t pairs[4][tile_words];
    auto from = reinterpret_cast<const uint8_t*>(words);
    for (int64_t c = 0; c < count; c++)
        for (int k = 0; k < 4; k++) pairs[k][c] = from[4 * c + k];
    for (int k = 0; k < 4; k++)
        for (int64_t c = 0; c < count; c++) {
            rows[2 * k][c] = pairs[k][c] & 15;
            rows[2 * k + 1][c] = pairs[k][c] >> 4;
        }
}

}  // namespace

void pack_awq(const Kernels& kernels, const uint8_t* codes, int64_t rows, int64_t cols, void* words, int64_t stride) {
    auto to = static_cast<uint8_t*>(words);
    int64_t lines = rows / 8;
    Tile tile;
    each_awq_tile(lines, cols, [&](int64_t line, int64_t high, int64_t col, int64_t count) {
        for (int64_t i = 0; i < high; i++) {
            const uint8_t* from[8];
            for (int k = 0; k < 8; k++) from[k] = codes + (8 * (line + i) + awq_rows[k]) * cols + col;
            join_eight(from, count, tile[i]);
        }
        kernels.transpose_words(tile, tile_words, high, count, to + 4 * (col * stride + line), stride);
    });
}

void unpack_awq(const Kernels& kernels, const void* words, int64_t stride, int64_t rows, int64_t cols, uint8_t* codes) {
    auto from = static_cast<const uint8_t*>(words);
    int64_t lines = rows / 8;
    Tile tile;
    each_awq_tile(lines, cols, [&](int64_t line, int64_t high, int64_t col, int64_t count) {
        kernels.transpose_words(from + 4 * (col * stride + line), stride, count, high, tile, tile_words);
        for (int64_t i = 0; i < high; i++) {
            uint8_t* to[8];
            for (int k = 0; k < 8; k++) to[k] = codes + (8 * (line + i) + awq_rows[k]) * cols + col;
            split_eight(tile[i], count, to);
        }
    });
}

// ---- the same from words ----

namespace {

// Words of eight columns, or of eight rows, by place in the word of eight rows that has them.
constexpr int64_t eights_wide = 64, eights_high = 16;
using Eights = uint32_t[8][eights_wide];

// The low bits under `mask` of one line's words against those `shift` above them of the other's.
template <int shift, uint32_t mask>
void exchange(uint32_t* one, uint32_t* other) {
    for (int64_t i = 0; i < eights_wide; i++) {
        uint32_t differ = (one[i] >> shift ^ other[i]) & mask;
        other[i] ^= differ, one[i] ^= differ << shift;
    }
}

// The halves of words from one place to another: copies of few bytes would become `rep movs`, which are slow to begin.
void exchange_halves(const void* __restrict a, const void* __restrict b, void* __restrict one, void* __restrict other,
                     int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t low, high;
        std::memcpy(&low, static_cast<const uint8_t*>(a) + 4 * i, 4);
        std::memcpy(&high, static_cast<const uint8_t*>(b) + 4 * i, 4);
        uint32_t first = (low & 0xffff) | high << 16, second = low >> 16 | (high & 0xffff0000);
        std::memcpy(static_cast<uint8_t*>(one) + 4 * i, &first, 4);
        std::memcpy(static_cast<uint8_t*>(other) + 4 * i, &second, 4);
    }
}

// Nibble i of words j becomes nibble j of words i (Hacker's Delight, 7-3), but for the halves; its own inverse. Words j are
// in line `awq_rows[j]`, so that what are words of rows then are in their order.
void turn_nibbles(Eights& tile) {
    auto at = [&](int j) { return tile[awq_rows[j]]; };
    for (int j : {0, 1, 4, 5}) exchange<8, 0x00ff00ff>(at(j), at(j + 2));
    for (int j : {0, 2, 4, 6}) exchange<4, 0x0f0f0f0f>(at(j), at(j + 1));
}

// body(tile, bytes to its first word of eight rows, bytes to its first word of eight columns, words of each line) for all.
template <class Body>
void each_eights(int64_t count, int64_t eights, int64_t stride, Body body) {
    Eights tile = {};
    for (int64_t line = 0; line < count; line++)
        for (int64_t first = 0; first < eights; first += eights_wide)
            body(tile, 4 * (8 * line * stride + first), 32 * (line * eights + first), std::min(eights_wide, eights - first));
}

}  // namespace

void lines_to_awq(const Kernels& kernels, const void* lines, int64_t count, int64_t eights, void* words, int64_t stride) {
    auto from = static_cast<const uint8_t*>(lines);
    auto to = static_cast<uint8_t*>(words);
    each_eights(count, eights, stride, [&](Eights& tile, int64_t word, int64_t column, int64_t some) {
        kernels.transpose_words(from + column, 8, some, 8, tile, eights_wide);
        turn_nibbles(tile);
        for (int j = 0; j < 4; j++)
            exchange_halves(tile[awq_rows[j]], tile[awq_rows[j + 4]], to + word + 4 * j * stride,
                            to + word + 4 * (j + 4) * stride, some);
    });
}

void awq_to_lines(const Kernels& kernels, const void* words, int64_t stride, int64_t count, int64_t eights, void* lines) {
    auto from = static_cast<const uint8_t*>(words);
    auto to = static_cast<uint8_t*>(lines);
    each_eights(count, eights, stride, [&](Eights& tile, int64_t word, int64_t column, int64_t some) {
        for (int j = 0; j < 4; j++)
            exchange_halves(from + word + 4 * j * stride, from + word + 4 * (j + 4) * stride, tile[awq_rows[j]],
                            tile[awq_rows[j + 4]], some);
        turn_nibbles(tile);
        kernels.transpose_words(tile, eights_wide, 8, some, to + column, 8);
    });
}

void awq_to_rows(const Kernels& kernels, const void* words, int64_t stride, int64_t count, int64_t row_words,
                 void* rows) {
    auto from = static_cast<const uint8_t*>(words);
    auto to = static_cast<uint8_t*>(rows);
    uint32_t lines[eights_high * 8 * eights_wide];
    for (int64_t first = 0; first < count / 8; first += eights_wide)
        for (int64_t word = 0; word < row_words; word += eights_high) {
            int64_t some = std::min(eights_wide, count / 8 - first), high = std::min(eights_high, row_words - word);
            awq_to_lines(kernels, from + 4 * (8 * word * stride + first), stride, high, some, lines);
            kernels.transpose_words(lines, 8 * some, high, 8 * some, to + 4 * (8 * first * row_words + word), row_words);
        }
}

// ---- nibbles ----

namespace {

constexpr int64_t chunk = 4096;  // codes: packed and swapped while they are in L1

void swap_nibbles(uint8_t* bytes, int64_t count) {
    for (int64_t i = 0; i < count; i++) bytes[i] = uint8_t(bytes[i] << 4 | bytes[i] >> 4);
}

}  // namespace

void pack_nibbles_high_first(const Kernels& kernels, const uint8_t* codes, int64_t count, uint8_t* bytes) {
    uint8_t packed[chunk / 2];
    for (int64_t at = 0; at < count; at += chunk) {
        int64_t some = std::min(chunk, count - at);
        kernels.pack_bits(codes + at, 1, some, 4, packed);
        swap_nibbles(packed, (some + 1) / 2);
        std::memcpy(bytes + at / 2, packed, size_t((some + 1) / 2));
    }
}

void unpack_nibbles_high_first(const Kernels& kernels, const uint8_t* bytes, int64_t count, uint8_t* codes) {
    uint8_t packed[chunk / 2];
    for (int64_t at = 0; at < count; at += chunk) {
        int64_t some = std::min(chunk, count - at);
        std::memcpy(packed, bytes + at / 2, size_t((some + 1) / 2));
        swap_nibbles(packed, (some + 1) / 2);
        kernels.unpack_bits(packed, 1, some, 4, codes + at);
    }
}

}  // namespace lowbit
