// Products of few tokens with packed weights on a CPU. Plain C interface, built and called by compress/kernels/cpu.py.
//
// A decode step reads every weight once, so it takes what reading takes, if unpacking keeps up. Integer weights meet inputs
// rounded to 15 bits per segment of columns (an error of 3e-5 of the largest, far below that of bf16) and are multiplied by
// vpmaddwd: 10 instructions for 32 four-bit weights. Codes stay unsigned; the offset is taken off with the sum of the inputs.
//
// Legend: M tokens, N output neurons, K columns, S segments: runs of `seg` columns that share the scale of the inputs and
// lie in one group of the weights.

#include <cstdint>
#include <cstring>
#include <cmath>
#if defined(__AVX2__) || defined(__BMI2__)
#include <immintrin.h>
#endif

static inline float bf16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

static const long BLOCK = 32;

// Eight codes of b bits, one to a byte; `bytes` says how many may be read.
static inline uint64_t eight_codes(const uint8_t* from, int bits, long bytes, int shift = 0) {
    uint64_t word = 0;
    if (bytes >= 8) std::memcpy(&word, from, 8);
    else std::memcpy(&word, from, bytes);
    word >>= shift;
    const uint64_t lanes = 0x0101010101010101ull * ((1ull << bits) - 1);
#if defined(__BMI2__)
    return _pdep_u64(word, lanes);
#else
    uint64_t spread = 0;
    for (int i = 0; i < 8; i++) spread |= (word >> (i * bits) & ((1ull << bits) - 1)) << (8 * i);
    return spread;
#endif
}

// Four-bit codes lie in pairs in a byte: within a full block of 32 columns the even ones come first, then the odd ones.
static inline long place(long k, long full, int bits) {
    return bits == 4 && k < full ? k / BLOCK * BLOCK + (k % 2) * (BLOCK / 2) + (k % BLOCK) / 2 : k;
}

// Inputs rounded to 15 bits and a sign per segment, and arranged.
extern "C" void arrange(const float* x, int16_t* q, float* scale, float* sum, long M, long K, long seg, int bits, int threads) {
    long S = (K + seg - 1) / seg;
#pragma omp parallel for num_threads(threads) collapse(2) if (M * K > 65536)
    for (long m = 0; m < M; m++)
        for (long s = 0; s < S; s++) {
            long start = s * seg, width = (start + seg < K ? seg : K - start), full = width / BLOCK * BLOCK;
            const float* from = x + m * K + start;
            int16_t* to = q + m * K + start;
            float largest = 0;
            for (long k = 0; k < width; k++) largest = std::fmax(largest, std::fabs(from[k]));
            scale[m * S + s] = largest / 32767;
            const float inverse = largest > 0 ? 32767 / largest : 0;
            int64_t total = 0;
            for (long k = 0; k < width; k++) {
                int16_t code = int16_t(std::lrintf(from[k] * inverse));
                to[place(k, full, bits)] = code;
                total += code;
            }
            sum[m * S + s] = float(total);
        }
}

// Sylvester's transform of every run of n numbers, in place, the lowest bit of the index first as in the reference.
extern "C" void butterflies(float* y, long runs, long n, int threads) {
#pragma omp parallel for num_threads(threads) if (runs * n > 65536)
    for (long r = 0; r < runs; r++) {
        float* x = y + r * n;
        for (long half = 1; half < n; half *= 2)
            for (long k = 0; k < n; k += 2 * half)
                for (long i = k; i < k + half; i++) {
                    const float a = x[i], b = x[i + half];
                    x[i] = a + b;
                    x[i + half] = a - b;
                }
    }
}

