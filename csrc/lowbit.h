// The native core: quantize, dequantize, measure and pack, one thread, no Python.
//
// A weight is [rows, cols], row-major and contiguous; a scale (and a zero) is float32
// [ceil(rows / block_rows), ceil(cols / block_cols)], tails are shorter blocks. Codes are one uint8 each.
// Arithmetic is IEEE float32 without contraction, so that every instruction set gives the same bits.
// Pointers to weights, codes and words may have any alignment; sizes may be zero or odd.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed words are little-endian byte streams");

namespace lowbit {

enum class Dtype { f32, f16, bf16 };
enum class Fp8 { e4m3fn, e5m2 };
enum class Rounding { quotient, sum };  // rint(w / s) + zero, or rint(w / s + zero)

// Every block size must be at least 1; it may exceed the axis.
struct Grid {
    int64_t rows, cols, block_rows, block_cols;
};

struct Weight {
    const void* data;
    Dtype dtype;
};

struct Output {
    void* data;
    Dtype dtype;
};

// Codes and what they stand for: (code - zero) * scale, or level[code] * scale where `zero` is null, or with `minus`
// code * scale - zero.
struct Quantized {
    const uint8_t* codes;
    const float* scale;
    const float* zero;
    const float* level;  // 256 entries; may be null where `zero` is not
    bool minus = false;
};

// Which level a quotient is nearest to, as thresholds; made by `nearest_level`.
struct Levels {
    int count;
    float threshold[256];  // rank r + 1 is chosen over r where x >= threshold[r]; NaN beyond the last level
    int32_t code[256];     // code of each rank
};

// llama.cpp's block types under the numbers that GGUF gives them.
enum class GgmlType {
    q4_0 = 2, q4_1 = 3, q5_0 = 6, q5_1 = 7, q8_0 = 8, q2_k = 10, q3_k = 11, q4_k = 12, q5_k = 13, q6_k = 14,
    iq2_xxs = 16, iq2_xs = 17, iq3_xxs = 18, iq1_s = 19, iq4_nl = 20, iq3_s = 21, iq2_s = 22, iq4_xs = 23, iq1_m = 29,
    tq1_0 = 34, tq2_0 = 35, mxfp4 = 39, nvfp4 = 40,
};

// What `sweep` reads and writes; all but `coupling` [cols, cols] are [cols, lanes], a row of weights per lane.
struct Sweep {
    int64_t cols, lanes;   // lanes is a multiple of 16
    const float* weight;   // what the codes should stand for
    const float* coupling; // [j, k]: what a change of the error of column j adds to the target of column k > j
    const float* scale;
    const float* zero;     // may be null; not read where codes are found by levels
    float* target;         // in: what each code should be nearest to, but for changes within; out: unspecified
    float* error;          // in and out: weight minus what its code stands for
    uint8_t* codes;
};

// How `sweep` finds codes: as `quantize_affine` does, or as `quantize_levels` does where `levels` is set.
struct Coder {
    float offset, code_max;
    Rounding rounding;
    const Levels* levels;
    const float* level;  // 256 entries, read where `levels` is set
    bool keep_zeros;     // a weight that is 0 has the target 0
};

// The same for a type with a table of runs of codes, eight columns at once. Of the columns that are not done and those of the
// run, the error is least where these are `solve` times target minus value beyond what they stand for (values are weight
// minus error); around that it grows by `metric`. Both are [cols rounded up to eights, 8]; where there is no column, `metric` is 0.
struct RunSweep {
    Sweep of;
    GgmlType type;
    const float* solve;
    const float* metric;
    const float* level;  // 256 entries
    bool first;          // codes that are there (in and out) do not count, but for the shifts of IQ1_S
};

// Attention scores [rows, cols] where row r sees the columns up to first + r % period.
struct Causal {
    int64_t rows, cols, period, first;
    float scale;  // of the scores, above 0
};

// Weights and bytes of a block, how many blocks with scales of their own are in it (0: it has one scale), whether it
// has minima, and the bytes of its (upper) scale.
struct GgmlShape {
    int weights, bytes, subs;
    bool has_min;
    int scale_bytes;
};
GgmlShape ggml_shape(GgmlType type);  // all 0 where there is no such type

// What is in blocks, each array for all of them; null where the type has none. Scales and minima as they are stored
// (float16, the byte of a power of two, or four of E4M3), signed codes in offset binary.
template <class Byte>
struct GgmlParts {
    Byte *codes, *scale, *min, *scale_codes, *min_codes;
};

// What an encoder finds; as `GgmlParts`, but scales and minima are float32 values exact in their types.
struct GgmlEncoded {
    uint8_t* codes;
    float *scale, *min;
    uint8_t *scale_codes, *min_codes;
};

// Rows of blocks as a file has them; row r of the weight is row `order[r]`, where that is not null.
struct GgmlRows {
    const uint8_t* stored;
    int64_t rows, blocks;  // of a row
    const int64_t* order;
};

// The parts of a `Product` that blocks become, each for all panels; not read where the type has none.
struct GgmlPanels {
    uint8_t *codes, *scale, *zero = nullptr, *fine = nullptr, *fine_zero = nullptr;
};

// Whether all scales and minima are finite; of types whose scales and minima are both nested, whether some of their
// integers take more than four bits.
struct GgmlFound {
    bool finite = true, wide = false;
};

// How a product is computed: inputs as they are, times what codes stand for; inputs rounded to int8, times codes (`codes`)
// or times bytes of a table (`table`); or, of weights that are floats, as they are (`dense`), or both rounded to 16 bits
// (`wide`); or, of small floats of 8 bits, `small_many` tokens or more as `wide` and fewer as `floats` (`small`): of some
// texts that go on together each has what it has alone.
enum class Way { floats, codes, table, dense, wide, small };
constexpr int64_t small_many = 16;

// Way wide: columns of a run that has a scale. Its integers have a norm of at most `wide_norm` before they are rounded
// (which adds 8 at most), so that the sum of their products fits int32 (Cauchy and Schwarz); and the two limits add up to
// what 16 bits hold.
constexpr int64_t wide_run = 256;
constexpr float wide_norm = 46300, most_weight = 12287, most_input = 20479;

// Of a code in panels, the bits that stand together below; the others stand after them.
constexpr int lower_bits(int bits) { return bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits; }

// A weight [rows, cols] as `product` reads it, in panels of 16 rows, and its inputs. Columns are a multiple of 32 (zeros
// fill up), rows beyond the last are there in the last panel and are not written.
//
// Scales are nested where `fine` is set: a step's is its integer times the scale of the run that it is in, and it is
// code * scale - zero where there is a `zero` (integer times zero of the run), else (code - offset) * scale.
struct Product {
    Way way;
    int64_t rows, cols;
    int bits;             // 2, 3, 4, 5, 6 or 8; way table: 4; dense: of an element; wide: 16
    int64_t step;         // columns that share a scale, a multiple of 16; nested: 16 or 32; wide: `wide_run`
    int64_t over;         // columns of a run, a multiple of 2 * step; where nothing is nested: step
    const uint8_t* codes; // [panels, chunks, words, 16, 4]; product.h says which bits are where; wide: [panels, cols / 2, 16, 2]
    Weight scale;         // [panels, cols / over, 16], float16 or float32; dense: null, and the dtype of the weight; wide:
                          // float32, and the last run may be shorter
    const void* zero;     // as the scales: (code - zero) * scale; or null
    bool minus;           // it is code * scale - zero
    float offset;         // way codes: beside `zero`, what a code is above its value, an integer
    const int8_t* fine;   // [panels, cols / step / 2, 16, 2]: integers of the scales; null where nothing is nested
    const int8_t* fine_zero;  // the same of zeros; or null
    bool joined;          // `fine` has both: scales in the lower four bits of a byte, zeros in the upper
    const float* level;   // ways floats and small: 256 entries
    const int8_t* table;  // way table: 16 entries
    float unit;           // rounded inputs: what results are multiplied by
    int64_t tokens;
    const float* input;   // [tokens, cols]; `product` reads it in the ways floats and dense, and in small of few tokens
    int64_t sub;          // columns that are rounded together: `over` where scales are nested, `wide_run` where it is wide, else
                          // 16, 32, 64, ... that divides `step`; small: `step`, or `wide_run`, which divides it or ends with it
    const int8_t* rounded;  // ways codes and table: what `round_inputs` gives, of many tokens in fours (and lifted); `multiply`
                            // (decoder.h) fills these three
    const float* input_scale;  // these two go on for fifteen more, which are read and count for nothing; nested, of many
    const int16_t* step_sum;   // tokens: in fours as well; the sums are of steps there, else of what is rounded together
    const int16_t* words;     // [cols], way wide of one token: what `round_wide` gives
    const uint8_t* fours;     // many tokens as 16 bits: what `put_in_fours` makes of that, or, where `crosses`, of what `widen` gives
    float* out;  // [tokens, rows]
};

// Whether many tokens are multiplied as 16 bits though one is as 8: the sums are the same.
static inline bool crosses(const Product& of) {
    return of.way == Way::table && of.fine && !of.zero && !of.joined && of.offset == 0;
}

// Whether many tokens are multiplied with inputs that are 128 above what they are, as unsigned bytes: by signed ones, which
// codes without their offset are; of zeros, only where codes are so narrow that the integers of steps go into bytes too.
static inline bool lifts(const Product& of) {
    const bool narrow = of.way == Way::codes && of.bits < 8 && of.offset >= -64 && of.offset <= 64;
    return of.fine && (of.zero ? narrow && of.bits == 2 : narrow || crosses(of));
}

// `count` inputs in blocks of `sub`, a multiple of 16, that are rounded together; `step` of these are summed.
struct Rounded {
    int64_t count, sub, step;
};

// How keys and values are kept.
enum class Keep { f32, f16, int8 };

// Keys or values of one head [positions, dim]: floats, or bytes 128 above the value over the scale of their `block`
// values (a multiple of 16 that divides dim).
struct Kept {
    Keep as;
    void* data;
    float* scale;  // [positions, dim / block], of bytes only
    int64_t block;
};

// Attention of queries [queries, dim] of heads that share keys and values, over the positions first to before last; dim is a
// multiple of 16, and `room` has place for `queries_at_once` times `wide_room`. With a cap, scores become cap * tanh(score / cap).
struct Attention {
    int64_t queries, dim, first, last;
    const float* query;
    Kept keys, values;
    float scale, cap, *room, *out;  // cap: 0 for none
};
constexpr int64_t queries_at_once = 4;
static inline int64_t wide_room(const Attention& of) { return (of.last - of.first + 15) / 16 * 16; }

struct ErrorSums {
    double squared_error = 0, squared_weight = 0;
    float max_error = 0;
};

// One row per instruction set. All functions are pure but for the arrays they are given to fill.
struct Kernels {
    const char* isa;

