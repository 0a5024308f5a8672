// The butterflies of the Hadamard transform (compress/kernels/hadamard.py).

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
