"""The structure of an exported graph, as text and as a hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx


def hash_graph(path: Path) -> str:
    """Return 16 hexadecimal digits that change with a graph's structure, but not with its weights."""
    return hashlib.sha256(describe_graph(path).encode()).hexdigest()[:16]


def describe_graph(path: Path) -> str:
    """Write out a graph: operators, attributes, wiring, shapes and dtypes, but no weights and no names of values."""
    graph = onnx.load(path).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    ids: dict[str, str] = {"": "none"}  # an optional input that is left out

    def identify(name: str) -> str:
        if name not in ids:  # an initializer at its first use
            values = onnx.numpy_helper.to_array(weights[name])
            # A few numbers are constants of the code: axes, shapes, a lower bound.
            constant = f" {values.tolist()}" if values.size <= 8 else ""
            ids[name] = f"tensor {len(ids)} {values.dtype} {list(values.shape)}{constant}"
        return ids[name]

    lines = []
    for tensor in graph.input:
        ids[tensor.name] = tensor.name
    for tensor in (*graph.input, *graph.output):
        dims = [dim.dim_param or dim.dim_value for dim in tensor.type.tensor_type.shape.dim]
        lines.append(f"{tensor.name}: {tensor.type.tensor_type.elem_type} {dims}")
    for number, node in enumerate(graph.node):
        attributes = sorted(f"{a.name}={onnx.helper.get_attribute_value(a)}" for a in node.attribute)
        lines.append(f"{number} {node.domain}{node.op_type}({', '.join(map(identify, node.input))}) {attributes}")
        ids |= {name: f"{number}.{place}" for place, name in enumerate(node.output)}
    return "\n".join([*lines, *(ids[tensor.name] for tensor in graph.output)])
