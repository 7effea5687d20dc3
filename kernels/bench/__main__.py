"""Times a kernel's backends against each other on the device that is here, a CPU included.

Usage: python -m effarch.kernels.bench --op=OP [--backends=xla,reference] [--spec=SIZES] [--backward]

Examples:
  python -m effarch.kernels.bench --op=gated_delta_rule --backends=pallas_gpu,xla --backward
  python -m effarch.kernels.bench --op=kda --backends=xla,reference --spec=T=512,H=2,K=64,V=64

Operations and sizes are those of `effarch.kernels.report`. Every backend is compiled and warmed up; then
rounds visit all backends in turn, so that what disturbs the machine disturbs all of them alike. A round
calls a backend back to back until 50 ms are filled and waits once, at the end: the time of a call is the
device's as long as the device is slower than Python (about 0.1 ms a call). Printed are the median of the
rounds with its quartiles, and tokens/s; with `--out` also a line of JSON a backend.
"""

import json
import pathlib

from absl import flags

from effarch import command_line, names
from effarch.kernels.bench import timing
from effarch.kernels.report import cases

FLAGS = flags.FLAGS
BACKENDS = ("xla", "reference", "pallas_tpu", "pallas_tpu_precise", "pallas_gpu")

flags.DEFINE_string("op", None, f"One of {', '.join(cases.OPS)}.")
flags.DEFINE_list("backends", ["xla"], f"Of {', '.join(BACKENDS)}.")
flags.DEFINE_string("spec", "", "Sizes other than B=1,T=4096,H=16,HV=H,K=128,V=128,dtype=bfloat16.")
flags.DEFINE_bool("backward", False, "Forward and backward together.")
flags.DEFINE_integer("rounds", 11, "How often every backend is visited.", lower_bound=3)
flags.DEFINE_string("out", None, "A file to which lines of JSON are appended.")


def main() -> int:
    with command_line.user_errors():
        op = command_line.required("op")
        names.lookup(cases.OPS, op, "--op")
        for backend in FLAGS.backends:
            names.lookup(dict.fromkeys(BACKENDS), backend, "--backends")
        spec = cases.parse_spec(FLAGS.spec)
    chosen = [cases.Case(op, "here", name, FLAGS.backward, spec) for name in FLAGS.backends]
    for row in timing.measure(chosen, rounds=FLAGS.rounds):
        low, middle, high = (1e3 * row[name] for name in ("low", "median", "high"))
        print(
            f"{row['case']['backend']:<20} {middle:8.3f} ms a call ({low:.3f} to {high:.3f}), "
            f"{row['tokens_per_second']:,.0f} tokens/s on {row['device']}"
        )
        if FLAGS.out:
            with pathlib.Path(FLAGS.out).open("a") as file:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    command_line.run(main, usage=__doc__)
