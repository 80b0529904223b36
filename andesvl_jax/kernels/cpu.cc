// What decoding on CPU spends its time on: the products of a few rows with large matrices, attention of a few queries to the KV
// cache and to their own tokens, and the writes into that cache. Each number in memory is read once. Weights and cache are float32
// or bfloat16, the cache also int8 with scales, and are widened in registers; all else is float32; everything is row-major without padding. Each number of a result is summed by one thread in one order, so it
// depends neither on the number of threads, nor on which of them does what, nor on the other rows.

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kPartBytes = 1 << 18;  // of weights: long beside waking a thread, short beside a whole matrix

// Sixteen numbers at a time, in the vector types of GCC and Clang: one 512-bit register, or as many narrower ones as it takes.
constexpr int64_t kWide = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

struct BFloat16 { uint16_t bits; };

template <typename V, typename T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline Floats wide(const float* w) { return load<Floats>(w); }

inline Floats wide(const BFloat16* w) {
#ifdef __AVX512F__  // GCC splits the conversion below in two and joins the halves again, which takes twice as long
  const Words words = (Words)_mm512_cvtepu16_epi32(load<__m256i>(w));
#else
  const Words words = __builtin_convertvector(load<Halves>(w), Words);
#endif
  return (Floats)(words << 16);
}

inline Floats wide(const int8_t* w) { return __builtin_convertvector(load<Bytes>(w), Floats); }

// The last few numbers of a row, filled up with zeros.
template <typename T>
inline Floats wide(const T* w, int64_t count) {
  T padded[kWide] = {};
  std::memcpy(padded, w, count * sizeof(T));
  return wide(padded);
}

inline float sum(Floats v) {
  float t[kWide];
  std::memcpy(t, &v, sizeof(t));
  for (int half = kWide / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) t[k] += t[k + half];
  return t[0];
}

struct Shape { int64_t rows, in, out; };

// y[r] = sum_i x[r, i] * w[i] for R rows. One w at a time: its numbers are one run through memory, which the processor's
// prefetching follows at full speed; several at once ran at half of it.
template <int R, typename T>
void dot(const T* w, const float* x, float* y, Shape s) {
  constexpr int kSums = 2;  // per row, because one sum would wait for itself
  Floats sums[R][kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWide <= s.in; i += kSums * kWide)
    for (int k = 0; k < kSums; ++k) {
      const Floats v = wide(w + i + k * kWide);
      for (int r = 0; r < R; ++r) sums[r][k] += v * wide(x + r * s.in + i + k * kWide);
    }
  for (; i < s.in; i += kWide) {
    const int64_t count = std::min(kWide, s.in - i);
    const Floats v = wide(w + i, count);
    for (int r = 0; r < R; ++r) sums[r][0] += v * wide(x + r * s.in + i, count);
  }
  for (int r = 0; r < R; ++r) {
    for (int k = 1; k < kSums; ++k) sums[r][0] += sums[r][k];
    y[r * s.out] = sum(sums[r][0]);
  }
}

// y[r, o] = sum_i x[r, i] * w[o, i] for o in first..last; w[o] stays in cache while the rows pass over it.
template <typename T>
void dots(const T* w, const float* x, float* y, Shape s, int64_t first, int64_t last) {
  for (int64_t o = first; o < last; ++o) {
    const T* from = w + o * s.in;
    int64_t r = 0;
    for (; r + 4 <= s.rows; r += 4) dot<4>(from, x + r * s.in, y + r * s.out + o, s);
    for (; r < s.rows; ++r) dot<1>(from, x + r * s.in, y + r * s.out + o, s);
  }
}

