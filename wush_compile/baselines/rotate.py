"""Rotations of the residual stream, folded into the weights, and Hadamard products in front of linears.

QuaRot (Ashkboos et al., 2024): the stream is multiplied by a Hadamard matrix with random signs, which is free; the
inputs of the linears that write to the stream (o_proj, down_proj) by a Hadamard matrix at run time. SpinQuant (Liu et
al., 2025) has learned rotations of the stream in the place of the random one.
"""

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import DataError
from .hadamard import Rotation, random_hadamard
from .stream import Stream, find_stream, traced


class RotatesInput:
    """A forward pre-hook of a linear: its input goes through a rotation, a module of the linear's parent."""

    def __init__(self, rotation: Rotation):
        self.rotation = rotation

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        return self.rotation(args[0]), *args[1:]


def rotate(
    model: nn.Module, batches: list[Batch], rotation: Tensor | None = None, online: bool = True, seed: int = 0
) -> Stream:
    """Rotates a model in place; it computes the same up to rounding. Returns the stream.

    batches   one is enough: the model is traced on it
    rotation  float64 [K, K], orthogonal, of the residual stream; by default a Hadamard matrix with random signs
    online    whether the inputs of the linears that write to the stream are multiplied by a Hadamard matrix too

    A head that is tied to the embedding gets a weight of its own. Raises `CaptureError` for a model whose stream cannot
    be rotated.
    """
    stream = find_stream(traced(model, batches))
    fold_norms(model, stream)
    width = model.get_submodule(stream.embeddings[0]).weight.shape[1]
    r = random_hadamard(width, seed) if rotation is None else rotation.to(torch.float64)
    if r.shape != (width, width):
        raise DataError(f"the residual stream has {width} channels: give a rotation of [{width}, {width}]")
    for name in stream.embeddings:
        _multiply(model.get_submodule(name), right=r)
    for name in dict.fromkeys((*stream.readers, *(name for norm in stream.norms for name in norm.readers))):
        _multiply(model.get_submodule(name), right=r)
    for name in stream.writers:
        _multiply(model.get_submodule(name), left=r.mT)
        if online:
            rotate_input(model, name)
    return stream


def fold_norms(model: nn.Module, stream: Stream) -> None:
    """Moves the weights of the norms into the linears behind them; unties a head that shares the embedding."""
    shared = {id(model.get_submodule(name).weight) for name in stream.embeddings}
    for norm in stream.norms:
        factor = None
        if norm.weight is not None:
            parameter = model.get_parameter(norm.weight)
            factor = parameter.detach().double() + norm.offset
            parameter.data = torch.full_like(parameter, 1 - norm.offset)
        for name in norm.readers:
            linear = model.get_submodule(name)
            if id(linear.weight) in shared:
                linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
                if hasattr(model, "config"):
                    model.config.tie_word_embeddings = False
            if factor is not None:
                linear.weight.data = (linear.weight.detach().double() * factor).to(linear.weight.dtype)


def rotate_input(model: nn.Module, name: str) -> None:
    """Puts a Hadamard product in front of a linear, and its inverse into the weight."""
    linear = model.get_submodule(name)
    rotation = Rotation(linear.in_features, linear.weight.device)
    _multiply(linear, right=rotation.matrix())
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).add_module(f"{leaf}_rotation", rotation)
    linear.register_forward_pre_hook(RotatesInput(rotation))


def _multiply(module: nn.Module, left: Tensor | None = None, right: Tensor | None = None) -> None:
    """W -> left · W · right, and the bias -> left · bias, in float64."""
    weight = module.weight.detach().double()
    if left is not None:
        weight = left.to(weight.device) @ weight
        if getattr(module, "bias", None) is not None:
            module.bias.data = (left.to(weight.device) @ module.bias.detach().double()).to(module.bias.dtype)
    if right is not None:
        weight = weight @ right.to(weight.device)
    module.weight.data = weight.to(module.weight.dtype)
