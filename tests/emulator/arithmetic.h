// Instructions that compute with the registers of a warp, or say where it goes on.
#pragma once

#include <bit>
#include <cmath>
#include <type_traits>

#include "machine.h"

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

inline float wide(float x) { return x; }
inline float wide(bfloat16 x) { return std::bit_cast<float>((uint32_t)x.bits << 16); }
inline float wide(float16 x) { return (float)std::bit_cast<_Float16>(x.bits); }

template <class T>
T rounded(float x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    uint32_t bits = std::bit_cast<uint32_t>(x);
    if (std::isnan(x)) return {0x7fff};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
  } else if constexpr (std::is_same_v<T, float16>) {
    return {std::bit_cast<uint16_t>((_Float16)x)};
  } else {
    return x;
  }
}

// A value in the low bits of a row; what is above them means nothing, but for integers that are widened when loaded.
template <class T>
T get(uint64_t bits) {
  if constexpr (std::is_same_v<T, float>) return std::bit_cast<float>((uint32_t)bits);
  else if constexpr (std::is_class_v<T>) return {(uint16_t)bits};
  else return (T)bits;
}

template <class T>
uint64_t put(T x) {
  if constexpr (std::is_same_v<T, float>) return std::bit_cast<uint32_t>(x);
  else if constexpr (std::is_class_v<T>) return x.bits;
  else if constexpr (std::is_same_v<T, bool>) return x;
  else if constexpr (std::is_signed_v<T>) return (uint64_t)(int64_t)x;
  else return x;
}

template <class F>
void each(Lanes lanes, F f) {
  for (int l = 0; l < LANES; l++)
    if (lanes >> l & 1) f(l);
}

// f(a value of the type), whatever that gives.
template <class F>
Handler of_integer(const Text& type, F f) {
  if (type == "pred") return f(bool());
  if (type == "u8" || type == "b8") return f(uint8_t());
  if (type == "s8") return f(int8_t());
  if (type == "u16" || type == "b16") return f(uint16_t());
  if (type == "s16") return f(int16_t());
  if (type == "u32" || type == "b32") return f(uint32_t());
  if (type == "s32") return f(int32_t());
  if (type == "u64" || type == "b64") return f(uint64_t());
  if (type == "s64") return f(int64_t());
  return nullptr;
}

template <class F>
Handler of_number(const Text& type, F f) {
  return type == "f32" ? f(float()) : of_integer(type, f);
}

template <class T, class F>
Handler unary(F f) {
  return [f](Machine&, Warp& w, const Instruction& i, Lanes lanes) {
    uint64_t *to = w.row(i[0]), *x = w.row(i[1]);
    each(lanes, [&](int l) { to[l] = put<T>(f(get<T>(x[l]))); });
    return Outcome::done;
  };
}

