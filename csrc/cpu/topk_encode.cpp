// SPDX-License-Identifier: Apache-2.0
// topk_encode on the CPU. Rows are screened in 8 bits against all features; what may belong to the
// result is valued exactly, grouped by feature so that each dictionary row is read once:
//   1. the candidates of a row that the k-th largest screened value hardly rules out are valued;
//      the k-th largest of their values bounds the k-th largest of all from below, and proves that
//      nothing cut off so far belongs to the result;
//   2. the other candidates that may reach that bound are valued, and the k largest are the result.
// What is cut off follows a guess at first; a row that step 1 then does not prove is screened again
// with cuts that are bounds, and one that stays unproven, or cannot be screened, is valued in full.
#include "sidechain/topk_encode.h"

#include <iterator>
#include <numeric>

#include "cpu/topk_rows.h"

namespace sidechain::cpu {
namespace {

// Rows whose candidates are valued together: the more, the more rows share a dictionary row; their
// float32 copies and candidates are the memory of the op beside the packed dictionary.
constexpr int64_t kChunk = 2048;
// Rows too few to pay for packing the dictionary: reading it once in float64 costs as much.
constexpr int64_t kDirectRows = 6;
// Rows from which a few are screened first to tell where the others may start.
constexpr int64_t kPilotFrom = 256;
constexpr int64_t kPilotRows = 2 * kRowPanel;
constexpr int64_t kBatchPilotRows = 64;
constexpr float kPilotShare = 0.9f;
// Shares of an error by which the k-th largest screened value is lowered: to be hardly ever above
// the exact one of a row, and to be about as large.
constexpr float kGuessedShare = 0.3f;
constexpr float kLikelyShare = 0.02f;
// Rows that tell which elements are large.
constexpr int64_t kSampledRows = 128;
// Rows valued in full at a time: the only dense values held.
constexpr int64_t kFullRows = 16;
constexpr int64_t kFeatureGrain = 32;

using List = std::vector<Candidate>;

class Encoder {
 public:
  Encoder(const TopkEncodeParams& params, Isa isa, ParallelFor parallel_for)
      : p_(params),
        kernels_(topk_kernels(isa)),
        parallel_for_(parallel_for),
        dictionary_(p_, kernels_, parallel_for),
        minus_(floats(params.b_pre, params.width, kernels_)) {}

  // Leaves in `lists` what each row [begin, begin + count) keeps: best first, or, for the ragged
  // modes, by ascending feature.
  void encode(int64_t begin, int64_t count) {
    begin_ = begin;
    rows_ = count;
    lists.assign(count, {});
    load_rows();
    if (p_.rows > kDirectRows && begin == 0) dictionary_.pack(large_elements());
    std::vector<int32_t> todo(count);
    std::iota(todo.begin(), todo.end(), 0);
    if (p_.rows > kDirectRows) {
      if (p_.mode != TopkMode::kThreshold && p_.guess != nullptr) {
        todo = screen(todo, Start::kGuess);
      } else if (p_.mode != TopkMode::kThreshold && count >= kPilotFrom) {
        fly_pilot();
        todo = screen(todo, Start::kPilot);
      }
      if (!todo.empty()) todo = screen(todo, Start::kCold);
      fallbacks += static_cast<int64_t>(todo.size());
    }
    value_in_full(todo);
    keep_best();
  }

  std::vector<List> lists;
  int64_t fallbacks = 0;

 private:
  // Where the cut of a row starts: at 0, at the caller's guess, or where the pilot rows say.
  enum class Start { kCold, kGuess, kPilot };

  void load_rows() {
    const int64_t padded = dictionary_.padded();
    x_.reset(new float[rows_ * padded]);
    parallel(parallel_for_, rows_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* to = x_.get() + i * padded;
        kernels_.load_row(row_of(p_.x, begin_ + i), p_.x.dtype, p_.width,
                          minus_.empty() ? nullptr : minus_.data(), dictionary_.bf16(), to);
        std::fill(to + p_.width, to + padded, 0.0f);
      }
    });
  }

