"""Trains the model that a config describes.

Usage: python -m effarch.train --config=CONFIG[:SWITCHES] [--config.FIELD=VALUE ...] [--workdir=FOLDER]

Examples:
  python -m effarch.train --config=configs/quickstart.py
  python -m effarch.train --config=gated_deltanet:size=tiny --config.train.num_steps=2000
  python -m effarch.train --config=quickstart --config.data.sources="('files:books/*.txt',)"
  python -m effarch.train --config=quickstart --config.model.layers="attention/glu"
  python -m effarch.train --config=quickstart --print_config

The same command resumes a run that was stopped. The fields are explained in effarch/config.py, the
layer language in effarch/models/layer_language.py. Exit codes: 0 finished, 2 a mistake in the command,
config or data, 3 too many bad steps, 4 another process of the run died or stuck, 143 or 130 stopped by
SIGTERM or Ctrl-C with everything saved.

On several hosts start the same command on each. Slurm (srun), Kubernetes jobs and TPU pods are detected;
elsewhere add --coordinator=HOST:PORT --num_processes=N --process_id=I. The folder must be shared.
"""

import contextlib
import pathlib

from absl import flags

from effarch import command_line
from effarch.training import freed_memory

FLAGS = flags.FLAGS
BAD_STEPS = 3

command_line.define_config()
flags.DEFINE_string("workdir", None, "The run's folder (default: runs/NAME-FINGERPRINT).")
flags.DEFINE_string(
    "trunk",
    None,
    "The folder of a run of another length: start at the last step that both share (wsd).",
)
flags.DEFINE_string("coordinator", None, "Several processes: HOST:PORT of process 0.")
flags.DEFINE_integer("num_processes", None, "Several processes: how many.")
flags.DEFINE_integer("process_id", None, "Several processes: the number of this one, from 0.")
flags.DEFINE_bool("print_config", False, "Print the config with all overrides, then stop.")


def main() -> int:
    with command_line.user_errors():
        config = command_line.load_config()
        if FLAGS.print_config:
            print(config)
            return 0
        # Imported here: --help and a mistyped flag are answered before JAX is loaded.
        from effarch.parallel import multihost
        from effarch.training import checkpoints, loop, run_folder, setup, trunk

        multihost.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
        plan = setup.prepare(config)
        if FLAGS.trunk:
            multihost.on_first(lambda: trunk.check(plan.config, pathlib.Path(FLAGS.trunk)))
        folder = pathlib.Path(FLAGS.workdir or pathlib.Path("runs") / plan.name)
        multihost.on_first(
            lambda: run_folder.create(folder, plan.config, data=plan.dataset.fingerprint)
        )
    with (
        command_line.user_errors(loop.BadSteps, code=BAD_STEPS),
        command_line.user_errors(
            run_folder.FolderInUse, checkpoints.CheckpointMismatch, checkpoints.CheckpointFailed
        ),
        contextlib.ExitStack() as stack,
    ):
        multihost.on_first(lambda: stack.enter_context(run_folder.locked(folder)))
        return _train(plan, folder)


def _train(plan, folder: pathlib.Path) -> int:
    from effarch.parallel import multihost
    from effarch.training import finish, loop, progress

    first = multihost.is_first()
    console = progress.stderr_console() if first else progress.silent_console()
    rows = {"run folder": folder, **plan.describe()}
    progress.header(console, list(rows.items()))
    trunk = pathlib.Path(FLAGS.trunk) if FLAGS.trunk else None
    outcome = loop.Loop(plan, folder, trunk=trunk, console=console).run()
    if outcome.exit_code == 0:
        finish.write(plan, folder, outcome, console=console)
    return outcome.exit_code


if __name__ == "__main__":
    freed_memory.keep()
    command_line.run(main, usage=__doc__)
