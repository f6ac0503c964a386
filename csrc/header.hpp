// The header of a safetensors file: parsed and checked, with no knowledge of files or memory maps.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace olmfast {

// A file that is no safetensors file. The message reads `<file>: [<tensor>: ]<what, got and wanted>`.
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Entry {
  std::string name;
  std::string dtype;            // as the file spells it: "BF16", "F32", ...
  std::vector<uint64_t> shape;
  uint64_t begin = 0;           // bytes from the start of the data
  uint64_t end = 0;
};

struct Header {
  std::vector<Entry> tensors;   // in the order of their bytes
  std::optional<std::vector<std::pair<std::string, std::string>>> metadata;
};

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the safetensors library's own limit

// The header's length as the first 8 bytes of a file of `file_size` bytes state it. Throws FormatError.
uint64_t header_length(const std::string& file, const unsigned char first[kLengthBytes], uint64_t file_size);

// Parse the header's text and check that its tensors fill the file exactly. Throws FormatError.
Header parse_header(const std::string& file, std::string_view text, uint64_t file_size);

// Bits per element of a dtype as the file spells it; 0 for a dtype that the format does not know.
unsigned dtype_bits(std::string_view dtype);

}  // namespace olmfast
