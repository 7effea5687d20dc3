"""Scoring texts and continuations with a run, for suites of others."""
