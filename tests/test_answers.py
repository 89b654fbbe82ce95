"""Answers of one label or of several tokens: what is right, what it costs, and in what memory."""

from __future__ import annotations

import pytest
import torch
from plane import Plane
from torch import Tensor

from benchmark.api import methods
from benchmark.core.data import IGNORED, Split, Task
from benchmark.core.errors import MethodError
from benchmark.core.state import State
from benchmark.evaluation import accuracy
from benchmark.evaluation.accuracy import Evaluator, relative_gap

VOCABULARY, TOKENS = 11, 3


def logits_of(answers: Tensor) -> Tensor:
    """Logits whose argmax is ``answers``, and 0 where that says nothing."""
    return torch.nn.functional.one_hot(answers.clamp(min=0), VOCABULARY).float()


def test_an_answer_is_right_when_every_token_is() -> None:
    said = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    wanted = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 2, IGNORED], [IGNORED, IGNORED, IGNORED]])
    assert Task.right(logits_of(said), wanted).tolist() == [True, False, True, True]
    assert Task.right(logits_of(said)[:, 0], torch.tensor([1, 1, 2, 1])).tolist() == [
        True, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_answer_of_a_broken_model_is_right(bad: float) -> None:
    logits = logits_of(torch.tensor([[1, 2], [1, 2]]))
    logits[0, 1, 2] = bad
    assert Task.right(logits, torch.tensor([[1, 2], [1, 2]])).tolist() == [False, True]
    logits[0, 1, 2] = 1.0
    logits[0, 1, 5] = bad  # behind the answer nothing counts
    assert Task.right(logits, torch.tensor([[1, IGNORED], [1, 2]])).tolist() == [True, True]


def test_the_loss_is_the_mean_over_the_tokens_of_all_answers() -> None:
    logits = torch.randn(2, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3], [4, IGNORED, IGNORED]])
    log_p = logits.log_softmax(-1)
    each = [-log_p[0, 0, 1], -log_p[0, 1, 2], -log_p[0, 2, 3], -log_p[1, 0, 4]]
    torch.testing.assert_close(Task.loss(logits, labels), torch.stack(each).mean())
    torch.testing.assert_close(Task.loss(logits, labels, "sum"), torch.stack(each).sum())
    plain = torch.nn.functional.cross_entropy(logits[:, 0], labels[:, 0])
    assert torch.equal(Task.loss(logits[:, 0], labels[:, 0]), plain)


def test_few_answers_are_drawn_as_of_one_class() -> None:
    split = Split({"x": torch.arange(20)}, torch.arange(60).reshape(20, 3) % VOCABULARY)
    few = split.few_shot(5, torch.Generator().manual_seed(0))
    assert len(few) == 5
    assert torch.equal(few.labels, split.labels[few.inputs["x"]])


class Echo(Plane):
    """Answers of several tokens: features (n, T, d) over a vocabulary."""

    def task(self, name: str) -> Task:
        rng = torch.Generator().manual_seed(3)
        labels = torch.randint(VOCABULARY, (100, TOKENS), generator=rng)
        labels[::3, 1:] = IGNORED
        split = Split({"said": labels.clamp(min=0)}, labels)
        return Task(name, ("vocabulary",), split, split, split, torch.eye(VOCABULARY), 10.0)

    def base(self) -> State:
        return {"weight": torch.eye(VOCABULARY)}

    def features(self, state: State, inputs: dict[str, Tensor]) -> Tensor:
        return logits_of(inputs["said"]) @ state["weight"].T


