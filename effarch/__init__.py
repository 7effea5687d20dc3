"""effarch: train efficient architectures in JAX, one config a run."""

__version__ = "0.1.0"
