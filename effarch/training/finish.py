"""What a finished run leaves behind: samples, summary.json, the report page and a table."""

import pathlib

import jax
import numpy as np

from effarch.models import decoding
from effarch.parallel import multihost
from effarch.training import (
    formatting,
    loop,
    progress,
    report_page,
    report_runs,
    restore,
    run_folder,
    setup,
)


def write(plan: setup.Setup, folder: pathlib.Path, outcome: loop.Outcome, *, console=None) -> None:
    """Writes samples/, summary.json and report.html, then prints the summary table."""
    samples = write_samples(plan, folder, outcome.state)
    if not multihost.is_first():
        return
    summary = summarize(plan, outcome)
    run_folder.write_json(folder / run_folder.SUMMARY, summary)
    if load := expert_load(plan, outcome.state.model_state):
        run_folder.write_json(folder / report_runs.LOAD, load)
    page = report_page.write_report([folder], folder / "report.html")
    rows = [
        ("validation loss", summary.get("val/loss", "-")),
        *[
            (name.replace("_", " "), summary.get(f"val/{name}", "-"))
            for name in plan.dataset.metrics
        ],
        *[
            (f"  {name} of the same text", summary[key])
            for name, key in (("gzip -9", "gzip_bits_per_byte"), ("xz -9e", "xz_bits_per_byte"))
            if key in summary
        ],
        ("tokens", formatting.count(summary["tokens"])),
        ("model FLOPs", formatting.scientific(summary["flops_model"])),
        ("hardware FLOPs", formatting.scientific(summary["flops_hw"])),
        ("time", formatting.duration(summary["seconds"])),
        ("updates skipped", summary["skipped_steps"]),
        ("run folder", folder),
        ("report", page),
    ]
    progress.summary(console, rows)
    shown = console or progress.stderr_console()
    for name, text in samples.items():
        shown.print(f"\nsample after {name!r}:", markup=False)
        shown.print(text, markup=False, highlight=False)


def write_samples(plan: setup.Setup, folder: pathlib.Path, state) -> dict[str, str]:
    """Continues `log.sample_prompts`; returns and writes the texts."""
    prompts, num_tokens = plan.config.log.sample_prompts, plan.config.log.sample_tokens
    tokenizer = plan.dataset.tokenizer
    if not prompts or not num_tokens or tokenizer is None:
        return {}
    model = restore.model_of(plan, state)
    encoded = [
        [tokenizer.document_token, *map(int, ids)] for ids in tokenizer.encode_batch(list(prompts))
    ]
    columns = list(
        decoding.generate(model, encoded, max_tokens=num_tokens, temperature=0.8, top_p=0.95)
    )
    if not multihost.is_first():
        return {}
    (folder / run_folder.SAMPLES).mkdir(exist_ok=True)
    texts = {}
    for row, prompt in enumerate(prompts):
        ids = [int(column[row]) for column in columns]
        if tokenizer.document_token in ids:
            ids = ids[: ids.index(tokenizer.document_token)]
        texts[prompt] = prompt + tokenizer.decode(np.array(ids))
        (folder / run_folder.SAMPLES / f"{row:02d}.txt").write_text(texts[prompt])
    return texts


def summarize(plan: setup.Setup, outcome: loop.Outcome) -> dict:
    """The flat record that reports and comparisons read."""
    counts, steps = plan.counts, int(outcome.state.step)
    tokens = steps * plan.tokens_per_step
    return {
        "status": "finished",
        "steps": steps,
        "tokens": tokens,
        "params_total": counts.params_total,
        "params_matmul": counts.params_matmul,
        "params_non_embedding": counts.params_non_embedding,
        "params_active": counts.params_active,
        "flops_model": counts.flops_per_token * tokens,
        "flops_hw": counts.flops_hardware * tokens,
        "flops_6nd": counts.flops_6n * tokens,
        **counts.flops_forward,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "optimizer_state_bytes": sum(x.nbytes for x in jax.tree.leaves(outcome.state.opt_state)),
        "skipped_steps": int(outcome.state.opt_state.skipped),
        "seconds": outcome.seconds,
        "resumes": outcome.resumes,
        "compile_seconds": outcome.compile_seconds,
        **_yardsticks(plan),
        **{f"val/{name}": value for name, value in outcome.final.items()},
        **{name.removeprefix("time/"): value for name, value in outcome.rates.items()},
        **{f"{report_runs.BACKEND}{op}": name for op, name in sorted(outcome.backends.items())},
    }


def expert_load(plan: setup.Setup, model_state) -> dict[int, list[float]]:
    """Each expert's share of the choices over the routers' window, by layer."""
    found = {}
    infos = jax.tree.leaves(plan.plan.model_state)
    for info, leaf in zip(infos, jax.tree.leaves(model_state), strict=True):
        if not info.path.endswith("/router/load"):
            continue
        loads = np.asarray(leaf).reshape(len(info.public_paths), -1)
        for public, load_E in zip(info.public_paths, loads):
            found[int(public.split("/")[1])] = [float(f"{share:.4g}") for share in load_E]
    return dict(sorted(found.items()))


def _yardsticks(plan: setup.Setup) -> dict[str, float]:
    """What general compressors make of the same validation text, in bits per byte."""
    found = plan.dataset.yardsticks
    return {f"{name}_bits_per_byte": found[name] for name in ("gzip", "xz") if name in found}
