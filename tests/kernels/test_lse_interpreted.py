"""The kernels' own mathematics on a CPU, in fp32, through Triton's interpreter (which has to be chosen before Triton is
imported).
"""

from __future__ import annotations

import torch

from kernels.infonce.exclusions import MaskTables
from kernels.infonce.passes import TiledBlock
from kernels.infonce.tiles import LOG2E
from tests.kernels.interpreting import interpret, needs_interpreter

CASES = [
    "matches(B=40, N=70, D=48, scale=50.0)",
    "matches(B=65, N=90, D=33, scale=20.0, symmetric=True, most=3)",
    "matches(B=65, N=90, D=64, scale=20.0, symmetric=True, most=12, threshold=True)",
    "matches(B=40, N=70, D=48, scale=200.0, norm=3.0, most=12)",
    "matches(B=40, N=70, D=48, scale=200.0, norm=2.0, symmetric=True, most=12)",
    "matches(B=1, N=1, D=32, scale=20.0, symmetric=True)",
    "matches(B=300, N=520, D=32, scale=50.0, most=2, workspace_mib=1)",
    "matches(B=40, N=70, D=48, scale=50.0, most=3, told=True)",
    "matches(B=65, N=90, D=48, scale=50.0, symmetric=True, most=3, ignored=False, told=True)",
    "matches(B=40, N=70, D=48, scale=200.0, ignored=False, told=True)",
    "matches(B=65, N=90, D=48, scale=50.0, symmetric=True, threshold=True, guide=40, hardness=(9.0, 0.0))",
    "matches(B=40, N=70, D=48, scale=50.0, most=3, hardness=(0.0, 9.0))",
    "matches(B=40, N=70, D=48, scale=200.0, norm=3.0, most=12, guide=16, hardness=(90.0, 5.0))",
    "matches_ring(B=40, N=70, D=48, scale=20.0)",
    "matches_ring(B=40, N=70, D=48, scale=20.0, largest=1.0)",
]

PROGRAM = """
import numpy, torch
from kernels.infonce import tiles
from kernels.infonce.api import Exclusions, Guide, Hardness, Lists, block_of, infonce
from kernels.infonce.rules import guide_vectors
from tests.kernels.oracle import dense_infonce, excluded_matrix, hardness_matrix, relative_error

launched = []
launch = tiles._tile_pass.run
tiles._tile_pass.run = lambda *a, **k: (launched.append(1), launch(*a, **k))[1]
numpy.seterr(over="ignore")
torch.manual_seed(0)

def problem(B, N, D, norm, most, threshold, guide=0, hardness=(0.0, 0.0)):
    q, p = (norm * torch.nn.functional.normalize(torch.randn(n, D), dim=1) for n in (B, N))
    counts = torch.randint(0, most + 1, (B,))
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    limit = 0.1 * norm**2 * (1 + torch.randn(B)) if threshold else None
    known = torch.randint(0, N, (int(ptr[-1]),))
    guided = Guide(*(guide_vectors(torch.randn(n, guide)) for n in (B, N)), 0.2 * torch.randn(B)) if guide else None
    own = torch.stack([torch.randperm(N)[:3] for _ in range(B)])  # some are in no column
    own = Lists(own.shape[1] * torch.arange(B + 1), own.flatten())
    return q, p, Exclusions(torch.randperm(N) // 2, ptr, known, limit, guided, Hardness(*hardness), own)

def matches(
    B, N, D, scale, symmetric=False, most=0, threshold=False, norm=1.0, workspace_mib=None, ignored=True, told=False,
    guide=0, hardness=(0.0, 0.0),
):
    q, p, exclusions = problem(B, N, D, norm, most, threshold, guide, hardness)
    targets, weights = torch.randint(-1 if B > 1 and ignored else 0, N, (B,)), torch.rand(B) / B
    targets[0] = -1 if ignored and told else targets[0]
    excluded = excluded_matrix(q, p, exclusions)
    want = dense_infonce(q, p, targets, scale, weights, excluded, symmetric, hardness_matrix(exclusions))
    options = dict(exclusions=exclusions, weights=weights, symmetric=symmetric, precision="fp32", workspace_mib=workspace_mib)
    if told:
        options |= dict(ignored=ignored, largest=norm**2)
    got = infonce(q, p, targets, scale, **options)
    assert launched, "the kernels did not run"
    assert relative_error(infonce(q, p, targets, scale, gradients=False, **options).loss, want[0]) < 1e-6 or B == 1
    for x, y in zip((got.loss, got.dqueries, got.dpassages, got.dscale), want):
        assert (B == 1 and not x.any() and not y.any()) or (y.norm() > 0 and relative_error(x, y) < 2e-5), relative_error(x, y)

def matches_ring(B, N, D, scale, largest=None):
    q, p, exclusions = problem(B, N, D, 1.0, 3, True)
    x = (scale * q.double() @ p.double().T).masked_fill(excluded_matrix(q, p, exclusions), -torch.inf)
    rows, columns = block_of(q, p, scale, exclusions, largest=largest).lse(columns=True)
    torch.testing.assert_close(rows.double(), x.logsumexp(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(columns.double(), x.logsumexp(0), atol=1e-5, rtol=1e-5)
    weights = torch.where(rows > -torch.inf, -rows, -torch.inf)
    for other in (None, torch.where(columns > -torch.inf, -columns, -torch.inf)):
        g = (x + weights[:, None]).exp() + (0 if other is None else (x + other).exp())
        dq, dp = block_of(q, p, scale, exclusions, largest=largest).gradient(weights, other)
        assert relative_error(dq, scale * g @ p.double()) < 2e-5 and relative_error(dp, scale * g.T @ q.double()) < 2e-5
"""


@needs_interpreter
def test_interpreted() -> None:
    fresh = "\ntorch.manual_seed(0)\nlaunched.clear()\n"
    interpret(fresh.join([PROGRAM, *CASES]))


def test_unit_vectors_stay_below_what_they_are_taken_for() -> None:
    """Rounded to bf16 this one is longer by 0.4 %, as much as any can be."""
    x = torch.full((1, 254), 254**-0.5)
    product = float(x.bfloat16().double().square().sum())
    block = TiledBlock(x, x, 50.0, MaskTables.of(None, torch.zeros(1, dtype=torch.int64), 1), "bf16", largest=1.0)
    assert product > 1.0077 and block.shifts.bound.get()[0] >= 50.0 * product * LOG2E
