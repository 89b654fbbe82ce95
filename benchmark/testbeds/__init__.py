"""Testbeds: a base model, its tasks, and the recipe that makes experts."""

from benchmark.contracts import Testbed
from benchmark.registry import Registry

TESTBEDS: Registry[Testbed] = Registry("testbeds", Testbed)

__all__ = ["TESTBEDS"]
