"""A release made in the defense's own process, and a foreign forward that stays there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmark.api.contracts import Testbed, Victim
from benchmark.api.registry import file_spec
from benchmark.core.errors import MethodError
from benchmark.core.paths import replacing
from benchmark.core.state import ForeignState, State, digest, to_device
from benchmark.pipeline.apart.lines import (
    Broken,
    pack_generator,
    read_tensors,
    unpack_generator,
    write_tensors,
)
from benchmark.pipeline.apart.method import Apart, serving
from benchmark.pipeline.apart.parcel import Parcel
from benchmark.pipeline.apart.processes import Answers, Folder, Process, found

#: Rows of every forward pass of a foreign model. One number whoever asks, the last batch filled up:
#: the forward must not tell an evaluation from an attack by it.
ROWS = 64


def protect(
    method: Apart,
    testbed: Testbed,
    victim: Victim,
    rng: torch.Generator,
    *,
    resume: Callable[[int], Path],
    notify: Callable[[str], None],
) -> State:
    """What ``method`` releases, on the device of the victim. Tensors it left alone are shared.

    ``resume(n)`` is where the progress of its n-th training is kept; ``notify`` hears of its steps.

    Raises:
        UnmergeBenchError: what the defense raised, one line; MethodError if its process ended.
        KeyboardInterrupt: Ctrl-C, once the progress of its training is kept.
    """
    return _Request(method, testbed, victim, rng, resume, notify).made("protect").state


def ship(
    method: Apart,
    testbed: Testbed,
    victim: Victim,
    released: State,
    rng: torch.Generator,
    *,
    resume: Callable[[int], Path],
    notify: Callable[[str], None],
) -> State:
    """What users of the release run. Of other modules the forward stays in the process.

    Such a :class:`ForeignState` sends inputs and receives features, without gradient. Arguments and
    errors as for :func:`protect`.
    """
    request = _Request(method, testbed, victim, rng, resume, notify, released)
    made = request.made("ship")
    return ForeignState(made.state, _Forward(request, made)) if made.foreign else made.state


class _Made(NamedTuple):
    """What a process handed back; ``foreign``: it is run by a forward of its own, there."""

    state: State
    foreign: bool
    process: Process


class _Request:
    """One release to make. It stays on disk, so that another process can make it again."""

    def __init__(
        self,
        method: Apart,
        testbed: Testbed,
        victim: Victim,
        rng: torch.Generator,
        resume: Callable[[int], Path],
        notify: Callable[[str], None],
        released: State | None = None,
    ) -> None:
        self.method, self.victim = method, victim
        self.bound = (testbed.content_hash(), victim.task.name)
        self._testbed, self._resume, self._notify = testbed, resume, notify
        self._rng = pack_generator(rng)
        self._folder = Folder()
        Parcel.of(testbed, victim, released).write(self.path / "parcel.pt")

    @property
    def path(self) -> Path:
        return self._folder.path

    @property
    def device(self) -> torch.device:
        return next(iter(self.victim.base.values())).device

    def made(self, do: Literal["protect", "ship"]) -> _Made:
        """Have it made by the process that serves this victim."""
        what = f"{self.method.spec} {self.victim.task.name}"
        trainings = _Trainings(self.path, self._resume, what, self._notify)
        answers: Answers = {
            "note": self.note,
            "initialise": self._initialise,
            "training": trainings.begin,
            "step": trainings.step,
        }
        process = serving(self.method, self.bound)
        try:
            said = process.ask(
                do,
                answers,
                folder=str(self.path),
                testbed=file_spec(type(self._testbed)),
                rng=self._rng,
                threads=torch.get_num_threads(),
            )
        finally:
            trainings.keep()
        state = self.taken("release")
        shared = {key: _shared(value, key, self.victim) for key, value in state.items()}
        return _Made(shared, said.get("foreign") is True, process)

    def taken(self, name: str) -> State:
        """The tensors that the process left under ``name``, once."""
        path = self.path / f"{name}.safetensors"
        state = to_device(read_tensors(path), self.device)
        path.unlink()
        return state

    def note(self, said: dict[str, Any]) -> None:
        key = said.get("key")
        if not isinstance(key, str):
            raise Broken("the defense's process noted something under no name")
        self.victim.note(key, said.get("value"))

    def _initialise(self, said: dict[str, Any]) -> dict[str, Any]:
        rng = unpack_generator(said.get("rng"))
        write_tensors(self.path / "initial.safetensors", self._testbed.initialise(rng))
        return {"rng": pack_generator(rng)}


class _Forward:
    """Features from the process where the model is; made there again if it has ended.

    They have the shape and kind that the testbed's own forward gives: any other could pass for
    answers.
    """

    def __init__(self, request: _Request, made: _Made) -> None:
        self._request, self._process, self._shipped = request, made.process, made.state
        self._sent: State = made.state
        self._number = 0  # of the State last sent; 0 is the shipped one, which is there
        self._wanted: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, state: State, inputs: Mapping[str, Tensor]) -> Tensor:
        process = self._serving()
        number = self._known(state)
        like = self._like(inputs)
        rows = len(next(iter(inputs.values())))
        parts = [like] if not rows else []
        for start in range(0, rows, ROWS):
            count = min(ROWS, rows - start)
            index = start + torch.arange(ROWS) % count
            batch = {name: value[index.to(value.device)] for name, value in inputs.items()}
            parts.append(self._batch(process, number, batch, like)[:count])
        return torch.cat(parts)

    def _like(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the testbed's own forward makes of such inputs, without a row."""
        kind = tuple((name, value.shape[1:]) for name, value in sorted(inputs.items()))
        if kind not in self._wanted:
            victim = self._request.victim
            one = {name: value[:1] for name, value in inputs.items()}
            with torch.inference_mode():
                self._wanted[kind] = victim.features(victim.base, one)[:0]
        return self._wanted[kind]

    def _batch(
        self, process: Process, number: int, batch: Mapping[str, Tensor], like: Tensor
    ) -> Tensor:
        request = self._request
        write_tensors(request.path / "inputs.safetensors", batch)
        answers = {"note": request.note}
        process.ask("forward", answers, folder=str(request.path), state=number)
        features = request.taken("features").get("features")
        shape = (ROWS, *like.shape[1:])
        if (
            features is None
            or features.shape != shape
            or features.is_floating_point() != like.is_floating_point()
        ):
            gave = "none" if features is None else f"{features.dtype} {tuple(features.shape)}"
            kind = "floating-point" if like.is_floating_point() else "tokens"
            raise MethodError(
                f"{request.method.spec}: the shipped forward gives {gave} for {ROWS} inputs; "
                f"features are {kind}, {shape}"
            )
        return features

    def _serving(self) -> Process:
        process = found(self._request.method.spec, self._request.bound)
        if process is None or process is not self._process:
            made = self._request.made("ship")
            if digest(made.state) != digest(self._shipped):
                raise MethodError(
                    f"{self._request.method.spec} ships another model when asked again; "
                    "take all randomness from rng"
                )
            self._process = made.process
        return self._process

    def _known(self, state: State) -> int:
        """The number under which the process finds these tensors; written for it if need be."""
        for number, known in ((0, self._shipped), (self._number, self._sent)):
            if state.keys() == known.keys() and all(state[key] is known[key] for key in known):
                return number
        (self._request.path / f"state-{self._number}.safetensors").unlink(missing_ok=True)
        self._number, self._sent = self._number + 1, dict(state)
        write_tensors(self._request.path / f"state-{self._number}.safetensors", state)
        return self._number


