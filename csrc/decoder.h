// A decoder of the Llama family: what its blocks compute for tokens after those that a text has.
#pragma once

#include <memory>
#include <vector>

#include "lookup.h"
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
    const float *before, *after;         // weights of the norms before attention and feed-forward [hidden]
    const float *query_norm, *key_norm;  // of the norms of heads [head_size], or null
    const float *attended, *fed;         // of norms of what attention and feed-forward give [hidden], or null
    int64_t window;                      // positions that a token sees; 0: all before it
    int64_t angles;                      // which table of angles turns its heads; -1: none
};

struct DecoderShape {
    int64_t hidden, heads, key_heads, head_size, inner;  // inner: of the feed-forward layer
    int64_t turned;                                      // dimensions of a head that turn, even
    float epsilon, scale, cap;                           // of the norms, of attention's scores; their cap or 0
    bool gelu;                                           // the gate is GELU, not SiLU
};

// What stands before and after the blocks.
struct DecoderEnds {
    Table embedding;
    float factor;                  // of embeddings
    const float* norm;             // its weight [hidden]
    Matrix head;                   // gives logits
    int64_t tables;                // of angles
    const float *steps, *factors;  // of a position, in turns of a pair [tables, turned / 2]; of cosine and sine [tables]
};

// Keys and values of one text, in every layer.
class Cache final {
  public:
    Cache(const DecoderShape& shape, int64_t layers, Keep as);

    // Room for so many positions; those that are there stay.
    void reserve(int64_t positions);
    Kept keys(int64_t layer, int64_t head) const { return kept(2 * layer, head); }
    Kept values(int64_t layer, int64_t head) const { return kept(2 * layer + 1, head); }
    int64_t bytes() const { return rows_ * capacity_ * (row_bytes_ + row_scales_ * 4); }

  private:
    Kept kept(int64_t side, int64_t head) const;

    Keep as_;
    int64_t heads_, rows_, block_, row_bytes_, row_scales_, capacity_ = 0;  // rows: heads of all layers, keys and values
    std::unique_ptr<uint8_t[]> data_;  // [layers, 2, heads, capacity, dim]
    std::unique_ptr<float[]> scale_;
};

// Tokens of one text: at `position` and after, where all before are known.
struct Part {
    Cache* cache;
    int64_t position, tokens;
};

class Decoder final {
  public:
    Decoder(const DecoderShape& shape, const DecoderEnds& ends, int threads)
        : shape_(shape), ends_(ends), threads_(threads) {}
    void add(const DecoderLayer& layer) { layers_.push_back(layer); }

    // Tokens of some texts, one text after the other; caches have room. Returns whether the embeddings of the tokens are
    // finite; nothing else is done where they are not.
    bool read(const std::vector<int64_t>& ids, const std::vector<Part>& parts);

    // What came of the last token of each text that was read last [texts, vocabulary], and which is the greatest (the
    // first of these).
    const std::vector<float>& logits() const { return logits_; }
    std::vector<int64_t> likeliest() const;

  private:
    struct Spot {
        Cache* cache;
        int64_t position;
    };
    void make_room();
    void make_turns();
    void attention(size_t layer);
    void place(size_t layer, int64_t token);
    void attend(size_t layer);
    void feed(const DecoderLayer& of);
    void normed(const float* weight);
    void add_to_hidden(const float* weight);
    void predict(const std::vector<Part>& parts);
    int64_t tokens() const { return int64_t(spots_.size()); }

    DecoderShape shape_;
    DecoderEnds ends_;
    int threads_;
    std::vector<DecoderLayer> layers_;
    std::vector<Spot> spots_;  // of the tokens that run
    std::vector<float> cosine_, sine_;  // [tokens, tables, turned / 2]
    std::vector<float> hidden_, normed_, query_, key_, value_, mixed_, inner_, up_, logits_;
};

}  // namespace lowbit
