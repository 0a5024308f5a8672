// What the CPU kernels share: how packed bytes are read. Plain C interfaces, built and called by compress/kernels/cpu.py.
//
// Legend: M tokens, N output neurons, K columns.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__) || defined(__BMI2__)
#include <immintrin.h>
#endif

static inline float bf16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// Eight codes of b bits, one to a byte; `bytes` says how many may be read. Zen before the third has pdep in microcode, tens of
// cycles long.
static inline uint64_t eight_codes(const uint8_t* from, int bits, long bytes, int shift = 0) {
    uint64_t word = 0;
    if (bytes >= 8) std::memcpy(&word, from, 8);
    else std::memcpy(&word, from, bytes);
    word >>= shift;
#if defined(__BMI2__) && !defined(__znver1__) && !defined(__znver2__)
    return _pdep_u64(word, 0x0101010101010101ull * ((1ull << bits) - 1));
#else
    for (int many = 4; many; many /= 2) {  // halves of eight, four and two codes move apart
        uint64_t lower = 0;  // the lower half of every run of bytes that has been moved apart
        for (int at = 0; at < 64; at += 16 * many) lower |= ((1ull << (many * bits)) - 1) << at;
        const uint64_t upper = lower << (many * bits);
        word = (word & lower) | (word & upper) << (8 * many - many * bits);
    }
    return word;
#endif
}

// A run of inputs rounded to 15 bits and a sign; returns the scale, NaN where one of them is not finite.
static inline float fifteen_bits(const float* from, int16_t* to, long width) {
    float most[8] = {}, spoilt[8] = {}, largest = 0, spoils = 0;
    long k = 0;
    for (; k + 8 <= width; k += 8)
        for (int i = 0; i < 8; i++) {
            const float size = std::fabs(from[k + i]);
            most[i] = size > most[i] ? size : most[i];
            spoilt[i] += size * 0;
        }
    for (; k < width; k++) largest = std::fmax(largest, std::fabs(from[k])), spoils += from[k] * 0;
    for (int i = 0; i < 8; i++) largest = std::fmax(largest, most[i]), spoils += spoilt[i];
    const float inverse = largest > 1e-30f && spoils == 0 ? 32767 / largest : 0;  // below, 32767 / largest has no end
    if (!inverse) std::memset(to, 0, width * sizeof(int16_t));
    else for (k = 0; k < width; k++) to[k] = int16_t(std::nearbyint(from[k] * inverse));
    return spoils == 0 ? (inverse ? largest / 32767 : 0) : NAN;
}

static inline uint16_t to_bf16(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return value == value ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}

// Inputs `[M, K]` in bf16 or fp32, rows `stride` apart, as fp32.
struct Floats {
    std::vector<float> held;
    const float* data;
    long stride;
    Floats(const void* x, int narrow, long stride, long M, long K)
        : held(narrow ? M * K : 0), data(narrow ? held.data() : (const float*)x), stride(narrow ? K : stride) {
        for (long m = 0; narrow && m < M; m++)
            for (long k = 0; k < K; k++) held[m * K + k] = bf16(((const uint16_t*)x)[m * stride + k]);
    }
};

// Outputs in bf16 or fp32, from zero on in fp32 until `store`.
struct Sums {
    std::vector<float> held;
    uint16_t* narrow;
    float* data;
    Sums(void* y, int narrow, long count) : held(narrow ? count : 0), narrow(narrow ? (uint16_t*)y : nullptr) {
        data = narrow ? held.data() : (float*)y;
        if (!narrow) std::memset(data, 0, count * sizeof(float));
    }
    void store() const {
        for (size_t i = 0; i < held.size(); i++) narrow[i] = to_bf16(held[i]);
    }
};

#if defined(__AVX2__)
// sums plus products of pairs of 16-bit integers
static inline __m256i plus_pairs(__m256i sums, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpwssd_epi32(sums, a, b);
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
#endif
}

static inline float total(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
#endif
