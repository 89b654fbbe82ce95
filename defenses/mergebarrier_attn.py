"""MergeBarrier, attention part: a reflection of the dominant directions (arXiv 2511.10712).

Post-hoc, without data, without randomness. Per head (one P per KV group)::

    P = I − 2·U_k·U_kᵀ       Wq → P·Wq, Wk → P·Wk        (biases likewise)

U_k holds the k eigenvectors of Σ WqWqᵀ + WkWkᵀ with the greatest eigenvalues, the sum over the
query heads of the group; P is orthogonal and its own inverse. k is not published: half of the head
by default. On rotary models P does not commute with the rotation: its commuting part
(:func:`benchmark.anatomy.within`) is made orthogonal again, which leaves a sign per pair of
dimensions, and under QK-norm a sign per pair or dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmark.anatomy import AttentionBlock, apply_qk, within
from benchmark.api.contracts import Card, Defense, Victim
from benchmark.core.errors import MethodError
from benchmark.core.state import State


@dataclass(frozen=True)
class MergeBarrierAttention(Defense):
    """Reflect Q and K of every head.

    Attributes:
        k: how many directions are reflected; None: half of the head's dimensions. All of them
            would be −I.
    """

    k: int | None = None

    card: ClassVar[Card] = Card(
        summary="Reflects the dominant directions of Q and K in every head",
        paper="Do Not Merge My Model! Safeguarding Open-Source LLMs Against Unauthorized Model "
        "Merging",
        authors="Qinfeng Li, Miao Pan, Jintao Chen, Fu Teng, Zhiqiang Shen, Ge Su, Hao Peng, "
        "Xuhong Zhang",
        arxiv="2511.10712",
        fidelity="reconstruction",
        exact=True,
        locks=True,
        architectures="any; on rotary models and with QK-norm only a sign per pair is left",
        notes="the attention part alone; k is not published, half of the head is ours",
    )

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(f"need k >= 1, got {self.k}")

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        """The released State.

        Raises:
            MethodError: k is more than a head has dimensions; the model has no attention.
        """
        state = dict(victim.expert)
        for block in victim.anatomy.attended("mergebarrier-attn"):
            reflection = self._reflection(victim.expert, block)
            apply_qk(state, block, _orthogonal(within(block, reflection)))
        return state

    def _reflection(self, state: State, block: AttentionBlock) -> Tensor:
        """P per KV group: (kv_heads, dh, dh) float64."""
        size = block.head_dim
        k = max(1, size // 2) if self.k is None else self.k
        if k > size:
            raise MethodError(f"k={k}, but a head has {size} dimensions: choose 1..{size}")
        q = block.read(state, "q")[..., :-1].unflatten(1, (block.group, size))
        key = block.read(state, "k")[..., :-1]
        gram = (q @ q.mT).sum(1) + key @ key.mT
        u = torch.linalg.eigh(gram).eigenvectors[..., -k:]
        return torch.eye(size, dtype=u.dtype, device=u.device) - 2 * u @ u.mT


def _orthogonal(a: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each symmetric A: V·sign(Λ)·Vᵀ, with sign(0) = +1.

    Like every function of A it commutes with what A commutes with.
    """
    values, v = torch.linalg.eigh(a)
    sign = torch.where(values < 0, -1.0, 1.0).to(a.dtype)
    return v * sign[:, None, :] @ v.mT
