"""Pure functions on arrays, each with several backends that agree.

Every operation is a folder: `api.py` (the public function), `reference.py` (the definition, slow and
plain), `xla.py` (the fast jnp form, any device) and optional Pallas backends.
"""