// Inputs rounded as `rounded_activation` of compress/kernels/mixed_precision.py does it, less their zero, and arranged: per
// token and slice asymmetric codes of `bits`, the range forced to hold 0 and cut at `clip` root mean squares (0: not).
extern "C" void round_inputs(const float* x, long stride, int16_t* q, float* scale, float* sum, long M, long K, long slice,
                             long seg, int bits, int weight_bits, float clip, int threads) {
    const long S = (K + seg - 1) / seg;
    const float most = float((1 << bits) - 1);
#pragma omp parallel for num_threads(threads) collapse(2) if (M * K > 65536)
    for (long m = 0; m < M; m++)
        for (long from = 0; from < K; from += slice) {
            const float* v = x + m * stride + from;
            float lows[8] = {}, highs[8] = {}, squares[8] = {};
            long k = 0;
            for (; k + 8 <= slice; k += 8)
                for (int i = 0; i < 8; i++) {
                    lows[i] = v[k + i] < lows[i] ? v[k + i] : lows[i];
                    highs[i] = v[k + i] > highs[i] ? v[k + i] : highs[i];
                    squares[i] += v[k + i] * v[k + i];
                }
            for (; k < slice; k++) {
                lows[0] = std::fmin(lows[0], v[k]);
                highs[0] = std::fmax(highs[0], v[k]);
                squares[0] += v[k] * v[k];
            }
            float low = 0, high = 0, square = 0;
            for (int i = 0; i < 8; i++) low = std::fmin(low, lows[i]), high = std::fmax(high, highs[i]), square += squares[i];
            if (clip > 0) {
                const float bound = clip * std::sqrt(square / float(slice));
                low = low < -bound ? -bound : low;
                high = high > bound ? bound : high;
            }
            float step = (high - low) / most;
            if (!(step > 0)) step = 1;
            const float zero = std::nearbyint(-low / step);
            const bool finite = square == square && step * 0 == 0;  // a NaN or an infinity makes the token NaN
            for (long start = from; start < from + slice; start += seg) {
                const long width = start + seg < from + slice ? seg : from + slice - start, full = width / BLOCK * BLOCK;
                int16_t* to = q + m * K + start;
                int64_t total = 0;
                for (long at = 0; at < width; at += BLOCK) {
                    const long count = at + BLOCK < width ? BLOCK : width - at;
                    float centred[BLOCK];
                    for (long i = 0; i < count; i++) {
                        const float code = std::nearbyint(v[start - from + at + i] / step) + zero;
                        centred[i] = (code < 0 ? 0 : code > most ? most : code) - zero;
                    }
                    for (long i = 0; i < count; i++) {
                        const int16_t one = finite ? int16_t(centred[i]) : int16_t(0);
                        to[place(at + i, full, weight_bits)] = one;
                        total += one;
                    }
                }
                scale[m * S + start / seg] = finite ? step : NAN;
                sum[m * S + start / seg] = float(total);
            }
        }
}

#if defined(__AVX2__)
static inline float total(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
#endif

template <int M, int BITS>
static void integer_rows(const int16_t* q, const float* scale, const float* sum, const uint8_t* w, const uint16_t* w_scale,
                         float* y, long N, long K, long row_bytes, long seg, long group, long groups, int add, int threads) {
    const long S = (K + seg - 1) / seg, flush = BITS == 4 ? 4096 : 1024;  // columns whose sums fit 32 bits
    const float zero = float(1 << (BITS - 1));
    const uint8_t* behind = w + N * row_bytes;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        float result[M] = {};
#if defined(__AVX2__)
        __m256 running[M];
        for (int m = 0; m < M; m++) running[m] = _mm256_setzero_ps();
#endif
        for (long s = 0; s < S; s++) {
            const long start = s * seg, stop = start + seg < K ? start + seg : K, full = start + (stop - start) / BLOCK * BLOCK;
            const float ws = bf16(w_scale[n * groups + start / group]);
            const uint8_t* row = w + n * row_bytes;
            long k = start;
#if defined(__AVX2__)
            const __m128i low_half = _mm_set1_epi8(15);
            while (k < full) {
                const long end = k + flush < full ? k + flush : full;
                __m256i acc[M];
                for (int m = 0; m < M; m++) acc[m] = _mm256_setzero_si256();
                for (; k < end; k += BLOCK) {
                    __m256i a, b;  // 16 codes each, as 16-bit integers
                    if (BITS == 4) {
                        __m128i bytes = _mm_loadu_si128((const __m128i*)(row + k / 2));
                        a = _mm256_cvtepu8_epi16(_mm_and_si128(bytes, low_half));
                        b = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(bytes, 4), low_half));
                    } else if (BITS == 8) {
                        a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(row + k)));
                        b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(row + k + 16)));
                    } else {
                        const uint8_t* at = row + k / 8 * BITS;
                        const bool inside = at + 3 * BITS + 8 <= behind;  // one load of 8 bytes, where they are there
                        uint64_t eight[4];
                        for (int i = 0; i < 4; i++) eight[i] = eight_codes(at + i * BITS, BITS, inside ? 8 : BITS);
                        a = _mm256_cvtepu8_epi16(_mm_set_epi64x(eight[1], eight[0]));
                        b = _mm256_cvtepu8_epi16(_mm_set_epi64x(eight[3], eight[2]));
                    }
                    for (int m = 0; m < M; m++) {
                        const int16_t* x = q + m * K + k;
                        __m256i one = _mm256_madd_epi16(a, _mm256_loadu_si256((const __m256i*)x));
                        __m256i two = _mm256_madd_epi16(b, _mm256_loadu_si256((const __m256i*)(x + 16)));
                        acc[m] = _mm256_add_epi32(acc[m], _mm256_add_epi32(one, two));
                    }
                }
                for (int m = 0; m < M; m++)
                    running[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[m]), _mm256_set1_ps(ws * scale[m * S + s]), running[m]);
            }
