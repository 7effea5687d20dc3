"""Checkpoints on several devices and from several processes."""

import concurrent.futures
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

MESHES = """
import sys
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from effarch.training import checkpoints

def place(shape, spec):
    return NamedSharding(jax.make_mesh(shape, ("data", "tensor")), spec)

value = np.arange(64.0, dtype=np.float32).reshape(8, 8)
with checkpoints.Checkpoints(sys.argv[1], fingerprint="abc") as store:
    state = {"w": jax.device_put(value, place((2, 4), P("data", "tensor")))}
    store.save(1, state, {})
    for sharding in (place((4, 2), P("tensor", "data")), place((8, 1), P(None, "data"))):
        target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
        _, got, _ = store.restore(target)
        assert got["w"].sharding == sharding
        assert len({s.device for s in got["w"].addressable_shards}) == 8
        np.testing.assert_array_equal(got["w"], value)
"""


@pytest.mark.slow
def test_another_mesh_of_eight_devices_and_one_device(tmp_path, small, run_python):
    run_python(MESHES, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    _, got, _ = small.open_at(tmp_path).restore(target)
    np.testing.assert_array_equal(got["w"], np.arange(64.0).reshape(8, 8))


TWO_PROCESSES = """
import pathlib, sys
import jax
folder, port, index = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, index)
import numpy as np
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from effarch.training import checkpoints

sharding = NamedSharding(jax.make_mesh((2,), ("data",)), P("data"))
target = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
local = np.arange(4, dtype=np.float32) + 4 * index
state = {"w": jax.make_array_from_process_local_data(sharding, local)}
with checkpoints.Checkpoints(folder, fingerprint="abc") as store:
    assert store.restore(target) is None
    store.save(1, state, {"n": 1})
    store.save(2, state, {"n": 2})
    store.wait()
    assert store.steps() == [1, 2]
    if index == 0:
        (folder / "2" / "record" / "metadata").write_text("")
    multihost_utils.sync_global_devices("damaged")
    step, got, record = store.restore(target)
    assert (step, record) == (1, {"n": 1}) and got["w"].sharding == sharding
    np.testing.assert_array_equal(got["w"].addressable_shards[0].data, local)
    store.save(2, state, {"n": 3})
    store.wait()
    assert store.steps() == [1, 2]
try:
    checkpoints.Checkpoints(folder, fingerprint="xyz").restore(target)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_save_and_restore_together(tmp_path, small, run_python):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        said = list(
            pool.map(lambda index: run_python(TWO_PROCESSES, tmp_path, port, index), range(2))
        )
    assert "fingerprint abc, not to xyz" in said[0] and "process 0 refused" in said[1]
    step, got, record = small.open_at(tmp_path).restore(
        {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}
    )
    assert (step, record) == (2, {"n": 3})
    np.testing.assert_array_equal(got["w"], np.arange(8.0))
