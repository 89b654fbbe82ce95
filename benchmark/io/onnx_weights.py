"""The weights of a PyTorch model that was exported to ONNX, under the names they had in PyTorch.

The exporter keeps the names of parameters it uses as they are, and gives those it folded an
anonymous one: the weight of a linear layer, transposed, becomes ``onnx::MatMul_123``. Its name is
read off the graph: the layer adds its bias, which kept its name, to that product.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmark.core.errors import CheckpointError

if TYPE_CHECKING:
    from onnx import NodeProto


def read(path: Path) -> dict[str, Tensor]:
    """Every initialiser, float32 or as stored; weights of linear layers are (out, in) as in torch.

    A folded tensor that feeds neither a linear layer with a bias nor anything else that names it
    keeps its anonymous name.

    Raises:
        CheckpointError: the file is no ONNX model, or two tensors would get one name.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.numpy_helper import to_array

    try:
        graph = onnx.load(path).graph
    except (OSError, DecodeError) as error:
        raise CheckpointError(f"{path} is not a readable ONNX model; fetch it again") from error
    stored = {i.name: torch.from_numpy(to_array(i).copy()) for i in graph.initializer}
    named = _linear_weights(list(graph.node), stored)
    found: dict[str, Tensor] = {}
    for key, value in stored.items():
        name = named.get(key, key)
        if name in found:
            raise CheckpointError(f"{path} holds two tensors for {name!r}; export it again")
        found[name] = value.T.contiguous() if key in named else value
    return found


def _linear_weights(nodes: list[NodeProto], stored: dict[str, Tensor]) -> dict[str, str]:
    """Anonymous name → the name in PyTorch, for the operands of ``bias + x @ weight``."""
    products = {
        node.output[0]: node.input[1]
        for node in nodes
        if node.op_type == "MatMul" and node.input[1] in stored
    }
    named: dict[str, str] = {}
    for node in nodes:
        if node.op_type != "Add":
            continue
        weights = [products[i] for i in node.input if i in products]
        biases = [i for i in node.input if i in stored and i.endswith(".bias")]
        if len(weights) == len(biases) == 1:
            named[weights[0]] = f"{biases[0].removesuffix('.bias')}.weight"
    return named
