"""Language models of one's own are asked, and answer, as transformers alone would have it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import languages as made
import pytest
import torch
from languages import CROSSING, EOS, NAMES, PAD

from benchmark.core.data import IGNORED
from benchmark.evaluation.accuracy import Evaluator
from benchmark.testbeds.declared.extraction import extracted
from benchmark.testbeds.declared.language import LanguageBackbone

CPU = torch.device("cpu")
ANSWERS = 'prompt = "q"\nanswer = "a"\nmax_new = 5\n'


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs_as_texts(name: str, split: Any) -> list[str]:
    """The prompts of a split, as words."""
    texts = []
    for row, mask in zip(split.inputs["input_ids"], split.inputs["attention_mask"], strict=True):
        tokens = row[mask.bool()].tolist()
        texts.append(made.said(tokens[1 : -1 if name in CROSSING else None]))
    return texts


@pytest.mark.parametrize("name", NAMES)
def test_exact_is_what_greedy_decoding_gives(name: str, tmp_path: Path) -> None:
    """One pass over prompt and answer decides as generating does; its logits are the model's."""
    model, rows, truth = made.folder(tmp_path, name), [], {}
    for i, text in enumerate(made.questions(60)):
        found = made.generated(model, made.prompt(name, text), 5)
        # Its own answers, where they have an end and can be written down; every fourth is not.
        fine = found[-1] == EOS and min(found[:-1], default=PAD) > PAD and i % 4 < 3
        answer = made.said(found[:-1]) if fine else "yes no"
        truth[text] = found == [*made.ids(answer), EOS]
        rows.append({"q": text, "a": answer})
    made.jsonl(tmp_path / "data", sorted(rows, key=lambda row: truth[row["q"]]))
    testbed = made.declare(tmp_path, name, f'score = "exact"\n{ANSWERS}')
    task, evaluator = testbed.task("t"), Evaluator(testbed, CPU)
    texts = inputs_as_texts(name, task.test)
    right = evaluator.correct(evaluator.base, "t", "test", range(20))
    assert right.tolist() == [truth[text] for text in texts]
    assert 0 < right.sum() < 20
    logits = evaluator.logits(evaluator.base, "t", "test", range(20))
    for text, own, labels in zip(texts, logits, task.test.labels, strict=True):
        answer = labels[labels != IGNORED].tolist()
        expected = made.along(name, model, made.prompt(name, text), answer)
        torch.testing.assert_close(own[: len(answer)], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_generation_is_transformers_own_token_by_token(name: str, tmp_path: Path) -> None:
    """In a batch of prompts of different lengths as for each alone, and decides what is right."""
    model, rows, truth = made.folder(tmp_path, name), [], {}
    for i, text in enumerate(made.questions(60)):
        found = made.generated(model, made.prompt(name, text), 5)
        number = extracted(made.said([token for token in found if token > PAD]), "last-number")
        right = number is not None and i % 3 > 0
        truth[text] = (found, right)
        rows.append({"q": text, "a": f"is {number if right else 25 - int(number or 0)} ."})
    made.jsonl(tmp_path / "data", rows)
    testbed = made.declare(
        tmp_path, name, f'score = "generate"\nextract = "last-number"\n{ANSWERS}'
    )
    task, evaluator = testbed.task("t"), Evaluator(testbed, CPU)
    texts = inputs_as_texts(name, task.test)
    assert len({len(text.split()) for text in texts}) > 2
    room = torch.zeros(len(texts), 5, dtype=torch.int64)
    tokens = testbed.features(evaluator.base, {**task.test.inputs, "room": room})
    for text, row in zip(texts, tokens.tolist(), strict=True):
        found = truth[text][0]
        assert row == [*found, *[PAD] * (5 - len(found))]
    right = evaluator.correct(evaluator.base, "t", "test", range(20))
    assert right.tolist() == [truth[text][1] for text in texts]
    assert 0 < right.sum() < 20


OFFERED = [["yes", "no plus", "a b plus is"], ["no plus", "a"]]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "t5"])
def test_a_choice_is_as_likely_as_its_tokens(name: str, normalise: bool, tmp_path: Path) -> None:
    """Σ log p of each text by itself, over their number with ``normalise``."""
    model = made.folder(tmp_path, name)
    rows = [
        {"q": text, "c": OFFERED[i % 2], "a": OFFERED[i % 2][i // 2 % 2]}
        for i, text in enumerate(made.questions(60))
    ]
    made.jsonl(tmp_path / "data", rows)
    lines = 'score = "choice"\nprompt = "q"\nanswer = "a"\nchoices = "c"\n'
    testbed = made.declare(tmp_path, name, lines + f"normalise = {str(normalise).lower()}")
    task, evaluator = testbed.task("t"), Evaluator(testbed, CPU)
    logits = evaluator.logits(evaluator.base, "t", "test", range(20))
    assert logits.shape == (20, 3)
    right = evaluator.correct(evaluator.base, "t", "test", range(20))
    one = {key: value[:, 0] for key, value in task.test.inputs.items() if value.ndim == 3}
    offered = {row["q"]: (row["c"], row["a"]) for row in rows}
    for i, own in enumerate(logits):
        ids, wanted = one["input_ids"][i].tolist(), one["wanted"][i]
        # The first choice is read along with the prompt by a decoder alone.
        read = 0 if name in CROSSING else int((wanted != IGNORED).sum()) - 1
        length = int(one["attention_mask"][i].sum()) - read - (name in CROSSING)
        text = made.said(ids[1:length])
        choices, answer = offered[text]
        sums = []
        for choice in choices:
            tokens = made.ids(choice)
            log_p = made.along(name, model, made.prompt(name, text), tokens).log_softmax(-1)
            total = log_p[torch.arange(len(tokens)), torch.tensor(tokens)].sum()
            sums.append(total / len(tokens) if normalise else total)
        expected = torch.stack(sums)
        torch.testing.assert_close(own[: len(choices)], expected, rtol=1e-3, atol=1e-3)
        assert (own[len(choices) :] < expected.min() - 5).all()
        assert choices[task.test.labels[i]] == answer
        assert right[i] == (choices[int(expected.argmax())] == answer)
    assert 0 < right.sum() < 20


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "t5"])
def test_choices_of_one_token_are_rows_of_the_head(name: str, tmp_path: Path) -> None:
    model = made.folder(tmp_path, name)
    rows = [{"q": text, "a": ["up", "down"][i % 2]} for i, text in enumerate(made.questions(60))]
    made.jsonl(tmp_path / "data", rows)
    lines = 'score = "choice"\nprompt = "q"\nclasses = { down = "no", up = "yes" }\nanswer = "a"'
    testbed = made.declare(tmp_path, name, lines)
    task, evaluator = testbed.task("t"), Evaluator(testbed, CPU)
    assert task.classes == ("no", "yes")
    assert task.head.shape == (2, 32)
    assert task.test.inputs["input_ids"].ndim == 2
    logits = evaluator.logits(evaluator.base, "t", "test", range(20))
    labels = {row["q"]: ["down", "up"].index(row["a"]) for row in rows}
    for text, own, label in zip(
        inputs_as_texts(name, task.test), logits, task.test.labels.tolist(), strict=True
    ):
        expected = made.along(name, model, made.prompt(name, text), made.ids("no"))[0]
        torch.testing.assert_close(own, expected[made.ids("no yes")], rtol=1e-3, atol=1e-3)
        assert label == labels[text]


