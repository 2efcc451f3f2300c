// The grids of ggml's IQ types: tables of the runs of 8 (or 4) digits that a block can hold.
#pragma once

#include <cstdint>
#include <vector>

#include "lowbit.h"

namespace lowbit {

// A word has `group` digits of `bits` bits, each below `levels`; what a digit stands for is the type's.
struct GgmlGrid {
    const uint16_t* words;
    int size, group, bits, levels;
    std::vector<int16_t> place;  // of a word in the table, -1 where it has none
};

// For each word off the grid, entries of the table that are near: by distance, then in the order of the table.
struct GgmlNeighbours {
    struct Range {
        int32_t first = 0, count = 0;
    };
    std::vector<Range> of;
    std::vector<uint16_t> words;
};

bool has_grid(GgmlType type);
// Made when first asked for.
const GgmlGrid& ggml_grid(GgmlType type);
const GgmlNeighbours& ggml_neighbours(GgmlType type);

// The digits of all words, one after the other; none where a type has no table.
std::vector<int> ggml_runs(GgmlType type);

// `ggml_pack` and `ggml_unpack` of these types.
int64_t ggml_grid_pack(GgmlType, int64_t blocks, const GgmlParts<const uint8_t>&, uint8_t* stored);
void ggml_grid_unpack(GgmlType, int64_t blocks, const uint8_t* stored, const GgmlParts<uint8_t>&);

}  // namespace lowbit