template <class T, class F>
Handler binary(F f) {
  return [f](Machine&, Warp& w, const Instruction& i, Lanes lanes) {
    uint64_t *to = w.row(i[0]), *x = w.row(i[1]), *y = w.row(i[2]);
    each(lanes, [&](int l) { to[l] = put<T>((T)f(get<T>(x[l]), get<T>(y[l]))); });
    return Outcome::done;
  };
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

inline Handler float_function(const Text& name) {
  if (name == "ex2") return unary<float>([](float x) { return flushed(std::exp2(flushed(x))); });
  if (name == "lg2") return unary<float>([](float x) { return std::log2(flushed(x)); });
  if (name == "rcp") return unary<float>([](float x) { return 1 / x; });
  if (name == "sqrt") return unary<float>([](float x) { return std::sqrt(x); });
  if (name == "rsqrt") return unary<float>([](float x) { return 1 / std::sqrt(x); });
  if (name == "tanh") return unary<float>([](float x) { return std::tanh(x); });
  if (name == "sin") return unary<float>([](float x) { return std::sin(x); });
  if (name == "cos") return unary<float>([](float x) { return std::cos(x); });
  if (name == "neg") return unary<float>([](float x) { return -x; });
  if (name == "abs") return unary<float>([](float x) { return std::fabs(x); });
  if (name == "add") return binary<float>([](float x, float y) { return x + y; });
  if (name == "sub") return binary<float>([](float x, float y) { return x - y; });
  if (name == "mul") return binary<float>([](float x, float y) { return x * y; });
  if (name == "div") return binary<float>([](float x, float y) { return x / y; });
  if (name == "copysign") return binary<float>([](float x, float y) { return std::copysign(y, x); });
  return nullptr;
}

inline Handler float_extreme(bool greatest, bool keeps_nan) {
  return binary<float>([=](float x, float y) {
    if (std::isnan(x) || std::isnan(y)) return keeps_nan ? NAN : std::isnan(x) ? y : x;
    return greatest ? std::max(x, y) : std::min(x, y);
  });
}

// Signs of the two 16-bit floats of a register.
inline Handler of_signs(const Text& name) {
  constexpr uint32_t SIGNS = 0x80008000;
  if (name == "neg") return unary<uint32_t>([](uint32_t x) { return x ^ SIGNS; });
  if (name == "abs") return unary<uint32_t>([](uint32_t x) { return x & ~SIGNS; });
  return nullptr;
}

// Of a product of integers of one width: the low half, the high half, or all.
inline Handler integer_product(const Instruction& i) {
  return of_integer(i.type(), [&]<class T>(T) -> Handler {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    if (i.has("hi")) return binary<T>([](T x, T y) { return (T)((Wide)x * (Wide)y >> (8 * sizeof(T))); });
    if (i.has("lo")) return binary<T>([](T x, T y) { return (T)((Wide)x * (Wide)y); });
    return [](Machine&, Warp& w, const Instruction& i, Lanes lanes) {
      uint64_t *to = w.row(i[0]), *x = w.row(i[1]), *y = w.row(i[2]);
      each(lanes, [&](int l) { to[l] = (uint64_t)((Wide)get<T>(x[l]) * (Wide)get<T>(y[l])); });
      return Outcome::done;
    };
  });
}

inline Handler integer_function(const Text& name, const Text& type) {
  return of_integer(type, [&]<class T>(T) -> Handler {
    constexpr bool logical = std::is_same_v<T, bool>;
    if (name == "and") return binary<T>([](T x, T y) { return x & y; });
    if (name == "or") return binary<T>([](T x, T y) { return x | y; });
    if (name == "xor") return binary<T>([](T x, T y) { return x ^ y; });
    if (name == "not") return unary<T>([](T x) { return logical ? (T)!x : (T)~(int64_t)x; });
    if constexpr (logical) return nullptr;
    if (name == "add") return binary<T>([](T x, T y) { return x + y; });
    if (name == "sub") return binary<T>([](T x, T y) { return x - y; });
    if (name == "div") return binary<T>([](T x, T y) { return y ? x / y : 0; });
    if (name == "rem") return binary<T>([](T x, T y) { return y ? x % y : 0; });
    if (name == "min") return binary<T>([](T x, T y) { return std::min(x, y); });
    if (name == "max") return binary<T>([](T x, T y) { return std::max(x, y); });
    if (name == "neg") return unary<T>([](T x) { return (T)-x; });
    if (name == "abs") return unary<T>([](T x) { return x < T(0) ? (T)-x : x; });
    return nullptr;
  });
}

// By a count of its own type, of which all bits count.
inline Handler shift(bool left, const Text& type) {
  return of_integer(type, [&]<class T>(T) -> Handler {
    return [left](Machine&, Warp& w, const Instruction& i, Lanes lanes) {
      uint64_t *to = w.row(i[0]), *x = w.row(i[1]), *by = w.row(i[2]);
      each(lanes, [&](int l) {
        uint32_t bits = 8 * sizeof(T), n = (uint32_t)by[l];
        T value = get<T>(x[l]), sign = value < T(0) ? (T)-1 : T(0);
        to[l] = put<T>(n >= bits ? (left ? T(0) : sign) : left ? (T)((uint64_t)value << n) : (T)(value >> n));
      });
      return Outcome::done;
    };
  });
}

inline Handler fused(const Text& type) {
  return of_number(type, [&]<class T>(T) -> Handler {
    return [](Machine&, Warp& w, const Instruction& i, Lanes lanes) {
      uint64_t *to = w.row(i[0]), *x = w.row(i[1]), *y = w.row(i[2]), *z = w.row(i[3]);
      each(lanes, [&](int l) {
        T a = get<T>(x[l]), b = get<T>(y[l]), c = get<T>(z[l]);
        if constexpr (std::is_same_v<T, float>) to[l] = put(std::fma(a, b, c));
        else to[l] = put<T>((T)((uint64_t)a * (uint64_t)b + (uint64_t)c));
      });
      return Outcome::done;
    };
  });
}

template <class T>
bool compared(const Text& how, T x, T y) {
  if constexpr (std::is_same_v<T, float>) {
    bool unordered = std::isnan(x) || std::isnan(y);
    if (how == "num") return !unordered;
    if (how == "nan") return unordered;
    if (unordered) return how.size() == 3;  // ltu, leu, ...: true of a NaN
  }
  switch (how[0] << 8 | how[1]) {
    case 'e' << 8 | 'q': return x == y;
    case 'n' << 8 | 'e': return x != y;
    case 'l' << 8 | 't': case 'l' << 8 | 'o': return x < y;
    case 'l' << 8 | 'e': case 'l' << 8 | 's': return x <= y;
    case 'g' << 8 | 't': case 'h' << 8 | 'i': return x > y;
    case 'g' << 8 | 'e': case 'h' << 8 | 's': return x >= y;
  }
  fail("there is no comparison " + how);
}

inline void set(Warp& w, const Operand& to, Lanes lanes, Lanes value) {
  each(lanes, [&](int l) { w.row(to)[l] = value >> l & 1; });
}

// setp.how[.with].type p|q, x, y[, r]
inline Handler set_predicate(const Instruction& i) {
  return of_number(i.type(), [&]<class T>(T) -> Handler {
    return [](Machine&, Warp& w, const Instruction& i, Lanes lanes) {
      uint64_t *x = w.row(i[1]), *y = w.row(i[2]);
      Lanes value = 0;
      each(lanes, [&](int l) { value |= Lanes(compared(i.words[1], get<T>(x[l]), get<T>(y[l]))) << l; });
      if (i.operands.size() > 3) {
        Lanes other = w.predicate(i[3]);
        value = i.has("and") ? value & other : i.has("or") ? value | other : value ^ other;
      }
      set(w, i[0], lanes, value);
      for (const Operand& opposite : i[0].parts) set(w, opposite, lanes, ~value);
      return Outcome::done;
    };
  });
}

inline Outcome choose(Machine&, Warp& w, const Instruction& i, Lanes lanes) {
  uint64_t *to = w.row(i[0]), *x = w.row(i[1]), *y = w.row(i[2]);
  Lanes which = w.predicate(i[3]);
  each(lanes, [&](int l) { to[l] = which >> l & 1 ? x[l] : y[l]; });
  return Outcome::done;
}

// Also of parts of a register: {a, b} is a in the low half and b in the high one.
inline Outcome move(Machine& m, Warp& w, const Instruction& i, Lanes lanes) {
  int half = i.has("b64") || i.has("u64") ? 32 : 16;
  uint64_t low = (1ull << half) - 1;
  if (!i[1].parts.empty()) {
    uint64_t *to = w.row(i[0]), *x = w.row(i[1].parts[0]), *y = w.row(i[1].parts[1]);
    each(lanes, [&](int l) { to[l] = (x[l] & low) | (y[l] & low) << half; });
  } else if (!i[0].parts.empty()) {
    uint64_t* from = w.row(i[1]);
    for (int n = 0; n < 2; n++)
      if (i[0].parts[n].row >= 0) each(lanes, [&](int l) { w.row(i[0].parts[n])[l] = from[l] >> (n * half) & low; });
  } else if (auto parameter = m.program.parameters.find(i[1].name); parameter != m.program.parameters.end()) {
    each(lanes, [&](int l) { w.row(i[0])[l] = (uint64_t)m.arguments[parameter->second]; });
  } else if (i.type() == "pred") {
    set(w, i[0], lanes, w.predicate(i[1]));
  } else {
    uint64_t *to = w.row(i[0]), *from = w.row(i[1]);
    each(lanes, [&](int l) { to[l] = from[l]; });
  }
  return Outcome::done;
}

template <class From, class To>
To converted(const Instruction& i, From x) {
  if constexpr (std::is_integral_v<From> && std::is_integral_v<To>) return (To)x;
  else if constexpr (std::is_integral_v<From>) return rounded<To>((float)x);
  else {
    float value = wide(x);
    value = i.has("rzi") ? std::trunc(value) : i.has("rmi") ? std::floor(value) : i.has("rpi") ? std::ceil(value)
            : i.has("rni") ? std::nearbyint(value) : value;
    if constexpr (!std::is_integral_v<To>) return rounded<To>(value);
    else if (std::isnan(value)) return 0;
    else return (To)std::clamp<double>(value, (double)std::numeric_limits<To>::min(), (double)std::numeric_limits<To>::max());
  }
}

template <class F>
Handler of_any(const Text& type, F f) {
  if (type == "bf16") return f(bfloat16());
  if (type == "f16") return f(float16());
  return of_number(type, f);
}

inline Handler convert(const Instruction& i) {
  const Text& to_type = i.words[i.words.size() - 2];
  if (i.operands.size() == 3) {  // two numbers into one register, the first into its high half
    bool brain = to_type == "bf16x2";
    return [brain](Machine&, Warp& w, const Instruction& i, Lanes lanes) {
      uint64_t *to = w.row(i[0]), *high = w.row(i[1]), *low = w.row(i[2]);
      auto half = [&](uint64_t x) { return brain ? rounded<bfloat16>(get<float>(x)).bits : rounded<float16>(get<float>(x)).bits; };
      each(lanes, [&](int l) { to[l] = (uint64_t)half(high[l]) << 16 | half(low[l]); });
      return Outcome::done;
    };
  }
  return of_any(i.type(), [&]<class From>(From) -> Handler {
    return of_any(to_type, [&]<class To>(To) -> Handler {
      return [](Machine&, Warp& w, const Instruction& i, Lanes lanes) {
        uint64_t *to = w.row(i[0]), *x = w.row(i[1]);
        each(lanes, [&](int l) { to[l] = put<To>(converted<From, To>(i, get<From>(x[l]))); });
        return Outcome::done;
      };
    });
  });
}

inline Outcome shuffle(Machine&, Warp& w, const Instruction& i, Lanes lanes) {
  uint64_t from[LANES], *by = w.row(i[2]), *clamp = w.row(i[3]);
  std::copy_n(w.row(i[1]), LANES, from);
  Lanes inside = 0;
  each(lanes, [&](int l) {
    int segment = clamp[l] >> 8 & 31, first = l & segment, last = first | (clamp[l] & 31 & ~segment), n = (int)by[l];
    int source = i.has("idx") ? first | (n & 31 & ~segment) : i.has("bfly") ? l ^ n : i.has("up") ? l - n : l + n;
    bool within = i.has("up") ? source >= last : source <= last;
    w.row(i[0])[l] = from[within ? source : l];
    inside |= Lanes(within) << l;
  });
  for (const Operand& o : i[0].parts) set(w, o, lanes, inside);
  return Outcome::done;
}

inline Outcome elect(Machine&, Warp& w, const Instruction& i, Lanes lanes) {
  int first = std::countr_zero(lanes);
  if (i[0].row >= 0) each(lanes, [&](int l) { w.row(i[0])[l] = first; });
  for (const Operand& o : i[0].parts) set(w, o, lanes, Lanes(1) << first);
  return Outcome::done;
}

// Bytes of two registers in any order.
inline Outcome permute(Machine&, Warp& w, const Instruction& i, Lanes lanes) {
  uint64_t *to = w.row(i[0]), *x = w.row(i[1]), *y = w.row(i[2]), *order = w.row(i[3]);
  each(lanes, [&](int l) {
    uint64_t bytes = (y[l] << 32) | (uint32_t)x[l], result = 0;
    for (int n = 0; n < 4; n++) {
      int which = order[l] >> (4 * n) & 15;
      int8_t byte = (int8_t)(bytes >> (8 * (which & 7)));
      result |= (uint64_t)(uint8_t)(which & 8 ? byte >> 7 : byte) << (8 * n);
    }
    to[l] = result;
  });
  return Outcome::done;
}

inline Outcome jump(Machine&, Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) { w.at[l] = i.target; });
  return Outcome::jumped;
}

