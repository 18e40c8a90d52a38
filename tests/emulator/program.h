// PTX text as a list of instructions.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

using Text = std::string;
using Lanes = uint32_t;  // a bit for each thread of a warp
constexpr int LANES = 32;
constexpr int SHARED_BASE = 1024;  // where the shared memory of a thread block begins

inline Text format(const char* pattern, ...) {
  char text[800];
  va_list values;
  va_start(values, pattern);
  vsnprintf(text, sizeof text, pattern, values);
  va_end(values);
  return text;
}

[[noreturn]] inline void fail(const Text& why) { throw std::runtime_error(why); }

inline Text strip(const Text& text) {
  size_t first = text.find_first_not_of(" \t\r\n"), last = text.find_last_not_of(" \t\r\n");
  return first == Text::npos ? "" : text.substr(first, last - first + 1);
}

inline std::vector<Text> split(const Text& text, char separator) {  // what stands in brackets stays together
  std::vector<Text> parts(1);
  int depth = 0;
  for (char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == separator && !depth) parts.emplace_back();
    else parts.back() += c;
  }
  if (separator == ',')
    for (Text& part : parts) part = strip(part);
  if (parts.size() == 1 && parts[0].empty()) parts.clear();
  return parts;
}

enum class Outcome { done, waits, jumped };
struct Machine;
struct Warp;
struct Instruction;
using Handler = std::function<Outcome(Machine&, Warp&, const Instruction&, Lanes)>;

struct Operand {
  int row = -1;                // of the register file, where numbers that stand in the text have rows too
  int64_t offset = 0;          // of an address
  bool negated = false;        // a predicate
  Text name;                   // as written
  std::vector<Operand> parts;  // of {a, b}; base and others of [base, ...]; b of a|b
};

struct Instruction {
  Text text;
  std::vector<Text> words;  // of its name
  std::vector<Operand> operands;
  int guard = -1;  // row of the predicate
  bool unless = false, together = false;  // together: all threads of the warp
  int target = -1;                        // of a jump
  int line = 0;     // of the text
  Text source;      // the line of Python that it comes from
  std::vector<int> scopes, reads, writes;
  Handler run;

  const Operand& operator[](size_t n) const { return operands.at(n); }
  const Text& type() const { return words.back(); }
  bool has(const char* word) const { return std::find(words.begin(), words.end(), word) != words.end(); }
  bool is(const char* beginning) const { return text.compare(0, Text(beginning).size(), beginning) == 0; }
};

// Instructions that change no register.
inline bool changes_nothing(const Instruction& i) {
  for (const char* name : {"st.", "bar", "bra", "ret", "exit", "mbarrier.init", "mbarrier.arrive", "cp.", "wgmma", "stmatrix",
                           "setmaxnreg", "fence", "prefetch"})
    if (i.is(name)) return true;
  return false;
}

struct Program {
  Text name;
  std::vector<Instruction> code;
  int rows = 0;
  std::map<uint64_t, int> numbers;                // rows of those in the text
  std::map<Text, int> special;                    // rows of %tid.x and the like
  std::map<Text, int> parameters;                 // their places
  std::map<std::pair<int, Text>, int> registers;  // by scope
  std::map<std::pair<int, Text>, int> labels;

  explicit Program(const Text& text);

 private:
  std::vector<int> scopes{0};
  int next_scope = 1;
  Text source;
  std::map<Text, Text> files;

  void read_header(const Text& header);
  void read_body(const Text& text, size_t at);
  void statement(Text text, int line);
  void declare(const Text& text);
  Operand operand(Text text);
  Operand address(const Text& text);
  int register_row(const Text& name);
  int number_row(uint64_t value);
};

inline Program::Program(const Text& text) {
  for (size_t at = text.find("\t.file\t"); at != Text::npos; at = text.find("\t.file\t", at + 1)) {
    size_t quote = text.find('"', at), end = text.find('"', quote + 1), slash = text.rfind('/', end);
    files[strip(text.substr(at + 7, quote - at - 7))] = text.substr(slash + 1, end - slash - 1);
  }
  size_t entry = text.find(".entry"), open = text.find('(', entry), close = text.find("\n)", open);
  if (close == Text::npos) fail("this PTX has no kernel");
  name = strip(text.substr(entry + 6, open - entry - 6));
  read_header(text.substr(open + 1, close - open - 1));
  read_body(text, text.find("\n{", close) + 1);
  for (Instruction& i : code) {
    if (!i.is("bra")) continue;
    for (size_t k = i.scopes.size(); k-- && i.target < 0;) {
      auto found = labels.find({i.scopes[k], i[0].name});
      if (found != labels.end()) i.target = found->second;
    }
    if (i.target < 0) fail("there is no label " + i[0].name);
  }
}

inline void Program::read_header(const Text& header) {
  for (const Text& parameter : split(header, ',')) {
    Text name = parameter.substr(parameter.find_last_of(" \t") + 1);
    parameters.emplace(name.substr(0, name.find('[')), (int)parameters.size());
  }
}

