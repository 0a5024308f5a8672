// Inputs as the products with packed integers take them: integers of 16 bits, their scales, and what the offsets of the codes
// that they meet add up to.
#pragma once

#include <vector>

#include "cpu_common.h"

// Columns of a weight that are stored together, as _Part in cpu.py: `width` of them from `start` on, codes of `bits`, a scale for
// every row and `group` columns: a segment. Inputs that the model rounds have `seen_bits` below 16 and scales of their own for
// every `slice` columns, cut at `clip` root mean squares (0: not).
struct Part {
    const uint8_t* packed;
    const uint16_t* scale;
    long start, width, row_bytes, group, groups, slice;
    int bits, seen_bits;
    float clip;
};

namespace {
// Columns that share a scale of the weight, up to `full` in whole blocks.
struct Segment {
    long start, full, stop;
};

// Where an input of a segment lies for weights of `bits`. Four-bit codes lie in fours in 16 bits: within a full block of 32
// columns the first ones of the fours come first, then the second, third and fourth ones.
const long BLOCK = 32;
inline long place(long k, long full, int bits) {
    return bits == 4 && k < full ? k / BLOCK * BLOCK + k % 4 * (BLOCK / 4) + k % BLOCK / 4 : k;
}

struct Inputs {
    const long M, K, S;
    std::vector<Segment> segments;
    std::vector<int16_t> codes;
    std::vector<float> scale, offset;  // per token and segment; w_scale times the offset is taken off every row

    Inputs(const float* x, long stride, long M, const Part& part, int threads)
        : M(M), K(part.width), S(part.groups), codes(M * K), scale(M * S), offset(M * S) {
        for (long start = 0; start < K; start += part.group) {
            const long stop = start + part.group < K ? start + part.group : K;
            segments.push_back({start, start + (stop - start) / BLOCK * BLOCK, stop});
        }
        // where a segment lies in one slice, the codes of the slice are its integers
        const bool rounds = part.seen_bits < 16, exact = rounds && (part.slice == K || part.slice % part.group == 0);
#pragma omp parallel for num_threads(threads) if (M * K > 65536)
        for (long m = 0; m < M; m++) {
            const float* from = x + m * stride;
            std::vector<float> seen(rounds && !exact ? K : 0);
            if (rounds) round_token(from, m, part, exact ? nullptr : seen.data());
            if (!seen.empty()) from = seen.data();
            for (long s = 0; s < S; s++) {
                const Segment& at = segments[s];
                int16_t* to = codes.data() + m * K + at.start;
                if (!exact) scale[m * S + s] = fifteen_bits(from + at.start, to, at.stop - at.start);
                int64_t total = 0;
                for (long k = 0; k < at.stop - at.start; k++) total += to[k];
                offset[m * S + s] = float(1 << (part.bits - 1)) * float(total) * scale[m * S + s];
                if (part.bits == 4)
                    for (long k = 0; k < at.full - at.start; k += BLOCK) {
                        int16_t block[BLOCK];
                        std::memcpy(block, to + k, sizeof(block));
                        for (long i = 0; i < BLOCK; i++) to[k + place(i, BLOCK, 4)] = block[i];
                    }
            }
        }
    }

    // As `rounded_activation` of compress/kernels/mixed_precision.py: asymmetric codes per slice, here less their zero; the range
    // is forced to hold 0. They are the codes of the segments, or what they stand for goes to `seen`.
    void round_token(const float* x, long m, const Part& part, float* seen) {
        const float most = float((1 << part.seen_bits) - 1);
        const long slice = part.slice;
        for (long from = 0; from < K; from += slice) {
            const float* v = x + from;
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
            bool halved = false;  // cut on both sides
            if (part.clip > 0) {
                const float bound = part.clip * std::sqrt(square / float(slice));
                low = low < -bound ? -bound : low;
                high = high > bound ? bound : high;
                halved = low == -bound && high == bound && bound > 0;
            }
            float step = (high - low) / most;
            if (!(step > 0)) step = 1;
            const float zero = halved ? (most + 1) / 2 : std::nearbyint(-low / step);
            const bool finite = square == square && step * 0 == 0;  // a NaN or an infinity makes the token NaN
            auto code = [&](long k) {
                const float above = std::nearbyint(v[k] / step) + zero;
                return (above < 0 ? 0 : above > most ? most : above) - zero;
            };
            if (seen) {
                for (long k = 0; k < slice; k++) seen[from + k] = finite ? code(k) * step : NAN;
                continue;
            }
            if (finite)
                for (long k = 0; k < slice; k++) codes[m * K + from + k] = int16_t(code(k));
            for (long s = from / part.group; s * part.group < from + slice; s++) scale[m * S + s] = finite ? step : NAN;
        }
    }
};
}  // namespace
