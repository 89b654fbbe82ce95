"""LoRA adapters as PEFT folders: read as peft computes them, written as peft reads them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conftest import Cli
from disk import tensors, write
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from zoo import decoders

from benchmark.core.errors import CheckpointError, UsageError
from benchmark.core.state import State, norm, task_vector
from benchmark.io import adapter_folders, adapter_updates, folders

# peft asks transformers by a name that transformers 5 is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TARGETS = {
    "bert-classifier": ["query", "value"],
    "vit": ["q_proj", "o_proj"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def adapter(base: Path, out: Path, seed: int = 0, **options: Any) -> Any:
    """An adapter with random factors, as peft saves it; returns peft's own model of it."""
    loaded = folders.load(base)
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": ["query", "value"], **options}
    )
    model: Any = get_peft_model(copy.deepcopy(loaded.model).float(), config)
    rng = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            value.data = 0.2 * torch.randn(value.shape, generator=rng)
    model.save_pretrained(str(out), save_embedding_layers=False)
    return model


def read(path: Path, base: Path) -> tuple[State, State]:
    """The States of an adapter and of its base."""
    origin = adapter_folders.lifted(folders.load(base))
    return adapter_folders.load(path, origin).state, origin.state


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return write("bert-classifier", tmp_path / "base")


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_read_computes_what_peft_computes(name: str, tmp_path: Path) -> None:
    base = write(name, tmp_path / "base")
    fused = {"fan_in_fan_out": True} if name == "gpt2" else {}
    model = adapter(base, tmp_path / "lora", target_modules=TARGETS[name], **fused)
    state, origin = read(tmp_path / "lora", base)
    _, inputs = zoo.tiny(name)
    loaded = folders.load(base).model
    with torch.no_grad():
        expected = model.eval()(**inputs)[0]
    found = torch.func.functional_call(loaded, state, kwargs=dict(inputs))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    tau = task_vector(state, origin)
    assert tau
    assert all(any(t in key for t in TARGETS[name]) for key in tau)
    assert all(state[key] is value for key, value in origin.items() if key not in tau)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layer.0.attention.self.query": 5}},
        {"alpha_pattern": {"layer.1.attention.self.value": 12}},
        {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_scaling_patterns_and_whole_modules(
    options: dict[str, Any], bert: Path, tmp_path: Path
) -> None:
    model = adapter(bert, tmp_path / "lora", **options)
    state, _ = read(tmp_path / "lora", bert)
    merged = model.merge_and_unload().state_dict()
    for key, value in state.items():
        torch.testing.assert_close(value, merged[key])


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_written_peft_reads(name: str, tmp_path: Path) -> None:
    base = write(name, tmp_path / "base")
    fused = {"fan_in_fan_out": True} if name == "gpt2" else {}
    adapter(base, tmp_path / "lora", target_modules=TARGETS[name], **fused)
    origin = folders.load(base)
    given = adapter_folders.load(tmp_path / "lora", origin)
    update = adapter_updates.factored(given.state, origin)
    assert update.rank == 3
    assert update.error < 1e-5
    adapter_updates.save(update, origin, tmp_path / "out", like=given)
    again = PeftModel.from_pretrained(copy.deepcopy(origin.model), str(tmp_path / "out"))
    merged: Any = again.merge_and_unload()
    weights = merged.state_dict()
    for key, value in given.state.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 3
    held = tensors(tmp_path / "out" / adapter_folders.WEIGHTS)
    assert {min(value.shape) for value in held.values()} == {3}


def test_a_whole_module_goes_along(bert: Path, tmp_path: Path) -> None:
    adapter(bert, tmp_path / "lora", modules_to_save=["classifier"], task_type="SEQ_CLS")
    origin = folders.load(bert)
    given = adapter_folders.load(tmp_path / "lora", origin)
    assert given.whole == ("classifier",)
    with pytest.raises(UsageError, match=r"classifier.*which a LoRA adapter cannot hold"):
        adapter_updates.factored({**origin.state, "classifier.bias": torch.ones(2)}, origin)
    update = adapter_updates.factored(given.state, origin, whole=given.whole)
    adapter_updates.save(update, origin, tmp_path / "out", like=given)
    again = adapter_folders.load(tmp_path / "out", origin)
    for key, value in given.state.items():
        torch.testing.assert_close(again.state[key], value)


def test_a_cut_rank_says_what_it_loses(bert: Path, tmp_path: Path) -> None:
    adapter(bert, tmp_path / "lora")
    origin = folders.load(bert)
    state = adapter_folders.load(tmp_path / "lora", origin).state
    update = adapter_updates.factored(state, origin, rank=1)
    adapter_updates.save(update, origin, tmp_path / "out")
    cut = adapter_folders.load(tmp_path / "out", origin).state
    lost = norm(task_vector(state, cut)) / norm(task_vector(state, origin.state))
    assert 0.1 < lost < 1
    assert update.error == pytest.approx(lost, rel=1e-4)


def test_an_adapter_of_a_half_precision_base_keeps_its_precision(tmp_path: Path) -> None:
    model: Any = copy.deepcopy(zoo.tiny("bert")[0]).bfloat16()
    model.save_pretrained(tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "lora")
    origin = adapter_folders.lifted(folders.load(tmp_path / "base"))
    state = adapter_folders.load(tmp_path / "lora", origin).state
    assert adapter_updates.factored(state, origin).rank == 3


def _set(**fields: object) -> Any:
    def edit(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return edit


def _drop(path: Path) -> None:
    file = path / adapter_folders.WEIGHTS
    held = tensors(file)
    held.pop(min(held))
    save_file(held, file)


def _extra(path: Path) -> None:
    file = path / adapter_folders.WEIGHTS
    save_file({**tensors(file), "base_model.model.x.lora_A.weight": torch.ones(3, 3)}, file)


def _nan(path: Path) -> None:
    file = path / adapter_folders.WEIGHTS
    held = tensors(file)
    held[min(held)].fill_(float("nan"))
    save_file(held, file)


def _pickle(path: Path) -> None:
    torch.save(tensors(path / adapter_folders.WEIGHTS), path / "adapter_model.bin")
    (path / adapter_folders.WEIGHTS).unlink()


BROKEN = {
    "dora": (_set(use_dora=True), "use_dora, which is no plain"),
    "not lora": (_set(peft_type="IA3"), "is a IA3 adapter; only LoRA"),
    "no type": (lambda p: (p / "adapter_config.json").write_text("{}"), "cannot use .*peft_type"),
    "no json": (lambda p: (p / "adapter_config.json").write_text("{"), "cannot use"),
    "other base": (_set(target_modules=["nowhere"]), "does not fit this base"),
    "other rank": (_set(r=7), "does not fit this base"),
    "missing": (_drop, "does not fit this base: its 7 tensors are not the 8"),
    "extra": (_extra, "does not fit this base: its 9 tensors are not the 8"),
    "nan": (_nan, "holds NaN"),
    "pickle": (_pickle, "is a pickle, which is never loaded"),
    "no weights": (lambda p: (p / adapter_folders.WEIGHTS).unlink(), "is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters_are_refused_in_one_line(case: str, bert: Path, tmp_path: Path) -> None:
    adapter(bert, tmp_path / "lora")
    edit, message = BROKEN[case]
    edit(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=message) as refusal:
        adapter_folders.load(tmp_path / "lora", folders.load(bert))
    assert "\n" not in str(refusal.value)


def test_an_adapter_is_no_base(bert: Path, tmp_path: Path) -> None:
    adapter(bert, tmp_path / "lora")
    with pytest.raises(CheckpointError, match="it is an adapter: give its base"):
        folders.load(tmp_path / "lora")


@pytest.fixture
def pair(bert: Path, tmp_path: Path) -> Path:
    for seed, name in enumerate(("one", "two")):
        adapter(bert, tmp_path / name, seed)
    return tmp_path


def test_adapters_merge_into_an_adapter(pair: Path, cli: Cli) -> None:
    """Task arithmetic of two ranks of 3 has rank 6, and loses nothing."""
    base, one, two, out = (pair / name for name in ("base", "one", "two", "merged"))
    arguments = ("--coefficients", "0.5,0.25", "--out", out, "--json")
    code, text = cli("merge", base, one, two, *arguments)
    assert code == 0, text
    done = json.loads(text)
    assert (done["format"], done["rank"]) == ("adapter", 6)
    assert done["relative_error"] < 1e-5
    (first, start), (second, _), (merged, _) = (read(p, base) for p in (one, two, out))
    for key, value in merged.items():
        expected = start[key] + 0.5 * (first[key] - start[key]) + 0.25 * (second[key] - start[key])
        torch.testing.assert_close(value, expected)
    code, text = cli("merge", base, one, two, *arguments, "--force", "--rank", "2")
    assert json.loads(text)["rank"] == 2
    assert 0.01 < json.loads(text)["relative_error"] < 1


@pytest.mark.parametrize("merger", ["ties", "knots", "core"])
def test_other_merges_of_adapters(merger: str, pair: Path, cli: Cli) -> None:
    base, one, two, out = (pair / name for name in ("base", "one", "two", "merged"))
    arguments = (base, one, two, "--merger", merger, "--coefficients", "1,1", "--out", out)
    code, text = cli("merge", *arguments, "--json")
    assert code == 0, text
    done = json.loads(text)
    (first, start), (second, _) = (read(p, base) for p in (one, two))
    if merger == "ties":  # trimming makes τ full rank: a small matrix has nothing to save
        assert done["format"] == "model"
        assert "larger than the weights" in done["not_an_adapter"]
        merged = folders.load(out).state
    else:
        assert (done["format"], done["rank"]) == ("adapter", 6)
        merged, _ = read(out, base)
    key = "bert.encoder.layer.0.attention.self.query.weight"
    both = first[key] + second[key] - 2 * start[key]
    similarity = torch.cosine_similarity((merged[key] - start[key]).flatten(), both.flatten(), 0)
    assert 0.3 < similarity < 0.99


def test_protect_and_attack_take_adapters(pair: Path, cli: Cli) -> None:
    base, one, locked, back = (pair / name for name in ("base", "one", "locked", "back"))
    common = ("--base", base, "--json")
    code, text = cli("protect", one, *common, "--defense", "mergelock", "--out", locked)
    done = json.loads(text)
    assert code == 0
    assert done["format"] == "model"
    assert "cannot hold" in done["not_an_adapter"]
    assert done["logit_gap"] < 1e-4
    code, text = cli(
        "protect", one, *common, "--defense", "mergelock", "--out", pair / "no", "--adapter"
    )
    assert code == 2
    assert "which a LoRA adapter cannot hold; add --no-adapter" in text
    assert not (pair / "no").exists()
    code, text = cli(
        "attack", locked, *common, "--attack", "gauge-align", "--partner", pair / "two",
        "--out", back,
    )  # fmt: skip
    assert code == 0, text
    assert json.loads(text)["format"] == "model"
    code, text = cli("attack", one, *common, "--attack", "low-rank", "--out", pair / "low")
    assert (code, json.loads(text)["format"]) == (0, "adapter")


def test_locking_the_adapter_alone_stays_an_adapter(pair: Path, cli: Cli) -> None:
    for defense in ("mergelock(adapter_only=true)", "params(adapter_only=true)"):
        code, text = cli(
            "protect", pair / "one", "--base", pair / "base", "--defense", defense,
            "--out", pair / "locked", "--force", "--json",
        )  # fmt: skip
        done = json.loads(text)
        assert code == 0
        assert (done["format"], done["rank"], done["exact"]) == ("adapter", 3, False)
        assert done["logit_gap"] > 0.01


def test_rank_without_an_adapter(pair: Path, cli: Cli) -> None:
    base, one = pair / "base", pair / "one"
    arguments = (base, base, "--coefficients", "1", "--out", pair / "out", "--rank", "4")
    assert cli("merge", *arguments)[1].startswith("--rank is that of an adapter; add --adapter")
    code, text = cli(
        "merge", base, one, "--coefficients", "1", "--out", pair / "out", "--rank", "4",
        "--no-adapter",
    )  # fmt: skip
    assert (code, text) == (2, "--rank is that of an adapter; leave out --no-adapter")
    assert not (pair / "out").exists()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that ties lm_head to its embedding, as Qwen2.5-0.5B, Llama-3.2-1B and Gemma do."""
    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(0)
    decoders.decoder("Qwen2", tie_word_embeddings=True).save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=str,
)
def test_one_of_two_tied_weights_is_not_trained_in_silence(
    options: dict[str, Any], tied: Path, tmp_path: Path
) -> None:
    """peft trains a copy of it, or both: no State of the tied base holds that."""
    adapter(tied, tmp_path / "lora", **{"target_modules": ["q_proj"], **options})
    with pytest.raises(CheckpointError, match=r"trains .*(lm_head|embed_tokens), whose w"):
        read(tmp_path / "lora", tied)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_beside_tied_weights_are_read(
    use_rslora: bool, tied: Path, tmp_path: Path
) -> None:
    model = adapter(tied, tmp_path / "lora", target_modules=["q_proj"], use_rslora=use_rslora)
    state, _ = read(tmp_path / "lora", tied)
    _check_runs(model, state, tied, "qwen2")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("whole", [False, True])
def test_embeddings_and_heads_of_their_own_are_read(
    whole: bool, module: str, tmp_path: Path
) -> None:
    base = write("llama", tmp_path / "base")
    trained: dict[str, Any] = {"target_modules": ["q_proj", module]}
    if whole:
        trained = {"target_modules": ["q_proj"], "modules_to_save": [module]}
    model = adapter(base, tmp_path / "lora", **trained)
    if not whole:
        model.save_pretrained(str(tmp_path / "lora"))  # with the base's own embedding, as peft does
    state, origin = read(tmp_path / "lora", base)
    _check_runs(model, state, base, "llama")
    assert any(module in key for key in task_vector(state, origin))


def _check_runs(model: Any, state: State, base: Path, name: str) -> None:
    _, inputs = zoo.tiny(name)
    with torch.no_grad():
        expected = model.eval()(**inputs)[0]
        found = torch.func.functional_call(folders.load(base).model, state, kwargs=dict(inputs))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_another_embedding_than_the_base_has_is_refused(tmp_path: Path) -> None:
    base = write("llama", tmp_path / "base")
    adapter(base, tmp_path / "lora", target_modules=["q_proj"])
    held = tensors(tmp_path / "lora" / adapter_folders.WEIGHTS)
    embedding = folders.load(base).state["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.weight"
    for value, fits in ((embedding, True), (embedding + 1, False)):
        save_file({**held, key: value}, tmp_path / "lora" / adapter_folders.WEIGHTS)
        if fits:
            read(tmp_path / "lora", base)
            continue
        with pytest.raises(CheckpointError, match=r"holds another 'model.embed_tokens.weight'"):
            read(tmp_path / "lora", base)


def test_what_peft_computes_otherwise_is_refused(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: what was read is compared with what peft runs."""
    from peft.tuners.lora.layer import Linear

    adapter(bert, tmp_path / "lora")
    plain = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 2 * plain(self, name))
    with pytest.raises(CheckpointError, match="computes something else under peft"):
        read(tmp_path / "lora", bert)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"0.attention.attention.query": 5}},
        {"alpha_pattern": {"1.attention.attention.value": 12}},
    ],
    ids=["plain", "ranks", "alphas"],
)
def test_names_of_before_transformers_5_are_understood(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """The file of a ViT says query where the loaded model says q_proj; old adapters do, too."""
    base = write("vit", tmp_path / "base")
    origin = folders.load(base)
    inside = {
        key.removesuffix(".weight"): name.removesuffix(".weight")
        for name, key in origin.names.items()
        if name.endswith(".weight")
    }
    now = {name: dict(table) for name, table in options.items()}
    # Made under today's names, then written under the old ones.
    targets = [key for key in inside if key.endswith((".q_proj", ".v_proj"))]
    for table in now.values():
        for old in list(table):
            table[next(key for key in targets if inside[key].endswith(old))] = table.pop(old)
    model = adapter(base, tmp_path / "lora", target_modules=targets, **now)
    file = tmp_path / "lora" / adapter_folders.WEIGHTS
    renamed = {}
    for key, value in tensors(file).items():
        module, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
        renamed[f"base_model.model.{inside[module]}.lora_{rest}"] = value
    assert not any("q_proj" in key for key in renamed)
    save_file(renamed, file)
    config = tmp_path / "lora" / "adapter_config.json"
    content = json.loads(config.read_text()) | {"target_modules": ["query", "value"], **options}
    config.write_text(json.dumps(content))
    state, _ = read(tmp_path / "lora", base)
    _check_runs(model, state, base, "vit")


@pytest.mark.parametrize(
    "wrong",
    [
        {"bias": 1.5}, {"alpha_pattern": None}, {"rank_pattern": 3}, {"r": "x"}, {"r": 0},
        {"r": 2.5}, {"lora_alpha": None}, {"target_modules": None}, {"target_modules": 7},
        {"peft_type": 3}, {"peft_type": None}, {"modules_to_save": 1}, {"fan_in_fan_out": "x"},
        {"use_dora": True}, {"rank_pattern": {"query": "x"}}, {"layers_to_transform": "x"},
        {"task_type": 3}, {"init_lora_weights": []}, {"exclude_modules": 1},
        {"alpha_pattern": {"(": 2}},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_of_wrong_types_is_one_line(
    wrong: dict[str, Any], bert: Path, tmp_path: Path
) -> None:
    adapter(bert, tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | wrong))
    said = ""
    try:
        state, origin = read(tmp_path / "lora", bert)
        assert task_vector(state, origin), "what peft takes all the same"
    except CheckpointError as error:
        said = str(error)
    assert len(said) < 300
    assert len(said.splitlines()) <= 1


def test_an_adapter_one_folder_down_is_pointed_to(bert: Path, tmp_path: Path) -> None:
    adapter(bert, tmp_path / "outer" / "adapter")
    with pytest.raises(CheckpointError, match=r"give the folder inside it .*adapter$"):
        folders.load(tmp_path / "outer")


def test_a_base_without_the_adapters_head_is_given_one(
    bert: Path, tmp_path: Path, cli: Cli
) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

    config = BertConfig(**json.loads((bert / "config.json").read_text()))
    config.num_labels = 4
    torch.manual_seed(1)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "four")
    model = adapter(tmp_path / "four", tmp_path / "lora", task_type="SEQ_CLS")
    BertForMaskedLM(config).save_pretrained(tmp_path / "masked")
    bare: Any = BertModel(config)
    bare.load_state_dict(folders.load(tmp_path / "four").model.bert.state_dict())  # type: ignore[union-attr, operator]
    bare.save_pretrained(tmp_path / "bare")
    attack = ("attack", tmp_path / "lora", "--attack", "none", "--out", tmp_path / "out", "--json")
    for base in (bert, tmp_path / "masked", tmp_path / "bare"):
        code, text = cli(*attack, "--base", base)
        assert code == 1
        assert "brings a head for SEQ_CLS" in text
        assert "--base-head expert" in text
    code, text = cli(*attack, "--base", tmp_path / "masked", "--base-head", "expert")
    assert code == 1
    assert "lacks 'bert.pooler.dense.weight'" in text, "the pooler is in neither"
    code, text = cli(*attack, "--base", tmp_path / "bare", "--base-head", "expert")
    assert code == 0, text
    assert json.loads(text)["format"] == "adapter"
    origin = adapter_folders.head_of(tmp_path / "lora", folders.load(tmp_path / "bare"))
    state = adapter_folders.load(tmp_path / "out", adapter_folders.lifted(origin)).state
    _, inputs = zoo.tiny("bert-classifier")
    with torch.no_grad():
        expected = model.eval()(**inputs)[0]
        found = torch.func.functional_call(origin.model, state, kwargs=dict(inputs))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
