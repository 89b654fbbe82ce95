"""From hidden states to logits over a vocabulary, as a release's own head makes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmark.core.data import IGNORED
from benchmark.core.errors import UsageError

# Of the largest logit: rounding is well below, a bias or a norm of the head well above.
_SAME = 1e-3
# Where tanh(x) is further out, float32 does not say what x was.
_STEEP = 0.9


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """logits = ``cap`` · tanh(``scale`` · h @ ``head``ᵀ / ``cap``), without the tanh if cap is 0.

    ``head`` is the base's, (vocabulary, d) float32, tied to its embeddings or not. It is frozen,
    like a CLIP's: a release's own is not used, so that a merge has one function and not one per
    member.
    """

    head: Tensor
    scale: float = 1.0
    cap: float = 0.0

    @classmethod
    def measured(cls, hidden: Tensor, logits: Tensor, head: Tensor, cap: float) -> Vocabulary:
        """The head under which a model's ``hidden`` (n, d) give its ``logits`` (n, vocabulary).

        Families multiply by a number of their own between the two (T5, Cohere, Granite): it is
        measured, so no list of them is kept here. ``cap`` is what the configuration says.

        Raises:
            UsageError: logits are made in another way (a head with a bias).
        """
        plain, given = (hidden.double() @ head.double().T).flatten(), logits.double().flatten()
        flat = given if not cap else cap * torch.atanh((given / cap).clamp(-_STEEP, _STEEP))
        clear = given.abs() < _STEEP * cap if cap else torch.ones_like(given, dtype=torch.bool)
        scale = float((flat * plain)[clear].sum() / plain[clear].square().sum().clamp(min=1e-30))
        # A measured 0.9999999 is 1.
        found = cls(head, float(f"{scale:.6g}"), cap)
        wrong = (found.logits(hidden) - logits).abs().max()
        if not wrong <= _SAME * logits.abs().max():
            raise UsageError(
                "this base's logits are not its last hidden states times its output embeddings "
                "(its head has a bias or layers of its own); declare text and label, not score"
            )
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) → (..., vocabulary)."""
        found = self.scale * hidden @ self.head.T
        return self.cap * torch.tanh(found / self.cap) if self.cap else found

    def likelihoods(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """log p of each text, (n,): ``tokens`` (n, T), ``IGNORED`` behind a text; (n, T, d)."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.logits(hidden.float())
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), tokens.flatten(), reduction="none", ignore_index=IGNORED
            )
        return -losses.reshape(tokens.shape).sum(1)
