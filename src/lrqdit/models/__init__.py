"""Which layers of which architecture are quantized, and how its pipeline is run."""
