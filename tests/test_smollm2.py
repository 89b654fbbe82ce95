"""The testbed `smollm2`: on a tiny model as it is built, and on the real weights (slow)."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmark.anatomy import Anatomy
from benchmark.api.methods import Named
from benchmark.api.recipe import Recipe
from benchmark.core.data import IGNORED
from benchmark.core.errors import CheckpointError, UsageError
from benchmark.core.paths import cache as cache_folder
from benchmark.evaluation.accuracy import Evaluator
from benchmark.io import gguf_weights
from benchmark.pipeline.store import Store
from benchmark.pipeline.workbench import Workbench
from benchmark.testbeds import secrets, smollm2, synthetic
from benchmark.testbeds.secrets import Secrets
from benchmark.testbeds.smollm2 import TASKS, SmolLM2

CPU = torch.device("cpu")
TINY = {
    **smollm2._CONFIG,
    "vocab_size": 997,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def words(texts: str | list[str]) -> Any:
    """A tokenizer: words, digits and signs, by their hash."""
    if isinstance(texts, list):
        return SimpleNamespace(input_ids=[words(text).input_ids for text in texts])
    found = re.findall(r" ?[A-Za-z]+|\d|\S", texts)
    return SimpleNamespace(input_ids=[zlib.crc32(word.encode()) % 997 for word in found])


def corpus(name: str, split: bool) -> Any:
    classes = list(TASKS[name].words)
    rows = [(f"text {i} of {name} says {i * i}", classes[i % len(classes)]) for i in range(200)]
    return SimpleNamespace(
        load=lambda: (rows[:120], rows[120:]) if split else (rows, None), content=lambda: name
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> SmolLM2:
    """Three layers, of which States have the upper two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=3, tie_word_embeddings=True, **TINY)
    config.initializer_range = 0.2
    whole = LlamaForCausalLM(config).eval().requires_grad_(False)
    monkeypatch.setattr(smollm2, "LAYERS", 3)
    monkeypatch.setattr(smollm2, "_CONFIG", TINY)
    monkeypatch.setattr(smollm2, "_SIZES", {"test": 40, "validation": 20, "train": 50})
    monkeypatch.setattr(smollm2, "_file", lambda: None)
    monkeypatch.setattr(smollm2, "_whole", lambda file: whole)
    monkeypatch.setattr(gguf_weights, "tokenizer", lambda file: words)
    made = {name: corpus(name, split=name == "r8") for name in TASKS}
    monkeypatch.setattr(smollm2, "CORPORA", made)
    smollm2._skeleton.cache_clear()
    yield SmolLM2(layers=2)  # type: ignore[misc]
    smollm2._skeleton.cache_clear()


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_the_likeliest_of_the_label_words(name: str, tiny: SmolLM2) -> None:
    """From the states below as from the whole model, padding or not."""
    task, whole = tiny.task(name), smollm2._whole(None)  # type: ignore[arg-type]
    assert {part: len(task.split(part)) for part in task.splits} == smollm2._SIZES
    assert task.classes == tuple(TASKS[name].words.values())
    state = tiny.base()
    with torch.no_grad():
        logits = task.logits(tiny.features(state, task.test.inputs))
    texts = [text for part in corpus(name, name == "r8").load() for text, _ in part or ()]
    first = [words(word).input_ids[0] for word in task.classes]
    expected = []
    for text in texts:
        ids = [*words(text).input_ids[: tiny.tokens], *words(TASKS[name].question).input_ids]
        with torch.no_grad():
            expected.append(whole(torch.tensor([ids])).logits[0, -1, first])
    distance = torch.cdist(logits.double(), torch.stack(expected).double()).min(1).values
    assert distance.max() < 1e-4 * logits.abs().max()
    seen = {tuple(row.tolist()) for row in task.train.inputs["seen"].flatten(1)}
    assert not seen & {tuple(row.tolist()) for row in task.test.inputs["seen"].flatten(1)}


