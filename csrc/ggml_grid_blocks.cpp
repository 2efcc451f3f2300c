// ggml's IQ blocks: where each bit lies (ggml-common.h, dequantize_row_iq* of ggml-quants.c), and codes from table places.
//
// The code of a weight is twice its digit in the table, plus 1 where its sign is negative (IQ2, IQ3) or where its group's
// shift is (IQ1).
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "ggml_grids.h"

namespace lowbit {

namespace {

// What a block of 256 weights holds: places in the table, signs of 8 weights each (of IQ1: one bit, the shift's), scales.
struct Words {
    uint16_t place[64] = {};
    uint8_t signs[32] = {}, scales[16] = {};
    uint16_t scale = 0;
};

template <bool packing>
struct BitMover {
    using Byte = std::conditional_t<packing, uint8_t, const uint8_t>;

    // `width` bits: from bit `from` of the value, from bit `at` of the bytes, low bits first
    template <class Value>
    static void bits(Value& value, int from, int width, Byte* bytes, int at) {
        for (int done = 0; done < width;) {
            int shift = (at + done) % 8, take = std::min(8 - shift, width - done), mask = (1 << take) - 1;
            Byte& byte = bytes[(at + done) / 8];
            if constexpr (packing)
                byte = uint8_t(byte | (value >> (from + done) & mask) << shift);
            else
                value = Value(value | (byte >> shift & mask) << (from + done));
            done += take;
        }
    }
};

template <class M, class Byte>
void move_iq2(GgmlType type, Words& w, Byte* at) {
    M::bits(w.scale, 0, 16, at, 0);
    for (int g = 0; g < 32; g++) switch (type) {
        case GgmlType::iq2_xxs:
            M::bits(w.place[g], 0, 8, at + 2 + g / 4 * 8, g % 4 * 8);
            M::bits(w.signs[g], 0, 7, at + 6 + g / 4 * 8, g % 4 * 7);
            break;
        case GgmlType::iq2_xs:
            M::bits(w.place[g], 0, 9, at + 2 + 2 * g, 0), M::bits(w.signs[g], 0, 7, at + 2 + 2 * g, 9);
            break;
        default:
            M::bits(w.place[g], 0, 8, at + 2 + g, 0), M::bits(w.place[g], 8, 2, at + 66, 2 * g);
            M::bits(w.signs[g], 0, 8, at + 34 + g, 0);
        }
    if (type == GgmlType::iq2_xxs)
        for (int s = 0; s < 8; s++) M::bits(w.scales[s], 0, 4, at + 6 + 8 * s, 28);
    else
        for (int s = 0; s < 16; s++) M::bits(w.scales[s], 0, 4, at + (type == GgmlType::iq2_xs ? 66 : 74), 4 * s);
}

template <class M, class Byte>
void move_iq3(GgmlType type, Words& w, Byte* at) {
    bool small = type == GgmlType::iq3_xxs;
    M::bits(w.scale, 0, 16, at, 0);
    for (int g = 0; g < 64; g++) {
        M::bits(w.place[g], 0, 8, at + 2 + g, 0);
        if (!small) M::bits(w.place[g], 8, 1, at + 66, g);
    }
    for (int g = 0; g < 32; g++)
        small ? M::bits(w.signs[g], 0, 7, at + 66 + g / 4 * 4, g % 4 * 7) : M::bits(w.signs[g], 0, 8, at + 74 + g, 0);
    for (int s = 0; s < 8; s++) M::bits(w.scales[s], 0, 4, small ? at + 66 + 4 * s : at + 106, small ? 28 : 4 * s);
}

template <class M, class Byte>
void move_iq1(GgmlType type, Words& w, Byte* at) {
    if (type == GgmlType::iq1_s) {
        M::bits(w.scale, 0, 16, at, 0);
        for (int g = 0; g < 32; g++) {
            M::bits(w.place[g], 0, 8, at + 2 + g, 0), M::bits(w.place[g], 8, 3, at + 34 + g / 4 * 2, g % 4 * 3);
        }
        for (int s = 0; s < 8; s++) {
            M::bits(w.scales[s], 0, 3, at + 34 + 2 * s, 12), M::bits(w.signs[4 * s], 0, 1, at + 34 + 2 * s, 15);
        }
        return;
    }
    for (int g = 0; g < 32; g++) {
        M::bits(w.place[g], 0, 8, at + g, 0), M::bits(w.place[g], 8, 3, at + 32, 4 * g);
        M::bits(w.signs[g], 0, 1, at + 32, 4 * g + 3);
    }
    for (int s = 0; s < 16; s++) M::bits(w.scales[s], 0, 3, at + 48 + s / 4 * 2, s % 4 * 3);
    for (int i = 0; i < 4; i++) M::bits(w.scale, 4 * i, 4, at + 48 + 2 * i, 12);
}

template <class M, class Byte>
void move_words(GgmlType type, Words& w, Byte* at) {
    switch (type) {
    case GgmlType::iq2_xxs:
    case GgmlType::iq2_xs:
    case GgmlType::iq2_s: return move_iq2<M>(type, w, at);
    case GgmlType::iq3_xxs:
    case GgmlType::iq3_s: return move_iq3<M>(type, w, at);
    default: return move_iq1<M>(type, w, at);
    }
}

bool is_iq1(GgmlType type) { return type == GgmlType::iq1_s || type == GgmlType::iq1_m; }

// Seven signs are stored of eight, the last makes the number of negative ones even.
bool is_even(GgmlType type) {
    return type == GgmlType::iq2_xxs || type == GgmlType::iq2_xs || type == GgmlType::iq3_xxs;
}

uint8_t odd(int signs) { return uint8_t(__builtin_popcount(unsigned(signs)) & 1); }

void codes_of(GgmlType type, const GgmlGrid& grid, Words& w, uint8_t* codes) {
    for (int g = 0; g < 32; g++) {
        if (is_even(type)) w.signs[g] = uint8_t(w.signs[g] | odd(w.signs[g]) << 7);
        if (is_iq1(type)) w.signs[g] = w.signs[type == GgmlType::iq1_s ? g / 4 * 4 : g] & 1 ? 0xff : 0;
    }
    for (int i = 0, mask = (1 << grid.bits) - 1; i < 256; i++) {
        int word = grid.words[w.place[i / grid.group]];
        codes[i] = uint8_t((word >> i % grid.group * grid.bits & mask) << 1 | (w.signs[i / 8] >> i % 8 & 1));
    }
}

// The first of eight weights whose signs the type does not have, or whose digits its table has not; -1 where it has all.
int words_of(GgmlType type, const GgmlGrid& grid, const uint8_t* codes, Words& w) {
    for (int g = 0; g < 32; g++) {
        for (int i = 0; i < 8; i++) w.signs[g] = uint8_t(w.signs[g] | (codes[8 * g + i] & 1) << i);
        bool one = w.signs[g] == 0 || w.signs[g] == 0xff, same = type != GgmlType::iq1_s || w.signs[g] == w.signs[g / 4 * 4];
        if ((is_even(type) && odd(w.signs[g])) || (is_iq1(type) && !(one && same))) return 8 * g;
        for (int at = 8 * g; at < 8 * g + 8; at += grid.group) {
            int word = 0;
            for (int i = 0; i < grid.group; i++) {
                if (codes[at + i] >= 2 * grid.levels) return 8 * g;
                word |= codes[at + i] >> 1 << i * grid.bits;
            }
            int place = grid.place[size_t(word)];
            if (place < 0) return 8 * g;
            w.place[at / grid.group] = uint16_t(place);
        }
    }
    return -1;
}

}  // namespace

int64_t ggml_grid_pack(GgmlType type, int64_t blocks, const GgmlParts<const uint8_t>& parts, uint8_t* stored) {
    const GgmlGrid& grid = ggml_grid(type);
    GgmlShape shape = ggml_shape(type);
    for (int64_t i = 0; i < blocks; i++) {
        Words words;
        int wrong = words_of(type, grid, parts.codes + 256 * i, words);
        if (wrong >= 0) return 256 * i + wrong;
        std::memcpy(words.scales, parts.scale_codes + i * shape.subs, size_t(shape.subs));
        std::memcpy(&words.scale, parts.scale + 2 * i, 2);
        move_words<BitMover<true>>(type, words, stored + i * shape.bytes);
    }
    return -1;
}

void ggml_grid_unpack(GgmlType type, int64_t blocks, const uint8_t* stored, const GgmlParts<uint8_t>& parts) {
    const GgmlGrid& grid = ggml_grid(type);
    GgmlShape shape = ggml_shape(type);
    for (int64_t i = 0; i < blocks; i++) {
        Words words;
        move_words<BitMover<false>>(type, words, stored + i * shape.bytes);
        std::memcpy(parts.scale_codes + i * shape.subs, words.scales, size_t(shape.subs));
        std::memcpy(parts.scale + 2 * i, &words.scale, 2);
        codes_of(type, grid, words, parts.codes + 256 * i);
    }
}

}  // namespace lowbit
