"""Start-up of several processes, as far as one process can show it."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from effarch.parallel import multihost
from effarch.parallel.feeding import Feeder, _joined


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "Slurm"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "Slurm"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7"}, None),  # inside an allocation, but not started by srun
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "a TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_launchers_are_detected(environment, launcher):
    assert multihost.detect(environment) == launcher


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("host:1", None, 0), "--num_processes is missing"),
        ((None, 2, 0), "--coordinator is missing"),
        (("host:1", 2, 2), "--process_id=2 must be at least 0 and below --num_processes=2"),
        (("host:1", 2, -1), "--process_id=-1 must"),
        (("host", 2, 0), "--coordinator=host must be HOST:PORT"),
        (("host:", 2, 0), "--coordinator=host: must be HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_are_one_sentence(arguments, words):
    with pytest.raises(ValueError, match="--") as error:
        multihost.start(*arguments)
    assert words in str(error.value)


def test_one_process_decides_alone(monkeypatch):
    monkeypatch.setattr(multihost, "detect", lambda: None)
    multihost.start(None, None, None)
    assert multihost.is_first()
    assert multihost.on_first(lambda: 3) == 3
    multihost.check_same("config", "x")
    stop = multihost.AnyProcess(Mesh(np.array(jax.devices()[:1]), ("data",)))
    stop.read(stop.ask(False))
    assert not stop.agreed
    stop.ask(True)
    assert stop.agreed


def test_a_feeder_loads_each_row_once_and_cuts_rows_and_time():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    asked = []

    def load(start, stop):
        asked.append((start, stop))
        return {"x": np.arange(start * 4, stop * 4, dtype=np.int32).reshape(-1, 4)}

    feed = Feeder(place, 6, 4)
    assert (np.asarray(feed(load)["x"]) == np.arange(24).reshape(6, 4)).all()
    assert asked == [(0, 6)]
    assert _joined([(0, 2), (2, 4), (6, 8)]) == [(0, 4), (6, 8)]
