"""``protect``, ``attack``, ``merge``: one method on checkpoint folders, without a testbed."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmark.cli.output import (
    AsAdapter,
    BaseHead,
    Device,
    Force,
    Json,
    Partial,
    Rank,
    Seed,
    steps,
)
from benchmark.core.errors import UsageError

Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")]
Base = Annotated[Path, typer.Option("--base", metavar="DIR", help="The public base model.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command("protect")(protect)
    app.command("attack")(attack)
    app.command("merge")(merge)


def protect(
    expert: Annotated[Path, typer.Argument(metavar="EXPERT", help="Folder of the expert.")],
    base: Base,
    defense: Annotated[
        str,
        typer.Option(
            "--defense", metavar="SPEC", help="NAME, NAME(parameter=value), A+B or file.py:Class."
        ),
    ],
    out: Out,
    adapter: AsAdapter = None,
    rank: Rank = None,
    seed: Seed = 0,
    device: Device = "auto",
    base_head: BaseHead = None,
    partial: Partial = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Protect an expert before you release it.

    Post-hoc defenses only: those that need no data.

    EXPERT and --base: folders of one architecture (transformers, open_clip, diffusers: models or
    pipelines). EXPERT may be a LoRA adapter of --base (a PEFT folder, or diffusers' own format).

    The seed is a key, with which some defenses are undone: keep it secret.

    [bold]Examples[/bold]

      unmergebench protect EXPERT --base BASE --defense params --out RELEASED

      unmergebench protect EXPERT --base BASE --defense mergelock+params --seed 7 --out OUT
    """  # fmt: skip
    import torch

    from benchmark.anatomy import Anatomy
    from benchmark.api import methods
    from benchmark.cli import adapters
    from benchmark.cli.single import RUN, changed, check_result, needs_data, report, victim
    from benchmark.core.device import resolve
    from benchmark.core.state import half, norm_growth, rounded, rounded_again, to_device
    from benchmark.evaluation import probe
    from benchmark.evaluation.flags import PARTLY_COVERED, of_release
    from benchmark.io import folders

    method = methods.defense(defense)
    if method.method.card.trains:
        raise needs_data("defense", method.spec, "task data or training")
    if method.method.changes_modules:
        raise UsageError(
            f"defense {method.spec} changes modules, and a folder holds weights only; {RUN}"
        )
    where = resolve(device)
    adapters.check(adapter, rank)
    folders.check_out(out, [expert, base], force)
    with steps(4) as step:
        step("reading")
        members = adapters.read(base, [(expert, "expert")], base_head)
        source, origin = members.checkpoints[0], members.origin
        anatomy = replace(Anatomy.of(source.model), partial=partial)
        notes: dict[str, object] = {}
        step(method.spec)
        theta, theta0 = to_device(source.state, where), to_device(origin.state, where)
        started = time.perf_counter()
        released = method.method.protect(
            victim(theta0, theta, anatomy.handed("defense", notes.__setitem__), method.spec),
            torch.Generator().manual_seed(seed),
        )
        seconds = time.perf_counter() - started
        check_result(released, theta0, method.spec)
        step("comparing outputs")
        gap = probe.gap(source, theta, released)
        if half(theta):  # what the method does and what rounding does to it are one figure
            other = rounded_again(theta, torch.Generator().manual_seed(0))
            rounding = {"expert": probe.gap(source, theta, other), "released": gap}
        else:
            rounding = {
                "expert": probe.gap(source, theta, rounded(theta)),
                "released": probe.gap(source, released, rounded(released)),
            }
        growth = norm_growth(released, theta)
        step("writing")
        written = adapters.write(
            released, members, members.formats[0], [0], out,
            adapter=adapter, rank=rank, force=force, sources=[base, expert],
        )  # fmt: skip
    raised = of_release(
        method.method.card,
        anatomy.qk_gauge,
        None if half(theta) else gap,
        growth,
        rounding["released"],
        rounding["expert"],
    ) | {PARTLY_COVERED: bool(notes)}
    result = {
        "defense": method.spec,
        "summary": method.method.card.summary,
        "exact": method.method.card.exact,
        "changed_tensors": changed(released, theta),
        "tensors": len(theta),
        "distance_before": probe.relative_distance(theta, theta0, anatomy),
        "distance_after": probe.relative_distance(released, theta0, anatomy),
        "logit_gap": gap,
        "bfloat16_gap": rounding,
        "norm_growth": growth,
        "left_out": list(anatomy.uncovered) if notes else [],
        "flags": [flag for flag, is_raised in raised.items() if is_raised],
        "seconds": seconds,
        "seed": seed,
        **written,
        "out": str(out),
    }
    report(result, as_json, against="the expert")


