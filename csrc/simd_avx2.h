// Sixteen lanes as two AVX2 registers, with F16C and FMA. simd_scalar.h says what each function means.
// Include inside an anonymous namespace.

constexpr const char* isa_name = "avx2";
constexpr int tile = 4;  // tokens whose sums stay in registers
constexpr bool whole_dots = false, unsigned_dots = false;

struct F {
    __m256 low, high;
};
struct I {
    __m256i low, high;
};
struct M {
    __m256i low, high;
};
struct D {
    __m256d a = _mm256_setzero_pd(), b = a, c = a, d = a;  // named: an array would stay in memory
};

const __m256i* wide(const void* from) { return static_cast<const __m256i*>(from); }
const __m128i* narrow(const void* from) { return static_cast<const __m128i*>(from); }

F load_f32(const void* from) {
    auto at = static_cast<const uint8_t*>(from);
    return {_mm256_castsi256_ps(_mm256_loadu_si256(wide(at))), _mm256_castsi256_ps(_mm256_loadu_si256(wide(at + 32)))};
}
F load_f16(const void* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(narrow(from))), _mm256_cvtph_ps(_mm_loadu_si128(narrow(from) + 1))};
}
I load_u16(const void* from) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(narrow(from))),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(narrow(from) + 1))};
}
I load_u8(const void* from) {
    __m128i bytes = _mm_loadu_si128(narrow(from));
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
void store_wide(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
void store_f32(void* to, F value) {
    auto at = static_cast<uint8_t*>(to);
    store_wide(at, _mm256_castps_si256(value.low)), store_wide(at + 32, _mm256_castps_si256(value.high));
}
void store_f16(void* to, F value) {
    __m128i low = _mm256_cvtps_ph(value.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m128i high = _mm256_cvtps_ph(value.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    store_wide(to, _mm256_set_m128i(high, low));
}
// Values must fit uint16.
__m256i as_u16(I value) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(value.low, value.high), 0xd8); }
void store_u16(void* to, I value) { store_wide(to, as_u16(value)); }
void store_u8(void* to, I value) {
    __m256i halves = as_u16(value);
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128(static_cast<__m128i*>(to), bytes);
}

F set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
I set(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
F floats(I bits) { return {_mm256_castsi256_ps(bits.low), _mm256_castsi256_ps(bits.high)}; }
I bits(F value) { return {_mm256_castps_si256(value.low), _mm256_castps_si256(value.high)}; }
F to_float(I value) { return {_mm256_cvtepi32_ps(value.low), _mm256_cvtepi32_ps(value.high)}; }
I to_int(F value) { return {_mm256_cvttps_epi32(value.low), _mm256_cvttps_epi32(value.high)}; }

F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
F sqrt(F a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
F rint(F a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, mode), _mm256_round_ps(a.high, mode)};
}

I add(I a, I b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
I sub(I a, I b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
I both(I a, I b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
I either(I a, I b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
I mul(I a, I b) { return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)}; }
I min(I a, I b) { return {_mm256_min_epi32(a.low, b.low), _mm256_min_epi32(a.high, b.high)}; }
I max(I a, I b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
template <int n>
I shift_left(I a) {
    return {_mm256_slli_epi32(a.low, n), _mm256_slli_epi32(a.high, n)};
}
template <int n>
I shift_right(I a) {
    return {_mm256_srli_epi32(a.low, n), _mm256_srli_epi32(a.high, n)};
}
template <int n>
I shift_right_signed(I a) {
    return {_mm256_srai_epi32(a.low, n), _mm256_srai_epi32(a.high, n)};
}
M greater(I a, I b) { return {_mm256_cmpgt_epi32(a.low, b.low), _mm256_cmpgt_epi32(a.high, b.high)}; }
M at_least(F a, F b) {
    return {_mm256_castps_si256(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ)),
            _mm256_castps_si256(_mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ))};
}
M above(F a, F b) {
    return {_mm256_castps_si256(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ)),
            _mm256_castps_si256(_mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ))};
}
M both(M a, M b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
M either(M a, M b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
bool all(M mask) { return _mm256_movemask_epi8(_mm256_and_si256(mask.low, mask.high)) == -1; }
bool any(M mask) { return _mm256_movemask_epi8(_mm256_or_si256(mask.low, mask.high)) != 0; }
// GCC 12 makes a comparison with 0 of the mask where two selections share it, which costs as much as they do.
__m256i blend(__m256i no, __m256i yes, __m256i mask) {
    __m256i found;
    asm("vpblendvb %3, %2, %1, %0" : "=x"(found) : "x"(no), "x"(yes), "x"(mask));
    return found;
}
I select(M mask, I yes, I no) { return {blend(no.low, yes.low, mask.low), blend(no.high, yes.high, mask.high)}; }

__m256 lookup16(F table, __m256i index) {
    __m256 low = _mm256_permutevar8x32_ps(table.low, index), high = _mm256_permutevar8x32_ps(table.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));  // bit 3 to the sign
}
F lookup16(F table, I index) { return {lookup16(table, index.low), lookup16(table, index.high)}; }
F lookup4(F table, I index) {
    return {_mm256_permutevar_ps(table.low, index.low), _mm256_permutevar_ps(table.high, index.high)};
}
F lookup8(F table, I index) {
    return {_mm256_permutevar8x32_ps(table.low, index.low), _mm256_permutevar8x32_ps(table.high, index.high)};
}
F lookup256(const float* table, I index) {
    return {_mm256_i32gather_ps(table, index.low, 4), _mm256_i32gather_ps(table, index.high, 4)};
}
I lookup256(const int32_t* table, I index) {
    return {_mm256_i32gather_epi32(table, index.low, 4), _mm256_i32gather_epi32(table, index.high, 4)};
}

void add_square(__m256d& sum, __m128 value) {
    __m256d wide = _mm256_cvtps_pd(value);
    sum = _mm256_add_pd(sum, _mm256_mul_pd(wide, wide));
}
void add_square(D& sums, F value) {
    add_square(sums.a, _mm256_castps256_ps128(value.low)), add_square(sums.b, _mm256_extractf128_ps(value.low, 1));
    add_square(sums.c, _mm256_castps256_ps128(value.high)), add_square(sums.d, _mm256_extractf128_ps(value.high, 1));
}
double total(const D& sums) {
    __m256d low = _mm256_add_pd(sums.a, sums.c), high = _mm256_add_pd(sums.b, sums.d);
    __m256d four = _mm256_add_pd(low, high);
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
float sum_of(F value) {
    __m256 eight = _mm256_add_ps(value.low, value.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// Each step of `sum_of` for two vectors at once, of eight.
__m256 sums_of_eight(const F* of) {
    __m256 four[4], two[2];
    for (int i = 0; i < 4; i++) {
        __m256 a = _mm256_add_ps(of[2 * i].low, of[2 * i].high), b = _mm256_add_ps(of[2 * i + 1].low, of[2 * i + 1].high);
        four[i] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    for (int i = 0; i < 2; i++)
        two[i] = _mm256_add_ps(_mm256_shuffle_ps(four[2 * i], four[2 * i + 1], 0x44),
                               _mm256_shuffle_ps(four[2 * i], four[2 * i + 1], 0xee));
    __m256 found = _mm256_add_ps(_mm256_shuffle_ps(two[0], two[1], 0x88), _mm256_shuffle_ps(two[0], two[1], 0xdd));
    return _mm256_permutevar8x32_ps(found, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
F sums_of(const F (&of)[16]) { return {sums_of_eight(of), sums_of_eight(of + 8)}; }
float least(F value) {
    __m256 eight = _mm256_min_ps(value.low, value.high);
    __m128 four = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}
float greatest(F value) {
    __m256 eight = _mm256_max_ps(value.low, value.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

F halves(float low, float high) { return {_mm256_set1_ps(low), _mm256_set1_ps(high)}; }
I load_u16_twice(const void* from) {
    __m256i half = _mm256_cvtepu16_epi32(_mm_loadu_si128(narrow(from)));
    return {half, half};
}
__m256 least8(__m256 value) {
    value = _mm256_min_ps(value, _mm256_permute2f128_ps(value, value, 1));
    value = _mm256_min_ps(value, _mm256_permute_ps(value, 0x4e));
    return _mm256_min_ps(value, _mm256_permute_ps(value, 0xb1));
}
F least8(F value) { return {least8(value.low), least8(value.high)}; }

#include "pack_avx2.h"

struct Sixteen {
    I a, b, c, d;
};
__m256i two_rows(const uint8_t* const* rows, int64_t at) {
    __m256i first = _mm256_castsi128_si256(_mm_loadu_si128(narrow(rows[0] + at)));
    return _mm256_inserti128_si256(first, _mm_loadu_si128(narrow(rows[4] + at)), 1);
}
void eight_rows(const uint8_t* const* rows, int64_t at, __m256i (&words)[4]) {
    __m256i first = two_rows(rows, at), second = two_rows(rows + 1, at);
    __m256i third = two_rows(rows + 2, at), fourth = two_rows(rows + 3, at);
    __m256i low = _mm256_unpacklo_epi32(first, second), high = _mm256_unpackhi_epi32(first, second);
    __m256i low_next = _mm256_unpacklo_epi32(third, fourth), high_next = _mm256_unpackhi_epi32(third, fourth);
    words[0] = _mm256_unpacklo_epi64(low, low_next), words[1] = _mm256_unpackhi_epi64(low, low_next);
    words[2] = _mm256_unpacklo_epi64(high, high_next), words[3] = _mm256_unpackhi_epi64(high, high_next);
}
Sixteen load_rows(const uint8_t* const* rows, int64_t at) {
    __m256i low[4], high[4];
    eight_rows(rows, at, low), eight_rows(rows + 8, at, high);
    return {{low[0], high[0]}, {low[1], high[1]}, {low[2], high[2]}, {low[3], high[3]}};
}

// ---- four bytes of a lane at a time ----

I load_words(const void* from) {
    return {_mm256_loadu_si256(wide(from)), _mm256_loadu_si256(wide(from) + 1)};
}
void store_words(void* to, I words) { store_wide(to, words.low), store_wide(static_cast<uint8_t*>(to) + 32, words.high); }
I differ(I a, I b) { return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)}; }
I dot_bytes(I a, I b) { return {_mm256_maddubs_epi16(a.low, b.low), _mm256_maddubs_epi16(a.high, b.high)}; }
I dot_signed(I a, I b) {
    return dot_bytes({_mm256_abs_epi8(a.low), _mm256_abs_epi8(a.high)},
                     {_mm256_sign_epi8(b.low, a.low), _mm256_sign_epi8(b.high, a.high)});
}
bool has_zero_byte(I a) {
    __m256i least = _mm256_min_epu8(a.low, a.high);
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(least, _mm256_setzero_si256())) != 0;
}
void keep(I& a) { asm volatile("" : "+x"(a.low), "+x"(a.high)); }
I add_pairs(I a, I b) { return {_mm256_add_epi16(a.low, b.low), _mm256_add_epi16(a.high, b.high)}; }
I mul_pairs(I a, I b) { return {_mm256_mullo_epi16(a.low, b.low), _mm256_mullo_epi16(a.high, b.high)}; }
I dot_pairs(I a, I b) { return {_mm256_madd_epi16(a.low, b.low), _mm256_madd_epi16(a.high, b.high)}; }
I add_dot_pairs(I sum, I a, I b) { return add(sum, dot_pairs(a, b)); }
I add_dot(I sum, I codes, I inputs) {  // codes to 128 only
    return add(sum, dot_pairs(dot_bytes(codes, inputs), set(0x00010001)));
}
I load_pairs(const void* from) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(narrow(from))), _mm256_cvtepi8_epi16(_mm_loadu_si128(narrow(from) + 1))};
}
I twice(I pairs, int which) {
    __m256i order = _mm256_set1_epi64x(which ? 0x0706070603020302 : 0x0504050401000100);
    order = _mm256_add_epi8(order, _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0));
    return {_mm256_shuffle_epi8(pairs.low, order), _mm256_shuffle_epi8(pairs.high, order)};
}
I table_of_bytes(const int8_t* from) {
    __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128(narrow(from)));
    return {all, all};
}
I lookup_bytes(I table, I index) {
    return {_mm256_shuffle_epi8(table.low, index.low), _mm256_shuffle_epi8(table.high, index.high)};
}
