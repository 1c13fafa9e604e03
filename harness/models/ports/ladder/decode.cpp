// Kernels of BLOOM's decode step on a CPU, for few rows: each weight is brought from memory once a step, and everything
// else is arranged so that nothing waits for anything but that.
//
// Plain C++ with the vectors of GCC and Clang: sixteen floats, which the compiler cuts to whatever the processor has
// (AVX-512, AVX2, NEON, SSE). Weights and the KV cache are float or bfloat16; activations are float throughout.
//
// Shapes, row-major: B rows, D hidden size, H heads, C size of a head, S tokens so far, L capacity of the cache.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Which thread of how many this is.
struct Team {
#ifdef _OPENMP
  int thread = omp_get_thread_num(), size = omp_get_num_threads();
#else
  int thread = 0, size = 1;
#endif
};

using Lanes = float __attribute__((vector_size(64)));
using Words = int32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

constexpr int64_t kLanes = 16;
constexpr int kMostRows = 8;  // of a batch that go through a product together
// Bytes that a product asks for ahead of its reading: a hardware prefetcher stops at the end of each page.
constexpr int64_t kAhead = 16384;

// Multiplications below which waking other threads takes longer than they save.
constexpr int64_t kWorthATeam = 1 << 17;

struct BFloat16 {
  uint16_t bits;
};

inline Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline Lanes load(const BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;  // a bfloat16 is the upper half of a float
  Lanes lanes;
  std::memcpy(&lanes, &words, sizeof lanes);
  return lanes;
}

inline float widened(float value) { return value; }

inline float widened(BFloat16 value) {
  const uint32_t word = uint32_t{value.bits} << 16;
  float wide;
  std::memcpy(&wide, &word, sizeof wide);
  return wide;
}

inline void store(float* to, float value) { *to = value; }

inline void store(BFloat16* to, float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  // To nearest, ties to even; a NaN keeps a bit of its payload.
  to->bits = std::isnan(value) ? static_cast<uint16_t>((word >> 16) | 64)
                               : static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// Half by half: one after the other would wait sixteen times for an addition.
inline float total(Lanes lanes) {
  using Eight = float __attribute__((vector_size(32)));
  using Four = float __attribute__((vector_size(16)));
  Eight eights[2];
  std::memcpy(eights, &lanes, sizeof lanes);
  const Eight eight = eights[0] + eights[1];
  Four fours[2];
  std::memcpy(fours, &eight, sizeof eight);
  const Four four = fours[0] + fours[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x to the last bit or two, from 2^n e^r with |r| <= ln(2) / 2 (Cody and Waite) and Taylor's series of e^r.
inline Lanes exponential(Lanes x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  x = x < -87.0f ? Lanes{} - 87.0f : x;
  x = x > 88.0f ? Lanes{} + 88.0f : x;
  const Lanes shifted = x * kLog2E + 12582912.0f;  // 1.5 * 2^23: what is behind the point is rounded away
  const Lanes n = shifted - 12582912.0f;
  const Lanes r = (x - n * kLn2High) - n * kLn2Low;
  Lanes series = 1.0f / 5040 + Lanes{};
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * r + term;
  const Words power = (__builtin_convertvector(n, Words) + 127) << 23;
  Lanes scale;
  std::memcpy(&scale, &power, sizeof scale);
  return series * scale;
}

// BLOOM's GELU, x / 2 (1 + tanh(u)) with its own constants; (1 + tanh(u)) / 2 is 1 / (1 + e^(-2 u)).
inline Lanes gelu(Lanes x) {
  const Lanes u = 0.79788456f * x * (1.0f + 0.044715f * x * x);
  return x / (1.0f + exponential(-2.0f * u));
}

// Sixteen at a time, the last ones padded: `change(lanes) -> lanes`.
template <class Change>
void each(float* values, int64_t count, Change change) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Lanes lanes = change(load(values + i));
    std::memcpy(values + i, &lanes, sizeof lanes);
  }
  if (i < count) {
    Lanes lanes{};
    std::memcpy(&lanes, values + i, (count - i) * sizeof(float));
    lanes = change(lanes);
    std::memcpy(values + i, &lanes, (count - i) * sizeof(float));
  }
}

// --- products of few rows --------------------------------------------------------------------------------------------

// R rows of a weight times B rows of x, both `width` wide: sums[r][b].
template <int R, int B, class T>
inline void tile(const T* weight, const float* x, int64_t width, float (*sums)[B]) {
  Lanes lanes[R][B] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Lanes rows[R];
    // Unrolled, or the sums would lie in memory and not in registers.
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const T* from = weight + r * width + i;
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
      rows[r] = load(from);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const Lanes given = load(x + b * width + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) lanes[r][b] += rows[r] * given;
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) {
      float sum = total(lanes[r][b]);
      for (int64_t k = i; k < width; ++k) sum += widened(weight[r * width + k]) * x[b * width + k];
      sums[r][b] = sum;
    }
  }
}

