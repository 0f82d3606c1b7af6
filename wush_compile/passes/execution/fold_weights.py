"""Computes what a program makes of its weights alone, once: largest scales of rows, scales in whole words.

`package` leaves it in the graph, where it would be computed in every call. The results become constants of the program.
Unlike the other passes this one takes a whole program: it reads the weights and adds inputs.
"""

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from ..pattern import eliminate_dead_code, op_name

# The ops in `kernels/triton/packaged` that make new memory of a weight, and the views in between.
_MAKERS = ("amax", "constant_pad_nd", "pad", "clone")
_VIEWS = ("view", "reshape", "contiguous", "slice", "alias", "detach")


def weight_of(program: ExportedProgram, node: Node) -> torch.Tensor | None:
    """What a chain of these ops makes of a weight; None for any other node."""
    if node.op == "placeholder":
        signature = program.graph_signature
        name = signature.inputs_to_parameters.get(node.name) or signature.inputs_to_buffers.get(node.name)
        return None if name is None else program.state_dict.get(name, program.constants.get(name))
    if op_name(node) not in _MAKERS + _VIEWS or len(node.all_input_nodes) != 1:
        return None
    source = weight_of(program, node.all_input_nodes[0])
    return None if source is None else node.target(source, *node.args[1:], **node.kwargs)


@torch.no_grad()
def fold_weights(program: ExportedProgram) -> int:
    """Replaces such nodes by constants, in place; the number replaced."""
    signature, graph = program.graph_signature, program.graph
    nodes = [n for n in graph.nodes if op_name(n) in _MAKERS and n.all_input_nodes[0] is n.args[0]]
    places = [n for n in graph.nodes if n.op == "placeholder"]
    first = next((i for i, s in enumerate(signature.input_specs) if s.kind == InputKind.USER_INPUT), len(places))
    done = 0
    for node in nodes:
        made = weight_of(program, node)
        if made is None or made.dtype != torch.uint8:  # codes and scales; no weight that stays as it is
            continue
        name = f"wush_{op_name(node)}_{done}"
        with graph.inserting_before(places[first] if first < len(places) else next(iter(graph.nodes))):
            constant = graph.placeholder(name)
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant)
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name=constant.name), target=name)
        signature.input_specs.insert(first + done, spec)
        program.constants[name] = made
        done += 1
    if done:
        eliminate_dead_code(graph)
        graph.lint()
    return done
