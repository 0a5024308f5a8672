// The packed groups of a KV cache: multiplied out, and attended to where they lie.
#include "cpu_common.h"

// Groups of a KV cache multiplied out: code * scale + minimum. A row holds G tokens of S runs of `run` channels; a scale and a
// minimum belong to each run, stored as bf16 or e4m3 (in the units of the outer index), less a centre where there is one.
static float e4m3(uint8_t byte) {
    const int exponent = byte >> 3 & 15, mantissa = byte & 7;
    if (exponent == 15 && mantissa == 7) return NAN;
    const float size = exponent ? std::ldexp(1 + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
    return byte >> 7 ? -size : size;
}

struct EightBits {
    float value[256];
    EightBits() { for (int byte = 0; byte < 256; byte++) value[byte] = e4m3(uint8_t(byte)); }
};
static const EightBits E4M3;

static inline void put(void* out, long at, float value, int narrow) {
    if (narrow) ((uint16_t*)out)[at] = to_bf16(value);
    else ((float*)out)[at] = value;
}

// Rows of packed groups where they lie.
struct GroupRows {
    const uint8_t* packed;
    const void* affine;
    const float* units;
    long packed_outer, packed_row, affine_outer, affine_row, rows, G, S, run, width;
    int bits, eight_bits;

    // What may be read from a row on: more than the row, so that only the last one ends in a short copy.
    long bytes_from(long r) const { return (rows - r - 1) * packed_row + (G * width + 7) / 8 * bits; }

    // A row's scales (first = 0) or minima (first = S) as floats.
    void stored(long o, long r, long first, float* to) const {
        const long at = o * affine_outer + r * affine_row + first;
        for (long s = 0; s < S; s++)
            to[s] = eight_bits ? E4M3.value[((const uint8_t*)affine)[at + s]] * units[2 * o + (first > 0)]
                               : bf16(((const uint16_t*)affine)[at + s]);
    }
};

extern "C" void expand_groups(const uint8_t* packed, long packed_outer, long packed_row, const void* affine, long affine_outer,
                              long affine_row, int eight_bits, const float* units, const float* centre, void* out, int narrow,
                              long out_outer, long out_token, long outer, long rows, long G, long S, long run, int bits,
                              int threads) {
    const GroupRows x{packed, affine, units, packed_outer, packed_row, affine_outer, affine_row, rows, G, S, run, S * run,
                      bits, eight_bits};
    const long width = x.width, row_bytes = (G * width + 7) / 8 * bits;
    const bool whole = width % 8 == 0 && (run == 1 || run % 8 == 0);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (long o = 0; o < outer; o++)
        for (long r = 0; r < rows; r++) {
            const uint8_t* row = packed + o * packed_outer + r * packed_row;
            float scale[512], start[512];  // of the runs
            x.stored(o, r, 0, scale);
            x.stored(o, r, S, start);
            for (long g = 0; g < G; g++) {
                const long to = o * out_outer + (r * G + g) * out_token;
                for (long c = 0; c < width;) {
                    const long k = g * width + c, at = k / 8 * bits;
                    const uint64_t codes = eight_codes(row + at, bits, row_bytes - at) >> (k % 8 * 8);
#if defined(__AVX2__)
                    if (whole) {
                        const __m256 value = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(codes)));
                        const __m256 step = run == 1 ? _mm256_loadu_ps(scale + c) : _mm256_set1_ps(scale[c / run]);
                        const __m256 low = run == 1 ? _mm256_loadu_ps(start + c) : _mm256_set1_ps(start[c / run]);
                        // multiplied and added apart (-ffp-contract=off), as torch does: a fused one rounds otherwise
                        __m256 sum = _mm256_add_ps(_mm256_mul_ps(value, step), low);
                        if (centre) sum = _mm256_add_ps(sum, _mm256_loadu_ps(centre + o * width + c));
                        if (narrow) {
                            float eight[8];
                            _mm256_storeu_ps(eight, sum);
                            for (int i = 0; i < 8; i++) put(out, to + c + i, eight[i], 1);
                        } else {
                            _mm256_storeu_ps((float*)out + to + c, sum);
                        }
                        c += 8;
                        continue;
                    }
#endif
                    const long most = 8 - k % 8 < width - c ? 8 - k % 8 : width - c;
                    for (long i = 0; i < most; i++) {
                        const float product = float(codes >> (8 * i) & 255) * scale[(c + i) / run];
                        float sum = product + start[(c + i) / run];
                        if (centre) sum += centre[o * width + c + i];
                        put(out, to + c + i, sum, narrow);
                    }
                    c += most;
                }
            }
        }
}

// Attention of one query per head over groups of a KV cache, without multiplying them out. With x = code * scale + start
// (+ centre), a score is  q . x = (q * scale) . code + q . (start + centre),  so a row of keys costs one product of its
// scales with the query, and a code one multiplication. Values likewise, with the weights of the tokens in the query's place.
#if defined(__AVX2__)
static inline __m256 codes_at(const uint8_t* row, long k, int bits, long bytes) {
    const long at = k / 8 * bits;
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight_codes(row + at, bits, bytes - at))));
}

static inline __m256 plus(__m256 sum, __m256 a, __m256 b) {
#if defined(__FMA__)
    return _mm256_fmadd_ps(a, b, sum);
#else
    return _mm256_add_ps(sum, _mm256_mul_ps(a, b));
#endif
}