  // The elements with most of the energy of the rows, as long as one has more than 16 times the
  // mean of the others: transformers write a few such, and one scale for all of a row would leave
  // the others without bits.
  std::vector<int32_t> large_elements() const {
    const int64_t padded = dictionary_.padded(), width = p_.width;
    const int64_t every = round_up(rows_, kSampledRows) / kSampledRows;
    std::vector<float> energy(width, 0.0f);
    for (int64_t i = 0; i < rows_; i += every) {
      const float* row = x_.get() + i * padded;
      const float norm2 = std::inner_product(row, row + width, row, 0.0f);
      if (!(norm2 < std::numeric_limits<float>::infinity())) continue;
      for (int64_t c = 0; c < width; ++c) energy[c] += row[c] * row[c] / (norm2 + 1e-30f);
    }
    double rest = std::accumulate(energy.begin(), energy.end(), 0.0);
    std::vector<int32_t> order(width);
    std::iota(order.begin(), order.end(), 0);
    const int64_t most = std::min(kMostApart, width / 2);
    std::partial_sort(order.begin(), order.begin() + most, order.end(), [&](int32_t a, int32_t b) {
      return energy[a] != energy[b] ? energy[a] > energy[b] : a < b;
    });
    std::vector<int32_t> large;
    for (int64_t j = 0; j < most; ++j) {
      rest -= energy[order[j]];
      if (!(energy[order[j]] > 16.0 * rest / static_cast<double>(width - j - 1))) break;
      large.push_back(order[j]);
    }
    return large;
  }

