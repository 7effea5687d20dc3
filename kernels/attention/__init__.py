"""Softmax attention: full, causal, windowed, grouped heads, packed documents, decoding."""
