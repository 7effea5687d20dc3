"""The tokenizer of a run of our own, as transformers reads it.

tokenizer_config.json says that tokenizer.json is the whole tokenizer: without it transformers takes the
class of the model's family, which splits texts in its own way whatever the file says.
"""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from effarch.convert.hf import folder
from effarch.data import tokenizers as tokenizers_lib

CONFIG = "tokenizer_config.json"


def write(tokenizer: tokenizers_lib.Tokenizer, path: pathlib.Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json; the document token begins and ends a text."""
    text = tokenizer.to_json() or _of_bytes()
    name = tokenizers.Tokenizer.from_str(text).id_to_token(tokenizer.document_token)
    (path / folder.TOKENIZER).write_text(text)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "clean_up_tokenization_spaces": False,
    }
    (path / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def _of_bytes() -> str:
    """tokenizer.json of the tokenizer `bytes`: no merges, id n is byte n."""
    characters = tokenizers_lib.byte_of_character()
    vocab = characters | {tokenizers_lib.DOCUMENT_TOKEN: len(characters)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers_lib.DOCUMENT_TOKEN])
    return tokenizer.to_str()
