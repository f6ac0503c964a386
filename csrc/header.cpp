#include "header.hpp"

#include <algorithm>
#include <tuple>
#include <unordered_set>

#include "json.hpp"

namespace olmfast {

namespace {

[[noreturn]] void refuse(const std::string& file, const std::string& what) {
  throw FormatError(file + ": " + what);
}

std::string spell(const std::vector<uint64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

Entry read_entry(JsonReader& reader, std::string name) {
  Entry entry;
  entry.name = std::move(name);
  bool has_dtype = false, has_shape = false, has_offsets = false;
  auto once = [&](bool& seen, const char* key) {
    if (seen) reader.fail(std::string("'") + key + "' stands twice");
    seen = true;
  };
  reader.object(
      [&](const std::string& key) {
        if (key == "dtype") {
          once(has_dtype, "dtype");
          if (reader.peek() != '"') reader.fail("expected the dtype as a string");
          entry.dtype = reader.string();
          if (!dtype_bits(entry.dtype)) reader.fail("unknown dtype '" + entry.dtype + "'");
        } else if (key == "shape") {
          once(has_shape, "shape");
          reader.array([&] { entry.shape.push_back(reader.unsigned_integer("a size in shape")); },
                       "shape as a list of sizes");
        } else if (key == "data_offsets") {
          once(has_offsets, "data_offsets");
          std::vector<uint64_t> offsets;
          reader.array(
              [&] {
                if (offsets.size() == 2) reader.fail("more than two data_offsets");
                offsets.push_back(reader.unsigned_integer("a byte offset"));
              },
              "data_offsets as [begin, end]");
          if (offsets.size() != 2) reader.fail("fewer than two data_offsets");
          entry.begin = offsets[0];
          entry.end = offsets[1];
        } else {
          reader.skip();
        }
      },
      "an object with dtype, shape and data_offsets");
  if (!has_dtype) reader.fail("'dtype' is missing");
  if (!has_shape) reader.fail("'shape' is missing");
  if (!has_offsets) reader.fail("'data_offsets' is missing");
  return entry;
}

void read_named_entry(JsonReader& reader, const std::string& name, Header& header) {
  try {
    header.tensors.push_back(read_entry(reader, name));
  } catch (const JsonError& error) {
    throw JsonError(error.position, name + ": " + error.what());
  }
}

void read_metadata(JsonReader& reader, Header& header) {
  if (reader.peek() == 'n') return reader.null();
  header.metadata.emplace();
  std::unordered_set<std::string> keys;
  reader.object(
      [&](const std::string& key) {
        if (!keys.insert(key).second) reader.fail("__metadata__ holds '" + key + "' twice");
        if (reader.peek() != '"') reader.fail("__metadata__ holds a value that is no string");
        header.metadata->emplace_back(key, reader.string());
      },
      "__metadata__ as an object");
}

Header read_text(std::string_view text) {
  JsonReader reader(text);
  Header header;
  std::unordered_set<std::string> names;
  reader.object(
      [&](const std::string& key) {
        if (!names.insert(key).second) reader.fail(key + ": stands twice");
        if (key == "__metadata__") {
          read_metadata(reader, header);
        } else {
          read_named_entry(reader, key, header);
        }
      },
      "an object of tensors");
  reader.end();
  return header;
}

// Bytes that dtype and shape need. Refuses what does not fit 64 bits or ends inside a byte.
uint64_t bytes_needed(const std::string& file, const Entry& entry) {
  uint64_t n = 1;
  bool fits = true;
  for (uint64_t size : entry.shape) fits = fits && !__builtin_mul_overflow(n, size, &n);
  fits = fits && !__builtin_mul_overflow(n, static_cast<uint64_t>(dtype_bits(entry.dtype)), &n);
  if (!fits) refuse(file, entry.name + ": shape " + spell(entry.shape) + " is larger than any file");
  if (n % 8) refuse(file, entry.name + ": " + entry.dtype + " " + spell(entry.shape) + " ends inside a byte");
  return n / 8;
}

void check_entry(const std::string& file, const Entry& entry, uint64_t expected_begin) {
  if (entry.begin != expected_begin || entry.end < entry.begin) {
    const char* what = entry.end < entry.begin           ? "ends before it begins: "
                       : entry.begin < expected_begin ? "overlaps the tensor before it: "
                                                      : "leaves a hole before it: ";
    refuse(file, entry.name + ": " + what + "bytes " + std::to_string(entry.begin) + " to " +
                     std::to_string(entry.end) + ", expected them to begin at " + std::to_string(expected_begin));
  }
  uint64_t needed = bytes_needed(file, entry);
  if (entry.end - entry.begin != needed) {
    refuse(file, entry.name + ": " + entry.dtype + " " + spell(entry.shape) + " needs " + std::to_string(needed) +
                     " bytes, its offsets give " + std::to_string(entry.end - entry.begin));
  }
}

}  // namespace

unsigned dtype_bits(std::string_view dtype) {
  struct Known {
    std::string_view name;
    unsigned bits;
  };
  static constexpr Known kKnown[] = {
      {"F4", 4},           {"F6_E2M3", 6},      {"F6_E3M2", 6}, {"BOOL", 8},    {"U8", 8},   {"I8", 8},
      {"F8_E5M2", 8},      {"F8_E4M3", 8},      {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
      {"F8_E5M2FNUZ", 8},  {"I16", 16},         {"U16", 16},    {"F16", 16},    {"BF16", 16}, {"I32", 32},
      {"U32", 32},         {"F32", 32},         {"C64", 64},    {"F64", 64},    {"I64", 64}, {"U64", 64},
  };
  for (const Known& known : kKnown) {
    if (known.name == dtype) return known.bits;
  }
  return 0;
}

uint64_t header_length(const std::string& file, const unsigned char first[kLengthBytes], uint64_t file_size) {
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = (length << 8) | first[i];
  if (length > kMaxHeaderBytes) {
    refuse(file, "states a header of " + std::to_string(length) + " bytes, at most " +
                     std::to_string(kMaxHeaderBytes) + " are allowed; this is no safetensors file");
  }
  if (length > file_size - kLengthBytes) {
    refuse(file, "states a header of " + std::to_string(length) + " bytes in a file of " +
                     std::to_string(file_size) + "; the file is truncated: download it again");
  }
  return length;
}

Header parse_header(const std::string& file, std::string_view text, uint64_t file_size) {
  size_t bad = invalid_utf8(text);
  if (bad != std::string_view::npos) refuse(file, "header is not UTF-8 at byte " + std::to_string(bad));
  Header header;
  try {
    header = read_text(text);
  } catch (const JsonError& error) {
    refuse(file, "header is damaged at byte " + std::to_string(error.position) + ": " + error.what());
  }
  std::sort(header.tensors.begin(), header.tensors.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
  });
  uint64_t position = 0;
  for (const Entry& entry : header.tensors) {
    check_entry(file, entry, position);
    position = entry.end;
  }
  uint64_t data_start = kLengthBytes + text.size();
  uint64_t held = file_size - data_start;
  if (position != held) {
    refuse(file, "expected " + std::to_string(position) + " bytes of data, got " + std::to_string(held) +
                     (held < position ? "; the file is truncated: download it again" : "; the rest belongs to no tensor"));
  }
  return header;
}

}  // namespace olmfast
