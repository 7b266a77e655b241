"""Per-image correctness of a network as compact text, for comparing two networks image by image."""

from __future__ import annotations

import base64
import zlib

import numpy as np
from numpy.typing import NDArray


def packed(right: NDArray[np.bool_]) -> str:
    """Encode per-image correctness as "COUNT:BITS"; BITS is zlib-compressed and in base64.

    10,000 images take about 1,000 characters.

    Args:
        right: bool (images,), in the order of the split.
    """
    bits = zlib.compress(np.packbits(right).tobytes(), 9)
    return f"{len(right)}:{base64.b64encode(bits).decode()}"


def unpacked(text: str) -> NDArray[np.bool_]:
    """Decode the output of `packed`: bool (images,)."""
    count, _, compressed = text.partition(":")
    bits = zlib.decompress(base64.b64decode(compressed))
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=int(count)).astype(bool)
