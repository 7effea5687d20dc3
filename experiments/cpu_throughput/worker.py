"""One side of one case in a process of its own: `worker.py SIDE CASE`, driven by lines on stdin.

After compiling and warming up it prints `ready PARAMETERS`; each line `N` on stdin is answered by the
seconds of a step, the mean over N.
"""

import os
import sys
import time

THREADS = 2
WARM_UP = 3


def main() -> None:
    side, text = sys.argv[1:]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    import shapes

    case = shapes.parse(text)
    if side == "torch":
        import side_torch as module
        import torch

        torch.set_num_threads(THREADS)
    else:
        import side_effarch as module
    step, parameters = module.build(case)
    for _ in range(WARM_UP):
        step()
    print("ready", parameters, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        print((time.perf_counter() - start) / int(line), flush=True)


if __name__ == "__main__":
    main()
