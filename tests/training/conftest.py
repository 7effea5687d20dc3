"""A corpus and a model so small that a run takes seconds."""

import functools
import random

import pytest

from effarch import config

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven"]
CONFIG = """
import pathlib
from effarch import config


def get_config(arg=""):
    return config.from_json(pathlib.Path(__file__).with_name("config.json").read_text())
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 60 small texts; their words are drawn at random."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for number in range(60):
        text = " ".join(draw.choice(WORDS) for _ in range(120))
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def write_config(tmp_path_factory):
    """Writes a config as a Python file that --config takes; gives its path."""

    def write(c):
        folder = tmp_path_factory.mktemp("config")
        (folder / "config.json").write_text(config.to_json(c))
        (folder / "tiny.py").write_text(CONFIG)
        return folder / "tiny.py"

    return write


@pytest.fixture
def tiny(make_tiny):
    """A config of a 2-layer model on the corpus that trains for 12 steps."""
    return make_tiny()


@pytest.fixture(scope="session")
def make_tiny(corpus):
    """Makes the config of `tiny`, for fixtures that outlive a test."""
    return functools.partial(_tiny, corpus)


def _tiny(corpus):
    c = config.default()
    c.name = "tiny"
    c.data.sources = (f"files:{corpus}/*.txt",)
    c.data.tokenizer = "bytes"
    c.data.val_permille = 150
    c.data.cache_dir = str(corpus.parent / "cache")
    c.data.seq_len, c.data.batch_size = 32, 4
    c.model.width, c.model.depth, c.model.layers = 16, 2, "attention/glu"
    c.model.blocks.attention.num_heads = 2
    c.model.blocks.glu.hidden = 32
    c.optimizer.schedule.warmup_steps = 2
    c.train.num_steps = 12
    c.eval.every_steps = 5
    c.eval.max_batches = 2
    c.checkpoint.every_steps = 4
    c.log.every_steps = 1
    c.log.tensorboard = False
    c.log.sample_prompts = ("the ",)
    c.log.sample_tokens = 8
    return c
