"""The token store: every text of the training data tokenised once, and which passages belong to which queries.

`build_or_open` builds it where it is missing and opens it memory-mapped; the folder's name is a fingerprint of the
sources' content, the tokenizer and the settings, so a store is never stale.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from retriever.checksums import damaged, own_cache
from retriever.config import Config
from retriever.config_sources import kind_numbers, own_texts, text_kinds
from retriever.data.encoded import SAME_TEXT, EqualRows, first_of_equal, write_encoded
from retriever.data.formats import open_source
from retriever.data.relations import Csr
from retriever.data.store_builder import KINDS, MANIFEST, PASSAGES, QUERIES, StoreBuilder
from retriever.data.text_table import TextTable, load_array
from retriever.data.text_vectors import TextVectors
from retriever.data.tokens import SIDES, Side, TokenTemplate, described_tokenizer
from retriever.files import clean, make_folder, read_json, remove, replace_folder
from retriever.lock import LockedError, locked
from retriever.screen import say

__all__ = ["Csr", "Store", "StoredSource", "TextTable", "build_or_open"]

_LAYOUT = 1  # raised whenever a store that was written earlier could no longer be read


@dataclass(frozen=True)
class StoredSource:
    """One source's queries: rows first (included) to last (excluded) of the store."""

    name: str
    format: str
    first: int
    last: int
    left_out: int  # queries without a positive


class Store:
    """An opened store. A source's queries are contiguous rows; each distinct final text of a passage is one row.

    `positives`, `negatives` and `known` are Csr over query rows. Queries of equal tokens share what they know:
    `same_text` [queries] is the row of the first of them, in which `known` holds the positives of all and any passage
    whose text is theirs. `negatives` holds none of the known. Scores are float32, aligned with the Csr's ids, NaN where
    there is none.
    """

    def __init__(self, folder: Path, encoded: Path | None = None) -> None:
        """`encoded`: a folder of `write_encoded`, whose relations treat passages of equal tokens as one."""
        manifest = read_json(folder / MANIFEST)
        self.folder = folder
        self.fingerprint: str = manifest["fingerprint"]
        self.sources = tuple(StoredSource(**source) for source in manifest["sources"])
        self.queries = TextTable(folder / QUERIES)
        self.passages = TextTable(folder / PASSAGES)
        self.equal = {"queries": 0, "passages": 0}  # to an earlier one
        if encoded is not None:
            self.equal |= read_json(encoded / MANIFEST)
        merged = encoded if encoded is not None and any(self.equal.values()) else None
        kinds = folder / PASSAGES / KINDS
        self._passage_kinds = load_array(kinds) if kinds.exists() else None
        self._relations = merged or folder
        self.same_text = load_array(merged / SAME_TEXT) if merged is not None else np.arange(len(self.queries))
        self.positives = self._relation("positives")
        self.negatives = self._relation("negatives")
        self.known = self._relation("known")
        self.positive_scores = self._scores("positives")  # [positives.ptr[-1]] or None
        self.negative_scores = self._scores("negatives")  # [negatives.ptr[-1]] or None
        self.guide: TextVectors | None = None  # of a run that has a guide model
        self.teacher: TextVectors | None = None  # of a run that distils a teacher's embeddings

    def limits(self, config: Config, side: Side) -> int | np.ndarray:
        """Tokens of a text at most, special ones included: one number, or one for each row [n] int64.

        A passage has those of the first source that brought it among the sources of its prompt and length.
        """
        kinds = text_kinds(config, side)
        distinct = list(dict.fromkeys(kinds))
        lengths = np.array([kind.max_tokens for kind in distinct])
        if len(set(lengths.tolist())) == 1:
            return int(lengths[0])
        if side == "passage":
            assert self._passage_kinds is not None  # as there are several
            return lengths[self._passage_kinds]
        return np.repeat(lengths[kind_numbers(kinds)], [source.last - source.first for source in self.sources])

    def _relation(self, name: str) -> Csr:
        return Csr(load_array(self._relations / f"{name}.ptr.npy"), load_array(self._relations / f"{name}.ids.npy"))

    def _scores(self, name: str) -> np.ndarray | None:
        path = self._relations / f"{name}.scores.npy"
        return load_array(path) if path.exists() else None


