// A decoder of the Llama family: what a block computes for some tokens after those that it has seen.
#pragma once

#include <deque>
#include <vector>

#include "lowbit.h"

namespace lowbit {

// A weight with what is around it: the order in which it takes its inputs, and what is added. Both may be null.
struct Matrix {
    Product of;
    const int64_t* order;  // of `inputs` columns
    int64_t inputs;
    const float* bias;
};

// out[i] = inputs @ weight[i].T + bias[i] for weights that share their inputs [tokens, inputs], in one loop.
struct Task {
    const Matrix* matrix;
    float* out;
};
void multiply(const float* inputs, int64_t tokens, const std::vector<Task>& tasks, int threads);

struct DecoderLayer {
    Matrix query, key, value, output, gate, up, down;
    const float *before, *after;  // weights of the norms [hidden]
    const float *query_norm, *key_norm;  // of the norms of heads [head_size], or null
};

struct DecoderShape {
    int64_t hidden, heads, key_heads, head_size, inner;  // inner: of the feed-forward layer
    float epsilon, scale;                                // of the norms, of attention's scores
    int64_t window;                                      // positions that a token sees; 0: all before it
};

class Decoder final {
  public:
    // Room for `capacity` positions.
    Decoder(const DecoderShape& shape, int64_t capacity, int threads);
    void add(const DecoderLayer& layer);

    // What comes of hidden states [tokens, hidden] (changed in place) at `position` and after, where all before are
    // known. `cosine` and `sine` are [tokens, head_size].
    void run(float* hidden, int64_t tokens, int64_t position, const float* cosine, const float* sine);

  private:
    struct Layer {
        DecoderLayer of;
        std::vector<float> keys, values;  // [key_heads, capacity, head_size]
    };
    void attention(Layer& layer, float* hidden, int64_t tokens, int64_t position, const float* cosine, const float* sine);
    void attend(Layer& layer, int64_t tokens, int64_t position);
    void feed(const Layer& layer, float* hidden, int64_t tokens);
    void place(Layer& layer, int64_t token, int64_t position, const float* cosine, const float* sine);

    DecoderShape shape_;
    int64_t capacity_;
    int threads_;
    std::deque<Layer> layers_;
    std::vector<float> normed_, query_, key_, value_, mixed_, inner_, up_;
};

}  // namespace lowbit
