"""What protect, attack and merge share: members from folders, checks on a result, its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch

from benchmark.anatomy import Anatomy
from benchmark.api.contracts import Setting, Victim
from benchmark.cli.output import console, facts, print_json
from benchmark.core.errors import MethodError, UnmergeBenchError, UsageError
from benchmark.core.state import State, compatible

RUN = "`unmergebench run` gives it a testbed"


class _NoData:
    """Stands where a testbed would supply data or training; any use of it says what to do."""

    def __init__(self, spec: str) -> None:
        self._spec = spec

    def _refuse(self) -> NoReturn:
        raise needs_data("defense", self._spec, "task data or training")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle probe for these
            raise AttributeError(name)
        self._refuse()

    def __call__(self, *arguments: object, **named: object) -> Any:
        self._refuse()


def needs_data(kind: str, spec: str, what: str) -> UsageError:
    """The refusal of a method that cannot work on folders."""
    return UsageError(f"{kind} {spec} needs {what}, and folders give weights only; {RUN}")


def victim(base: State, expert: State, anatomy: Anatomy, spec: str) -> Victim:
    """What the owner of a folder has: two States and the anatomy; the rest refuses."""
    absent = cast(Any, _NoData(spec))
    return Victim(
        base=base,
        expert=expert,
        anatomy=anatomy,
        task=absent,
        recipe=absent,
        fine_tune=absent,
        initialise=absent,
        features=absent,
        module=absent,
    )


def check_result(state: State, base: State, spec: str) -> None:
    """A method's result, held to the contract before anything is written."""
    try:
        compatible(state, base, f"the result of {spec}")
    except UnmergeBenchError as error:
        raise MethodError(f"{error}; nothing was written") from None


def check_unmoved(now: State, before: State, spec: str) -> None:
    """Refuse an attack that re-expresses the other members too: one folder cannot hold that."""
    if changed(now, before):
        raise UsageError(
            f"attack {spec} also moves the base or the partners, so its result cannot be merged "
            f"with them as they are; {RUN}"
        )


def changed(now: State, before: State) -> int:
    """Number of tensors that differ."""
    return sum(v is not before[k] and not torch.equal(v, before[k]) for k, v in now.items())


def setting(text: str, members: int) -> Setting:
    """``"0.7,0.7"``: one coefficient per member; ``"1,0.5;0.5,1"``: the same for each band of
    layers, first layers first.
    """
    return Setting.by_layer([_coefficients(band, members) for band in text.split(";")])


def _coefficients(text: str, members: int) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--coefficients {text!r}: write numbers, such as 0.7,0.7") from None
    if len(values) != members:
        raise UsageError(f"--coefficients gives {len(values)} numbers for {members} experts")
    if not all(math.isfinite(value) for value in values):
        raise UsageError(f"--coefficients {text!r}: coefficients must be finite")
    return values


def report(result: dict[str, Any], as_json: bool, against: str = "") -> None:
    """Print what was done, as JSON or for people."""
    if as_json:
        print_json(result)
        return
    rows: list[tuple[str, object]] = [("what", result["summary"])]
    if "found" in result:
        rows.append(("found", result["found"]["summary"]))
    if "setting" in result:
        chosen = result["setting"]
        bands = chosen.get("layers", [chosen["coefficients"]])
        rows.append(("coefficients", "; ".join(", ".join(f"{c:g}" for c in b) for b in bands)))
    rows.append(("tensors changed", f"{result['changed_tensors']} of {result['tensors']}"))
    distance = f"{result['distance_after']:.2%}"
    if "distance_before" in result:
        distance = f"{result['distance_before']:.2%} → {distance}"
    rows.append(("distance from the base", distance))
    if against:
        gap = result["logit_gap"]
        shown = (
            "not checked: no random inputs known for this model" if gap is None else f"{gap:.1e}"
        )
        rows.append(("max relative |Δlogit|", f"{shown} (against {against}, random inputs)"))
    if "bfloat16_gap" in result:
        values = result["bfloat16_gap"].values()
        shown = " → ".join("not checked" if value is None else f"{value:.1e}" for value in values)
        rows.append(("|Δlogit| from bfloat16", f"{shown} (expert → released)"))
        rows.append(("largest norm growth", f"{result['norm_growth']:.1f}×"))
    rows += [("seconds", f"{result['seconds']:.2f}"), ("seed", result["seed"])]
    if result["format"] == "adapter":
        error = f"{result['relative_error']:.1e} of ‖τ‖ lost"
        rows.append(("LoRA adapter", f"rank {result['rank']}, {error}"))
    elif "not_an_adapter" in result:
        rows.append(("whole model", f"not an adapter: {result['not_an_adapter']}"))
    if result.get("left_out"):
        rows.append(("left out", _some(result["left_out"])))
    if "lifted" in result:
        rows.append(("computed in float32", f"{result['lifted']}; written as the base"))
    if result["left_behind"]:
        rows.append(("not copied", _some(result["left_behind"])))
    if result.get("flags"):
        rows.append(("flags", f"{', '.join(result['flags'])} (see unmergebench explain)"))
    rows.append(("written", result["out"]))
    name = next(result[kind] for kind in ("defense", "attack", "merger") if kind in result)
    console().print(facts(name, rows))


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
