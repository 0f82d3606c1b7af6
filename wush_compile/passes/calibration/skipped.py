"""Why a weight is not quantized: what kind of module holds it, and which nodes of the graph compute with it."""

import torch
from torch import Tensor, fx, nn

# What kernels, formats and observers take. None computes in float64.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Ops that hand a weight on to others: copies, and a choice of rows. Views are known by their schema.
HANDS_ON = ("_to_copy", "clone", "contiguous", "index", "index_select", "type_as")
PRODUCTS = ("addmm", "baddbmm", "bmm", "einsum", "linear", "matmul", "mm", "mv")
# Parts of the names of ops that are layers of their own: conv1d, convolution, embedding_bag ...
OTHER_LAYERS = ("conv", "embedding")


def _op_name(node: fx.Node) -> str:
    return getattr(node.target, "_opname", "")


def called_by(node: fx.Node) -> tuple[str, str]:
    """(path, class name) of the innermost module whose forward runs a node; empty for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    return path, str(getattr(kind, "__name__", kind)).rpartition(".")[2]


def is_linear_layer(module: nn.Module) -> bool:
    """Whether a module is a Linear, a subclass of it, or GPT-2's Conv1D."""
    # Conv1D of transformers, recognized without an import, because passes do not import transformers.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def own_product(module: nn.Module, transposed: bool, nodes: list[fx.Node]) -> bool:
    """Whether the forward of a linear layer is the product alone, so that a quantized linear can take its place.

    nodes: what the trace of its forward computes.
    """
    if isinstance(module, nn.Linear):
        return not transposed and (type(module).forward is nn.Linear.forward or len(nodes) == 1)
    return transposed


def readers_of(weight: fx.Node) -> list[fx.Node]:
    """The nodes that compute with a weight: behind its views and copies, without checks of its shape and dtype."""
    found = []
    for user in weight.users:
        if getattr(user.target, "is_view", False) or _op_name(user) in HANDS_ON:
            found += readers_of(user)
        elif not _op_name(user).startswith(("_assert", "sym_")):
            found.append(user)
    return found


def other_dtype(weight: Tensor) -> str | None:
    """The reason for a weight of a dtype that no quantized linear has, such as float64; None for the others."""
    if weight.dtype in DTYPES:
        return None
    return f"its weight is {str(weight.dtype).removeprefix('torch.')}: convert it to float32, bfloat16 or float16 first"


def belongs_to(owner: nn.Module) -> str:
    """The reason for a matrix of a module that is no linear layer, such as a router."""
    return f"belongs to {type(owner).__name__}, not to a linear layer"


def read_by(reader: str) -> str:
    """The reason for a linear layer whose weight is read by the forward of another module, of class `reader`."""
    return f"its weight is read by {reader} directly, not through its own forward"


def reason_to_skip(parameter: Tensor, owner: nn.Module, readers: list[fx.Node]) -> str:
    """Why a parameter of two or more dimensions that is the weight of no linear node is not quantized.

    owner: the module that holds the parameter. readers: `readers_of` all nodes that fetch it.
    """
    kind = type(owner).__name__
    if not readers:
        return "not reached by the traced forward"
    if is_linear_layer(owner):
        return read_by(called_by(readers[0])[1] or "the model")
    if any(_op_name(n) in PRODUCTS or "grouped_mm" in _op_name(n) for n in readers):
        if parameter.dim() == 3:
            return f"3-D weight of {kind}, which does not multiply rows in the order of experts"
        return belongs_to(owner)
    if any(part in _op_name(n) for n in readers for part in OTHER_LAYERS):
        return f"{kind} is not a linear layer"
    return "no matrix product reads it"
