"""Block-diagonal Hadamard transforms, which spread outliers over their block."""
