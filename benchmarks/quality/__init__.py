"""Benchmarks of error: levels, pictures, captions."""
