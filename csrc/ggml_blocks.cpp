// ggml's blocks: where each bit of codes and scales lies. Every layout is written once and run in both directions.
// The layouts are those of ggml-common.h and of the functions dequantize_row_* of ggml-quants.c (llama.cpp).
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "ggml_grids.h"

namespace lowbit {

namespace {

using Sixteen [[gnu::vector_size(16)]] = uint64_t;  // bytes at a time

// Moves bits between parts (codes, scales: what is in a `GgmlParts`) and a block. Targets are all zero before.
template <bool packing>
struct Mover {
    using Part = std::conditional_t<packing, const uint8_t, uint8_t>;
    using Byte = std::conditional_t<packing, uint8_t, const uint8_t>;
    using Codes = Mover;  // what moves codes

    // `width` bits of `count` neighbours: from bit `from` of each part, from bit `at` of each byte
    static void bits(int count, Part* __restrict part, int from, int width, Byte* __restrict byte, int at) {
        int i = 0;
        for (; i + 16 <= count; i += 16) move<Sixteen>(part + i, from, width, byte + i, at);
        for (; i + 8 <= count; i += 8) move<uint64_t>(part + i, from, width, byte + i, at);
        for (; i + 4 <= count; i += 4) move<uint32_t>(part + i, from, width, byte + i, at);
        for (; i < count; i++) move<uint8_t>(part + i, from, width, byte + i, at);
    }
    // As `bits` for `number` runs of 32 parts, one after the other: all from one bit, to `width` bits each of the same bytes.
    static void planes(int number, Part* __restrict part, int from, int width, Byte* __restrict byte) {
        for (int n = 0; n < number; n++) bits(32, part + 32 * n, from, width, byte, n * width);
    }
    // offset binary here, two's complement there
    static void signed_bytes(int count, Part* part, Byte* byte) {
        for (int i = 0; i < count; i++) {
            if constexpr (packing)
                byte[i] = part[i] ^ 0x80;
            else
                part[i] = byte[i] ^ 0x80;
        }
    }
    static void raw(int count, Part* part, Byte* byte) {
        if constexpr (packing)
            std::memcpy(byte, part, size_t(count));
        else
            std::memcpy(part, byte, size_t(count));
    }
    // `count` bytes of `trits` codes each, base 3 as a fraction of 256; the codes of a byte are `count` apart
    static void ternary(int count, int trits, Part* part, Byte* byte) {
        static constexpr uint8_t power[5] = {1, 3, 9, 27, 81};
        for (int i = 0; i < count; i++) {
            if constexpr (packing) {
                int number = 0;
                for (int n = 0; n < 5; n++) number = 3 * number + (n < trits ? part[i + n * count] : 0);
                byte[i] = uint8_t((number * 256 + 242) / 243);
            } else {
                for (int n = 0; n < trits; n++) part[i + n * count] = uint8_t(uint8_t(byte[i] * power[n]) * 3 >> 8);
            }
        }
    }

    // Of some blocks, what is written.
    static void clear(const GgmlShape& shape, int64_t first, int64_t count, const GgmlParts<Part>& parts, Byte* stored) {
        if constexpr (packing) {
            std::memset(stored + first * shape.bytes, 0, size_t(count * shape.bytes));
        } else {
            if (parts.codes) std::memset(parts.codes + first * shape.weights, 0, size_t(count * shape.weights));
            if (parts.scale_codes) std::memset(parts.scale_codes + first * shape.subs, 0, size_t(count * shape.subs));
            if (parts.min_codes) std::memset(parts.min_codes + first * shape.subs, 0, size_t(count * shape.subs));
        }
    }

