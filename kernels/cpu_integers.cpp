// Products of few tokens with packed integers, and such weights multiplied out.
//
// A decode step reads every weight once, so it takes what reading takes, if unpacking keeps up. Weights meet inputs rounded to
// 15 bits per segment of columns (an error of 3e-5 of the largest, far below that of bf16), or to the few bits that the model
// rounds them to (cpu_inputs.h), and are multiplied by vpmaddwd: 7 instructions for 32 four-bit weights. Codes stay unsigned; the
// offset is taken off with the sums of the inputs.
//
// Legend: S segments: columns that share a scale of the weight.
#include "cpu_inputs.h"

#if defined(__AVX2__)
// How 16 codes come out of 2 BITS bytes: the two bytes that hold a code go to its 16 bits, a factor shifts it to their top.
template <int BITS>
struct Cut {
    alignas(32) uint8_t from[32];
    alignas(32) uint16_t factor[16];
    constexpr Cut() : from(), factor() {
        for (int i = 0; i < 16; i++) {
            const int byte = i * BITS / 8, shift = i * BITS % 8;
            from[2 * i] = uint8_t(byte);
            from[2 * i + 1] = uint8_t(byte + 1);
            factor[i] = uint16_t(1 << (16 - BITS - shift));
        }
    }
};
template <int BITS>
static constexpr Cut<BITS> CUT{};

template <int BITS>
static inline __m256i sixteen_codes(const uint8_t* at) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)at));
    const __m256i pairs = _mm256_shuffle_epi8(twice, _mm256_load_si256((const __m256i*)CUT<BITS>.from));
    const __m256i top = _mm256_mullo_epi16(pairs, _mm256_load_si256((const __m256i*)CUT<BITS>.factor));
    return _mm256_srli_epi16(top, 16 - BITS);
}

// The codes of 32 columns as 16-bit integers, in the order of `place`. Of four bits, those in the upper halves are 16 times
// too large: they stay where they lie in their byte.
template <int BITS>
static inline void block_of_codes(const uint8_t* row, long k, const uint8_t* behind, __m256i& a, __m256i& b) {
    if (BITS == 4) {
        const __m256i select = _mm256_set_m128i(_mm_set1_epi16(0xf0), _mm_set1_epi16(0x0f));
        const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(row + k / 2)));
        a = _mm256_and_si256(twice, select);
        b = _mm256_and_si256(_mm256_srli_epi16(twice, 8), select);
    } else if (BITS == 8) {
        a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(row + k)));
        b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(row + k + 16)));
    } else {
        const uint8_t* at = row + k / 8 * BITS;
        uint8_t last[32];
        if (at + 2 * BITS + 16 > behind) {  // 16 bytes are loaded for 16 codes, which may be more than there are
            std::memcpy(last, at, 4 * BITS);
            at = last;
        }
        a = sixteen_codes<BITS>(at);
        b = sixteen_codes<BITS>(at + 2 * BITS);
    }
}
#endif

// Sums over the columns k to stop, which are in their own order: fewer than 32, or all where there are no vectors.
template <int M, int BITS>
static inline void rest_of_segment(const uint8_t* row, const int16_t* q, long K, long start, long full, long k, long stop,
                                   int64_t* sums) {
    for (int m = 0; m < M; m++) sums[m] = 0;
#if defined(__AVX2__)
    __m128i few[M];
    for (int m = 0; m < M; m++) few[m] = _mm_setzero_si128();
    for (; k + 8 <= stop; k += 8) {
        const __m128i a = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(eight_codes(row + k / 8 * BITS, BITS, BITS)));
        for (int m = 0; m < M; m++)
            few[m] = _mm_add_epi32(few[m], _mm_madd_epi16(a, _mm_loadu_si128((const __m128i*)(q + m * K + k))));
    }
    for (int m = 0; m < M; m++) {
        __m128i pairs = _mm_add_epi32(few[m], _mm_shuffle_epi32(few[m], 0x4e));
        sums[m] = _mm_cvtsi128_si32(_mm_add_epi32(pairs, _mm_shuffle_epi32(pairs, 0xb1)));
    }
#endif
    for (; k < stop; k++) {
        const int code = eight_codes(row + k / 8 * BITS, BITS, BITS) >> (k % 8 * 8) & 255;
        const long at = start + place(k - start, full - start, BITS);
        for (int m = 0; m < M; m++) sums[m] += int64_t(code) * q[m * K + at];
    }
}

// The sum of products, in eight parts: one after the other, each would wait for the one before.
static inline float dot(const uint16_t* a, const float* b, long count) {
    float part[8] = {}, sum = 0;
    long i = 0;
    for (; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; j++) part[j] += bf16(a[i + j]) * b[i + j];
    for (; i < count; i++) sum += bf16(a[i]) * b[i];
    for (int j = 0; j < 8; j++) sum += part[j];
    return sum;
}

