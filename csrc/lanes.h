// What kernels share: lanes of the instruction set, and elements of files as lanes. Include inside an anonymous namespace.

// A word of memory at any place.
struct [[gnu::packed, gnu::may_alias]] Word {
    int32_t all;
};

#include LOWBIT_SIMD

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- element types ----

struct F32 {
    static constexpr int size = 4;
    static F load(const void* from) { return load_f32(from); }
    static void store(void* to, F value) { store_f32(to, value); }
};
struct F16 {
    static constexpr int size = 2;
    static F load(const void* from) { return load_f16(from); }
    static void store(void* to, F value) { store_f16(to, value); }
};
struct BF16 {
    static constexpr int size = 2;
    static F load(const void* from) { return floats(shift_left<16>(load_u16(from))); }
    static void store(void* to, F value) {
        I raw = bits(value), odd = both(shift_right<16>(raw), set(1));
        I rounded = shift_right<16>(add(raw, add(odd, set(0x7fff))));
        M nan = greater(both(raw, set(0x7fffffff)), set(0x7f800000));
        store_u16(to, select(nan, set(0x7fc0), rounded));
    }
};

template <class Body>
void with_dtype(Dtype dtype, Body body) {
    if (dtype == Dtype::f32) body(F32{});
    if (dtype == Dtype::f16) body(F16{});
    if (dtype == Dtype::bf16) body(BF16{});
}

// How many of 16 lanes count: `Full`, known to the compiler, in the loops that matter, or an int from 1 to 16 at ends.
struct Full {};

// Lanes beyond `count` repeat the first element, so that no kernel meets a value that is not there.
template <class T>
F load_some(const void* from, Full) {
    return T::load(from);
}
template <class T>
F load_some(const void* from, int count) {
    uint8_t full[16 * T::size];
    for (int i = 0; i < 16; i++) __builtin_memcpy(full + i * T::size, from, T::size);
    __builtin_memcpy(full, from, count * T::size);
    return T::load(full);
}
template <class T>
void store_some(void* to, F value, Full) {
    T::store(to, value);
}
template <class T>
void store_some(void* to, F value, int count) {
    uint8_t full[16 * T::size];
    T::store(full, value);
    __builtin_memcpy(to, full, count * T::size);
}
