// The Hadamard transform of rows (compress/kernels/hadamard.py), in one pass over a row that stays in the cache.
#include "cpu_common.h"

// Sylvester's transform of a run of n numbers, in place, the lowest bit of the index first as in the reference.
static void butterflies(float* x, long n) {
    for (long half = 1; half < n; half *= 2)
        for (long k = 0; k < n; k += 2 * half)
            for (long i = k; i < k + half; i++) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
}

// y = x blockdiag(H) / sqrt(m n) for rows of `blocks` blocks, each m runs of n numbers: the runs are combined by H_m, `base`
// [m, m], and each is transformed.
extern "C" void hadamard(const void* x, int x_narrow, long stride, void* y, int y_narrow, const float* base, long rows,
                         long blocks, long m, long n, int threads) {
    const long width = blocks * m * n;
    const float scale = float(1 / std::sqrt(double(m * n)));
#pragma omp parallel for num_threads(threads) if (rows * width > 32768)
    for (long r = 0; r < rows; r++) {
        const Floats from(x_narrow ? (const void*)((const uint16_t*)x + r * stride) : (const float*)x + r * stride, x_narrow,
                          stride, 1, width);
        const Sums to(y_narrow ? (void*)((uint16_t*)y + r * width) : (float*)y + r * width, y_narrow, width);
        std::vector<float> scaled(from.data, from.data + width);
        for (float& one : scaled) one *= scale;
        for (long run = 0; run < blocks * m; run++) {
            const float* runs = scaled.data() + run / m * m * n;
            float* out = to.data + run * n;
            for (long j = 0; j < m; j++) {
                const float sign = base[run % m * m + j];
                for (long k = 0; k < n; k++) out[k] += sign * runs[j * n + k];
            }
            butterflies(out, n);
        }
        to.store();
    }
}
