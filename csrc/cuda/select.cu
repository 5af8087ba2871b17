// Exact top-k of scores to bits, for many layers in one call: `select`, and `refresh_`, which also writes the effective weight.
//
// One read of the scores. A window of keys that should hold the k-th largest one is guessed (`begin`), from the last call's hint
// or from a sample. The scan writes the bits of all scores above it, counts them, and lists the few inside: the candidates. The
// counts prove the guess, and then the candidates are settled exactly: by a histogram of the window that the scan has made, all
// but those of the bin of the k-th largest, and by the last block of the layer these. Where the counts disprove the guess, the
// scan and the settling run once more with another sample; should that fail too, one block selects from all scores, as it does
// for small layers at once. Both second launches end at once where no layer needs them: nothing waits for the host, and the
// launches depend on sizes alone.
//
// Ties are no special case, because the window is one of key and place: among equal keys the strip of a score decides
// (`Coordinate`), so that constant scores are sampled, bounded and settled as any others are. ties="all" knows no places: its
// window is of whole keys, and one key alone needs no list. Should whole keys be too many to list, the second round finds the key
// with places nevertheless, and a third scan opens its ties wherever they are. Only float64 scores, whose keys leave no room for
// places, go without.
//
// All counts are of whole numbers, and no result depends on the order in which blocks run: the same scores give the same bits and
// hints.
#include <bit>

#include "select_begin.h"
#include "select_scan.h"
#include "select_settle.h"

