"""What models answer on inputs without labels, for a merge of them to be taught."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmark.api.contracts import Knowledge
from benchmark.core.data import Split
from benchmark.core.state import State
from benchmark.learn.batches import Batches


class Lessons:
    """``per_task`` unlabelled inputs of every task, answered by the model whose task it is.

    The release answers as its users run it. Each model is asked once, at the start.
    """

    def __init__(
        self, released: State, knowledge: Knowledge, per_task: int, size: int, rng: torch.Generator
    ) -> None:
        self._knowledge = knowledge
        self._answers: dict[str, Tensor] = {}
        self._streams: dict[str, Batches] = {}
        owners = (knowledge.shipped or released, *knowledge.partners)
        drawn = knowledge.unlabeled(per_task, rng)
        for (task, inputs), owner in zip(drawn.items(), owners, strict=True):
            with torch.no_grad():
                answers = knowledge.logits(owner, task, inputs).float().log_softmax(-1)
            # What stands for a label is the row of the answer.
            rows = torch.arange(len(answers), device=answers.device)
            self._answers[task] = answers
            self._streams[task] = Batches(Split(inputs, rows), size, rng)

    def loss(self, state: State) -> Tensor:
        """Σ over tasks of KL(owner's answer ‖ that of ``state``) on the next batch of each.

        Differentiable in ``state``, and charged as one optimisation step.
        """
        losses, examples = [], 0
        for task, stream in self._streams.items():
            batch = stream.draw()
            own = self._knowledge.logits(state, task, batch.inputs).float().log_softmax(-1)
            wanted = self._answers[task][batch.labels]
            losses.append(
                torch.nn.functional.kl_div(own, wanted, reduction="batchmean", log_target=True)
            )
            examples += len(batch)
        self._knowledge.charge(1, examples)
        return torch.stack(losses).sum()
