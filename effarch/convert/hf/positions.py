"""Rotary positions in config.json: in `rope_parameters` since transformers 5, at the top before.

Stretched positions become one field of their own with the numbers that effarch's layers take.
"""

LLAMA3, YARN = "llama3_scaling", "yarn_scaling"
_NUMBERS = {
    "llama3": (
        LLAMA3,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
    "yarn": (
        YARN,
        ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "mscale"),
    ),
}
"""Kind: our field, and the names of its numbers there."""
_OUTER = ("rope_theta", "partial_rotary_factor")


def flat(content: dict) -> dict:
    """config.json with every field of rotary positions at the top. Raises ValueError for other kinds."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(
            f"config.json: rope_parameters of kinds of layers ({', '.join(nested)}) are not supported; "
            "only one set for all layers is."
        )
    if kind not in ("default", *_NUMBERS):
        raise ValueError(
            f"config.json: rotary positions of type {kind!r} are not supported; supported: "
            f"{', '.join(('default', *_NUMBERS))}."
        )
    kept = {name: value for name, value in content.items() if value is not None}
    kept |= {name: rope[name] for name in _OUTER if name in rope}
    if kind != "default":
        field, names = _NUMBERS[kind]
        kept[field] = _numbers(kind, names, rope)
    return kept


def refuse(hf: dict, fields, model_type: str) -> None:
    """Raises ValueError for positions that a family with these `fields` does not have."""
    for kind, (field, _) in _NUMBERS.items():
        if hf.get(field) and field not in fields:
            known = ["default", *(kind for kind, (own, _) in _NUMBERS.items() if own in fields)]
            raise ValueError(
                f"config.json: rotary positions of type {kind!r} are not supported for {model_type}; "
                f"supported: {', '.join(known)}."
            )
    turned = hf.get("partial_rotary_factor", 1)
    if turned != 1 and "partial_rotary_factor" not in fields:
        raise ValueError(
            f"config.json: partial_rotary_factor={turned} is not supported for {model_type}; only 1 is."
        )


def write(hf: dict) -> None:
    """Puts the fields at the top where old and new versions of transformers look for them."""
    for kind, (field, names) in _NUMBERS.items():
        numbers = hf.pop(field, ())
        if numbers:
            hf["rope_scaling"] = {"rope_type": kind, **dict(zip(names, numbers))}
            if kind == "yarn":
                hf["rope_scaling"]["mscale_all_dim"] = hf["rope_scaling"]["mscale"]
    if "rope_theta" in hf:
        outer = {name: hf[name] for name in _OUTER if name in hf}
        hf["rope_parameters"] = {"rope_type": "default", **hf.get("rope_scaling", {}), **outer}


def _numbers(kind: str, names: tuple[str, ...], rope: dict) -> tuple[float, ...]:
    if kind == "yarn":
        rope = {"beta_fast": 32, "beta_slow": 1} | {k: v for k, v in rope.items() if v is not None}
        scales = [rope.get(name) for name in ("mscale", "mscale_all_dim")]
        if scales[0] != scales[1] or "attention_factor" in rope:
            raise ValueError(
                f"config.json: rotary positions of type 'yarn' with mscale={scales[0]}, "
                f"mscale_all_dim={scales[1]} and attention_factor={rope.get('attention_factor')} are "
                "not supported; equal mscales without a factor are."
            )
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ValueError(
            f"config.json: rotary positions of type {kind!r} have no {', '.join(missing)}; check "
            "the file."
        )
    return tuple(rope[name] for name in names)