def attack(
    released: Annotated[
        Path, typer.Argument(metavar="RELEASED", help="Folder of the protected model.")
    ],
    base: Base,
    attack_: Annotated[
        str,
        typer.Option(
            "--attack", metavar="SPEC", help="NAME, NAME(parameter=value), A+B or file.py:Class."
        ),
    ],
    out: Out,
    partner: Annotated[
        list[Path] | None,
        typer.Option("--partner", metavar="DIR", help="An expert of your own; may be repeated."),
    ] = None,
    adapter: AsAdapter = None,
    rank: Rank = None,
    seed: Seed = 0,
    device: Device = "auto",
    base_head: BaseHead = None,
    partial: Partial = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Attack a protected checkpoint with the weights alone.

    It says what the release looks like, what is left of it, and writes what it recovered.

    Attacks that need data run in `unmergebench run`. RELEASED and partners may be LoRA adapters of
    --base (PEFT folders).

    [bold]Examples[/bold]

      unmergebench attack RELEASED --base BASE --attack auto --out RECOVERED

      unmergebench attack RELEASED --base BASE --attack gauge-align --out OUT --json

      unmergebench attack RELEASED --base BASE --attack head-norm+weight-matching --out OUT
    """  # fmt: skip
    import torch

    from benchmark.anatomy import Anatomy
    from benchmark.anatomy.diagnosis import diagnose
    from benchmark.api import methods
    from benchmark.api.contracts import Access, Knowledge
    from benchmark.cli import adapters
    from benchmark.cli.single import (
        changed,
        check_result,
        check_unmoved,
        needs_data,
        report,
    )
    from benchmark.core.device import resolve
    from benchmark.core.state import to_device
    from benchmark.evaluation import probe
    from benchmark.evaluation.flags import PARTLY_COVERED
    from benchmark.io import folders

    method = methods.attack(attack_)
    if method.method.access > Access.WEIGHTS:
        raise needs_data("attack", method.spec, f"{method.method.access.label} data")
    where = resolve(device)
    others = partner or []
    adapters.check(adapter, rank)
    folders.check_out(out, [released, base, *others], force)
    with steps(5) as step:
        step("reading")
        read = adapters.read(
            base,
            [(released, "released model"), *((path, "partner") for path in others)],
            base_head,
        )
        (source, *partners), origin = read.checkpoints, read.origin
        anatomy = replace(Anatomy.of(source.model), partial=partial)
        notes: dict[str, object] = {}
        step(method.spec)
        before, theta0 = to_device(source.state, where), to_device(origin.state, where)
        knowledge = Knowledge(
            Access.WEIGHTS,
            theta0,
            [to_device(p.state, where) for p in partners],
            anatomy.handed("attack", notes.__setitem__),
        )
        started = time.perf_counter()
        members = method.method.members(before, knowledge, torch.Generator().manual_seed(seed))
        seconds = time.perf_counter() - started
        check_unmoved(members.base, theta0, method.spec)
        for moved, was in zip(members.partners, knowledge.partners, strict=True):
            check_unmoved(moved, was, method.spec)
        recovered = members.released
        check_result(recovered, theta0, method.spec)
        step("comparing weights")
        found = diagnose(before, theta0, anatomy, recovered)
        step("comparing outputs")
        gap = probe.gap(source, before, recovered)
        step("writing")
        written = adapters.write(
            recovered, read, read.formats[0], [0], out,
            adapter=adapter, rank=rank, force=force, sources=[base, released, *others],
        )  # fmt: skip
    result = {
        "attack": method.spec,
        "summary": method.method.card.summary,
        "found": found.to_dict(),
        "left_out": list(anatomy.uncovered) if notes else [],
        "flags": [PARTLY_COVERED] if notes else [],
        "changed_tensors": changed(recovered, before),
        "tensors": len(before),
        "distance_before": probe.relative_distance(before, theta0, anatomy),
        "distance_after": probe.relative_distance(recovered, theta0, anatomy),
        "logit_gap": gap,
        "seconds": seconds,
        "seed": seed,
        **written,
        "out": str(out),
    }
    report(result, as_json, against="the released model")


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder of the public base model.")],
    experts: Annotated[
        list[Path], typer.Argument(metavar="EXPERT...", help="Folders of the models to merge.")
    ],
    out: Out,
    merger: Annotated[
        str,
        typer.Option(
            "--merger", metavar="SPEC", help="NAME, NAME(parameter=value) or file.py:Class."
        ),
    ] = "task-arithmetic",
    coefficients: Annotated[
        str | None,
        typer.Option(
            "--coefficients",
            metavar="C,C,...",
            help="One per expert, in order; 0 leaves it out. For slerp 1-t,t. "
            "Bands of layers are separated by semicolons: '1,0.5;0.5,1'.",
        ),
    ] = None,
    adapter: AsAdapter = None,
    rank: Rank = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Merge fine-tuned models of one base.

    The result is written in the format of BASE. EXPERTs may be LoRA adapters of BASE (PEFT
    folders); the merge of adapters is written as one.

    A model whose tensors differ in name or shape from BASE is refused.

    [bold]Examples[/bold]

      unmergebench merge BASE EXPERT_A EXPERT_B --coefficients 0.7,0.7 --out MERGED

      unmergebench merge BASE A B --merger ties --coefficients 0.5,0.5 --out MERGED

      unmergebench merge BASE A B --merger slerp --coefficients 0.6,0.4 --out MERGED

      unmergebench merge BASE A B --merger 'mergekit/ties(density=0.2, via=command-line)' \\
      --coefficients 0.5,0.5 --out MERGED --json
    """  # fmt: skip
    import torch

    from benchmark.api import methods
    from benchmark.api.contracts import Access
    from benchmark.cli import adapters, single
    from benchmark.cli.single import changed, check_result, needs_data, report
    from benchmark.core.device import resolve
    from benchmark.core.state import to_device
    from benchmark.evaluation import probe
    from benchmark.io import folders
    from benchmark.merging.folderwise import merge_folders

    method = methods.merger(merger)
    if method.method.access > Access.WEIGHTS or method.method.task_aware:
        raise needs_data("merger", method.spec, "more than weights")
    if coefficients is not None:
        setting = single.setting(coefficients, len(experts))
    else:
        space = method.method.search_space(len(experts))
        if len(space) != 1:
            raise UsageError(
                f"{method.spec} needs --coefficients, one per expert, such as "
                f"--coefficients {','.join(['0.5'] * len(experts))}"
            )
        setting = space[0]
    where = resolve(device)
    adapters.check(adapter, rank)
    folders.check_out(out, [base, *experts], force)
    with steps(3) as step:
        step("reading")
        members = adapters.read(base, [(path, "expert") for path in experts])
        origin = members.origin
        if any(members.adapters) and getattr(method.method, "via", "") == "command-line":
            raise UsageError(f"{method.spec} reads models only; merge adapters with via=memory")
        step(method.spec)
        theta0 = to_device(origin.state, where)
        started = time.perf_counter()
        merged, record = merge_folders(
            method.method,
            replace(origin, state=theta0),
            experts,
            [to_device(member.state, where) for member in members.checkpoints],
            setting,
            torch.Generator().manual_seed(seed),
        )
        seconds = time.perf_counter() - started
        check_result(merged, theta0, method.spec)
        step("writing")
        written = adapters.write(
            merged, members, members.stored, range(len(experts)), out,
            adapter=adapter, rank=rank, force=force, sources=[base, *experts],
        )  # fmt: skip
    result = {
        "merger": method.spec,
        "summary": method.method.card.summary,
        "experts": [str(path) for path in experts],
        "setting": setting.to_dict(),
        **({"tool": record} if record else {}),
        "changed_tensors": changed(merged, theta0),
        "tensors": len(theta0),
        "distance_after": probe.relative_distance(merged, theta0, None),
        "seconds": seconds,
        "seed": seed,
        **written,
        "out": str(out),
    }
    report(result, as_json)
