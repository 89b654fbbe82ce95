"""The child's end: ``python -m benchmark.pipeline.apart.child FOLDER``, told what to do on stdin.

Only this program imports what a defense's author wrote.
"""

from __future__ import annotations

import itertools
import os
import queue
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from benchmark.anatomy import Anatomy
from benchmark.api import methods
from benchmark.api.contracts import Card, Defense, Testbed, Victim
from benchmark.api.recipe import Batch, Loss, Recipe
from benchmark.core.data import Split, Task
from benchmark.core.errors import (
    AccessError,
    MethodError,
    UnmergeBenchError,
    UsageError,
    first_line,
)
from benchmark.core.state import ForeignState, State, to_device
from benchmark.learn.training import fine_tune
from benchmark.pipeline.apart import lines
from benchmark.pipeline.apart.lines import (
    pack_generator,
    read_tensors,
    unpack_generator,
    write_tensors,
)
from benchmark.pipeline.apart.parcel import Parcel

#: Where no defense of anybody else's lies.
_LIBRARIES = (str(Path(__file__).parents[2]), os.path.dirname(os.__file__) + os.sep)


class Line:
    """The pipe to the parent. Ends this program when the parent's end closes."""

    def __init__(self, source: BinaryIO, sink: BinaryIO, root: Path) -> None:
        self.folders = {root}
        self._source, self._sink = source, sink
        self._heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock = threading.RLock()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while (message := lines.receive(self._source)) is not None:
            self._heard.put(message)
        # Who asked is gone, whatever is being computed: nobody else clears up after it.
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    def hear(self) -> dict[str, Any]:
        return self._heard.get()

    def say(self, what: str, **content: Any) -> None:
        with self._lock:
            lines.send(self._sink, {"say": what, **content})

    def ask(self, what: str, **content: Any) -> dict[str, Any]:
        """Say something and wait for the reply."""
        with self._lock:
            self.say(what, **content)
            return self.hear()