template <int Q>
static void row_scores(const GroupRows& x, const uint8_t* row, const float* scaled, const float* bias, float* out,
                       long out_query, long bytes) {
    for (long g = 0; g < x.G; g++) {
        __m256 sum[Q];
        for (int q = 0; q < Q; q++) sum[q] = _mm256_setzero_ps();
        for (long c = 0; c < x.width; c += 8) {
            const __m256 code = codes_at(row, g * x.width + c, x.bits, bytes);
            for (int q = 0; q < Q; q++)
                sum[q] = plus(sum[q], code, _mm256_loadu_ps(scaled + q * x.width + c));
        }
        for (int q = 0; q < Q; q++) out[q * out_query + g] = total(sum[q]) + bias[q];
    }
}

// Rows of one token each: their weights times their scales, `scaled` [Q, TILE, S], times codes, added to out [Q, width].
static const long TILE = 16;

template <int Q>
static void tile_sums(const GroupRows& x, const uint8_t* first, long rows, const float* scaled, float* out, long bytes) {
    for (long c = 0; c < x.width; c += 8) {
        __m256 sum[Q];
        for (int q = 0; q < Q; q++) sum[q] = _mm256_loadu_ps(out + q * x.width + c);
        for (long r = 0; r < rows; r++) {
            const __m256 code = codes_at(first + r * x.packed_row, c, x.bits, bytes - r * x.packed_row);
            for (int q = 0; q < Q; q++) {
                const float* w = scaled + (q * TILE + r) * x.S;
                sum[q] = plus(sum[q], code, x.run == 1 ? _mm256_loadu_ps(w + c) : _mm256_set1_ps(w[c / x.run]));
            }
        }
        for (int q = 0; q < Q; q++) _mm256_storeu_ps(out + q * x.width + c, sum[q]);
    }
}

#define FOR_UP_TO_FOUR(count, call) \
    switch (count) { case 1: call(1); break; case 2: call(2); break; case 3: call(3); break; default: call(4); }
#endif

// scores[o, q, r * G + g]; 1 where done, 0 where this processor or these shapes are left to the caller.
extern "C" int group_scores(const uint8_t* packed, long packed_outer, long packed_row, const void* affine, long affine_outer,
                            long affine_row, int eight_bits, const float* units, const float* centre, const float* query,
                            float* scores, long outer, long queries, long rows, long G, long S, long run, int bits,
                            int threads) {
#if defined(__AVX2__)
    const GroupRows x{packed, affine, units, packed_outer, packed_row, affine_outer, affine_row, rows, G, S, run, S * run,
                      bits, eight_bits};
    if (x.width % 8 || (run != 1 && run % 8) || x.width > 512) return 0;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (long o = 0; o < outer; o++)
        for (long r = 0; r < rows; r++) {
            float scale[512], start[512], scaled[4 * 512], bias[4];
            x.stored(o, r, 0, scale);
            x.stored(o, r, S, start);
            for (long first = 0; first < queries; first += 4) {
                const int many = int(queries - first < 4 ? queries - first : 4);
                for (int q = 0; q < many; q++) {
                    const float* from = query + (o * queries + first + q) * x.width;
                    bias[q] = 0;
                    for (long c = 0; c < x.width; c++) {
                        scaled[q * x.width + c] = from[c] * scale[c / run];
                        bias[q] += from[c] * (start[c / run] + (centre ? centre[o * x.width + c] : 0));
                    }
                }
                const uint8_t* row = packed + o * packed_outer + r * packed_row;
                float* to = scores + (o * queries + first) * rows * G + r * G;
#define ROW_SCORES(Q) row_scores<Q>(x, row, scaled, bias, to, rows * G, x.bytes_from(r))
                FOR_UP_TO_FOUR(many, ROW_SCORES)
            }
        }
    return 1;
#else
    return 0;
#endif
}

// out[p, o, q, c]: sums over the rows of part p of `parts`; a row is one token, weights [outer, queries, rows].
extern "C" int group_sums(const uint8_t* packed, long packed_outer, long packed_row, const void* affine, long affine_outer,
                          long affine_row, int eight_bits, const float* units, const float* weights, float* out, long parts,
                          long outer, long queries, long rows, long S, long run, int bits, int threads) {
#if defined(__AVX2__)
    const GroupRows x{packed, affine, units, packed_outer, packed_row, affine_outer, affine_row, rows, 1, S, run, S * run,
                      bits, eight_bits};
    if (x.width % 8 || (run != 1 && run % 8) || S > 64) return 0;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (long p = 0; p < parts; p++)
        for (long o = 0; o < outer; o++)
            for (long first = 0; first < queries; first += 4) {
                const int many = int(queries - first < 4 ? queries - first : 4);
                float scale[64], start[64], scaled[4 * TILE * 64], low[4 * 64];  // low: weights times minima, by run
                float* to = out + ((p * outer + o) * queries + first) * x.width;
                std::memset(to, 0, many * x.width * sizeof(float));
                std::memset(low, 0, sizeof(low));
                const long end = (p + 1) * rows / parts;
                for (long tile = p * rows / parts; tile < end; tile += TILE) {
                    const long here = end - tile < TILE ? end - tile : TILE;
                    for (long r = 0; r < here; r++) {
                        x.stored(o, tile + r, 0, scale);
                        x.stored(o, tile + r, S, start);
                        for (int q = 0; q < many; q++) {
                            const float w = weights[(o * queries + first + q) * rows + tile + r];
                            for (long s = 0; s < S; s++) {
                                scaled[(q * TILE + r) * S + s] = w * scale[s];
                                low[q * S + s] += w * start[s];
                            }
                        }
                    }
                    const uint8_t* from = packed + o * packed_outer + tile * packed_row;
#define TILE_SUMS(Q) tile_sums<Q>(x, from, here, scaled, to, x.bytes_from(tile))
                    FOR_UP_TO_FOUR(many, TILE_SUMS)
                }
                for (int q = 0; q < many; q++)
                    for (long c = 0; c < x.width; c++) to[q * x.width + c] += low[q * S + c / run];
            }
    return 1;
#else
    return 0;
#endif
}
