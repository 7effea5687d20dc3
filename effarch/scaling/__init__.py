"""Scaling laws: their fits, IsoFLOP vertices, bands, and the statistics of comparisons."""
