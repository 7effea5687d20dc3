"""A run that shares steps with one of another length is a whole run, bit for bit."""

import jax
import numpy as np
import pytest

from effarch import config as config_lib
from effarch.training import loop, run_folder, setup, trunk, writers

LONG, SHORT, BRANCH = 20, 10, 8


@pytest.fixture
def make(make_tiny):
    """A config whose rate is constant but for the last fifth of the steps."""

    def make(num_steps, **fields):
        c = make_tiny()
        c.optimizer.schedule.kind, c.optimizer.schedule.warmup_steps = "wsd", 2
        c.optimizer.schedule.decay_fraction = 0.2
        c.train.num_steps = num_steps
        c.eval.every_steps = 0
        c.checkpoint.every_steps = c.checkpoint.keep_period = BRANCH
        c.update_from_flattened_dict(fields)
        return c

    return make


def train(config, folder, **options):
    plan = setup.prepare(config)
    run_folder.create(folder, plan.config, data=plan.dataset.fingerprint)
    return loop.Loop(plan, folder, **options).run()


@pytest.mark.slow
@pytest.mark.ci
def test_a_branch_equals_the_whole_run(make, tmp_path):
    long = train(make(LONG), tmp_path / "long")
    whole = train(make(SHORT), tmp_path / "whole")
    trunk.check(make(SHORT), tmp_path / "long")
    branch = train(make(SHORT), tmp_path / "branch", trunk=tmp_path / "long")
    jax.tree.map(np.testing.assert_array_equal, whole.state, branch.state)
    first = writers.read_metrics(tmp_path / "branch")[0]["step"]
    assert first > BRANCH  # the steps before were not trained again
    again = train(make(SHORT), tmp_path / "branch", trunk=tmp_path / "long")
    assert int(again.state.step) == SHORT  # a finished branch has checkpoints of its own
    trunk.check(make(LONG), tmp_path / "whole")  # a shorter run is a trunk as well
    longer = train(make(LONG), tmp_path / "longer", trunk=tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, long.state, longer.state)
    assert writers.read_metrics(tmp_path / "longer")[0]["step"] > BRANCH


def test_who_can_be_the_trunk(make):
    assert trunk.branch_step(make(SHORT)) == BRANCH
    assert trunk.is_trunk(make(LONG), make(SHORT))
    assert not trunk.is_trunk(make(SHORT), make(LONG))  # it decays before
    assert not trunk.is_trunk(make(LONG, **{"model.width": 64}), make(SHORT))
    assert not trunk.is_trunk(make(LONG, **{"optimizer.schedule.warmup_steps": 3}), make(SHORT))
    assert not trunk.is_trunk(make(LONG, **{"quantization.tail_steps": 14}), make(SHORT))
    constant = make(BRANCH, **{"optimizer.schedule.kind": "constant"})
    assert trunk.is_trunk(constant, make(SHORT))
    assert not trunk.is_trunk(constant, make(LONG))
    assert trunk.keeps_checkpoint(make(LONG), BRANCH)
    assert not trunk.keeps_checkpoint(make(LONG, **{"checkpoint.keep_period": 0}), BRANCH)


def test_a_wrong_trunk_is_refused(make, tmp_path):
    def saved(**fields):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        run_folder.create(folder, config_lib.freeze(make(LONG, **fields)), data=None)
        return folder

    with pytest.raises(ValueError, match=r"trained another config \(seed: 5 there, 0 here\)"):
        trunk.check(make(SHORT), saved(seed=5))
    with pytest.raises(ValueError, match=r"keeps no checkpoint of step 7, where the first decay"):
        trunk.check(make(SHORT), saved(**{"train.num_steps": 9}))
    tail = {"quantization.tail_steps": 4}
    with pytest.raises(ValueError, match="do not quantize the same steps before step 8"):
        trunk.check(make(SHORT, **tail), saved(**tail))
    with pytest.raises(ValueError, match=r"keeps no checkpoint of step 8.*\(it has none\)"):
        trunk.check(make(SHORT), saved())
    with pytest.raises(ValueError, match="kind='cosine' has no steps in common"):
        trunk.check(make(SHORT, **{"optimizer.schedule.kind": "cosine"}), saved())
    with pytest.raises(ValueError, match="is not a run folder"):
        trunk.check(make(SHORT), tmp_path / "nowhere")
