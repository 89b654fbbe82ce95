"""Nothing in part: what no row covers is named, refused, or flagged."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import zoo
from conftest import Cli
from plane import Plane
from safetensors.torch import save_file
from torch import nn
from zoo import multimodal
from zoo.shape import SHAPE

from benchmark.anatomy import Anatomy
from benchmark.anatomy.diagnosis import diagnose
from benchmark.api.contracts import Access, Attack, Card, Defense, Knowledge, Victim
from benchmark.api.methods import Named, attack, defense, merger
from benchmark.core.errors import MethodError
from benchmark.core.records import Cell
from benchmark.core.state import State
from benchmark.io import folders
from benchmark.pipeline.cells import CellMaker
from benchmark.pipeline.situation import Situation
from benchmark.pipeline.store import Store
from benchmark.pipeline.suite import Group, Suite
from benchmark.pipeline.workbench import Workbench

LEFT_OUT = ("layer.0.attn.q",)


def half_known() -> nn.Module:
    """A ViT, which a row covers, beside an FNet, which none does."""
    import transformers

    image = transformers.ViTConfig(image_size=8, patch_size=4, **SHAPE)
    text = transformers.FNetConfig(vocab_size=40, **SHAPE)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        image, text, projection_dim=16
    )
    return transformers.VisionTextDualEncoderModel(config)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and expert of it."""
    root = tmp_path_factory.mktemp("half")
    torch.manual_seed(0)
    model = half_known()
    model.save_pretrained(root / "base")  # type: ignore[operator]
    base = folders.load(root / "base")
    folders.save(zoo.perturbed(base.state, 0.02, seed=1), base, root / "expert")
    return root


@pytest.mark.parametrize("name", [*zoo.NAMES, *zoo.CONVOLUTIONAL])
def test_supported_models_are_covered_whole(name: str) -> None:
    assert Anatomy.of(zoo.tiny(name)[0]).uncovered == ()


def test_a_second_tower_no_row_knows_is_named() -> None:
    anatomy = Anatomy.of(half_known())
    assert anatomy.family == "vit"
    assert {key.split(".")[0] for key in anatomy.uncovered} == {"text_model"}
    assert {key.split(".")[-3] for key in anatomy.uncovered} == {"intermediate", "output"}


@pytest.mark.parametrize(
    "extra",
    [
        nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)),
        nn.ModuleList([nn.MultiheadAttention(8, 2)]),
        nn.ModuleList([nn.Conv1d(8, 8, 3)]),
        nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}),
    ],
    ids=["layers", "attention in a list", "convolution", "attention by itself"],
)
def test_whatever_is_beside_a_known_tower_is_seen(extra: nn.Module) -> None:
    model = nn.ModuleDict({"known": zoo.tiny("vit")[0], "extra": extra})
    found = Anatomy.of(model).uncovered
    assert found
    assert all(key.startswith("extra.") for key in found)


@pytest.mark.parametrize(
    "extra",
    [
        nn.ModuleDict({"embed": nn.Embedding(8, 8), "projection": nn.Linear(8, 8)}),
        nn.ModuleDict({"classifier": nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))}),
        nn.ModuleList([nn.Conv2d(3, 8, 4, 2), nn.Conv2d(8, 8, 4, 4), nn.LayerNorm(8)]),
    ],
    ids=["embeddings and a projection", "the head of a task", "patch embeddings"],
)
def test_what_is_no_block_is_not_asked_for(extra: nn.Module) -> None:
    model = nn.ModuleDict({"known": zoo.tiny("vit")[0], "extra": extra})
    assert Anatomy.of(model).uncovered == ()


