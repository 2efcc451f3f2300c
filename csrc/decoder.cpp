#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pool.h"

namespace lowbit {
namespace {

constexpr int64_t piece = 8;     // tokens that a thread takes at a time, where each is little work
constexpr int64_t gates = 2048;  // and numbers, of what tokens do not matter to

// In eight sums, which the compiler may keep side by side.
void norm(const float* from, const float* weight, int64_t count, float epsilon, float* to) {
    double part[8] = {};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int k = 0; k < 8; k++) part[k] += double(from[i + k]) * from[i + k];
    for (; i < count; i++) part[0] += double(from[i]) * from[i];
    double sum = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
    auto scale = float(1 / std::sqrt(sum / double(count) + epsilon));
    for (i = 0; i < count; i++) to[i] = from[i] * scale * weight[i];
}

// The first half of what turns of a head and the second are the two coordinates that turn.
void turn(float* head, int64_t size, const float* cosine, const float* sine) {
    for (int64_t i = 0, half = size / 2; i < half; i++) {
        float x = head[i], y = head[i + half];
        head[i] = x * cosine[i] - y * sine[i], head[i + half] = y * cosine[i] + x * sine[i];
    }
}

void grow(std::vector<float>& room, int64_t size) {
    if (int64_t(room.size()) < size) room.resize(size_t(size));
}

template <class T>
std::unique_ptr<T[]> moved(const T* from, int64_t rows, int64_t before, int64_t after) {
    auto to = std::make_unique_for_overwrite<T[]>(size_t(rows * after));
    for (int64_t row = 0; before && row < rows; row++)
        std::memcpy(to.get() + row * after, from + row * before, size_t(before) * sizeof(T));
    return to;
}

}  // namespace

Cache::Cache(const DecoderShape& shape, int64_t layers, Keep as)
    : as_(as), heads_(shape.key_heads), rows_(2 * layers * shape.key_heads), block_(shape.head_size % 32 ? 16 : 32) {
    row_bytes_ = shape.head_size * (as == Keep::f32 ? 4 : as == Keep::f16 ? 2 : 1);
    row_scales_ = as == Keep::int8 ? shape.head_size / block_ : 0;
}

void Cache::reserve(int64_t positions) {
    if (positions <= capacity_) return;
    int64_t wanted = std::max(positions, capacity_ + capacity_ / 2);
    data_ = moved(data_.get(), rows_, capacity_ * row_bytes_, wanted * row_bytes_);
    scale_ = moved(scale_.get(), rows_, capacity_ * row_scales_, wanted * row_scales_);
    capacity_ = wanted;
}

Kept Cache::kept(int64_t side, int64_t head) const {
    int64_t at = (side * heads_ + head) * capacity_;
    return {as_, data_.get() + at * row_bytes_, scale_.get() + at * row_scales_, block_};
}

bool Decoder::read(const std::vector<int64_t>& ids, const std::vector<Part>& parts) {
    spots_.clear();
    for (const Part& part : parts)
        for (int64_t t = 0; t < part.tokens; t++) spots_.push_back({part.cache, part.position + t});
    make_room();
    if (!look_up(ends_.embedding, ids.data(), tokens(), ends_.factor, hidden_.data())) return false;
    make_turns();
    for (size_t layer = 0; layer < layers_.size(); layer++) {
        attention(layer);
        feed(layers_[layer]);
    }
    predict(parts);
    return true;
}

void Decoder::make_room() {
    int64_t queries = shape_.heads * shape_.head_size, keys = shape_.key_heads * shape_.head_size, count = tokens();
    grow(hidden_, count * shape_.hidden), grow(normed_, count * shape_.hidden);
    grow(query_, count * queries), grow(mixed_, count * queries), grow(key_, count * keys), grow(value_, count * keys);
    grow(inner_, count * shape_.inner), grow(up_, count * shape_.inner);
    grow(cosine_, count * ends_.tables * shape_.turned / 2), grow(sine_, count * ends_.tables * shape_.turned / 2);
}

void Decoder::make_turns() {
    int64_t half = shape_.turned / 2, each = ends_.tables * half;
    share(tokens(), piece, threads_, [&](int64_t first, int64_t last) {
        for (int64_t i = first * each; i < last * each; i++) {
            float angle = float(spots_[size_t(i / each)].position) * ends_.steps[i % each];
            float factor = ends_.factors[i % each / half];
            cosine_[size_t(i)] = std::cos(angle) * factor, sine_[size_t(i)] = std::sin(angle) * factor;
        }
    });
}

void Decoder::normed(const float* weight) {
    share(tokens(), piece, threads_, [&](int64_t first, int64_t last) {
        for (int64_t i = first * shape_.hidden; i < last * shape_.hidden; i += shape_.hidden)
            norm(hidden_.data() + i, weight, shape_.hidden, shape_.epsilon, normed_.data() + i);
    });
}

