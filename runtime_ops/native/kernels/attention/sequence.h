// The way of queries through a cache, tile by tile: the same for every variant of the kernel.
#pragma once

#include "kernel.h"

namespace msd::attention {

constexpr int64_t kMostRows = 64;  // of a task: a tile, once widened, serves them all
constexpr int64_t kFewRows = 8;    // up to so many the work may be split along the cache

// Keys or values: the new tokens, the cache and its scales.
struct Side {
  const void* fresh;          // [batch, heads, fresh_tokens, columns]
  int64_t columns;
  const uint8_t* past;        // [batch, heads, past_tokens, bytes]
  uint8_t* present;           // [batch, heads, present_tokens, bytes]; may be `past`
  int64_t bytes;              // of a token
  const float* scales;        // static: of head h and column c, scales[h * scale_head + c * scale_column]
  int64_t scale_head, scale_column;
  const float* past_scales;   // dynamic: [batch, heads, past_tokens]; else null
  float* present_scales;      // dynamic: [batch, heads, present_tokens]; may be `past_scales`
};

// [batch, query_heads, queries, tokens as stored]; a step is 0 where the dimension is 1.
struct Mask {
  const float* base;  // null: none
  int64_t batch_step, head_step, query_step, token_step;
};

struct Problem {
  int bits;
  bool is_dynamic, is_causal;
  bool is_shared;  // new tokens follow the valid ones, not all of the past
  int64_t window;  // 0: none
  float scale, cap;
  int64_t batch, query_heads, heads, queries, fresh_tokens, past_tokens, present_tokens;
  const int64_t* lengths;  // of batch entry b, lengths[b * length_step]
  int64_t length_step;
  const void* query;       // [batch, query_heads, queries, keys.columns]
  Real type;
  Side keys, values;
  Mask mask;
  const float* sinks;  // [query_heads]; null: none
  Output output;       // [batch, query_heads, queries, values.columns]

  // Query heads that share a key head; and rows, their queries in the order [query, head].
  int64_t group() const { return query_heads / heads; }
  int64_t rows() const { return queries * group(); }
  int64_t length(int64_t b) const { return lengths[b * length_step]; }
  int64_t tokens(int64_t b) const { return length(b) + fresh_tokens; }
};

// What rows get of a tile, kept where tiles are shared out: merged later, in order.
struct Partial {
  Share* shares;  // [tiles, rows]
  int32_t* sums;  // [tiles, rows, value columns padded]
};

// Some rows of a batch entry and key head, and the tiles they are to see.
struct Task {
  int64_t b, head;
  int64_t first_row, last_row;
  int64_t first_tile, last_tile;
  const Partial* partial;  // null: the tiles are all there are, and the result is written
};

int64_t padded(int64_t columns);

// Bytes of scratch that `attend` and `merge` need for so many rows.
int64_t scratch_bytes(const Problem& problem, int64_t rows);

// Writes present caches and scales of a batch entry and key head.
void store(const Problem& problem, const Kernel& kernel, int64_t b, int64_t head, char* scratch);

// Rows over tiles: writes the output, or the tiles' part of `task.partial`.
void attend(const Problem& problem, const Kernel& kernel, const Task& task, char* scratch);

// Writes the output of the task's rows from all tiles of `task.partial`.
void merge(const Problem& problem, const Task& task, char* scratch);

}  // namespace msd::attention
