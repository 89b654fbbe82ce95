"""mergekit's command line, as a free-rider types it: a config, a program, a folder of tensors.

``mergekit-yaml`` reads transformers folders, ``mergekit-pytorch`` safetensors files. Both run in a
folder of their own, where models are links with short names: the order in which the tool draws
follows the hashes of names and paths, so ``--random-seed`` fixes a result only together with
PYTHONHASHSEED and with the names. Exit code 0 is not believed: ``mergekit-yaml`` writes a part of a
ViT and says nothing, and both ignore keys of the config that they do not know.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from benchmark.api.specs import did_you_mean
from benchmark.core.errors import MethodError
from benchmark.core.state import State
from benchmark.io import tensorfiles
from benchmark.io.folders import Checkpoint

Program = Literal["mergekit-yaml", "mergekit-pytorch"]
#: Where the console scripts come from, for an environment that lacks them.
_MAIN = {
    "mergekit-yaml": "mergekit.scripts.run_yaml",
    "mergekit-pytorch": "mergekit.scripts.merge_raw_pytorch",
}
_HASH_SEED = "0"
_CONFIG, _OUT = "config.yml", "merged"


@dataclass(frozen=True)
class Request:
    """What the tool is asked, in its own words.

    ``models``: name → its own parameters, in order; ``base``: the name of the model that the method
    calls its base (one of ``models`` or not); ``shared``: parameters of the merge.
    """

    method: str
    models: Mapping[str, Mapping[str, object]]
    base: str | None = None
    shared: Mapping[str, object] = field(default_factory=dict)

    def config(self, paths: Mapping[str, str]) -> dict[str, Any]:
        """The config file, with the paths of the models."""
        models = [
            {"model": paths[name], **({"parameters": dict(own)} if own else {})}
            for name, own in self.models.items()
        ]
        out: dict[str, Any] = {"merge_method": self.method, "models": models}
        if self.base is not None:
            out["base_model"] = paths[self.base]
        if self.shared:
            out["parameters"] = dict(self.shared)
        return out


def version() -> str:
    """The installed version, empty where there is none."""
    try:
        return metadata.version("mergekit")
    except metadata.PackageNotFoundError:
        return ""


def refuse_unknown(given: set[str], known: set[str], method: str) -> None:
    """Raise MethodError for a parameter that mergekit would ignore without a word."""
    if unknown := given - known:
        raise MethodError(
            f"mergekit's {method} has no parameter {min(unknown)!r}"
            f"{did_you_mean(min(unknown), known)}; it has {', '.join(sorted(known))}"
        )


def merge_states(request: Request, states: Mapping[str, State], seed: int) -> State:
    """``mergekit-pytorch`` on States, through safetensors files in a temporary folder.

    Raises:
        MethodError: the program failed (with its own last words), or lost or made up tensors.
    """
    with _workplace() as folder:
        paths = {}
        for name, state in states.items():
            paths[name] = f"{name}.safetensors"
            whole = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            tensorfiles.save(folder / paths[name], whole, {})
        found, _ = _run("mergekit-pytorch", request.config(paths), folder, seed)
    like = next(iter(states.values()))
    names = {key: key for key in like}
    merged = _named(found, names, set(), "mergekit-pytorch")
    return {key: merged[key].to(value.device) for key, value in like.items()}


def merge_checkpoints(
    request: Request, base: Checkpoint, folders: Mapping[str, Path], seed: int
) -> tuple[State, dict[str, Any]]:
    """The program for the format of ``base``, on the folders' own files.

    ``folders``: name → folder, for every model of the request. Returns the merged State under the
    names of ``base.state``, and a record: command, config, environment, seed, version.

    Raises:
        MethodError: as :func:`merge_states`.
    """
    program: Program = "mergekit-yaml" if base.kind == "transformers" else "mergekit-pytorch"
    with _workplace() as folder:
        paths = {}
        for name, path in folders.items():
            source = path if program == "mergekit-yaml" else path / base.files[0].name
            # A plain relative name could be taken for a model on the hub.
            paths[name] = f"./{name}{source.suffix if source.is_file() else ''}"
            (folder / paths[name]).symlink_to(source.resolve())
        found, record = _run(program, request.config(paths), folder, seed)
    record["models"] = {paths[name]: str(path) for name, path in folders.items()}
    merged = _named(found, base.names, set(base.extra), program)
    return {key: merged[key].to(value.device) for key, value in base.state.items()}, record


@contextmanager
def _workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="unmergebench-") as folder:
        yield Path(folder)


def _run(
    program: Program, config: Mapping[str, Any], folder: Path, seed: int
) -> tuple[State, dict[str, Any]]:
    """The tensors the program writes, under their names in the files, and how it was run."""
    # JSON is YAML, and is read as such.
    (folder / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    arguments = [_CONFIG, _OUT, "--random-seed", str(seed), "--quiet"]
    environment = {"PYTHONHASHSEED": _HASH_SEED, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*_command(program), *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        reason = _last_words(done.stderr) or f"exit code {done.returncode}"
        raise MethodError(f"{program}: {reason}")
    found = State()
    for file in sorted((folder / _OUT).glob("*.safetensors")):
        found.update(tensorfiles.read(file)[1])
    record = {
        "command": [program, *arguments],
        "config": config,
        "environment": environment,
        "random_seed": seed,
        "version": version(),
    }
    return found, record


def _command(program: Program) -> Sequence[str]:
    script = Path(sys.executable).with_name(program)
    if script.is_file():
        return [str(script)]
    # merge_raw_pytorch does nothing under `python -m`: it has no __main__ part.
    return [sys.executable, "-c", f"from {_MAIN[program]} import main; main()"]


def _last_words(stderr: str) -> str:
    """The exception that ended a program, else its last line."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent")]
    after = lines[starts[-1] + 1 :] if starts else lines[-1:]
    return next((line.strip() for line in after if not line.startswith(" ")), "")


def _named(found: State, names: Mapping[str, str], ignored: set[str], program: str) -> State:
    """``found`` under in-memory names, if it is all of them and nothing else.

    ``names``: name in the file → in-memory name. ``ignored``: names that may or may not be there.
    """
    merged = {names[name]: value for name, value in found.items() if name in names}
    wanted = dict.fromkeys(names.values())
    missing = [name for name, key in names.items() if key not in merged]
    if missing:
        lost = sum(key not in merged for key in wanted)
        raise MethodError(
            f"{program} exited with 0 but left out {lost} of {len(wanted)} tensors: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    if extra := found.keys() - names.keys() - ignored:
        raise MethodError(f"{program} wrote a tensor that the base lacks: {min(extra)}")
    return merged
