// Sixteen lanes as one AVX-512 register (F, BW, VL, DQ; VNNI where the compiler may use it). simd_scalar.h says what
// each function means.
// Include inside an anonymous namespace.

constexpr const char* isa_name = "avx512";
constexpr int tile = 12;
#if defined(__AVX512VNNI__)
constexpr bool whole_dots = true;
#else
constexpr bool whole_dots = false;
#endif
constexpr bool unsigned_dots = whole_dots;

struct F {
    __m512 all;
};
struct I {
    __m512i all;
};
using M = __mmask16;
struct D {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
};

const __m256i* wide(const void* from) { return static_cast<const __m256i*>(from); }
const __m128i* narrow(const void* from) { return static_cast<const __m128i*>(from); }
void store_wide(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

F load_f32(const void* from) { return {_mm512_loadu_ps(from)}; }
F load_f16(const void* from) { return {_mm512_cvtph_ps(_mm256_loadu_si256(wide(from)))}; }
I load_u16(const void* from) { return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(wide(from)))}; }
I load_u8(const void* from) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128(narrow(from)))}; }
void store_f32(void* to, F value) { _mm512_storeu_ps(to, value.all); }
void store_f16(void* to, F value) {
    store_wide(to, _mm512_cvtps_ph(value.all, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
void store_u16(void* to, I value) { store_wide(to, _mm512_cvtepi32_epi16(value.all)); }
void store_u8(void* to, I value) { _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(value.all)); }

F set(float value) { return {_mm512_set1_ps(value)}; }
I set(int32_t value) { return {_mm512_set1_epi32(value)}; }
F floats(I bits) { return {_mm512_castsi512_ps(bits.all)}; }
I bits(F value) { return {_mm512_castps_si512(value.all)}; }
F to_float(I value) { return {_mm512_cvtepi32_ps(value.all)}; }
I to_int(F value) { return {_mm512_cvttps_epi32(value.all)}; }

F add(F a, F b) { return {_mm512_add_ps(a.all, b.all)}; }
F sub(F a, F b) { return {_mm512_sub_ps(a.all, b.all)}; }
F mul(F a, F b) { return {_mm512_mul_ps(a.all, b.all)}; }
F div(F a, F b) { return {_mm512_div_ps(a.all, b.all)}; }
F min(F a, F b) { return {_mm512_min_ps(a.all, b.all)}; }
F max(F a, F b) { return {_mm512_max_ps(a.all, b.all)}; }
F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.all, b.all, c.all)}; }
F sqrt(F a) { return {_mm512_sqrt_ps(a.all)}; }
F rint(F a) { return {_mm512_roundscale_ps(a.all, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

I add(I a, I b) { return {_mm512_add_epi32(a.all, b.all)}; }
I sub(I a, I b) { return {_mm512_sub_epi32(a.all, b.all)}; }
I both(I a, I b) { return {_mm512_and_si512(a.all, b.all)}; }
I either(I a, I b) { return {_mm512_or_si512(a.all, b.all)}; }
I mul(I a, I b) { return {_mm512_mullo_epi32(a.all, b.all)}; }
I min(I a, I b) { return {_mm512_min_epi32(a.all, b.all)}; }
I max(I a, I b) { return {_mm512_max_epi32(a.all, b.all)}; }
template <int n>
I shift_left(I a) {
    return {_mm512_slli_epi32(a.all, n)};
}
template <int n>
I shift_right(I a) {
    return {_mm512_srli_epi32(a.all, n)};
}
template <int n>
I shift_right_signed(I a) {
    return {_mm512_srai_epi32(a.all, n)};
}
M greater(I a, I b) { return _mm512_cmpgt_epi32_mask(a.all, b.all); }
M at_least(F a, F b) { return _mm512_cmp_ps_mask(a.all, b.all, _CMP_GE_OQ); }
M above(F a, F b) { return _mm512_cmp_ps_mask(a.all, b.all, _CMP_GT_OQ); }
M both(M a, M b) { return a & b; }
M either(M a, M b) { return a | b; }
bool all(M mask) { return mask == 0xffff; }
bool any(M mask) { return mask != 0; }
I select(M mask, I yes, I no) { return {_mm512_mask_blend_epi32(mask, no.all, yes.all)}; }

F lookup16(F table, I index) { return {_mm512_permutexvar_ps(index.all, table.all)}; }
F lookup4(F table, I index) { return {_mm512_permutevar_ps(table.all, index.all)}; }
F lookup8(F table, I index) {
    __m512i half = _mm512_set_epi32(8, 8, 8, 8, 8, 8, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0);
    return {_mm512_permutexvar_ps(_mm512_ternarylogic_epi32(index.all, _mm512_set1_epi32(7), half, 0xea), table.all)};
}
// Eight lookups of 32 entries and a tree of choices take a third of the time of a gather.
__m512 lookup256(const void* table, __m512i index) {
    auto entry = [&](int i) { return _mm512_loadu_ps(static_cast<const float*>(table) + i); };
    auto of_32 = [&](int i) { return _mm512_permutex2var_ps(entry(i), index, entry(i + 16)); };
    __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    __mmask16 bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
    __mmask16 bit7 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(128));
    auto of_64 = [&](int i) { return _mm512_mask_blend_ps(bit5, of_32(i), of_32(i + 32)); };
    auto of_128 = [&](int i) { return _mm512_mask_blend_ps(bit6, of_64(i), of_64(i + 64)); };
    return _mm512_mask_blend_ps(bit7, of_128(0), of_128(128));
}
F lookup256(const float* table, I index) { return {lookup256(table, index.all)}; }
I lookup256(const int32_t* table, I index) { return {_mm512_castps_si512(lookup256(table, index.all))}; }

void add_square(D& sums, F value) {
    __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(value.all));
    __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(value.all, 1));
    // the square of a float32 is exact in float64, so the fused form rounds like the plain one
    sums.low = _mm512_fmadd_pd(low, low, sums.low), sums.high = _mm512_fmadd_pd(high, high, sums.high);
}
double total(const D& sums) {
    __m512d eight = _mm512_add_pd(sums.low, sums.high);
    __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
float sum_of(F value) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(value.all), _mm512_extractf32x8_ps(value.all, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// Each step of `sum_of` for two vectors at once.
F sums_of(const F (&of)[16]) {
    __m512 eight[8], four[4], two[2];
    for (int i = 0; i < 8; i++)
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(of[2 * i].all, of[2 * i + 1].all, 0x44),
                                 _mm512_shuffle_f32x4(of[2 * i].all, of[2 * i + 1].all, 0xee));
    for (int i = 0; i < 4; i++)
        four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(eight[2 * i], eight[2 * i + 1], 0x88),
                                _mm512_shuffle_f32x4(eight[2 * i], eight[2 * i + 1], 0xdd));
    for (int i = 0; i < 2; i++)
        two[i] = _mm512_add_ps(_mm512_shuffle_ps(four[2 * i], four[2 * i + 1], 0x44),
                               _mm512_shuffle_ps(four[2 * i], four[2 * i + 1], 0xee));
    __m512 found = _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
    return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), found)};
}
float least(F value) { return _mm512_reduce_min_ps(value.all); }
float greatest(F value) { return _mm512_reduce_max_ps(value.all); }

