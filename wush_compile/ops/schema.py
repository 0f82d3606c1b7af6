"""One signature an op: its annotated reference gives the schema, and its other functions are checked against it.

    define    the schema, the reference and the fake kernel of an op
    bind      the arguments of a call by name; `positional` is the way back
    check     refuses a function whose parameters are not the op's
    refuse_gradients   makes a kernel refuse tensors that require a gradient

The checked functions are the fake kernels, every provider's, and the packaged ones.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence

import torch

from ..errors import GradientError, SignatureError

lib = torch.library.Library("wush", "DEF")
# `register_fake` asks `inspect` for the module of this file, and that would look through all that are loaded: in a
# worker of vLLM it takes as long as the rest of our import.
inspect.modulesbyfile.setdefault(__file__, __name__)


def schema(op: str) -> torch._C.FunctionSchema:
    """The schema of `wush::op`."""
    return getattr(torch.ops.wush, op).default._schema


def define(op: str, reference: Callable, fake: Callable, mutates: Sequence[str] = ()) -> None:
    """Defines `wush::op` with the signature of its reference; `mutates` names the arguments that it writes."""
    lib.define(torch.library.infer_schema(reference, mutates_args=mutates, op_name=op))
    check(op, "the fake kernel", fake)
    lib.impl(op, refuse_gradients(op, reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"wush::{op}", fake, lib=lib)


def refuse_gradients(op: str, kernel: Callable) -> Callable:
    """`kernel`, which raises `GradientError` where autograd would record the call.

    An op passes no gradient on, and a graph that continues behind the op would get wrong gradients without an error.
    """

    @functools.wraps(kernel)
    def run(*args, **kwargs):
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            raise GradientError(
                f"wush::{op} passes no gradient on: run an exported program under torch.no_grad(), and train the "
                "quantized model itself, whose linears have gradients"
            )
        return kernel(*args, **kwargs)

    return run


def bind(op: str, args: Sequence, kwargs: Mapping[str, object] | None = None) -> dict[str, object]:
    """The arguments of a call of `wush::op` by name, in the order of the schema, with its defaults filled in."""
    parameters = schema(op).arguments
    given = dict(zip((p.name for p in parameters), args)) | dict(kwargs or {})
    return {p.name: given.get(p.name, p.default_value) for p in parameters}


def positional(op: str, named: Mapping[str, object]) -> tuple:
    """Arguments by name -> by position. As PyTorch records a call, trailing defaults of the schema are left out.

    Names that the op does not have are left out too.
    """
    parameters = list(schema(op).arguments)
    while (
        parameters and parameters[-1].has_default_value() and named[parameters[-1].name] == parameters[-1].default_value
    ):
        parameters.pop()
    return tuple(named[p.name] for p in parameters)


def _difference(op: str, function: Callable) -> str | None:
    """How a function's parameters differ from the op's; None if a call of the op can be passed on by position."""
    wanted, own = schema(op).arguments, list(inspect.signature(function).parameters.values())
    for index, argument in enumerate(wanted):
        if index == len(own):
            return f"it lacks {argument.name!r}"
        parameter = own[index]
        if parameter.kind is parameter.VAR_POSITIONAL:
            return None
        if parameter.name != argument.name:
            return f"parameter {index} is {parameter.name!r}, the schema has {argument.name!r}"
        # PyTorch leaves out arguments that equal the schema's default, so the function must have the same default.
        if argument.has_default_value() and parameter.default != argument.default_value:
            return f"{argument.name!r} does not default to {argument.default_value!r}"
    for parameter in own[len(wanted) :]:
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            return f"{parameter.name!r} is not in the schema and has no default"
    return None


def check(op: str, who: str, function: Callable) -> None:
    """Raises `SignatureError` unless the function takes the arguments of `wush::op`, by their names and in their order.

    `*others` may stand for the last arguments. Parameters of the function's own follow them and have defaults.
    """
    difference = _difference(op, function)
    if difference is not None:
        raise SignatureError(f"{who} of wush::{op} does not fit the op: {difference}; the schema is {schema(op)}")