    // Least and greatest value of each block; NaN is skipped, -0 counts as 0. Returns the flat index of the first
    // NaN or Inf, or -1.
    int64_t (*block_range)(const Grid&, Weight, float* least, float* greatest);

    // clamp(rounded(w / s, zero), 0, code_max) with `offset` in place of a null `zero`; ties to even, NaN becomes 0.
    void (*quantize_affine)(const Grid&, Weight, const float* scale, const float* zero, float offset, float code_max,
                            Rounding, uint8_t* codes);
    void (*quantize_levels)(const Grid&, Weight, const float* scale, const Levels&, uint8_t* codes);

    // The byte of w / s in FP8, ties to even, saturated to the greatest finite value; NaN stays NaN.
    void (*quantize_fp8)(const Grid&, Weight, const float* scale, Fp8, uint8_t* codes);
    void (*dequantize)(const Grid&, const Quantized&, Output);

    // Sums over w - dequantized (float32), squared and added in float64 in 16 fixed lanes per row. Where the weight has no
    // data, w is what is dequantized in its type.
    ErrorSums (*error)(const Grid&, Weight, const Quantized&);

    // `count` weights as float32.
    void (*to_floats)(Weight, int64_t count, float* out);

    // Columns one by one: the code nearest to the target, its error, and what the change of that error adds to the
    // targets of the columns that follow (GPTQ's inner loop).
    void (*sweep)(const Sweep&, const Coder&);
    void (*sweep_runs)(const RunSweep&);