def test_outcomes_and_gaps_are_taken_batch_by_batch() -> None:
    """And say what all logits at once would."""
    evaluator = Evaluator(Echo(), torch.device("cpu"), batch_size=16)
    rows, base = range(100), evaluator.base
    assert evaluator.correct(base, "signs", "test", rows).all()
    turned = {"weight": base["weight"].roll(1, 0)}
    assert not evaluator.correct(turned, "signs", "test", rows).any()
    rng = torch.Generator().manual_seed(1)
    noisy = {"weight": base["weight"] + 0.4 * torch.randn(VOCABULARY, VOCABULARY, generator=rng)}
    gap, right = evaluator.gap(noisy, base, "signs", "test", rows)
    logits = [evaluator.logits(state, "signs", "test", rows) for state in (noisy, base)]
    assert logits[0].shape == (100, TOKENS, VOCABULARY)
    assert gap == pytest.approx(relative_gap(*logits), rel=1e-6)
    assert right.tolist() == evaluator.correct(noisy, "signs", "test", rows).tolist()
    assert 0 < right.mean() < 1
    broken = {"weight": base["weight"] * float("nan")}
    for states in ((broken, base), (base, broken)):
        with pytest.raises(MethodError, match="NaN or infinite"):
            evaluator.gap(*states, "signs", "test", rows)


def test_a_model_whose_identity_is_told_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For outcomes, its gap to another, and as what others are compared with; one that is nameless
    always, and of many the latest are known."""
    ran: list[float] = []

    class Counting(Echo):
        def features(self, state: State, inputs: dict[str, Tensor]) -> Tensor:
            ran.append(float(state["weight"][0, 0]))
            return super().features(state, inputs)

    evaluator, rows = Evaluator(Counting(), torch.device("cpu"), batch_size=50), range(100)
    one, two, three = ({"weight": n * torch.eye(VOCABULARY)} for n in (1.0, 2.0, 3.0))
    first = evaluator.correct(one, "signs", "test", rows, "one")
    gap, right = evaluator.gap(two, one, "signs", "test", rows, ("two", "one"))
    assert ran == [1, 1, 2, 2]
    assert (gap, right.tolist()) == (1, first.tolist())
    assert evaluator.gap(three, two, "signs", "test", rows, ("", "two"))[0] == 0.5
    assert ran == [1, 1, 2, 2, 3, 3]
    # Another part of the split, another split, no name: nothing is known.
    for more in (("test", range(20), "one"), ("validation", rows, "one"), ("test", rows, "")):
        before = len(ran)
        evaluator.correct(one, "signs", *more)
        assert len(ran) > before
    monkeypatch.setattr(accuracy, "_REMEMBERED", 1)
    evaluator.correct(three, "signs", "test", rows, "three")
    before = len(ran)
    evaluator.correct(one, "signs", "test", rows, "one")
    assert len(ran) == before + 2


def test_of_a_vocabulary_fisher_draws_labels_instead_of_summing_over_it() -> None:
    """As many backward passes as there are inputs, and each for a first word of an answer."""
    from benchmark.conformance.merges import MergeCase
    from benchmark.conformance.testbed import Tiny

    testbed = Tiny("llama", tokens=3)
    flops = {}
    for most in (1, 32):
        case = MergeCase(methods.merger(f"fisher(per_task=4, most={most})"))
        inputs = case.inputs(testbed)
        case.call(case.method, inputs, torch.Generator().manual_seed(0))
        flops[most] = inputs.knowledge.budget.flops
    # Two experts of 4 inputs: a forward pass each, and a backward pass (twice that) per label.
    assert flops == {1: 2 * 4 * (1 + 2), 32: 2 * 4 * (1 + 2 * 32)}


def test_neulig_takes_every_word_of_an_answer_for_an_example() -> None:
    from benchmark.conformance.merges import MergeCase
    from benchmark.conformance.testbed import Tiny
    from benchmark.merging import neulig

    seen = []

    def watched(weights: Tensor, answers: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
        seen.append({task: (answers[task].shape, labels[task]) for task in labels})
        return neulig_loss(weights, answers, labels)

    neulig_loss = neulig.ensemble_loss
    case = MergeCase(methods.merger("neulig(per_class=2, steps=1)"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neulig, "ensemble_loss", watched)
        case.run(case.inputs(Tiny("llama", tokens=3)))
    for shape, labels in seen[0].values():
        assert shape[:2] == (2, len(labels))
        assert 4 <= len(labels) <= 6  # two answers, of two or three words
        assert (labels != IGNORED).all()
