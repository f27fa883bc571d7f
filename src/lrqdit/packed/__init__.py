"""The artefact: the quantized layer, its format, its files. Everything that running a quantized module needs."""