inline Outcome leave(Machine& m, Warp& w, const Instruction& i, Lanes lanes) {
  w.gone |= lanes;
  if (w.ended() && !(w.products.empty() && w.open.rows.empty())) m.notes.add(place(i) + " before products are done");
  return Outcome::done;
}

inline Outcome nothing(Machine&, Warp&, const Instruction&, Lanes) { return Outcome::done; }

// What does the instruction, or nothing for one of units.h.
inline Handler arithmetic(const Instruction& i) {
  const Text &name = i.words[0], &type = i.type();
  if (name == "mov" || name == "cvta") return move;
  if (name == "selp") return choose;
  if (name == "setp") return set_predicate(i);
  if (name == "cvt") return convert(i);
  if (name == "shl" || name == "shr") return shift(name == "shl", type);
  if (name == "fma" || (name == "mad" && i.has("lo"))) return fused(type);
  if (name == "shfl") return shuffle;
  if (name == "elect") return elect;
  if (name == "prmt") return permute;
  if (name == "bra") return jump;
  if (name == "ret" || name == "exit") return leave;
  if (name == "prefetch" || i.is("fence.mbarrier_init")) return nothing;
  if (type == "f32" && (name == "min" || name == "max")) return float_extreme(name == "max", i.has("NaN"));
  if (type == "f32") return float_function(name);
  if (type == "bf16x2" || type == "f16x2") return of_signs(name);
  if (name == "mul") return integer_product(i);
  return integer_function(name, type);
}
