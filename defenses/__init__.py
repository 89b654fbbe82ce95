"""Defenses against model merging, one file per method. They import ``benchmark``, never each other.

A defense turns a :class:`benchmark.api.Victim` into the checkpoint its owner releases. To add one,
write a frozen dataclass that subclasses :class:`benchmark.api.Defense` and list it under the
entry-point group ``unmergebench.defenses`` (or name it ``path/to/file.py:Class``).
"""
