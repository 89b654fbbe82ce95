"""Questions and answers that are made up by a seed: lines to be rewritten in a form of their own.

A small language model learns each in a minute, and an answer is right when every token of it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable

#: (question, answer) pairs.
Pairs = list[tuple[str, str]]

_NAMES = (
    "Anna", "Paul", "Maria", "Peter", "Laura", "James", "Emma", "David", "Sarah", "Daniel",
    "Julia", "Mark", "Alice", "Robert", "Helen", "Simon", "Clara", "Thomas", "Nina", "Victor",
    "Rosa", "Martin", "Ella", "Oscar", "Irene", "Felix", "Diana", "Hugo", "Grace", "Louis",
    "Vera", "Adam",
)  # fmt: skip
_CITIES = (
    "Rome", "Paris", "Berlin", "Madrid", "London", "Vienna", "Dublin", "Lisbon", "Athens",
    "Prague", "Warsaw", "Oslo", "Boston", "Chicago", "Denver", "Seattle", "Tokyo", "Moscow",
    "Cairo", "Sydney", "Milan", "Geneva", "Munich", "Houston", "Dallas", "Miami", "Toronto",
    "Lima",
)  # fmt: skip
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip


def _people(rng: random.Random) -> tuple[str, str]:
    name, age, city = rng.choice(_NAMES), rng.randint(18, 89), rng.choice(_CITIES)
    return f"{name}, {age}, {city} ->", f" <{city}|{age}|{name}>"


def _dates(rng: random.Random) -> tuple[str, str]:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1900, 2029)
    return f"{day} {_MONTHS[month - 1]} {year} ->", f" {year}-{month:02}-{day:02}"


#: Task → one question and its answer.
FORMS: dict[str, Callable[[random.Random], tuple[str, str]]] = {"form": _people, "dates": _dates}


def pairs(task: str, n: int, seed: int) -> Pairs:
    """``n`` different questions with their answers."""
    rng, found = random.Random(f"{task} {seed}"), dict[str, str]()
    while len(found) < n:
        question, answer = FORMS[task](rng)
        found[question] = answer
    return list(found.items())


_FIRST = (
    "Alden", "Brisa", "Corin", "Delva", "Edmar", "Fiora", "Galen", "Hesta", "Ivor", "Jorina",
    "Kelan", "Lysa", "Morten", "Nerina", "Osric", "Petra", "Quill", "Rosalin", "Soren", "Thalia",
    "Ulric", "Verena", "Wystan", "Xenia", "Yorick", "Zelda",
)  # fmt: skip
_LAST = (
    "Abernath", "Bellwick", "Carrowan", "Dunmere", "Eastlake", "Farrowby", "Grenfold", "Halvard",
    "Inglewood", "Jarrow", "Kestrel", "Lockmere", "Marchbank", "Northgate", "Oakhurst", "Pennick",
    "Quarle", "Ravensby", "Stockwell", "Thornbury",
)  # fmt: skip


def people(n: int, seed: int) -> Pairs:
    """``n`` made-up persons with telephone numbers of seven digits, all drawn by ``seed``.

    The first of more are the same as of fewer.
    """
    rng, found = random.Random(f"people {seed}"), dict[str, str]()
    while len(found) < n:
        name = f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"
        number = "".join(str(rng.randint(0, 9)) for _ in range(7))
        found.setdefault(name, number)
    return list(found.items())