    // Of each block the squared errors of its weights, each times the importance of its column where that is not null,
    // under the codes nearest to them, added in 16 lanes of a row.
    void (*block_errors)(const Grid&, const float* weight, const float* scale, const float* zero, const Coder&,
                         const float* importance, float* out);

    // Each row is a dense stream of `bits` per code, least significant bit first, padded with zero bits to 32.
    void (*pack_bits)(const uint8_t* codes, int64_t rows, int64_t cols, int bits, void* words);
    void (*unpack_bits)(const void* words, int64_t rows, int64_t cols, int bits, uint8_t* codes);

    // to[col][row] = from[row][col] for 32-bit words; strides are words from row to row.
    void (*transpose_words)(const void* from, int64_t from_stride, int64_t rows, int64_t cols, void* to,
                            int64_t to_stride);

    // Softmax of scale * scores over the columns that a row sees, 0 beyond; `out` may be `scores`. `room` has place for
    // the columns, rounded up to 16.
    void (*softmax)(const Causal&, Weight scores, Output out, float* room);

    // In place, from the derivative by what softmax gave (`shares`, of the same type) that by the scores.
    void (*softmax_slopes)(const Causal&, Weight shares, Output slopes);

    // llama.cpp's encoder of a type for rows of whole blocks; `importance` of each column, or null. False, with what is
    // found unspecified, where a weight is NaN or Inf.
    bool (*ggml_encode)(GgmlType, int64_t rows, int64_t cols, const float* weight, const float* importance,
                        const GgmlEncoded&);

