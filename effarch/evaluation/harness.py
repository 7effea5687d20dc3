"""A run as a model of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    model = harness.model("runs/mine")
    lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])

lm_eval is imported only when a model is made.
"""

import pathlib

from effarch.evaluation import scoring


def model(run: pathlib.Path | str, **options):
    """An `lm_eval` model of a run folder; options are those of `scoring.Scorer`.

    Raises ImportError, saying what to install, where lm_eval is absent.
    """
    return wrap(scoring.Scorer.of_run(run, **options))


def wrap(scorer: scoring.Scorer):
    """An `lm_eval` model of a scorer: each request's arguments go to the method of the same name."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ImportError(
            "lm_eval is not installed; pip install 'effarch[hub]', or use effarch.evaluation.scoring."
        ) from error

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
