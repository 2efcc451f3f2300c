// Sixteen lanes in plain C++: the reference that the other instruction sets must equal bit for bit.
// Include inside an anonymous namespace.

constexpr const char* isa_name = "scalar";
constexpr int tile = 4;
#if defined(LOWBIT_WHOLE_DOTS)  // a test
constexpr bool whole_dots = true;
#else
constexpr bool whole_dots = false;  // whether `add_dot` is one instruction; products are sums of it then
#endif
constexpr bool unsigned_dots = whole_dots;  // whether its codes are unsigned bytes; else they are signed

template <class T>
struct Lanes {
    T at[16];
};
using F = Lanes<float>;
using I = Lanes<int32_t>;
using M = Lanes<bool>;
struct D {
    double at[16] = {};
};

template <class R, class Op>
R each(Op op) {
    R out;
    for (int i = 0; i < 16; i++) out.at[i] = op(i);
    return out;
}

template <class To, class From>
To bit_copy(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude > 0x7c00) return bit_copy<float>(sign | 0x7fc00000 | magnitude << 13);
    if (magnitude == 0x7c00) return bit_copy<float>(sign | 0x7f800000);
    float value = bit_copy<float>(magnitude << 13) * 0x1p112f;  // exact: the exponent bias moves from 15 to 127
    return bit_copy<float>(bit_copy<uint32_t>(value) | sign);
}

uint16_t float_to_half(float value) {
    uint32_t bits = bit_copy<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // from 65520 on, half to even gives infinity
    if (magnitude < 0x38800000) {                                 // subnormal half: let float32 round at 2**-24
        float shifted = bit_copy<float>(magnitude) + 0.5f;
        return uint16_t(sign | (bit_copy<uint32_t>(shifted) - 0x3f000000));
    }
    return uint16_t(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13));
}

// Loads and stores of 16 elements at any address.
template <class T>
Lanes<T> load(const void* from) {
    Lanes<T> out;
    __builtin_memcpy(&out, from, sizeof out);
    return out;
}
template <class T>
void store(void* to, const Lanes<T>& value) {
    __builtin_memcpy(to, &value, sizeof value);
}
F load_f32(const void* from) { return load<float>(from); }
F load_f16(const void* from) {
    auto half = load<uint16_t>(from);
    return each<F>([&](int i) { return half_to_float(half.at[i]); });
}
I load_u16(const void* from) {
    auto wide = load<uint16_t>(from);
    return each<I>([&](int i) { return int32_t(wide.at[i]); });
}
I load_u8(const void* from) {
    auto wide = load<uint8_t>(from);
    return each<I>([&](int i) { return int32_t(wide.at[i]); });
}
void store_f32(void* to, F value) { store(to, value); }
void store_f16(void* to, F value) {
    store(to, each<Lanes<uint16_t>>([&](int i) { return float_to_half(value.at[i]); }));
}
void store_u16(void* to, I value) {
    store(to, each<Lanes<uint16_t>>([&](int i) { return uint16_t(value.at[i]); }));
}
void store_u8(void* to, I value) {
    store(to, each<Lanes<uint8_t>>([&](int i) { return uint8_t(value.at[i]); }));
}

F set(float value) {
    return each<F>([&](int) { return value; });
}
I set(int32_t value) {
    return each<I>([&](int) { return value; });
}
F floats(I bits) { return bit_copy<F>(bits); }
I bits(F value) { return bit_copy<I>(value); }
F to_float(I value) {
    return each<F>([&](int i) { return float(value.at[i]); });
}
// Towards 0; INT_MIN where int32 has no such number, as on x86.
I to_int(F value) {
    return each<I>([&](int i) {
        bool fits = value.at[i] >= -0x1p31f && value.at[i] < 0x1p31f;
        return fits ? int32_t(value.at[i]) : INT32_MIN;
    });
}

