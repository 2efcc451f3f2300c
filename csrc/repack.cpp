// From rows of codes or floats to panels of sixteen rows, in the order in which product.h reads them.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "lowbit.h"
#include "pool.h"

namespace lowbit {
namespace {

constexpr int64_t lanes = 16, tile_words = 512, panels_of_piece = 4;
using Tile = uint32_t[lanes][tile_words];

// A row's codes in the order of the panel, with zeros behind them.
struct Line {
    std::vector<uint8_t> bytes;
    explicit Line(int64_t full) : bytes(size_t(full)) {}
    const uint8_t* of(const uint8_t* row, int64_t cols, const int64_t* order) {
        if (!order) std::memcpy(bytes.data(), row, size_t(cols));
        for (int64_t i = 0; order && i < cols; i++) bytes[size_t(i)] = row[order[i]];
        return bytes.data();
    }
};

// Words of a chunk of 32 codes that hold `bits` bits of each, from bit `first` on: four columns a byte apart, and those
// after them in the bits above.
template <int bits, int first>
void join(const uint8_t* codes, uint32_t* to) {
    constexpr int fields = 8 / bits;
    constexpr uint32_t mask = ((1u << bits) - 1) * 0x01010101u;
    for (int w = 0; w < bits; w++) {
        uint32_t part[fields], word = 0;
        std::memcpy(part, codes + w * 4 * fields, sizeof part);
        for (int f = 0; f < fields; f++) word |= (part[f] >> first & mask) << bits * f;
        to[w] = word;
    }
}

template <int bits>
void join_chunks(const uint8_t* codes, int64_t chunks, uint32_t* to) {
    constexpr int low = lower_bits(bits), high = bits - low;
    for (int64_t chunk = 0; chunk < chunks; chunk++, codes += 32, to += bits) {
        join<low, 0>(codes, to);
        if constexpr (high > 0) join<high, low>(codes, to + low);
    }
}

template <int bits>
void interleave_panel(const uint8_t* codes, int64_t rows, int64_t cols, const int64_t* order, int64_t full,
                      std::vector<Line>& lines, uint8_t* out) {
    constexpr int64_t at_once = tile_words / bits;
    const uint8_t* from[lanes] = {};
    for (int64_t r = 0; r < rows; r++) from[r] = lines[size_t(r)].of(codes + r * cols, cols, order);
    Tile tile = {};
    for (int64_t chunk = 0, chunks = full / 32; chunk < chunks; chunk += at_once) {
        int64_t count = std::min(at_once, chunks - chunk);
        for (int64_t r = 0; r < rows; r++) join_chunks<bits>(from[r] + chunk * 32, count, tile[r]);
        kernels().transpose_words(tile, tile_words, lanes, count * bits, out + 64 * bits * chunk, lanes);
    }
}

// Whole rows of two-byte elements, two at a time as words.
void interleave_pairs(const uint16_t* from, int64_t cols, uint16_t* out) {
    uint32_t tile[tile_words][lanes];
    for (int64_t pair = 0; pair < cols / 2; pair += tile_words) {
        int64_t count = std::min(tile_words, cols / 2 - pair);
        kernels().transpose_words(from + 2 * pair, cols / 2, lanes, count, tile, lanes);
        for (int64_t i = 0; i < count; i++, out += 2 * lanes)
            for (int64_t r = 0; r < lanes; r++)
                out[r] = uint16_t(tile[i][r]), out[lanes + r] = uint16_t(tile[i][r] >> 16);
    }
}

template <class T>
void interleave_floats_panel(const T* from, int64_t rows, int64_t cols, int64_t full, T* out) {
    std::memset(out + cols * lanes, 0, size_t((full - cols) * lanes) * sizeof(T));
    if constexpr (sizeof(T) == 4) {
        if (rows == lanes) return kernels().transpose_words(from, cols, lanes, cols, out, lanes);
    } else {
        if (rows == lanes && cols % 2 == 0) return interleave_pairs(from, cols, out);
    }
    for (int64_t c = 0; c < cols; c++)
        for (int64_t r = 0; r < lanes; r++) out[c * lanes + r] = r < rows ? from[r * cols + c] : T{};
}

// body(panel, rows in it) for all panels.
template <class Body>
void each_panel(int64_t rows, int threads, Body body) {
    share((rows + lanes - 1) / lanes, panels_of_piece, threads, [&](int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; panel++) body(panel, std::min(lanes, rows - panel * lanes));
    });
}

template <int bits>
void interleave_all(const uint8_t* codes, int64_t rows, int64_t cols, const int64_t* order, int64_t full, int threads,
                    uint8_t* out) {
    share((rows + lanes - 1) / lanes, panels_of_piece, threads, [&](int64_t first, int64_t last) {
        std::vector<Line> lines;
        lines.assign(size_t(lanes), Line(full));
        for (int64_t panel = first; panel < last; panel++)
            interleave_panel<bits>(codes + panel * lanes * cols, std::min(lanes, rows - panel * lanes), cols, order,
                                   full, lines, out + panel * lanes * full * bits / 8);
    });
}

}  // namespace

