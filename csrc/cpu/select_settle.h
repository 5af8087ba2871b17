// `resolve`: after the scan of a layer, the exact cut among the keys within its window, or the next guess.
#pragma once
#include "select_window.h"

namespace {

// Widths for the next window, from how far the threshold moved and how many scores a key is worth here.
template <class K>
static void learn(Layer& layer, K threshold, int64_t within) {
  double* hint = layer.hint;
  if (!hint) return;
  const double dense = double(within) / (double(layer.hi) - double(layer.lo) + 1);  // scores a key, about the threshold
  const auto half = [&](double share) { return share * double(layer.n) / (2 * dense); };
  const bool known = hint[1] > 0 && std::isfinite(hint[0]) && std::isfinite(hint[1]);
  double next = half(1. / 64);
  if (known) next = std::max(4 * std::abs(double(threshold) - hint[0]), layer.missed ? 0 : .75 * hint[1]);
  next = std::clamp(next, half(std::min(1. / 8192 + 32 / double(layer.n), 1. / 16)), half(1. / 16));
  hint[0] = double(threshold);
  hint[1] = std::max(next, .5);
  hint[2] = double(within);
  hint[3] = (hint[3] >= 0 && hint[3] < 1e15 ? hint[3] : 0) + double(layer.missed);
}

// What is kept of the scores within the window: keys above `key`, and of those equal to it the ordinals [from, to).
template <class K>
struct Cut {
  K key;
  int64_t from, to;
};

// The set bits of `ties` whose ordinals are kept; the first has the given ordinal.
static inline uint64_t kept_ties(uint64_t ties, int count, int64_t from, int64_t to, int64_t ordinal) {
  if (ordinal >= from && ordinal + count <= to) return ties;
  if (ordinal + count <= from || ordinal >= to) return 0;
  uint64_t kept = 0;
  for (uint64_t rest = ties; rest; rest &= rest - 1, ordinal++)
    if (ordinal >= from && ordinal < to) kept |= rest & -rest;
  return kept;
}

// Opens the bits of one chunk's pieces. `keys` lists the keys within the window in order, or is null where all equal the cut's;
// `ordinal` counts the ties so far.
template <class K>
static void settle_portable(const Piece* p, int64_t count, const K* keys, Cut<K> cut, Word* bits, int64_t& ordinal) {
  for (const Piece* last = p + count; p < last; p++) {
    uint64_t above = 0, ties = p->within;
    if (keys) {
      ties = 0;
      for (uint64_t rest = p->within; rest; rest &= rest - 1, keys++) {
        const uint64_t bit = rest & -rest;
        above |= *keys > cut.key ? bit : 0;
        ties |= *keys == cut.key ? bit : 0;
      }
    }
    const int tied = __builtin_popcountll(ties);
    bits[p->word] |= above | kept_ties(ties, tied, cut.from, cut.to, ordinal);
    ordinal += tied;
  }
}

template <class K>
SK_AVX512 static void settle_avx512(const Piece* p, int64_t count, const K* keys, Cut<K> cut, Word* bits, int64_t& ordinal) {
  constexpr int kLanes = 64 / sizeof(K);
  for (const Piece* last = p + count; p < last; p++) {
    uint64_t above = 0, ties = p->within;
    if (keys) {
      const int size = __builtin_popcountll(p->within);
      uint64_t reached = 0;
      for (int j = 0; j < size; j += kLanes) {
        const __m512i block = _mm512_loadu_si512(keys + j);
        above |= greater(block, cut.key) << j;
        reached |= greater(block, static_cast<K>(cut.key - 1)) << j;
      }
      above = _pdep_u64(above, p->within);
      ties = _pdep_u64(reached, p->within) & ~above;
      keys += size;
    }
    const int tied = __builtin_popcountll(ties);
    bits[p->word] |= above | kept_ties(ties, tied, cut.from, cut.to, ordinal);
    ordinal += tied;
  }
}

static void settle_avx512(const Piece* p, int64_t count, const int64_t* keys, Cut<int64_t> cut, Word* bits, int64_t& ordinal) {
  settle_portable(p, count, keys, cut, bits, ordinal);
}

// The effective weights of the bits that were opened after the scan, one by one: each costs cache lines that are long gone.
template <class T>
static void open_weights(const Layer& layer, const Piece* p, int64_t count) {
  const Word* bits = reinterpret_cast<const Word*>(layer.bits);  // auto would take them for aligned ones
  const auto* weight = static_cast<const T*>(layer.weight);
  auto* w_eff = static_cast<T*>(layer.w_eff);
  for (const Piece* last = p + count; p < last; p++)
    for (uint64_t rest = bits[p->word] & p->within; rest; rest &= rest - 1) {
      const int64_t i = p->word * 64 + __builtin_ctzll(rest);
      w_eff[i] = weight[i];
    }
}

// Completes a scanned layer, or moves it to the next stage where the window has missed.
template <class K>
static void resolve(Layer& layer, Workspace& space, Ties ties) {
  const Chunk* const begin = space.chunks.data() + layer.first_chunk;
  const Chunk* const end = begin + layer.chunks;
  const bool one_key = layer.lo == layer.hi;
  int64_t above = 0, within = 0, listed = 0;
  for (const Chunk* c = begin; c < end; c++) above += c->above, within += c->within, listed += c->keys_found;
  if (layer.k == 0 || layer.k == layer.n) {
    layer.stage = Stage::done;
    return;
  }
  if (above >= layer.k || above + within < layer.k || (!one_key && listed < within)) {
    layer.stage = layer.stage == Stage::hint ? Stage::sample : Stage::exact;
    layer.missed++;
    return;
  }
  const K* const all_keys = space.keys.get<K>(0);
  Rank<K> found = {static_cast<K>(layer.lo), layer.k - above, within};
  if (!one_key) {
    K* list = space.scratch.get<K>(within + kSlack);
    int64_t m = 0;
    for (const Chunk* c = begin; c < end; m += c->keys_found, c++)
      std::memcpy(list + m, all_keys + c->keys, c->keys_found * sizeof(K));
    found = rank(list, m, static_cast<K>(layer.lo), static_cast<K>(layer.hi), layer.k - above);
  }
  learn(layer, found.key, within);
  const Cut<K> cut = {found.key, ties == Ties::last ? found.ties - found.need : 0, ties == Ties::first ? found.need : found.ties};
  Word* bits = reinterpret_cast<Word*>(layer.bits);
  const auto* all_pieces = space.pieces.get<Piece>(0);
  const bool wide = is_avx512();
  int64_t ordinal = 0;
  for (const Chunk* c = begin; c < end; c++) {
    const Piece* const pieces = all_pieces + c->pieces;
    const K* const keys = one_key ? nullptr : all_keys + c->keys;
    if (wide)
      settle_avx512(pieces, c->pieces_found, keys, cut, bits, ordinal);
    else
      settle_portable(pieces, c->pieces_found, keys, cut, bits, ordinal);
    if (layer.weight_size == 2) open_weights<uint16_t>(layer, pieces, c->pieces_found);
    if (layer.weight_size == 4) open_weights<uint32_t>(layer, pieces, c->pieces_found);
    if (layer.weight_size == 8) open_weights<uint64_t>(layer, pieces, c->pieces_found);
  }
  layer.stage = Stage::done;
}

}  // namespace