// What a thread of a team takes of `count`: a run of whole grains.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int64_t grain, const Team& team) {
    const int64_t grains = (count + grain - 1) / grain;
    begin = std::min(count, grains * team.thread / team.size * grain);
    end = std::min(count, grains * (team.thread + 1) / team.size * grain);
  }
};

// This thread's rows of y = x W^T + bias for B rows: `take(b, n, value)`.
template <int B, class T, class Take>
void product(const T* weight, const T* bias, const float* x, int64_t width, Share share, Take take) {
  constexpr int R = B == 1 ? 8 : B == 8 ? 3 : 4;  // so many sums stay in registers
  float sums[R][B];
  int64_t n = share.begin;
  for (; n + R <= share.end; n += R) {
    tile<R, B>(weight + n * width, x, width, sums);
    for (int r = 0; r < R; ++r)
      for (int b = 0; b < B; ++b) take(b, n + r, sums[r][b] + (bias ? widened(bias[n + r]) : 0.0f));
  }
  for (; n < share.end; ++n) {
    tile<1, B>(weight + n * width, x, width, sums);
    for (int b = 0; b < B; ++b) take(b, n, sums[0][b] + (bias ? widened(bias[n]) : 0.0f));
  }
}

// The same for any number of rows, in groups of 8, 4, 2 and 1: each group brings the weight once.
template <class T, class Take>
void products(const T* weight, const T* bias, const float* x, int64_t rows, int64_t width, Share share, Take take) {
  for (int64_t first = 0; first < rows;) {
    const auto shifted = [&](int b, int64_t n, float value) { take(first + b, n, value); };
    const float* from = x + first * width;
    const int64_t left = rows - first;
    if (left >= 8) {
      product<8>(weight, bias, from, width, share, shifted), first += 8;
    } else if (left >= 4) {
      product<4>(weight, bias, from, width, share, shifted), first += 4;
    } else if (left >= 2) {
      product<2>(weight, bias, from, width, share, shifted), first += 2;
    } else {
      product<1>(weight, bias, from, width, share, shifted), first += 1;
    }
  }
}

template <class T>
void linear(const T* weight, const T* bias, const T* x, T* y, int64_t rows, int64_t width, int64_t outputs,
            bool with_gelu, int threads) {
  std::vector<float> wide(rows * width), result(rows * outputs);
  for (int64_t i = 0; i < rows * width; ++i) wide[i] = widened(x[i]);
  const bool alone = rows * width * outputs < kWorthATeam;
#pragma omp parallel num_threads(threads) if (!alone)
  {
    const Team team;
    const Share share(outputs, kMostRows, team);
    products(weight, bias, wide.data(), rows, width, share,
             [&](int64_t b, int64_t n, float value) { result[b * outputs + n] = value; });
    for (int64_t b = 0; b < rows; ++b) {
      float* row = result.data() + b * outputs;
      if (with_gelu) each(row + share.begin, share.end - share.begin, gelu);
      for (int64_t n = share.begin; n < share.end; ++n) store(y + b * outputs + n, row[n]);
    }
  }
}

// --- the rest of a step ----------------------------------------------------------------------------------------------

// LayerNorm over the last axis; the variance is of what the mean was taken from, as torch has it.
template <class T>
void norm(const float* x, const T* weight, const T* bias, float eps, int64_t rows, int64_t width, float* y) {
  for (int64_t b = 0; b < rows; ++b, x += width, y += width) {
    Lanes sums{}, squares{};
    float mean = 0, variance = 0;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) sums += load(x + i);
    for (; i < width; ++i) mean += x[i];
    mean = (mean + total(sums)) / static_cast<float>(width);
    for (i = 0; i + kLanes <= width; i += kLanes) {
      const Lanes centred = load(x + i) - mean;
      squares += centred * centred;
    }
    for (; i < width; ++i) variance += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt((variance + total(squares)) / static_cast<float>(width) + eps);
    for (i = 0; i + kLanes <= width; i += kLanes) {
      const Lanes lanes = (load(x + i) - mean) * scale * load(weight + i) + load(bias + i);
      std::memcpy(y + i, &lanes, sizeof lanes);
    }
    for (; i < width; ++i) y[i] = (x[i] - mean) * scale * widened(weight[i]) + widened(bias[i]);
  }
}