def test_the_command_refuses_or_says_what_it_left_out(
    models: Path, tmp_path: Path, cli: Cli
) -> None:
    base, expert, out = models / "base", models / "expert", tmp_path / "out"
    for spec in ("params", "mergelock", "full-gauge"):
        code, text = cli("protect", expert, "--base", base, "--defense", spec, "--out", out)
        assert code == 1
        assert "no row of the anatomy covers text_model." in text
        assert "--partial" in text
        assert len(text.strip().splitlines()) == 1
        assert not out.exists()
    arguments = (expert, "--base", base, "--defense", "params", "--out", out, "--partial")
    code, text = cli("protect", *arguments, "--json")
    done = json.loads(text)
    assert code == 0
    assert "partly-covered" in done["flags"]
    assert any(key.startswith("text_model.") for key in done["left_out"])
    assert done["logit_gap"] < 1e-4

    code, text = cli("attack", out, "--base", base, "--attack", "auto", "--out", tmp_path / "back")
    assert code == 1
    assert "--partial" in text
    arguments = (out, "--base", base, "--attack", "gauge-align", "--out", tmp_path / "back")
    code, text = cli("attack", *arguments, "--partial", "--json")
    done = json.loads(text)
    assert code == 0
    assert done["flags"] == ["partly-covered"]
    assert "not looked at: no row of the anatomy covers text_model." in done["found"]["summary"]


