// A strict reader of JSON text, just as much as the header of a safetensors file needs.
//
// It walks the text once and hands values to the caller as it meets them; no tree is built. What it accepts is
// what the safetensors library's own parser accepts: RFC 8259, valid UTF-8, no lone surrogates, numbers
// that fit a double, and at most 127 nested objects and arrays.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace olmfast {

struct JsonError : std::runtime_error {
  JsonError(size_t position, const std::string& what);
  size_t position;
};

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  // The next character that is no white space; '\0' at the end of the text. Nothing is consumed.
  char peek();
  // Consume `expected`, or throw saying what was wanted.
  void expect(char expected, const char* what);
  // Consume the end of the text, or throw.
  void end();

  std::string string();
  // A non-negative integer below 2^64 without fraction and exponent.
  uint64_t unsigned_integer(const char* what);
  void null();
  // Consume any value.
  void skip();

  // `on_key(key)` must consume the value. Keys may repeat; the caller decides.
  template <class OnKey>
  void object(OnKey on_key, const char* what);
  template <class OnItem>
  void array(OnItem on_item, const char* what);

  [[noreturn]] void fail(const std::string& what) const;

 private:
  void enter();
  void literal(std::string_view word);
  void number(std::optional<uint64_t>* integer);
  void escape(std::string& out);
  unsigned hex4();

  std::string_view text_;
  size_t position_ = 0;
  int depth_ = 0;
};

// Position of the first byte that is not valid UTF-8 (no surrogates, no overlong forms), or npos.
size_t invalid_utf8(std::string_view text);

template <class OnKey>
void JsonReader::object(OnKey on_key, const char* what) {
  expect('{', what);
  enter();
  if (peek() != '}') {
    while (true) {
      if (peek() != '"') fail("expected a key in double quotes");
      std::string key = string();
      expect(':', "':' after a key");
      on_key(key);
      if (peek() != ',') break;
      ++position_;
    }
  }
  expect('}', "',' or '}'");
  --depth_;
}

template <class OnItem>
void JsonReader::array(OnItem on_item, const char* what) {
  expect('[', what);
  enter();
  if (peek() != ']') {
    while (true) {
      on_item();
      if (peek() != ',') break;
      ++position_;
    }
  }
  expect(']', "',' or ']'");
  --depth_;
}

}  // namespace olmfast