template <class T>
inline float dot(const float* x, const T* y, int64_t count) {
  Lanes lanes{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) lanes += load(x + i) * load(y + i);
  float sum = total(lanes);
  for (; i < count; ++i) sum += x[i] * widened(y[i]);
  return sum;
}

// One head of one row: its new key and value go into the cache, and the softmax over all keys mixes the values.
//
// place[s] is a key's position, negative where it is masked; scores and sums are float.
template <class T>
void attend(const float* query, const float* key, const float* value, T* keys, T* values, const float* place,
            float slope, float scale, int64_t tokens, int64_t size, float* scores, float* mixed) {
  for (int64_t c = 0; c < size; ++c) {
    store(keys + (tokens - 1) * size + c, key[c]);
    store(values + (tokens - 1) * size + c, value[c]);
  }
  float most = -INFINITY;
  for (int64_t s = 0; s < tokens; ++s) {
    scores[s] = place[s] < 0 ? -INFINITY : dot(query, keys + s * size, size) * scale + slope * place[s];
    most = std::max(most, scores[s]);
  }
  std::memset(mixed, 0, size * sizeof(float));
  if (most == -INFINITY) return;  // every key is masked
  each(scores, tokens, [=](Lanes lanes) { return exponential(lanes - most); });
  float sum = 0;
  for (int64_t s = 0; s < tokens; ++s) {
    if (place[s] < 0) continue;
    sum += scores[s];
    const T* from = values + s * size;
    int64_t c = 0;
    for (; c + kLanes <= size; c += kLanes) {
      const Lanes lanes = load(mixed + c) + scores[s] * load(from + c);
      std::memcpy(mixed + c, &lanes, sizeof lanes);
    }
    for (; c < size; ++c) mixed[c] += scores[s] * widened(from[c]);
  }
  for (int64_t c = 0; c < size; ++c) mixed[c] /= sum;
}

struct Sizes {
  int64_t layers, hidden, heads, inner, vocabulary, rows, tokens, capacity, residual_of_norm, threads;
};

// The weights of a layer, in the order of its `parameters()`.
enum { kNorm1, kNorm1Bias, kQkv, kQkvBias, kDense, kDenseBias, kNorm2, kNorm2Bias, kUp, kUpBias, kDown, kDownBias,
       kOfLayer };

// One token for each row, from its id to its logits.
//
// weights: of the embedding and its norm (3), of each layer (kOfLayer), of the last norm (2), of the head (1).
// numbers: of each layer the epsilons of its two norms, the scale of its scores and the factor of ALiBi (4); at the end
// the epsilons of the embedding's norm and of the last one.
template <class T>
void step(const Sizes& of, const T* const* weights, const float* numbers, const float* slopes, const int64_t* ids,
          const int64_t* mask, T* const* cache, T* logits) {
  const int64_t hidden = of.hidden, size = hidden / of.heads, rows = of.rows, tokens = of.tokens;
  std::vector<float> x(rows * hidden), fused(rows * 3 * hidden), mixed(rows * hidden), inner(rows * of.inner);
  std::vector<float> place(rows * tokens);
  for (int64_t b = 0; b < rows; ++b) {
    int64_t seen = 0;
    for (int64_t s = 0; s < tokens; ++s) {
      const bool real = mask[b * tokens + s] != 0;
      seen += real;
      place[b * tokens + s] = real ? static_cast<float>(seen - 1) : -1.0f;
    }
    for (int64_t i = 0; i < hidden; ++i) x[b * hidden + i] = widened(weights[0][ids[b] * hidden + i]);
  }
  const float* last_numbers = numbers + 4 * of.layers;
  norm(std::vector<float>(x).data(), weights[1], weights[2], last_numbers[0], rows, hidden, x.data());

#pragma omp parallel num_threads(static_cast<int>(of.threads))
  {
    const Team team;
    std::vector<float> normed(rows * hidden), scores(tokens);
    const auto share = [&](int64_t count) { return Share(count, kMostRows, team); };
    // Norms are so short that each thread does all of them, which saves waiting for another.
    for (int64_t layer = 0; layer < of.layers; ++layer) {
      const T* const* weight = weights + 3 + layer * kOfLayer;
      const float* number = numbers + 4 * layer;

      norm(x.data(), weight[kNorm1], weight[kNorm1Bias], number[0], rows, hidden, normed.data());
      products(weight[kQkv], weight[kQkvBias], normed.data(), rows, hidden, share(3 * hidden),
               [&](int64_t b, int64_t n, float value) { fused[b * 3 * hidden + n] = value; });
#pragma omp barrier
      const Share pairs(rows * of.heads, 1, team);
      for (int64_t pair = pairs.begin; pair < pairs.end; ++pair) {
        const int64_t b = pair / of.heads, head = pair % of.heads;
        const float* query = fused.data() + (b * of.heads + head) * 3 * size;
        T* keys = cache[2 * layer] + pair * of.capacity * size;
        T* values = cache[2 * layer + 1] + pair * of.capacity * size;
        attend(query, query + size, query + 2 * size, keys, values, place.data() + b * tokens,
               slopes[head] * number[3], number[2], tokens, size, scores.data(), mixed.data() + pair * size);
      }
#pragma omp barrier
      const bool of_norm = of.residual_of_norm != 0;
      products(weight[kDense], weight[kDenseBias], mixed.data(), rows, hidden, share(hidden),
               [&](int64_t b, int64_t n, float value) {
                 float& place_of = x[b * hidden + n];
                 place_of = value + (of_norm ? normed[b * hidden + n] : place_of);
               });
#pragma omp barrier
      norm(x.data(), weight[kNorm2], weight[kNorm2Bias], number[1], rows, hidden, normed.data());
      const Share ours = share(of.inner);
      products(weight[kUp], weight[kUpBias], normed.data(), rows, hidden, ours,
               [&](int64_t b, int64_t n, float value) { inner[b * of.inner + n] = value; });
      for (int64_t b = 0; b < rows; ++b)
        each(inner.data() + b * of.inner + ours.begin, ours.end - ours.begin, gelu);
#pragma omp barrier
      products(weight[kDown], weight[kDownBias], inner.data(), rows, of.inner, share(hidden),
               [&](int64_t b, int64_t n, float value) {
                 float& place_of = x[b * hidden + n];
                 place_of = value + (of_norm ? normed[b * hidden + n] : place_of);
               });
#pragma omp barrier
    }
    const T* const* last = weights + 3 + of.layers * kOfLayer;
    norm(x.data(), last[0], last[1], last_numbers[1], rows, hidden, normed.data());
    products(last[2], static_cast<const T*>(nullptr), normed.data(), rows, hidden, share(of.vocabulary),
             [&](int64_t b, int64_t n, float value) { store(logits + b * of.vocabulary + n, value); });
  }
}

}  // namespace

