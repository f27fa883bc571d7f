"""How an operator is computed: schemas with a torch reference, native CPU kernels, Triton kernels."""