def build_or_open(config: Config, tokenizer: PreTrainedTokenizerBase, *, progress: bool = True) -> Store:
    """The store of `config.data` under `config.data.cache_dir`, built first if it is not there.

    Safe to call in several processes at once: one builds, the others say that they wait. Call it before any process
    group exists, since building can take longer than a collective may. Raises DataError for data that cannot be used.
    """
    model, data = config.model, config.data
    sources = [open_source(source) for source in data.train]
    settings = {
        "layout": _LAYOUT,
        "query_prompt": model.query_prompt,
        "passage_prompt": model.passage_prompt,
        "title": data.title,
        "title_separator": data.title_separator,
    }
    if (own := own_texts(config)) is not None:
        settings["texts"] = own
    described = _hash(described_tokenizer(tokenizer))
    read = {"sources": [source.fingerprint() for source in sources], "tokenizer": described}
    fingerprint = _hash(settings | read)  # of all that the store's content depends on
    cache = Path(data.cache_dir).expanduser()
    make_folder(cache)
    folder = cache / f"store-{fingerprint}"

    def make() -> None:
        """Builds under another name and renames: the folder is there complete or not at all. The lock is held."""
        _remove_abandoned(cache)
        if os.environ.get("TOKENIZERS_PARALLELISM", "true").lower() in ("false", "0", "off", "no", "n", "f"):
            say("TOKENIZERS_PARALLELISM turns parallel tokenising off: unset it to tokenise on all cores")
        train = [{k: v for k, v in asdict(source).items() if k != "weight"} for source in data.train]
        manifest = settings | {"fingerprint": fingerprint, "tokenizer": described, "train": train}
        with replace_folder(folder) as building:
            StoreBuilder(building, config, tokenizer, progress).build(sources, manifest)

    made_once(folder, lambda: _problem(folder, data.verify), make)
    return Store(folder, _encoded(folder, config, tokenizer))


def _encoded(folder: Path, config: Config, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The folder with the relations of texts as encoded under this configuration's lengths.

    It lies beside the store's, or in the user's own cache if nothing can be written there.
    """
    template = TokenTemplate.from_tokenizer(tokenizer)
    names = []
    for side in SIDES:
        rooms = [max(1, kind.max_tokens - template.special_tokens) for kind in text_kinds(config, side)]
        names.append(str(rooms[0]) if len(set(rooms)) == 1 else _hash({"rooms": rooms}))
    name = f"encoded-{folder.name.removeprefix('store-')}-{'-'.join(names)}{'-last' if template.keep_end else ''}"
    encoded = folder.with_name(name)

    def problem() -> str | None:
        if not encoded.exists():
            return " is missing"
        return next((f"/{file} {what}" for file, what in damaged(encoded, again=config.data.verify).items()), None)

    if not os.access(folder.parent, os.W_OK) and problem() is not None:
        encoded = own_cache() / "encoded" / name
        if not encoded.exists():
            say(f"data.cache_dir={folder.parent} is read-only: {name} is made in {encoded.parent}")
        make_folder(encoded.parent)

    def make() -> None:
        store = Store(folder)
        rooms = [np.maximum(1, store.limits(config, side) - template.special_tokens) for side in SIDES]
        both = zip((store.queries, store.passages), rooms, strict=True)
        equal = EqualRows(*(first_of_equal(texts, room, keep_end=template.keep_end) for texts, room in both))
        positives, negatives = (store.positives, store.positive_scores), (store.negatives, store.negative_scores)
        write_encoded(encoded, equal, {"positives": positives, "known": (store.known, None), "negatives": negatives})

    made_once(encoded, problem, make)
    return encoded


def made_once(folder: Path, find_problem: Callable[[], str | None], make: Callable[[], None]) -> None:
    """Makes `folder` where something is wrong with it. One process makes it, the others wait and use it."""
    if find_problem() is None:
        return
    with locked(folder.with_suffix(".lock"), str(folder), wait=True):
        problem = find_problem()
        if problem is not None:
            if folder.exists():
                say(f"{folder}{problem} and is built again")
                remove(folder)
            make()


def _hash(values: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def _problem(folder: Path, again: bool) -> str | None:
    """A sentence about the first damaged file of a store; None if all are intact. `again`: see `damaged`."""
    try:
        files: dict[str, int] = read_json(folder / MANIFEST)["files"]
        for name, size in files.items():
            if (folder / name).stat().st_size != size:
                return f"/{name} is damaged (it is of another size)"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{str(error.filename).removeprefix(str(folder))} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"/{MANIFEST} is damaged"
    return next((f"/{name} {problem}" for name, problem in damaged(folder, again=again).items()), None)


def _remove_abandoned(cache: Path) -> None:
    """Removes what killed builds of other stores left: folders under construction whose lock nobody holds."""
    for path in cache.glob("store-*.lock"):
        with suppress(LockedError), locked(path, path.stem):
            clean(cache, path.stem)
            if (building := path.with_suffix(".building")).exists():  # as earlier versions called it
                remove(building)
