"""The figures that README.md shows: what is measured, what of it is out of date, how it is written."""

import hashlib
import json
import pathlib
from collections.abc import Callable

from effarch.kernels.report import cases, compiling, whole_arrays

FOLDER = pathlib.Path(__file__).resolve().parent
FIGURES = FOLDER / "figures.json"
README = FOLDER / "README.md"
START, END = "<!-- table: start -->\n", "<!-- table: end -->\n"
_MIB = 2**20


def committed() -> list[cases.Case]:
    """The rows of the table, in its order."""
    rows = []
    for op in cases.RECURRENT:
        for target in ("v6e", "v5p", "tpu7x"):
            rows += [cases.Case(op, target, "pallas_tpu", both) for both in (False, True)]
    for target in ("a100", "h100", "b200"):
        for op in ("delta_rule", "gated_delta_rule", "kda"):
            rows += [cases.Case(op, target, "pallas_gpu", both) for both in (False, True)]
    for target, passes in (("a100", (False,)), ("h100", (False, True)), ("b200", (False,))):
        for op in ("ssd", "gla"):
            rows += [cases.Case(op, target, "pallas_gpu", both) for both in passes]
    packed = cases.Spec(packed=1)
    for op, backend in (("attention", "pallas_tpu"), ("short_conv", "pallas_tpu")):
        rows += [cases.Case(op, "v6e", backend, both, packed) for both in (False, True)]
    rows += [cases.Case("short_conv", "v6e", "xla", both, packed) for both in (False, True)]
    for op in ("attention", "short_conv"):
        rows += [cases.Case(op, "h100", "pallas_gpu", both, packed) for both in (False, True)]
    rows += [cases.Case("gated_delta_rule", "v6e", "pallas_tpu", x, packed) for x in (False, True)]
    for op in ("gated_delta_rule", "kda"):
        rows += [cases.Case(op, "v6e", "pallas_tpu_precise")]
    for target, backend in (("v6e", "pallas_tpu"), ("h100", "pallas_gpu")):
        rows += [cases.Case(op, target, backend) for op in whole_arrays.PROGRAMS]
    rows += [cases.Case("gated_delta_rule", "v6e", "xla", both) for both in (False, True)]
    return rows


def read() -> list[dict]:
    """What was measured, as `compiling.measure` returns it, with the fingerprint of the sources."""
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else []


def update(
    report: Callable[[str], None], *, op: str | None = None, target: str | None = None
) -> None:
    """Measures the rows whose kernels have changed since and writes both files after each of them.

    With `op` or `target` only the rows of these.
    """
    known = {json.dumps(row["case"]): row for row in read()}
    wanted = committed()
    for case in wanted:
        key, sources = json.dumps(case.to_dict()), fingerprint(case)
        is_asked = case.op == (op or case.op) and case.target == (target or case.target)
        if not is_asked or known.get(key, {}).get("sources") == sources:
            continue
        try:
            known[key] = compiling.measure(case) | {"sources": sources}
        except ValueError as error:
            report(f"{_title(case)}: {error}")
            continue
        report(" ".join(lines(known[key])[:2]))
        _write([known[k] for x in wanted if (k := json.dumps(x.to_dict())) in known])
    _write([known[k] for x in wanted if (k := json.dumps(x.to_dict())) in known])


