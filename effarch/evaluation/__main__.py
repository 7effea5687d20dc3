"""Runs tasks of lm-evaluation-harness on a run.

Usage: python -m effarch.evaluation --run=FOLDER --tasks=NAME[,NAME ...]

Examples:
  python -m effarch.evaluation --run=runs/mine --tasks=lambada_openai,piqa
  python -m effarch.evaluation --run=runs/mine --tasks=wikitext --max_length=2048 --limit=100
  python -m effarch.evaluation --run=runs/mine --tasks=my_task --include_path=tasks

Prints the results as one JSON object. Needs `pip install lm-eval`; the tasks fetch their data.
"""

import json

from absl import flags

from effarch import command_line

FLAGS = flags.FLAGS

flags.DEFINE_string("run", None, "The run's folder.")
flags.DEFINE_list("tasks", [], "Names of tasks.")
flags.DEFINE_string("include_path", None, "A folder with tasks of your own, as YAML files.")
flags.DEFINE_integer("step", None, "Evaluate the checkpoint of this step (default: the newest).")
flags.DEFINE_integer("max_length", None, "Tokens seen at most (default: the run's data.seq_len).")
flags.DEFINE_integer("batch_size", 16, "Rows of one call.", 1)
flags.DEFINE_integer("limit", None, "Only so many examples of each task.")
flags.DEFINE_integer("num_fewshot", None, "Examples in the prompt (default: the task's own).")


def main() -> int:
    with command_line.user_errors(ValueError, OSError, ImportError):
        run = command_line.required("run")
        tasks = command_line.required("tasks")
        from effarch.evaluation import harness

        results = harness.evaluate(
            run,
            tasks,
            include_path=FLAGS.include_path,
            num_fewshot=FLAGS.num_fewshot,
            limit=FLAGS.limit,
            step=FLAGS.step,
            max_length=FLAGS.max_length,
            batch_size=FLAGS.batch_size,
        )
    print(json.dumps(results, indent=1, default=str))
    return 0


if __name__ == "__main__":
    command_line.run(main, usage=__doc__)
