"""Benchmarks of time and memory: layers, attention, whole steps, the quantizer."""