namespace {

void run(const Place& place, std::vector<Job>& jobs) {
  const auto tiles_of = [](const Job& job) { return job.n > kSmall ? strips(job.n) : 0; };  // a tile is a strip
  with_tables(jobs, tiles_of, [&](auto& table) {
    using T = std::decay_t<decltype(table)>;
    Firsts<T> first_block = {}, first_segment = {}, first_strip = {};
    int large = 0, blocks = 0, segments = 0;
    int64_t bytes = 0;
    for (int i = 0; i < table.layers; i++) {
      Job& job = table.layer[i];
      first_block.of[i] = job.first_block = blocks;
      first_segment.of[i] = job.first_segment = segments;
      first_strip.of[i] = static_cast<int>(job.first_tile);
      job.large = -1, job.blocks = 0, job.segments = 1;
      if (job.n > kSmall) {
        // Room for a twelfth of the scores, twice what a window should hold, and for whole strips of ties at either end of it.
        job.large = large++;
        job.blocks = static_cast<int>(std::clamp<int64_t>(job.n >> 17, 2, 32));
        job.stride = job.n / (int64_t{job.blocks} * kSampled * kBlock);
        job.segments =
            static_cast<int>(std::bit_floor(static_cast<uint64_t>(std::clamp<int64_t>(strips(job.n) / 128, 1, kMostSegments))));
        job.capacity =
            static_cast<int>(std::min<int64_t>(job.n / (12 * job.segments) + 2 * kStrip + 2 * kStrip / job.segments, INT32_MAX));
        bytes += candidate_bytes(job);
      }
      blocks += job.blocks, segments += job.segments;
    }
    const dim3 settling(static_cast<unsigned>(segments));
    if (large == 0) return place.launch(settle_kernel<T>, settling, kBlock, 0, table, first_segment, nullptr, nullptr, kFirst);
    constexpr int64_t kHead = 512;
    const int64_t states_end = kHead + ceil_div(int64_t{large} * int64_t{sizeof(State)}, 512) * 512;
    const Tensor scratch = place.scratch(states_end + bytes);
    auto* const memory = static_cast<uint8_t*>(scratch.mutable_data_ptr());
    auto* const missed = reinterpret_cast<unsigned*>(memory);
    auto* const states = reinterpret_cast<State*>(memory + kHead);
    uint8_t* candidates = memory + states_end;
    for (int i = 0; i < table.layers; i++) {
      Job& job = table.layer[i];
      if (job.large < 0) continue;
      job.candidates = candidates;
      candidates += candidate_bytes(job);
    }
    const int64_t pieces = states_end / int64_t{sizeof(uint4)};
    place.launch(zero_kernel, dim3(static_cast<unsigned>(ceil_div(pieces, kBlock))), kBlock, 0, reinterpret_cast<uint4*>(memory),
                 pieces);
    place.launch_early(begin_kernel<T>, dim3(static_cast<unsigned>(blocks)), kBlock, table, first_block, states);
    STD_TORCH_CHECK(table.tiles <= INT32_MAX, place.op(), ": more than 2^41 scores in a call");
    const auto run = static_cast<int>(std::max<int64_t>(ceil_div(table.tiles, place.processors() * 4), 1));
    const auto scanning = static_cast<unsigned>(ceil_div(table.tiles, run));
    const bool all = table.layer[0].ties == Ties::all;
    for (const int round : {kFirst, kAgain, kTies}) {
      if (round == kTies && !all) break;
      place.launch_early(scan_kernel<T>, dim3(scanning), kStripThreads, table, first_strip, states, missed, round, run);
      if (round == kTies) break;
      place.launch_early(settle_kernel<T>, settling, kBlock, table, first_segment, states, missed, round);
    }
  });
}

bool by_value(const char* op, const std::string& by) {
  STD_TORCH_CHECK(by == "magnitude" || by == "value", op, ": by must be 'magnitude' or 'value', got '", by, "'");
  return by == "value";
}

Ties tie_rule(const char* op, const std::string& ties) {
  if (ties == "last") return Ties::last;
  if (ties == "first") return Ties::first;
  STD_TORCH_CHECK(ties == "all", op, ": ties must be 'last', 'first' or 'all', got '", ties, "'");
  return Ties::all;
}

Job job_of(const char* op, Arguments& arguments, const Tensor& scores, int64_t k, bool value, Ties ties) {
  Job job = {};
  arguments.take_scores(job, scores);
  STD_TORCH_CHECK(k >= 0 && k <= job.n, op, ": k must be between 0 and ", job.n, ", got ", k);
  job.k = k, job.value = value, job.ties = ties;
  return job;
}

std::vector<Tensor> select_cuda(std::vector<Tensor> scores, std::vector<int64_t> k, std::string by, std::string ties) {
  check_lengths("select", scores.size(), k.size(), "values of k");
  const bool value = by_value("select", by);
  const Ties rule = tie_rule("select", ties);
  std::vector<Tensor> bits;
  if (scores.empty()) return bits;
  const Place place("select", scores[0]);
  Arguments arguments(place);
  std::vector<Job> jobs;
  for (size_t i = 0; i < scores.size(); i++) {
    Job job = job_of("select", arguments, scores[i], k[i], value, rule);
    bits.push_back(arguments.new_bits(job));
    if (job.n) jobs.push_back(job);
  }
  run(place, jobs);
  return bits;
}

void refresh_cuda(std::vector<Tensor> scores, std::vector<Tensor> weights, std::vector<int64_t> k, std::vector<Tensor> bits,
                  std::vector<Tensor> w_eff, std::vector<Tensor> hints, std::string by, std::string ties) {
  const char* const op = "refresh_";
  check_lengths(op, scores.size(), weights.size(), "weights");
  check_lengths(op, scores.size(), k.size(), "values of k");
  check_lengths(op, scores.size(), bits.size(), "bits");
  check_lengths(op, scores.size(), w_eff.size(), "effective weights");
  check_lengths(op, scores.size(), hints.size(), "hints");
  const bool value = by_value(op, by);
  const Ties rule = tie_rule(op, ties);
  if (scores.empty()) return;
  const Place place(op, scores[0]);
  Arguments arguments(place);
  std::vector<Job> jobs;
  for (size_t i = 0; i < scores.size(); i++) {
    Job job = job_of(op, arguments, scores[i], k[i], value, rule);
    arguments.take_bits(job, bits[i]);
    place.check("hints", hints[i]);
    STD_TORCH_CHECK(hints[i].scalar_type() == ScalarType::Double && hints[i].numel() == 4 && hints[i].is_contiguous(), op,
                    ": hints must be contiguous float64 with 4 elements, got ", hints[i].numel());
    job.hint = static_cast<double*>(hints[i].mutable_data_ptr());
    arguments.take_weight(job, weights[i], w_eff[i]);
    if (job.n) jobs.push_back(job);
  }
  run(place, jobs);
  arguments.flush();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(subnet_kernels, SK_KEY, m) {
  m.impl("select", TORCH_BOX(&select_cuda));
  m.impl("refresh_", TORCH_BOX(&refresh_cuda));
}
