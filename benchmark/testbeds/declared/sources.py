"""Rows of a task's data, in whatever of the hub's formats it lies: read by ``datasets``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark.core.errors import UsageError, first_line
from benchmark.testbeds.declared.asking import PARTS, Part
from benchmark.testbeds.declared.places import Place, folder, hashed, place, unavailable
from benchmark.testbeds.declared.schema import Files, TaskSpec

_FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
_SEED = 1


@dataclass(frozen=True)
class Rows:
    """Examples in a random order: ``inputs`` (images or texts) and class indices."""

    inputs: list[Any]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    """Where one task's rows come from. ``root``: the folder of the testbed.toml."""

    spec: TaskSpec
    root: Path

    def content(self) -> list[str]:
        """What determines the rows. Raises UsageError, AssetError: a file or folder is missing."""
        own = [hashed(self._labels_file)] if self._labels_file else []
        if isinstance(self.spec.data, str):
            return [self._place.content, *own]
        return [hashed(path) for paths in self._files.values() for path in paths] + own

    def read(self, kind: str) -> tuple[dict[Part, Rows], tuple[str, ...]]:
        """Rows of the splits there are, cut to what the task may use, and the class names.

        ``kind``: ``image`` or ``text``. Without a validation split, train has room for one.

        Raises:
            UsageError: a split, column or class is not there.
            AssetError: the data is not at hand and cannot be fetched.
        """
        with self._loaded() as data:
            names = self._names(data)
            columns = data[names["train"]].column_names
            column = self._column(kind, columns)
            self._known(self.spec.label, columns, "label column", "label")
            feature = data[names["train"]].features[self.spec.label]
            values = [v for name in names.values() for v in data[name].unique(self.spec.label)]
            index, classes = self.classes(feature, values)
            out = {
                part: self._take(_drawn(data[name], limit), column, kind, index)
                for part, (name, limit) in self._limited(names).items()
            }
        return out, classes

    def records(self, columns: Mapping[str, str]) -> tuple[dict[Part, list[Any]], dict[str, Any]]:
        """Rows of the splits there are as dicts, in a random order, cut to what the task may use;
        and what ``datasets`` says of each column.

        ``columns``: name → the field of the task that names it.

        Raises:
            UsageError, AssetError: as :meth:`read`.
        """
        with self._loaded() as data:
            names = self._names(data)
            first = data[names["train"]]
            for column, field in columns.items():
                self._known(column, first.column_names, "column", field)
            rows = {
                part: _drawn(data[name], limit).select_columns(list(columns)).to_list()
                for part, (name, limit) in self._limited(names).items()
            }
            return rows, {column: first.features[column] for column in columns}

    def _names(self, data: Any) -> dict[Part, str]:
        """What the data calls the splits there are."""
        names = {part: self.spec.splits.get(part, part) for part in PARTS}
        for part in self.spec.splits:
            self._known(names[part], data, "split", "splits")
        if "validation" not in self.spec.splits and names["validation"] not in data:
            names.pop("validation")
        for part in ("train", "test"):
            self._known(names[part], data, "split", "splits")
        return names

    def _limited(self, names: Mapping[Part, str]) -> dict[Part, tuple[str, int]]:
        """The name of each split, and how many rows are taken of it."""
        spec = self.spec
        room = 0 if "validation" in names else spec.max_validation
        limits: dict[Part, int] = {
            "train": spec.max_train + room,
            "validation": spec.max_validation,
            "test": spec.max_test,
        }
        return {part: (name, limits[part]) for part, name in names.items()}

    @property
    def _place(self) -> Place:
        assert isinstance(self.spec.data, str)
        return place(self.spec.data, self.root, self.spec.revision, f"task {self.spec.name}: data")

    @property
    def _files(self) -> dict[Part, list[Path]]:
        assert not isinstance(self.spec.data, str)
        return {part: self._paths(files) for part, files in self.spec.data.items()}

    def _paths(self, files: Files) -> list[Path]:
        found = []
        for name in [files] if isinstance(files, str) else files:
            path = self.root / Path(name).expanduser()
            if not path.is_file():
                raise UsageError(f"task {self.spec.name}: data: no such file: {path}")
            found.append(path)
        return found

    @contextmanager
    def _loaded(self) -> Iterator[Any]:
        """The splits by name. What ``datasets`` writes for local files is thrown away again."""
        import datasets

        was = datasets.utils.logging.is_progress_bar_enabled()
        datasets.utils.logging.disable_progress_bar()
        try:
            with tempfile.TemporaryDirectory(prefix="unmergebench-") as scratch:
                yield self._load(datasets, scratch)
        finally:
            if was:
                datasets.utils.logging.enable_progress_bar()

    def _load(self, datasets: Any, scratch: str) -> Any:
        config = self.spec.config
        try:
            if not isinstance(self.spec.data, str):
                files = self._files
                by_split = {part: [str(p) for p in paths] for part, paths in files.items()}
                paths = [p for each in files.values() for p in each]
                return self._from_files(datasets, paths, by_split, scratch)
            found = self._place
            if found.path is None and not offline():
                try:
                    return datasets.load_dataset(found.name, config, revision=found.revision)
                except (ConnectionError, OSError):
                    pass  # no network after all: the hub's cache may have it
            path = folder(found, "dataset")
            if path.is_file():
                return self._from_files(datasets, [path], {"train": [str(path)]}, scratch)
            if (path / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(path))
            return datasets.load_dataset(str(path), config, cache_dir=scratch)
        except (ValueError, OSError, KeyError, TypeError) as error:
            if isinstance(self.spec.data, str) and self._place.path is None:
                raise unavailable(self._place, "dataset") from error
            raise UsageError(f"task {self.spec.name}: data: {first_line(error)}") from None
        except datasets.exceptions.DatasetGenerationError as error:
            reason = first_line(error.__cause__ or error)
            raise UsageError(f"task {self.spec.name}: data: {reason}") from None

    def _from_files(
        self, datasets: Any, paths: list[Path], by_split: dict[Any, list[str]], scratch: str
    ) -> Any:
        suffixes = {path.suffix for path in paths}
        if len(suffixes) != 1 or not suffixes <= _FORMATS.keys():
            raise UsageError(
                f"task {self.spec.name}: data: files must all be parquet, csv, tsv or json, "
                f"not {', '.join(sorted(suffixes))}"
            )
        (suffix,) = suffixes
        options = {"sep": "\t"} if suffix == ".tsv" else {}
        return datasets.load_dataset(
            _FORMATS[suffix], data_files=by_split, cache_dir=scratch, **options
        )

    def _known(self, name: str, there: Any, what: str, key: str) -> None:
        if name not in there:
            raise UsageError(
                f"task {self.spec.name}: the data has no {what} {name!r} "
                f"(it has {', '.join(map(str, there))}); set {key} in its [[task]]"
            )

    def _column(self, kind: str, columns: list[str]) -> str:
        named = self.spec.image if kind == "image" else self.spec.text
        column = named or kind
        if column not in columns:
            other = self.spec.text if kind == "image" else self.spec.image
            wrong = f"; this base reads {kind}s" if other else ""
            raise UsageError(
                f"task {self.spec.name}: the data has no {kind} column {column!r} "
                f"(it has {', '.join(columns)}); set {kind} in its [[task]]{wrong}"
            )
        return column

    @property
    def _labels_file(self) -> Path | None:
        """The JSON list that ``classes`` names, else a labels.json beside the data."""
        if isinstance(self.spec.classes, str):
            path = self.root / Path(self.spec.classes).expanduser()
            if not path.is_file():
                raise UsageError(f"task {self.spec.name}: classes: no such file: {path}")
            return path
        if self.spec.classes is None and isinstance(self.spec.data, str) and self._place.path:
            beside = self._place.path / "labels.json"
            return beside if beside.is_file() else None
        return None

    def classes(self, feature: Any, values: list[Any]) -> tuple[dict[Any, int], tuple[str, ...]]:
        """Label as in the data → class index, and the class names."""
        there = sorted(set(values), key=lambda v: (isinstance(v, str), v if v is not None else -1))
        known = list(getattr(feature, "names", None) or ())
        given: Any = self.spec.classes
        if self._labels_file is not None:
            given = self._list(self._labels_file)
        if isinstance(given, dict):
            return self._renamed(given, known, there), tuple(given.values())
        names = tuple(given or known or map(str, there))
        integers = all(isinstance(value, int) for value in there)
        index: dict[Any, int]
        if integers and (given or known):
            index = dict(enumerate(range(len(names))))
        else:
            index = dict(zip(there if not given else names, range(len(names)), strict=False))
        missing = next((value for value in there if value not in index), None)
        if missing is not None or None in there:
            raise UsageError(
                f"task {self.spec.name}: label {missing!r} is none of the {len(names)} classes; "
                "correct classes, or leave such rows out of the data"
            )
        return index, names

    def _renamed(self, given: dict[str, str], known: list[str], there: list[Any]) -> dict[Any, int]:
        """Label → position of its row in the table ``classes``, by its name or its number there."""
        position = {key: index for index, key in enumerate(given)}
        index = {}
        for value in there:
            name = known[value] if known and isinstance(value, int) and value >= 0 else str(value)
            found = position.get(name, position.get(str(value)))
            if found is None:
                raise UsageError(f"task {self.spec.name}: classes: label {name!r} has no name")
            index[value] = found
        return index

    def _list(self, path: Path) -> list[str]:
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"task {self.spec.name}: {path} is not JSON: {error}") from None
        if not isinstance(names, list) or not names:
            raise UsageError(f"task {self.spec.name}: {path} must hold a JSON list of class names")
        return [str(name) for name in names]

    def _take(self, data: Any, column: str, kind: str, index: dict[Any, int]) -> Rows:
        chosen = data.select_columns(list(dict.fromkeys((column, self.spec.label))))
        if kind == "image":
            chosen = self._with_images(chosen, column)
        labels = [index[value] for value in chosen[self.spec.label]]
        try:
            inputs = list(chosen[column])
        except (OSError, ValueError, SyntaxError) as error:
            raise UsageError(
                f"task {self.spec.name}: unreadable image: {first_line(error)}"
            ) from None
        if kind == "text" and not all(isinstance(value, str) for value in inputs):
            raise UsageError(f"task {self.spec.name}: column {column!r} holds more than texts")
        return Rows(inputs, labels)

    def _with_images(self, data: Any, column: str) -> Any:
        """Bytes or file names as images; names are relative to the data, else to the TOML."""
        from datasets import Image

        feature = data.features[column]
        if isinstance(feature, Image):
            return data
        if str(getattr(feature, "dtype", "")).endswith("string"):  # large_string too
            roots = [self.root]
            if isinstance(self.spec.data, str) and self._place.path is not None:
                path = self._place.path
                roots.insert(0, path if path.is_dir() else path.parent)
            elif not isinstance(self.spec.data, str):
                roots[:0] = {p.parent for paths in self._files.values() for p in paths}

            def absolute(row: dict[str, Any]) -> dict[str, Any]:
                for root in roots:
                    if (root / row[column]).is_file():
                        return {column: str(root / row[column])}
                raise UsageError(f"task {self.spec.name}: no such image: {roots[0] / row[column]}")

            data = data.map(absolute, load_from_cache_file=False, keep_in_memory=True)
        return data.cast_column(column, Image())


def _drawn(data: Any, limit: int) -> Any:
    """At most ``limit`` rows, in a random order that is always the same."""
    rng = torch.Generator().manual_seed(_SEED)
    return data.select(torch.randperm(len(data), generator=rng)[:limit].tolist())


def offline() -> bool:
    """Whether the hub's libraries were told that there is no network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
