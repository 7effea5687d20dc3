"""What the vendors' compilers say of a kernel, on a machine without the accelerator.

Usage: python -m effarch.kernels.report --op=OP --target=TARGET [--spec=SIZES] [--backward]
       python -m effarch.kernels.report --table [--op=OP] [--target=TARGET]

Examples:
  python -m effarch.kernels.report --op=gated_delta_rule --target=v6e
  python -m effarch.kernels.report --op=kda --target=h100 --backward --json
  python -m effarch.kernels.report --op=gated_delta_rule --target=v6e --backend=xla
  python -m effarch.kernels.report --op=delta_rule --target=v5p --spec=T=8192,H=8,HV=16,packed=1

Needs the compilers, no accelerator: pip install 'effarch[aot]'; registers and spills of GPU kernels need
CUDA's ptxas on the PATH. A compile takes half a minute to a few minutes. Printed for a TPU: VLIW bundles
per token and head, how full the units are, spills, VMEM; for a GPU: warp instructions per token and
head, registers, spills, shared memory, matrix instructions; for both, the program's HBM temporaries.
`--table` measures what README.md beside this file shows and has changed, and writes it again; with --op
or --target only their rows.
Exit codes: 0 done, 2 a mistake in the command, or the kernel does not compile.
"""

import functools
import json

from absl import flags

from effarch import command_line, names
from effarch.kernels.report import cases, compiling, table

FLAGS = flags.FLAGS
BACKENDS = ("pallas_tpu", "pallas_tpu_precise", "pallas_gpu", "xla")

flags.DEFINE_string("op", None, f"One of {', '.join(cases.OPS)}.")
flags.DEFINE_string("target", None, "What to compile for: v5e, v5p, v6e, tpu7x, a100, h100, b200.")
flags.DEFINE_string("spec", "", "Sizes other than B=1,T=4096,H=16,HV=H,K=128,V=128,dtype=bfloat16.")
flags.DEFINE_string("backend", None, f"One of {', '.join(BACKENDS)}; the target's own by default.")
flags.DEFINE_bool("backward", False, "Forward and backward together.")
flags.DEFINE_bool("json", False, "Print the report as JSON.")
flags.DEFINE_string("keep", None, "Keep the compilers' dumps in this folder.")
flags.DEFINE_bool("table", False, "Measure what has changed of the committed table and write it.")


def main() -> int:
    with command_line.user_errors():
        if FLAGS.table:
            report = functools.partial(print, flush=True)
            table.update(report, op=FLAGS.op, target=FLAGS.target)
            return 0
        found = compiling.measure(_case(), keep=FLAGS.keep)
    print(json.dumps(found, indent=1) if FLAGS.json else "\n".join(table.lines(found)))
    return 0


def _case() -> cases.Case:
    from effarch.parallel import topologies

    op, target = command_line.required("op"), command_line.required("target")
    names.lookup(cases.OPS, op, "--op")
    platform = topologies.parse(target).device.platform
    backend = FLAGS.backend or f"pallas_{platform}"
    names.lookup(dict.fromkeys(BACKENDS), backend, "--backend")
    return cases.Case(op, target, backend, FLAGS.backward, cases.parse_spec(FLAGS.spec))


if __name__ == "__main__":
    command_line.run(main, usage=__doc__)
