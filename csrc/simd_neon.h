// Sixteen lanes as four NEON registers, with what every AArch64 processor has (fused multiply-add and float16 too), and
// sums of four products of bytes where the compiler may use these. simd_scalar.h says what each function means. Include
// inside an anonymous namespace.

constexpr const char* isa_name = "neon";
constexpr int tile = 4;
#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool whole_dots = true;
#else
constexpr bool whole_dots = false;
#endif
constexpr bool unsigned_dots = false;

struct F {
    float32x4_t a, b, c, d;
};
struct I {
    int32x4_t a, b, c, d;
};
struct M {
    uint32x4_t a, b, c, d;
};
struct D {
    struct Half {
        float64x2_t a = vdupq_n_f64(0), b = a, c = a, d = a;
    } low, high;
};

// `op` is a parameter of the template: what is inlined always cannot be called by its address.
template <class R, auto op, class... V>
R each(V... of) {
    return {op(of.a...), op(of.b...), op(of.c...), op(of.d...)};
}
template <class R, class V>
R repeat(V value) {
    return {value, value, value, value};
}

// Bytes, since words may lie anywhere.
int32x4_t load_16(const void* from) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(from))); }
void store_16(void* to, uint8x16_t value) { vst1q_u8(static_cast<uint8_t*>(to), value); }
const uint8_t* after(const void* from, int bytes) { return static_cast<const uint8_t*>(from) + bytes; }
uint8_t* after(void* to, int bytes) { return static_cast<uint8_t*>(to) + bytes; }

F floats(I bits) { return each<F, vreinterpretq_f32_s32>(bits); }
I bits(F value) { return each<I, vreinterpretq_s32_f32>(value); }
I load_words(const void* from) {
    return {load_16(from), load_16(after(from, 16)), load_16(after(from, 32)), load_16(after(from, 48))};
}
void store_words(void* to, I words) {
    store_16(to, vreinterpretq_u8_s32(words.a)), store_16(after(to, 16), vreinterpretq_u8_s32(words.b));
    store_16(after(to, 32), vreinterpretq_u8_s32(words.c)), store_16(after(to, 48), vreinterpretq_u8_s32(words.d));
}
F load_f32(const void* from) { return floats(load_words(from)); }
void store_f32(void* to, F value) { store_words(to, bits(value)); }
F load_f16(const void* from) {
    float16x8_t low = vreinterpretq_f16_s32(load_16(from)), high = vreinterpretq_f16_s32(load_16(after(from, 16)));
    return {vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
            vcvt_high_f32_f16(high)};
}
void store_f16(void* to, F value) {
    store_16(to, vreinterpretq_u8_f16(vcvt_high_f16_f32(vcvt_f16_f32(value.a), value.b)));
    store_16(after(to, 16), vreinterpretq_u8_f16(vcvt_high_f16_f32(vcvt_f16_f32(value.c), value.d)));
}
I as_words(uint16x8_t low, uint16x8_t high) {
    return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_high_u16(low)),
            vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_high_u16(high))};
}
I load_u16(const void* from) {
    return as_words(vreinterpretq_u16_s32(load_16(from)), vreinterpretq_u16_s32(load_16(after(from, 16))));
}
I load_u8(const void* from) {
    uint8x16_t bytes = vreinterpretq_u8_s32(load_16(from));
    return as_words(vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
}
uint16x8_t low_halves(int32x4_t a, int32x4_t b) {
    return vuzp1q_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b));
}
void store_u16(void* to, I value) {
    store_16(to, vreinterpretq_u8_u16(low_halves(value.a, value.b)));
    store_16(after(to, 16), vreinterpretq_u8_u16(low_halves(value.c, value.d)));
}
void store_u8(void* to, I value) {
    store_16(to, vuzp1q_u8(vreinterpretq_u8_u16(low_halves(value.a, value.b)),
                           vreinterpretq_u8_u16(low_halves(value.c, value.d))));
}