    // The same types with less error sum importance * (weight - value)**2 (importance 1 where it is null) in each block.
    bool (*ggml_fit)(GgmlType, int64_t rows, int64_t cols, const float* weight, const float* importance,
                     const GgmlEncoded&);

    // Panels from `first` to before `last` of a type that `ggml_panel_bits` knows.
    GgmlFound (*ggml_panels)(GgmlType, const GgmlRows&, const GgmlPanels&, int64_t first, int64_t last);

    // Panels from `first` to before `last`; `crosses`: those that `crosses` of many tokens read `fours`, and not `rounded`;
    // `lifts`: those that `lifts` of many tokens read `rounded` lifted by 128.
    bool crosses, lifts;
    void (*product)(const Product&, int64_t first, int64_t last);

    // Inputs as int8, the scale of each block, and the sums of the integers of each step.
    void (*round_inputs)(const Rounded&, const float* input, int8_t* rounded, float* scale, int16_t* step_sum);

    // These as 16 bits, columns 0, 2, 1, 3 of each four, and of each `run` of columns the sum of the products of the first
    // with the third of four and of the second with the fourth, modulo 2**32: what is of the inputs alone in `product`.
    void (*widen)(int64_t count, int64_t run, const int8_t* rounded, int16_t* words, int32_t* crossed);

    // The inputs of a token as 16 bits in runs of so many: integers in the order that they have, the scale of a run, and the
    // same sum of it.
    void (*round_wide)(int64_t cols, int64_t run, const float* input, int16_t* words, float* scale, int32_t* crossed);

    // Panels of floats [panels, cols, 16] as those of way wide, words and scales; in place too, where they have 16 bits.
    // Whether all are finite.
    bool (*widen_panels)(Weight, int64_t panels, int64_t cols, void* words, float* scale);
    void (*attend)(const Attention&);
    void (*keep)(int64_t position, int64_t dim, const float* from, const Kept& to);  // the values of one position

