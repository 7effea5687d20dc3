"""Published coefficients of the laws, unrounded where the source has them."""

CHINCHILLA = {
    # Hoffmann et al., arXiv 2203.15556, digits from its source: the rounding alone moves the optimum.
    "hoffmann": {
        "A": 406.40102,
        "B": 410.72283,
        "E": 1.6933737,
        "alpha": 0.33917084,
        "beta": 0.2849083,
    },
    # Besiroglu et al., arXiv 2404.10102.
    "besiroglu": {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
}

QUARTET = {"A": 1.52e5, "alpha": 0.589, "B": 5.25e5, "beta": 0.544, "E": 1.35, "gamma": 0.274}
"""Castro et al., arXiv 2505.14669; N without embeddings, C4."""

JOINT_MOE = {
    "a": 35.91,
    "alpha": -0.1889,
    "delta": -0.2285,
    "gamma": 0.0098,
    "b": 35.98,
    "beta": -0.1775,
    "omega": 0.5529,
    "zeta": -0.0259,
    "c": 1.3637,
    "E_start": 2.0732,
    "E_max": 290.4521,
}
"""Ludziejewski et al., arXiv 2502.05172."""

_CLARK = ("a", "b", "c", "d", "E_start", "E_max")
CLARK = {
    "s_base": dict(zip(_CLARK, (-0.082, -0.108, 0.009, 1.104, 1.847, 314.478))),
    "rl_r": dict(zip(_CLARK, (-0.083, -0.126, 0.012, 1.111, 1.880, 469.982))),
    "hash": dict(zip(_CLARK, (-0.087, -0.136, 0.012, 1.157, 4.175, 477.741))),
}
"""Clark et al., arXiv 2202.01169, by router; all at 130B tokens."""

LEVERAGE = {
    "a": 1.23,
    "d": -7.61e-2,
    "gamma": 1.67e-2,
    "beta": -1.17e-1,
    "A_start": 1.63e-2,
    "A_max": 5.28e16,
}
"""Tian et al., arXiv 2507.17702."""

LEARNING_RATE = {"ling_moe": (1.1576, -0.1529), "deepseek_dense": (0.3118, -0.1250)}
"""lr = coefficient * C^exponent; C counts attention. arXiv 2507.17702 and 2401.02954."""

BATCH_TOKENS = {"ling_moe": (0.0694, 0.3644), "deepseek_dense": (0.2920, 0.3271)}
"""Tokens a batch = coefficient * C^exponent, same sources."""