F set(float value) { return repeat<F>(vdupq_n_f32(value)); }
I set(int32_t value) { return repeat<I>(vdupq_n_s32(value)); }
F to_float(I value) { return each<F, vcvtq_f32_s32>(value); }
// The conversion itself gives 0 for NaN, and INT_MAX from 2**31 on.
int32x4_t to_int(float32x4_t value) {
    uint32x4_t fits = vcltq_f32(value, vdupq_n_f32(0x1p31f));
    return vbslq_s32(fits, vcvtq_s32_f32(value), vdupq_n_s32(INT32_MIN));
}
I to_int(F value) { return {to_int(value.a), to_int(value.b), to_int(value.c), to_int(value.d)}; }

F add(F a, F b) { return each<F, vaddq_f32>(a, b); }
F sub(F a, F b) { return each<F, vsubq_f32>(a, b); }
F mul(F a, F b) { return each<F, vmulq_f32>(a, b); }
F div(F a, F b) { return each<F, vdivq_f32>(a, b); }
F fma(F a, F b, F c) { return each<F, vfmaq_f32>(c, a, b); }
F sqrt(F a) { return each<F, vsqrtq_f32>(a); }
F rint(F a) { return each<F, vrndnq_f32>(a); }
// NEON's own minimum and maximum are NaN where either is.
float32x4_t min_of(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
float32x4_t max_of(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
F min(F a, F b) { return each<F, min_of>(a, b); }
F max(F a, F b) { return each<F, max_of>(a, b); }

I add(I a, I b) { return each<I, vaddq_s32>(a, b); }
I sub(I a, I b) { return each<I, vsubq_s32>(a, b); }
I both(I a, I b) { return each<I, vandq_s32>(a, b); }
I either(I a, I b) { return each<I, vorrq_s32>(a, b); }
I differ(I a, I b) { return each<I, veorq_s32>(a, b); }
I mul(I a, I b) { return each<I, vmulq_s32>(a, b); }
I min(I a, I b) { return each<I, vminq_s32>(a, b); }
I max(I a, I b) { return each<I, vmaxq_s32>(a, b); }
template <int n>
I shift_left(I a) {
    return {vshlq_n_s32(a.a, n), vshlq_n_s32(a.b, n), vshlq_n_s32(a.c, n), vshlq_n_s32(a.d, n)};
}
template <int n>
int32x4_t shift_right(int32x4_t a) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), n));
}
template <int n>
I shift_right(I a) {
    if constexpr (n == 0) return a;  // no instruction shifts right by 0
    else return {shift_right<n>(a.a), shift_right<n>(a.b), shift_right<n>(a.c), shift_right<n>(a.d)};
}
template <int n>
I shift_right_signed(I a) {
    return {vshrq_n_s32(a.a, n), vshrq_n_s32(a.b, n), vshrq_n_s32(a.c, n), vshrq_n_s32(a.d, n)};
}
M greater(I a, I b) { return each<M, vcgtq_s32>(a, b); }
M at_least(F a, F b) { return each<M, vcgeq_f32>(a, b); }
M above(F a, F b) { return each<M, vcgtq_f32>(a, b); }
M both(M a, M b) { return each<M, vandq_u32>(a, b); }
M either(M a, M b) { return each<M, vorrq_u32>(a, b); }
bool all(M mask) { return vminvq_u32(vandq_u32(vandq_u32(mask.a, mask.b), vandq_u32(mask.c, mask.d))) != 0; }
bool any(M mask) { return vmaxvq_u32(vorrq_u32(vorrq_u32(mask.a, mask.b), vorrq_u32(mask.c, mask.d))) != 0; }
I select(M mask, I yes, I no) { return each<I, vbslq_s32>(mask, yes, no); }

