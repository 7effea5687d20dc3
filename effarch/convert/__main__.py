"""Makes a run of a published model, or a folder for transformers of a run.

Usage: python -m effarch.convert --from=FOLDER --to=FOLDER [--config=FILE]

Examples:
  python -m effarch.convert --from=models/Qwen3-0.6B --to=runs/qwen3
  python -m effarch.generate --run=runs/qwen3 --prompt="The capital of France is"
  python -m effarch.convert --from=models/Qwen3-0.6B --to=runs/tuned --config=quickstart \\
      --config.model.lora.rank=8 --config.optimizer.learning_rate=2e-4
  python -m effarch.train --config=runs/tuned/config.json --workdir=runs/tuned
  python -m effarch.convert --from=runs/tuned --to=models/tuned --dtype=bfloat16

--from is a folder with config.json and *.safetensors (Llama, Qwen3, Mixtral, Qwen3-Next, DeepSeek-V3,
Gemma 2; DeltaNet, gated DeltaNet and GLA of flash-linear-attention) or the folder of a run. Data,
optimizer and length of training that follows are those of --config. Low-rank adapters are merged.
"""

import json
import pathlib

from absl import flags

from effarch import command_line

FLAGS = flags.FLAGS
DTYPES = ("float32", "bfloat16", "float16")

command_line.define_config()
flags.DEFINE_string("from", None, "A published model, or a run.")
flags.DEFINE_string("to", None, "The folder to make.")
flags.DEFINE_integer("step", None, "Export the checkpoint of this step (default: the newest).")
flags.DEFINE_string("family", "", "Export as this model_type (default: the first that fits).")
flags.DEFINE_enum("dtype", "float32", DTYPES, "Type of the exported weights.")


def main() -> int:
    with command_line.user_errors():
        source = pathlib.Path(command_line.required("from"))
        target = pathlib.Path(command_line.required("to"))
        print(_export(source, target) if _is_run(source) else _import(source, target))
    return 0


def _is_run(source: pathlib.Path) -> bool:
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"--from={source} holds no config.json; give a model's folder or a run's.")
    return "fingerprint" in json.loads(path.read_text())


def _import(source: pathlib.Path, target: pathlib.Path) -> str:
    from effarch import config
    from effarch.convert.hf import runs
    from effarch.training import formatting

    base = config.default() if FLAGS.config is None else FLAGS.config
    plan = runs.import_run(source, target, base)
    count = formatting.count(plan.counts.params_total)
    return f"{target}: {plan.config.model.layers}, {count} parameters, checkpoint of step 0"


def _export(source: pathlib.Path, target: pathlib.Path) -> str:
    from effarch.convert.hf import runs

    options = dict(step=FLAGS.step, family=FLAGS.family, dtype=FLAGS.dtype)
    return f"{target}: {runs.export_run(source, target, **options)}, {FLAGS.dtype}"


if __name__ == "__main__":
    command_line.run(main, usage=__doc__)