#endif
            int64_t rest[M] = {};
#if defined(__AVX2__)
            __m128i few[M];  // up to 31 columns behind the last whole block, in their own order
            for (int m = 0; m < M; m++) few[m] = _mm_setzero_si128();
            for (; k + 8 <= stop; k += 8) {
                const __m128i a = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(eight_codes(row + k / 8 * BITS, BITS, BITS)));
                for (int m = 0; m < M; m++)
                    few[m] = _mm_add_epi32(few[m], _mm_madd_epi16(a, _mm_loadu_si128((const __m128i*)(q + m * K + k))));
            }
            for (int m = 0; m < M; m++) {
                __m128i sums = _mm_add_epi32(few[m], _mm_shuffle_epi32(few[m], 0x4e));
                rest[m] = _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xb1)));
            }
#endif
            for (; k < stop; k++) {
                // without vector instructions blocks end up here too: find the column that lies at place k
                long column = k;
                if (BITS == 4 && k < full) {
                    long inside = (k - start) % BLOCK;
                    column = k - inside + (inside < BLOCK / 2 ? 2 * inside : 2 * (inside - BLOCK / 2) + 1);
                }
                const int code = eight_codes(row + column / 8 * BITS, BITS, BITS) >> (column % 8 * 8) & 255;
                for (int m = 0; m < M; m++) rest[m] += int64_t(code) * q[m * K + k];
            }
            for (int m = 0; m < M; m++)
                result[m] += (float(rest[m]) - zero * sum[m * S + s]) * (ws * scale[m * S + s]);
        }
        for (int m = 0; m < M; m++) {
#if defined(__AVX2__)
            result[m] += total(running[m]);
#endif
            y[m * N + n] = (add ? y[m * N + n] : 0) + result[m];
        }
    }
}

extern "C" void integer_product(const int16_t* q, const float* scale, const float* sum, const uint8_t* w,
                                const uint16_t* w_scale, float* y, long M, long N, long K, long row_bytes, int bits, long seg,
                                long group, long groups, int add, int threads) {
    const long S = (K + seg - 1) / seg;
    for (long m = 0; m < M;) {
        const long step = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;
        auto run = [&](auto function) {
            function(q + m * K, scale + m * S, sum + m * S, w, w_scale, y + m * N, N, K, row_bytes, seg, group, groups, add,
                     threads);
        };
        switch (bits * 8 + step) {
#define WIDTH(b) case b * 8 + 1: run(integer_rows<1, b>); break; case b * 8 + 2: run(integer_rows<2, b>); break; \
                 case b * 8 + 4: run(integer_rows<4, b>); break;
            WIDTH(2) WIDTH(3) WIDTH(4) WIDTH(5) WIDTH(6) WIDTH(7) WIDTH(8)
        }
        m += step;
    }
}

extern "C" void expand_integers(const uint8_t* w, const uint16_t* w_scale, float* out, long N, long K, long row_bytes,
                                int bits, long group, long groups, long out_stride, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        const uint8_t* row = w + n * row_bytes;
        float* to = out + n * out_stride;
        for (long start = 0; start < K; start += group) {
            const float ws = bf16(w_scale[n * groups + start / group]);
            const long stop = start + group < K ? start + group : K;
            for (long k = start; k < stop;) {
                const long at = k / 8 * bits;
                const uint64_t codes = eight_codes(row + at, bits, row_bytes - at) >> (k % 8 * 8);
#if defined(__AVX2__)
                if (k % 8 == 0 && k + 8 <= stop) {
                    __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(codes));
                    wide = _mm256_sub_epi32(wide, _mm256_set1_epi32(1 << (bits - 1)));
                    _mm256_storeu_ps(to + k, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(ws)));
                    k += 8;
                    continue;
                }
#endif
                const long most = 8 - k % 8 < stop - k ? 8 - k % 8 : stop - k;
                for (long i = 0; i < most; i++) to[k + i] = float(int(codes >> (8 * i) & 255) - (1 << (bits - 1))) * ws;
                k += most;
            }
        }
    }
}

