"""What third parties import to write a defense, an attack, a merger or a testbed."""

from benchmark.api.contracts import (
    Access,
    Attack,
    Budget,
    Card,
    Defense,
    Ensemble,
    FineTune,
    Knowledge,
    Members,
    Merger,
    Setting,
    Testbed,
    Victim,
)
from benchmark.api.recipe import Batch, Logits, Lora, Loss, Recipe, plain
from benchmark.core.data import Split, Task
from benchmark.core.errors import MethodError, UnmergeBenchError, UsageError
from benchmark.core.state import ForeignState, PerTask, State

__all__ = [
    "Access",
    "Attack",
    "Batch",
    "Budget",
    "Card",
    "Defense",
    "Ensemble",
    "FineTune",
    "ForeignState",
    "Knowledge",
    "Logits",
    "Lora",
    "Loss",
    "Members",
    "Merger",
    "MethodError",
    "PerTask",
    "Recipe",
    "Setting",
    "Split",
    "State",
    "Task",
    "Testbed",
    "UnmergeBenchError",
    "UsageError",
    "Victim",
    "plain",
]
