// 32 codes to and from 4 * bits bytes, and 8 x 8 words transposed, with AVX2; AVX-512 uses the same, which is already
// bound by memory.
// Neighbours are joined three times: 8 codes of 8 bits -> 4 of 2 * bits in 16 -> 2 in 32 -> 1 stream in 64.

template <int bits>
__m256i join(__m256i codes) {
    codes = _mm256_and_si256(codes, _mm256_set1_epi8((1 << bits) - 1));
    __m256i pairs;
    if constexpr (bits < 7) {
        pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(1 << (8 + bits) | 1));
    } else {  // 2**7 is no signed byte
        __m256i odd = _mm256_and_si256(_mm256_srli_epi16(codes, 8 - bits), _mm256_set1_epi16(127 << bits));
        pairs = _mm256_or_si256(_mm256_and_si256(codes, _mm256_set1_epi16(127)), odd);
    }
    __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi32(1 << (16 + 2 * bits) | 1));
    __m256i odd = _mm256_slli_epi64(_mm256_srli_epi64(fours, 32), 4 * bits);
    return _mm256_or_si256(_mm256_and_si256(fours, _mm256_set1_epi64x(0xffffffff)), odd);
}

template <int bits, int lane>
__m256i split_step(__m256i value) {
    constexpr int used = lane / 8 * bits;  // of every 2 * lane bits the low 2 * used hold two neighbours
    constexpr uint64_t each = lane == 32 ? 1 : lane == 16 ? 0x100000001 : 0x1000100010001;
    constexpr uint64_t low = ((uint64_t(1) << used) - 1) * each;
    __m256i apart = _mm256_slli_epi64(value, lane - used);
    return _mm256_or_si256(_mm256_and_si256(value, _mm256_set1_epi64x(int64_t(low))),
                           _mm256_and_si256(apart, _mm256_set1_epi64x(int64_t(low << lane))));
}

template <int bits>
void pack32(const uint8_t* codes, uint8_t* bytes) {
    alignas(16) int8_t order[16];  // the `bits` low bytes of both halves, side by side
    for (int i = 0; i < 16; i++) order[i] = i < bits ? int8_t(i) : i < 2 * bits ? int8_t(8 + i - bits) : int8_t(-1);
    __m256i shuffle = _mm256_broadcastsi128_si256(_mm_load_si128(narrow(order)));
    __m256i packed = _mm256_shuffle_epi8(join<bits>(_mm256_loadu_si256(wide(codes))), shuffle);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm256_castsi256_si128(packed));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 2 * bits), _mm256_extracti128_si256(packed, 1));
}

template <int bits>
void unpack32(const uint8_t* bytes, uint8_t* codes) {
    alignas(16) int8_t order[16];
    for (int i = 0; i < 16; i++) order[i] = i % 8 < bits ? int8_t(i % 8 + i / 8 * bits) : int8_t(-1);
    __m256i shuffle = _mm256_broadcastsi128_si256(_mm_load_si128(narrow(order)));
    __m256i packed = _mm256_set_m128i(_mm_loadu_si128(narrow(bytes + 2 * bits)), _mm_loadu_si128(narrow(bytes)));
    __m256i fours = split_step<bits, 32>(_mm256_shuffle_epi8(packed, shuffle));
    store_wide(codes, split_step<bits, 8>(split_step<bits, 16>(fours)));
}

void transpose8(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
    for (int half = 0; half < 2; half++, from += 16, to += 4 * to_stride) {  // four columns: rows i and i + 4 as one
        __m256i line[4], pair[4];
        for (int i = 0; i < 4; i++) {
            __m256i low = _mm256_castsi128_si256(_mm_loadu_si128(narrow(from + i * from_stride)));
            line[i] = _mm256_inserti128_si256(low, _mm_loadu_si128(narrow(from + (i + 4) * from_stride)), 1);
        }
        for (int i = 0; i < 4; i += 2) {
            pair[i] = _mm256_unpacklo_epi32(line[i], line[i + 1]);
            pair[i + 1] = _mm256_unpackhi_epi32(line[i], line[i + 1]);
        }
        for (int i = 0; i < 2; i++) {
            store_wide(to + 2 * i * to_stride, _mm256_unpacklo_epi64(pair[i], pair[i + 2]));
            store_wide(to + (2 * i + 1) * to_stride, _mm256_unpackhi_epi64(pair[i], pair[i + 2]));
        }
    }
}
