"""Set before JAX starts: the CPU alone, a compiler that spends little, and one cache of its results.

Most of a test's time is compilation. The cache is a temporary folder of this test session, shared with
the processes that tests start, so that equal programs are compiled once.
"""

import atexit
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_backend_optimization_level=0"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _folder = tempfile.mkdtemp(prefix="effarch-tests-")
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_collection_modifyitems(items):
    """What starts processes, and lasts, comes first: other workers do the rest meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("multiprocess") is None)


@pytest.fixture(scope="session")
def compile_for():
    """A function: runs a script that compiles for the target, which is its first argument.

    The compilers of absent accelerators are wheels of hundreds of MB, the extra `aot`: no part of
    a plain installation. Where they are not, the test is skipped.
    """
    from effarch.parallel import topologies

    def run(script: str, target: str, *arguments: str) -> subprocess.CompletedProcess:
        if missing := topologies.missing_wheels(topologies.parse(target)):
            pytest.skip(f"the compiler wheels {', '.join(missing)} are not installed (extra aot)")
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        env |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        env |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        env |= {"TPU_LOG_DIR": "disabled", "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
        command = [sys.executable, "-c", script, target, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    return run
