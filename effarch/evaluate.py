"""Loss and bits per byte of a run on its validation text, or on other text; of a task, accuracy.

Usage: python -m effarch.evaluate --run=FOLDER [--step=STEP] [--data=PREPARED_FOLDER]

Examples:
  python -m effarch.evaluate --run=runs/quickstart-hybrid-1a2b3c4d
  python -m effarch.evaluate --run=runs/mine --step=500 --seq_len=1024
  python -m effarch.evaluate --run=runs/mine --data=prepared/books
  python -m effarch.evaluate --run=runs/mqar --seq_len=512
  python -m effarch.evaluate --run=runs/mine --recipe=mxfp4

Prints one JSON object. Text is scored in disjoint windows of seq_len tokens; bits per byte count the
UTF-8 bytes of the original text. Other text must be prepared with the run's tokenizer.
"""

import dataclasses
import json
import pathlib

from absl import flags

from effarch import command_line

FLAGS = flags.FLAGS

flags.DEFINE_string("run", None, "The run's folder.")
flags.DEFINE_integer("step", None, "Evaluate the checkpoint of this step (default: the newest).")
flags.DEFINE_string("data", None, "A prepared folder to score instead of the run's own.")
flags.DEFINE_integer("seq_len", None, "Tokens a window (default: the run's data.seq_len).", 1)
flags.DEFINE_string(
    "recipe",
    None,
    "Round all linear layers by this recipe (quantization.recipe), none for not at all.",
)
flags.DEFINE_integer("max_batches", 0, "Score only so many batches, spread evenly; 0 is all.", 0)


def main() -> int:
    with command_line.user_errors():
        result = _evaluate(pathlib.Path(command_line.required("run")))
    print(json.dumps(result, indent=1))
    return 0


def _evaluate(folder: pathlib.Path) -> dict:
    from effarch.data import dataset
    from effarch.training import evaluation, restore

    plan, state = restore.open_run(folder, step=FLAGS.step, recipe=FLAGS.recipe)
    if FLAGS.seq_len:
        plan = plan.with_seq_len(FLAGS.seq_len)
    if FLAGS.data:
        if plan.dataset.tokenizer is None:
            raise ValueError(
                f"--data={FLAGS.data}: the run learned a task, not text; leave it out."
            )
        other = dataset.open_dataset(FLAGS.data)
        if other.tokenizer.sha256 != plan.dataset.tokenizer.sha256:
            raise ValueError(
                f"--data={FLAGS.data} was prepared with another tokenizer than the run's; prepare it "
                f"with --tokenizer=file:{plan.dataset.folder / 'tokenizer.json'}."
            )
        plan = dataclasses.replace(plan, dataset=other)
    windows = evaluation.batches(plan, max_batches=FLAGS.max_batches)
    quantized = FLAGS.recipe is not None or plan.is_model_quantized(int(state.step))
    eval_step = plan.eval_step(quantized=quantized)
    figures = evaluation.evaluate(plan, eval_step, state.params, state.model_state, windows)
    return {"run": str(folder), "step": int(state.step), **figures}


if __name__ == "__main__":
    command_line.run(main, usage=__doc__)
