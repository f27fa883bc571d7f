"""What is decided: the input transform, the levels, the rounding and the bits of each layer."""