  // A few rows tell where the others may start: a little below the least k-th value as a share of
  // |x|, or, for one bound for all rows, below theirs. That spares most candidates; rows that it
  // cuts too high are screened again.
  void fly_pilot() {
    const bool batch = p_.mode == TopkMode::kBatch;
    const int64_t n = batch ? kBatchPilotRows : kPilotRows;
    std::vector<int32_t> ids(n);
    for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>(i * rows_ / n);
    RowSet set(dictionary_, kernels_, parallel_for_, x_.get(), begin_, ids);
    if (batch) {
      screen_rising(set, n * p_.k, guessed_share());
    } else {
      set.screen(0, dictionary_.panels(), p_.k, p_.features, guessed_share());
      for (int64_t i = 0; i < n; ++i) set.raise(i, p_.k, kLikelyShare);
    }
    start_ = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < n; ++i) {
      if (set.dropped[i]) continue;
      start_ = std::min(start_, kPilotShare * set.cut[i] / (batch ? 1.0f : set.length(i)));
    }
  }

  float start_of(const RowSet& set, int64_t i, Start start) const {
    if (start == Start::kGuess) return p_.guess[(begin_ + set.id(i)) * p_.guess_stride];
    const float at = p_.mode == TopkMode::kBatch ? start_ : start_ * set.length(i);
    return start == Start::kPilot && at < std::numeric_limits<float>::infinity() ? at : 0.0f;
  }

  // Returns the rows that stay undecided.
  std::vector<int32_t> screen(const std::vector<int32_t>& ids, Start start) {
    RowSet set(dictionary_, kernels_, parallel_for_, x_.get(), begin_, ids);
    for (int64_t i = 0; i < set.size(); ++i) {
      if (!set.dropped[i]) set.cut[i] = std::max(0.0f, start_of(set, i, start));
    }
    const bool guess = start != Start::kCold;
    switch (p_.mode) {
      case TopkMode::kRows:
        return screen_rows(set, guess);
      case TopkMode::kBatch:
        return screen_batch(set, guess);
      case TopkMode::kThreshold:
        break;
    }
    set.screen(0, dictionary_.panels(), 0, p_.features, 1.0f);
    std::vector<int64_t> from(set.size(), 0), to(set.size());
    for (int64_t i = 0; i < set.size(); ++i) to[i] = set.lists[i].size();
    value(set, from, to);
    return take(set, {});
  }

  std::vector<int32_t> screen_rows(RowSet& set, bool guess) {
    // A list of half the dictionary is no screen; for large k it is the result.
    const int64_t most = std::max(p_.features / 2, std::min(8 * p_.k, p_.features));
    set.screen(0, dictionary_.panels(), p_.k, most, guess ? guessed_share() : 1.0f);
    const int64_t n = set.size();
    std::vector<int64_t> none(n, 0), first(n), all(n);
    parallel(parallel_for_, n, 16, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> orders;
      for (int64_t i = begin; i < end; ++i) first[i] = move_likely(set, i, orders);
    });
    value(set, none, first);
    std::vector<uint8_t> failed(n, 0);
    parallel(parallel_for_, n, 16, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> orders;
      for (int64_t i = begin; i < end; ++i) {
        orders.clear();
        for (int64_t j = 0; j < first[i]; ++j) orders.push_back(order_of(set.lists[i][j].z));
        const float bound = cut_at(kth_largest(kernels_, orders, p_.k));
        failed[i] = bound < set.cut[i] && (guess || dictionary_.certified());
        all[i] = keep_reaching(set, i, first[i], bound);
      }
    });
    value(set, first, all);
    return take(set, failed);
  }

  // The share of the errors that the cut of a row keeps below the k-th largest screened value while
  // it is a guess that the exact values will have to prove. The errors are proven for every pair
  // and eleven standard deviations wide.
  float guessed_share() const { return dictionary_.certified() ? kGuessedShare : 1.0f; }

  // Moves the candidates that the exact k-th value will most likely not rule out to the front and
  // returns their number: valuing them together reads the dictionary once. Without a certificate
  // these are the k largest, ties by lowest index.
  int64_t move_likely(RowSet& set, int64_t i, std::vector<uint32_t>& orders) const {
    List& list = set.lists[i];
    if (static_cast<int64_t>(list.size()) <= p_.k) return static_cast<int64_t>(list.size());
    orders.clear();
    for (const Candidate& c : list) orders.push_back(order_of(c.z));
    const uint32_t kth = kth_largest(kernels_, orders, p_.k);
    if (!dictionary_.certified()) {
      int64_t ties = p_.k;
      for (const Candidate& c : list) ties -= order_of(c.z) > kth;
      return move_front(list, [&](const Candidate& c) {
        const uint32_t order = order_of(c.z);
        return order == kth ? ties-- > 0 : order > kth;
      });
    }
    const auto same = [&](const Candidate& c) { return order_of(c.z) == kth; };
    const Candidate& last = *std::find_if(list.begin(), list.end(), same);
    const float bound = last.z - kLikelyShare * last.error;
    return move_front(list, [&](const Candidate& c) { return !(c.z + c.error < bound); });
  }

  // Moves the candidates that `chosen` holds for, asked in order, to the front.
  template <class F>
  static int64_t move_front(List& list, const F& chosen) {
    int64_t front = 0;
    for (Candidate& c : list) {
      if (chosen(c)) std::swap(c, list[front++]);
    }
    return front;
  }

  // The same with one bound for all rows.
  std::vector<int32_t> screen_batch(RowSet& set, bool guess) {
    const int64_t n = set.size(), budget = p_.rows * p_.k;
    if (guess) {
      set.screen(0, dictionary_.panels(), 0, p_.features, 1.0f);
    } else {
      screen_rising(set, budget, 1.0f);
    }
    std::vector<uint32_t> orders;
    for (int64_t i = 0; i < n; ++i) {
      for (const Candidate& c : set.lists[i]) orders.push_back(order_of(c.z));
    }
    const uint32_t guessed = kth_largest(kernels_, orders, budget);
    std::vector<int64_t> none(n, 0), first(n), all(n);
    for (int64_t i = 0; i < n; ++i) {
      List& list = set.lists[i];
      first[i] = std::partition(list.begin(), list.end(),
                                [&](const Candidate& c) { return order_of(c.z) >= guessed; }) -
                 list.begin();
    }
    value(set, none, first);
    orders.clear();
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < first[i]; ++j) orders.push_back(order_of(set.lists[i][j].z));
    }
    const float bound = cut_at(kth_largest(kernels_, orders, budget));
    std::vector<uint8_t> failed(n, 0);
    for (int64_t i = 0; i < n; ++i) {
      failed[i] = bound < set.cut[i] && (guess || dictionary_.certified());
      all[i] = keep_reaching(set, i, first[i], bound);
    }
    value(set, first, all);
    return take(set, failed);
  }

  // Screens more and more features; after each part all cuts rise to the `budget`-th largest of
  // z - share * error over the rows of the set.
  void screen_rising(RowSet& set, int64_t budget, float share) {
    const int64_t panels = dictionary_.panels(), n = set.size();
    std::vector<uint32_t> orders;
    for (int64_t begin = 0, end = (panels + 15) / 16; begin < panels;
         begin = end, end = std::min(2 * end, panels)) {
      set.screen(begin, end, 0, p_.features, share);
      orders.clear();
      for (int64_t i = 0; i < n; ++i) set.lower_bounds(i, share, orders);
      const float bound = cut_at(kth_largest(kernels_, orders, budget));
      parallel(parallel_for_, n, 16, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          set.cut[i] = std::max(set.cut[i], bound);
          set.prune(i);
        }
      });
    }
  }

  // Moves the candidates from slot `first` on that may reach the bound to the front of them, drops
  // the others and returns how many the list holds.
  static int64_t keep_reaching(RowSet& set, int64_t i, int64_t first, float bound) {
    List& list = set.lists[i];
    const auto end = std::partition(list.begin() + first, list.end(),
                                    [&](const Candidate& c) { return !(c.z + c.error < bound); });
    list.erase(end, list.end());
    return static_cast<int64_t>(list.size());
  }

  // Moves the lists of the decided rows out of the set and returns the other rows.
  std::vector<int32_t> take(RowSet& set, const std::vector<uint8_t>& failed) {
    std::vector<int32_t> rest;
    for (int64_t i = 0; i < set.size(); ++i) {
      if (set.dropped[i] || (!failed.empty() && failed[i])) {
        rest.push_back(set.id(i));
      } else {
        lists[set.id(i)] = std::move(set.lists[i]);
      }
    }
    return rest;
  }

  // Replaces the screened values of slots [from[i], to[i]) by exact ones.
  void value(RowSet& set, const std::vector<int64_t>& from, const std::vector<int64_t>& to) {
    struct Entry {
      int32_t row, slot;
    };
    std::vector<int64_t> at(p_.features + 1, 0);
    for (int64_t i = 0; i < set.size(); ++i) {
      for (int64_t j = from[i]; j < to[i]; ++j) ++at[set.lists[i][j].feature + 1];
    }
    std::partial_sum(at.begin(), at.end(), at.begin());
    std::vector<Entry> entries(at.back());
    std::vector<int64_t> next(at.begin(), at.end() - 1);
    for (int64_t i = 0; i < set.size(); ++i) {
      for (int64_t j = from[i]; j < to[i]; ++j) {
        entries[next[set.lists[i][j].feature]++] = {static_cast<int32_t>(i),
                                                    static_cast<int32_t>(j)};
      }
    }
    parallel(parallel_for_, p_.features, kFeatureGrain, [&](int64_t begin, int64_t end) {
      const auto skip_idle = [&](int64_t f) {
        while (f < end && at[f + 1] == at[f]) ++f;
        return f;
      };
      std::vector<int32_t> which;
      std::vector<double> z;
      std::vector<float> weights(dictionary_.padded());
      for (int64_t f = skip_idle(begin), next; f < end; f = next) {
        next = skip_idle(f + 1);
        const int64_t count = at[f + 1] - at[f];
        which.resize(count);
        z.resize(count);
        const Entry* entry = entries.data() + at[f];
        for (int64_t e = 0; e < count; ++e) which[e] = set.id(entry[e].row);
        products(f, next < end ? next : f, which, weights.data(), z.data());
        for (int64_t e = 0; e < count; ++e) {
          set.lists[entry[e].row][entry[e].slot].z = static_cast<float>(z[e]);
        }
      }
    });
  }

  // The exact values of feature f in rows `which`, while feature `next` is on its way.
  void products(int64_t f, int64_t next, const std::vector<int32_t>& which, float* weights,
                double* z) const {
    const int64_t count = static_cast<int64_t>(which.size());
    const float* w = dictionary_.row(f, weights);
    kernels_.exact(w, x_.get(), dictionary_.padded(), which.data(), count, dictionary_.padded(),
                   dictionary_.source(next), z);
    for (int64_t e = 0; e < count; ++e) z[e] += dictionary_.bias(static_cast<int32_t>(f));
  }

  // Every positive value of the rows becomes a candidate.
  void value_in_full(const std::vector<int32_t>& ids) {
    std::vector<float> z(std::min<int64_t>(kFullRows, ids.size()) * p_.features);
    for (size_t begin = 0; begin < ids.size(); begin += kFullRows) {
      const std::vector<int32_t> which(ids.begin() + begin,
                                       ids.begin() + std::min(begin + kFullRows, ids.size()));
      parallel(parallel_for_, p_.features, kFeatureGrain, [&](int64_t first, int64_t last) {
        std::vector<float> weights(dictionary_.padded());
        std::vector<double> out(which.size());
        for (int64_t f = first; f < last; ++f) {
          products(f, f + 1 < last ? f + 1 : f, which, weights.data(), out.data());
          for (size_t i = 0; i < which.size(); ++i) {
            z[i * p_.features + f] = static_cast<float>(out[i]);
          }
        }
      });
      for (size_t i = 0; i < which.size(); ++i) {
        for (int64_t f = 0; f < p_.features; ++f) {
          const Candidate c = {z[i * p_.features + f], static_cast<int32_t>(f), 0.0f};
          if (order_of(c.z) > 0) lists[which[i]].push_back(c);
        }
      }
    }
  }

  // Leaves the k best positive candidates, best first, ties by lowest index. One number holds value
  // and index: sorting these takes two thirds of the time of sorting candidates.
  void sort_best(List& list, std::vector<uint64_t>& keys) const {
    keys.clear();
    for (const Candidate& c : list) {
      const uint64_t order = order_of(c.z);
      if (order > 0) keys.push_back(order << 32 | ~static_cast<uint32_t>(c.feature));
    }
    std::sort(keys.begin(), keys.end(), std::greater<>());
    list.resize(std::min<size_t>(keys.size(), p_.k));
    for (size_t j = 0; j < list.size(); ++j) {
      const auto order = static_cast<uint32_t>(keys[j] >> 32);
      list[j] = {value_of(order), static_cast<int32_t>(~static_cast<uint32_t>(keys[j])), 0.0f};
    }
  }

  // From exact candidates to the result.
  void keep_best() {
    if (p_.mode == TopkMode::kBatch) keep_best_of_batch();
    parallel(parallel_for_, rows_, 16, [&](int64_t begin, int64_t end) {
      std::vector<uint64_t> keys;
      for (int64_t i = begin; i < end; ++i) {
        List& list = lists[i];
        if (p_.mode == TopkMode::kRows) {
          sort_best(list, keys);
          continue;
        }
        const auto idle = [&](const Candidate& c) {
          return order_of(c.z) == 0 || c.z <= dictionary_.limit(c.feature);
        };
        list.erase(std::remove_if(list.begin(), list.end(), idle), list.end());
        std::sort(list.begin(), list.end(),
                  [](const Candidate& a, const Candidate& b) { return a.feature < b.feature; });
      }
    });
  }

  // Leaves the N * k largest of all rows, ties by lowest position.
  void keep_best_of_batch() {
    const int64_t budget = p_.rows * p_.k;
    std::vector<uint32_t> orders;
    for (const List& list : lists) {
      for (const Candidate& c : list) orders.push_back(order_of(c.z));
    }
    const uint32_t bound = kth_largest(kernels_, orders, budget);
    if (bound == 0) return;
    int64_t ties = budget;
    for (uint32_t order : orders) ties -= order > bound;
    for (List& list : lists) {
      std::sort(list.begin(), list.end(),
                [](const Candidate& a, const Candidate& b) { return a.feature < b.feature; });
      const auto late = [&](const Candidate& c) {
        const uint32_t order = order_of(c.z);
        return order == bound ? ties-- <= 0 : order < bound;
      };
      list.erase(std::remove_if(list.begin(), list.end(), late), list.end());
    }
  }

  const TopkEncodeParams& p_;
  TopkKernels kernels_;
  ParallelFor parallel_for_;
  Dictionary dictionary_;
  std::vector<float> minus_;
  int64_t begin_ = 0, rows_ = 0;
  float start_ = 0.0f;
  std::unique_ptr<float[]> x_;  // [rows, padded]: x - b_pre as the products see it
};

}  // namespace

