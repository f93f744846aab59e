// SPDX-License-Identifier: Apache-2.0
// Exact products, conversion and weighted sums of rows, and the k-th largest of a list. Included
// INSIDE an ISA namespace, after vec-inl.h.

// R rows at once, which share the loads of w and fetch those at `next`; the sums of a row do not
// depend on R. (Widening w to float64 once for all rows is no faster: most features
// have few rows.)
template <int R>
void exact_rows(const float* w, const void* next, const float* x, int64_t x_row,
                const int32_t* which, int64_t n, double* out) {
  typedef double Doubles __attribute__((vector_size(4 * kLanes)));
  typedef float Halves __attribute__((vector_size(2 * kLanes)));
  constexpr int kStep = kLanes / 2;
  static_assert(kGroup % (2 * kStep) == 0, "rows hold whole steps");
  const auto widened = [](const float* from) {
    Halves value;
    __builtin_memcpy(&value, from, sizeof(value));
    return __builtin_convertvector(value, Doubles);
  };
  const float* row[R];
  for (int i = 0; i < R; ++i) row[i] = x + which[i] * x_row;
  Doubles sum[R][2] = {};
  for (int64_t group = 0; group < n; group += kGroup) {
    __builtin_prefetch(static_cast<const float*>(next) + group, 0, 2);
#pragma GCC unroll 8
    for (int step = 0; step < kGroup / kStep; ++step) {
      const int64_t c = group + step * kStep;
      const Doubles weight = widened(w + c);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) sum[i][step % 2] += widened(row[i] + c) * weight;
    }
  }
  for (int i = 0; i < R; ++i) {
    const Doubles both = sum[i][0] + sum[i][1];
    out[i] = 0.0;
    for (int lane = 0; lane < kStep; ++lane) out[i] += both[lane];
  }
}

// Calls body with the data as what it is.
template <class F>
inline void with_type(const void* data, Dtype dtype, const F& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(static_cast<const float*>(data));
    case Dtype::kFloat16:
      return body(static_cast<const Half*>(data));
    case Dtype::kBFloat16:
      return body(static_cast<const BFloat*>(data));
  }
}

template <class T>
void load_typed(const T* from, int64_t n, const float* minus, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    F32 v = load(from + c);
    if (minus != nullptr) v -= load(minus + c);
    store(to + c, v);
  }
  if (c < n) {
    F32 v = load_tail(from + c, n - c);
    if (minus != nullptr) v -= load_tail(minus + c, n - c);
    store_tail(to + c, v, n - c);
  }
}

// V vectors of columns at once, from column c on, which stay in registers over all rows.
template <int V, bool kTail, class T>
void sum_columns(const T* data, int64_t row_stride, const Term* terms, int64_t count,
                 const float* minus, int64_t c, int64_t n, float* out) {
  F32 sum[V] = {}, less[V] = {};
  if (minus != nullptr) {
    for (int v = 0; v < V; ++v) {
      less[v] = kTail ? load_tail(minus + c, n - c) : load(minus + c + v * kLanes);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const T* row = data + terms[i].row * row_stride + c;
    for (int v = 0; v < V; ++v) {
      const F32 value = kTail ? load_tail(row, n - c) : load(row + v * kLanes);
      sum[v] += terms[i].scale * (value - less[v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    if (kTail) {
      store_tail(out + c, sum[v], n - c);
    } else {
      store(out + c + v * kLanes, sum[v]);
    }
  }
}

template <class T>
void sum_typed(const T* data, int64_t row_stride, const Term* terms, int64_t count,
               const float* minus, int64_t n, float* out) {
  int64_t c = 0;
  for (; c + 8 * kLanes <= n; c += 8 * kLanes) {
    sum_columns<8, false>(data, row_stride, terms, count, minus, c, n, out);
  }
  for (; c + kLanes <= n; c += kLanes) {
    sum_columns<1, false>(data, row_stride, terms, count, minus, c, n, out);
  }
  if (c < n) sum_columns<1, true>(data, row_stride, terms, count, minus, c, n, out);
}

inline U32 load_numbers(const uint32_t* p) {
  U32 v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

int64_t count_from(const uint32_t* numbers, int64_t n, uint32_t least) {
  U32 counts = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    counts -= bits_as<U32>(load_numbers(numbers + i) >= least);  // a lane that holds is -1
  }
  int64_t count = 0;
  for (int lane = 0; lane < kLanes; ++lane) count += counts[lane];
  return count;
}

uint32_t smallest_from(const uint32_t* numbers, int64_t n, uint32_t least) {
  U32 most = U32{} - 1;
  for (int64_t i = 0; i < n; i += kLanes) {
    const U32 v = load_numbers(numbers + i);
    const U32 above = v < least ? U32{} - 1 : v;
    most = above < most ? above : most;
  }
  uint32_t found = most[0];
  for (int lane = 1; lane < kLanes; ++lane) found = most[lane] < found ? most[lane] : found;
  return found;
}
