"""Rows times the matrix of their group: the product of mixture-of-experts layers."""
