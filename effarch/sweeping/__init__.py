"""The machinery of `python -m effarch.sweep`: what to run, where, what became of it."""