inline void Program::read_body(const Text& text, size_t at) {
  int line = 1 + (int)std::count(text.begin(), text.begin() + at, '\n');
  while (at < text.size()) {
    char c = text[at];
    if (isspace(c) || c == ';') {
      line += c == '\n';
      at++;
    } else if (c == '{') {
      scopes.push_back(next_scope++);
      at++;
    } else if (c == '}') {
      scopes.pop_back();
      at++;
      if (scopes.size() == 1) return;
    } else if (text.compare(at, 2, "//") == 0 || text.compare(at, 4, ".loc") == 0) {
      size_t end = text.find('\n', at);
      if (c == '.') {
        auto words = split(text.substr(at + 5, end - at - 5), ' ');
        if (words.size() > 1 && words[1] != "0") source = files[words[0]] + ":" + words[1];
      }
      at = end;
    } else {
      size_t end = at;
      while (isalnum(text[end]) || text[end] == '_' || text[end] == '$') end++;
      if (end > at && text[end] == ':' && text[end + 1] != ':') {
        labels[{scopes.back(), text.substr(at, end - at)}] = (int)code.size();
      } else {
        end = text.find(';', at);
        Text whole = text.substr(at, end - at);
        statement(whole, line);
        line += (int)std::count(whole.begin(), whole.end(), '\n');
      }
      at = end + 1;
    }
  }
}

inline void Program::statement(Text text, int line) {
  std::replace_if(text.begin(), text.end(), [](char c) { return c == '\n' || c == '\t'; }, ' ');
  text = strip(text);
  if (text[0] == '.') return declare(text);
  Instruction i;
  i.line = line, i.source = source, i.scopes = scopes;
  if (text[0] == '@') {
    size_t end = text.find(' ');
    i.unless = text[1] == '!';
    i.guard = register_row(text.substr(1 + i.unless, end - 1 - i.unless));
    text = strip(text.substr(end));
  }
  size_t end = text.find(' ');
  i.text = text.substr(0, end);
  i.words = split(i.text, '.');
  i.together = i.has("aligned") || i.is("bar.") || i.is("shfl");
  if (end != Text::npos)
    for (const Text& part : split(text.substr(end), ',')) i.operands.push_back(operand(part));
  for (size_t n = 0; n < i.operands.size(); n++) {
    bool written = n == 0 && !changes_nothing(i);
    std::function<void(const Operand&)> note = [&](const Operand& o) {
      if (o.row >= 0) (written ? i.writes : i.reads).push_back(o.row);
      for (const Operand& part : o.parts) note(part);
    };
    note(i.operands[n]);
  }
  code.push_back(i);
}

inline void Program::declare(const Text& text) {
  if (text.compare(0, 4, ".reg") || scopes.size() <= 2) return;  // those of the kernel are known by their names
  for (const Text& name : split(text.substr(text.find(' ', 5)), ',')) {
    size_t many = name.find('<');
    for (int n = 0; n < (many == Text::npos ? 1 : atoi(name.c_str() + many + 1)); n++)
      registers[{scopes.back(), many == Text::npos ? name : name.substr(0, many) + std::to_string(n)}] = rows++;
  }
}

inline int Program::number_row(uint64_t value) {
  auto [place, fresh] = numbers.emplace(value, rows);
  rows += fresh;
  return place->second;
}

inline int Program::register_row(const Text& name) {
  for (size_t k = scopes.size(); k--;) {
    auto found = registers.find({scopes[k], name});
    if (found != registers.end()) return found->second;
  }
  if (name[0] != '%') return -1;
  for (const char* known : {"%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid"}) {
    Text base = name.substr(0, name.find('.'));
    if (base == known) return special.try_emplace(name, rows).second ? rows++ : special[name];
  }
  return registers[{0, name}] = rows++;
}

inline bool number(const Text& text, uint64_t& value) {
  if (text.size() > 2 && text[0] == '0' && strchr("fFdD", text[1])) {
    value = strtoull(text.c_str() + 2, nullptr, 16);
    return true;
  }
  char* end;
  value = text[0] == '-' ? (uint64_t)strtoll(text.c_str(), &end, 0) : strtoull(text.c_str(), &end, 0);
  return end != text.c_str() && (*end == 0 || (*end == 'U' && end[1] == 0));
}

inline Operand Program::operand(Text text) {
  Operand result;
  result.name = text = strip(text);
  uint64_t value;
  if (text == "_") return result;
  if (number(text, value)) {
    result.row = number_row(value);
  } else if (text[0] == '[') {
    return address(text.substr(1, text.rfind(']') - 1));
  } else if (text[0] == '{') {
    for (const Text& part : split(text.substr(1, text.size() - 2), ',')) result.parts.push_back(operand(part));
  } else if (size_t bar = text.find('|'); bar != Text::npos) {
    result = operand(text.substr(0, bar));
    result.parts.push_back(operand(text.substr(bar + 1)));
  } else if (text[0] == '!') {
    result = operand(text.substr(1));
    result.negated = true;
  } else if (text.find("dynamic_shmem") != Text::npos) {
    result.row = number_row(SHARED_BASE);
  } else {
    result.row = register_row(text);
  }
  return result;
}

inline Operand Program::address(const Text& text) {
  Operand result;
  auto parts = split(text, ',');
  size_t plus = parts[0].find('+');
  if (plus != Text::npos) result.offset = strtoll(parts[0].c_str() + plus + 1, nullptr, 0);
  result.name = strip(parts[0].substr(0, plus));
  for (size_t n = 0; n < parts.size(); n++) result.parts.push_back(operand(n ? parts[n] : result.name));
  return result;
}