// R rows from n on, M tokens from `first` on: rows share every load of the inputs.
template <int M, int BITS, int R>
static inline void integer_rows(const Inputs& in, long first, const Part& part, float* y, long n, long N) {
    const long K = in.K, S = in.S, row_bytes = part.row_bytes;
    const int16_t* q = in.codes.data() + first * K;
    const float *scale = in.scale.data() + first * S, *offset = in.offset.data() + first * S;
    const uint8_t* row = part.packed + n * row_bytes;
    const uint16_t* w_scale = part.scale + n * S;
    float result[M][R] = {};
#if defined(__AVX2__)
    const long flush = BITS == 4 ? 2048 : 1024;  // columns whose sums fit 32 bits
    const uint8_t* behind = part.packed + N * row_bytes;
    __m256 running[M][R];
    for (int m = 0; m < M; m++)
        for (int r = 0; r < R; r++) running[m][r] = _mm256_setzero_ps();
#endif
    for (long s = 0; s < S; s++) {
        const long start = in.segments[s].start, full = in.segments[s].full, stop = in.segments[s].stop;
        float ws[R];
        for (int r = 0; r < R; r++) ws[r] = bf16(w_scale[r * S + s]);
        long k = start;
#if defined(__AVX2__)
        while (k < full) {
            const long end = k + flush < full ? k + flush : full;
            __m256i acc[M][R];
            for (int m = 0; m < M; m++)
                for (int r = 0; r < R; r++) acc[m][r] = _mm256_setzero_si256();
            for (; k < end; k += BLOCK)
                for (int r = 0; r < R; r++) {
                    __m256i a, b;
                    const uint8_t* at = row + r * row_bytes;
                    // rows side by side are short runs of memory to a processor that guesses what comes next
                    if (R > 1) _mm_prefetch((const char*)(at + R * row_bytes + k * BITS / 8), _MM_HINT_T0);
                    block_of_codes<BITS>(at, k, behind, a, b);
                    for (int m = 0; m < M; m++) {
                        const int16_t* x = q + m * K + k;
                        acc[m][r] = plus_pairs(acc[m][r], a, _mm256_loadu_si256((const __m256i*)x));
                        acc[m][r] = plus_pairs(acc[m][r], b, _mm256_loadu_si256((const __m256i*)(x + 16)));
                    }
                }
            for (int m = 0; m < M; m++)
                for (int r = 0; r < R; r++)
                    running[m][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[m][r]), _mm256_set1_ps(ws[r] * scale[m * S + s]),
                                                    running[m][r]);
        }
#endif
        for (int r = 0; r < R && k < stop; r++) {
            int64_t sums[M];
            rest_of_segment<M, BITS>(row + r * row_bytes, q, K, start, full, k, stop, sums);
            for (int m = 0; m < M; m++) result[m][r] += float(sums[m]) * (ws[r] * scale[m * S + s]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) {
            result[m][r] -= dot(w_scale + r * S, offset + m * S, S);
#if defined(__AVX2__)
            const float upper = BITS == 4 ? 1 / 16.0f : 1;
            result[m][r] += total(_mm256_mul_ps(running[m][r], _mm256_set_m128(_mm_set1_ps(upper), _mm_set1_ps(1))));
#endif
            y[(first + m) * N + n + r] += result[m][r];
        }
}

template <int M, int BITS>
static void all_rows(const Inputs& in, long first, const Part& part, float* y, long N, int threads) {
    const int R = 4 / M;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N / R; n++) integer_rows<M, BITS, R>(in, first, part, y, n * R, N);
    for (long n = N / R * R; n < N; n++) integer_rows<M, BITS, 1>(in, first, part, y, n, N);
}

static void add_product(const float* x, long stride, const Part& part, float* y, long M, long N, int threads) {
    const Inputs in(x, stride, M, part, threads);
    for (long m = 0; m < M;) {
        const long step = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;
        auto run = [&](auto function) { function(in, m, part, y, N, threads); };
        switch (part.bits * 8 + step) {
#define WIDTH(b) case b * 8 + 1: run(all_rows<1, b>); break; case b * 8 + 2: run(all_rows<2, b>); break; \
                 case b * 8 + 4: run(all_rows<4, b>); break;
            WIDTH(2) WIDTH(3) WIDTH(4) WIDTH(5) WIDTH(6) WIDTH(7) WIDTH(8)
        }
        m += step;
    }
}

// y [M, N] of inputs [M, K], both in bf16 or in fp32, and a weight in parts.
extern "C" void integer_linear(const void* x, int x_narrow, long stride, const Part* parts, int count, void* y, int y_narrow,
                               long M, long K, long N, int threads) {
    const Floats from(x, x_narrow, stride, M, K);
    const Sums to(y, y_narrow, M * N);
    for (int p = 0; p < count; p++)
        add_product(from.data + parts[p].start, from.stride, parts[p], to.data, M, N, threads);
    to.store();
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
