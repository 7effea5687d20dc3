"""What simple compressors reach on a validation text, in bits per byte.

They see the whole text and a model sees one window, so they are a rough measure: a byte model
should pass `unigram` within a hundred steps and `gzip` in a short run.
"""

import lzma
import math
import zlib

import numpy as np

MAX_BYTES = 64 * 2**20  # a longer text is measured on its beginning
_MIN_DICTIONARY, _MAX_DICTIONARY = 2**16, 2**26  # xz -9 has a dictionary of 64 MiB


def measure(text: bytes) -> dict[str, float | int]:
    """`bytes` measured and bits per byte of a unigram code, `gzip -9` and `xz -9e`."""
    text = text[:MAX_BYTES]
    if not text:
        return {"bytes": 0}
    return {
        "bytes": len(text),
        "unigram": round(unigram(text), 4),
        "gzip": round(8 * _gzip_size(text) / len(text), 4),
        "xz": round(8 * len(_xz(text)) / len(text), 4),
    }


def unigram(text: bytes) -> float:
    """-sum p_b log2 p_b over the text's own byte frequencies."""
    counts = np.bincount(np.frombuffer(text, np.uint8))
    shares = counts[counts > 0] / len(text)
    return -math.fsum(share * math.log2(share) for share in shares)


def _gzip_size(text: bytes) -> int:
    compressor = zlib.compressobj(level=9, wbits=31)  # 31: a gzip header and trailer
    return len(compressor.compress(text)) + len(compressor.flush())


def _xz(text: bytes) -> bytes:
    # A dictionary beyond the text gains nothing, and xz -9 would reserve 674 MB for it.
    dictionary = min(max(1 << (len(text) - 1).bit_length(), _MIN_DICTIONARY), _MAX_DICTIONARY)
    best = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=[best])
