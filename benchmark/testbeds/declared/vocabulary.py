"""From hidden states to logits over a vocabulary, as a release's own head makes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmark.core.data import IGNORED
from benchmark.core.errors import UsageError

# Of the largest logit: rounding is well below, what another head computes well above.
_SAME, _NOTHING = 1e-3, 1e-5
# Where tanh(x) is further out, float32 does not say what x was.
_STEEP = 0.9


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """logits = x = ``scale`` · h @ ``head``ᵀ + ``bias``; with a cap ``cap`` · tanh(x / ``cap``).

    ``head`` is the base's, (vocabulary, d) float32, tied to its embeddings or not. It is frozen,
    like a CLIP's: a release's own is not used, so that a merge has one function and not one per
    member. ``bias``: (vocabulary,), or None.
    """

    head: Tensor
    scale: float = 1.0
    cap: float = 0.0
    bias: Tensor | None = None

    @classmethod
    def measured(cls, hidden: Tensor, logits: Tensor, head: Tensor, cap: float) -> Vocabulary:
        """The head under which a model's ``hidden`` (n, d) give its ``logits`` (n, vocabulary).

        Families multiply by a number of their own between the two (T5, Cohere, Granite) or add a
        bias (Phi): it is measured, so no list of them is kept here. ``cap`` is what the
        configuration says; none of those that have one has a bias.

        Raises:
            UsageError: logits are made in another way.
        """
        plain, given = hidden.double() @ head.double().T, logits.double()
        if cap:
            clear = given.abs() < _STEEP * cap
            x, y = plain[clear], cap * torch.atanh(given[clear] / cap)
        else:
            # A bias is the same at every token, and falls out of differences.
            x, y = (plain - plain.mean(0)).flatten(), (given - given.mean(0)).flatten()
        measured = float((x * y).sum() / x.square().sum().clamp(min=1e-30))
        scale = float(f"{measured:.6g}")  # 0.9999999 is 1
        bias = None if cap else (given - scale * plain).mean(0).float()
        if bias is not None and bias.abs().max() <= _NOTHING * given.abs().max():
            bias = None
        found = cls(head, scale, cap, bias)
        wrong = (found.logits(hidden) - logits).abs().max()
        if not wrong <= _SAME * logits.abs().max():
            raise UsageError(
                "this base's logits are not its last hidden states times its output embeddings "
                "(its head has layers of its own); declare text and label, not score"
            )
        return found

    def to(self, device: torch.device) -> Vocabulary:
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, head=self.head.to(device), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) → (..., vocabulary)."""
        return shaped(self.scale * hidden @ self.head.T, self.cap, self.bias)

    def likelihoods(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """log p of each text, (n,): ``tokens`` (n, T), ``IGNORED`` behind a text; (n, T, d)."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.logits(hidden.float())
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), tokens.flatten(), reduction="none", ignore_index=IGNORED
            )
        return -losses.reshape(tokens.shape).sum(1)


def shaped(logits: Tensor, cap: float, bias: Tensor | None) -> Tensor:
    """Products of hidden states and a head (..., classes) → logits."""
    if bias is not None:
        logits = logits + bias.to(logits.device)
    return cap * torch.tanh(logits / cap) if cap else logits