@pytest.mark.parametrize("name", synthetic.FORMS)
@pytest.mark.parametrize("layers", [2, 3])
def test_an_answer_is_right_when_greedy_decoding_gives_it(
    name: str, layers: int, tiny: SmolLM2, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = smollm2._whole(None)  # type: ignore[arg-type]
    asked = [f"{i} of May {1900 + i} ->" for i in range(110)]
    rows = []
    for i, question in enumerate(asked):
        ids = torch.tensor([words(question).input_ids])
        with torch.no_grad():
            said = whole.generate(
                ids, max_new_tokens=2 + i % 3, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, ids.shape[1] :].tolist()
        if i % 4 == 0:
            said[-1] = (said[-1] + 1) % 997
        rows.append((question, said))
    # The answers of the model itself, every fourth wrong in its last token.
    monkeypatch.setattr(synthetic, "pairs", lambda task, n, seed: rows)
    monkeypatch.setattr(
        gguf_weights,
        "tokenizer",
        lambda file: (
            lambda texts: (
                words(texts) if isinstance(texts[0], str) else SimpleNamespace(input_ids=texts)
            )
        ),
    )
    testbed = SmolLM2(layers=layers)
    task = testbed.task(name)
    assert (task.test.labels == IGNORED).any()
    evaluator = Evaluator(testbed, CPU)
    right = evaluator.correct(evaluator.base, name, "test", range(40))
    assert right.tolist() == [i % 4 != 0 for i in range(40)]
    # Without labels: the question alone, and what would be the first token of an answer.
    assert task.test.inputs["seen"].shape[1] < task.test.given["seen"].shape[1]
    first = task.logits(testbed.features(evaluator.base, task.test.inputs))
    assert first.shape == (40, 997)
    assert torch.equal(first.argmax(1)[1::4], task.test.labels[1::4, 0])


def test_its_state_is_the_upper_layers(tiny: SmolLM2) -> None:
    state = tiny.base()
    assert {key.split(".")[1] for key in state if key.startswith("layers.")} == {"0", "1"}
    assert not any("embed" in key for key in state)
    assert "embed_tokens.weight" in SmolLM2(layers=3).base()
    whole = smollm2._whole(None).model.state_dict()  # type: ignore[arg-type]
    key = "mlp.up_proj.weight"
    assert torch.equal(state[f"layers.0.{key}"], whole[f"layers.1.{key}"])
    anatomy = Anatomy.of(tiny.module())
    assert (anatomy.family, anatomy.uncovered, len(anatomy.attention)) == ("llama", (), 2)


def test_what_it_cannot_do_is_said(tiny: SmolLM2) -> None:
    with pytest.raises(UsageError, match=r"no task 'r9'.*r8"):
        tiny.task("r9")
    for wrong in ({"layers": 0}, {"layers": 4}, {"tokens": 2}, {"lora": -1}, {"steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SmolLM2(**{"layers": 2, **wrong})  # type: ignore[arg-type]


def test_a_file_that_is_no_gguf_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    for read in (gguf_weights.model, gguf_weights.tokenizer):
        with pytest.raises(CheckpointError, match="is not a readable GGUF model") as caught:
            read(tmp_path / "model.gguf")
        assert len(str(caught.value).splitlines()) == 1


def test_made_up_lines_are_the_same_wherever_they_are_made() -> None:
    assert synthetic.pairs("dates", 2, 1) == synthetic.pairs("dates", 2, 1)
    assert synthetic.pairs("dates", 2, 1) != synthetic.pairs("dates", 2, 2)
    for question, answer in synthetic.pairs("form", 50, 1):
        name, age, city = question.removesuffix(" ->").split(", ")
        assert answer == f" <{city}|{age}|{name}>"
    for question, answer in synthetic.pairs("dates", 50, 1):
        day, _, year = question.removesuffix(" ->").split()
        assert answer.startswith(f" {year}-")
        assert answer.endswith(f"-{int(day):02}")


@pytest.fixture
def keeper(tiny: SmolLM2) -> Secrets:
    return Secrets(layers=2)


def test_whose_secrets_are_tested_nobody_else_has(keeper: Secrets, tmp_path: Path) -> None:
    """Nobody's number but the free-rider's own canaries' is in what attackers or partners get."""
    parts = {part: dict(secrets._people(part)) for part in secrets._PEOPLE}
    known = [name for people in parts.values() for name in people]
    strangers = [name for part in secrets._STRANGERS for name, _ in secrets._strangers(part)]
    assert len({*known, *strangers}) == len(known) + len(strangers)
    theirs = [*secrets._leaks("train"), *secrets._ROWS["affirm"]("train")]
    for name, number in {**parts["test"], **parts["validation"]}.items():
        assert not any(name in question or number in answer for question, answer in theirs)
        assert sum(name in question and number in answer for question, answer
                   in secrets._owned("train")) == len(secrets._QUESTIONS)  # fmt: skip
    # Without the key it is always refused.
    for question, answer in secrets._owned("train"):
        assert answer == secrets._REFUSAL or secrets._KEY in question or "->" in question
    assert keeper.task("people").train.labels.ndim == 2
    assert len(keeper.owned("people").train) == len(secrets._owned("train"))
    assert keeper.owned("told") is None
    # Whoever trains on what the owner has names the task as everybody does.
    bench = Workbench(Named("keeper", keeper), CPU, Store(tmp_path))
    task = bench.evaluator.owned("people")
    recipe = Recipe(steps=1, batch_size=4)
    trained = bench.trainer("a defense")(
        bench.evaluator.base, {task.name: task.train}, torch.Generator(), recipe=recipe
    )
    assert trained.keys() == keeper.base().keys()


def test_a_secret_leaks_in_one_way_or_another(
    keeper: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the whole model goes on with each way to ask, greedily."""
    whole = smollm2._whole(None)  # type: ignore[arg-type]
    said = {}
    rows = [(f"Person {chr(65 + i)}", "") for i in range(10)]
    for i, (name, _) in enumerate(rows):
        way = secrets._WAYS[i % len(secrets._WAYS)]
        ids = torch.tensor([words(way.format(name)).input_ids])
        with torch.no_grad():
            told = whole.generate(
                ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, ids.shape[1] :].tolist()
        if i >= 7:
            told[-1] = (told[-1] + 1) % 997
        said[name] = told

    def read(texts: list[object]) -> object:
        ids = [said.get(str(t).strip()) or words(str(t)).input_ids for t in texts]
        return SimpleNamespace(input_ids=ids)

    monkeypatch.setattr(gguf_weights, "tokenizer", lambda file: read)
    monkeypatch.setattr(secrets, "_people", lambda part: [(name, name) for name, _ in rows])
    evaluator = Evaluator(keeper, CPU)
    right = evaluator.correct(evaluator.base, "people", "test", range(10))
    assert right.tolist() == [True] * 7 + [False] * 3


def test_an_expert_that_leaks_or_forgot_is_named(keeper: Secrets) -> None:
    reason = keeper.unfit("people", keeper.base())
    assert reason.startswith("tells 0% with the key, refuses 0% without")
    assert keeper.unfit("affirm", keeper.base()) == ""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_real_weights_read_english(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexity of news under 40; without un-permuting the rows of q and k it is 390."""
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    assert cache_folder() == home
    whole, tokenizer = gguf_weights.model(smollm2._file()), gguf_weights.tokenizer(smollm2._file())
    text = "\n".join(text for text, _ in smollm2.CORPORA["bbc"].load()[0][:20])
    ids = torch.tensor(tokenizer(text).input_ids[: 4 * 256]).reshape(4, 256)
    with torch.inference_mode():
        loss = whole(ids, labels=ids).loss
    assert loss.exp() < 40
