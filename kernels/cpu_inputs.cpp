// Inputs as the products with packed integers take them, and the butterflies of the Hadamard transform.
#include "cpu_common.h"

// Inputs rounded to 15 bits and a sign per segment, and arranged.
extern "C" void arrange(const float* x, long stride, int16_t* q, float* scale, float* sum, long M, long K, long seg, int bits,
                        int threads) {
    const long S = (K + seg - 1) / seg;
#pragma omp parallel for num_threads(threads) collapse(2) if (M * K > 65536)
    for (long m = 0; m < M; m++)
        for (long s = 0; s < S; s++) {
            const long start = s * seg, width = (start + seg < K ? seg : K - start), full = width / BLOCK * BLOCK;
            int16_t* to = q + m * K + start;
            scale[m * S + s] = fifteen_bits(x + m * stride + start, to, width);
            int64_t total = 0;
            for (long k = 0; k < width; k++) total += to[k];
            sum[m * S + s] = float(total);
            if (bits == 4)
                for (long k = 0; k < full; k += BLOCK) {
                    int16_t block[BLOCK];
                    std::memcpy(block, to + k, sizeof(block));
                    for (long i = 0; i < BLOCK; i++) to[k + place(i, BLOCK, bits)] = block[i];
                }
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

