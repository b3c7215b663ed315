"""A memory bank: what earlier steps encoded takes part in the loss as further passages and queries, without a gradient.

    moco        passages, encoded by an encoder that follows the trained one: φ ← m·φ + (1 − m)·θ after each update (He
                et al. 2020, arXiv:1911.05722)
    contaccum   queries and passages as the loss of their step saw them. A query in the bank has a term of its own, with
                its passage in the bank as target (Kim et al. 2024, arXiv:2406.12356)

Every rank holds the whole bank, in an order that does not depend on the number of ranks, and takes its share of it to
the loss. There the share is more rows of the rank's part, so that every strategy, mask and direction works as it does
without a bank; the gradient at these rows is dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels.infonce.exclusions import Exclusions
from retriever.config import Config, LossConfig
from retriever.data.batch import Batch
from retriever.data.targets import Targets
from retriever.encoder.dual_encoder import DualEncoder
from retriever.parallel.world import World

_FOLLOWER = "follower"  # in the names of its weights
_STORED = ("positives", "passage_ids", "known_ptr", "known_ids")  # of an entry's targets


@dataclass(frozen=True)
class Part:
    """Queries and passages with their targets, which are on the host: a rank's part of a batch, of the bank, or of
    both.
    """

    queries: Tensor  # [B, D]
    passages: Tensor  # [N, D]
    targets: Targets


class Bank:
    """The entries of the last `loss.bank_steps` steps: those of the oldest step leave when those of a new one come.

    In the first step the bank is empty, and the loss is the one without a bank. An entry has the id of its passage, so
    that an old copy of a known positive is no negative.
    """

    def __init__(self, config: LossConfig, world: World, device: torch.device) -> None:
        """`device`: where representations are."""
        self._config, self._world, self._device = config, world, device
        self._entries: dict[int, Part] = {}  # by step; replaced as a whole, since another thread may be reading it
        self._follower: DualEncoder | None = None
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}  # the follower's and the encoder's that it follows

    @classmethod
    def from_config(cls, config: Config, encoder: DualEncoder, world: World) -> Bank | None:
        """The bank of a run, empty; None where it has none. `encoder`: as it computes in training."""
        if config.loss.bank == "none":
            return None
        bank = cls(config.loss, world, torch.device("cpu") if config.batch.offload else world.device)
        if config.loss.bank == "moco":
            bank.follow(encoder)
        return bank

    def follow(self, encoder: DualEncoder) -> None:
        """From now on, entries are encoded by a copy of the passage tower and its projection head. It shares what no
        update changes: weights that are not trained, and buffers.
        """
        heads = [head for side, head in encoder.projections.items() if side != "query"]
        modules = nn.ModuleList([encoder.passage_tower, *heads])
        shared = [*(p for p in modules.parameters() if not p.requires_grad), *modules.buffers()]
        own = copy.deepcopy(modules, {id(tensor): tensor for tensor in shared})
        followed = dict(modules.named_parameters())
        self._weights = {
            name.removeprefix("0."): (p, followed[name]) for name, p in own.named_parameters() if p.requires_grad
        }
        tower = cast(PreTrainedModel, own[0])
        self._follower = DualEncoder(
            tower,
            tower,
            pooling=encoder.pooling,
            normalize=encoder.normalize,
            truncate_dim=encoder.truncate_dim,
            autocast_dtype=encoder.autocast_dtype,
        )
        for head in own[1:]:  # one at most
            self._follower.projections["shared"] = head
        self._follower.eval()
        self._follower.packed = encoder.packed
        self._follower.requires_grad_(False)

    @torch.no_grad()
    def follow_update(self, *_: object) -> None:
        """φ ← m·φ + (1 − m)·θ; a hook behind the optimizer's update."""
        for own, followed in self._weights.values():
            own.lerp_(followed, 1.0 - self._config.bank_momentum)

    def join(self, step: int, part: Part) -> Part:
        """`part`, this rank's of the batch of `step`, and behind its rows this rank's share of the bank."""
        held = self._held_before(step).values()
        return _joined([part, *(self._share(entry) for entry in held)]) if held else part

    @torch.no_grad()
    def add(self, batch: Batch, part: Part) -> None:
        """Puts the batch into the bank for the steps after it. Every rank calls it, before the update of the step.

        `part`: this rank's, as the loss sees it.
        """
        self.put(batch.step, part if self._follower is None else self._encoded(batch, self._follower))

    def put(self, step: int, part: Part) -> None:
        """Puts the parts of all ranks into the bank, as the entries of `step`."""
        entries = self._held_before(step)  # all of them: a checkpoint of the last update, before this step's, has them
        self._entries = entries | {step: self._in_order(part)}

    def tensors(self, updates: int) -> dict[str, Tensor]:
        """The state after so many updates, under the names that `load` takes. Any thread may call it between two."""
        found = {f"{_FOLLOWER}/{name}": own for name, (own, _) in self._weights.items()}
        for step, entry in self._held_before(updates).items():
            stored = {name: getattr(entry.targets, name) for name in _STORED}
            stored |= {"queries": entry.queries, "passages": entry.passages}
            found |= {f"{step}/{name}": tensor for name, tensor in stored.items()}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` gave, on any number of ranks."""
        by_step: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            step, _, name = key.partition("/")
            by_step.setdefault(step, {})[name] = tensor
        for name, weight in by_step.pop(_FOLLOWER, {}).items():
            self._weights[name][0].copy_(weight)
        for step in sorted(by_step, key=int):
            held = by_step[step]
            positives, passage_ids, known_ptr, known_ids = (held[name] for name in _STORED)
            targets = Targets(positives, passage_ids, known_ptr, known_ids, global_queries=len(positives))
            queries, passages = (held[side].to(self._device) for side in ("queries", "passages"))
            self._entries[int(step)] = Part(queries, passages, targets)

    def _held_before(self, step: int) -> dict[int, Part]:
        """The entries that the bank has at the start of `step`, oldest first."""
        oldest = step - self._config.bank_steps
        return {held: entry for held, entry in self._entries.items() if oldest <= held < step}

    def _encoded(self, batch: Batch, follower: DualEncoder) -> Part:
        """This rank's passages, encoded by the follower; no queries."""
        passages = next(follower.parameters()).new_empty(batch.sizes[1], follower.dimension)
        for chunk in batch.chunks:
            if chunk.side == "passage":
                passages[chunk.rows] = follower("passage", chunk.tokens)[: len(chunk.rows)]
        nothing = batch.targets.positives.new_empty(0)
        targets = Targets(nothing, batch.targets.passage_ids, nothing.new_zeros(1), nothing, global_queries=0)
        return Part(passages[:0], passages, targets)

    def _in_order(self, part: Part) -> Part:
        """The parts of all ranks: passages by their ids, queries by their targets, without ignored ones."""
        targets, device = part.targets, self._world.device
        rows = (targets.positives >= 0).nonzero()[:, 0]
        known = Exclusions(targets.passage_ids, targets.known_ptr, targets.known_ids).of_rows(rows)
        passages = self._world.gather_rows(self._rounded(part.passages).to(device))
        queries = self._world.gather_rows(self._rounded(part.queries).to(device)[rows.to(device)])

        def gathered(x: Tensor) -> Tensor:
            return self._world.gather_rows(x.to(device)).rows.cpu()

        ids, positives = gathered(targets.passage_ids), gathered(targets.positives[rows] + passages.own.start)
        counts, known_ids = gathered(known.known_ptr.diff()), gathered(known.known_ids)
        by_id = ids.argsort()
        column_of = torch.empty_like(by_id)
        column_of[by_id] = torch.arange(len(by_id))
        by_target = column_of[positives].argsort(stable=True)
        ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        known = Exclusions(ids, ptr, known_ids).of_rows(by_target)
        of_bank = Targets(
            column_of[positives][by_target],
            ids[by_id],
            known.known_ptr,
            known.known_ids,
            global_queries=len(by_target),
        )
        return Part(
            queries.rows[by_target.to(device)].to(self._device),
            passages.rows[by_id.to(device)].to(self._device),
            of_bank,
        )

    def _rounded(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16) if self._config.precision == "bf16" else x

    def _share(self, entry: Part) -> Part:
        """This rank's rows of an entry: a range of its passages, and the queries with targets among them."""
        targets, rank, size = entry.targets, self._world.rank, self._world.size
        n = len(entry.passages)
        first, last = n * rank // size, n * (rank + 1) // size
        a, b = torch.searchsorted(targets.positives, torch.tensor([first, last])).tolist()
        ptr = targets.known_ptr[a : b + 1]
        return Part(
            entry.queries[a:b],
            entry.passages[first:last],
            Targets(
                targets.positives[a:b] - first,
                targets.passage_ids[first:last],
                ptr - ptr[0],
                targets.known_ids[ptr[0] : ptr[-1]],
                global_queries=targets.global_queries,
            ),
        )


def _joined(parts: Sequence[Part]) -> Part:
    """All rows of the parts, one part after the other, in the dtype of the first."""
    targets, like = [part.targets for part in parts], parts[0].passages
    starts = accumulate((len(part.passages) for part in parts[:-1]), initial=0)
    both = zip(targets, starts, strict=True)
    positives = [torch.where(of.positives >= 0, of.positives + start, -1) for of, start in both]
    counts = torch.cat([of.known_ptr.diff() for of in targets])
    return Part(
        torch.cat([part.queries.to(like.dtype) for part in parts]),
        torch.cat([part.passages.to(like.dtype) for part in parts]),
        Targets(
            torch.cat(positives),
            torch.cat([of.passage_ids for of in targets]),
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            torch.cat([of.known_ids for of in targets]),
            global_queries=sum(of.global_queries for of in targets),
        ),
    )
