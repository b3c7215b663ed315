"""What a loss that sees its passages block by block asks of the kernels: on the reference, and on Triton's interpreter
in fp32.
"""

from __future__ import annotations

import re

import pytest
import torch

from kernels.infonce.api import block_of
from kernels.infonce.exclusions import MaskTables
from kernels.infonce.rules import Pairs
from tests.kernels.interpreting import interpret, needs_interpreter

PROGRAM = """
import numpy, torch
from kernels.infonce.exclusions import MaskTables
from kernels.dispatch import on_kernels
from kernels.infonce.api import Exclusions, block_of
from kernels.infonce.two_pass import Passages, Source, Step, first_pass, second_pass
from tests.kernels.oracle import dense_infonce, excluded_matrix, relative_error

numpy.seterr(over="ignore")
torch.manual_seed(0)
B, N, D, scale, dtype = 37, 60, 24, 20.0, torch.{dtype}
q, p = (torch.nn.functional.normalize(torch.randn(n, D, dtype=dtype), dim=1) for n in (B, N))
assert on_kernels(q) == {interpreted}
counts = torch.randint(0, 4, (B,))
ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
exclusions = Exclusions(torch.arange(N) // 2, ptr, torch.randint(0, N // 2, (int(ptr[-1]),)), 0.15 + 0.1 * torch.randn(B, dtype=dtype))
targets, weights = torch.randint(0, 20, (B,)), torch.rand(B, dtype=dtype) / B  # all targets are in the first block
want = dense_infonce(q, p, targets, scale, weights, excluded_matrix(q, p, exclusions), False)

# Blocks of 32 and 28 columns, whose tables are made once.
blocks = []
for columns in (slice(0, 32), slice(32, N)):
    ids = Exclusions(exclusions.passage_ids[columns], ptr, exclusions.known_ids, exclusions.threshold)
    own = targets if columns.start == 0 else torch.full_like(targets, -1)
    masks = MaskTables.of(ids, own, len(p[columns]))
    blocks.append(block_of(q, p[columns], scale, masks))

# The passages of the second block are remembered ones, whose gradient nobody wants where `frozen`.
class WithBank(Passages):

    def forward(self):
        own, _ = yield Step(blocks[0])
        bank, _ = yield Step(blocks[1])
        return torch.logaddexp(own, bank), None, self.own.target_logits(self.targets)

    def backward(self, terms):
        dqueries, self.bank = yield Step(blocks[1], takes_gradient=not frozen)
        again, dpassages = yield Step(blocks[0], dqueries=dqueries)
        assert again is dqueries, "blocks add up in place"
        self.own.add_target_gradient(dqueries, dpassages, self.targets, terms.target_gradient)
        return dqueries, dpassages

got = []
for frozen in (False, True):
    passages = WithBank(blocks[0], targets)
    loss, terms = first_pass([Source(passages)], targets, weights)
    dqueries, dpassages = second_pass(passages, terms[0])
    assert (passages.bank is None) == frozen
    got.append((loss, dqueries, torch.cat([dpassages, want[2][32:] if frozen else passages.bank])))
for x, y in zip(got[0] + got[1], want[:3] + want[:3]):
    assert y.norm() > 1e-3 and relative_error(x, y) < {bound}, relative_error(x, y)
"""


@pytest.mark.parametrize(
    ("dtype", "bound", "interpreted"),
    [("float64", 1e-9, False), pytest.param("float32", 2e-5, True, marks=needs_interpreter)],
)
def test_blocks_add_up_to_the_definition(dtype: str, bound: float, interpreted: bool) -> None:
    settings = {"{dtype}": dtype, "{bound}": str(bound), "{interpreted}": str(interpreted)}
    program = re.sub("|".join(settings), lambda found: settings[found[0]], PROGRAM)
    interpret(program, interpreted)


def test_tables_of_other_shapes_are_refused() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    masks = MaskTables(Pairs(nothing, nothing), torch.full((3,), -1, dtype=torch.int32), None, 4)
    with pytest.raises(ValueError, match="tables of 3 rows and 5 columns, received 3 rows and 4 columns"):
        block_of(torch.ones(3, 2), torch.ones(5, 2), 1.0, masks)