def fingerprint(case: cases.Case) -> str:
    """Of the sources that a kernel is made from."""
    kernels, folder = FOLDER.parent, cases.OPS[case.op][2]
    digest, folders = hashlib.sha256(), [folder, "chunked"]
    if (folder, case.backend) == ("linear_attention", "pallas_gpu"):
        folders.append("delta_rule/pallas_gpu")  # it is made from their parts
    for path in sorted(path for name in folders for path in (kernels / name).rglob("*.py")):
        other = {"pallas_tpu": "pallas_gpu", "pallas_gpu": "pallas_tpu"}.get(case.backend)
        if other is None or other not in str(path.relative_to(kernels)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def lines(found: dict) -> list[str]:
    """The figures of a case for a person."""
    case = cases.Case.from_dict(found["case"])
    is_tpu = case.target.startswith(("v", "tpu"))
    total, unit = found["per_token_and_head"], "bundles" if is_tpu else "warp instructions"
    said = [_title(case)]
    if total is not None:
        said.append(f"{total:.2f} {unit} per token and head in our kernels")
    if found["xla_cycles"] is not None:
        said.append(f"{found['xla_cycles']:.2f} cycles per token and head in XLA's own operations")
    said.append(f"{found['temporary_bytes'] / _MIB:.1f} MiB of temporaries in HBM")
    for kernel in found["kernels"]:
        if kernel["is_pallas"]:
            said.append(f"  {kernel['name']}: {(_of_tpu if is_tpu else _of_gpu)(kernel)}")
    others = sum(not kernel["is_pallas"] for kernel in found["kernels"])
    if others:
        said.append(f"  and {others} kernels of XLA")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [*said, f"compiled by {versions}"]


def _title(case: cases.Case) -> str:
    spec = ", ".join(f"{name}={value}" for name, value in vars(case.spec).items() if value)
    what = "forward + backward" if case.backward else "forward"
    return f"{case.op} {what}, {case.backend} for {case.target} ({spec}):"


def _of_tpu(kernel: dict) -> str:
    units = ", ".join(f"{unit} {share:.0%}" for unit, share in kernel["occupancy"].items())
    vmem = kernel["vmem_bytes"]
    text = f"{kernel['per_token_and_head']:.2f} = {kernel['bundles']} bundles x {kernel['steps']} steps"
    text += f"; {units}; {kernel['spill_stores']} spill stores, {kernel['spill_loads']} loads"
    return text + (f"; VMEM {vmem / _MIB:.1f} MiB" if vmem else "")


def _of_gpu(kernel: dict) -> str:
    matrix = ", ".join(f"{count} {kind}" for kind, count in kernel["matrix"].items())
    text = (
        f"{kernel['per_token_and_head']:.0f}, {kernel['blocks']} blocks of {kernel['warps']} warps"
    )
    if kernel["registers"] is not None:
        text += f"; {kernel['registers']} registers, {kernel['spill_bytes']} bytes spilled"
    return (
        text + f"; {kernel['shared_bytes'] // 1024} KiB shared; {matrix or 'no matrix instruction'}"
    )


def _write(rows: list[dict]) -> None:
    FIGURES.write_text(json.dumps(rows, indent=1) + "\n")
    before, _, rest = README.read_text().partition(START)
    README.write_text(before + START + markdown(rows) + END + rest.partition(END)[2])


def markdown(rows: list[dict]) -> str:
    """The table: a line a case, a TPU's figures in bundles, a GPU's in warp instructions."""
    head = ("operation", "passes", "backend", "target", "per token and head", "kernels", "HBM MiB")
    cells = [head, ("---",) * len(head)]
    for row in rows:
        case = cases.Case.from_dict(row["case"])
        cells.append(
            (
                case.op + (", packed" if case.spec.packed else ""),
                "both" if case.backward else "forward",
                case.backend,
                case.target,
                _figure(row),
                "; ".join(_short(kernel) for kernel in row["kernels"] if kernel["is_pallas"]),
                f"{row['temporary_bytes'] / _MIB:.0f}",
            )
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _figure(row: dict) -> str:
    total, cycles = row["per_token_and_head"], row["xla_cycles"]
    if total is None:
        return f"{cycles:.1f} cycles (XLA)" if cycles is not None else "-"
    return f"{total:.2f}" if total < 50 else f"{total:.0f}"


def _short(kernel: dict) -> str:
    name = kernel["name"].removeprefix("delta_rule_").removeprefix("linear_attention_")
    if "bundles" in kernel:
        units = kernel["occupancy"]
        full = "/".join(f"{100 * units[unit]:.0f}" for unit in ("MXU", "XLU", "VPU"))
        return f"{name} {kernel['per_token_and_head']:.2f} ({full} %)"
    spilled = kernel["spill_bytes"]
    registers = "" if spilled is None else f", {kernel['registers']} regs, {spilled} B spilled"
    matrix = "/".join(f"{count} {kind}" for kind, count in kernel["matrix"].items())
    return f"{name} {kernel['per_token_and_head']:.0f} ({matrix or 'no matrix'}{registers})"