// What Python calls; `bits` is 32 for float, 16 for bfloat16.
extern "C" {

void harness_bloom_linear(int bits, const void* weight, const void* bias, const void* x, void* y, int64_t rows,
                          int64_t width, int64_t outputs, int with_gelu, int threads) {
  if (bits == 32) {
    linear(static_cast<const float*>(weight), static_cast<const float*>(bias), static_cast<const float*>(x),
           static_cast<float*>(y), rows, width, outputs, with_gelu != 0, threads);
  } else {
    linear(static_cast<const BFloat16*>(weight), static_cast<const BFloat16*>(bias), static_cast<const BFloat16*>(x),
           static_cast<BFloat16*>(y), rows, width, outputs, with_gelu != 0, threads);
  }
}

void harness_bloom_step(int bits, const int64_t* sizes, const void* const* weights, const float* numbers,
                        const float* slopes, const int64_t* ids, const int64_t* mask, void* const* cache,
                        void* logits) {
  Sizes of;
  std::memcpy(&of, sizes, sizeof of);
  if (bits == 32) {
    step(of, reinterpret_cast<const float* const*>(weights), numbers, slopes, ids, mask,
         reinterpret_cast<float* const*>(cache), static_cast<float*>(logits));
  } else {
    step(of, reinterpret_cast<const BFloat16* const*>(weights), numbers, slopes, ids, mask,
         reinterpret_cast<BFloat16* const*>(cache), static_cast<BFloat16*>(logits));
  }
}

// Reads memory with the same threads, and does nothing else: what bounds a step. Returns a sum that depends on all of it.
uint64_t harness_bloom_read(const void* from, int64_t bytes, int threads) {
  uint64_t all = 0;
  const int64_t words = bytes / 8;
#pragma omp parallel num_threads(threads) reduction(+ : all)
  {
    const Team team;
    using Eight = uint64_t __attribute__((vector_size(64)));
    const Share share(words, 32, team);
    const auto* at = static_cast<const uint64_t*>(from);
    Eight sums[4] = {};
    int64_t i = share.begin;
    for (; i + 32 <= share.end; i += 32) {
      for (int k = 0; k < 4; ++k) {
        Eight eight;
        std::memcpy(&eight, at + i + 8 * k, sizeof eight);
        sums[k] += eight;
      }
    }
    for (int k = 0; k < 4; ++k)
      for (int j = 0; j < 8; ++j) all += sums[k][j];
    for (; i < share.end; ++i) all += at[i];
  }
  return all;
}
}
