"""Compiles the train step of a config for machines that are not here, and says what it would cost.

Usage: python -m effarch.compile --config=CONFIG[:SWITCHES] --target=TARGET [--config.FIELD=VALUE ...]

Examples:
  python -m effarch.compile --config=transformer:size=340m --target=h100
  python -m effarch.compile --config=gated_deltanet:size=1.3b --target=v5p:4x4x4
  python -m effarch.compile --config=gated_deltanet:size=1.3b --target=h100:1x8x8 --search
  python -m effarch.compile --list_targets

No accelerator and no data are needed, only the compilers: pip install 'effarch[aot]'. A compile takes
one to four minutes. Printed are parameters, FLOPs, HBM of a device, collectives, and an estimate of the
time of a step with what bounds it. "auto" in the config means what the target would choose.
Exit codes: 0 it fits, 1 it does not, 2 a mistake in the command or config.
"""

import contextlib
import json
import os

from absl import flags

from effarch import command_line

FLAGS = flags.FLAGS
DOES_NOT_FIT = 1

command_line.define_config()
flags.DEFINE_string("target", None, "What to compile for, as v5p:4x4x4, h100 or h100:1x8x8.")
flags.DEFINE_bool("list_targets", False, "Print the known targets with their figures, then stop.")
flags.DEFINE_enum(
    "kernels",
    "auto",
    ["auto", "xla"],
    "auto: the target's own kernels; xla: plain JAX everywhere, to compare with.",
)
flags.DEFINE_bool("json", False, "Print the report as JSON.")
flags.DEFINE_bool(
    "search",
    False,
    "Compile remat x mesh x micro-batches for the fastest that fits (minutes each).",
)


def main() -> int:
    with command_line.user_errors():
        if FLAGS.list_targets:
            return _list_targets()
        config = command_line.load_config()
        name = command_line.required("target")
        from effarch.aot import report
        from effarch.kernels import dispatch
        from effarch.parallel import topologies

        target = topologies.parse(name)
        with dispatch.plain() if FLAGS.kernels == "xla" else contextlib.nullcontext():
            if FLAGS.search:
                return _search(config, target)
            found = report.compile_step(config, target)
    _print(report.rows(found), found.to_dict())
    return 0 if found.memory.fits else DOES_NOT_FIT


def _search(config, target) -> int:
    from effarch.aot import report, search

    done = []
    for settings, found in search.run(config, target):
        done.append((settings, found))
        if not FLAGS.json:
            print(search.line(settings, found), flush=True)
    chosen = search.best(done)
    if chosen is None:
        command_line.fail(
            f"nothing that was tried fits {target}; lower data.batch_size or data.seq_len, or take "
            "more devices.",
            DOES_NOT_FIT,
        )
    settings, found = chosen
    flags_text = " ".join(f"--config.{field}={value}" for field, value in settings.items())
    every = [{"settings": tried, **one.to_dict()} for tried, one in done]
    best = {"settings": settings, **found.to_dict()}
    _print([("best", flags_text), *report.rows(found)], {"best": best, "tried": every})
    return 0


def _list_targets() -> int:
    from effarch.parallel import topologies

    described = topologies.describe()
    if FLAGS.json:
        print(json.dumps(described, indent=1))
        return 0
    for row in described:
        print(row["text"])
    return 0


def _print(rows: list[tuple[str, str]], values: dict) -> None:
    if FLAGS.json:
        print(json.dumps(values, indent=1))
        return
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")


def _quiet_compilers() -> None:
    """Before JAX is loaded: the CPU alone, and no notes from libtpu about the machine it is not on."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is loaded from it cannot be read
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # any that exists: the target is named apart from it
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened: several compiles may run at once
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_LOG_DIR": "disabled",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    _quiet_compilers()
    command_line.run(main, usage=__doc__)