// Bitmask-packed rows of bf16 values. A byte of the mask picks how the next values spread over 8 columns.
#if defined(__AVX2__)
alignas(32) static int32_t SPREAD[256][8];
alignas(32) static int32_t KEEP[256][8];
static bool fill_tables() {
    for (int mask = 0; mask < 256; mask++)
        for (int bit = 0, next = 0; bit < 8; bit++) {
            bool kept = mask >> bit & 1;
            SPREAD[mask][bit] = kept ? next++ : 0;
            KEEP[mask][bit] = kept ? -1 : 0;
        }
    return true;
}
static const bool FILLED = fill_tables();
#endif

template <int M>
static void sparse_rows(const float* x, const uint16_t* values, const uint8_t* mask, float* y, long N, long A, long s,
                        int threads) {
    const long mask_bytes = (A + 7) / 8;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        const uint16_t* value = values + n * s;
        const uint16_t* end = values + N * s;  // of all rows: what a vector may read past this row is another's
        const uint8_t* bits = mask + n * mask_bytes;
        float result[M] = {};
        long byte = 0;
#if defined(__AVX2__)
        __m256 acc[M];
        for (int m = 0; m < M; m++) acc[m] = _mm256_setzero_ps();
        for (; byte < A / 8 && value + 8 <= end; byte++) {
            const int pattern = bits[byte];
            __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)value)), 16);
            wide = _mm256_permutevar8x32_epi32(wide, _mm256_load_si256((const __m256i*)SPREAD[pattern]));
            wide = _mm256_and_si256(wide, _mm256_load_si256((const __m256i*)KEEP[pattern]));
            for (int m = 0; m < M; m++)
                acc[m] = _mm256_fmadd_ps(_mm256_castsi256_ps(wide), _mm256_loadu_ps(x + m * A + 8 * byte), acc[m]);
            value += __builtin_popcount(pattern);
        }
        for (int m = 0; m < M; m++) result[m] = total(acc[m]);
#endif
        for (; byte < mask_bytes; byte++)
            for (int bit = 0; bit < 8; bit++)
                if (bits[byte] >> bit & 1) {
                    const float v = bf16(*value++);
                    for (int m = 0; m < M; m++) result[m] += v * x[m * A + 8 * byte + bit];
                }
        for (int m = 0; m < M; m++) y[m * N + n] = result[m];
    }
}

extern "C" void sparse_product(const float* x, const uint16_t* values, const uint8_t* mask, float* y, long M, long N, long A,
                               long s, int threads) {
    for (long m = 0; m < M;) {
        const long step = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;
        auto run = [&](auto function) { function(x + m * A, values, mask, y + m * N, N, A, s, threads); };
        if (step == 4) run(sparse_rows<4>);
        else if (step == 2) run(sparse_rows<2>);
        else run(sparse_rows<1>);
        m += step;
    }
}

// The same for integers: codes of `bits` bits in a row's stream, scales for every `group` columns of either part.
template <int M>
static void sparse_integer_rows(const float* x, const uint8_t* packed, const uint16_t* w_scale, const uint8_t* mask, float* y,
                                long N, long A, long units, long row_bytes, int bits, long group, long groups, int threads) {
    const long mask_bytes = (A + 7) / 8;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        const uint8_t *row = packed + n * row_bytes, *pattern = mask + n * mask_bytes;
        const uint16_t* scale = w_scale + n * groups;
        float result[M] = {};
        long next = 0;  // code of the row that comes next
        for (long part = 0; part < 2; part++) {
            const long from = part ? units : 0, to = part ? A : units, step = group ? group : to - from;
            for (long start = from; start < to; start += step) {
                const long stop = start + step < to ? start + step : to;
                float inside[M] = {};
#if defined(__AVX2__)
                __m256 acc[M];
                for (int m = 0; m < M; m++) acc[m] = _mm256_setzero_ps();
#endif
                for (long column = start; column < stop; column += 8) {
                    const int kept = pattern[column / 8];
                    const long bit = next * bits, byte = bit / 8;
                    const uint64_t codes = eight_codes(row + byte, bits, row_bytes - byte, bit % 8);
                    next += __builtin_popcount(kept);
#if defined(__AVX2__)
                    if (column + 8 <= A) {
                        __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(codes));
                        wide = _mm256_sub_epi32(wide, _mm256_set1_epi32(1 << (bits - 1)));
                        wide = _mm256_permutevar8x32_epi32(wide, _mm256_load_si256((const __m256i*)SPREAD[kept]));
                        wide = _mm256_and_si256(wide, _mm256_load_si256((const __m256i*)KEEP[kept]));
                        const __m256 value = _mm256_cvtepi32_ps(wide);
                        for (int m = 0; m < M; m++)
                            acc[m] = _mm256_fmadd_ps(value, _mm256_loadu_ps(x + m * A + column), acc[m]);
                        continue;
                    }
#endif
                    for (int i = 0, used = 0; i < 8; i++)
                        if (kept >> i & 1) {
                            const float value = float(int(codes >> (8 * used++) & 255) - (1 << (bits - 1)));
                            for (int m = 0; m < M; m++) inside[m] += value * x[m * A + column + i];
                        }
                }
                const float ws = bf16(*scale++);
                for (int m = 0; m < M; m++) {
#if defined(__AVX2__)
                    inside[m] += total(acc[m]);
#endif
                    result[m] += ws * inside[m];
                }
            }
        }
        for (int m = 0; m < M; m++) y[m * N + n] = result[m];
    }
}

