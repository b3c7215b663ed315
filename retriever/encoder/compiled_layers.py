"""Layers under torch.compile, with one graph for both passes of the gradient cache.

A layer that is compiled for a pass without gradients fuses other operations than one that is compiled for training, and
so rounds differently. Here both passes run the training graph; without gradients each layer's graph is freed at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# Graphs of one layer's code: by kind of layer, by whether texts fit a tile of attention, by mode. Dynamo's own limit of
# 8 is too low, and beyond it the layers would run uncompiled.
_MOST_GRAPHS = 64


def compile_layer(layer: nn.Module) -> None:
    """Compiles `layer`, which takes hidden states first, for chunks of any size.

    In train mode a call without gradients gives the bits of a call with them: random numbers are torch's own, and the
    training graph runs in both. More than 64 graphs raise an error.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = _MOST_GRAPHS, True
    layer.compile(dynamic=True, options={"fallback_random": True})
    compiled = layer._compiled_call_impl
    assert compiled is not None
    layer._compiled_call_impl = _training_graph(layer, compiled)


def _training_graph(layer: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, the compiled `layer`, such that in train mode it always sees gradients enabled and wanted."""

    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return call(hidden, *args, **kwargs)
        with_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # A graph is compiled for inputs that want a gradient or for others; frozen embeddings want none.
            out = call(hidden if hidden.requires_grad else hidden.detach().requires_grad_(), *args, **kwargs)
        return out if with_graph else tree_map_only(Tensor, Tensor.detach, out)

    return run