    // x / (1 + exp(-x)) * up, or GELU (with tanh) of x times up, in place of x.
    void (*gate)(int64_t count, bool gelu, float* x, const float* up);
};

// The table in use: the best that this CPU has, or the one that the environment variable LOWBIT_ISA names (a test
// hook). Throws std::runtime_error where that one does not exist here.
const Kernels& kernels();
std::vector<const Kernels*> supported_kernels();  // scalar first

static inline int64_t words_per_row(int64_t cols, int bits) { return (cols * bits + 31) / 32; }

// Thresholds for sorted levels. An exact midpoint goes to the level with the even code; where both or neither code
// is even, to the one of smaller magnitude; where these are equal too, to the greater.
Levels nearest_level(const float* sorted, const uint8_t* codes, int count);

// Word j of packed row n goes to words[j * stride + n]: the layout of GPTQ's qweight, where rows are output features, and
// the stride is their number, of which `rows` may be some.
void pack_bits_transposed(const Kernels&, const uint8_t* codes, int64_t rows, int64_t cols, int bits, void* words,
                          int64_t stride);
void unpack_bits_transposed(const Kernels&, const void* words, int64_t stride, int64_t rows, int64_t cols, int bits,
                            uint8_t* codes);

// Words [rows, cols] of lines that are `from_stride` words apart as [cols, rows].
void transpose_lines(const Kernels&, const void* from, int64_t from_stride, int64_t rows, int64_t cols, void* to,
                     int64_t to_stride);

// Two codes per byte, the first in the high nibble (bitsandbytes); an odd last byte has a zero low nibble.
void pack_nibbles_high_first(const Kernels&, const uint8_t* codes, int64_t count, uint8_t* bytes);
void unpack_nibbles_high_first(const Kernels&, const uint8_t* bytes, int64_t count, uint8_t* codes);

// Word words[k * stride + j] holds column k of rows 8j to 8j + 7, the lowest four bits those of row 8j, then 2, 4, 6, 1,
// 3, 5, 7 (AWQ). Rows are a multiple of 8.
void pack_awq(const Kernels&, const uint8_t* codes, int64_t rows, int64_t cols, void* words, int64_t stride);
void unpack_awq(const Kernels&, const void* words, int64_t stride, int64_t rows, int64_t cols, uint8_t* codes);

// The same between these and lines [count, 8 * eights] of words as `pack_bits_transposed` makes them of 4 bits, and to
// rows [count, row_words] of words as `pack_bits` does; columns are a multiple of 8.
void lines_to_awq(const Kernels&, const void* lines, int64_t count, int64_t eights, void* words, int64_t stride);
void awq_to_lines(const Kernels&, const void* words, int64_t stride, int64_t count, int64_t eights, void* lines);
void awq_to_rows(const Kernels&, const void* words, int64_t stride, int64_t count, int64_t row_words, void* rows);

// Codes [rows, cols] of 2 to 6 or 8 bits as panels (`Product::codes`) of `full` columns, of which column c is `order[c]`
// of the codes where that is not null.
void interleave(const uint8_t* codes, int64_t rows, int64_t cols, const int64_t* order, int bits, int64_t full,
                int threads, uint8_t* out);

// [rows, cols] of elements of 2 or 4 bytes as [panels, full, 16]: scales, and weights that are floats.
void interleave_floats(const void* values, int64_t rows, int64_t cols, int size, int64_t full, int threads, void* out);

// Panels that `interleave_floats` made as those of way wide; see `Kernels::widen_panels`.
bool widen_panels(Weight panels, int64_t count, int64_t cols, int threads, void* words, float* scale);

// Inputs of four tokens as many are multiplied, so that they are read from one end to the other. For each run: the scales of
// the four, what is of each alone, and four columns of each in turn. `words`, `scale` and `crossed` of a token are put in
// place `which` of the four.
static inline int64_t bytes_of_fours(int64_t cols, int64_t run) { return 8 * cols + 32 * ((cols + run - 1) / run); }
void put_in_fours(int64_t cols, int64_t run, const int16_t* words, const float* scale, const int32_t* crossed, int64_t which,
                  uint8_t* fours);

// Of a token, four of which lie beside each other, four bytes of each in turn: rounded inputs, or sums of steps.
void put_in_fours(int64_t bytes, const void* from, int64_t which, void* fours);

// Rows of blocks as panels: what `interleave` and `interleave_floats` make of what `ggml_unpack` gives. `ggml_panel_bits`
// are those of a code in them, 0 for types that are not brought there at once.
int ggml_panel_bits(GgmlType);
GgmlFound ggml_panels(GgmlType, const GgmlRows&, int threads, const GgmlPanels&);

// Returns the first weight of a run that the type has no word for (IQ types hold runs of codes from a table), or -1.
int64_t ggml_pack(GgmlType, int64_t blocks, const GgmlParts<const uint8_t>&, uint8_t* stored);
// Codes may be null: then what is beside them is unpacked alone, which types with tables of runs do not have.
void ggml_unpack(GgmlType, int64_t blocks, const uint8_t* stored, const GgmlParts<uint8_t>&);

// Their codes as `pack_bits` makes words of them.
void ggml_words(const Kernels&, GgmlType, int64_t blocks, const uint8_t* stored, int bits, void* words);

// `ggml_pack` of these words, and of all that is beside codes, which are null.
void ggml_pack_words(const Kernels&, GgmlType, int64_t blocks, const void* words, int bits, const GgmlParts<const uint8_t>&,
                     uint8_t* stored);

// `Kernels::ggml_encode` or, `fitted`, `Kernels::ggml_fit` of rows in any float type, made float32 some at a time in the
// processor's cache.
bool ggml_encode_rows(const Kernels&, GgmlType, int64_t rows, int64_t cols, Weight, const float* importance, bool fitted,
                      const GgmlEncoded&);

// Whether an open file holds these bytes from its byte `at` on; one that cannot be read does not.
bool file_holds(int file, const uint8_t* bytes, int64_t count, int64_t at);

}  // namespace lowbit
