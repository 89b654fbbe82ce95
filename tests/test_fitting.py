"""Folders that do not belong together, and what is done about those that nearly do."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conftest import Cli
from disk import tensors, write
from safetensors.torch import save_file

from benchmark.core.errors import CheckpointError
from benchmark.core.state import State, rounded_again
from benchmark.io import folders
from benchmark.io.fitting import check_fits
from benchmark.io.inputs import outputs, valid_inputs


def edited(source: Path, out: Path, **fields: Any) -> Path:
    """A copy whose config.json says something else."""
    shutil.copytree(source, out)
    config = out / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return out


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for name in ("llama", "bert-classifier", "vit", "open-clip"):
        write(name, root / name)
    zoo.tiny("vit")[0].vit.save_pretrained(root / "vit-bare")  # type: ignore[operator, union-attr]
    return root


def protect(cli: Cli, expert: Path, base: Path, out: Path, *more: str) -> tuple[int, Any]:
    arguments = (expert, "--base", base, "--defense", "params", "--out", out, "--json", *more)
    code, text = cli("protect", *arguments)
    return code, json.loads(text) if code == 0 else text.strip()


DIFFERENT: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        "head_dim = 16, the base 8",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        "rope_parameters.rope_theta = 500.0, the base 10000.0",
    ),
    ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu', the base 'silu'"),
    ("llama", {"rms_norm_eps": 0.1}, "rms_norm_eps = 0.1"),
    ("bert-classifier", {"num_attention_heads": 4}, "num_attention_heads = 4, the base 8"),
    ("bert-classifier", {"layer_norm_eps": 0.1}, "layer_norm_eps = 0.1"),
]


@pytest.mark.parametrize(("name", "fields", "said"), DIFFERENT, ids=lambda v: str(v)[:20])
def test_one_set_of_weights_under_two_configurations_is_two_models(
    name: str, fields: dict[str, Any], said: str, bases: Path, tmp_path: Path, cli: Cli
) -> None:
    other = edited(bases / name, tmp_path / "other", **fields)
    one, two = folders.load(bases / name), folders.load(other)
    inputs = valid_inputs(one)
    with torch.no_grad():
        found = [outputs(of.model, inputs, one.state) for of in (one, two)]
    assert (found[0] - found[1]).abs().max() > 1e-2 * found[0].abs().max(), "it matters"
    code, text = protect(cli, other, bases / name, tmp_path / "out")
    assert code == 1
    assert said in text
    assert len(text.splitlines()) == 1
    merge = ("merge", bases / name, bases / name, other, "--coefficients", "0.5,0.5")
    code, text = cli(*merge, "--out", tmp_path / "out")
    assert code == 1
    assert said in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_dropout": 0.3}, {"max_position_embeddings": 99}, {"use_cache": False},
        {"my_note": 3}, {"sliding_window": 2}, {"transformers_version": "4.0"},
        {"id2label": {"0": "no", "1": "yes"}}, {"initializer_range": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_no_function_may_differ(
    fields: dict[str, Any], bases: Path, tmp_path: Path
) -> None:
    """Among it what no Llama reads."""
    other = edited(bases / "llama", tmp_path / "other", **fields)
    check_fits(folders.load(other), folders.load(bases / "llama"), "expert")


def test_whatever_the_fields_say_outputs_decide(
    bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two open_clip folders of one model_cfg, whose code runs them otherwise."""
    base, member = (folders.load(bases / "open-clip") for _ in range(2))
    check_fits(member, base, "expert")
    for block in member.model.visual.transformer.resblocks:  # type: ignore[union-attr]
        monkeypatch.setattr(block.mlp, "gelu", torch.nn.ReLU())
    with pytest.raises(CheckpointError, match="computes something else under the base's config"):
        check_fits(member, base, "expert")


_UNIGRAM = {"model": {"vocab": [["a", 0.1], ["b", 0.2]]}}
VOCABULARIES: list[tuple[str, Any, Any]] = [
    ("vocab.txt", "a\nb\nc", "a\nc\nb"),
    ("vocab.json", {"a": 0, "b": 1}, {"a": 1, "b": 0}),
    ("tokenizer.json", *({"model": {"vocab": {"a": i, "b": 1 - i}}} for i in (0, 1))),
    (
        "tokenizer.json",
        *({**_UNIGRAM, "added_tokens": [{"content": "<x>", "id": i}]} for i in (2, 3)),
    ),
]


