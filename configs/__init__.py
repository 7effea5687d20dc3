"""Shipped configs: `--config=quickstart` or `--config=configs/quickstart.py`."""
