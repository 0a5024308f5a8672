// Products of few tokens with bitmask-packed rows, and such rows multiplied out. A byte of the mask picks how the next values
// spread over 8 columns.
//
// Legend: A atoms (columns), s nonzeros of a row.
#include <vector>

#include "cpu_common.h"

#if defined(__AVX2__)
static uint64_t BYTES[256];                  // by a byte of the mask: which of eight bytes goes where, 128 for none
alignas(32) static uint8_t FLOATS[256][32];  // and where the halves of eight bf16 values go to become fp32
static bool fill_tables() {
    for (int mask = 0; mask < 256; mask++)
        for (int bit = 0, next = 0; bit < 8; bit++) {
            const bool kept = mask >> bit & 1;
            BYTES[mask] |= uint64_t(kept ? next : 128) << (8 * bit);
            uint8_t* to = FLOATS[mask] + 4 * bit;
            to[0] = to[1] = 128;
            to[2] = kept ? uint8_t(2 * next) : 128;
            to[3] = kept ? uint8_t(2 * next + 1) : 128;
            next += kept;
        }
    return true;
}
static const bool FILLED = fill_tables();

// The values of 8 columns, 0 where the mask has none: one shuffle, which finds all eight values in either half of a register.
static inline __m256 eight_values(const uint16_t* value, int pattern) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)value));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, _mm256_load_si256((const __m256i*)FLOATS[pattern])));
}

// Integers of 8 columns, likewise.
static inline __m128i eight_integers(const uint8_t* row, unsigned long bit, int bits, long bytes, int pattern) {
    const __m128i codes = _mm_cvtsi64_si128(eight_codes(row + bit / 8, bits, bytes, bit % 8));
    const __m128i signed_codes = _mm_sub_epi8(codes, _mm_set1_epi8(char(1 << (bits - 1))));
    return _mm_shuffle_epi8(signed_codes, _mm_loadl_epi64((const __m128i*)(BYTES + pattern)));
}
#endif

template <int M>
static void sparse_rows(const float* x, const uint16_t* values, const uint8_t* mask, float* y, long N, long A, long s,
                        int threads) {
    const long mask_bytes = (A + 7) / 8;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        const uint16_t* value = values + n * s;
        const uint8_t* bits = mask + n * mask_bytes;
        const uint16_t* end = values + N * s;  // of all rows: what a vector may read past this row is another's
        float result[M] = {};
        long byte = 0;
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
        __m512 lower[M], upper[M];  // one instruction spreads 32 values
        for (int m = 0; m < M; m++) lower[m] = upper[m] = _mm512_setzero_ps();
        for (; byte + 4 <= A / 8 && value + 32 <= end; byte += 4) {
            uint32_t pattern;
            std::memcpy(&pattern, bits + byte, 4);
            const __m512i spread = _mm512_maskz_expand_epi16(pattern, _mm512_loadu_si512(value));
            const __m512i first = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(spread)), 16);
            const __m512i second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(spread, 1)), 16);
            for (int m = 0; m < M; m++) {
                const float* from = x + m * A + 8 * byte;
                lower[m] = _mm512_fmadd_ps(_mm512_castsi512_ps(first), _mm512_loadu_ps(from), lower[m]);
                upper[m] = _mm512_fmadd_ps(_mm512_castsi512_ps(second), _mm512_loadu_ps(from + 16), upper[m]);
            }
            value += __builtin_popcount(pattern);
        }
        for (int m = 0; m < M; m++) result[m] += _mm512_reduce_add_ps(_mm512_add_ps(lower[m], upper[m]));
#endif
#if defined(__AVX2__)
        const int U = M == 1 ? 4 : 2;  // sums that do not wait for each other
        __m256 acc[M][U];
        for (int m = 0; m < M; m++)
            for (int u = 0; u < U; u++) acc[m][u] = _mm256_setzero_ps();
        for (; byte + U <= A / 8 && value + 8 * U <= end; byte += U)
            for (int u = 0; u < U; u++) {
                const int pattern = bits[byte + u];
                const __m256 wide = eight_values(value, pattern);
                for (int m = 0; m < M; m++)
                    acc[m][u] = _mm256_fmadd_ps(wide, _mm256_loadu_ps(x + m * A + 8 * (byte + u)), acc[m][u]);
                value += __builtin_popcount(pattern);
            }
        for (int m = 0; m < M; m++) {
            for (int u = 1; u < U; u++) acc[m][0] = _mm256_add_ps(acc[m][0], acc[m][u]);
            result[m] += total(acc[m][0]);
        }
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

// The same for integers: codes of `bits` bits in a row's stream, scales for every `group` columns of the unit atoms and of the
// learned ones. Inputs are rounded to 15 bits per segment, a run of columns that share a scale of either side.
namespace {
struct Segment {
    long start, stop, group;
};

struct RoundedInputs {
    std::vector<Segment> segments;
    std::vector<int16_t> codes;
    std::vector<float> scale;

