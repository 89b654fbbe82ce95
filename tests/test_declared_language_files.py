"""Language models of one's own: folders, data, prompts, mistakes; a suite from end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import languages as made
import pytest
import torch
from conftest import Cli
from languages import BOS, EOS, UNKNOWN

from benchmark.core.errors import UnmergeBenchError
from benchmark.testbeds.declared import Declared, Input, open_backbone, place
from benchmark.testbeds.declared.extraction import extracted
from benchmark.testbeds.declared.prompts import Writer
from benchmark.testbeds.declared.schema import TaskSpec
from benchmark.testbeds.declared.tasks import LanguageTask
from benchmark.testbeds.declared.vocabulary import Vocabulary

ANSWERS = 'prompt = "q"\nanswer = "a"\nmax_new = 6\n'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders by name; never written to by a test."""
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "gpt2", "t5", "bart"):
        made.folder(root, name)
    return root


@pytest.fixture
def root(models: Path, tmp_path: Path) -> Path:
    """A folder with the models, and data in each of the forms."""
    for folder in models.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    rows = [
        {"q": q, "a": "yes plus" if i % 4 else "no", "c": ["yes plus", "no a"], "r": i % 2}
        for i, q in enumerate(made.questions(60))
    ]
    made.jsonl(tmp_path / "data", rows)
    return tmp_path


# --- folders -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["auto", "last", "mean", "class"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_causal_model_s_feature_of_a_text_is_its_last_token(
    models: Path, name: str, pooling: Any
) -> None:
    ours = open_backbone(place(name, models, None, "base"), Input(tokens=8, pooling=pooling))
    texts = ["yes no", "a plus b is 7", "3"] * 3
    model = made.build(name).base_model
    pools = {
        "mean": lambda hidden: hidden.mean(0),
        "class": lambda hidden: hidden[0],
        "last": lambda hidden: hidden[-1],
    }
    expected = []
    for text in texts:
        asked = torch.tensor([[BOS, *made.ids(text), EOS]])
        pool = pools["last" if pooling == "auto" else pooling]
        expected.append(pool(model(input_ids=asked).last_hidden_state[0]))
    wanted = torch.nn.functional.normalize(torch.stack(expected), dim=-1)
    assert ours.embed is not None
    torch.testing.assert_close(ours.embed(texts), wanted, rtol=1e-4, atol=1e-5)


def test_a_sharded_base_in_half_precision_is_read_to_float32(root: Path) -> None:
    model = made.build("llama").to(torch.bfloat16)
    model.save_pretrained(root / "half", max_shard_size="20KB")
    made.tokenizer(root / "half")
    assert len(list((root / "half").glob("*.safetensors"))) > 1
    testbed = made.declare(root, "half", f'score = "exact"\n{ANSWERS}')
    state, task = testbed.base(), testbed.task("t")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert torch.equal(task.head, model.lm_head.weight.float())
    assert "lm_head.weight" not in state
    assert "norm.weight" in state