// Calls part(p) for p in 0..parts on this thread and on those of XLA's pool that are free. This thread never waits for a
// part that nobody has begun, so it cannot hang on a pool whose threads are all busy with other products.
template <typename Part>
void in_parts(ffi::ThreadPool& pool, int64_t parts, const Part& part) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();  // outlives this call where a helper wakes late and finds nothing to do
  auto work = [state, parts, &part] {
    for (int64_t p; (p = state->next.fetch_add(1)) < parts;) {
      part(p);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t helpers = std::min(parts, pool.num_threads()) - 1; helpers > 0; --helpers) pool.Schedule(std::decay_t<decltype(work)>(work));
  work();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < parts; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

template <typename T>
void product(ffi::ThreadPool& pool, const T* w, const float* x, float* y, Shape s) {
  const int64_t parts = std::clamp<int64_t>(s.in * s.out * int64_t{sizeof(T)} / kPartBytes, 1, std::max<int64_t>(s.out, 1));
  in_parts(pool, parts, [&](int64_t p) { dots(w, x, y, s, s.out * p / parts, s.out * (p + 1) / parts); });
}

// e^x in single precision, and 0 where that would be subnormal: 2^n times the series of e^r with |r| <= ln(2) / 2.
inline Floats exponential(Floats x) {
  const Floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to the nearest whole number
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats e = r * (1.0f / 5040) + 1.0f / 720;
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) e = e * r + c;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  return (Floats)((Words)(e * (Floats)power) & (Words)(x > -87.0f));
}

struct Heads { int64_t batch, tokens, heads, kv_heads, slots, width; };

// y[r, 0..U] = sum_c weight[r, c] * values[c, 0..U] + sum_d weight[r, used + d] * own[d, 0..U] for R rows and U vectors
template <int R, int U, typename T>
void mix(const T* values, int64_t used, const float* own, int64_t owned, const float* weight, float* const* y, int64_t stride,
         int64_t width) {
  Floats sums[R][U] = {};
  const auto add = [&](const auto* from, const float* w, int64_t count) {
    for (int64_t c = 0; c < count; ++c) {
      Floats v[U];
      for (int u = 0; u < U; ++u) v[u] = wide(from + c * width + u * kWide);
      for (int r = 0; r < R; ++r)
        for (int u = 0; u < U; ++u) sums[r][u] += w[r * stride + c] * v[u];
    }
  };
  add(values, weight, used);
  add(own, weight + used, owned);
  for (int r = 0; r < R; ++r) std::memcpy(y[r], sums[r], sizeof(sums[r]));
}

// The arguments of attention for one batch row and kv head: cached keys and values [C, H] of the slots at `positions`, their
// scales [C] or null, own ones [T, H], `at` [T], `mask` [T, T] or null.
template <typename T>
struct Head {
  const T *keys, *values;
  const float *key_scales, *value_scales;
  const int32_t* positions;
  const float *own_keys, *own_values;
  const int32_t* at;
  const bool* mask;
};