@pytest.mark.parametrize(("file", "one", "two"), VOCABULARIES)
def test_tokenizers_of_other_ids_are_refused(
    file: str, one: Any, two: Any, bases: Path, tmp_path: Path
) -> None:
    base, other = (edited(bases / "llama", tmp_path / name) for name in ("base", "other"))
    for folder, content in ((base, one), (other, two)):
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match=r"the tokenizer of expert .* gives '.+' the id \d"):
        check_fits(folders.load(other), folders.load(base), "expert")
    (other / file).write_bytes((base / file).read_bytes())
    check_fits(folders.load(other), folders.load(base), "expert")


def test_the_base_takes_the_head_of_the_expert(bases: Path, tmp_path: Path, cli: Cli) -> None:
    """MaskedLM against a classifier, two and four labels, a bare ViT against a headed one."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    expert = bases / "bert-classifier"
    config = BertConfig(**json.loads((expert / "config.json").read_text()))
    BertForMaskedLM(config).save_pretrained(tmp_path / "masked")
    config = copy.deepcopy(config)
    config.num_labels = 4
    BertForSequenceClassification(config).save_pretrained(tmp_path / "four")
    pairs = [
        (expert, tmp_path / "masked"),
        (tmp_path / "four", expert),
        (bases / "vit", bases / "vit-bare"),
    ]
    for number, (member, base) in enumerate(pairs):
        out = tmp_path / f"out{number}"
        code, text = protect(cli, member, base, out)
        assert code == 1
        assert "--base-head expert" in text
        assert not out.exists()
        code, done = protect(cli, member, base, out, "--base-head", "expert")
        assert code == 0
        assert done["logit_gap"] < 1e-4
        # Written as the expert's, whose head no lock touches.
        given, written = (folders.load(folder).state for folder in (member, out))
        heads = [key for key in given if key.startswith("classifier.")]
        assert heads
        assert all(torch.equal(written[key], given[key]) for key in heads)
        attack = ("--base", base, "--attack", "gauge-align", "--base-head", "expert", "--json")
        code, text = cli("attack", out, *attack, "--out", tmp_path / f"back{number}")
        assert code == 0
        assert json.loads(text)["distance_after"] <= json.loads(text)["distance_before"]


def test_another_model_is_no_other_head(bases: Path, tmp_path: Path, cli: Cli) -> None:
    for more in ((), ("--base-head", "expert")):
        code, text = protect(cli, bases / "llama", bases / "bert-classifier", tmp_path / "o", *more)
        assert code == 1
        assert "lacks" in text
    code, text = protect(cli, bases / "llama", bases / "llama", tmp_path / "o", "--base-head", "x")
    assert code == 2
    assert "--base-head is 'expert'" in text


@pytest.mark.parametrize("half", ["base", "expert"])
def test_half_precision_beside_float32_is_lifted_and_said(
    half: str, tmp_path: Path, cli: Cli
) -> None:
    base = write("bert-classifier", tmp_path / "base")
    origin = folders.load(base)
    expert = tmp_path / "expert"
    folders.save(zoo.perturbed(origin.state, 0.05, 1), origin, expert)
    folder = tmp_path / half
    values = tensors(folder / "model.safetensors")
    save_file(
        {k: v.bfloat16() for k, v in values.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    code, done = protect(cli, expert, base, tmp_path / "out")
    assert code == 0
    names = ("float32", "bfloat16") if half == "base" else ("bfloat16", "float32")
    assert done["lifted"] == f"{names[0]} beside a base in {names[1]}"
    written = folders.load(tmp_path / "out")
    assert str(written.dtype) == f"torch.{names[1]}"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", names[1]) == names[1]
    # Not computed in half precision: the gap is that of rounding at most.
    assert done["logit_gap"] < 1e-4


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module."])
def test_names_in_a_wrapper_are_recognised_and_kept(
    prefix: str, bases: Path, tmp_path: Path, cli: Cli
) -> None:
    expert = edited(bases / "bert-classifier", tmp_path / "expert")
    plain = tensors(expert / "model.safetensors")
    wrapped: State = {f"{prefix}{key}": value for key, value in plain.items()}
    save_file(wrapped, expert / "model.safetensors", {"format": "pt"})
    code, done = protect(cli, expert, bases / "bert-classifier", tmp_path / "out")
    assert code == 0
    assert done["changed_tensors"] > 0
    assert tensors(tmp_path / "out" / "model.safetensors").keys() == wrapped.keys()


def test_code_in_a_folder_never_runs_and_never_goes_along(
    bases: Path, tmp_path: Path, cli: Cli
) -> None:
    ran = tmp_path / "ran"
    named = {"auto_map": {"AutoConfig": "x.C", "AutoModel": "x.M"}}
    known = edited(bases / "bert-classifier", tmp_path / "known", **named)
    strange = edited(known, tmp_path / "strange", model_type="strange")
    for folder in (known, strange):
        (folder / "x.py").write_text(f"open({str(ran)!r}, 'w')")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"auto_map": {"A": "x.T"}, "b": 1})
        )
    code, text = protect(cli, strange, strange, tmp_path / "out")
    assert code == 1
    assert len(text.splitlines()) == 1
    assert len(text) < 400
    code, done = protect(cli, known, bases / "bert-classifier", tmp_path / "out")
    assert code == 0
    assert done["left_behind"] == ["x.py"]
    assert not (tmp_path / "out" / "x.py").exists()
    for file in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tmp_path / "out" / file).read_text()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"b": 1}
    assert not ran.exists()


def test_a_base_of_zeros_is_refused_before_anything_is_written(
    bases: Path, tmp_path: Path, cli: Cli
) -> None:
    base = edited(bases / "bert-classifier", tmp_path / "base")
    file = base / "model.safetensors"
    save_file({k: torch.zeros_like(v) for k, v in tensors(file).items()}, file, {"format": "pt"})
    code, text = protect(cli, bases / "bert-classifier", base, tmp_path / "out")
    assert code == 1
    assert "nothing but zeros" in text
    assert not (tmp_path / "out").exists()


def test_a_config_of_a_billion_layers_is_refused_at_once(bases: Path, tmp_path: Path) -> None:
    for name, field in (("llama", "num_hidden_layers"), ("vit", "num_hidden_layers")):
        folder = edited(bases / name, tmp_path / name, **{field: 10**9})
        with pytest.raises(CheckpointError, match="asks for 1000000000 layers"):
            folders.load(folder)


def test_in_half_precision_exactness_is_not_told_from_rounding(tmp_path: Path, cli: Cli) -> None:
    """An exact lock on a folder in bfloat16 moves outputs, and no more than rounding does."""
    base = write("llama", tmp_path / "f32")
    origin = folders.load(base)
    for name, state in {
        "base": origin.state,
        "expert": zoo.perturbed(origin.state, 0.05, 1),
    }.items():
        folders.save(dict(state), origin, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        save_file({k: v.bfloat16() for k, v in tensors(file).items()}, file, {"format": "pt"})
    code, done = protect(cli, tmp_path / "expert", tmp_path / "base", tmp_path / "out")
    assert code == 0
    assert done["exact"]
    assert done["logit_gap"] == done["bfloat16_gap"]["released"] > 1e-4
    assert done["bfloat16_gap"]["expert"] > 1e-4
    assert "not-equivalent" not in done["flags"]


def test_another_rounding_has_the_error_of_a_rounding() -> None:
    rng = torch.Generator().manual_seed(0)
    numbers = torch.randn(200_000, generator=rng)
    state = {"half": numbers.bfloat16(), "single": numbers, "count": torch.arange(3)}
    again = rounded_again(state, rng)
    assert again["single"] is numbers
    assert again["count"] is state["count"]
    error = (again["half"].float() - state["half"].float()).square().mean()
    expected = (numbers.bfloat16().float() - numbers).square().mean()
    assert float(error / expected) == pytest.approx(1.0, abs=0.1)
    moved = again["half"] != state["half"]
    assert float(moved.float().mean()) == pytest.approx(1 / 12, abs=0.005)
    assert ((again["half"] > state["half"]) & moved).float().sum() > moved.sum() / 3