def _count(said: Mapping[str, Any], name: str) -> int:
    value = said.get(name)
    if not isinstance(value, int) or not 0 <= value < 10**9:
        raise Broken(f"the defense's process sent no {name}")
    return value


def _shared(value: Tensor, key: str, victim: Victim) -> Tensor:
    """The victim's own tensor where ``value`` is that, bit for bit: a merge copies what moved."""
    for state in (victim.expert, victim.base):
        own = state.get(key)
        if own is not None and own.shape == value.shape and own.dtype == value.dtype:
            bits = (t.contiguous().reshape(-1).view(torch.uint8) for t in (own, value))
            if torch.equal(*bits):
                return own
    return value


class _Trainings:
    """The resume files of one release: copies in its folder, kept up to date where they belong.

    The defense is not told where that is: it is beside data it must not have.
    """

    def __init__(
        self,
        folder: Path,
        resume: Callable[[int], Path],
        what: str,
        notify: Callable[[str], None],
    ) -> None:
        self._folder, self._resume = folder, resume
        self._what, self._notify = what, notify
        self._kept: dict[int, int] = {}  # number → when the copy was last changed

    def begin(self, said: dict[str, Any]) -> dict[str, Any]:
        number = _count(said, "number")
        copy, kept = self._copy(number), self._resume(number)
        if kept.exists():
            shutil.copyfile(kept, copy)
        self._kept[number] = self._changed(number)
        return {"path": str(copy)}

    def step(self, said: dict[str, Any]) -> None:
        step, steps = _count(said, "step"), _count(said, "steps")
        self.keep()
        self._notify(f"training {self._what}: step {step}/{steps}")

    def keep(self) -> None:
        """Put what has changed where it belongs."""
        for number, before in self._kept.items():
            changed = self._changed(number)
            if changed != before:
                with replacing(self._resume(number)) as temporary:
                    shutil.copyfile(self._copy(number), temporary)
                self._kept[number] = changed

    def _copy(self, number: int) -> Path:
        return self._folder / f"training-{number}.pt"

    def _changed(self, number: int) -> int:
        copy = self._copy(number)
        return copy.stat().st_mtime_ns if copy.exists() else 0
