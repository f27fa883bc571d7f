"""What is seen while a model runs: statistics of layer inputs, recorded denoising steps, the folder of a run."""