// All queries of one batch row that share a kv head. A query at `at` sees slots and own tokens at 0..at; one that sees none gets 0.
template <typename T>
void attend_head(const float* q, const Head<T>& head, float* y, Heads h) {
  const int64_t group = h.heads / h.kv_heads, rows = h.tokens * group;
  const bool padding = std::all_of(head.at, head.at + h.tokens, [](int32_t at) { return at < 0; });
  int64_t used = padding ? 0 : h.slots;
  while (used && head.positions[used - 1] < 0) --used;
  const int64_t stride = (used + h.tokens + kWide - 1) / kWide * kWide;
  thread_local std::vector<float> memory;  // kept from call to call
  memory.resize(std::max<size_t>(memory.size(), rows * (h.width + stride)));
  float *queries = memory.data(), *weights = queries + rows * h.width;
  const auto place = [&](int64_t r) { return (r / group * h.heads + r % group) * h.width; };
  const float scale = 1 / std::sqrt(float(h.width));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < h.width; ++k) queries[r * h.width + k] = q[place(r) + k] * scale;

  const Shape shape{rows, h.width, stride};
  dots(head.keys, queries, weights, shape, 0, used);
  dots(head.own_keys, queries, weights + used, shape, 0, h.tokens);

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = r / group;
    float *w = weights + r * stride, most = -INFINITY;
    if (head.key_scales)
      for (int64_t c = 0; c < used; ++c) w[c] *= head.key_scales[c];
    for (int64_t c = 0; c < used; ++c) {
      if (head.positions[c] < 0 || head.positions[c] > head.at[t]) w[c] = -INFINITY;
      most = std::max(most, w[c]);
    }
    for (int64_t d = 0; d < h.tokens; ++d) {
      float& own = w[used + d];
      if (head.at[d] < 0 || head.at[d] > head.at[t] || (head.mask && !head.mask[t * h.tokens + d])) own = -INFINITY;
      most = std::max(most, own);
    }
    std::fill(w + used + h.tokens, w + stride, -INFINITY);
    if (most == -INFINITY) most = 0;
    Floats total = {};
    for (int64_t c = 0; c < stride; c += kWide) {
      const Floats e = exponential(wide(w + c) - most);
      total += e;
      std::memcpy(w + c, &e, sizeof(e));
    }
    const float sums = sum(total), inverse = sums > 0 ? 1 / sums : 0;
    for (int64_t c = 0; c < stride; ++c) w[c] *= inverse;
    if (head.value_scales)
      for (int64_t c = 0; c < used; ++c) w[c] *= head.value_scales[c];
  }

  const auto columns = [&](auto vectors, int64_t k) {
    const auto block = [&](auto count, int64_t r) {
      float* to[count];
      for (int i = 0; i < count; ++i) to[i] = y + place(r + i) + k;
      mix<count, vectors>(head.values + k, used, head.own_values + k, h.tokens, weights + r * stride, to, stride, h.width);
    };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) block(std::integral_constant<int, 4>(), r);
    for (; r + 2 <= rows; r += 2) block(std::integral_constant<int, 2>(), r);
    for (; r < rows; ++r) block(std::integral_constant<int, 1>(), r);
  };
  int64_t k = 0;
  for (; k + 4 * kWide <= h.width; k += 4 * kWide) columns(std::integral_constant<int, 4>(), k);
  for (; k < h.width; k += kWide) columns(std::integral_constant<int, 1>(), k);
}

// `all` holds the arguments of the first batch row and kv head.
template <typename T>
void attend(ffi::ThreadPool& pool, const float* q, const Head<T>& all, float* y, Heads h) {
  in_parts(pool, h.batch * h.kv_heads, [&](int64_t p) {
    const int64_t b = p / h.kv_heads, first = (b * h.tokens * h.heads + p % h.kv_heads * (h.heads / h.kv_heads)) * h.width;
    const int64_t kv = p * h.slots * h.width, own = p * h.tokens * h.width;
    const auto shifted = [](auto* from, int64_t by) { return from ? from + by : nullptr; };
    attend_head<T>(q + first,
                   {all.keys + kv, all.values + kv, shifted(all.key_scales, p * h.slots), shifted(all.value_scales, p * h.slots),
                    all.positions + p * h.slots, all.own_keys + own, all.own_values + own, all.at + b * h.tokens,
                    shifted(all.mask, b * h.tokens * h.tokens)},
                   y + first, h);
  });
}

// ---- what XLA calls

ffi::Error few_rows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> y) {
  const auto xs = x.dimensions(), ws = w.dimensions(), ys = y->dimensions();
  if (xs.size() != 2 || ws.size() != 2 || ys.size() != 2 || xs[0] != ys[0] || xs[1] != ws[1] || ys[1] != ws[0])
    return ffi::Error::InvalidArgument("few_rows: shapes do not fit, expected x [r, i], w [o, i], y [r, o]");
  const Shape s{xs[0], xs[1], ys[1]};
  const auto run = [&](auto type) {
    product(pool, static_cast<const decltype(type)*>(w.untyped_data()), x.typed_data(), y->typed_data(), s);
    return ffi::Error::Success();
  };
  if (w.element_type() == ffi::F32) return run(float());
  if (w.element_type() == ffi::BF16) return run(BFloat16());
  return ffi::Error::InvalidArgument("few_rows: weights must be float32 or bfloat16");
}

