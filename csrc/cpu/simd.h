// Sixteen lanes at a time, on every level: one zmm, two ymm, or sixteen plain floats.
//
// The logical width never changes, so neither does the order of any sum, and a kernel gives the same bits
// whatever the processor. Written by hand because the compiler's own clones picked the baseline on some
// processors. Included by files that are compiled once per level; PYEFF_LEVEL names the level and its
// namespace. See csrc/common/lane.h for what the operations promise.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/lane.h"
#if defined(PYEFF_AT_AVX512) || defined(PYEFF_AT_AVX2)
#ifdef __GNUC__
// GCC before 13 takes the undefined operand inside its own AVX-512 intrinsics for a bug of their callers.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

namespace pyeff {
namespace PYEFF_LEVEL {

constexpr int LANES = 16;

// The operations of one lane, which those of sixteen would hide.
using pyeff::abs_of;
using pyeff::bits_of;
using pyeff::broadcast;
using pyeff::divide;
using pyeff::float_of_bits;
using pyeff::float_of_uint;
using pyeff::max_of;
using pyeff::min_of;
using pyeff::root_and_inverse;
using pyeff::select;
using pyeff::sqrt_of;

#if defined(PYEFF_AT_AVX512)
// ------------------------------------------------------------------------------------------------ AVX-512
struct F16 {
    __m512 v;
};
struct U16 {
    __m512i v;
};
struct M16 {
    __mmask16 v;
};

PYEFF_LANE F16 splat(float x) { return {_mm512_set1_ps(x)}; }
PYEFF_LANE U16 splat(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
PYEFF_LANE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
PYEFF_LANE void store(float* p, F16 x) { _mm512_storeu_ps(p, x.v); }
PYEFF_LANE U16 load_u8(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PYEFF_LANE U16 load_high_u8(const uint8_t* p) { return {_mm512_slli_epi32(load_u8(p).v, 24)}; }
PYEFF_LANE void store_u8(uint8_t* p, U16 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
PYEFF_LANE U16 load_u16(const uint16_t* p) {
    return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PYEFF_LANE void store_u16(uint16_t* p, U16 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x.v));
}
PYEFF_LANE void store_high_u16(uint16_t* p, U16 x) {
    const __m512i odd = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25, 23,
                                         21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(_mm512_permutexvar_epi16(odd, x.v)));
}

#define PYEFF_BINARY(T, op, call) \
    PYEFF_LANE T op(T a, T b) { return {call(a.v, b.v)}; }
PYEFF_BINARY(F16, operator+, _mm512_add_ps)
PYEFF_BINARY(F16, operator-, _mm512_sub_ps)
PYEFF_BINARY(F16, operator*, _mm512_mul_ps)
PYEFF_BINARY(F16, divide, _mm512_div_ps)
PYEFF_BINARY(F16, max_of, _mm512_max_ps)
PYEFF_BINARY(F16, min_of, _mm512_min_ps)
PYEFF_BINARY(U16, operator+, _mm512_add_epi32)
PYEFF_BINARY(U16, operator-, _mm512_sub_epi32)
PYEFF_BINARY(U16, operator&, _mm512_and_si512)
PYEFF_BINARY(U16, operator|, _mm512_or_si512)
PYEFF_BINARY(U16, operator^, _mm512_xor_si512)
PYEFF_BINARY(U16, operator*, _mm512_mullo_epi32)
PYEFF_BINARY(U16, max_of, _mm512_max_epu32)
PYEFF_BINARY(U16, min_of, _mm512_min_epu32)
#undef PYEFF_BINARY
PYEFF_LANE U16 operator<<(U16 a, int n) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(n))}; }
PYEFF_LANE U16 operator>>(U16 a, int n) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
PYEFF_LANE F16 sqrt_of(F16 x) { return {_mm512_sqrt_ps(x.v)}; }
// In halves: wherever p lies, a half crosses a line of the cache at most every other time. A sketch of 8 x 10^6 floats,
// whose places begin anywhere, takes 10 to 20 % less of a Zen 5 thread's time than with 64 bytes at once.
PYEFF_LANE void add_to(float* p, F16 x) {
    const __m256 low = _mm256_add_ps(_mm256_loadu_ps(p), _mm512_castps512_ps256(x.v));
    const __m256 high = _mm256_add_ps(_mm256_loadu_ps(p + 8), _mm512_extractf32x8_ps(x.v, 1));
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
}
PYEFF_LANE U16 bits_of(F16 x) { return {_mm512_castps_si512(x.v)}; }
PYEFF_LANE F16 float_of_bits(U16 x) { return {_mm512_castsi512_ps(x.v)}; }
PYEFF_LANE F16 float_of_uint(U16 x) { return {_mm512_cvtepi32_ps(x.v)}; }
PYEFF_LANE M16 operator>(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
PYEFF_LANE M16 operator<(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
PYEFF_LANE M16 operator>=(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
PYEFF_LANE M16 operator==(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
PYEFF_LANE M16 operator>(U16 a, U16 b) { return {_mm512_cmpgt_epu32_mask(a.v, b.v)}; }
PYEFF_LANE M16 operator==(U16 a, U16 b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
PYEFF_LANE F16 select(M16 m, F16 yes, F16 no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
PYEFF_LANE U16 select(M16 m, U16 yes, U16 no) { return {_mm512_mask_blend_epi32(m.v, no.v, yes.v)}; }

PYEFF_LANE uint32_t max_of_lanes(U16 x) { return _mm512_reduce_max_epu32(x.v); }
PYEFF_LANE void store_low_bytes(uint8_t* p, U16 x, uint8_t* q, U16 y) {
    store_u8(p, x);
    store_u8(q, y);
}

#elif defined(PYEFF_AT_AVX2)
// ------------------------------------------------------------------------------------------------ AVX2
struct F16 {
    __m256 a, b;
};
struct U16 {
    __m256i a, b;
};
struct M16 {
    __m256i a, b;  // all ones or all zeros in each lane
};

PYEFF_LANE F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PYEFF_LANE U16 splat(uint32_t x) {
    const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
    return {v, v};
}
PYEFF_LANE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PYEFF_LANE void store(float* p, F16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
PYEFF_LANE U16 load_u8(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
}
PYEFF_LANE U16 load_high_u8(const uint8_t* p) {
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const int z = 0x808080;  // the three lower bytes are zero
    return {
        _mm256_shuffle_epi8(bytes, _mm256_setr_epi32(z, 0x01000000 | z, 0x02000000 | z, 0x03000000 | z, 0x04000000 | z,
                                                     0x05000000 | z, 0x06000000 | z, 0x07000000 | z)),
        _mm256_shuffle_epi8(bytes, _mm256_setr_epi32(0x08000000 | z, 0x09000000 | z, 0x0a000000 | z, 0x0b000000 | z,
                                                     0x0c000000 | z, 0x0d000000 | z, 0x0e000000 | z, 0x0f000000 | z))};
}
PYEFF_LANE U16 load_u16(const uint16_t* p) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
// The packs work within 128-bit halves, so the quarters are put in order afterwards. Values must fit:
// 0..65535, 0..255.
PYEFF_LANE __m256i packed_u16(U16 x) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8); }
PYEFF_LANE void store_u16(uint16_t* p, U16 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed_u16(x)); }
PYEFF_LANE void store_u8(uint8_t* p, U16 x) {
    const __m256i w = packed_u16(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}

#define PYEFF_BINARY(T, op, call) \
    PYEFF_LANE T op(T x, T y) { return {call(x.a, y.a), call(x.b, y.b)}; }
PYEFF_BINARY(F16, operator+, _mm256_add_ps)
PYEFF_BINARY(F16, operator-, _mm256_sub_ps)
PYEFF_BINARY(F16, operator*, _mm256_mul_ps)
PYEFF_BINARY(F16, divide, _mm256_div_ps)
PYEFF_BINARY(F16, max_of, _mm256_max_ps)
PYEFF_BINARY(F16, min_of, _mm256_min_ps)
PYEFF_BINARY(U16, operator+, _mm256_add_epi32)
PYEFF_BINARY(U16, operator-, _mm256_sub_epi32)
PYEFF_BINARY(U16, operator&, _mm256_and_si256)
PYEFF_BINARY(U16, operator|, _mm256_or_si256)
PYEFF_BINARY(U16, operator^, _mm256_xor_si256)
PYEFF_BINARY(U16, operator*, _mm256_mullo_epi32)
PYEFF_BINARY(U16, max_of, _mm256_max_epu32)
PYEFF_BINARY(U16, min_of, _mm256_min_epu32)
#undef PYEFF_BINARY
PYEFF_LANE U16 operator<<(U16 x, int n) {
    const __m128i c = _mm_cvtsi32_si128(n);
    return {_mm256_sll_epi32(x.a, c), _mm256_sll_epi32(x.b, c)};
}
PYEFF_LANE U16 operator>>(U16 x, int n) {
    const __m128i c = _mm_cvtsi32_si128(n);
    return {_mm256_srl_epi32(x.a, c), _mm256_srl_epi32(x.b, c)};
}
PYEFF_LANE F16 sqrt_of(F16 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
PYEFF_LANE U16 bits_of(F16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
PYEFF_LANE F16 float_of_bits(U16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
PYEFF_LANE F16 float_of_uint(U16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
#define PYEFF_COMPARE(op, predicate)                                      \
    PYEFF_LANE M16 op(F16 x, F16 y) {                                     \
        return {_mm256_castps_si256(_mm256_cmp_ps(x.a, y.a, predicate)),  \
                _mm256_castps_si256(_mm256_cmp_ps(x.b, y.b, predicate))}; \
    }
PYEFF_COMPARE(operator>, _CMP_GT_OQ)
PYEFF_COMPARE(operator<, _CMP_LT_OQ)
PYEFF_COMPARE(operator>=, _CMP_GE_OQ)
PYEFF_COMPARE(operator==, _CMP_EQ_OQ)
#undef PYEFF_COMPARE
PYEFF_LANE M16 operator==(U16 x, U16 y) { return {_mm256_cmpeq_epi32(x.a, y.a), _mm256_cmpeq_epi32(x.b, y.b)}; }
// AVX2 compares signed; flipping the top bit of both makes that an unsigned comparison.
PYEFF_LANE M16 operator>(U16 x, U16 y) {
    const __m256i top = _mm256_set1_epi32(INT32_MIN);
    return {_mm256_cmpgt_epi32(_mm256_xor_si256(x.a, top), _mm256_xor_si256(y.a, top)),
            _mm256_cmpgt_epi32(_mm256_xor_si256(x.b, top), _mm256_xor_si256(y.b, top))};
}
PYEFF_LANE F16 select(M16 m, F16 yes, F16 no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_castsi256_ps(m.a)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_castsi256_ps(m.b))};
}
PYEFF_LANE U16 select(M16 m, U16 yes, U16 no) {
    return {_mm256_blendv_epi8(no.a, yes.a, m.a), _mm256_blendv_epi8(no.b, yes.b, m.b)};
}
// Each 128-bit half gathers its low bytes, every operand's into a quarter of its own.
PYEFF_LANE void store_low_bytes(uint8_t* p, U16 x, uint8_t* q, U16 y) {
    const __m256i first = _mm256_broadcastsi128_si256(_mm_setr_epi32(0x0c080400, -1, -1, -1));
    const __m256i second = _mm256_broadcastsi128_si256(_mm_setr_epi32(-1, 0x0c080400, -1, -1));
    const __m256i third = _mm256_broadcastsi128_si256(_mm_setr_epi32(-1, -1, 0x0c080400, -1));
    const __m256i fourth = _mm256_broadcastsi128_si256(_mm_setr_epi32(-1, -1, -1, 0x0c080400));
    const __m256i bytes =
        _mm256_or_si256(_mm256_or_si256(_mm256_shuffle_epi8(x.a, first), _mm256_shuffle_epi8(x.b, second)),
                        _mm256_or_si256(_mm256_shuffle_epi8(y.a, third), _mm256_shuffle_epi8(y.b, fourth)));
    const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(ordered));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm256_extracti128_si256(ordered, 1));
}
PYEFF_LANE uint32_t max_of_lanes(U16 x) {
    const __m256i eight = _mm256_max_epu32(x.a, x.b);
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1))));
}

#else
// ------------------------------------------------------------------------------------------------ baseline
// Plain loops; the compiler makes of them what the processor family guarantees (SSE2, NEON).
struct F16 {
    float v[LANES];
};
struct U16 {
    uint32_t v[LANES];
};
struct M16 {
    bool v[LANES];
};

#define PYEFF_EACH(T, expression)                        \
    T r;                                                 \
    for (int i = 0; i < LANES; ++i) r.v[i] = expression; \
    return r;
PYEFF_LANE F16 splat(float x){PYEFF_EACH(F16, x)} PYEFF_LANE U16 splat(uint32_t x){PYEFF_EACH(U16, x)} PYEFF_LANE F16
    load(const float* p){PYEFF_EACH(F16, p[i])} PYEFF_LANE U16
    load_u8(const uint8_t* p){PYEFF_EACH(U16, p[i])} PYEFF_LANE U16
    load_u16(const uint16_t* p){PYEFF_EACH(U16, p[i])} PYEFF_LANE void store(float* p, F16 x) {
    std::memcpy(p, x.v, sizeof x.v);
}
PYEFF_LANE U16 load_high_u8(const uint8_t* p) {
    U16 r;
    for (int i = 0; i < LANES; ++i) r.v[i] = static_cast<uint32_t>(p[i]) << 24;
    return r;
}
PYEFF_LANE U16 max_of(U16 a, U16 b) {
    for (int i = 0; i < LANES; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
PYEFF_LANE U16 min_of(U16 a, U16 b) {
    for (int i = 0; i < LANES; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
}
PYEFF_LANE void store_low_bytes(uint8_t* p, U16 x, uint8_t* q, U16 y) {
    for (int i = 0; i < LANES; ++i) {
        p[i] = static_cast<uint8_t>(x.v[i]);
        q[i] = static_cast<uint8_t>(y.v[i]);
    }
}
PYEFF_LANE uint32_t max_of_lanes(U16 x) {
    uint32_t largest = x.v[0];
    for (int i = 1; i < LANES; ++i) largest = x.v[i] > largest ? x.v[i] : largest;
    return largest;
}
PYEFF_LANE void store_u8(uint8_t* p, U16 x) {
    for (int i = 0; i < LANES; ++i) p[i] = static_cast<uint8_t>(x.v[i]);
}
PYEFF_LANE void store_u16(uint16_t* p, U16 x) {
    for (int i = 0; i < LANES; ++i) p[i] = static_cast<uint16_t>(x.v[i]);
}
PYEFF_LANE F16 operator+(F16 a, F16 b){PYEFF_EACH(F16, a.v[i] + b.v[i])} PYEFF_LANE F16 operator-(F16 a, F16 b){
    PYEFF_EACH(F16, a.v[i] - b.v[i])} PYEFF_LANE F16 operator*(F16 a,
                                                               F16 b){PYEFF_EACH(F16, a.v[i] * b.v[i])} PYEFF_LANE F16
    divide(F16 a, F16 b){PYEFF_EACH(F16, a.v[i] / b.v[i])} PYEFF_LANE F16
    max_of(F16 a, F16 b){PYEFF_EACH(F16, a.v[i] > b.v[i] ? a.v[i] : b.v[i])} PYEFF_LANE F16
    min_of(F16 a, F16 b){PYEFF_EACH(F16, a.v[i] < b.v[i] ? a.v[i] : b.v[i])} PYEFF_LANE U16 operator+(U16 a, U16 b){
        PYEFF_EACH(U16, a.v[i] + b.v[i])} PYEFF_LANE U16 operator-(U16 a, U16 b){
        PYEFF_EACH(U16, a.v[i] - b.v[i])} PYEFF_LANE U16 operator&(U16 a, U16 b){
        PYEFF_EACH(U16, a.v[i] & b.v[i])} PYEFF_LANE U16 operator|(U16 a, U16 b){
        PYEFF_EACH(U16, a.v[i] | b.v[i])} PYEFF_LANE U16 operator^(U16 a, U16 b){
        PYEFF_EACH(U16, a.v[i] ^ b.v[i])} PYEFF_LANE U16 operator*(U16 a, U16 b){
        PYEFF_EACH(U16, a.v[i] * b.v[i])} PYEFF_LANE U16 operator<<(U16 a, int n){
        PYEFF_EACH(U16, a.v[i] << n)} PYEFF_LANE U16 operator>>(U16 a,
                                                                int n){PYEFF_EACH(U16, a.v[i] >> n)} PYEFF_LANE F16
    sqrt_of(F16 x){PYEFF_EACH(F16, __builtin_sqrtf(x.v[i]))} PYEFF_LANE U16 bits_of(F16 x) {
    U16 r;
    std::memcpy(r.v, x.v, sizeof r.v);
    return r;
}
PYEFF_LANE F16 float_of_bits(U16 x) {
    F16 r;
    std::memcpy(r.v, x.v, sizeof r.v);
    return r;
}
PYEFF_LANE F16 float_of_uint(U16 x){
    PYEFF_EACH(F16, static_cast<float>(static_cast<int32_t>(x.v[i])))} PYEFF_LANE M16 operator>(F16 a, F16 b){
    PYEFF_EACH(M16, a.v[i] > b.v[i])} PYEFF_LANE M16 operator<(F16 a, F16 b){
    PYEFF_EACH(M16, a.v[i] < b.v[i])} PYEFF_LANE M16 operator>=(F16 a, F16 b){
    PYEFF_EACH(M16, a.v[i] >= b.v[i])} PYEFF_LANE M16 operator==(F16 a, F16 b){
    PYEFF_EACH(M16, a.v[i] == b.v[i])} PYEFF_LANE M16 operator>(U16 a, U16 b){
    PYEFF_EACH(M16, a.v[i] > b.v[i])} PYEFF_LANE M16 operator==(U16 a,
                                                                U16 b){PYEFF_EACH(M16, a.v[i] == b.v[i])} PYEFF_LANE F16
    select(M16 m, F16 yes, F16 no){PYEFF_EACH(F16, m.v[i] ? yes.v[i] : no.v[i])} PYEFF_LANE U16
    select(M16 m, U16 yes, U16 no){PYEFF_EACH(U16, m.v[i] ? yes.v[i] : no.v[i])}
#undef PYEFF_EACH
#endif

// ------------------------------------------------------------------------------------------------ all levels
#if !defined(PYEFF_AT_AVX512)
PYEFF_LANE void add_to(float* p, F16 x) { store(p, load(p) + x); }
#endif
PYEFF_LANE F16 broadcast(float x, F16 /*like*/) { return splat(x); }
PYEFF_LANE U16 broadcast(uint32_t x, U16 /*like*/) { return splat(x); }
PYEFF_LANE F16 float_of_int(U16 x) { return float_of_uint(x); }
PYEFF_LANE F16 abs_of(F16 x) { return float_of_bits(bits_of(x) & splat(0x7fffffffu)); }

PYEFF_LANE F16 load_bf16(const uint16_t* p) { return float_of_bits(load_u16(p) << 16); }
PYEFF_LANE void store_bf16(uint16_t* p, F16 x) {  // the sixteen-lane twin of bf16_of_float
    const U16 u = bits_of(x);
    const U16 rounded = (u + splat(0x7fffu) + ((u >> 16) & splat(1u))) >> 16;
    const M16 is_nan = (u & splat(0x7fffffffu)) > splat(0x7f800000u);
    store_u16(p, select(is_nan, (u >> 16) | splat(0x40u), rounded));
}

#ifndef PYEFF_AT_AVX512
PYEFF_LANE void store_high_u16(uint16_t* p, U16 x) { store_u16(p, x >> 16); }
#endif

// sqrt(x) and 1 / (sqrt(x) + eps).
PYEFF_LANE void root_and_inverse(F16 x, F16 eps, F16& root, F16& inverse) {
    root = sqrt_of(x);
    inverse = divide(splat(1.0f), root + eps);
}

// Of two, roots first.
PYEFF_LANE void roots_and_inverses(F16 x, F16 y, F16 eps, F16& x_root, F16& y_root, F16& x_inverse, F16& y_inverse) {
    x_root = sqrt_of(x);
    y_root = sqrt_of(y);
    const F16 one = splat(1.0f), x_divisor = x_root + eps, y_divisor = y_root + eps;
    x_inverse = divide(one, x_divisor);
    y_inverse = divide(one, y_divisor);
}

// The first n lanes from memory, `fill` in the rest.
PYEFF_LANE F16 load_first(const float* p, int n, float fill) {
    alignas(64) float lanes[LANES];
    for (int i = 0; i < LANES; ++i) lanes[i] = i < n ? p[i] : fill;
    return load(lanes);
}

// Horizontal reductions by halving, the same tree on every level.
PYEFF_LANE float sum_of(F16 x) {
    alignas(64) float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
    return lanes[0];
}
PYEFF_LANE float max_of_lanes(F16 x) {
    alignas(64) float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

}  // namespace PYEFF_LEVEL
}  // namespace pyeff
