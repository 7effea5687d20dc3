"""Continues a text with the model of a run, as it is drawn.

Usage: python -m effarch.generate --run=FOLDER --prompt=TEXT [--prompt=TEXT ...]

Examples:
  python -m effarch.generate --run=runs/quickstart-hybrid-1a2b3c4d --prompt="def main("
  python -m effarch.generate --run=runs/mine --prompt="import " --temperature=0
  python -m effarch.generate --run=runs/mine --prompt="The" --top_p=0.9 --seed=7 --max_tokens=400

One prompt is streamed; several are drawn together and printed one after the other. The same seed
gives the same text. A text ends early where the model ends the document.
"""

import pathlib
import sys

from absl import flags

from effarch import command_line

FLAGS = flags.FLAGS

flags.DEFINE_string("run", None, "The run's folder.")
flags.DEFINE_integer("step", None, "Use the checkpoint of this step (default: the newest).")
flags.DEFINE_multi_string("prompt", [""], "The text to continue; may be given several times.")
flags.DEFINE_integer("max_tokens", 256, "Tokens to draw at most.", lower_bound=1)
flags.DEFINE_float("temperature", 0.8, "0 takes the best token; 1 the model's own distribution.")
flags.DEFINE_integer("top_k", 0, "Draw among the k best tokens; 0 among all.", lower_bound=0)
flags.DEFINE_float("top_p", 1.0, "Draw among the fewest tokens whose probabilities reach p.")
flags.DEFINE_integer("seed", 0, "Another seed, another text.")


def main() -> int:
    with command_line.user_errors():
        _check_flags()
        tokenizer, tokens = _open(pathlib.Path(command_line.required("run")))
    if len(FLAGS.prompt) == 1:
        _stream(tokenizer, tokens)
    else:
        _print_all(tokenizer, list(tokens))
    return 0


def _check_flags() -> None:
    if FLAGS.temperature < 0:
        raise ValueError(f"--temperature={FLAGS.temperature} must be 0 or more.")
    if not 0 < FLAGS.top_p <= 1:
        raise ValueError(f"--top_p={FLAGS.top_p} must be above 0 and at most 1.")


def _open(folder: pathlib.Path):
    """The tokenizer and an iterator over the drawn tokens, one array [B] a step."""
    from effarch.models import decoding
    from effarch.training import restore

    plan, state = restore.open_run(folder, step=FLAGS.step)
    tokenizer = plan.dataset.tokenizer
    if tokenizer is None:
        task = plan.config.data.task.name
        raise ValueError(f"--run={FLAGS.run} learned the task {task}, not text; use evaluate.")
    prompts = [
        [tokenizer.document_token, *map(int, ids)] for ids in tokenizer.encode_batch(FLAGS.prompt)
    ]
    return tokenizer, decoding.generate(
        restore.model_of(plan, state),
        prompts,
        max_tokens=FLAGS.max_tokens,
        seed=FLAGS.seed,
        temperature=FLAGS.temperature,
        top_k=FLAGS.top_k,
        top_p=FLAGS.top_p,
    )


def _stream(tokenizer, tokens) -> None:
    decoder = tokenizer.stream()
    sys.stdout.write(FLAGS.prompt[0])
    for drawn in tokens:
        if drawn[0] == tokenizer.document_token:
            break
        sys.stdout.write(decoder.push(int(drawn[0])))
        sys.stdout.flush()
    print(decoder.flush())


def _print_all(tokenizer, tokens) -> None:
    for row, prompt in enumerate(FLAGS.prompt):
        ids = [int(drawn[row]) for drawn in tokens]
        if tokenizer.document_token in ids:
            ids = ids[: ids.index(tokenizer.document_token)]
        print(f"=== {prompt!r}\n{prompt}{tokenizer.decode(ids)}\n")


if __name__ == "__main__":
    command_line.run(main, usage=__doc__)