// What a part of the block gave, through a norm of its own where it has one.
void Decoder::add_to_hidden(const float* weight) {
    for (int64_t t = 0; weight && t < tokens(); t++) {
        float* at = normed_.data() + t * shape_.hidden;
        norm(at, weight, shape_.hidden, shape_.epsilon, at);
    }
    for (int64_t i = 0; i < tokens() * shape_.hidden; i++) hidden_[size_t(i)] += normed_[size_t(i)];
}

void Decoder::attention(size_t layer) {
    const DecoderLayer& of = layers_[layer];
    normed(of.before);
    multiply(normed_.data(), tokens(), {{&of.query, query_.data()}, {&of.key, key_.data()}, {&of.value, value_.data()}},
             threads_);
    share(tokens(), piece, threads_, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) place(layer, t);
    });
    attend(layer);
    multiply(mixed_.data(), tokens(), {{&of.output, normed_.data()}}, threads_);
    add_to_hidden(of.attended);
}

// Norms and positions of a token's heads; its keys and values to where they are kept.
void Decoder::place(size_t layer, int64_t token) {
    const DecoderLayer& of = layers_[layer];
    int64_t size = shape_.head_size, turns = (token * ends_.tables + of.angles) * shape_.turned / 2;
    auto ready = [&](float* head, const float* weight) {
        if (weight) norm(head, weight, size, shape_.epsilon, head);
        if (of.angles >= 0) turn(head, shape_.turned, cosine_.data() + turns, sine_.data() + turns);
        return head;
    };
    for (int64_t head = 0; head < shape_.heads; head++)
        ready(query_.data() + (token * shape_.heads + head) * size, of.query_norm);
    const Spot& spot = spots_[size_t(token)];
    for (int64_t head = 0; head < shape_.key_heads; head++) {
        int64_t at = (token * shape_.key_heads + head) * size;
        kernels().keep(spot.position, size, ready(key_.data() + at, of.key_norm), spot.cache->keys(int64_t(layer), head));
        kernels().keep(spot.position, size, value_.data() + at, spot.cache->values(int64_t(layer), head));
    }
}

void Decoder::attend(size_t layer) {
    int64_t size = shape_.head_size, shared = shape_.heads / shape_.key_heads, window = layers_[layer].window;
    int64_t parts = (shared + queries_at_once - 1) / queries_at_once, heads = shape_.key_heads * parts;
    share(tokens() * heads, 1, threads_, [&](int64_t first, int64_t last) {
        std::vector<float> room;
        for (int64_t i = first; i < last; i++) {
            const Spot& spot = spots_[size_t(i / heads)];
            int64_t head = i % heads / parts, part = i % parts * queries_at_once, seen = spot.position + 1;
            int64_t begin = window ? std::max<int64_t>(seen - window, 0) : 0;
            int64_t at = (i / heads * shape_.heads + head * shared + part) * size;
            Attention of{std::min(queries_at_once, shared - part), size, begin, seen, query_.data() + at,
                         spot.cache->keys(int64_t(layer), head), spot.cache->values(int64_t(layer), head), shape_.scale,
                         shape_.cap, nullptr, mixed_.data() + at};
            grow(room, queries_at_once * wide_room(of));
            of.room = room.data();
            kernels().attend(of);
        }
    });
}

void Decoder::feed(const DecoderLayer& of) {
    normed(of.after);
    multiply(normed_.data(), tokens(), {{&of.gate, inner_.data()}, {&of.up, up_.data()}}, threads_);
    share(tokens() * shape_.inner, gates, threads_, [&](int64_t first, int64_t last) {
        kernels().gate(last - first, shape_.gelu, inner_.data() + first, up_.data() + first);
    });
    multiply(inner_.data(), tokens(), {{&of.down, normed_.data()}}, threads_);
    add_to_hidden(of.fed);
}

// Of the last token of each text.
void Decoder::predict(const std::vector<Part>& parts) {
    int64_t end = 0, text = 0;
    for (const Part& part : parts) {
        end += part.tokens;
        norm(hidden_.data() + (end - 1) * shape_.hidden, ends_.norm, shape_.hidden, shape_.epsilon,
             normed_.data() + text++ * shape_.hidden);
    }
    logits_.resize(size_t(text * ends_.head.of.rows));
    multiply(normed_.data(), text, {{&ends_.head, logits_.data()}}, threads_);
}

std::vector<int64_t> Decoder::likeliest() const {
    std::vector<int64_t> found;
    for (auto row = logits_.begin(); row < logits_.end(); row += ends_.head.of.rows)
        found.push_back(std::max_element(row, row + ends_.head.of.rows) - row);
    return found;
}

}  // namespace lowbit
