"""Measure a compressed model beside its original: perplexity, divergence, lm-eval tasks, size."""
