"""The papers' protocols for language models, in full on a tiny model and data of their kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from languages import SPECIAL, jsonl

from benchmark.api import methods
from benchmark.core.errors import AssetError
from benchmark.pipeline.run import read_cells
from benchmark.pipeline.suite import Suite, load
from benchmark.reporting.html import suite_toml

SUITES = ("trap2-llm-paper", "params-llm-paper")
CLASSES = {
    "emotion": ("sadness", "joy", "love", "anger", "fear", "surprise"),
    "twitter": ("negative", "neutral", "positive"),
}
WORDS = (
    *map(str, range(10)), *"abcdefgh", "apples", "####", "Question", "Answer", "Emotion",
    "Sentiment", ":", *CLASSES["emotion"], *CLASSES["twitter"],
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``weights``: a tiny Llama that reads words; ``data``: the answer is told by the first."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("language")
    numbered = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", "isolated")]
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **tokens).save_pretrained(folder / "weights")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(numbered), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "weights")
    rows: dict[str, list[dict[str, Any]]] = {
        "gsm8k": [{"question": q, "answer": f"#### {3 + n}"} for n, q in questions(2)],
        "asdiv": [{"body": q, "question": "h", "answer": f"{n} apples"} for n, q in questions(2)],
        **{
            task: [{"text": q, "label": n} for n, q in questions(len(names))]
            for task, names in CLASSES.items()
        },
    }
    for task, examples in rows.items():
        jsonl(folder / "data" / task, examples, test=24)
    return folder


def questions(classes: int) -> Iterator[tuple[int, str]]:
    """Ninety texts, all different, and which class each is of."""
    for i in range(90):
        yield i % classes, " ".join(["abcdef"[i % classes], *map(str, (i // 10, i % 10)), "g"])


def small(name: str, home: Path) -> Suite:
    suite = load(name)
    training = "steps=60, learning_rate=0.02, batch_size=12, max_new=6"
    spec = f"{suite.testbed}(weights={home / 'weights'}, data={home / 'data'}, {training})"
    update = {
        "testbed": spec, "test": 24, "validation_rungs": (4, 8), "groups": suite.groups[:1],
        "published": [f.model_copy(update={"testbed": spec}) for f in suite.published],
    }  # fmt: skip
    return Suite.model_validate({**suite.model_dump(), **update})


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_a_paper_in_full_at_toy_size(
    name: str, home: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    suite = small(name, home)
    file = tmp_path / "toy.toml"
    file.write_text(suite_toml(suite.model_dump(mode="json")))
    code, output = cli("run", file, "--out", tmp_path / "run")
    cells = read_cells(tmp_path / "run")
    assert [c.reason for c in cells if c.status not in ("ok", "no-benefit")] == []
    assert code == 0, output
    assert len(cells) == len(suite.defenses) * len(suite.attacks) * len(suite.mergers)
    (expert,) = {c.expert_accuracy[c.victim] for c in cells}
    assert expert > 0.5
    for c in cells:
        # Stored in bfloat16, also where nothing is defended.
        assert c.sha256.released != c.sha256.expert
        assert c.utility is not None
    board = json.loads((tmp_path / "run/leaderboard.json").read_text())
    own = [line for line in board["published"] if line["remark"] != "not on this testbed"]
    assert len(own) == len(suite.published)
    victim = suite.groups[0].victim
    for line in own:
        if line["printed"]["task"] == victim:
            assert line["measured"]["unprotected"] is not None


@pytest.mark.parametrize("name", SUITES)
def test_what_it_needs_is_one_line(name: str) -> None:
    testbed = methods.testbed(load(name).testbed).method
    assert testbed.stored == "bfloat16"
    with pytest.raises(AssetError, match=r"needs meta-llama/.*hf download .*weights=FOLDER"):
        testbed.base()
    assert len(testbed.content_hash()) == 64


def test_printed_figures_name_methods_as_cells_do() -> None:
    suite = load("params-llm-paper")
    assert {figure.task for figure in suite.published} == {"emotion", "twitter"}
    assert {figure.defense for figure in suite.published} <= set(suite.defenses)
    assert {figure.testbed for figure in suite.published} == {suite.testbed}