  private:
    template <class Word>
    using Lane = std::conditional_t<std::is_integral_v<Word>, Word, uint64_t>;
    template <class Word>  // as many neighbours as it has bytes
    static void move(Part* part, int from, int width, Byte* byte, int at) {
        constexpr auto every = uint64_t(0x0101010101010101) >> (sizeof(Word) < 8 ? 64 - 8 * sizeof(Word) : 0);
        Word here, there, masks = Word{} + Lane<Word>(((1 << width) - 1) * every);
        std::memcpy(&here, part, sizeof here), std::memcpy(&there, byte, sizeof there);
        if constexpr (packing)
            there |= (here >> from & masks) << at, std::memcpy(byte, &there, sizeof there);
        else
            here |= (there >> at & masks) << from, std::memcpy(part, &here, sizeof here);
    }
};

// As the mover that unpacks, but codes stay where they are.
struct Nothing {
    template <class... All>
    static void bits(All...) {}
    template <class... All>
    static void planes(All...) {}
    template <class... All>
    static void signed_bytes(All...) {}
    template <class... All>
    static void ternary(All...) {}
};
struct Beside : Mover<false> {
    using Codes = Nothing;
};
struct Around : Mover<true> {  // in blocks whose codes come after
    using Codes = Nothing;
};

// The parts of one block; what a type does not have is null.
template <class Part>
struct Block {
    Part *codes, *scale, *min, *scale_codes, *min_codes;
};

template <class M, class Part, class Byte>
void nibbles(int count, Part* codes, Byte* bytes) {  // in runs: the first half in the low nibbles
    M::bits(count / 2, codes, 0, 4, bytes, 0), M::bits(count / 2, codes + count / 2, 0, 4, bytes, 4);
}

template <class M, class Part, class Byte>
void pairs(Part* codes, Byte* bytes) {  // the two low bits of 256 codes
    M::planes(4, codes, 0, 2, bytes), M::planes(4, codes + 128, 0, 2, bytes + 32);
}

template <class M, class Part, class Byte>
void single_bits(Part* codes, int from, Byte* bytes) {  // one bit of 256 codes
    M::planes(8, codes, from, 1, bytes);
}

template <class M, class Part, class Byte>
void high_bits_of_32(Part* codes, Byte* bytes) {  // bit 4 of 32 codes, in order
    for (int i = 0; i < 32; i++) M::bits(1, codes + i, 4, 1, bytes + i / 8, i % 8);
}

template <class M, class Part, class Byte>
void scales_and_mins(Part* scales, Part* mins, Byte* bytes) {  // eight of each, six bits, in 12 bytes
    M::bits(4, scales, 0, 6, bytes, 0), M::bits(4, mins, 0, 6, bytes + 4, 0);
    M::bits(4, scales + 4, 0, 4, bytes + 8, 0), M::bits(4, mins + 4, 0, 4, bytes + 8, 4);
    M::bits(4, scales + 4, 4, 2, bytes, 6), M::bits(4, mins + 4, 4, 2, bytes + 4, 6);
}

template <class M, class Part, class Byte>
void move_q6_codes(Part* codes, Byte* low, Byte* high) {
    for (int i = 0; i < 8; i++) {
        int half = i / 4, quarter = i % 4;
        M::bits(32, codes + 32 * i, 0, 4, low + 64 * half + quarter % 2 * 32, quarter / 2 * 4);
        M::bits(32, codes + 32 * i, 4, 2, high + 32 * half, quarter * 2);
    }
}

template <class M, class Part, class Byte>
void move_q3_scales(Part* scales, Byte* bytes) {  // 16 of six bits in 12 bytes
    M::bits(8, scales, 0, 4, bytes, 0), M::bits(8, scales + 8, 0, 4, bytes, 4);
    for (int i = 0; i < 4; i++) M::bits(4, scales + 4 * i, 4, 2, bytes + 8, 2 * i);
}

template <class M, class Part, class Byte>
void move_iq4_scales(Part* scales, Byte* high, Byte* low) {
    for (int i = 0; i < 8; i++) {
        M::bits(1, scales + i, 0, 4, low + i / 2, i % 2 * 4);
        M::bits(1, scales + i, 4, 2, high + i / 4, i % 4 * 2);
    }
}

// One block; the numbers are offsets in it.
template <class M, class Part, class Byte>
void move_plain(GgmlType type, const Block<Part>& b, Byte* at) {
    using C = typename M::Codes;
    switch (type) {
    case GgmlType::q4_0:
    case GgmlType::iq4_nl: M::raw(2, b.scale, at), nibbles<C>(32, b.codes, at + 2); break;
    case GgmlType::q4_1: M::raw(2, b.scale, at), M::raw(2, b.min, at + 2), nibbles<C>(32, b.codes, at + 4); break;
    case GgmlType::q5_0:
        M::raw(2, b.scale, at), high_bits_of_32<C>(b.codes, at + 2), nibbles<C>(32, b.codes, at + 6);
        break;
    case GgmlType::q5_1:
        M::raw(2, b.scale, at), M::raw(2, b.min, at + 2), high_bits_of_32<C>(b.codes, at + 4);
        nibbles<C>(32, b.codes, at + 8);
        break;
    case GgmlType::q8_0: M::raw(2, b.scale, at), C::signed_bytes(32, b.codes, at + 2); break;
    case GgmlType::mxfp4: M::raw(1, b.scale, at), nibbles<C>(32, b.codes, at + 1); break;
    case GgmlType::nvfp4:
        M::raw(4, b.scale, at);
        for (int i = 0; i < 4; i++) nibbles<C>(16, b.codes + 16 * i, at + 4 + 8 * i);
        break;
    case GgmlType::tq1_0:
        C::ternary(32, 5, b.codes, at), C::ternary(16, 5, b.codes + 160, at + 32);
        C::ternary(4, 4, b.codes + 240, at + 48), M::raw(2, b.scale, at + 52);
        break;
    case GgmlType::tq2_0: pairs<C>(b.codes, at), M::raw(2, b.scale, at + 64); break;
    default: break;
    }
}

template <class M, class Part, class Byte>
void move_super(GgmlType type, const Block<Part>& b, Byte* at) {
    using C = typename M::Codes;
    switch (type) {
    case GgmlType::q2_k:
        M::bits(16, b.scale_codes, 0, 4, at, 0), M::bits(16, b.min_codes, 0, 4, at, 4);
        pairs<C>(b.codes, at + 16), M::raw(2, b.scale, at + 80), M::raw(2, b.min, at + 82);
        break;
    case GgmlType::q3_k:
        single_bits<C>(b.codes, 2, at), pairs<C>(b.codes, at + 32), move_q3_scales<M>(b.scale_codes, at + 96);
        M::raw(2, b.scale, at + 108);
        break;
    case GgmlType::q4_k:
    case GgmlType::q5_k: {
        M::raw(2, b.scale, at), M::raw(2, b.min, at + 2), scales_and_mins<M>(b.scale_codes, b.min_codes, at + 4);
        int codes = 16;
        if (type == GgmlType::q5_k) single_bits<C>(b.codes, 4, at + 16), codes = 48;
        for (int i = 0; i < 4; i++) nibbles<C>(64, b.codes + 64 * i, at + codes + 32 * i);
        break;
    }
    case GgmlType::q6_k:
        move_q6_codes<C>(b.codes, at, at + 128), M::signed_bytes(16, b.scale_codes, at + 192);
        M::raw(2, b.scale, at + 208);
        break;
    case GgmlType::iq4_xs:
        M::raw(2, b.scale, at), move_iq4_scales<M>(b.scale_codes, at + 2, at + 4);
        for (int i = 0; i < 8; i++) nibbles<C>(32, b.codes + 32 * i, at + 8 + 16 * i);
        break;
    default: break;
    }
}

// Bits of targets are joined with what is there, so these are cleared before: some blocks at a time, which stay near.
template <class M, GgmlType type, class Byte>
void move_blocks(int64_t blocks, const GgmlParts<typename M::Part>& parts, Byte* stored) {
    constexpr int64_t some = 64;
    const GgmlShape shape = ggml_shape(type);
    typename M::Part none[256] = {};
    for (int64_t first = 0, last; first < blocks; first = last) {
        last = std::min(first + some, blocks);
        M::clear(shape, first, last - first, parts, stored);
        for (int64_t i = first; i < last; i++) {
            Block<typename M::Part> block{
                parts.codes ? parts.codes + i * shape.weights : none,
                parts.scale + i * shape.scale_bytes,
                parts.min ? parts.min + 2 * i : nullptr,
                parts.scale_codes ? parts.scale_codes + i * shape.subs : nullptr,
                parts.min_codes ? parts.min_codes + i * shape.subs : nullptr,
            };
            move_plain<M>(type, block, stored + i * shape.bytes);
            move_super<M>(type, block, stored + i * shape.bytes);
        }
    }
}

// A loop of its own for each type, which is not asked for with each block.
template <class M, GgmlType... types, class Byte>
void move_any(GgmlType type, int64_t blocks, const GgmlParts<typename M::Part>& parts, Byte* stored) {
    ((type == types ? move_blocks<M, types>(blocks, parts, stored) : void()), ...);
}
template <class M, class Byte>
void move_all(GgmlType type, int64_t blocks, const GgmlParts<typename M::Part>& parts, Byte* stored) {
    using enum GgmlType;
    move_any<M, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, tq1_0, tq2_0, mxfp4, nvfp4>(
        type, blocks, parts, stored);
}

}  // namespace

GgmlShape ggml_shape(GgmlType type) {
    switch (type) {
    case GgmlType::q4_0:
    case GgmlType::iq4_nl: return {32, 18, 0, false, 2};
    case GgmlType::q4_1: return {32, 20, 0, true, 2};
    case GgmlType::q5_0: return {32, 22, 0, false, 2};
    case GgmlType::q5_1: return {32, 24, 0, true, 2};
    case GgmlType::q8_0: return {32, 34, 0, false, 2};
    case GgmlType::mxfp4: return {32, 17, 0, false, 1};
    case GgmlType::nvfp4: return {64, 36, 0, false, 4};
    case GgmlType::q2_k: return {256, 84, 16, true, 2};
    case GgmlType::q3_k: return {256, 110, 16, false, 2};
    case GgmlType::q4_k: return {256, 144, 8, true, 2};
    case GgmlType::q5_k: return {256, 176, 8, true, 2};
    case GgmlType::q6_k: return {256, 210, 16, false, 2};
    case GgmlType::iq4_xs: return {256, 136, 8, false, 2};
    case GgmlType::tq1_0: return {256, 54, 0, false, 2};
    case GgmlType::tq2_0: return {256, 66, 0, false, 2};
    case GgmlType::iq2_xxs: return {256, 66, 8, false, 2};
    case GgmlType::iq2_xs: return {256, 74, 16, false, 2};
    case GgmlType::iq2_s: return {256, 82, 16, false, 2};
    case GgmlType::iq3_xxs: return {256, 98, 8, false, 2};
    case GgmlType::iq3_s: return {256, 110, 8, false, 2};
    case GgmlType::iq1_s: return {256, 50, 8, false, 2};
    case GgmlType::iq1_m: return {256, 56, 16, false, 2};
    }
    return {0, 0, 0, false, 0};
}

int64_t ggml_pack(GgmlType type, int64_t blocks, const GgmlParts<const uint8_t>& parts, uint8_t* stored) {
    if (has_grid(type)) {
        std::memset(stored, 0, size_t(blocks * ggml_shape(type).bytes));
        return ggml_grid_pack(type, blocks, parts, stored);
    }
    move_all<Mover<true>>(type, blocks, parts, stored);
    return -1;
}

void ggml_unpack(GgmlType type, int64_t blocks, const uint8_t* stored, const GgmlParts<uint8_t>& parts) {
    if (has_grid(type) && blocks > 0 && !parts.codes) throw std::invalid_argument("without its codes this type has nothing");
    if (has_grid(type)) return ggml_grid_unpack(type, blocks, stored, parts);
    GgmlShape shape = ggml_shape(type);
    if (parts.codes) return move_all<Mover<false>>(type, blocks, parts, stored);
    bool first = type == GgmlType::q4_0 || type == GgmlType::q5_0 || type == GgmlType::q8_0;  // the scale, and no other
    for (int64_t i = 0; first && i < blocks; i++) std::memcpy(parts.scale + 2 * i, stored + i * shape.bytes, 2);
    if (!first) move_all<Beside>(type, blocks, parts, stored);
}

namespace {

constexpr int64_t kStay = 64;  // blocks, whose codes stay in the first level of the cache

// Types of which a block is a head and `runs` runs of nibbles, the first half of each run in the low ones.
struct Nibbles {
    int head, run, runs;
};
Nibbles nibbles_of(GgmlType type) {
    switch (type) {
    case GgmlType::q4_0: return {2, 32, 1};
    case GgmlType::q4_1: return {4, 32, 1};
    case GgmlType::q4_k: return {16, 64, 4};
    default: return {0, 0, 0};
    }
}

using Eight [[gnu::vector_size(16)]] = uint16_t;
using Bytes16 [[gnu::vector_size(16)]] = uint8_t;
using Bytes8 [[gnu::vector_size(8)]] = uint8_t;

template <class Vector>
Vector load(const void* at) {
    Vector value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

// 32 codes of words, two to a byte, one to a byte; and back.
void spread(const uint8_t* words, Bytes16 (&codes)[2]) {
    for (int i = 0; i < 2; i++) {
        auto pairs = __builtin_convertvector(load<Bytes8>(words + 8 * i), Eight);
        codes[i] = Bytes16((pairs & 15) | pairs >> 4 << 8);
    }
}
void join(const Bytes16 (&codes)[2], uint8_t* words) {
    for (int i = 0; i < 2; i++) {
        auto pairs = Eight(codes[i]);
        auto bytes = __builtin_convertvector((pairs | pairs >> 4) & 255, Bytes8);
        std::memcpy(words + 8 * i, &bytes, sizeof bytes);
    }
}

void nibbles_to_block(int run, const uint8_t* words, uint8_t* block) {
    Bytes16 low[2], high[2];
    if (run == 32) {
        spread(words, low);
        Bytes16 bytes = low[0] | low[1] << 4;
        std::memcpy(block, &bytes, sizeof bytes);
        return;
    }
    spread(words, low), spread(words + 16, high);
    for (int i = 0; i < 2; i++) {
        Bytes16 bytes = low[i] | high[i] << 4;
        std::memcpy(block + 16 * i, &bytes, sizeof bytes);
    }
}
void nibbles_to_words(int run, const uint8_t* block, uint8_t* words) {
    Bytes16 codes[2];
    if (run == 32) {
        auto bytes = load<Bytes16>(block);
        codes[0] = bytes & 15, codes[1] = bytes >> 4;
        join(codes, words);
        return;
    }
    Bytes16 first = load<Bytes16>(block), second = load<Bytes16>(block + 16);
    codes[0] = first & 15, codes[1] = second & 15;
    join(codes, words);
    codes[0] = first >> 4, codes[1] = second >> 4;
    join(codes, words + 16);
}

}  // namespace

void ggml_words(const Kernels& kernels, GgmlType type, int64_t blocks, const uint8_t* stored, int bits, void* words) {
    GgmlShape shape = ggml_shape(type);
    auto to = static_cast<uint8_t*>(words);
    if (Nibbles nibbles = nibbles_of(type); nibbles.runs) {
        for (int64_t i = 0; i < blocks; i++)
            for (int n = 0; n < nibbles.runs; n++, to += nibbles.run / 2)
                nibbles_to_words(nibbles.run, stored + i * shape.bytes + nibbles.head + n * nibbles.run / 2, to);
        return;
    }
    if (type == GgmlType::q8_0) {
        for (int64_t i = 0; i < blocks; i++)
            Mover<false>::signed_bytes(shape.weights, to + i * shape.weights, stored + i * shape.bytes + shape.scale_bytes);
        return;
    }
    std::vector<uint8_t> codes(size_t(kStay * shape.weights)), sides[4];
    for (auto& side : sides) side.resize(size_t(kStay * std::max({shape.subs, shape.scale_bytes, 2})));
    for (int64_t at = 0; at < blocks; at += kStay) {
        int64_t count = std::min(kStay, blocks - at);
        ggml_unpack(type, count, stored + at * shape.bytes,
                    {codes.data(), sides[0].data(), sides[1].data(), sides[2].data(), sides[3].data()});
        kernels.pack_bits(codes.data(), 1, count * shape.weights, bits, to + at * shape.weights * bits / 8);
    }
}

void ggml_pack_words(const Kernels& kernels, GgmlType type, int64_t blocks, const void* words, int bits,
                     const GgmlParts<const uint8_t>& parts, uint8_t* stored) {
    GgmlShape shape = ggml_shape(type);
    auto from = static_cast<const uint8_t*>(words);
    if (has_grid(type) && blocks > 0) throw std::invalid_argument("codes of this type come from a table");
    Nibbles nibbles = nibbles_of(type);
    std::vector<uint8_t> codes(size_t(nibbles.runs ? 0 : kStay * shape.weights));
    for (int64_t at = 0; at < blocks; at += kStay) {
        int64_t count = std::min(kStay, blocks - at);
        auto part = [&](const uint8_t* all, int each) { return all ? all + at * each : nullptr; };
        GgmlParts<const uint8_t> some{nullptr, part(parts.scale, shape.scale_bytes), part(parts.min, 2),
                                      part(parts.scale_codes, shape.subs), part(parts.min_codes, shape.subs)};
        uint8_t* block = stored + at * shape.bytes;
        if (!nibbles.runs) {
            kernels.unpack_bits(from + at * shape.weights * bits / 8, 1, count * shape.weights, bits, codes.data());
            some.codes = codes.data();
            move_all<Mover<true>>(type, count, some, block);
            continue;
        }
        move_all<Around>(type, count, some, block);
        for (int64_t i = 0; i < count; i++, block += shape.bytes)
            for (int n = 0; n < nibbles.runs; n++, from += nibbles.run / 2)
                nibbles_to_block(nibbles.run, from, block + nibbles.head + n * nibbles.run / 2);
    }
}

bool ggml_encode_rows(const Kernels& kernels, GgmlType type, int64_t rows, int64_t cols, Weight weight,
                      const float* importance, bool fitted, const GgmlEncoded& out) {
    constexpr int64_t some = 1 << 15;  // weights: with their codes they fill a quarter of a core's cache
    auto encode = fitted ? kernels.ggml_fit : kernels.ggml_encode;
    if (weight.dtype == Dtype::f32) return encode(type, rows, cols, static_cast<const float*>(weight.data), importance, out);
    GgmlShape shape = ggml_shape(type);
    int64_t step = cols && cols < some ? some / cols : 1, across = cols / shape.weights;
    std::vector<float> floats(size_t(step * cols));
    bool finite = true;
    for (int64_t row = 0; finite && row < rows; row += step) {
        int64_t count = row + step < rows ? step : rows - row, at = row * across, sub = at * shape.subs;
        kernels.to_floats({static_cast<const uint16_t*>(weight.data) + row * cols, weight.dtype}, count * cols, floats.data());
        finite = encode(type, count, cols, floats.data(), importance,
                        {out.codes + row * cols, out.scale + at, out.min ? out.min + at : nullptr,
                         out.scale_codes ? out.scale_codes + sub : nullptr, out.min_codes ? out.min_codes + sub : nullptr});
    }
    return finite;
}

}  // namespace lowbit
