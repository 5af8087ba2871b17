// Mutates coded masks and decodes them: g++ -fsanitize=address,undefined (tests/fuzz.py). Arguments: seconds, seed, files of the
// corpus.
//
// An input is a coded mask with its number of weights and its context, as tests/fuzz.py writes them. It is changed at random:
// bits, bytes, numbers at the edge, pieces cut, doubled, put in from another one; with right checksums half of the time, so that
// what lies behind them is reached. The decoder must throw std::invalid_argument or fill exactly the bits it was given. What it
// decodes must code to the same mask.
#define SUBNET_CODEC_ALONE
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>

#include "../csrc/host/codec.cpp"

namespace {

struct Input {
  uint64_t n = 0;
  uint64_t planes = 0;
  Bytes context;  // the planes one after another, (n + 7) / 8 bytes each
  Bytes data;
};

Input read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const Bytes all((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  Input input;
  if (all.size() < 16) std::abort();
  std::memcpy(&input.n, all.data(), 8);
  std::memcpy(&input.planes, all.data() + 8, 8);
  const size_t end = 16 + input.planes * ((input.n + 7) / 8);
  if (all.size() < end) std::abort();
  input.context.assign(all.begin() + 16, all.begin() + static_cast<std::ptrdiff_t>(end));
  input.data.assign(all.begin() + static_cast<std::ptrdiff_t>(end), all.end());
  return input;
}

// Puts right checksums into what still has the shape of a coded mask.
void seal(Bytes& data) {
  try {
    Reader in{data.data(), data.data() + data.size()};
    in.p += std::min<size_t>(5, in.left());
    const uint64_t n = in.number();
    std::vector<size_t> sizes;
    for (uint64_t b = 0; b < (n + kBlockWeights - 1) / kBlockWeights && b < 1000; ++b) sizes.push_back(in.number());
    const auto header = static_cast<size_t>(in.p - data.data());
    uint32_t sum = crc32(data.data(), header);
    if (header + 4 > data.size()) return;
    std::memcpy(data.data() + header, &sum, 4);
    size_t at = header + 4;
    for (const size_t size : sizes) {
      if (size < 4 || size > data.size() - at) return;
      sum = crc32(data.data() + at + 4, size - 4);
      std::memcpy(data.data() + at, &sum, 4);
      at += size;
    }
  } catch (const std::invalid_argument&) {
  }
}

void mutate(Bytes& data, const Bytes& other, std::mt19937_64& chance) {
  static constexpr uint8_t kEdges[] = {0, 1, 0x7F, 0x80, 0xFF};
  auto below = [&](size_t n) { return n ? static_cast<size_t>(chance() % n) : 0; };
  auto place = [&](size_t i) { return data.begin() + static_cast<std::ptrdiff_t>(i); };
  for (size_t times = 1 + below(4); times--;) {
    const size_t at = below(data.size());
    switch (below(7)) {
      case 0:
        if (!data.empty()) data[at] ^= static_cast<uint8_t>(1u << below(8));
        break;
      case 1:
        if (!data.empty()) data[at] = static_cast<uint8_t>(chance());
        break;
      case 2:
        if (!data.empty()) data[at] = kEdges[below(5)];
        break;
      case 3:
        data.resize(at);
        break;
      case 4: {
        const size_t end = std::min(data.size(), at + below(9));
        const Bytes piece(place(at), place(end));
        data.insert(place(at), piece.begin(), piece.end());
        break;
      }
      case 5:
        if (!data.empty()) data.erase(place(at), place(std::min(data.size(), at + 1 + below(8))));
        break;
      default:
        for (size_t i = at, end = std::min({data.size(), other.size(), at + 1 + below(16)}); i < end; ++i) data[i] = other[i];
    }
  }
}

}  // namespace

int main(int count, char** given) {
  if (count < 4) return 2;
  std::mt19937_64 chance(std::strtoull(given[2], nullptr, 10));
  std::vector<Input> corpus;
  for (int i = 3; i < count; ++i) corpus.push_back(read(given[i]));
  using Clock = std::chrono::steady_clock;
  const auto until = Clock::now() + std::chrono::duration<double>(std::strtod(given[1], nullptr));
  uint64_t runs = 0, decoded = 0;
  while ((runs & 255) || Clock::now() < until) {
    ++runs;
    size_t which = chance() % corpus.size();
    if (corpus[which].n > 10000 && chance() % 64) which = 0;  // they take as long as hundreds of the others
    const Input& input = corpus[which];
    Bytes data = input.data;
    if (runs > corpus.size()) mutate(data, corpus[chance() % corpus.size()].data, chance);
    if (chance() & 1) seal(data);
    const size_t size = (input.n + 7) / 8;
    Planes planes;
    Bytes context = input.context;  // exactly as long as it must be, so that a byte too far is noticed
    if (chance() % 8 == 0 && !context.empty()) context[chance() % context.size()] ^= static_cast<uint8_t>(chance());
    for (uint64_t k = 0; k < input.planes; ++k) planes.push_back(context.data() + k * size);
    Bytes bits(size);
    try {
      decode_mask(data.data(), data.size(), input.n, planes, bits.data(), 1);
    } catch (const std::invalid_argument&) {
      continue;
    }
    ++decoded;
    if (input.n % 8 && bits.back() >> input.n % 8) {
      std::fprintf(stderr, "bits are set behind the last weight\n");
      return 1;
    }
    const Bytes again = encode_mask(bits.data(), input.n, planes, 1);
    Bytes same(size);
    decode_mask(again.data(), again.size(), input.n, planes, same.data(), 1);
    if (same != bits) {
      std::fprintf(stderr, "a decoded mask does not come back\n");
      return 1;
    }
  }
  std::printf("%llu executions, %llu of them decoded\n", static_cast<unsigned long long>(runs),
              static_cast<unsigned long long>(decoded));
  return 0;
}
