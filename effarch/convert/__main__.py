"""Makes a run of a published model, or a folder for transformers of a run.

Usage: python -m effarch.convert --from=FOLDER --to=FOLDER [--config=FILE]

Examples:
  python -m effarch.convert --from=models/Qwen3-0.6B --to=runs/qwen3
  python -m effarch.generate --run=runs/qwen3 --prompt="The capital of France is"
  python -m effarch.convert --from=models/Qwen3-0.6B --to=runs/tuned --config=quickstart \\
      --config.model.lora.rank=8 --config.optimizer.learning_rate=2e-4
  python -m effarch.train --config=runs/tuned/config.json --workdir=runs/tuned
  python -m effarch.convert --from=runs/tuned --to=models/tuned --dtype=bfloat16
  python -m effarch.convert --from=runs/moe --to=runs/mole --to_latent=group_size=4,latent=64
  python -m effarch.convert --from=models/Mixtral --to=runs/mole --to_latent=latent=512,calibrate=65536

--from is a folder with config.json and *.safetensors (Llama, Qwen3, Mixtral, Qwen3-Next, DeepSeek-V3,
Gemma 2; DeltaNet, gated DeltaNet and GLA of flash-linear-attention) or the folder of a run. Data,
optimizer and length of training that follows are those of --config. Low-rank adapters are merged.

--to_latent makes a run of either whose mixtures of experts have shared latents (MoLE), by truncated SVD
of each group's matrices. Options: group_size (experts of a group, 8); latent (rank, 0: an expert's
width); factor (up_gate, or all for version 2); tie_in (1: one latent for gate and up); calibrate (tokens
of --config's data to whose activations the fit is made, 0: to the weights); rank_reduce (the paper's
first phase, 0: none). A run's own config is kept unless --config is given. What is lost is also in
TO/conversion.json.
"""

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
flags.DEFINE_string(
    "to_latent", None, "Convert experts, as group_size=4,latent=64,calibrate=65536."
)
flags.DEFINE_enum("dtype", "float32", DTYPES, "Type of the exported weights.")


def main() -> int:
    with command_line.user_errors():
        source = pathlib.Path(command_line.required("from"))
        target = pathlib.Path(command_line.required("to"))
        from effarch.convert.moe_to_latent import runs

        is_run = runs.is_run(source)
        if FLAGS.to_latent is not None:
            print(_to_latent(source, target))
        else:
            print(_export(source, target) if is_run else _import(source, target))
    return 0


def _to_latent(source: pathlib.Path, target: pathlib.Path) -> str:
    from effarch.convert.moe_to_latent import layers, runs
    from effarch.training import formatting

    options = layers.parse(FLAGS.to_latent)
    plan, rows = runs.convert_run(source, target, options, base=FLAGS.config, step=FLAGS.step)
    lines = [
        "layer  matrix  weights lost" + (options.calibrate > 0) * "  outputs lost  by plain fit"
    ]
    for row in rows:
        cells = [f"{row[key]:>12.3%}" for key in row if key.startswith(("weights", "outputs"))]
        lines.append(f"{row['layer']:>5}  {row['matrix']:<6}  {'  '.join(cells)}")
    count = formatting.count(plan.counts.params_total)
    return "\n".join([*lines, f"{target}: {plan.config.model.layers}, {count} parameters"])


def _import(source: pathlib.Path, target: pathlib.Path) -> str:
    from effarch import config
    from effarch.convert.hf import folder, runs
    from effarch.training import formatting

    base = config.default() if FLAGS.config is None else FLAGS.config
    plan = runs.import_run(source, target, base)
    count = formatting.count(plan.counts.params_total)
    told = f"{target}: {plan.config.model.layers}, {count} parameters, checkpoint of step 0"
    if not (target / folder.TOKENIZER).is_file():
        told += (
            f"; no {folder.TOKENIZER}: texts are cut by data.tokenizer={plan.config.data.tokenizer}"
        )
    return told


def _export(source: pathlib.Path, target: pathlib.Path) -> str:
    from effarch.convert.hf import runs

    options = dict(step=FLAGS.step, family=FLAGS.family, dtype=FLAGS.dtype)
    return f"{target}: {runs.export_run(source, target, **options)}, {FLAGS.dtype}"


if __name__ == "__main__":
    command_line.run(main, usage=__doc__)