def test_a_method_that_looks_at_no_block_treats_the_whole(
    models: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out"
    arguments = (models / "expert", "--base", models / "base", "--defense", "noise", "--out", out)
    code, text = cli("protect", *arguments, "--json")
    assert code == 0
    assert "partly-covered" not in json.loads(text)["flags"]


def test_a_diagnosis_says_what_it_did_not_look_at(models: Path) -> None:
    base, expert = (folders.load(models / name) for name in ("base", "expert"))
    found = diagnose(expert.state, base.state, Anatomy.of(base.model))
    assert "no row of the anatomy covers text_model." in found.missing[0]
    assert found.missing[0] in found.summary


def test_an_anatomy_in_hand_travels_to_another_process_without_its_listener() -> None:
    heard: list[str] = []
    whole = Anatomy("plane", (), (), uncovered=LEFT_OUT, partial=True)
    handed = whole.handed("defense", lambda key, value: heard.append(key))
    assert pickle.loads(pickle.dumps(handed)) == whole
    assert heard == []
    assert handed.attention == ()
    assert handed.units == ()
    assert set(heard) == {"defense.partly-covered"}
    covered = replace(whole, uncovered=())
    assert covered.handed("defense", lambda key, value: None) is covered
    with pytest.raises(MethodError, match=r"covers layer\.0\.attn\.q; go on without"):
        _ = replace(whole, partial=False).handed("attack", lambda key, value: None).mlp


@dataclass(frozen=True)
class HalfPlane(Plane):
    """A testbed of whose base a part is not covered."""

    partial: bool = False

    def anatomy(self) -> Anatomy:
        return Anatomy("plane", (), (), uncovered=LEFT_OUT, partial=self.partial)


@dataclass(frozen=True)
class Lock(Defense):
    card: ClassVar[Card] = Card("looks at the blocks", exact=True)

    def protect(self, victim: Victim, rng: torch.Generator) -> State:
        assert victim.anatomy.attention == ()
        return dict(victim.expert)


@dataclass(frozen=True)
class Unlock(Attack):
    card: ClassVar[Card] = Card("looks at the blocks")
    access: ClassVar[Access] = Access.WEIGHTS

    def recover(self, released: State, knowledge: Knowledge, rng: torch.Generator) -> State:
        assert knowledge.anatomy.units == ()
        return dict(released)


@pytest.mark.parametrize("by", [None, Unlock()], ids=["no attack", "an attack that looks"])
@pytest.mark.parametrize("of", [None, Lock()], ids=["no defense", "a lock"])
@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
def test_a_cell_of_a_part_is_an_error_or_flagged(
    partial: bool, of: Defense | None, by: Attack | None, tmp_path: Path
) -> None:
    """Never protection in silence, nor a failed attack in silence."""
    group = Group(victim="signs", partners=("order",))
    suite = Suite(
        name="plane", description="a linear model", testbed="plane", groups=(group,),
        defenses=("none",), attacks=("none",), mergers=("task-arithmetic",), test=50,
        validation_rungs=(8, 32),
    )  # fmt: skip
    bench = Workbench(
        Named("plane", HalfPlane(partial=partial)), torch.device("cpu"), Store(tmp_path)
    )
    situation = Situation(
        group, 0,
        Named("lock", of) if of else defense("none"),
        Named("unlock", by) if by else attack("none"),
        merger("task-arithmetic"),
    )  # fmt: skip
    cell: Cell = CellMaker(bench, suite).compute("key", situation)
    looked = of is not None or by is not None
    if looked and not partial:
        assert cell.status == "error"
        assert "no row of the anatomy covers layer.0.attn.q" in (cell.reason or "")
        assert cell.protection is None
    else:
        assert cell.status in ("ok", "no-benefit")
        assert ("partly-covered" in cell.flags) == looked
        assert ("defense.partly-covered" in cell.notes) == (of is not None)
        assert ("attack.partly-covered" in cell.notes) == (by is not None)


def _llava_of_one_embedding() -> nn.Module:
    return multimodal.llava(tied=True)


@pytest.mark.parametrize(
    "build",
    [
        multimodal.llava,
        pytest.param(_llava_of_one_embedding, marks=pytest.mark.slow),
        pytest.param(multimodal.blip2, marks=pytest.mark.slow),
    ],
)
def test_towers_that_others_read_are_locked_inside_their_blocks(
    build: Callable[[], nn.Module], tmp_path: Path, cli: Cli
) -> None:
    """LLaVA's projector reads what no norm gives: only what is inside blocks may move there."""
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    base = folders.load(tmp_path / "base")
    folders.save(zoo.perturbed(base.state, 0.02, seed=1), base, tmp_path / "expert")
    assert Anatomy.of(base.model).uncovered == ()
    for spec in ("params", "mergelock", "full-gauge"):
        arguments = ("--base", tmp_path / "base", "--json", "--force", "--defense", spec)
        code, text = cli("protect", tmp_path / "expert", *arguments, "--out", tmp_path / "locked")
        assert code == 0
        assert json.loads(text)["logit_gap"] < 1e-4
        arguments = ("--base", tmp_path / "base", "--json", "--force", "--attack", "gauge-align")
        code, text = cli("attack", tmp_path / "locked", *arguments, "--out", tmp_path / "back")
        done = json.loads(text)
        assert code == 0
        assert done["distance_after"] < 0.03 < 0.5 < done["distance_before"]
        assert "not looked at: gauges outside the blocks" in done["found"]["summary"]


def test_open_clip_with_a_tower_of_timm_is_locked_whole(tmp_path: Path, cli: Cli) -> None:
    """The default of new open_clip models, of which 0 of 163 tensors were locked, and exit 0."""
    import open_clip

    config = {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "test_vit", "image_size": 160, "timm_proj": "linear"},
        "text_cfg": {"context_length": 6, "vocab_size": 40, "width": 32, "heads": 4, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.model.CustomTextCLIP(16, config["vision_cfg"], config["text_cfg"])
    base = tmp_path / "base"
    base.mkdir()
    text = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    (base / "open_clip_config.json").write_text(text)
    save_file(model.state_dict(), base / "open_clip_model.safetensors")
    origin = folders.load(base)
    folders.save(zoo.perturbed(origin.state, 0.02, seed=1), origin, tmp_path / "expert")
    arguments = ("--base", base, "--defense", "mergelock", "--json", "--out", tmp_path / "locked")
    code, text = cli("protect", tmp_path / "expert", *arguments)
    done = json.loads(text)
    assert code == 0
    assert done["left_out"] == []
    assert done["logit_gap"] < 1e-4
    expert, locked = (folders.load(tmp_path / name).state for name in ("expert", "locked"))
    moved = [key for key, value in locked.items() if not torch.equal(value, expert[key])]
    assert sum(key.startswith("visual.trunk.blocks.") for key in moved) >= 2 * 6, (
        "fused queries, keys and values, and outputs"
    )
