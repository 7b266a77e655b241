"""On which images a network is right, as text: by that, two networks are compared image by image."""

from __future__ import annotations

import base64
import zlib

import numpy as np
from numpy.typing import NDArray


def packed(right: NDArray[np.bool_]) -> str:
    """COUNT:BITS, compressed, in base64; ten thousand images take about a thousand characters.

    Args:
        right: bool (images,), in the order of the split.
    """
    bits = zlib.compress(np.packbits(right).tobytes(), 9)
    return f"{len(right)}:{base64.b64encode(bits).decode()}"


def unpacked(text: str) -> NDArray[np.bool_]:
    """What `packed` made text of."""
    count, _, compressed = text.partition(":")
    bits = zlib.decompress(base64.b64decode(compressed))
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=int(count)).astype(bool)
