"""The checks of an attack: those of any method, and what it knows, spends, recovers and merges."""

from __future__ import annotations

import torch

from benchmark.api import methods
from benchmark.api.contracts import Ensemble, Members, Merger, Setting
from benchmark.conformance import behaviour, definition, honesty, tiers
from benchmark.conformance.behaviour import equal, fit, fits
from benchmark.conformance.case import REFUSALS, Result
from benchmark.conformance.defenses import EXACT
from benchmark.conformance.frame import CheckFailed, Checks
from benchmark.conformance.scenes import MERGER, AttackCase, Scene
from benchmark.conformance.subjects import accuracy, logits
from benchmark.conformance.testbed import Tiny
from benchmark.core.errors import UsageError
from benchmark.core.state import State, digest
from benchmark.evaluation.accuracy import relative_gap

check: Checks[AttackCase] = Checks("attack")
check.include(definition.check)
check.include(behaviour.check)
check.include(honesty.check)
check.include(tiers.check)


@check
def members(case: AttackCase) -> None:
    """``members`` gives Members, as many partners as it got, and the State ``recover`` gives."""
    inputs = case.scene()
    rng = torch.Generator().manual_seed(0)
    found = case.method.members(inputs.released, inputs.knowledge, rng)
    if not isinstance(found, Members):
        raise CheckFailed(f"members returns {type(found).__name__}, not Members")
    if len(found.partners) != len(inputs.knowledge.partners):
        raise CheckFailed(f"members gives {len(found.partners)} partners of 1")
    rng.manual_seed(0)
    inputs = case.scene()
    alone = case.method.recover(inputs.released, inputs.knowledge, rng)
    equal({"released": alone}, {"released": found.released}, "recover, unlike members,")


@check
def equivalence(case: AttackCase) -> str:
    """If its card says exact, all members keep their logits (1e-4 of the largest, float32)."""
    found = {}
    for architecture in case.accepted():
        inputs = case.scene(Tiny(architecture))
        if not case.method.card.exact:
            before = accuracy(architecture, inputs.released)
            after = accuracy(architecture, case.on(architecture)["the recovered model"])
            found[architecture] = f"{architecture} {before:.2f} → {after:.2f}"
            continue
        gap = 0.0
        for name, state in _given(inputs).items():
            after_attack = logits(architecture, case.on(architecture)[name])
            moved = relative_gap(after_attack, logits(architecture, state))
            if not moved <= EXACT:
                raise CheckFailed(
                    f"card.exact, but the logits of {name} move by {moved:.1e} of the largest "
                    f"on {architecture}"
                )
            gap = max(gap, moved)
        found[architecture] = f"{architecture} {gap:.1e}"
    if not found:
        raise CheckFailed("no result to compare")
    what = "|Δlogit|" if case.method.card.exact else "not exact by its card; accuracy"
    return f"{what}: {', '.join(found.values())}"


@check
def undefended(case: AttackCase) -> str:
    """On an expert that nothing protects it gives a model that still runs; how good, it tells."""
    inputs = case.scene(lock=False)
    architecture = case.testbed.architecture
    before = accuracy(architecture, inputs.released)
    result = case.run(inputs)
    fit(result, case.testbed.base())
    after = accuracy(architecture, result["the recovered model"])
    return f"accuracy {before:.2f} → {after:.2f}"


@check
def partners(case: AttackCase) -> str | None:
    """It works with two partners as with one; without any, or refuses by a MethodError."""
    base = case.testbed.base()
    inputs = case.scene(partners=2)
    result = case.run(inputs)
    fit(result, base)
    if len([name for name in result if name.startswith("partner ")]) != 2:
        raise CheckFailed("of two partners it does not give two back")
    try:
        fit(case.run(case.scene(partners=0)), base)
    except REFUSALS as refusal:
        return f"without partners: {refusal}"
    return None


@check
def foreign_modules(case: AttackCase) -> None:
    """Where users run other modules (knowledge.shipped), it still gives the base's tensors."""
    result = case.run(case.scene().foreign(case.testbed))
    fit(result, case.testbed.base())


@check
def merging(case: AttackCase) -> str:
    """``merging`` gives a Merger with settings to try, whose merges fit and repeat bit for bit."""
    inputs = case.scene()
    merger = case.method.merging(methods.merger(MERGER).method, case.testbed.anatomy())
    if not isinstance(merger, Merger):
        raise CheckFailed(f"merging returns {type(merger).__name__}, not a Merger")
    sizes = []
    for count in (2, 3):
        settings = merger.search_space(count)
        if not settings:
            raise CheckFailed(f"the search space for {count} members is empty")
        for setting in settings:
            if not isinstance(setting, Setting) or len(setting.coefficients) != count:
                raise CheckFailed(f"setting {setting} has not one coefficient for each of {count}")
        sizes.append(f"{len(settings)} settings for {count} members")
    result = case.result
    experts = [state for name, state in result.items() if name not in ("the base", _REFINED)]
    setting = merger.search_space(len(experts))[-1]

    def merge() -> State:
        rng = torch.Generator().manual_seed(0)
        return merger.prepare(result["the base"], experts, None, rng)(setting)

    merged = merge()
    fits(merged, inputs.knowledge.base, "the merged model")
    equal({"the merge": merge()}, {"the merge": merged}, "a second merge with the same seed")
    return ", ".join(sizes)


@check
def refine(case: AttackCase) -> str | None:
    """``refine`` gives a model that runs; an attack whose ``refines`` is false leaves it alone."""
    inputs = case.scene()
    rng = torch.Generator().manual_seed(0)
    refined = case.method.refine(inputs.merged, inputs.knowledge, rng)
    fits(refined, inputs.knowledge.base, _REFINED)
    if not case.method.refines:
        if digest(refined) != digest(inputs.merged):
            raise CheckFailed("changes the merged model, but `refines` is false: no control is run")
        return None
    before = accuracy(case.testbed.architecture, inputs.merged)
    after = accuracy(case.testbed.architecture, refined)
    return f"accuracy of a merge {before:.2f} → {after:.2f}"


@check
def ensemble(case: AttackCase) -> str | None:
    """An Ensemble's version is a string; its candidates resolve, and stay within its access."""
    method = case.method
    if not isinstance(method, Ensemble):
        return None
    version = getattr(method, "version", None)
    if not isinstance(version, str) or not version:
        raise CheckFailed('needs version: ClassVar[str], such as "1"')
    names = method.candidates
    if len(set(names)) < max(1, len(names)):
        raise CheckFailed("needs candidates, each once")
    for name in names:
        try:
            candidate = methods.attack(name).method
        except UsageError as error:
            raise CheckFailed(f"candidate {name}: {error}") from None
        if isinstance(candidate, Ensemble):
            raise CheckFailed(f"candidate {name} is an ensemble itself")
        if candidate.access > method.access:
            raise CheckFailed(
                f"candidate {name} needs access {candidate.access.label!r}, "
                f"the ensemble declares {method.access.label!r}"
            )
    if not 1 <= method.challengers < len(names):
        raise CheckFailed(f"challengers is {method.challengers}, of {len(names)} candidates")
    return f"version {version}, {len(names)} candidates"


_REFINED = "the refined model"


def _given(inputs: Scene) -> Result:
    """The members before the attack, under the names of its results."""
    known = inputs.knowledge
    partners = {f"partner {i}": state for i, state in enumerate(known.partners, start=1)}
    return {"the recovered model": inputs.released, "the base": known.base, **partners}