F add(F a, F b) {
    return each<F>([&](int i) { return a.at[i] + b.at[i]; });
}
F sub(F a, F b) {
    return each<F>([&](int i) { return a.at[i] - b.at[i]; });
}
F mul(F a, F b) {
    return each<F>([&](int i) { return a.at[i] * b.at[i]; });
}
F div(F a, F b) {
    return each<F>([&](int i) { return a.at[i] / b.at[i]; });
}
F fma(F a, F b, F c) {  // rounded once
    return each<F>([&](int i) { return __builtin_fmaf(a.at[i], b.at[i], c.at[i]); });
}
F sqrt(F a) {
    return each<F>([&](int i) { return __builtin_sqrtf(a.at[i]); });
}
F rint(F a) {
    return each<F>([&](int i) { return __builtin_rintf(a.at[i]); });
}
// b where either is NaN.
F min(F a, F b) {
    return each<F>([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
}
F max(F a, F b) {
    return each<F>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}

I add(I a, I b) {
    return each<I>([&](int i) { return int32_t(uint32_t(a.at[i]) + uint32_t(b.at[i])); });
}
I sub(I a, I b) {
    return each<I>([&](int i) { return int32_t(uint32_t(a.at[i]) - uint32_t(b.at[i])); });
}
I both(I a, I b) {
    return each<I>([&](int i) { return a.at[i] & b.at[i]; });
}
I either(I a, I b) {
    return each<I>([&](int i) { return a.at[i] | b.at[i]; });
}
I mul(I a, I b) {
    return each<I>([&](int i) { return int32_t(uint32_t(a.at[i]) * uint32_t(b.at[i])); });
}
I min(I a, I b) {
    return each<I>([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
}
I max(I a, I b) {
    return each<I>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
template <int n>
I shift_left(I a) {
    return each<I>([&](int i) { return int32_t(uint32_t(a.at[i]) << n); });
}
template <int n>
I shift_right(I a) {
    return each<I>([&](int i) { return int32_t(uint32_t(a.at[i]) >> n); });
}
template <int n>
I shift_right_signed(I a) {
    return each<I>([&](int i) { return a.at[i] >> n; });
}
M greater(I a, I b) {
    return each<M>([&](int i) { return a.at[i] > b.at[i]; });
}
// False where either is NaN.
M at_least(F a, F b) {
    return each<M>([&](int i) { return a.at[i] >= b.at[i]; });
}
M above(F a, F b) {
    return each<M>([&](int i) { return a.at[i] > b.at[i]; });
}
M both(M a, M b) {
    return each<M>([&](int i) { return a.at[i] && b.at[i]; });
}
M either(M a, M b) {
    return each<M>([&](int i) { return a.at[i] || b.at[i]; });
}
bool all(M mask) {
    for (bool lane : mask.at)
        if (!lane) return false;
    return true;
}
bool any(M mask) {
    for (bool lane : mask.at)
        if (lane) return true;
    return false;
}
I select(M mask, I yes, I no) {
    return each<I>([&](int i) { return mask.at[i] ? yes.at[i] : no.at[i]; });
}

// table[index]: of 16 entries (only the low 4 bits of the index count), or of 256 (index 0 to 255).
F lookup16(F table, I index) {
    return each<F>([&](int i) { return table.at[index.at[i] & 15]; });
}
// Four lanes each look their entry up among four, eight among eight; other bits of the index do not count.
F lookup4(F table, I index) {
    return each<F>([&](int i) { return table.at[(i & 12) | (index.at[i] & 3)]; });
}
F lookup8(F table, I index) {
    return each<F>([&](int i) { return table.at[(i & 8) | (index.at[i] & 7)]; });
}
F lookup256(const float* table, I index) {
    return each<F>([&](int i) { return table[index.at[i]]; });
}
I lookup256(const int32_t* table, I index) {
    return each<I>([&](int i) { return table[index.at[i]]; });
}

void add_square(D& sums, F value) {
    for (int i = 0; i < 16; i++) sums.at[i] += double(value.at[i]) * double(value.at[i]);
}
// The order of these sums and those below is part of the result: lane i + lane i + 8, then + 4, + 2, + 1.
double total(const D& sums) {
    double at[16];
    __builtin_memcpy(at, sums.at, sizeof at);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) at[i] += at[i + half];
    return at[0];
}
float sum_of(F value) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) value.at[i] += value.at[i + half];
    return value.at[0];
}
// Of sixteen vectors, one in each lane.
F sums_of(const F (&of)[16]) {
    return each<F>([&](int i) { return sum_of(of[i]); });
}
float least(F value) {
    float out = value.at[0];
    for (float lane : value.at) out = lane < out ? lane : out;
    return out;
}
float greatest(F value) {
    float out = value.at[0];
    for (float lane : value.at) out = lane > out ? lane : out;
    return out;
}

// ---- halves: the first eight lanes and the last eight ----

F halves(float low, float high) {
    return each<F>([&](int i) { return i < 8 ? low : high; });
}
// Eight elements, for both.
I load_u16_twice(const void* from) {
    uint16_t wide[8];
    __builtin_memcpy(wide, from, sizeof wide);
    return each<I>([&](int i) { return int32_t(wide[i & 7]); });
}
// The least lane of each in all its lanes; none is NaN.
F least8(F value) {
    float out[2] = {value.at[0], value.at[8]};
    for (int i = 0; i < 16; i++) out[i / 8] = value.at[i] < out[i / 8] ? value.at[i] : out[i / 8];
    return halves(out[0], out[1]);
}

// 32 codes to 4 * bits bytes and back, bits 1 to 7. Pack writes and unpack reads up to 2 * bits + 16 bytes.
template <int bits>
void pack32(const uint8_t* codes, uint8_t* bytes) {
    for (int group = 0; group < 4; group++) {
        uint64_t stream = 0;
        for (int i = 0; i < 8; i++) stream |= uint64_t(codes[8 * group + i] & ((1 << bits) - 1)) << (bits * i);
        __builtin_memcpy(bytes + bits * group, &stream, bits);
    }
}
template <int bits>
void unpack32(const uint8_t* bytes, uint8_t* codes) {
    for (int group = 0; group < 4; group++) {
        uint64_t stream = 0;
        __builtin_memcpy(&stream, bytes + bits * group, bits);
        for (int i = 0; i < 8; i++) codes[8 * group + i] = uint8_t(stream >> (bits * i) & ((1 << bits) - 1));
    }
}

// 8 x 8 words; strides in bytes.
void transpose8(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
    for (int row = 0; row < 8; row++)
        for (int col = 0; col < 8; col++)
            __builtin_memcpy(to + col * to_stride + 4 * row, from + row * from_stride + 4 * col, 4);
}

// Sixteen bytes of each of sixteen rows, from byte `at` on: a lane has a row, the first has its first four bytes.
struct Sixteen {
    I a, b, c, d;
};
Sixteen load_rows(const uint8_t* const* rows, int64_t at) {
    auto word = [&](int k) {
        return each<I>([&](int i) {
            int32_t found;
            __builtin_memcpy(&found, rows[i] + at + 4 * k, 4);
            return found;
        });
    };
    return {word(0), word(1), word(2), word(3)};
}

// ---- four bytes of a lane at a time ----

I load_words(const void* from) { return load<int32_t>(from); }
void store_words(void* to, I words) { __builtin_memcpy(to, words.at, 64); }
I differ(I a, I b) {
    return each<I>([&](int i) { return a.at[i] ^ b.at[i]; });
}
int32_t byte_of(int32_t word, int at) { return int8_t(uint32_t(word) >> 8 * at); }
int32_t half_of(int32_t word, int at) { return int16_t(uint32_t(word) >> 16 * at); }
int32_t pair_of(int32_t low, int32_t high) { return int32_t(uint32_t(low & 0xffff) | uint32_t(high) << 16); }

// Two sums of two products, 16 bits each, in each lane; no sum leaves them. Bytes of `a` are unsigned and
// below 128, of `b` signed.
I dot_bytes(I a, I b) {
    return each<I>([&](int i) {
        auto product = [&](int k) { return (byte_of(a.at[i], k) & 0xff) * byte_of(b.at[i], k); };
        return pair_of(product(0) + product(1), product(2) + product(3));
    });
}
I dot_signed(I a, I b) {  // both are signed
    return each<I>([&](int i) {
        auto product = [&](int k) { return byte_of(a.at[i], k) * byte_of(b.at[i], k); };
        return pair_of(product(0) + product(1), product(2) + product(3));
    });
}
// Adds the sum of four products; bytes of `codes` are unsigned (signed where not `unsigned_dots`), of `inputs` signed.
I add_dot(I sum, I codes, I inputs) {
    return each<I>([&](int i) {
        auto product = [&](int k) { return (byte_of(codes.at[i], k) & 0xff) * byte_of(inputs.at[i], k); };
        return int32_t(uint32_t(sum.at[i]) + uint32_t(product(0) + product(1) + product(2) + product(3)));
    });
}
bool has_zero_byte(I a) {
    for (int32_t word : a.at)
        for (int k = 0; k < 4; k++)
            if (byte_of(word, k) == 0) return true;
    return false;
}
void keep(I&) {}
I add_pairs(I a, I b) {
    return each<I>([&](int i) {
        return pair_of(half_of(a.at[i], 0) + half_of(b.at[i], 0), half_of(a.at[i], 1) + half_of(b.at[i], 1));
    });
}
I mul_pairs(I a, I b) {
    return each<I>([&](int i) {
        return pair_of(half_of(a.at[i], 0) * half_of(b.at[i], 0), half_of(a.at[i], 1) * half_of(b.at[i], 1));
    });
}
// The sum of the products of both halves of each lane.
I dot_pairs(I a, I b) {
    return each<I>([&](int i) {
        return half_of(a.at[i], 0) * half_of(b.at[i], 0) + half_of(a.at[i], 1) * half_of(b.at[i], 1);
    });
}
I add_dot_pairs(I sum, I a, I b) { return add(sum, dot_pairs(a, b)); }
// Thirty-two signed bytes as the halves of lanes.
I load_pairs(const void* from) {
    auto bytes = static_cast<const int8_t*>(from);
    return each<I>([&](int i) { return pair_of(bytes[2 * i], bytes[2 * i + 1]); });
}
// One half of each lane in both.
I twice(I pairs, int which) {
    return each<I>([&](int i) { return pair_of(half_of(pairs.at[i], which), half_of(pairs.at[i], which)); });
}

// Bytes of a table of 16, as many times as a register needs them, at indices below 16.
I table_of_bytes(const int8_t* from) {
    return each<I>([&](int i) {
        int32_t word;
        __builtin_memcpy(&word, from + 4 * (i % 4), 4);
        return word;
    });
}
I lookup_bytes(I table, I index) {
    int8_t entries[16];
    __builtin_memcpy(entries, table.at, 16);
    return each<I>([&](int i) {
        uint32_t word = 0;
        for (int k = 0; k < 4; k++) word |= uint32_t(uint8_t(entries[byte_of(index.at[i], k) & 15])) << 8 * k;
        return int32_t(word);
    });
}
