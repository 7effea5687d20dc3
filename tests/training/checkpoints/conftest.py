"""Checkpoints of a small dict of arrays, and code in processes of its own."""

import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effarch.training import checkpoints


class Small:
    """Checkpoints whose arrays are a function of the step."""

    @property
    def target(self) -> dict:
        return jax.eval_shape(self.state, 0)

    @staticmethod
    def state(step: int) -> dict:
        return {"a": jnp.arange(1000, dtype=jnp.float32) + step, "b": {"c": jnp.full(7, step)}}

    @staticmethod
    def open_at(folder, **options) -> checkpoints.Checkpoints:
        return checkpoints.Checkpoints(folder, **{"fingerprint": "abc", **options})

    @staticmethod
    def assert_same(got: dict, want: dict) -> None:
        """Same dtypes and bits."""
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(*map(jax.tree.leaves, (got, want))):
            assert a.dtype == b.dtype and np.array_equal(a, b)

    def fill(self, folder, steps=(100, 200), **options) -> None:
        with self.open_at(folder, **options) as store:
            for step in steps:
                store.save(step, self.state(step), {"step": step})


@pytest.fixture(scope="session")
def small() -> Small:
    return Small()


@pytest.fixture(scope="session")
def run_python():
    return _run_python


def _run_python(code: str, *args, **environment) -> str:
    """Runs code in a new process on CPU and gives what it printed."""
    root = pathlib.Path(__file__).resolve().parents[3]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