// y[n, :] = table[ids[n], :]; ids beyond the table take its first or last row.
ffi::Error rows_of(ffi::Buffer<ffi::S32> ids, ffi::Buffer<ffi::BF16> table, ffi::ResultBuffer<ffi::F32> y) {
  const auto ts = table.dimensions(), ys = y->dimensions();
  if (ts.size() != 2 || ys.size() != 2 || ts[0] < 1 || ts[1] != ys[1] || int64_t(ids.element_count()) != ys[0])
    return ffi::Error::InvalidArgument("rows_of: shapes do not fit, expected ids [n], table [e, d], y [n, d]");
  const auto* from = static_cast<const BFloat16*>(table.untyped_data());
  for (int64_t n = 0; n < ys[0]; ++n) {
    const BFloat16* row = from + std::clamp<int64_t>(ids.typed_data()[n], 0, ts[0] - 1) * ts[1];
    float* to = y->typed_data() + n * ts[1];
    for (int64_t k = 0; k < ts[1]; k += kWide) {
      const int64_t count = std::min(kWide, ts[1] - k);
      const Floats v = wide(row + k, count);
      std::memcpy(to + k, &v, count * sizeof(float));
    }
  }
  return ffi::Error::Success();
}

// A matrix in float32. `after` is not read: it is what has to be there before, else XLA would widen all matrices of a model at once.
ffi::Error widened(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> w, ffi::AnyBuffer after, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t size = w.element_count();
  if (int64_t(y->element_count()) != size) return ffi::Error::InvalidArgument("widened: shapes differ");
  const auto* from = static_cast<const BFloat16*>(w.untyped_data());
  float* to = y->typed_data();
  const int64_t vectors = size / kWide, parts = std::clamp<int64_t>(2 * size / kPartBytes, 1, std::max<int64_t>(vectors, 1));
  in_parts(pool, parts, [&](int64_t p) {
    for (int64_t k = vectors * p / parts; k < vectors * (p + 1) / parts; ++k) {
      const Floats v = wide(from + k * kWide);
      std::memcpy(to + k * kWide, &v, sizeof(v));
    }
  });
  for (int64_t k = vectors * kWide; k < size; ++k) to[k] = wide(from + k, 1)[0];
  return ffi::Error::Success();
}

// One layer of a cache: keys and values [L, B, K, C, H], the positions of their slots [L, B, K, C]; q, y [B, T, N, H], at [B, T],
// own keys and values [B, K, T, H], mask [B, T, T] or empty, scales of int8 keys and values [L, B, K, C] or empty.
ffi::Error few_queries(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                       ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> at, ffi::Buffer<ffi::S32> layer,
                       ffi::Buffer<ffi::F32> own_keys, ffi::Buffer<ffi::F32> own_values, ffi::Buffer<ffi::PRED> mask,
                       ffi::Buffer<ffi::F32> key_scales, ffi::Buffer<ffi::F32> value_scales, ffi::ResultBuffer<ffi::F32> y) {
  const auto qs = q.dimensions(), ks = keys.dimensions(), vs = values.dimensions(), ps = positions.dimensions();
  if (qs.size() != 4 || ks.size() != 5 || ps.size() != 4 || !std::equal(ks.begin(), ks.end(), vs.begin(), vs.end()) ||
      !std::equal(ps.begin(), ps.end(), ks.begin()) || ks[1] != qs[0] || ks[4] != qs[3] || qs[2] % ks[2] || qs[3] % kWide ||
      at.element_count() != size_t(qs[0] * qs[1]) || layer.element_count() != 1 || y->element_count() != q.element_count() ||
      keys.element_type() != values.element_type() || own_keys.element_count() != size_t(qs[0] * ks[2] * qs[1] * qs[3]) ||
      own_values.element_count() != own_keys.element_count() ||
      key_scales.element_count() != value_scales.element_count() ||
      (keys.element_type() == ffi::S8) != (key_scales.element_count() > 0) ||
      (key_scales.element_count() && key_scales.element_count() != positions.element_count()) ||
      (mask.element_count() && mask.element_count() != size_t(qs[0] * qs[1] * qs[1])))
    return ffi::Error::InvalidArgument("few_queries: shapes do not fit each other, or heads are no multiple of 16 wide");
  const int64_t index = layer.typed_data()[0];
  if (index < 0 || index >= ks[0]) return ffi::Error::InvalidArgument("few_queries: the cache has no such layer");
  const Heads h{qs[0], qs[1], qs[2], ks[2], ks[3], ks[4]};
  const int64_t slots = index * ks[1] * ks[2] * ks[3];
  const auto run = [&](auto type) {
    using T = decltype(type);
    const Head<T> all{static_cast<const T*>(keys.untyped_data()) + slots * h.width,
                      static_cast<const T*>(values.untyped_data()) + slots * h.width,
                      key_scales.element_count() ? key_scales.typed_data() + slots : nullptr,
                      value_scales.element_count() ? value_scales.typed_data() + slots : nullptr,
                      positions.typed_data() + slots,
                      own_keys.typed_data(),
                      own_values.typed_data(),
                      at.typed_data(),
                      mask.element_count() ? mask.typed_data() : nullptr};
    attend<T>(pool, q.typed_data(), all, y->typed_data(), h);
    return ffi::Error::Success();
  };
  if (keys.element_type() == ffi::F32) return run(float());
  if (keys.element_type() == ffi::BF16) return run(BFloat16());
  if (keys.element_type() == ffi::S8) return run(int8_t());
  return ffi::Error::InvalidArgument("few_queries: the cache must be float32, bfloat16 or int8");
}

