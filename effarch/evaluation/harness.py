"""A run as a model of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    model = harness.model("runs/mine")
    lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])

lm_eval is imported only when a model or its tasks are made.
"""

import difflib
import pathlib
from collections.abc import Sequence

from effarch.evaluation import scoring


def model(run: pathlib.Path | str, **options):
    """An `lm_eval` model of a run folder; options are those of `scoring.Scorer`.

    Raises ImportError, saying what to install, where lm_eval is absent.
    """
    _import()
    return wrap(scoring.Scorer.of_run(run, **options))


def wrap(scorer: scoring.Scorer):
    """An `lm_eval` model of a scorer: each request's arguments go to the method of the same name."""
    _import()
    from lm_eval.api.model import LM

    class Effarch(LM):
        @property
        def tokenizer_name(self) -> str:
            return scorer.tokenizer.spec

        def loglikelihood(self, requests, **_):
            return scorer.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests, **_):
            return scorer.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests, **_):
            return scorer.generate_until([request.args for request in requests])

    return Effarch()


def evaluate(
    run: pathlib.Path | str,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    **options,
) -> dict:
    """The figures of each task, by its name; `include_path` is a folder with YAML files of tasks.

    Raises ValueError for a task that lm_eval does not know, before the model is opened.
    """
    lm_eval = _import()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if not manager.match_tasks([name]) and not pathlib.Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.7)
            hint = (
                f"did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists those it has."
            )
            raise ValueError(f"--tasks: {name!r} is no task of lm_eval; {hint}")
    shots = dict(num_fewshot=num_fewshot, limit=limit)
    found = lm_eval.simple_evaluate(
        model=model(run, **options), tasks=list(tasks), task_manager=manager, **shots
    )
    return found["results"]


def _import():
    try:
        import lm_eval
    except ImportError as error:
        raise ImportError(
            "lm_eval is not installed; pip install lm-eval, or use effarch.evaluation.scoring."
        ) from error
    return lm_eval