def test_tied_embeddings_are_one_tensor_of_the_state(root: Path) -> None:
    """And the head stays the base's where a State has others."""
    testbed = made.declare(root, "t5", f'score = "exact"\n{ANSWERS}')
    state, task = testbed.base(), testbed.task("t")
    assert [key for key in state if "embed_tokens" in key or "shared" in key] == ["shared.weight"]
    assert testbed.anatomy().uncovered == ()
    before = task.logits(testbed.features(state, task.test.given))
    moved = {**state, "shared.weight": state["shared.weight"].roll(1, 0)}
    after = task.logits(testbed.features(moved, task.test.given))
    assert not torch.allclose(before, after)
    assert torch.equal(task.head, state["shared.weight"])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_an_expert_may_be_a_folder_of_lora(root: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(made.build("llama"), config)
    adapted.save_pretrained(root / "lora")
    testbed = made.declare(root, "llama", f'score = "exact"\nexpert = "lora"\n{ANSWERS}')
    state, base = testbed.published("t"), testbed.base()
    assert state is not None
    merged = adapted.merge_and_unload().model.state_dict()
    changed = {key for key in base if not torch.equal(state[key], base[key])}
    assert changed == {f"layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert all(torch.allclose(state[key], merged[key], atol=1e-6) for key in base)


def test_a_published_expert_is_a_folder_of_the_whole_model(root: Path) -> None:
    tuned = made.build("llama")
    tuned.model.norm.weight += 1
    tuned.lm_head.weight += 1
    tuned.save_pretrained(root / "tuned")
    testbed = made.declare(root, "llama", f'score = "exact"\nexpert = "tuned"\n{ANSWERS}')
    state, base = testbed.published("t"), testbed.base()
    assert state is not None
    assert state.keys() == base.keys()
    assert {k for k in base if not torch.equal(state[k], base[k])} == {"norm.weight"}


# --- data ----------------------------------------------------------------------------------------


def arc(folder: Path) -> None:
    """As the hub's ARC, sciq and others have them: a struct of texts and labels."""
    import datasets

    folder.mkdir()
    for part, start in {"train": 0, "test": 40}.items():
        texts = made.questions(60)[start : start + (40 if part == "train" else 20)]
        rows = [
            {"question": q, "choices": {"text": ["yes", "no plus"], "label": ["1", "2"]},
             "answerKey": "12"[i % 2]}
            for i, q in enumerate(texts)
        ]  # fmt: skip
        datasets.Dataset.from_list(rows).to_parquet(str(folder / f"{part}.parquet"))


def test_choices_as_the_hub_s_data_sets_have_them(root: Path) -> None:
    arc(root / "arc")
    lines = 'score = "choice"\nprompt = "question"\nchoices = "choices"\nanswer = "answerKey"'
    path = root / "arc.toml"
    path.write_text(f'name = "lm"\nbase = "llama"\n[[task]]\nname = "t"\ndata = "arc"\n{lines}\n')
    task = Declared(str(path)).task("t")
    assert 0 < int(task.test.labels.sum()) < len(task.test)
    wanted = task.test.inputs["wanted"]
    assert wanted[0, 0, :1].tolist() == made.ids("yes")
    assert wanted[0, 1].tolist() == made.ids("no plus")
    # A label "1" is the first, and an index 1 without labels the second.
    from benchmark.testbeds.declared.choices import _index

    assert _index("1", ["x", "y"], ["1", "2"]) == 0
    assert _index("1", ["x", "y"], []) == 1
    assert _index("b", ["x", "y"], []) == 1
    assert _index("y", ["x", "y"], []) == 1
    assert _index("z", ["x", "y"], []) is None
    assert _index(2, ["x", "y"], []) is None


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_answers_in_every_format(root: Path, suffix: str) -> None:
    """Numbers are answers too; whole ones without a fraction."""
    import datasets

    for part in ("train", "test"):
        rows = made.questions(60)
        rows = rows[:40] if part == "train" else rows[40:]
        data = datasets.Dataset.from_dict(
            {"q": rows, "a": [float(i % 9) for i in range(len(rows))]}
        )
        getattr(data, f"to_{suffix}")(str(root / f"{part}.{suffix}"))
    files = f'{{ train = "train.{suffix}", test = "test.{suffix}" }}'
    path = root / "files.toml"
    path.write_text(
        f'name = "lm"\nbase = "llama"\n[[task]]\nname = "t"\ndata = {files}\n'
        f'score = "generate"\nextract = "last-number"\n{ANSWERS}'
    )
    labels = Declared(str(path)).task("t").test.labels
    assert labels.shape == (20, 2)
    assert UNKNOWN not in labels
    assert (labels[:, 1] == EOS).all()


# --- prompts -------------------------------------------------------------------------------------


def first_prompt(testbed: Declared) -> tuple[list[int], str]:
    """Token ids of the first test example, and its question."""
    test = testbed.task("t").test
    ids = test.inputs["input_ids"][0][test.inputs["attention_mask"][0].bool()].tolist()
    return ids, made.said(ids)


def test_a_template_names_columns_and_the_end_of_a_prompt_is_kept(root: Path) -> None:
    lines = 'score = "exact"\ntemplate = "a {q} is {c[1]} Answer:"\nanswer = "a"'
    _, text = first_prompt(made.declare(root, "llama", lines))
    assert re.fullmatch(r"<s> a [\d ]+ is no a Answer :", text)
    lines = lines.replace("a {q} is", "a is {q}").replace("{c[1]} Answer:", ":")
    whole = [made.ids(f"a is {q} :") for q in made.questions(60)]
    for name, before, behind in (("llama", 4, []), ("t5", 3, [EOS])):
        cut, _ = first_prompt(made.declare(root, name, lines, more="tokens = 5"))
        assert cut in [[BOS, *ids[-before:], *behind] for ids in whole]


def test_no_prompt_is_cut_unless_the_file_says_so(root: Path) -> None:
    lines = f'score = "exact"\ntemplate = "{"is " * 40}{{q}}"\nanswer = "a"'
    ids, _ = first_prompt(made.declare(root, "llama", lines))
    assert ids[:41] == [BOS, *made.ids("is " * 40)]


def test_a_head_of_layers_is_no_head_here() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(8, 16, generator=rng), torch.randn(40, 16, generator=rng)
    with pytest.raises(UnmergeBenchError, match="its head has layers of its own"):
        Vocabulary.measured(hidden, hidden.relu() @ head.T, head, 0.0)
    found = Vocabulary.measured(hidden, 0.25 * hidden @ head.T, head, 0.0)
    assert (found.scale, found.bias) == (0.25, None)


def test_a_chat_is_a_turn_in_the_tokenizer_s_template(root: Path) -> None:
    made.build("llama").save_pretrained(root / "chatty")
    made.tokenizer(root / "chatty", chat=True)
    ids, text = first_prompt(
        made.declare(root, "chatty", f'score = "exact"\nchat = true\n{ANSWERS}')
    )
    assert re.fullmatch(r"user [\d ]+ bot :", text)
    assert ids[-2:] == made.ids("bot :")


def test_a_tokenizer_without_padding_pads_with_its_end(root: Path) -> None:
    made.build("llama").save_pretrained(root / "bare")
    made.tokenizer(root / "bare", pad=False)
    task = made.declare(root, "bare", f'score = "exact"\n{ANSWERS}').task("t")
    behind = task.test.inputs["input_ids"][task.test.inputs["attention_mask"] == 0]
    assert set(behind.tolist()) == {EOS}
    testbed = made.declare(root, "bare", 'text = "q"\nlabel = "r"', more="tokens = 6")
    assert testbed.task("t").head.shape == (2, 32)


@pytest.mark.parametrize("crossing", [False, True])
def test_an_answer_s_tokens_are_those_that_it_adds_to_its_prompt(crossing: bool) -> None:
    """By a tokenizer that has the space before a word in its token, as most have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(["Is it? Answer: yes", "Answer: no way", "yes and no"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    spec = TaskSpec(name="t", data="d", score="exact", prompt="q")
    writer = Writer(spec, tokenizer, 32, crossing)
    texts = ["Is it? Answer:", "Is it? Answer: ", "Is it?\n"]
    found = writer.continuations(texts, ["yes", "yes", "no way"])
    gaps = ["", "", ""] if crossing else [" ", "", ""]
    assert tokenizer.batch_decode(found) == [
        gap + answer for gap, answer in zip(gaps, ["yes", "yes", "no way"], strict=True)
    ]
    whole = tokenizer("Is it? Answer: yes").input_ids
    assert crossing or writer.prompts(texts[:1])[0] + found[0] == whole


NUMBERS = [
    ("so 1,234 it is", "1234"),
    ("5 + 3 = 8\n#### 42", "42"),
    ("it costs $18.00.", "18"),
    ("$18", "18"),
    ("from 10-5", "5"),
    ("minus: -7", "-7"),
    ("−7", "-7"),
    ("-$3.50", "-3.5"),
    ("half is .5", "0.5"),
    ("1,000,000.00", "1000000"),
    ("-0", "0"),
    ("the end is 18.", "18"),
    ("none at all", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert extracted(text, "last-number") == number


def test_other_extracts() -> None:
    assert extracted("  a b \n", "text") == "a b"
    assert extracted("x (B) or (C)", r"\(([A-D])\)") == "B"
    assert extracted("x", r"\(([A-D])\)") is None
    assert extracted("y", "x|(y)?z|y") is None


PAGE = Path(__file__).parents[1] / "docs" / "your-testbed.md"


def test_the_files_of_the_page_work_as_written(root: Path) -> None:
    """On data of these columns; 200 steps of training are left to its readers."""
    (root / "models").symlink_to(root)
    sums = [
        {"question": q, "answer": f"{i % 9} plus is 7\n#### {i % 9}"}
        for i, q in enumerate(made.questions(60))
    ]
    arc = [
        {"question": q, "choices": ["yes", "no plus", "a"], "answerKey": "ABC"[i % 3]}
        for i, q in enumerate(made.questions(60))
    ]
    films = [{"review": q, "verdict": i % 2} for i, q in enumerate(made.questions(60))]
    (root / "data" / "train.jsonl").unlink()
    (root / "data" / "test.jsonl").unlink()
    for name, rows in {"gsm8k": sums, "arc": arc, "films": films}.items():
        made.jsonl(root / "data" / name, rows)
    text = PAGE.read_text(encoding="utf-8")
    ran = {}
    for title, body in re.findall(
        r"^```toml (gsm8k|sentiment)\.toml\n(.*?)^```$", text, re.M | re.S
    ):
        # The tiny model has 64 positions, and other words.
        path = root / f"{title}.toml"
        body = body.replace("max_new = 256", "max_new = 32")
        path.write_text(body.replace('["bad", "good"]', '["no", "yes"]'))
        testbed = Declared(str(path))
        assert testbed.recipe.lora is None or testbed.recipe.lora.rank == 16
        for task in testbed.tasks:
            ran[task] = testbed.task(task)
    assert ran.keys() == {"gsm8k", "arc", "films"}
    assert isinstance(ran["gsm8k"], LanguageTask)
    assert ran["gsm8k"].judge is not None
    assert ran["arc"].head.shape == (3, 3)
    assert ran["films"].head.shape == (2, 32)


# --- mistakes ------------------------------------------------------------------------------------

EXACT = f'score = "exact"\n{ANSWERS}'
CHOICE = 'score = "choice"\nprompt = "q"\nanswer = "r"\n'
MISTAKES = [
    ("llama", EXACT.replace('"q"', '"question"'), "no column 'question' .it has .*; set prompt in"),
    ("llama", EXACT.replace('"a"', '"answr"'), "no column 'answr'.*; set answer in"),
    ("llama", CHOICE + 'choices = "options"', "no column 'options'.*; set choices in"),
    ("llama", CHOICE, "score = \"choice\" without choices; set choices"),
    ("llama", CHOICE + 'choices = "q"', "column 'q' must hold lists of two or more texts"),
    ("llama", CHOICE.replace('"r"', '"a"') + 'choices = "c"', "answer 'no' is none of the choices"),
    ("llama", EXACT.replace('"a"', '"c"'), "answer column 'c' holds more than texts and numbers"),
    ("llama", EXACT.replace('"q"', '"r"'), "prompt column 'r' holds more than texts"),
    ("llama", EXACT + 'choices = "c"', 'choices goes with score = "choice"; leave it out'),
    ("llama", EXACT + 'extract = "text"', 'extract goes with score = "generate"'),
    ("llama", 'prompt = "q"', "prompt goes with a language model's score: set score"),
    ("llama", 'score = "exact"', "score needs prompt .a column. or template"),
    ("llama", EXACT + 'text = "q"', "a task with score has no text; leave one"),
    ("llama", EXACT.replace("max_new = 6", "max_new = 2"), "has 3 tokens with its end; raise max_"),
    ("llama", EXACT + "chat = true", "no chat template; leave chat out"),
    ("llama", EXACT.replace('prompt = "q"', 'template = "Q: {x}"'), "no column 'x'.*set template"),
    ("llama", EXACT.replace('prompt = "q"', 'template = "Q: {c[9]}"'), "template does not fit a"),
    ("llama", EXACT.replace('prompt = "q"', 'template = "Q: {}"'), "every {} of a template names"),
    ("llama", EXACT.replace('prompt = "q"', 'template = "Q"'), "a template names columns"),
    ("llama", EXACT.replace("exact", "generate") + 'extract = "(a)(b)"', "has 2 groups; give text"),
    ("llama", EXACT.replace("exact", "generate") + 'extract = "("', "extract: no regular expressi"),
    (
        "llama",
        EXACT.replace("exact", "generate") + 'extract = "last-number"',
        "extract = 'last-number' finds nothing in the answer '.*'; correct extract",
    ),
    ("llama", EXACT.replace("= 6", "= 60").replace("exact", "generate"), "the base's 64 positions"),
    ("bart", EXACT.replace("= 6", "= 70").replace("exact", "generate"), "base's 64 positions"),
    ("t5", 'text = "q"\nlabel = "r"', "T5Model writes answers; give every task a score"),
    ("bert", EXACT, "BertModel reads both ways and writes no answers"),
    ("vit", EXACT, "score is for language models, and this base reads no texts"),
    ("body", EXACT, r"LlamaModel has no head for its vocabulary.*ForCausalLM"),
    ("mute", EXACT, "names no eos_token"),
    ("silent", EXACT, "has no usable tokenizer"),
]  # fmt: skip


@pytest.fixture(scope="module")
def unusable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases that no prompts and answers go with."""
    import declared
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("unusable")
    declared.checkpoint(root / "bert", "bert")
    declared.checkpoint(root / "vit", "vit")
    made.build("llama").model.save_pretrained(root / "body")
    made.build("llama").save_pretrained(root / "silent")
    made.build("llama").save_pretrained(root / "mute")
    for name in ("body", "mute"):
        made.tokenizer(root / name)
    file = root / "mute" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": None}))
    assert AutoTokenizer.from_pretrained(root / "mute").eos_token is None
    return root


@pytest.mark.parametrize(("base", "task", "message"), MISTAKES)
def test_a_mistake_is_one_line(
    root: Path, unusable: Path, base: str, task: str, message: str
) -> None:
    for folder in unusable.iterdir():
        (root / folder.name).symlink_to(folder)
    with pytest.raises(UnmergeBenchError) as caught:
        made.declare(root, base, task, more="tokens = 16").task("t")
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_a_file_without_language_models_means_what_it_meant() -> None:
    """Its hash, under which results are kept, has nothing of fields that came later."""
    spec = TaskSpec(name="t", data="d", text="q")
    assert not spec.model_dump().keys() & {"score", "prompt", "max_new", "extract", "answer"}
    asked = TaskSpec(name="t", data="d", score="exact", prompt="q", max_new=64)
    assert asked.model_dump().keys() >= {"score", "prompt"}


# --- from end to end -----------------------------------------------------------------------------

TESTBED = """
name = "words"
base = "llama"
tokens = 12
[recipe]
steps = 40
batch_size = 8
learning_rate = 1e-2
[defaults]
data = "data"
prompt = "q"
[[task]]
name = "exact"
score = "exact"
answer = "a"
max_new = 4
[[task]]
name = "choice"
score = "choice"
choices = "c"
answer = "r"
[[task]]
name = "sums"
score = "generate"
answer = "a"
max_new = 4
"""
SUITE = """
name = "words"
description = "a suite on a language model of my own"
testbed = "testbed.toml"
groups = [
    { victim = "exact", partners = ["choice"] },
    { victim = "sums", partners = ["choice"] },
]
defenses = ["none", "params"]
attacks = ["none", "gauge-align"]
mergers = ["task-arithmetic(fixed=0.8)"]
test = 20
validation_rungs = [8]
"""


@pytest.mark.parametrize("base", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_suite_from_end_to_end(root: Path, cli: Cli, base: str) -> None:
    (root / "testbed.toml").write_text(TESTBED.replace("llama", base))
    (root / "suite.toml").write_text(SUITE)
    code, printed = cli("show", root / "testbed.toml", "--json")
    assert code == 0, printed
    assert json.loads(printed)[0]["tasks"]["sums"] == "data (generate)"
    code, printed = cli("run", root / "suite.toml", "--out", root / "run", "--json")
    assert code == 0, printed
    cells = [json.loads(line) for line in (root / "run" / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == 8
    assert {cell["status"] for cell in cells} <= {"ok", "no-benefit"}, cells
    gaps = [cell["logit_gap"] for cell in cells if cell["defense"] == "params"]
    assert max(gaps) < 1e-4
    plain = [cell["logit_gap"] for cell in cells if cell["defense"] == "none"]
    assert set(plain) == {0.0}


def test_lora_experts_move_attention_alone(root: Path) -> None:
    from benchmark.learn.training import fine_tune

    (root / "testbed.toml").write_text(TESTBED.replace("[recipe]", "[recipe]\nlora = { rank = 2 }"))
    testbed = Declared(str(root / "testbed.toml"))
    task, base = testbed.task("sums"), testbed.base()
    rng = torch.Generator().manual_seed(0)
    tuned = fine_tune(testbed, {"sums": task}, base, {"sums": task.train}, rng)
    changed = {key for key in base if not torch.equal(tuned[key], base[key])}
    assert changed == {
        f"layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in ("q", "k", "v", "o")
    }
    losses = [
        task.loss(task.logits(testbed.features(s, task.train.given)), task.train.labels)
        for s in (base, tuned)
    ]
    assert losses[1] < losses[0]
