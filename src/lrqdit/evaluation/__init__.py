"""How far a quantized model is from its original: metrics, tables, pages."""