F halves(float low, float high) {
    return {_mm512_insertf32x8(_mm512_set1_ps(low), _mm256_set1_ps(high), 1)};
}
I load_u16_twice(const void* from) {
    return {_mm512_broadcast_i64x4(_mm256_cvtepu16_epi32(_mm_loadu_si128(narrow(from))))};
}
F least8(F value) {
    __m512 found = _mm512_min_ps(value.all, _mm512_shuffle_f32x4(value.all, value.all, 0xb1));
    found = _mm512_min_ps(found, _mm512_permute_ps(found, 0x4e));
    return {_mm512_min_ps(found, _mm512_permute_ps(found, 0xb1))};
}

#include "pack_avx2.h"

struct Sixteen {
    I a, b, c, d;
};
__m512i four_rows(const uint8_t* const* rows, int64_t at) {
    auto row = [&](int i) { return _mm_loadu_si128(narrow(rows[i] + at)); };
    __m512i found = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(4), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(found, row(8), 2), row(12), 3);
}
Sixteen load_rows(const uint8_t* const* rows, int64_t at) {
    __m512i first = four_rows(rows, at), second = four_rows(rows + 1, at);
    __m512i third = four_rows(rows + 2, at), fourth = four_rows(rows + 3, at);
    __m512i low = _mm512_unpacklo_epi32(first, second), high = _mm512_unpackhi_epi32(first, second);
    __m512i low_next = _mm512_unpacklo_epi32(third, fourth), high_next = _mm512_unpackhi_epi32(third, fourth);
    return {{_mm512_unpacklo_epi64(low, low_next)}, {_mm512_unpackhi_epi64(low, low_next)},
            {_mm512_unpacklo_epi64(high, high_next)}, {_mm512_unpackhi_epi64(high, high_next)}};
}

