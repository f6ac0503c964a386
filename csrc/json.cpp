#include "json.hpp"

#include <cmath>
#include <cstdlib>

namespace olmfast {

namespace {

constexpr int kMaxDepth = 127;

bool is_digit(char c) { return c >= '0' && c <= '9'; }

void append_utf8(std::string& out, uint32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | (code >> 6));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | (code >> 12));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | (code >> 18));
    out += static_cast<char>(0x80 | ((code >> 12) & 0x3F));
    out += static_cast<char>(0x80 | ((code >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

}  // namespace

JsonError::JsonError(size_t at, const std::string& what) : std::runtime_error(what), position(at) {}

void JsonReader::fail(const std::string& what) const { throw JsonError(position_, what); }

char JsonReader::peek() {
  while (position_ < text_.size()) {
    char c = text_[position_];
    if (c != ' ' && c != '\t' && c != '\n' && c != '\r') {
      if (c == '\0') fail("zero byte");
      return c;
    }
    ++position_;
  }
  return '\0';
}

void JsonReader::expect(char expected, const char* what) {
  if (peek() != expected) fail(std::string("expected ") + what);
  ++position_;
}

void JsonReader::end() {
  if (peek() != '\0') fail("expected the end of the header");
}

void JsonReader::enter() {
  if (++depth_ > kMaxDepth) fail("nested more than 127 deep");
}

unsigned JsonReader::hex4() {
  unsigned value = 0;
  for (int i = 0; i < 4; ++i, ++position_) {
    char c = position_ < text_.size() ? text_[position_] : '\0';
    unsigned digit;
    if (is_digit(c)) {
      digit = static_cast<unsigned>(c - '0');
    } else if (c >= 'a' && c <= 'f') {
      digit = static_cast<unsigned>(c - 'a') + 10;
    } else if (c >= 'A' && c <= 'F') {
      digit = static_cast<unsigned>(c - 'A') + 10;
    } else {
      fail("expected four hexadecimal digits after \\u");
    }
    value = value * 16 + digit;
  }
  return value;
}

void JsonReader::escape(std::string& out) {
  static constexpr std::string_view kShort = "\"\\/bfnrt";
  static constexpr std::string_view kMeaning = "\"\\/\b\f\n\r\t";
  char c = position_ < text_.size() ? text_[position_] : '\0';
  ++position_;
  if (c != 'u') {
    size_t which = c ? kShort.find(c) : std::string_view::npos;
    if (which == std::string_view::npos) fail("unknown escape");
    out += kMeaning[which];
    return;
  }
  uint32_t code = hex4();
  if (code >= 0xDC00 && code < 0xE000) fail("lone surrogate");
  if (code >= 0xD800 && code < 0xDC00) {
    if (text_.substr(position_, 2) != "\\u") fail("lone surrogate");
    position_ += 2;
    uint32_t low = hex4();
    if (low < 0xDC00 || low >= 0xE000) fail("lone surrogate");
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }
  append_utf8(out, code);
}

std::string JsonReader::string() {
  expect('"', "a string");
  std::string out;
  while (true) {
    if (position_ >= text_.size()) fail("a string does not end");
    char c = text_[position_];
    if (static_cast<unsigned char>(c) < 0x20) fail("control character in a string");
    ++position_;
    if (c == '"') return out;
    if (c == '\\') {
      escape(out);
    } else {
      out += c;
    }
  }
}

// Walks over a number. Sets `integer` when it is a plain non-negative integer below 2^64.
void JsonReader::number(std::optional<uint64_t>* integer) {
  bool whole = true, fits = true, negative = false;
  uint64_t value = 0;
  std::string digits;    // without sign and point: strtod then depends on no locale
  int64_t exponent = 0;
  auto at = [&] { return position_ < text_.size() ? text_[position_] : '\0'; };
  if (peek() == '-') negative = true, ++position_;
  if (!is_digit(at())) fail("expected a value");
  size_t first = position_;
  for (; is_digit(at()); ++position_) {
    auto digit = static_cast<uint64_t>(at() - '0');
    if (value > (UINT64_MAX - digit) / 10) fits = false;
    if (fits) value = value * 10 + digit;
    digits += at();
  }
  if (text_[first] == '0' && position_ - first > 1) fail("a number begins with 0");
  if (at() == '.') {
    whole = false;
    ++position_;
    if (!is_digit(at())) fail("expected a digit after the decimal point");
    for (; is_digit(at()); ++position_, --exponent) digits += at();
  }
  if (at() == 'e' || at() == 'E') {
    whole = false;
    ++position_;
    bool below = at() == '-';
    if (at() == '-' || at() == '+') ++position_;
    if (!is_digit(at())) fail("expected a digit in the exponent");
    int64_t stated = 0;
    for (; is_digit(at()); ++position_) {
      if (stated < 1'000'000'000'000) stated = stated * 10 + (at() - '0');
    }
    exponent += below ? -stated : stated;
  }
  if (integer && whole && fits && !negative) *integer = value;
  if (!whole || !fits) {
    digits += "e" + std::to_string(exponent);
    if (std::isinf(std::strtod(digits.c_str(), nullptr))) fail("number out of range");
  }
}

uint64_t JsonReader::unsigned_integer(const char* what) {
  size_t begin = (peek(), position_);
  std::optional<uint64_t> value;
  number(&value);
  if (!value) {
    position_ = begin;
    fail(std::string("expected ") + what);
  }
  return *value;
}

void JsonReader::literal(std::string_view word) {
  if (text_.substr(position_, word.size()) != word) fail("expected a value");
  position_ += word.size();
}

void JsonReader::null() {
  peek();
  literal("null");
}

void JsonReader::skip() {
  switch (peek()) {
    case '{': return object([&](const std::string&) { skip(); }, "an object");
    case '[': return array([&] { skip(); }, "an array");
    case '"': string(); return;
    case 't': return literal("true");
    case 'f': return literal("false");
    case 'n': return literal("null");
    default: number(nullptr);
  }
}

size_t invalid_utf8(std::string_view text) {
  auto at = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  auto follows = [&](size_t i) { return (at(i) & 0xC0u) == 0x80u; };
  for (size_t i = 0; i < text.size();) {
    unsigned c = at(i);
    if (c < 0x80) {
      ++i;
    } else if (c >= 0xC2 && c < 0xE0 && follows(i + 1)) {
      i += 2;
    } else if (c >= 0xE0 && c < 0xF0 && follows(i + 1) && follows(i + 2)) {
      unsigned second = at(i + 1);
      if ((c == 0xE0 && second < 0xA0) || (c == 0xED && second >= 0xA0)) return i;
      i += 3;
    } else if (c >= 0xF0 && c < 0xF5 && follows(i + 1) && follows(i + 2) && follows(i + 3)) {
      unsigned second = at(i + 1);
      if ((c == 0xF0 && second < 0x90) || (c == 0xF4 && second >= 0x90)) return i;
      i += 4;
    } else {
      return i;
    }
  }
  return std::string_view::npos;
}

}  // namespace olmfast
