// The Python module lowbit._native. Shapes are checked by lowbit/native.py; here types are translated, nothing more.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "decoder.h"
#include "ggml_grids.h"
#include "lookup.h"
#include "lowbit.h"

namespace nb = nanobind;
using namespace lowbit;

template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
using AnyIn = Array<nb::ro>;
using AnyOut = nb::ndarray<nb::c_contig, nb::device::cpu>;
using LinesIn = nb::ndarray<nb::ro, nb::device::cpu>;  // whose rows are contiguous, and may be apart
using LinesOut = nb::ndarray<nb::device::cpu>;
using Bytes = Array<const uint8_t>;
using Codes = Array<uint8_t>;
using Floats = Array<const float>;
using FloatsOut = Array<float>;
using MaybeFloats = std::optional<Floats>;
using MaybeBytes = std::optional<Bytes>;
using MaybeCodes = std::optional<Codes>;

static Dtype dtype_of(nb::dlpack::dtype type) {
    if (type == nb::dtype<float>()) return Dtype::f32;
    return type.code == uint8_t(nb::dlpack::dtype_code::Bfloat) ? Dtype::bf16 : Dtype::f16;
}
static Weight weight_of(const AnyIn& array) { return {array.data(), dtype_of(array.dtype())}; }
template <class Matrix>
static Grid grid_of(const Matrix& array, int64_t block_rows, int64_t block_cols) {
    return {int64_t(array.shape(0)), int64_t(array.shape(1)), block_rows, block_cols};
}
template <class Array>
static auto data_or_null(const std::optional<Array>& array) {
    return array ? array->data() : nullptr;
}

// `native.Coder`, whose sorted levels are put into `table`.
static Coder coder_of(float offset, float code_max, bool round_sum, bool keep_zeros, const MaybeFloats& sorted,
                      const MaybeBytes& sorted_codes, const MaybeFloats& level, Levels& table) {
    if (sorted) table = nearest_level(sorted->data(), sorted_codes->data(), int(sorted->shape(0)));
    return {offset, code_max, round_sum ? Rounding::sum : Rounding::quotient, sorted ? &table : nullptr,
            data_or_null(level), keep_zeros};
}

// A matrix and the Python objects whose memory it reads.
struct Held {
    Matrix matrix;
    nb::object kept;
};

// A decoder, and what its caches must fit.
struct HeldDecoder {
    DecoderShape shape;
    int64_t layers;
    Decoder of;
};

using Numbers = std::vector<int64_t>;