// Four bytes of a table of 64: from 4 * index on.
F lookup16(F table, I index) {
    uint8x16x4_t entries{{vreinterpretq_u8_f32(table.a), vreinterpretq_u8_f32(table.b), vreinterpretq_u8_f32(table.c),
                          vreinterpretq_u8_f32(table.d)}};
    I first = shift_left<2>(both(index, set(15)));
    I at = add(mul(first, set(0x01010101)), set(0x03020100));
    auto found = [&](int32x4_t of) { return vreinterpretq_f32_u8(vqtbl4q_u8(entries, vreinterpretq_u8_s32(of))); };
    return {found(at.a), found(at.b), found(at.c), found(at.d)};
}
float32x4_t entries_of(float32x4_t table, int32x4_t index) {
    uint32x4_t first = vshlq_n_u32(vandq_u32(vreinterpretq_u32_s32(index), vdupq_n_u32(3)), 2);
    uint32x4_t at = vaddq_u32(vmulq_u32(first, vdupq_n_u32(0x01010101)), vdupq_n_u32(0x03020100));
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(table), vreinterpretq_u8_u32(at)));
}
F lookup4(F table, I index) {
    return {entries_of(table.a, index.a), entries_of(table.b, index.b), entries_of(table.c, index.c),
            entries_of(table.d, index.d)};
}
F lookup8(F table, I index) {
    uint8x16x2_t low{{vreinterpretq_u8_f32(table.a), vreinterpretq_u8_f32(table.b)}};
    uint8x16x2_t high{{vreinterpretq_u8_f32(table.c), vreinterpretq_u8_f32(table.d)}};
    I at = add(mul(shift_left<2>(both(index, set(7))), set(0x01010101)), set(0x03020100));
    auto found = [](uint8x16x2_t from, int32x4_t of) {
        return vreinterpretq_f32_u8(vqtbl2q_u8(from, vreinterpretq_u8_s32(of)));
    };
    return {found(low, at.a), found(low, at.b), found(high, at.c), found(high, at.d)};
}
I lookup256(const int32_t* table, I index) {
    int32_t at[16];
    store_words(at, index);
    for (int32_t& lane : at) lane = table[lane];
    return load_words(at);
}
F lookup256(const float* table, I index) {
    int32_t at[16];
    float found[16];
    store_words(at, index);
    for (int i = 0; i < 16; i++) found[i] = table[at[i]];
    return load_f32(found);
}