    RoundedInputs(const float* x, long M, long A, long units, long group) : codes(M * A) {
        const long longest = 1024;  // columns whose sums, four of them, fit 32 bits each at any width
        long groups = 0;
        for (long part = 0; part < 2; part++) {
            const long from = part ? units : 0, to = part ? A : units, step = group ? group : to - from;
            for (long start = from; start < to; start += step, groups++) {
                const long stop = start + step < to ? start + step : to;
                for (long at = start; at < stop; at += longest)
                    segments.push_back({at, at + longest < stop ? at + longest : stop, groups});
            }
        }
        for (long m = 0; m < M; m++)
            for (const Segment& s : segments)
                scale.push_back(fifteen_bits(x + m * A + s.start, codes.data() + m * A + s.start, s.stop - s.start));
    }
};
}  // namespace

template <int M>
static void sparse_integer_rows(const RoundedInputs& in, long first, const uint8_t* packed, const uint16_t* w_scale,
                                const uint8_t* mask, float* y, long N, long A, long row_bytes, int bits, long groups,
                                int threads) {
    const long mask_bytes = (A + 7) / 8, S = long(in.segments.size());
    const uint8_t* end = packed + N * row_bytes;
    const int16_t* q = in.codes.data() + first * A;
    const float* x_scale = in.scale.data() + first * S;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        const uint8_t *row = packed + n * row_bytes, *pattern = mask + n * mask_bytes;
        float result[M] = {};
        unsigned long bit = 0;  // where the next code begins in the row's stream
        for (long s = 0; s < S; s++) {
            const unsigned long stop = in.segments[s].stop;
            unsigned long column = in.segments[s].start;
            int64_t sums[M] = {};
#if defined(__AVX2__)
            const unsigned long whole = stop / 8 * 8;
            const long last = 8 * (end - row) - 64;  // eight bytes may be read up to that bit
            __m128i acc[M];
            for (int m = 0; m < M; m++) acc[m] = _mm_setzero_si128();
            for (; column < whole && long(bit) <= last; column += 8) {
                const int kept = pattern[column / 8];
                const __m128i wide = _mm_cvtepi8_epi16(eight_integers(row, bit, bits, 8, kept));
                for (int m = 0; m < M; m++) {
                    const __m128i x = _mm_loadu_si128((const __m128i*)(q + m * A + column));
                    acc[m] = _mm_add_epi32(acc[m], _mm_madd_epi16(wide, x));
                }
                bit += bits * __builtin_popcount(kept);
            }
            for (int m = 0; m < M; m++) {
                int32_t lanes[4];
                _mm_storeu_si128((__m128i*)lanes, acc[m]);
                for (int lane = 0; lane < 4; lane++) sums[m] += lanes[lane];
            }
#endif
            for (; column < stop; column += 8) {
                const int kept = pattern[column / 8];
                const uint64_t codes = eight_codes(row + bit / 8, bits, row_bytes - bit / 8, bit % 8);
                for (int i = 0, used = 0; i < 8; i++)
                    if (kept >> i & 1) {
                        const int code = int(codes >> (8 * used++) & 255) - (1 << (bits - 1));
                        for (int m = 0; m < M; m++) sums[m] += int64_t(code) * q[m * A + column + i];
                    }
                bit += bits * __builtin_popcount(kept);
            }
            const float ws = bf16(w_scale[n * groups + in.segments[s].group]);
            for (int m = 0; m < M; m++) result[m] += float(sums[m]) * (ws * x_scale[m * S + s]);
        }
        for (int m = 0; m < M; m++) y[m * N + n] = result[m];
    }
}

// y [M, N] of inputs [M, A], both in bf16 or in fp32, and rows of values, or of integers where they have scales.
extern "C" void sparse_linear(const void* x, int x_narrow, const void* packed, const uint16_t* w_scale, const uint8_t* mask,
                              void* y, int y_narrow, long M, long N, long A, long units, long row_values, int bits, long group,
                              long groups, int threads) {
    const Floats from(x, x_narrow, A, M, A);
    const Sums to(y, y_narrow, M * N);
    const RoundedInputs in(from.data, w_scale ? M : 0, A, units, group);
    for (long m = 0; m < M;) {
        const long step = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;
        auto values = [&](auto function) {
            function(from.data + m * A, (const uint16_t*)packed, mask, to.data + m * N, N, A, row_values, threads);
        };
        auto integers = [&](auto function) {
            function(in, m, (const uint8_t*)packed, w_scale, mask, to.data + m * N, N, A, row_values, bits, groups, threads);
        };
        if (!w_scale) step == 4 ? values(sparse_rows<4>) : step == 2 ? values(sparse_rows<2>) : values(sparse_rows<1>);
        else if (step == 4) integers(sparse_integer_rows<4>);
        else if (step == 2) integers(sparse_integer_rows<2>);
        else integers(sparse_integer_rows<1>);
        m += step;
    }
    to.store();
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
#if defined(__AVX2__)
            if (column + 8 <= A && (bits < 16 || n * row_values + next + 8 <= N * row_values)) {
                __m256 wide;
                if (bits < 16) {
                    wide = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_integers(row, bit, bits, row_values - bit / 8, kept)));
                    wide = _mm256_mul_ps(wide, _mm256_set1_ps(scale));
                } else {
                    wide = eight_values(value + next, kept);
                }
                _mm256_storeu_ps(to + column, wide);
                next += __builtin_popcount(kept);
                continue;
            }
#endif
            const uint64_t codes = bits < 16 ? eight_codes(row + bit / 8, bits, row_values - bit / 8, bit % 8) : 0;
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