void interleave(const uint8_t* codes, int64_t rows, int64_t cols, const int64_t* order, int bits, int64_t full,
                int threads, uint8_t* out) {
    if (bits == 2) interleave_all<2>(codes, rows, cols, order, full, threads, out);
    if (bits == 3) interleave_all<3>(codes, rows, cols, order, full, threads, out);
    if (bits == 4) interleave_all<4>(codes, rows, cols, order, full, threads, out);
    if (bits == 5) interleave_all<5>(codes, rows, cols, order, full, threads, out);
    if (bits == 6) interleave_all<6>(codes, rows, cols, order, full, threads, out);
    if (bits == 8) interleave_all<8>(codes, rows, cols, order, full, threads, out);
}

void interleave_floats(const void* values, int64_t rows, int64_t cols, int size, int64_t full, int threads, void* out) {
    auto run = [&](auto element) {
        using T = decltype(element);
        each_panel(rows, threads, [&](int64_t panel, int64_t high) {
            interleave_floats_panel(static_cast<const T*>(values) + panel * lanes * cols, high, cols, full,
                                    static_cast<T*>(out) + panel * lanes * full);
        });
    };
    size == 2 ? run(uint16_t{}) : run(uint32_t{});
}

bool widen_panels(Weight panels, int64_t count, int64_t cols, int threads, void* words, float* scale) {
    std::atomic<bool> finite = true;
    const int64_t size = panels.dtype == Dtype::f32 ? 4 : 2, runs = (cols + wide_run - 1) / wide_run;
    share(count, panels_of_piece, threads, [&](int64_t first, int64_t last) {
        int64_t at = first * cols * lanes;
        Weight some{static_cast<const uint8_t*>(panels.data) + at * size, panels.dtype};
        if (!kernels().widen_panels(some, last - first, cols, static_cast<uint8_t*>(words) + 2 * at, scale + first * runs * lanes))
            finite = false;
    });
    return finite;
}

void put_in_fours(int64_t cols, int64_t run, const int16_t* words, const float* scale, const int32_t* crossed, int64_t which,
                  uint8_t* fours) {
    for (int64_t first = 0; first < cols; first += run, fours += 32 + 8 * run) {
        std::memcpy(fours + 4 * which, scale++, 4);
        std::memcpy(fours + 16 + 4 * which, crossed++, 4);
        for (int64_t i = 0; i < std::min(run, cols - first); i += 4, words += 4)
            std::memcpy(fours + 32 + 8 * (i + which), words, 8);
    }
}

void put_in_fours(int64_t bytes, const void* from, int64_t which, void* fours) {
    auto token = static_cast<const uint8_t*>(from);
    auto to = static_cast<uint8_t*>(fours) + 4 * which;
    for (int64_t i = 0; i < bytes; i += 4) std::memcpy(to + 4 * i, token + i, 4);
}

int ggml_panel_bits(GgmlType type) {
    switch (type) {
    case GgmlType::q2_k: return 2;
    case GgmlType::q3_k: return 3;
    case GgmlType::q4_0:
    case GgmlType::q4_1:
    case GgmlType::q4_k:
    case GgmlType::iq4_nl:
    case GgmlType::iq4_xs: return 4;
    case GgmlType::q5_0:
    case GgmlType::q5_1:
    case GgmlType::q5_k: return 5;
    case GgmlType::q6_k: return 6;
    case GgmlType::q8_0: return 8;
    default: return 0;
    }
}

GgmlFound ggml_panels(GgmlType type, const GgmlRows& rows, int threads, const GgmlPanels& to) {
    std::atomic<bool> finite = true, wide = false;
    share((rows.rows + lanes - 1) / lanes, panels_of_piece, threads, [&](int64_t first, int64_t last) {
        GgmlFound found = kernels().ggml_panels(type, rows, to, first, last);
        if (!found.finite) finite = false;
        if (found.wide) wide = true;
    });
    return {finite, wide};
}

}  // namespace lowbit
