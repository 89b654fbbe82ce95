"""PaRaMS on a real MiniLM layer against arithmetic of our own, in numpy float64.

Nothing of the benchmark computes the expected values: weights are read from the file by name, the
permutation and the factors are fixed here, the formulas are METHODS 1 and 2.1 written out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import erf, softmax
from test_defenses import victim

from benchmark.core.state import State
from benchmark.io.assets import fetch
from benchmark.testbeds.minilm import WEIGHTS, MiniLM
from defenses.params import PaRaMS

Array = NDArray[np.float64]
HEADS, SIZE, WIDTH = 12, 32, 384
LAYER = "encoder.layer.3."


@pytest.fixture
def weights(home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Array]:
    """The file's tensors in float64."""
    from safetensors.numpy import load_file

    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    stored = load_file(fetch(WEIGHTS) / WEIGHTS.files[1])
    return {key: value.astype(np.float64) for key, value in stored.items()}


def attention(w: dict[str, Array], x: Array) -> Array:
    """Multi-head attention of one layer, tokens x (n, 384), without residual."""
    q, k, v = (
        (x @ w[f"attention.self.{n}.weight"].T + w[f"attention.self.{n}.bias"]).reshape(
            len(x), HEADS, SIZE
        )
        for n in ("query", "key", "value")
    )
    weights = softmax(np.einsum("ihd,jhd->hij", q, k) / np.sqrt(SIZE), axis=-1)
    heads = np.einsum("hij,jhd->ihd", weights, v).reshape(len(x), WIDTH)
    return heads @ w["attention.output.dense.weight"].T + w["attention.output.dense.bias"]


def mlp(w: dict[str, Array], x: Array) -> Array:
    hidden = x @ w["intermediate.dense.weight"].T + w["intermediate.dense.bias"]
    activated = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
    return activated @ w["output.dense.weight"].T + w["output.dense.bias"]


def expected(w: dict[str, Array], order: Array, alpha: Array, gamma: Array) -> dict[str, Array]:
    out = dict(w)
    a, c = alpha.reshape(-1), gamma.reshape(-1)
    for kind in ("weight", "bias"):
        shape = (-1, 1) if kind == "weight" else (-1,)
        for name, factor in (("query", a), ("key", 1 / a), ("value", c)):
            key = f"attention.self.{name}.{kind}"
            out[key] = w[key] * factor.reshape(shape)
        out[f"intermediate.dense.{kind}"] = w[f"intermediate.dense.{kind}"][order]
    out["attention.output.dense.weight"] = w["attention.output.dense.weight"] / c
    out["output.dense.weight"] = w["output.dense.weight"][:, order]
    return out


def test_params_on_a_minilm_layer(
    weights: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    names = [key for key in weights if key.startswith(LAYER)]
    layer = {key.removeprefix(LAYER): weights[key] for key in names}
    order = rng.permutation(4 * WIDTH)
    alpha, gamma = rng.uniform(0.05, 20, (2, HEADS, SIZE))

    drawn = iter([(torch.from_numpy(alpha)), torch.from_numpy(gamma)])
    monkeypatch.setattr(PaRaMS, "_factors", lambda *_: next(drawn))
    monkeypatch.setattr(PaRaMS, "_permutation", lambda *_: torch.from_numpy(order))
    whole = MiniLM().anatomy()
    prefix = {block.q.weight.key: i for i, block in enumerate(whole.attention)}
    i = prefix[f"{LAYER}attention.self.query.weight"]
    one = replace(whole, attention=(whole.attention[i],), mlp=(whole.mlp[i],))
    expert: State = {key: torch.from_numpy(weights[key]) for key in names}
    released = PaRaMS().protect(victim(expert, expert, one), torch.Generator())

    truth = expected(layer, order, alpha, gamma)
    assert {key.removeprefix(LAYER) for key in released} == truth.keys()
    for key, value in truth.items():
        np.testing.assert_allclose(released[LAYER + key].numpy(), value, rtol=1e-12, atol=0)
    moved = {key for key, value in truth.items() if not np.array_equal(value, layer[key])}
    assert len(moved) == 10

    # The formula itself keeps the layer's function: our own forward pass says so too.
    x = rng.normal(size=(9, WIDTH))
    after = {key: released[LAYER + key].numpy() for key in truth}
    np.testing.assert_allclose(attention(after, x), attention(layer, x), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(mlp(after, x), mlp(layer, x), rtol=1e-9, atol=1e-9)


def test_the_furthest_permutation_of_a_minilm_layer(weights: dict[str, Array]) -> None:
    """π = argmin Σ C[i, π(i)], C and its optimum computed here."""
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(6)
    names = ("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight")
    base = {n: weights[LAYER + n] for n in names}
    expert = {n: v + 0.01 * v.std() * rng.normal(size=v.shape) for n, v in base.items()}
    up, bias, down = names
    cost = base[up] @ expert[up].T + np.outer(base[bias], expert[bias])
    cost += base[down].T @ expert[down]
    order = linear_sum_assignment(cost)[1]

    whole = MiniLM().anatomy()
    block = next(b for b in whole.mlp if b.up.weight.key == LAYER + up)
    one = replace(whole, attention=(), mlp=(block,))
    states = ({LAYER + n: torch.from_numpy(v) for n, v in s.items()} for s in (base, expert))
    released = PaRaMS().protect(victim(*states, one), torch.Generator())
    assert np.array_equal(released[LAYER + up].numpy(), expert[up][order])
    assert np.array_equal(released[LAYER + bias].numpy(), expert[bias][order])
    assert np.array_equal(released[LAYER + down].numpy(), expert[down][:, order])
