"""Somebody else's defense, in a process of its own.

What ships with UnmergeBench runs in the process. Code of anybody else is never imported here: what
runs at import could reach the evaluator, the store or another party's weights. Its process holds
what the owner of one expert has (base, expert, training and validation data), and hands back
tensors. It is started fresh, nothing of this process's memory is in it, and it serves one victim
only, so that what it protects next is no partner it has seen. What it sends is read as JSON and
safetensors; nothing of it is ever unpickled, and its files are read once, so that what was judged
is what is kept.

The process has no cache, no hub, no package index, and a home and a temporary folder of its own:
``testbed.task`` and the assets do not work there. That keeps an honest mistake and an ordinary
cheat from the test split. It is no sandbox: a program with your rights that searches your disk, or
that knows the public data by heart, is not stopped by it. Do not run a stranger's code outside a
container.
"""

from benchmark.pipeline.apart.method import Apart, defense
from benchmark.pipeline.apart.processes import close
from benchmark.pipeline.apart.release import protect, ship

__all__ = ["Apart", "close", "defense", "protect", "ship"]