SCORES = {
    "exact": f'score = "exact"\n{ANSWERS}',
    "generate": f'score = "generate"\n{ANSWERS}',
    "choice": 'score = "choice"\nprompt = "q"\nchoices = "c"\nanswer = "r"',
    "classes": 'score = "choice"\nprompt = "q"\nclasses = ["yes", "no"]\nanswer = "r"',
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_inputs_are_the_same_whatever_the_answers(name: str, score: str, tmp_path: Path) -> None:
    """The unlabelled tier gets them: an answer that is in them leaks. It is in the labels."""
    from benchmark.api.knowledge import Access, Knowledge

    found = []
    for turn in range(2):
        root = tmp_path / str(turn)
        root.mkdir()
        made.folder(root, name)
        rows = [
            {"q": text, "a": ["yes plus", "no a"][(i + turn) % 2], "r": (i + turn) % 2,
             "c": ["yes plus", "no"]}
            for i, text in enumerate(made.questions(60))
        ]  # fmt: skip
        made.jsonl(root / "data", rows)
        found.append(made.declare(root, name, SCORES[score]))
    first, second = (testbed.task("t") for testbed in found)
    for part in first.splits:
        one, two = first.split(part), second.split(part)
        assert one.inputs.keys() == two.inputs.keys()
        assert all(torch.equal(one.inputs[key], two.inputs[key]) for key in one.inputs)
        assert not torch.equal(one.labels, two.labels)
    base = found[0].base()
    knowledge = Knowledge(
        Access.UNLABELED, base, (), found[0].anatomy(), tasks={"t": first},
        features=found[0].features,
    )  # fmt: skip
    drawn = knowledge.unlabeled(8, torch.Generator().manual_seed(0))["t"]
    assert drawn.keys() == first.train.inputs.keys()
    logits = knowledge.logits(base, "t", drawn)
    assert logits.shape == (8, len(first.head))
    assert set(first.train.given) >= set(drawn)


def test_gaps_of_generating_tasks_are_of_teacher_forced_logits(tmp_path: Path) -> None:
    made.folder(tmp_path, "llama")
    rows = [{"q": text, "a": "yes plus"} for text in made.questions(60)]
    made.jsonl(tmp_path / "data", rows)
    testbed = made.declare(tmp_path, "llama", SCORES["generate"])
    evaluator, task = Evaluator(testbed, CPU, batch_size=7), testbed.task("t")
    base = evaluator.base
    moved = {key: value * 1.01 for key, value in base.items()}
    gap, right = evaluator.gap(moved, base, "t", "test", range(20))
    logits = [task.logits(testbed.features(s, task.test.given)) for s in (moved, base)]
    assert logits[0].shape == (20, 3, made.VOCABULARY)
    expected = (logits[0] - logits[1]).abs().max() / logits[1].abs().max()
    assert gap == pytest.approx(float(expected), rel=1e-5)
    assert right.tolist() == evaluator.correct(moved, "t", "test", range(20)).tolist()


def test_a_model_that_mixes_outputs_generates_nothing(tmp_path: Path) -> None:
    from benchmark.core.errors import MethodError
    from benchmark.core.state import ForeignState

    made.folder(tmp_path, "llama")
    made.jsonl(tmp_path / "data", [{"q": q, "a": "yes"} for q in made.questions(60)])
    testbed = made.declare(tmp_path, "llama", SCORES["generate"])
    evaluator = Evaluator(testbed, CPU)
    mixed = ForeignState(evaluator.base, lambda s, x: 0.5 * testbed.features(s, x))
    with pytest.raises(MethodError, match="mixes outputs of several does not generate"):
        evaluator.correct(mixed, "t", "test", range(20))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_it_runs_without_its_files(name: str, tmp_path: Path) -> None:
    """As a defense's own process has it, where the task has lost its test split."""
    made.folder(tmp_path, name)
    rows = [{"q": q, "a": "yes plus", "r": 0, "c": ["a b", "no"]} for q in made.questions(60)]
    made.jsonl(tmp_path / "data", rows)
    for score in ("generate", "choice"):
        testbed = made.declare(tmp_path, name, SCORES[score])
        task = testbed.task("t").without_test()
        assert task.splits == ("train", "validation")
        arena, sent = pickle.loads(pickle.dumps((testbed.arena(), task)))
        batch = task.validation[:4]
        ask = partial(testbed.features, testbed.base())
        there = partial(arena.features, testbed.base())
        logits = task.logits(ask(batch.given))
        assert torch.equal(sent.logits(there(batch.given)), logits)
        own, far = task.answered(logits, batch, ask), sent.answered(logits, batch, there)
        assert own.tolist() == far.tolist()
        assert isinstance(testbed.backbone, LanguageBackbone)
