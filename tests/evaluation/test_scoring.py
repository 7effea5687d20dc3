"""Log likelihoods and continuations against a naive computation on unpadded rows of one length."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from effarch import config
from effarch.evaluation import harness, scoring
from effarch.models.context import Context
from effarch.training import evaluation, restore, setup

TEXT = "the quick brown fox jumps over the lazy dog. "
LONGEST = 48


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of bytes that sees 48 tokens, scored two rows at a time."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(20):
        for name, text in (("words", TEXT), ("digits", "0123456789 ")):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{number}.txt").write_text(text * (3 + number))
    c = config.default()
    c.data.sources = tuple(f"files:{folder}/{name}/*.txt" for name in ("words", "digits"))
    c.data.tokenizer, c.data.val_permille = "bytes", 200
    c.data.cache_dir = str(folder / "cache")
    c.data.seq_len, c.data.batch_size = LONGEST, 4
    c.model.width, c.model.depth, c.model.init_std = 16, 1, 0.3
    c.model.blocks.attention.num_heads = 2
    c.model.blocks.glu.hidden = 16
    plan = setup.prepare(c)
    return plan, plan.init()


@pytest.fixture(scope="module")
def naive(tiny):
    """log p of every next token of [document token, *ids], in float64."""
    model = restore.model_of(*tiny)
    graphdef, variables = nnx.split(model)

    @jax.jit
    def logits(variables, ids):
        model = nnx.merge(graphdef, variables)
        return model.logits(model(ids, Context(train=False))[0])[0]

    def log_probs(ids):
        padded = np.zeros(LONGEST + 16, np.int32)
        padded[: len(ids)] = ids
        z = np.asarray(logits(variables, padded[None]), np.float64)[: len(ids)]
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    return log_probs


def tokens(text):
    return [256, *text.encode()]


def test_the_three_computations(tiny, naive):
    scorer = scoring.Scorer(*tiny, batch_size=2)
    pairs = [("the quick", " brown"), ("over ", "the"), ("", "dog"), ("a" * 70, "fox"), ("x", "")]
    got = scorer.loglikelihood(pairs)
    for (context, continuation), (value, greedy) in zip(pairs, got):
        ids = tokens(context + continuation)[-(LONGEST + 1) :]
        scored = len(continuation) + (len(context) - len(context.rstrip()))
        table = naive(ids[:-1])
        places = range(len(ids) - 1 - scored, len(ids) - 1)
        wanted = sum(table[place, ids[place + 1]] for place in places)
        assert value == pytest.approx(wanted, abs=1e-4)
        assert greedy == all(table[place].argmax() == ids[place + 1] for place in places)

    texts = [TEXT * 3, "fox", ""]
    for text, value in zip(texts, scorer.loglikelihood_rolling(texts)):
        ids, wanted = tokens(text), 0.0
        for start in range(0, len(ids) - 1, LONGEST):
            stop = min(start + LONGEST, len(ids) - 1)
            seen = ids[max(0, stop - LONGEST) : stop]
            rows = naive(seen)[-(stop - start) :]
            wanted += sum(row[ids[start + 1 + n]] for n, row in enumerate(rows))
        assert value == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
@pytest.mark.ci
def test_bits_per_byte_by_domain(tiny, naive):
    """Windows of 48 tokens, each of their documents scored on its own."""
    plan, state = tiny
    figures = evaluation.evaluate(
        plan,
        plan.eval_step(quantized=False),
        state.params,
        state.model_state,
        evaluation.batches(plan),
    )
    assert len(plan.dataset.sources) == 2
    for source in plan.dataset.sources:
        stream = np.asarray(plan.dataset.tokens(source, "val"), np.int32)
        total, num_bytes, num_tokens = 0.0, 0, 0
        for start in range(0, len(stream) - 1, LONGEST):
            window = stream[start : start + LONGEST + 1]
            size = len(window) - 1
            cuts = [0, *(n for n in range(1, size) if window[n] == 256), size]
            for first, last in zip(cuts, cuts[1:]):
                table = naive(window[first:last])
                targets = window[first + 1 : last + 1]
                total -= table[np.arange(len(targets)), targets].sum()
            num_bytes += int((window[1:] != 256).sum())
            num_tokens += size
        assert figures[f"{source}/tokens"] == num_tokens
        wanted = total / np.log(2) / num_bytes
        assert figures[f"{source}/bits_per_byte"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
@pytest.mark.ci
def test_continuations_are_greedy_and_end_at_stops(tiny, naive):
    scorer = scoring.Scorer(*tiny, batch_size=2)
    contexts = ["the quick", "lazy", "dog jumps"]
    wanted = []
    for context in contexts:
        ids = tokens(context)
        for _ in range(12):
            ids.append(int(naive(ids)[-1].argmax()))
        wanted.append(scorer.tokenizer.decode(ids[len(tokens(context)) :]))
    free = [(context, {"max_gen_toks": 12}) for context in contexts]
    assert scorer.generate_until(free) == wanted
    stop = wanted[0][3:5]
    stopped = [(context, {"until": [stop], "max_gen_toks": 12}) for context in contexts]
    assert scorer.generate_until(stopped) == [text.split(stop)[0] for text in wanted]


def test_the_harness_model_says_what_is_missing_or_passes_requests_on():
    class Fake:
        def loglikelihood(self, pairs):
            return [(-1.0, pair == ("a", "b")) for pair in pairs]

    class Request:
        args = ("a", "b")

    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install lm-eval"):
            harness.wrap(Fake())
    else:
        assert harness.wrap(Fake()).loglikelihood([Request()]) == [(-1.0, True)]
        with pytest.raises(ValueError, match="'pika' is no task of lm_eval; did you mean 'pi"):
            harness.evaluate("no such run", ["piqa", "pika"])


TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    "continued": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{greedy}}"
generation_kwargs: {max_gen_toks: 6, until: ["\\u0000"]}
metric_list: [{metric: exact_match}]
""",
}
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""


@pytest.mark.slow
def test_lm_eval_itself_runs_local_tasks(tiny, naive, tmp_path):
    """Three tasks from files: choices by likelihood, bits per byte, and greedy continuations."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra hub)")
    scorer = scoring.Scorer(*tiny, batch_size=2)
    choices, rows, hits, bits = ["fox", "0123", " dog"], [], [], []
    for question in ("the quick", "lazy", "dog 012", "over the "):
        ids = tokens(question)
        table = naive(ids[:-1])
        bits.append(-sum(row[token] for row, token in zip(table, ids[1:])) / np.log(2))
        scores = [pair[0] for pair in scorer.loglikelihood([(question, c) for c in choices])]
        hits.append(int(np.argmax(scores)) == 1)
        (greedy,) = scorer.generate_until([(question, {"max_gen_toks": 6})])
        row = dict(question=question, choices=choices, answer=1, greedy=greedy)
        rows.append(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    for name, text in TASKS.items():
        head = HEAD.format(name=name, file=tmp_path / "rows.jsonl")
        (tmp_path / f"{name}.yaml").write_text(head + text)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(harness.wrap(scorer), tasks=[*TASKS], task_manager=manager)
    results = found["results"]
    assert results["choice"]["acc,none"] == np.mean(hits)
    num_bytes = sum(len(json.loads(row)["question"]) for row in rows)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(
        sum(bits) / num_bytes, rel=1e-4
    )
    assert results["continued"]["exact_match,none"] == 1
