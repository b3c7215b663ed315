"""The kernels of packed attention on a CPU, in fp32, through Triton's interpreter (which has to be chosen before Triton
is imported).
"""

from __future__ import annotations

from tests.kernels.interpreting import interpret, needs_interpreter

PROGRAM = """
import torch
from kernels.attention import long, short
from kernels.attention.reference import Mask, Texts
from tests.kernels.attention_oracle import attend, errors, heads_of, texts, turned_errors

launched = []
for module, name in ((short, "_backward_tiles"), (long, "_dkey_blocks")):
    kernel = getattr(module, name)
    kernel.run = lambda *a, name=name, run=kernel.run, **k: (launched.append(name), run(*a, **k))[1]
long._FLOAT[64] = long.Settings(*[long.Blocks(16, 32, 4, 1)] * 3)
seed = torch.tensor([-(2**40) - 7])

def matches(expected, lengths, groups, d=16, dropout=0.2, fused=False, block=32, **options):
    short._FLOAT_TILE = short.Tile(block, 4, 4)
    launched.clear()
    starts, longest = texts(lengths)
    inputs = heads_of(int(starts[-1]), 2, groups, d, torch.float32, fused=fused)
    found = errors(inputs, starts, longest, scale=0.4, dropout=dropout, seed=seed, **options)
    assert launched and set(launched) == {expected}, launched
    assert max(found.values()) < 2e-6, found

matches("_backward_tiles", [3, 0, 5, 7, 1, 9, 4, 0], 2)
matches("_backward_tiles", [15, 0, 16, 13], 1, d=24, fused=True, window=3)
matches("_backward_tiles", [20, 31, 9, 2], 2, dropout=0.0, causal=True, block=64)
matches("_dkey_blocks", [40, 0, 20], 1, fused=True)
matches("_dkey_blocks", [52, 3], 2, causal=True, window=3)

short._FLOAT_TILE = short.Tile(32, 4, 4)
windowed = Mask(0.4, causal=True, window=7)
for lengths, groups, d, mask in (([3, 0, 5, 7, 1], 2, 32, Mask(0.4, 0.2, seed)), ([12, 16], 1, 32, windowed), ([9, 8], 1, 24, windowed)):
    heads = torch.randn(sum(lengths), 2 + 2 * groups, d, generator=torch.Generator().manual_seed(d))
    found, turns = turned_errors(heads, 2, groups, Texts(*texts(lengths)), mask)
    assert max(found.values()) < 2e-6 and turns == (d == 32), (found, turns)
"""


@needs_interpreter
def test_interpreted() -> None:
    interpret(PROGRAM)
