"""Benchmarks: each prints its machine, medians and ratios measured interleaved in one run, and JSON last."""