// Rows [L, B, K, T, ...] into x [L, B, K, C, ...] at slots [L, B, K, T]; a slot that x lacks is skipped. y is x where XLA owns it.
ffi::Error write_array(ffi::AnyBuffer x, ffi::AnyBuffer rows, ffi::Buffer<ffi::S32> slots, ffi::Result<ffi::AnyBuffer> y) {
  const auto xs = x.dimensions(), rs = rows.dimensions(), ss = slots.dimensions();
  if (xs.size() < 4 || rs.size() != xs.size() || ss.size() != 4 || !std::equal(ss.begin(), ss.end(), rs.begin()) ||
      !std::equal(xs.begin(), xs.begin() + 3, rs.begin()) || !std::equal(xs.begin() + 4, xs.end(), rs.begin() + 4) ||
      x.element_type() != rows.element_type() || y->size_bytes() != x.size_bytes())
    return ffi::Error::InvalidArgument("write_slots: shapes or types do not fit, expected x [l, b, k, c, ..], rows [l, b, k, t, ..]");
  char* to = static_cast<char*>(y->untyped_data());
  if (to != x.untyped_data()) std::memcpy(to, x.untyped_data(), x.size_bytes());
  const int64_t written = slots.element_count(), heads = ss[0] * ss[1] * ss[2];
  if (!written) return ffi::Error::Success();
  const int64_t bytes = rows.size_bytes() / written, count = ss[3], capacity = xs[3];
  const char* from = static_cast<const char*>(rows.untyped_data());
  for (int64_t p = 0; p < heads; ++p)
    for (int64_t t = 0; t < count; ++t) {
      const int64_t slot = slots.typed_data()[p * count + t];
      if (slot >= 0 && slot < capacity) std::memcpy(to + (p * capacity + slot) * bytes, from + (p * count + t) * bytes, bytes);
    }
  return ffi::Error::Success();
}

// n arrays, then the rows of each: one call, since XLA takes longer to start four than they take to write.
ffi::Error write_slots(ffi::Buffer<ffi::S32> slots, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  if (args.size() != 2 * rets.size()) return ffi::Error::InvalidArgument("write_slots: expected the rows of every array");
  for (size_t i = 0; i < rets.size(); ++i) {
    const auto x = args.get<ffi::AnyBuffer>(i), rows = args.get<ffi::AnyBuffer>(rets.size() + i);
    const auto y = rets.get<ffi::AnyBuffer>(i);
    if (!x.has_value() || !rows.has_value() || !y.has_value()) return ffi::Error::InvalidArgument("write_slots: not an array");
    if (const auto error = write_array(*x, *rows, slots, *y); error.failure()) return error;
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AndesvlFewRows, few_rows,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AndesvlFewQueries, few_queries,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::PRED>>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
        .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AndesvlWriteSlots, write_slots,
    ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::S32>>().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AndesvlRowsOf, rows_of,
    ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::BF16>>().Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AndesvlWidened, widened,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::BF16>>().Arg<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::F32>>());