// The square of a float32 is exact in float64, so the fused form rounds like the plain one.
float64x2_t add_square(float64x2_t sum, float64x2_t value) { return vfmaq_f64(sum, value, value); }
void add_square(D::Half& sums, float32x4_t low, float32x4_t high) {
    sums.a = add_square(sums.a, vcvt_f64_f32(vget_low_f32(low))), sums.b = add_square(sums.b, vcvt_high_f64_f32(low));
    sums.c = add_square(sums.c, vcvt_f64_f32(vget_low_f32(high))), sums.d = add_square(sums.d, vcvt_high_f64_f32(high));
}
void add_square(D& sums, F value) { add_square(sums.low, value.a, value.b), add_square(sums.high, value.c, value.d); }
double total(const D& sums) {
    auto eight = each<D::Half, vaddq_f64>(sums.low, sums.high);
    float64x2_t two = vaddq_f64(vaddq_f64(eight.a, eight.c), vaddq_f64(eight.b, eight.d));
    return vgetq_lane_f64(two, 0) + vgetq_lane_f64(two, 1);
}
float sum_of(F value) {
    float32x4_t four = vaddq_f32(vaddq_f32(value.a, value.c), vaddq_f32(value.b, value.d));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
// Each step of `sum_of` for two vectors at once, of four.
float32x4_t sums_of_four(const F* of) {
    auto four = [&](int i) { return vaddq_f32(vaddq_f32(of[i].a, of[i].c), vaddq_f32(of[i].b, of[i].d)); };
    auto two = [&](int i) {
        float32x4_t first = four(i), second = four(i + 1);
        return vaddq_f32(vcombine_f32(vget_low_f32(first), vget_low_f32(second)),
                         vcombine_f32(vget_high_f32(first), vget_high_f32(second)));
    };
    return vpaddq_f32(two(0), two(2));
}
F sums_of(const F (&of)[16]) { return {sums_of_four(of), sums_of_four(of + 4), sums_of_four(of + 8), sums_of_four(of + 12)}; }
float least(F value) { return vminnmvq_f32(min_of(min_of(value.a, value.c), min_of(value.b, value.d))); }
float greatest(F value) { return vmaxnmvq_f32(max_of(max_of(value.a, value.c), max_of(value.b, value.d))); }

F halves(float low, float high) { return {vdupq_n_f32(low), vdupq_n_f32(low), vdupq_n_f32(high), vdupq_n_f32(high)}; }
I load_u16_twice(const void* from) {
    uint16x8_t wide = vreinterpretq_u16_s32(load_16(from));
    return as_words(wide, wide);
}
F least8(F value) { return halves(vminnmvq_f32(min_of(value.a, value.b)), vminnmvq_f32(min_of(value.c, value.d))); }

// ---- 32 codes to and from 4 * bits bytes, and 8 x 8 words transposed ----

// Neighbours are joined three times, 8 codes to 4 of 2 * bits, then 2, then 1 stream: what a shift inserts leaves the
// bits below. The low bytes of both streams are moved side by side.
template <int bits>
void pack16(const uint8_t* codes, uint8_t* bytes) {
    alignas(16) uint8_t order[16];
    for (int i = 0; i < 16; i++) order[i] = uint8_t(i < bits ? i : i < 2 * bits ? 8 + i - bits : 255);
    uint16x8_t one = vreinterpretq_u16_u8(vandq_u8(vld1q_u8(codes), vdupq_n_u8((1 << bits) - 1)));
    uint32x4_t two = vreinterpretq_u32_u16(vsliq_n_u16(one, vshrq_n_u16(one, 8), bits));
    uint64x2_t four = vreinterpretq_u64_u32(vsliq_n_u32(two, vshrq_n_u32(two, 16), 2 * bits));
    uint64x2_t eight = vsliq_n_u64(four, vshrq_n_u64(four, 32), 4 * bits);
    vst1q_u8(bytes, vqtbl1q_u8(vreinterpretq_u8_u64(eight), vld1q_u8(order)));
}
template <int bits>
void pack32(const uint8_t* codes, uint8_t* bytes) {
    pack16<bits>(codes, bytes), pack16<bits>(codes + 16, bytes + 2 * bits);
}
template <int bits>
void unpack16(const uint8_t* bytes, uint8_t* codes) {
    alignas(16) uint8_t order[16];
    for (int i = 0; i < 16; i++) order[i] = uint8_t(i % 8 < bits ? i % 8 + i / 8 * bits : 255);
    uint64x2_t eight = vreinterpretq_u64_u8(vqtbl1q_u8(vld1q_u8(bytes), vld1q_u8(order)));
    uint32x4_t four = vreinterpretq_u32_u64(vsliq_n_u64(eight, vshrq_n_u64(eight, 4 * bits), 32));
    uint16x8_t two = vreinterpretq_u16_u32(vsliq_n_u32(four, vshrq_n_u32(four, 2 * bits), 16));
    uint8x16_t one = vreinterpretq_u8_u16(vsliq_n_u16(two, vshrq_n_u16(two, bits), 8));
    vst1q_u8(codes, vandq_u8(one, vdupq_n_u8((1 << bits) - 1)));
}
template <int bits>
void unpack32(const uint8_t* bytes, uint8_t* codes) {
    unpack16<bits>(bytes, codes), unpack16<bits>(bytes + 2 * bits, codes + 16);
}

// Words of four rows, each from all of them.
I four_rows(int32x4_t first, int32x4_t second, int32x4_t third, int32x4_t fourth) {
    auto wide = [](int32x4_t words) { return vreinterpretq_s64_s32(words); };
    int64x2_t even = wide(vtrn1q_s32(first, second)), odd = wide(vtrn2q_s32(first, second));
    int64x2_t low_even = wide(vtrn1q_s32(third, fourth)), low_odd = wide(vtrn2q_s32(third, fourth));
    auto words = [](int64x2_t pairs) { return vreinterpretq_s32_s64(pairs); };
    return {words(vtrn1q_s64(even, low_even)), words(vtrn1q_s64(odd, low_odd)), words(vtrn2q_s64(even, low_even)),
            words(vtrn2q_s64(odd, low_odd))};
}
void transpose4(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
    auto line = [&](int row) { return load_16(from + row * from_stride); };
    auto put = [&](int col, int32x4_t words) { store_16(to + col * to_stride, vreinterpretq_u8_s32(words)); };
    I words = four_rows(line(0), line(1), line(2), line(3));
    put(0, words.a), put(1, words.b), put(2, words.c), put(3, words.d);
}
void transpose8(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
    for (int row = 0; row < 8; row += 4)
        for (int col = 0; col < 8; col += 4)
            transpose4(from + row * from_stride + 4 * col, from_stride, to + col * to_stride + 4 * row, to_stride);
}

struct Sixteen {
    I a, b, c, d;
};
Sixteen load_rows(const uint8_t* const* rows, int64_t at) {
    auto row = [&](int i) { return load_16(rows[i] + at); };
    auto four = [&](int i) { return four_rows(row(i), row(i + 1), row(i + 2), row(i + 3)); };
    I p = four(0), q = four(4), r = four(8), s = four(12);
    return {{p.a, q.a, r.a, s.a}, {p.b, q.b, r.b, s.b}, {p.c, q.c, r.c, s.c}, {p.d, q.d, r.d, s.d}};
}

// ---- four bytes of a lane at a time ----

int32x4_t dot_bytes_of(int32x4_t a, int32x4_t b) {
    int8x16_t x = vreinterpretq_s8_s32(a), y = vreinterpretq_s8_s32(b);
    int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(y)), high = vmull_high_s8(x, y);
    return vreinterpretq_s32_s16(vpaddq_s16(low, high));
}
I dot_signed(I a, I b) { return each<I, dot_bytes_of>(a, b); }
I dot_bytes(I a, I b) { return dot_signed(a, b); }  // those of `a` are below 128
bool has_zero_byte(I of) {
    auto bytes = [](int32x4_t part) { return vreinterpretq_u8_s32(part); };
    uint8x16_t least = vminq_u8(vminq_u8(bytes(of.a), bytes(of.b)), vminq_u8(bytes(of.c), bytes(of.d)));
    return vminvq_u8(least) == 0;
}
void keep(I& of) { asm volatile("" : "+w"(of.a), "+w"(of.b), "+w"(of.c), "+w"(of.d)); }
int32x4_t add_halves(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s16(vaddq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
}
I add_pairs(I a, I b) { return each<I, add_halves>(a, b); }
int32x4_t mul_halves(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s16(vmulq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
}
I mul_pairs(I a, I b) { return each<I, mul_halves>(a, b); }
int32x4_t dot_halves(int32x4_t a, int32x4_t b) {
    int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    return vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}
I dot_pairs(I a, I b) { return each<I, dot_halves>(a, b); }
I add_dot_pairs(I sum, I a, I b) { return add(sum, dot_pairs(a, b)); }
#if defined(__ARM_FEATURE_DOTPROD)
int32x4_t add_dot_of(int32x4_t sum, int32x4_t codes, int32x4_t inputs) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(inputs));
}
I add_dot(I sum, I codes, I inputs) { return each<I, add_dot_of>(sum, codes, inputs); }
#else
I add_dot(I sum, I codes, I inputs) { return add(sum, dot_pairs(dot_bytes(codes, inputs), set(0x00010001))); }
#endif
I load_pairs(const void* from) {
    int8x16_t low = vreinterpretq_s8_s32(load_16(from)), high = vreinterpretq_s8_s32(load_16(after(from, 16)));
    return {vreinterpretq_s32_s16(vmovl_s8(vget_low_s8(low))), vreinterpretq_s32_s16(vmovl_high_s8(low)),
            vreinterpretq_s32_s16(vmovl_s8(vget_low_s8(high))), vreinterpretq_s32_s16(vmovl_high_s8(high))};
}
int32x4_t twice_low(int32x4_t pairs) {
    return vreinterpretq_s32_s16(vtrn1q_s16(vreinterpretq_s16_s32(pairs), vreinterpretq_s16_s32(pairs)));
}
int32x4_t twice_high(int32x4_t pairs) {
    return vreinterpretq_s32_s16(vtrn2q_s16(vreinterpretq_s16_s32(pairs), vreinterpretq_s16_s32(pairs)));
}
I twice(I pairs, int which) { return which ? each<I, twice_high>(pairs) : each<I, twice_low>(pairs); }
I table_of_bytes(const int8_t* from) { return repeat<I>(load_16(from)); }
int32x4_t bytes_at(int32x4_t table, int32x4_t index) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(vreinterpretq_s8_s32(table), vreinterpretq_u8_s32(index)));
}
I lookup_bytes(I table, I index) { return each<I, bytes_at>(table, index); }
