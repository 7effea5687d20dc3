"""Looks inside the model of a run.

Usage: python -m effarch.analysis --run=FOLDER [--what=sparsity,massive,sinks,depth]

Examples:
  python -m effarch.analysis --run=runs/mine
  python -m effarch.analysis --run=runs/mine --what=sparsity --percent=5 --rows=16
  python -m effarch.analysis --run=runs/mine --what=depth --step=500

Writes RUN/analysis/NAME.json with the figures as PNG beside it, and the run's report.html again, which
then shows them. sparsity and massive look at every checkpoint that was kept (checkpoint.keep_period),
the others at the newest. Without --what, what does not fit the model is left out with a sentence.
"""

import pathlib
import sys

from absl import flags

from effarch import command_line, names

FLAGS = flags.FLAGS

flags.DEFINE_string("run", None, "The run's folder.")
flags.DEFINE_list("what", [], "Of sparsity, massive, sinks and depth; all if left out.")
flags.DEFINE_integer("step", None, "Only the checkpoint of this step.")
flags.DEFINE_integer("rows", 8, "Held-out rows that are looked at.", 1)
flags.DEFINE_float("percent", 1.0, "sparsity: how much the perplexity may rise.", 0.0)


def main() -> int:
    with command_line.user_errors():
        folder = pathlib.Path(command_line.required("run"))
        for path in _write(folder):
            print(path)
    return 0


def _write(folder: pathlib.Path):
    from effarch.analysis import pictures, runs
    from effarch.training import report_page, run_folder

    chosen = FLAGS.what or list(runs.KINDS)
    for name in chosen:
        names.lookup(runs.KINDS, name, "--what")
    opened = runs.Opened(folder, step=FLAGS.step, rows=FLAGS.rows)
    target = folder / runs.FOLDER
    target.mkdir(exist_ok=True)
    for name in chosen:
        options = dict(percent=FLAGS.percent) if name == "sparsity" else {}
        try:
            found = runs.KINDS[name](opened, **options)
        except ValueError as error:
            if FLAGS.what:
                raise
            print(f"{name} left out: {error}", file=sys.stderr)
            continue
        run_folder.write_json(target / f"{name}.json", found)
        yield target / f"{name}.json"
        yield from pictures.write(found["figures"], target / name)
    yield report_page.write_report([folder], folder / "report.html")


if __name__ == "__main__":
    command_line.run(main, usage=__doc__)
