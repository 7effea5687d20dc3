"""Generating tokens by the decode cache: the prompt in one pass, then token by token."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from effarch.models import parameters, sampling
from effarch.models.context import Context

PROMPT_MULTIPLE = 64
"""Prompts are padded to a multiple of this, so that few lengths are compiled."""


def forward(model, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"], start_B, cache: dict):
    """Feeds the first `lengths` tokens of each row, at positions start, start + 1, ...

    Returns the scores after each row's last token [B,W] and the cache.
    """
    offset_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    ctx = Context(
        segment_ids=(offset_T < lengths_B[:, None]).astype(jnp.int32),
        positions=start_B[:, None] + offset_T,
        train=False,
    )
    x_BTD, cache, _ = model(tokens_BT, ctx, cache)
    last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
    return model.logits(last_B1D)[:, 0], cache


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(5,))
def _forward(graphdef, variables, tokens_BT, lengths_B, start_B, cache):
    return forward(nnx.merge(graphdef, variables), tokens_BT, lengths_B, start_B, cache)


@functools.partial(
    jax.jit,
    static_argnums=(0,),
    static_argnames=("temperature", "top_k", "top_p"),
    donate_argnums=(4,),
)
def _next(graphdef, variables, token_B, position_B, cache, key, **options):
    logits_BW, cache = forward(
        nnx.merge(graphdef, variables), token_B[:, None], jnp.ones_like(token_B), position_B, cache
    )
    return _draw(logits_BW, key, position_B[0] + 1, options), cache


def _draw(logits_BW: Float[Array, "B W"], key, number, options) -> Int[Array, " B"]:
    return sampling.sample(logits_BW, jax.random.fold_in(key, number), **options)


def _layers_apart(model):
    """The same model with arrays of their own for each layer, in place of stacked ones.

    Where layers run unrolled, a layer of a stack is copied out of it for every token: most of the time.
    """
    graphdef, state = nnx.split(model)
    model, layers = nnx.merge(graphdef, state), {}
    for name, block in model.layers.items():
        graphdef, state = nnx.split(block)
        numbers = parameters.stack_layers(name)
        for number, own in zip(numbers, _pieces(nnx.to_pure_dict(state), len(numbers))):
            layers[number] = nnx.merge(graphdef, own)
    model.layers = nnx.Dict({str(number): layers[number] for number in sorted(layers)})
    model.runs = tuple((str(number),) for number in sorted(layers))
    return model


@functools.partial(jax.jit, static_argnums=1)
def _pieces(arrays: dict, count: int) -> list[dict]:
    return [jax.tree.map(lambda x, i=index: x[i : i + 1], arrays) for index in range(count)]


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[np.ndarray]:
    """Yields the next token of every prompt [B], `max_tokens` times.

    The same seed gives the same tokens. A prompt must hold at least one token.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompt is empty; begin it with the document token.")
    model = _layers_apart(model) if model.unroll else model
    graphdef, state = nnx.split(model)
    variables = nnx.to_pure_dict(state)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = -(-int(lengths.max()) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    key = jax.random.key(seed)
    cache = model.init_cache(len(prompts), int(lengths.max()) + max_tokens)
    logits_BW, cache = _forward(graphdef, variables, tokens, lengths, np.zeros_like(lengths), cache)
    token_B, position_B = _draw(logits_BW, key, int(lengths[0]), options), lengths
    for left in range(max_tokens - 1, -1, -1):
        following = None
        if left:  # dispatched before the token at hand is read
            following, cache = _next(
                graphdef, variables, token_B, position_B, cache, key, **options
            )
            position_B = position_B + 1
        yield np.asarray(token_B)
        token_B = following
