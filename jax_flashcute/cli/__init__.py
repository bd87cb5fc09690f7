"""``jax-flashcute``: kernels compiled ahead of time, listed, inspected and cleared away."""
