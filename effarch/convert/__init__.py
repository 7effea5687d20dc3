"""From models of others to runs of effarch and back; the command is `python -m effarch.convert`."""
