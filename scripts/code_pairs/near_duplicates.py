"""Near-duplicate texts by MinHash (Broder 1997): their word triples overlap. Found without comparing all pairs."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from scripts.code_pairs.processes import spread

LEAST_SIMILARITY = 0.7  # estimated Jaccard similarity of the sets of word triples
_BANDS, _ROWS = 16, 8  # a pair of similarity s shares a band with probability 1 - (1 - s^8)^16: .61 at .7, .95 at .8
_WORD = re.compile(r"\w+")
_BLOCK = 2000  # texts


def words(text: str) -> list[str]:
    """The words of a text in lower case; identifiers and numbers count."""
    return _WORD.findall(text.lower())


def near_duplicates(texts: Sequence[str], least: float = LEAST_SIMILARITY) -> Iterator[tuple[int, int]]:
    """Positions of texts of estimated similarity `least` or more. Of texts in one bucket, each is compared with the
    first.
    """
    blocks = [texts[start : start + _BLOCK] for start in range(0, len(texts), _BLOCK)]
    signatures = np.concatenate([*spread(_signatures, blocks), _signatures([])])  # [n, hashes]
    for band in range(_BANDS):
        rows = np.ascontiguousarray(signatures[:, band * _ROWS : (band + 1) * _ROWS])
        _, first, bucket = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        firsts = first[bucket.reshape(-1)]
        alike = (signatures[firsts] == signatures).mean(axis=1) >= least
        for position in np.flatnonzero(alike & (firsts != np.arange(len(texts)))):
            yield int(firsts[position]), int(position)


def _signatures(texts: Sequence[str]) -> np.ndarray:
    """[n, 128] uint32: the smallest of each hash over a text's word triples."""
    rng = np.random.default_rng(0)  # the same hashes in every process
    draw = partial(rng.integers, 1 << 63, size=_BANDS * _ROWS, dtype=np.uint64)
    factors, offsets = draw() * np.uint64(2) + np.uint64(1), draw()
    found = np.empty((len(texts), _BANDS * _ROWS), np.uint32)
    for row, text in enumerate(texts):
        of = words(text)
        triples = {zlib.crc32(" ".join(of[i : i + 3]).encode()) for i in range(max(1, len(of) - 2))}
        hashed = np.fromiter(sorted(triples), np.uint64, len(triples))[:, None] * factors + offsets  # modulo 2^64
        found[row] = (hashed >> np.uint64(32)).min(axis=0)
    return found
