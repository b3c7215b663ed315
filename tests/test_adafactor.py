"""AdaFactor with momentum against its definition, in float64 element by element."""

from __future__ import annotations

import numpy as np
import torch

from retriever.adafactor import MomentumAdafactor


def test_updates_are_those_of_the_definition() -> None:
    draw = np.random.default_rng(0)
    start = {"matrix": draw.normal(size=(5, 7)), "vector": draw.normal(size=3)}
    gradients = [{name: draw.normal(size=value.shape) for name, value in start.items()} for _ in range(6)]
    lr, beta1, beta2, weight_decay = 0.1, 0.9, 0.6, 0.2

    parameters = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float32)) for name, value in start.items()}
    optimizer = MomentumAdafactor(parameters.values(), lr, (beta1, beta2), weight_decay)
    for step in gradients:
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(step[name], dtype=torch.float32)
        optimizer.step()

    rows, columns, squares = np.zeros(5), np.zeros(7), np.zeros(3)
    expected = {name: value.copy() for name, value in start.items()}
    momentum = {name: np.zeros_like(value) for name, value in start.items()}
    capped = 0
    for t, step in enumerate(gradients, 1):
        decay = min(beta2, 1 - t**-0.8)
        capped += decay == beta2
        g = step["matrix"]
        rows = decay * rows + (1 - decay) * (g**2).mean(1)
        columns = decay * columns + (1 - decay) * (g**2).mean(0)
        squares = decay * squares + (1 - decay) * step["vector"] ** 2
        updates = {
            "matrix": g / np.sqrt(np.outer(rows, columns) / rows.mean()),
            "vector": step["vector"] / np.sqrt(squares),
        }
        for name, update in updates.items():
            momentum[name] = beta1 * momentum[name] + (1 - beta1) * update
            expected[name] = (1 - lr * weight_decay) * expected[name] - lr * momentum[name]
    assert 0 < capped < len(gradients), "both decays are to be seen"
    for name, parameter in parameters.items():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=5e-3, atol=2e-3)  # bf16 momentum
        assert np.abs(expected[name] - start[name]).max() > 0.1
    state = optimizer.state[parameters["matrix"]]
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "step": (),
        "momentum": (5, 7),
        "rows": (5, 1),
        "columns": (1, 7),
    }
    assert state["momentum"].dtype == torch.bfloat16