NB_MODULE(_native, module) {
    using Unlocked = nb::call_guard<nb::gil_scoped_release>;

    nb::set_leak_warnings(false);  // what a script still holds as the interpreter ends is no news for its user

    module.def("isa", [] { return std::string(kernels().isa); });
    module.def("supported_isas", [] {
        std::vector<std::string> names;
        for (const Kernels* each : supported_kernels()) names.push_back(each->isa);
        return names;
    });
    module.def(
        "block_range",
        [](const AnyIn& weight, int64_t block_rows, int64_t block_cols, const FloatsOut& least,
           const FloatsOut& greatest) {
            Grid grid = grid_of(weight, block_rows, block_cols);
            return kernels().block_range(grid, weight_of(weight), least.data(), greatest.data());
        },
        Unlocked());
    module.def(
        "quantize_affine",
        [](const AnyIn& weight, const Floats& scale, const MaybeFloats& zero, float offset, float code_max,
           bool round_sum, int64_t block_rows, int64_t block_cols, const Codes& out) {
            Grid grid = grid_of(weight, block_rows, block_cols);
            kernels().quantize_affine(grid, weight_of(weight), scale.data(), data_or_null(zero), offset, code_max,
                                      round_sum ? Rounding::sum : Rounding::quotient, out.data());
        },
        nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        Unlocked());
    module.def(
        "quantize_levels",
        [](const AnyIn& weight, const Floats& scale, const Floats& levels, const Bytes& codes, int64_t block_rows,
           int64_t block_cols, const Codes& out) {
            Grid grid = grid_of(weight, block_rows, block_cols);
            Levels table = nearest_level(levels.data(), codes.data(), int(levels.shape(0)));
            kernels().quantize_levels(grid, weight_of(weight), scale.data(), table, out.data());
        },
        Unlocked());
    module.def(
        "quantize_fp8",
        [](const AnyIn& weight, const Floats& scale, bool e5m2, int64_t block_rows, int64_t block_cols,
           const Codes& out) {
            Grid grid = grid_of(weight, block_rows, block_cols);
            kernels().quantize_fp8(grid, weight_of(weight), scale.data(), e5m2 ? Fp8::e5m2 : Fp8::e4m3fn, out.data());
        },
        Unlocked());
    module.def(
        "dequantize",
        [](const Bytes& codes, const Floats& scale, const MaybeFloats& zero, const MaybeFloats& level,
           bool minus, int64_t block_rows, int64_t block_cols, const AnyOut& out) {
            Grid grid = grid_of(codes, block_rows, block_cols);
            Quantized quantized{codes.data(), scale.data(), data_or_null(zero), data_or_null(level), minus};
            kernels().dequantize(grid, quantized, {out.data(), dtype_of(out.dtype())});
        },
        nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        Unlocked());
    module.def(
        "error",
        [](const AnyIn& weight, const Bytes& codes, const Floats& scale, const MaybeFloats& zero,
           const MaybeFloats& level, bool minus, int64_t block_rows, int64_t block_cols) {
            Grid grid = grid_of(codes, block_rows, block_cols);
            Quantized quantized{codes.data(), scale.data(), data_or_null(zero), data_or_null(level), minus};
            Weight of = weight_of(weight);
            if (weight.size() == 0) of.data = nullptr;  // it tells the type alone
            ErrorSums sums = kernels().error(grid, of, quantized);
            return std::make_tuple(sums.squared_error, sums.squared_weight, sums.max_error);
        },
        nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
        Unlocked());
    module.def(
        "sweep",
        [](const FloatsOut& target, const Floats& weight, const FloatsOut& error, const Floats& coupling,
           const Floats& scale, const MaybeFloats& zero, float offset, float code_max, bool round_sum,
           bool keep_zeros, const MaybeFloats& sorted, const MaybeBytes& sorted_codes, const MaybeFloats& level,
           const Codes& codes) {
            Sweep of{int64_t(target.shape(0)), int64_t(target.shape(1)), weight.data(), coupling.data(),
                     scale.data(), data_or_null(zero), target.data(), error.data(), codes.data()};
            Levels table;
            kernels().sweep(of, coder_of(offset, code_max, round_sum, keep_zeros, sorted, sorted_codes, level, table));
        },
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), Unlocked());
    module.def("ggml_runs", [](int type) { return ggml_runs(GgmlType(type)); });
    module.def(
        "sweep_runs",
        [](int type, const FloatsOut& target, const Floats& weight, const FloatsOut& error, const Floats& coupling,
           const Floats& scale, const Floats& solve, const Floats& metric, const Floats& level, bool first,
           const Codes& codes) {
            Sweep of{int64_t(target.shape(0)), int64_t(target.shape(1)), weight.data(), coupling.data(), scale.data(),
                     nullptr, target.data(), error.data(), codes.data()};
            kernels().sweep_runs({of, GgmlType(type), solve.data(), metric.data(), level.data(), first});
        },
        Unlocked());
    module.def(
        "block_errors",
        [](const Floats& weight, const Floats& scale, const MaybeFloats& zero, float offset, float code_max,
           bool round_sum, bool keep_zeros, const MaybeFloats& sorted, const MaybeBytes& sorted_codes,
           const MaybeFloats& level, const MaybeFloats& importance, int64_t block_rows, int64_t block_cols, const FloatsOut& out) {
            Levels table;
            Coder coder = coder_of(offset, code_max, round_sum, keep_zeros, sorted, sorted_codes, level, table);
            kernels().block_errors(grid_of(weight, block_rows, block_cols), weight.data(), scale.data(), data_or_null(zero),
                                   coder, data_or_null(importance), out.data());
        },
        nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), Unlocked());
    module.def(
        "pack_bits",
        [](const Bytes& codes, int bits, const AnyOut& words) {
            kernels().pack_bits(codes.data(), int64_t(codes.shape(0)), int64_t(codes.shape(1)), bits, words.data());
        },
        Unlocked());
    module.def(
        "unpack_bits",
        [](const AnyIn& words, int bits, const Codes& codes) {
            kernels().unpack_bits(words.data(), int64_t(codes.shape(0)), int64_t(codes.shape(1)), bits, codes.data());
        },
        Unlocked());
    module.def(
        "pack_bits_transposed",
        [](const Bytes& codes, int bits, const LinesOut& words) {
            pack_bits_transposed(kernels(), codes.data(), int64_t(codes.shape(0)), int64_t(codes.shape(1)), bits,
                                 words.data(), words.stride(0));
        },
        Unlocked());
    module.def(
        "unpack_bits_transposed",
        [](const LinesIn& words, int bits, const Codes& codes) {
            unpack_bits_transposed(kernels(), words.data(), words.stride(0), int64_t(codes.shape(0)),
                                   int64_t(codes.shape(1)), bits, codes.data());
        },
        Unlocked());
    module.def(
        "file_holds",
        [](int file, const std::vector<Bytes>& parts, const Numbers& starts) {
            bool same = true;
            for (size_t i = 0; same && i < parts.size(); i++)
                same = file_holds(file, parts[i].data(), int64_t(parts[i].size()), starts.at(i));
            return same;
        },
        Unlocked());
    module.def(
        "transpose_words",
        [](const LinesIn& words, const LinesOut& out) {
            transpose_lines(kernels(), words.data(), words.stride(0), int64_t(words.shape(0)), int64_t(words.shape(1)),
                            out.data(), out.stride(0));
        },
        Unlocked());
    module.def(
        "pack_awq",
        [](const Bytes& codes, const LinesOut& words) {
            pack_awq(kernels(), codes.data(), int64_t(codes.shape(0)), int64_t(codes.shape(1)), words.data(),
                     words.stride(0));
        },
        Unlocked());
    module.def(
        "unpack_awq",
        [](const LinesIn& words, const Codes& codes) {
            unpack_awq(kernels(), words.data(), words.stride(0), int64_t(codes.shape(0)), int64_t(codes.shape(1)),
                       codes.data());
        },
        Unlocked());
    module.def(
        "lines_to_awq",
        [](const AnyIn& lines, const LinesOut& words) {
            lines_to_awq(kernels(), lines.data(), int64_t(lines.shape(0)), int64_t(words.shape(1)), words.data(),
                         words.stride(0));
        },
        Unlocked());
    module.def(
        "awq_to_lines",
        [](const LinesIn& words, const AnyOut& lines) {
            awq_to_lines(kernels(), words.data(), words.stride(0), int64_t(lines.shape(0)), int64_t(words.shape(1)),
                         lines.data());
        },
        Unlocked());
    module.def(
        "awq_to_rows",
        [](const LinesIn& words, const AnyOut& rows) {
            awq_to_rows(kernels(), words.data(), words.stride(0), int64_t(rows.shape(0)), int64_t(rows.shape(1)),
                        rows.data());
        },
        Unlocked());
    module.def(
        "pack_nibbles_high_first",
        [](const Bytes& codes, const Codes& bytes) {
            pack_nibbles_high_first(kernels(), codes.data(), int64_t(codes.shape(0)), bytes.data());
        },
        Unlocked());
    module.def(
        "unpack_nibbles_high_first",
        [](const Bytes& bytes, const Codes& codes) {
            unpack_nibbles_high_first(kernels(), bytes.data(), int64_t(codes.shape(0)), codes.data());
        },
        Unlocked());
    module.def("ggml_shape", [](int type) {
        GgmlShape shape = ggml_shape(GgmlType(type));
        return std::make_tuple(shape.weights, shape.bytes, shape.subs, shape.has_min, shape.scale_bytes);
    });
    module.def(
        "ggml_pack",
        [](int type, const Bytes& codes, const Bytes& scale, const MaybeBytes& min, const MaybeBytes& scale_codes,
           const MaybeBytes& min_codes, int64_t blocks, const Codes& stored) {
            GgmlParts<const uint8_t> parts{codes.data(), scale.data(), data_or_null(min), data_or_null(scale_codes),
                                           data_or_null(min_codes)};
            return ggml_pack(GgmlType(type), blocks, parts, stored.data());
        },
        nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(),
        Unlocked());
    module.def(
        "ggml_unpack",
        [](int type, const Bytes& stored, int64_t blocks, const MaybeCodes& codes, const Codes& scale, const MaybeCodes& min,
           const MaybeCodes& scale_codes, const MaybeCodes& min_codes) {
            GgmlParts<uint8_t> parts{data_or_null(codes), scale.data(), data_or_null(min), data_or_null(scale_codes),
                                     data_or_null(min_codes)};
            ggml_unpack(GgmlType(type), blocks, stored.data(), parts);
        },
        nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(),
        Unlocked());
    module.def(
        "ggml_words",
        [](int type, const Bytes& stored, int64_t blocks, int bits, const AnyOut& words) {
            ggml_words(kernels(), GgmlType(type), blocks, stored.data(), bits, words.data());
        },
        Unlocked());
    module.def(
        "ggml_pack_words",
        [](int type, const AnyIn& words, int bits, const Bytes& scale, const MaybeBytes& min, const MaybeBytes& scale_codes,
           const MaybeBytes& min_codes, int64_t blocks, const Codes& stored) {
            GgmlParts<const uint8_t> parts{nullptr, scale.data(), data_or_null(min), data_or_null(scale_codes),
                                           data_or_null(min_codes)};
            ggml_pack_words(kernels(), GgmlType(type), blocks, words.data(), bits, parts, stored.data());
        },
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(),
        Unlocked());
    module.def(
        "ggml_encode",
        [](int type, const AnyIn& weight, const MaybeFloats& importance, bool fitted, const Codes& codes,
           const FloatsOut& scale, const std::optional<FloatsOut>& min, const MaybeCodes& scale_codes,
           const MaybeCodes& min_codes) {
            GgmlEncoded out{codes.data(), scale.data(), data_or_null(min), data_or_null(scale_codes),
                            data_or_null(min_codes)};
            return ggml_encode_rows(kernels(), GgmlType(type), int64_t(weight.shape(0)), int64_t(weight.shape(1)),
                                    weight_of(weight), data_or_null(importance), fitted, out);
        },
        nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(),
        nb::arg().none(), Unlocked());
    module.def(
        "causal_softmax",
        [](const AnyIn& scores, int64_t period, int64_t first, float scale, const AnyOut& out) {
            Causal of{int64_t(scores.shape(0)), int64_t(scores.shape(1)), period, first, scale};
            std::vector<float> room(size_t(of.cols) + 16);
            kernels().softmax(of, weight_of(scores), {out.data(), dtype_of(out.dtype())}, room.data());
        },
        Unlocked());
    module.def(
        "causal_softmax_slopes",
        [](const AnyIn& shares, int64_t period, int64_t first, float scale, const AnyOut& slopes) {
            Causal of{int64_t(shares.shape(0)), int64_t(shares.shape(1)), period, first, scale};
            kernels().softmax_slopes(of, weight_of(shares), {slopes.data(), dtype_of(slopes.dtype())});
        },
        Unlocked());
    nb::class_<Table>(module, "Table")
        .def("__init__",
             [](Table* self, const AnyIn& values, int64_t cols, int type, const MaybeFloats& levels, const MaybeFloats& scales,
                int64_t step) {
                 new (self) Table{static_cast<const uint8_t*>(values.data()), cols,
                                  int64_t(values.shape(1) * values.itemsize()), dtype_of(values.dtype()), GgmlType(type),
                                  {data_or_null(levels), data_or_null(scales), step}};
             },
             nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg())
        .def(
            "rows",
            [](const Table& self, const Numbers& ids, const FloatsOut& out) {
                return look_up(self, ids.data(), int64_t(ids.size()), 1, out.data());
            },
            Unlocked());
    nb::class_<Held>(module, "Matrix")
        .def("__init__",
             [](Held* self, int way, int bits, int64_t step, int64_t over, int64_t sub, int64_t rows, int64_t cols,
                const Bytes& codes, const std::optional<AnyIn>& scale, const std::optional<AnyIn>& zero,
                const MaybeBytes& fine, const MaybeBytes& fine_zero, bool joined, bool minus, float offset,
                const MaybeFloats& level, const MaybeBytes& table, float unit, int dtype, int64_t inputs,
                const std::optional<Array<const int64_t>>& order, const MaybeFloats& bias, nb::object kept) {
                 Product of{};
                 of.way = Way(way), of.bits = bits, of.step = step, of.over = over, of.sub = sub;
                 of.rows = rows, of.cols = cols;
                 of.codes = codes.data();
                 of.scale = scale ? weight_of(*scale) : Weight{nullptr, Dtype(dtype)};
                 of.zero = zero ? zero->data() : nullptr;
                 of.fine = reinterpret_cast<const int8_t*>(data_or_null(fine));
                 of.fine_zero = reinterpret_cast<const int8_t*>(data_or_null(fine_zero));
                 of.joined = joined, of.minus = minus, of.offset = offset, of.unit = unit, of.level = data_or_null(level);
                 of.table = reinterpret_cast<const int8_t*>(data_or_null(table));
                 new (self) Held{{of, data_or_null(order), inputs, data_or_null(bias)}, std::move(kept)};
             },
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(),
             nb::arg())
        .def(
            "multiply",
            [](const Held& self, const Floats& inputs, int threads, const FloatsOut& out) {
                multiply(inputs.data(), int64_t(inputs.shape(0)), {{&self.matrix, out.data()}}, threads);
            },
            Unlocked());
    module.def(
        "interleave",
        [](const Bytes& codes, const std::optional<Array<const int64_t>>& order, int bits, int64_t full, int threads,
           const Codes& out) {
            interleave(codes.data(), int64_t(codes.shape(0)), int64_t(codes.shape(1)), data_or_null(order), bits, full,
                       threads, out.data());
        },
        nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), Unlocked());
    module.def(
        "interleave_floats",
        [](const AnyIn& values, int64_t full, int threads, const AnyOut& out) {
            interleave_floats(values.data(), int64_t(values.shape(0)), int64_t(values.shape(1)), int(values.itemsize()),
                              full, threads, out.data());
        },
        Unlocked());
    module.def(
        "widen_panels",
        [](const AnyIn& panels, int64_t count, int64_t cols, int threads, const AnyOut& words, const FloatsOut& scale) {
            return widen_panels(weight_of(panels), count, cols, threads, words.data(), scale.data());
        },
        Unlocked());
    module.def("ggml_panel_bits", [](int type) { return ggml_panel_bits(GgmlType(type)); });
    module.def(
        "ggml_panels",
        [](int type, const Bytes& stored, int64_t blocks, const std::optional<Array<const int64_t>>& order, int threads,
           const Codes& codes, const Codes& scale, const MaybeCodes& zero, const MaybeCodes& fine,
           const MaybeCodes& fine_zero) {
            GgmlRows rows{stored.data(), int64_t(stored.shape(0)), blocks, data_or_null(order)};
            GgmlPanels to{codes.data(), scale.data(), data_or_null(zero), data_or_null(fine), data_or_null(fine_zero)};
            GgmlFound found = ggml_panels(GgmlType(type), rows, threads, to);
            return std::make_tuple(found.finite, found.wide);
        },
        nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg().none(), nb::arg().none(), Unlocked());
    nb::class_<Cache>(module, "Cache")
        .def("reserve", &Cache::reserve, Unlocked())
        .def_prop_ro("bytes", &Cache::bytes);
    nb::class_<HeldDecoder>(module, "Decoder")
        .def("__init__",
             [](HeldDecoder* self, int64_t hidden, int64_t heads, int64_t key_heads, int64_t head_size, int64_t inner,
                int64_t turned, float epsilon, float scale, float cap, bool gelu, const Table& embedding, float factor,
                const Floats& norm, const Held& head, const Floats& steps, const Floats& factors, int threads) {
                 DecoderShape shape{hidden, heads, key_heads, head_size, inner, turned, epsilon, scale, cap, gelu};
                 DecoderEnds ends{embedding,    factor,       norm.data(),    head.matrix, int64_t(factors.size()),
                                  steps.data(), factors.data()};
                 new (self) HeldDecoder{shape, 0, Decoder(shape, ends, threads)};
             })
        .def(
            "add",
            [](HeldDecoder& self, const std::vector<const Held*>& matrices, const std::vector<MaybeFloats>& norms,
               int64_t window, int64_t angles) {
                auto matrix = [&](size_t i) { return matrices.at(i)->matrix; };
                auto norm = [&](size_t i) { return data_or_null(norms.at(i)); };
                self.of.add({matrix(0), matrix(1), matrix(2), matrix(3), matrix(4), matrix(5), matrix(6), norm(0),
                             norm(1), norm(2), norm(3), norm(4), norm(5), window, angles});
                self.layers++;
            })
        .def("cache", [](const HeldDecoder& self, int as) { return new Cache(self.shape, self.layers, Keep(as)); })
        .def(
            "read",
            [](HeldDecoder& self, const Numbers& ids, const std::vector<Cache*>& caches, const Numbers& positions,
               const Numbers& tokens) {
                std::vector<Part> parts;
                for (size_t i = 0; i < caches.size(); i++) parts.push_back({caches[i], positions.at(i), tokens.at(i)});
                return self.of.read(ids, parts);
            },
            Unlocked())
        .def("logits", [](const HeldDecoder& self, const FloatsOut& out) {
            const std::vector<float>& from = self.of.logits();
            std::copy_n(from.data(), std::min(from.size(), out.size()), out.data());
        })
        .def("likeliest", [](const HeldDecoder& self) { return self.of.likeliest(); });
}
