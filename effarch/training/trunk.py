"""Decays that branch off a trunk: runs of several lengths that share the steps before their decay.

Up to the start of its decay a wsd run takes the steps of any longer one, bit for bit (schedules.py).
So a longer run that kept the checkpoint of that step serves as the trunk, and the shorter one trains its
decay alone; or a shorter run serves, and the longer one goes on where the shorter one's decay began.
Either way one model at several lengths costs the longest and a fifth of each other one (Hägele et al.,
arXiv 2405.18392).
"""

import pathlib

from effarch import config as config_lib
from effarch.training import checkpoints, run_folder, schedules

FREE = (
    "train.num_steps",
    "optimizer.schedule.kind",
    "optimizer.schedule.decay",
    "optimizer.schedule.final",
)
"""The fields in which a run may differ from its trunk."""


def branch_step(config) -> int:
    """The first step that a run does not share with longer ones: the start of its decay.

    Raises ValueError for a schedule without a constant part.
    """
    schedule, num_steps = config.optimizer.schedule, config.train.num_steps
    if schedule.kind == "constant":
        return num_steps
    if schedule.kind != "wsd":
        raise ValueError(
            f"--trunk: optimizer.schedule.kind={schedule.kind!r} has no steps in common with a longer "
            "run; use 'wsd'."
        )
    return schedules.decay_start(num_steps, schedule.decay_fraction)


def start_step(trunk, config) -> int:
    """The last step that a run of `config` shares with its trunk: where the first decay starts."""
    return min(branch_step(trunk), branch_step(config))


def is_trunk(config, of) -> bool:
    """Whether a run of `config` passes through the state in which the decay of the run `of` starts."""
    try:
        step, last = branch_step(of), branch_step(config)
    except ValueError:
        return False
    return (
        0 < step <= last and not _differences(config, of) and _quantizes_equally(config, of, step)
    )


def keeps_checkpoint(config, step: int) -> bool:
    """Whether a finished run of `config` still has the checkpoint of that step."""
    every, period = config.checkpoint.every_steps, config.checkpoint.keep_period
    return bool(every and period) and step % every == 0 and step % period == 0


def check(config, folder: pathlib.Path) -> None:
    """Raises ValueError unless the run in `folder` can be the trunk of a run of `config`."""
    trunk = run_folder.read_config(folder)
    step = start_step(trunk, config)
    if wrong := _differences(trunk, config):
        shown = "; ".join(f"{name}: {old!r} there, {new!r} here" for name, old, new in wrong[:3])
        raise ValueError(
            f"--trunk={folder} trained another config ({shown}); give the trunk of this one."
        )
    if not _quantizes_equally(trunk, config, step):
        raise ValueError(
            f"--trunk={folder} and this run do not quantize the same steps before step {step}, up to "
            "which they would share them; give a trunk of another length."
        )
    kept = _checkpoints(folder).steps()
    if step not in kept:
        raise ValueError(
            f"--trunk={folder} keeps no checkpoint of step {step}, where the first decay starts (it "
            f"has {', '.join(map(str, kept)) or 'none'}); train it with checkpoint.every_steps and "
            "checkpoint.keep_period that divide that step."
        )


def restore(plan, folder: pathlib.Path) -> tuple[int, object]:
    """(step, state) of the last step that the plan's run shares with the trunk."""
    step = start_step(run_folder.read_config(folder), plan.config)
    with _checkpoints(folder) as saved:
        step, state, _ = saved.restore(plan.target(), step=step)
    return step, state


def _checkpoints(folder: pathlib.Path) -> checkpoints.Checkpoints:
    mark = run_folder.read_fingerprint(folder)
    return checkpoints.Checkpoints(folder / run_folder.CHECKPOINTS, fingerprint=mark)


def _differences(trunk, config) -> list:
    return [field for field in config_lib.differences(trunk, config) if field[0] not in FREE]


def _quantizes_equally(trunk, config, step: int) -> bool:
    """Whether both use the same products in every step before `step`."""
    last = [min(c.train.num_steps - c.quantization.tail_steps, step) for c in (trunk, config)]
    return last[0] == last[1]
