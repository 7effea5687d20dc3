"""A trained mixture of experts becomes MoLE: its experts get shared projections into latents.

MoLE, arXiv 2503.23100. `factors` has the factorization, `calibration` what it may be fitted to, `layers`
converts the layers of a model, `runs` a run or a published model into a run that trains on.
"""
