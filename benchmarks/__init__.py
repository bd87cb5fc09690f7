"""Side-by-side measurements of attention implementations: ``python -m benchmarks.run``."""
