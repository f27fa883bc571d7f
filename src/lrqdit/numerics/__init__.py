"""What the numbers are: levels, rotations, token quantization, packed tiles."""
