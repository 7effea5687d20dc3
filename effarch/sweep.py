"""Runs every config of a sweep: the `get_sweep(arg)` beside a config file's `get_config`.

Usage: python -m effarch.sweep --config=CONFIG[:SWITCHES] [--config.FIELD=VALUE ...] [--dry_run]

Examples:
  python -m effarch.sweep --config=configs/ladder.py:budgets=1e13 --dry_run
  python -m effarch.sweep --config=ladder:budgets=1e17 --dry_run --target=h100   # with estimated times
  python -m effarch.sweep --config=my_sweep.py --parallel=2
  python -m effarch.sweep --config=my_sweep.py --launcher=slurm --gpus=1 \\
      --launcher_options=partition=gpu,time=240,cpus_per_task=8
  python -m effarch.sweep --config=my_sweep.py --launcher=ray --launcher_options=cpus=4
  python -m effarch.sweep --config=tasks:tasks=mqar+copying,mixers=kda+gla   # or tasks=all
  python -m effarch.sweep --config=my_sweep.py --collect

The same command goes on with a sweep that was stopped: finished runs are skipped, others resumed; runs
are known by the fingerprint of their config. Failed runs are left alone until --retry_failed; what
they said last is in failures/. effarch/sweeps.py says how to write get_sweep. Exit codes: 0 all
finished, 1 some failed, 2 a mistake in the command or config, 143 or 130 stopped by SIGTERM or Ctrl-C.
"""

import pathlib
import sys

from absl import flags

from effarch import command_line

FLAGS = flags.FLAGS

command_line.define_config()
flags.DEFINE_string("workdir", None, "The sweep's folder (default: runs/sweep-NAME).")
flags.DEFINE_string("launcher", "local", "Where runs are started: local, slurm or ray.")
flags.DEFINE_string("launcher_options", "", "NAME=VALUE,... for the cluster; see its launcher.")
flags.DEFINE_integer("parallel", 0, "Runs at a time (local: 1, clusters: all).", lower_bound=0)
flags.DEFINE_integer("gpus", 0, "GPUs of a run (0: local runs see all).", lower_bound=0)
flags.DEFINE_bool("retry_failed", False, "Run failed ones again.")
flags.DEFINE_bool("dry_run", False, "Only print the runs: sizes, FLOPs, tokens, lr, batch.")
flags.DEFINE_string(
    "target",
    None,
    "With --dry_run: the time on this machine, by effarch.compile (minutes a model).",
)
flags.DEFINE_bool("collect", False, "Only the table, results.csv and report.html of what is there.")


def main() -> int:
    with command_line.user_errors():
        base = command_line.load_config()
        # Imported here: --help and a mistyped flag are answered before JAX is loaded.
        from effarch.sweeping import plan, results

        source, _, arg = _source().partition(":")
        root = pathlib.Path(FLAGS.workdir or pathlib.Path("runs") / f"sweep-{base.name}")
        taken = list(FLAGS["config"].override_values)
        runs = plan.runs(base, plan.get_sweep(source, arg), root, taken=taken)
        if FLAGS.dry_run:
            print(results.dry_run(runs, target=FLAGS.target))
            return 0
        if FLAGS.target:
            raise ValueError(
                f"--target={FLAGS.target} is an estimate for --dry_run; add that flag."
            )
        code = 0 if FLAGS.collect else _run(runs, root)
        print(results.table(runs))
        for path in results.write(runs, root):
            print(path)
    return code


def _run(runs, root: pathlib.Path) -> int:
    import filelock

    from effarch.sweeping import launchers, schedule

    root.mkdir(parents=True, exist_ok=True)
    launcher = launchers.build(
        FLAGS.launcher, root, parallel=FLAGS.parallel, gpus=FLAGS.gpus, options=_options()
    )
    try:
        with filelock.FileLock(schedule.lock_path(root), timeout=0):
            return schedule.Sweep(runs, launcher, retry_failed=FLAGS.retry_failed).run()
    except filelock.Timeout:
        raise ValueError(
            f"--workdir={root} is in use by another sweep; wait for it, or choose another."
        ) from None


def _options() -> dict[str, str]:
    """`--launcher_options=a=1,b=2` as a dict."""
    pairs = [part.partition("=") for part in FLAGS.launcher_options.split(",") if part]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--launcher_options: {name!r} has no value; write {name}=VALUE.")
    return {name: value for name, _, value in pairs}


def _source() -> str:
    """FILE:SWITCHES of --config."""
    return next(a for a in sys.argv if a.startswith("--config=")).removeprefix("--config=")


if __name__ == "__main__":
    command_line.run(main, usage=__doc__)