// ---- four bytes of a lane at a time ----

I load_words(const void* from) { return {_mm512_loadu_si512(from)}; }
void store_words(void* to, I words) { _mm512_storeu_si512(to, words.all); }
I differ(I a, I b) { return {_mm512_xor_si512(a.all, b.all)}; }
I dot_bytes(I a, I b) { return {_mm512_maddubs_epi16(a.all, b.all)}; }
I dot_signed(I a, I b) {
    __m512i turned = _mm512_mask_sub_epi8(b.all, _mm512_movepi8_mask(a.all), _mm512_setzero_si512(), b.all);
    return dot_bytes({_mm512_abs_epi8(a.all)}, {turned});
}
bool has_zero_byte(I a) { return _mm512_testn_epi8_mask(a.all, a.all) != 0; }
void keep(I& a) { asm volatile("" : "+v"(a.all)); }
I add_pairs(I a, I b) { return {_mm512_add_epi16(a.all, b.all)}; }
I mul_pairs(I a, I b) { return {_mm512_mullo_epi16(a.all, b.all)}; }
I dot_pairs(I a, I b) { return {_mm512_madd_epi16(a.all, b.all)}; }
#if defined(__AVX512VNNI__)
I add_dot(I sum, I codes, I inputs) { return {_mm512_dpbusd_epi32(sum.all, codes.all, inputs.all)}; }
I add_dot_pairs(I sum, I a, I b) { return {_mm512_dpwssd_epi32(sum.all, a.all, b.all)}; }
I add_dot(I sum, I codes, const Word& inputs) {  // one instruction, of which compilers make two
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.all) : "v"(codes.all), "m"(inputs));
    return sum;
}
#else
I add_dot_pairs(I sum, I a, I b) { return add(sum, dot_pairs(a, b)); }
I add_dot(I sum, I codes, I inputs) {  // codes to 128 only
    return add(sum, dot_pairs(dot_bytes(codes, inputs), set(0x00010001)));
}
#endif
I load_pairs(const void* from) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(wide(from)))}; }
I twice(I pairs, int which) {
    __m512i order = _mm512_set1_epi64(which ? 0x0706070603020302 : 0x0504050401000100);
    order = _mm512_add_epi8(order, _mm512_broadcast_i32x4(_mm_set_epi64x(0x0808080808080808, 0)));
    return {_mm512_shuffle_epi8(pairs.all, order)};
}
I table_of_bytes(const int8_t* from) { return {_mm512_broadcast_i32x4(_mm_loadu_si128(narrow(from)))}; }
I lookup_bytes(I table, I index) { return {_mm512_shuffle_epi8(table.all, index.all)}; }