extern "C" void sparse_integer_product(const float* x, const uint8_t* packed, const uint16_t* w_scale, const uint8_t* mask,
                                       float* y, long M, long N, long A, long units, long row_bytes, int bits, long group,
                                       long groups, int threads) {
    for (long m = 0; m < M;) {
        const long step = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;
        auto run = [&](auto function) {
            function(x + m * A, packed, w_scale, mask, y + m * N, N, A, units, row_bytes, bits, group, groups, threads);
        };
        if (step == 4) run(sparse_integer_rows<4>);
        else if (step == 2) run(sparse_integer_rows<2>);
        else run(sparse_integer_rows<1>);
        m += step;
    }
}

// The same rows multiplied out, for many tokens: values, or integers with scales, at the columns that the mask names.
extern "C" void expand_sparse(const void* packed, const uint16_t* w_scale, const uint8_t* mask, float* out, long N, long A,
                              long units, long row_values, int bits, long group, long groups, int threads) {
    const long mask_bytes = (A + 7) / 8;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        const uint16_t* value = (const uint16_t*)packed + n * row_values;
        const uint8_t *row = (const uint8_t*)packed + n * row_values, *pattern = mask + n * mask_bytes;
        float* to = out + n * A;
        long next = 0;
        for (long byte = 0; byte < mask_bytes; byte++) {
            const int kept = pattern[byte];
            const long column = 8 * byte, bit = next * bits;
            float scale = 1;
            if (bits < 16) {
                const bool second = column >= units;  // a byte lies in one part and in one group
                const long from = second ? units : 0, step = group ? group : (second ? A - units : units);
                const long before = second && units ? (units + (group ? group : units) - 1) / (group ? group : units) : 0;
                scale = bf16(w_scale[n * groups + before + (column - from) / step]);
            }
            const uint64_t codes = bits < 16 ? eight_codes(row + bit / 8, bits, row_values - bit / 8, bit % 8) : 0;
#if defined(__AVX2__)
            if (column + 8 <= A && (bits < 16 || n * row_values + next + 8 <= N * row_values)) {
                __m256i wide;
                if (bits < 16) {
                    wide = _mm256_sub_epi32(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(codes)), _mm256_set1_epi32(1 << (bits - 1)));
                    wide = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(scale)));
                } else {
                    wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(value + next))), 16);
                }
                wide = _mm256_permutevar8x32_epi32(wide, _mm256_load_si256((const __m256i*)SPREAD[kept]));
                wide = _mm256_and_si256(wide, _mm256_load_si256((const __m256i*)KEEP[kept]));
                _mm256_storeu_si256((__m256i*)(to + column), wide);
                next += __builtin_popcount(kept);
                continue;
            }
#endif
            for (int i = 0, used = 0; i < 8 && column + i < A; i++) {
                float one = 0;
                if (kept >> i & 1) {
                    one = bits < 16 ? float(int(codes >> (8 * used) & 255) - (1 << (bits - 1))) : bf16(value[next + used]);
                    used++;
                }
                to[column + i] = one * scale;
            }
            next += __builtin_popcount(kept);
        }
    }
}

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
    if (!narrow) { ((float*)out)[at] = value; return; }
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    ((uint16_t*)out)[at] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
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
