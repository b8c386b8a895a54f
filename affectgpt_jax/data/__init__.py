"""Records, prompts, tokens and batches; NumPy and Grain, never JAX."""
