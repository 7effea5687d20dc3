"""Published models of transformers and flash-linear-attention as safetensors folders, both ways.

To add a family: a file beside this one with its `Family`, and a line in FAMILIES. `weights.load` reads a
folder into a model, `runs.import_run` into a run folder, `runs.export_run` writes one of a run.
"""

from effarch import names
from effarch.convert.hf import deepseek_v3, fla, gemma2, llama, mixtral, qwen3, qwen3_next
from effarch.convert.hf.family import Family, Inexpressible, write_config

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.FAMILY,
        qwen3.FAMILY,
        mixtral.FAMILY,
        deepseek_v3.FAMILY,
        gemma2.FAMILY,
        fla.DELTA_NET,
        fla.GATED_DELTA_NET,
        fla.GLA,
        qwen3_next.FAMILY,
    )
}
"""By config.json's model_type; a model is exported as the first that can express it."""


def of_config(content: dict) -> Family:
    """The family of a config.json. Raises ValueError for one that is not known."""
    return names.lookup(FAMILIES, content.get("model_type", ""), "config.json: model_type")


def of_model(model, family: str = "") -> tuple[Family, dict]:
    """The family that can express `config.model` (or the one named) and its config.json.

    Raises ValueError if there is none, with what keeps the nearest family from it.
    """
    if family:
        found = names.lookup(FAMILIES, family, "--family")
        return found, write_config(found, model)
    refusals = []
    for found in FAMILIES.values():
        try:
            return found, write_config(found, model)
        except Inexpressible as error:
            refusals.append(error)
    nearest = min(refusals, key=lambda error: len(error.fields))
    raise ValueError(
        f"no published family can express this model ({nearest}); choose other layers or options."
    )