@dataclass(frozen=True)
class Owned(Testbed):
    """The testbed as an owner has it: one task without test split, and the public base."""

    parcel: Parcel
    folder: Path
    line: Line
    card: ClassVar[Card] = Card(summary="what the owner of one expert has")

    @property
    def tasks(self) -> tuple[str, ...]:
        return (self.parcel.task.name,)

    @property
    def recipe(self) -> Recipe:
        return self.parcel.recipe

    @property
    def threads(self) -> int | None:  # type: ignore[override]  # a class has one, this has its own
        return self.parcel.threads

    def content_hash(self) -> str:
        return self.parcel.content

    def base(self) -> State:
        return to_device(self.parcel.base, "cpu")

    def module(self) -> torch.nn.Module:
        return self.parcel.arena.module()

    def anatomy(self) -> Anatomy:
        return self.parcel.anatomy

    def task(self, name: str) -> Task:
        if name != self.parcel.task.name:
            raise AccessError(f"the owner of {self.parcel.task.name} has no data of {name!r}")
        return self.parcel.task.to("cpu")

    def initialise(self, rng: torch.Generator) -> State:
        """Drawn by the parent, which has the testbed's files."""
        reply = self.line.ask("initialise", rng=pack_generator(rng))
        rng.set_state(unpack_generator(reply["rng"]).get_state())
        return read_tensors(self.folder / "initial.safetensors")

    def loss(self, state: State, batch: Batch) -> Tensor:
        own = getattr(self.parcel.arena, "loss", super().loss)
        return own(state, batch)

    def features(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.parcel.arena.features(state, inputs)

    def victim(self) -> Victim:
        parcel = self.parcel
        numbers = itertools.count()

        def progress(step: int, steps: int) -> None:
            self.line.say("step", step=step, steps=steps)

        def train(
            start: State,
            examples: Mapping[str, Split],
            rng: torch.Generator,
            *,
            recipe: Recipe | None = None,
            loss: Loss | None = None,
        ) -> State:
            tasks = {name: self.task(name) for name in examples}
            resume = Path(self.line.ask("training", number=next(numbers))["path"])
            return fine_tune(
                self, tasks, start, examples, rng,
                recipe=recipe, loss=loss, progress=progress, resume=resume,
            )  # fmt: skip

        def note(key: str, value: object) -> None:
            self.line.say("note", key=key, value=value)

        return Victim(
            base=parcel.base,
            expert=parcel.expert,
            anatomy=parcel.anatomy.handed("defense", note),
            task=parcel.task,
            recipe=parcel.recipe,
            fine_tune=train,
            initialise=lambda rng: to_device(self.initialise(rng), parcel.device),
            features=self.features,
            module=self.module(),
            note=note,
            loss=self.loss,
        )


@dataclass(frozen=True)
class _Model:
    """A foreign model that is run here; ``states``: the last one sent in place of its own."""

    shipped: ForeignState
    device: torch.device
    states: dict[int, State]

    def state(self, number: int, folder: Path) -> State:
        if number == 0:
            return self.shipped
        if number not in self.states:
            self.states.clear()
            read = read_tensors(folder / f"state-{number}.safetensors")
            self.states[number] = to_device(read, self.device)
        return self.states[number]


class Child:
    """Does what the parent asks; what each returns goes into ``done``."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._method: Defense
        self._models: dict[Path, _Model] = {}

    def describe(self, spec: str) -> dict[str, Any]:
        named = methods.defense(spec)
        self._method = named.method
        card = getattr(named.method, "card", None)
        if not isinstance(card, Card):
            raise UsageError(f'{spec} has no card; give it card: ClassVar[Card] = Card("...")')
        changes = bool(named.method.changes_modules)
        return {"spec": named.spec, "card": asdict(card), "changes_modules": changes}

    def protect(self, rng: str, **given: Any) -> dict[str, Any]:
        owned = self._owned(**given)
        state = self._method.protect(owned.victim(), unpack_generator(rng))
        return self._hand_over(state, owned.folder, "protect")

    def ship(self, rng: str, **given: Any) -> dict[str, Any]:
        owned = self._owned(**given)
        released = owned.parcel.released
        assert released is not None
        state = self._method.shipped(owned.victim(), dict(released), unpack_generator(rng))
        # A folder that is gone belonged to a model that nobody runs any more.
        self._models = {path: model for path, model in self._models.items() if path.exists()}
        if isinstance(state, ForeignState):
            self._models[owned.folder] = _Model(state, owned.parcel.device, {})
        done = self._hand_over(state, owned.folder, "shipped")
        return {**done, "foreign": isinstance(state, ForeignState)}

    def forward(self, folder: str, state: int) -> dict[str, Any]:
        path = Path(folder)
        model = self._models[path]
        inputs = to_device(read_tensors(path / "inputs.safetensors"), model.device)
        with torch.inference_mode():
            features = model.shipped.forward(model.state(state, path), inputs)
        return self._hand_over({"features": features}, path, "the shipped forward", "features")

    def _owned(self, folder: str, testbed: str | None, threads: int) -> Owned:
        path = Path(folder)
        self._line.folders.add(path)
        torch.set_num_threads(threads)
        if testbed is not None:
            methods.TESTBEDS.get(testbed)  # its module, which the parcel names
        return Owned(Parcel.read(path / "parcel.pt"), path, self._line)

    def _hand_over(
        self, state: object, folder: Path, what: str, name: str = "release"
    ) -> dict[str, Any]:
        if not isinstance(state, Mapping):
            raise MethodError(
                f"{what} returns a {type(state).__name__}; return a State, names → tensors"
            )
        for key, value in state.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise MethodError(
                    f"{what} returns a {type(value).__name__} as {key!r}; return tensors by name"
                )
        write_tensors(folder / f"{name}.safetensors", state)
        return {}


def serve(line: Line) -> None:
    """Until the parent hangs up, or Ctrl-C."""
    child = Child(line)
    tasks: dict[str, Callable[..., dict[str, Any]]] = {
        "describe": child.describe,
        "protect": child.protect,
        "ship": child.ship,
        "forward": child.forward,
    }
    while True:
        try:
            message = line.hear()
            done = tasks[message.pop("do")](**message)
        except KeyboardInterrupt:
            return
        except BaseException as error:  # whatever it raises is an answer
            line.say("failed", **_told(error))
        else:
            line.say("done", **done)


def _told(error: BaseException) -> dict[str, str]:
    """An error of ours in its own words; any other by its type, its words and where it arose."""
    trace = "".join(traceback.format_exception(error))[-100_000:]
    if isinstance(error, UnmergeBenchError):
        ours = next(c for c in type(error).__mro__ if c.__module__ == UnmergeBenchError.__module__)
        return {"kind": ours.__name__, "text": str(error), "traceback": trace}
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(_LIBRARIES)] or frames
    own = [f for f in theirs if "site-packages" not in f.filename] or theirs
    kind, words = type(error).__name__, first_line(error)
    said = kind if words == kind else f"{kind}: {words}"
    where = f" in {Path(own[-1].filename).name}:{own[-1].lineno}"
    return {"kind": "MethodError", "text": said + where, "traceback": trace}


def main() -> None:
    root = Path(sys.argv.pop())
    # The pipes are ours alone: what a defense prints goes to stderr, and it reads nothing.
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve(Line(source, sink, root))
    os._exit(130)  # whatever else runs here has no say in when it ends


if __name__ == "__main__":
    main()
