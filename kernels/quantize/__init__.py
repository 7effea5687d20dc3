"""Rounding arrays to small number formats with shared scales."""