int64_t topk_encode(const TopkEncodeParams& p, Isa isa, ParallelFor parallel_for, float* values,
                    int32_t* indices) {
  if (p.rows == 0) return 0;
  Encoder encoder(p, isa, parallel_for);
  for (int64_t begin = 0; begin < p.rows; begin += kChunk) {
    const int64_t count = std::min(kChunk, p.rows - begin);
    encoder.encode(begin, count);
    for (int64_t i = 0; i < count; ++i) {
      const List& list = encoder.lists[i];
      const int64_t kept = static_cast<int64_t>(list.size());
      for (int64_t j = 0; j < p.k; ++j) {
        const int64_t to = (begin + i) * p.k + j;
        values[to] = j < kept ? list[j].z : 0.0f;
        indices[to] = j < kept ? list[j].feature : -1;
      }
    }
  }
  return encoder.fallbacks;
}

int64_t topk_encode_ragged(const TopkEncodeParams& p, Isa isa, ParallelFor parallel_for,
                           int64_t* offsets, Allocate allocate, void* context) {
  std::vector<List> lists;
  int64_t fallbacks = 0;
  if (p.rows > 0) {
    Encoder encoder(p, isa, parallel_for);
    // One bound for the whole batch needs all its candidates.
    const int64_t chunk = p.mode == TopkMode::kBatch ? p.rows : kChunk;
    for (int64_t begin = 0; begin < p.rows; begin += chunk) {
      encoder.encode(begin, std::min(chunk, p.rows - begin));
      std::move(encoder.lists.begin(), encoder.lists.end(), std::back_inserter(lists));
    }
    fallbacks = encoder.fallbacks;
  }
  offsets[0] = 0;
  for (int64_t i = 0; i < p.rows; ++i) offsets[i + 1] = offsets[i] + lists[i].size();
  float* values = nullptr;
  int32_t* indices = nullptr;
  allocate(offsets[p.rows], &values, &indices, context);
  for (const List& list : lists) {
    for (const Candidate& c : list) {
      *values++ = c.z;
      *indices++ = c.feature;
    }
  }
  return fallbacks;
}

}  // namespace sidechain::cpu
