#include "decoder.h"

#include <algorithm>
#include <cmath>

#include "pool.h"

namespace lowbit {
namespace {

void norm(const float* from, const float* weight, int64_t count, float epsilon, float* to) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += double(from[i]) * from[i];
    auto scale = float(1 / std::sqrt(sum / double(count) + epsilon));
    for (int64_t i = 0; i < count; i++) to[i] = from[i] * scale * weight[i];
}

// The first half of a head and the second are the two coordinates that turn.
void turn(float* head, int64_t size, const float* cosine, const float* sine) {
    for (int64_t i = 0, half = size / 2; i < half; i++) {
        float x = head[i], y = head[i + half];
        head[i] = x * cosine[i] - y * sine[i], head[i + half] = y * cosine[i + half] + x * sine[i + half];
    }
}

void grow(std::vector<float>& room, int64_t size) {
    if (int64_t(room.size()) < size) room.resize(size_t(size));
}

}  // namespace

Decoder::Decoder(const DecoderShape& shape, int64_t capacity, int threads)
    : shape_(shape), capacity_(capacity), threads_(threads) {}

void Decoder::add(const DecoderLayer& layer) {
    auto size = size_t(shape_.key_heads * capacity_ * shape_.head_size);
    layers_.push_back({layer, std::vector<float>(size), std::vector<float>(size)});
}

void Decoder::run(float* hidden, int64_t tokens, int64_t position, const float* cosine, const float* sine) {
    int64_t queries = shape_.heads * shape_.head_size, keys = shape_.key_heads * shape_.head_size;
    grow(normed_, tokens * shape_.hidden), grow(query_, tokens * queries), grow(mixed_, tokens * queries);
    grow(key_, tokens * keys), grow(value_, tokens * keys);
    grow(inner_, tokens * shape_.inner), grow(up_, tokens * shape_.inner);
    for (Layer& layer : layers_) {
        attention(layer, hidden, tokens, position, cosine, sine);
        feed(layer, hidden, tokens);
    }
}

void Decoder::attention(Layer& layer, float* hidden, int64_t tokens, int64_t position, const float* cosine,
                        const float* sine) {
    const DecoderLayer& of = layer.of;
    for (int64_t t = 0; t < tokens; t++)
        norm(hidden + t * shape_.hidden, of.before, shape_.hidden, shape_.epsilon, normed_.data() + t * shape_.hidden);
    multiply(normed_.data(), tokens, {{&of.query, query_.data()}, {&of.key, key_.data()}, {&of.value, value_.data()}},
             threads_);
    for (int64_t t = 0; t < tokens; t++)
        place(layer, t, position + t, cosine + t * shape_.head_size, sine + t * shape_.head_size);
    attend(layer, tokens, position);
    multiply(mixed_.data(), tokens, {{&of.output, normed_.data()}}, threads_);
    for (int64_t i = 0; i < tokens * shape_.hidden; i++) hidden[i] += normed_[size_t(i)];
}

// Norms and positions of a token's heads; its keys and values to where they are kept.
void Decoder::place(Layer& layer, int64_t token, int64_t position, const float* cosine, const float* sine) {
    int64_t size = shape_.head_size;
    for (int64_t head = 0; head < shape_.heads; head++) {
        float* query = query_.data() + (token * shape_.heads + head) * size;
        if (layer.of.query_norm) norm(query, layer.of.query_norm, size, shape_.epsilon, query);
        turn(query, size, cosine, sine);
    }
    for (int64_t head = 0; head < shape_.key_heads; head++) {
        float* key = key_.data() + (token * shape_.key_heads + head) * size;
        if (layer.of.key_norm) norm(key, layer.of.key_norm, size, shape_.epsilon, key);
        turn(key, size, cosine, sine);
        const float* value = value_.data() + (token * shape_.key_heads + head) * size;
        int64_t at = (head * capacity_ + position) * size;
        std::copy(key, key + size, layer.keys.data() + at);
        std::copy(value, value + size, layer.values.data() + at);
    }
}

void Decoder::attend(Layer& layer, int64_t tokens, int64_t position) {
    int64_t size = shape_.head_size, shared = shape_.heads / shape_.key_heads;
    share(tokens * shape_.heads, 1, threads_, [&](int64_t first, int64_t last) {
        std::vector<float> room(size_t(position + tokens) + 16);
        for (int64_t i = first; i < last; i++) {
            int64_t token = i / shape_.heads, seen = position + token + 1;
            int64_t kept = (i % shape_.heads) / shared * capacity_ * size;
            int64_t begin = shape_.window ? std::max<int64_t>(seen - shape_.window, 0) : 0;
            kernels().attend({size, begin, seen, query_.data() + i * size, layer.keys.data() + kept,
                              layer.values.data() + kept, shape_.scale, room.data(), mixed_.data() + i * size});
        }
    });
}

void Decoder::feed(const Layer& layer, float* hidden, int64_t tokens) {
    const DecoderLayer& of = layer.of;
    for (int64_t t = 0; t < tokens; t++)
        norm(hidden + t * shape_.hidden, of.after, shape_.hidden, shape_.epsilon, normed_.data() + t * shape_.hidden);
    multiply(normed_.data(), tokens, {{&of.gate, inner_.data()}, {&of.up, up_.data()}}, threads_);
    kernels().gate(tokens * shape_.inner, inner_.data(), up_.data());
    multiply(inner_.data(), tokens, {{&of.down, normed_.data()}}, threads_);
    for (int64_t i = 0; i < tokens * shape_.hidden; i++) hidden[i] += normed_[size_t(i)];
}

}  // namespace lowbit
