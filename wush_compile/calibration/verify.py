"""Checks a solved model before anything is replaced for good: one batch through its quantized linears and its graph.

The model and the calibrated graph call the same ops, so their results must be equal, bit for bit. They differ where the
model's code does more with a linear than call it: reads its weight, skips it, asks for its type. Where the model itself
differs from its own graph (random numbers, kernels that depend on how a mask is given), the bound is what both
differences explain together: model from graph, and quantized graph from graph. Such a difference may be so rare that it
does not show without quantization: a sum in another order seldom rounds to another bf16 value. It is recognized at the
first linear that returns something else: what that linear reads differs by rounding alone.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..capture.export import Captured, evaluating, traceable
from ..data import Batch
from ..errors import WushError
from ..modules import WushGroup, WushLinear
from ..passes.calibration.group import LinearGroup
from ..passes.calibration.observe import remove_observers
from ..passes.calibration.partition import Stage
from ..passes.calibration.place import place
from .context import Run
from .microbatch import sequences
from .solve_group import Solved

log = logging.getLogger("wush_compile")
# What `verify` returns.
EQUAL, NOISE = "equal", "within the model's own noise"
# Positions of the one row that is run: a CPU may hold a model that calibrates on a GPU.
POSITIONS = 16


@contextlib.contextmanager
def installed(model: nn.Module, groups: list[WushGroup]) -> Iterator[None]:
    """Installs groups for the block. Afterwards every module has the attributes and the submodules that it had."""
    before = [(m, dict(vars(m)), dict(m._modules), dict(m._buffers), dict(m._parameters)) for m in model.modules()]
    try:
        for group in groups:
            group.install(model)  # embeddings stay: the graph looks up the rows of 16 bits
        yield
    finally:
        for module, attributes, *children in before:
            vars(module).clear()
            vars(module).update(attributes)
            for own, old in zip((module._modules, module._buffers, module._parameters), children, strict=True):
                own.clear()
                own.update(old)


def shortened(batch: Batch) -> Batch:
    """The first row of a batch of sequences; of token ids and a mask alone, its first positions. Others stay whole."""
    if sequences(batch) is None:
        return batch
    flat = all(value.dim() == 2 and value.shape == batch["input_ids"].shape for value in batch.values())
    return {name: value[:1, :POSITIONS] if flat else value[:1] for name, value in batch.items()}


@dataclass
class _Check:
    """A model, its graphs, and one batch. Every run has the same random numbers, and returns tensors."""

    model: nn.Module
    captured: Captured
    stages: list[Stage]
    given: Batch
    device: torch.device

    @property
    def batch(self) -> Batch:
        """A copy: a model may write into its inputs."""
        return pytree.tree_map_only(Tensor, Tensor.clone, self.given)

    def _seeded(self, function: Callable[[], object]) -> list[Tensor]:
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            return [t for t in pytree.tree_leaves(function()) if isinstance(t, Tensor)]

    def run_model(self) -> list[Tensor]:
        """The model's results, with the linears that it has now."""
        batch = self.batch
        args, kwargs = ((), batch) if isinstance(batch, dict) else (batch, {})
        with traceable(self.model, batch):  # the forward that was traced: no cache, tensors alone
            return self._seeded(lambda: self.model(*args, **kwargs))

    def run_original_graph(self) -> list[Tensor]:
        """The results of the graph before quantization."""
        inputs = self.captured.flatten(0, self.batch).values()
        return self._seeded(lambda: fx.Interpreter(self.captured.graph_module).run(*inputs, enable_io_processing=False))

    def run_graph(self, seen: dict[str, tuple[Tensor, Tensor]] | None = None) -> list[Tensor]:
        """The results of the quantized graph; `seen` gets (input, output) of every quantized linear, by name."""

        def run() -> list:
            values = dict(self.captured.flatten(0, self.batch))
            for stage in self.stages:
                runner = stage.graph_module if seen is None else _Recorder(stage.graph_module, seen).run
                outputs = runner(*(values[name] for name in stage.inputs))
                values.update(zip(stage.outputs, outputs, strict=True))
            output = next(n for n in self.captured.graph_module.graph.nodes if n.op == "output")
            return [values.get(n.name) if isinstance(n, fx.Node) else n for n in output.args[0]]

        return self._seeded(run)


class _Recorder(fx.Interpreter):
    """Runs a stage and keeps what its quantized linears read and return, by the linears' names."""

    def __init__(self, graph_module: fx.GraphModule, seen: dict[str, tuple[Tensor, Tensor]]):
        super().__init__(graph_module, garbage_collect_values=False)
        self.seen = seen

    def run_node(self, node: fx.Node) -> object:
        """Runs one node."""
        result = super().run_node(node)
        if node.target is torch.ops.wush.fp4_linear.default:
            quantizer = node.args[0].args[0]  # the codes are the first of its two results
            self.seen[list(node.meta["nn_module_stack"].values())[-1][0]] = self.env[quantizer.args[0]], result
        return result


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether tensors are equal; NaN equals NaN."""
    return len(a) == len(b) and all(
        x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all()) for x, y in zip(a, b, strict=True)
    )


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The Euclidean distance of all values together; infinite if shapes differ."""
    if [x.shape for x in a] != [y.shape for y in b]:
        return float("inf")
    squares = (
        (x.double().nan_to_num() - y.double().nan_to_num()).square().sum().item() for x, y in zip(a, b, strict=True)
    )
    return sum(squares) ** 0.5


def _differ_by_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether no difference is larger than a unit in the last place of the largest value, or a fp32 sum's error."""
    if a.shape != b.shape or not a.dtype.is_floating_point:
        return False
    limit = max(torch.finfo(a.dtype).eps, 1e-5) * b.double().abs().max()
    return bool((a.double() - b.double()).abs().max() <= limit)


def _pattern(name: str) -> str:
    """A pattern of `ignore` for the same linear in every layer."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)


def _remedy(names: list[str]) -> str:
    patterns = ", ".join(map(repr, sorted({_pattern(name) for name in names})))
    return f"give ignore=({patterns},); the model is as it was"


def _where(error: Exception, model: nn.Module) -> str:
    """The name of the innermost module of the user's that ran when the error was raised."""
    names, found, trace = {m: n for n, m in model.named_modules()}, "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in names and not isinstance(module, (WushLinear, WushGroup)):
            found = names[module]
        trace = trace.tb_next
    return found


def _failure(error: Exception, module: str, model: nn.Module, linears: list[str]) -> WushError:
    """What to say of a model that raises an error with quantized linears; `module` ran when it was raised."""
    own = [n for n in linears if n.rpartition(".")[0] == module] or [n for n in linears if n.startswith(f"{module}.")]
    where = f"module {module!r} ({type(model.get_submodule(module)).__name__})" if module else "its forward"
    reason = str(error).strip().split("\n")[0]
    return WushError(
        f"{type(model).__name__} does not run with quantized linears: {where} reads more of a linear than its result "
        f"({type(error).__name__}: {reason}); {_remedy(own or linears)}"
    )


def _first_difference(check: _Check, groups: list[WushGroup], linears: list[str]) -> tuple[str, str, bool] | None:
    """(name, what is wrong, whether what it reads differs by rounding alone) of the first linear, in graph order, that
    does not return what it returns in the graph."""
    expected, actual = {}, {}
    check.run_graph(expected)
    with installed(check.model, groups):
        handles = [
            check.model.get_submodule(name).register_forward_hook(
                lambda _, args, output, name=name: actual.update({name: (*args[:1], output)})
            )
            for name in linears
        ]
        try:
            check.run_model()
        finally:
            for handle in handles:  # hooks are in dicts that the linears share with the original ones
                handle.remove()
    for name in expected:
        if name not in actual:
            return name, "is not called", False
        (read, result), (*own, returned) = expected[name], actual[name]
        if not _same([result], [returned]):
            rounding = bool(own) and not _same([read], own) and _differ_by_rounding(own[0], read)
            return name, "returns something else", rounding
    return None


def _explained(check: _Check, actual: list[Tensor], expected: list[Tensor], rounding: bool) -> bool:
    """Whether the model differs from its graph even without quantization, or by rounding before a quantizer, and by
    enough to explain the difference."""
    model, graph = check.run_model(), check.run_original_graph()
    noise = max(_distance(model, graph), _distance(model, check.run_model()))
    return (noise > 0 or rounding) and _distance(actual, expected) <= noise + _distance(expected, graph)


def _compare(check: _Check, groups: list[WushGroup], linears: list[str]) -> str | None:
    """Raises a `WushError` unless the model and the graph agree. None if one of them does not take this batch."""
    try:
        expected = check.run_graph() if check.captured.refusal(check.batch) is None else None
    except Exception as error:  # a guard of the graph, for one, rejects the batch
        log.debug("the graph does not take this batch: %s", error)
        expected = None
    failure = None
    with installed(check.model, groups):
        try:
            actual = check.run_model()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failure = error, _where(error, check.model)
    if failure is not None:
        try:
            check.run_model()
        except Exception as error:
            log.debug("the model does not take this batch: %s", error)
            return None
        raise _failure(*failure, check.model, linears) from failure[0]
    if expected is None:
        return None
    if _same(actual, expected):
        return EQUAL
    found = _first_difference(check, groups, linears)
    if found is None or _explained(check, actual, expected, found[2]):
        return NOISE
    name, what, _ = found
    owner = name.rpartition(".")[0]
    where = f", in module {owner!r} ({type(check.model.get_submodule(owner)).__name__})," if owner else ""
    raise WushError(
        f"{type(check.model).__name__} does not compute with quantized linears what its graph computes: {name}{where} "
        f"{what} in the model; {_remedy([name])}"
    )


@torch.no_grad()
def verify(
    model: nn.Module,
    captured: Captured,
    stages: list[Stage],
    groups: list[LinearGroup],
    solved: list[Solved],
    batches: list[Batch],
    run: Run,
) -> str | None:
    """Raises a `WushError` unless the model with quantized linears computes what the stages of its graph compute.

    Runs one short batch on the model's device, and leaves the model as it was. A model without values (meta device)
    cannot run, and is not checked. Returns `EQUAL` (bit for bit), `NOISE` (within the difference that the model has
    from its own graph without quantization), or None if it was not checked.

    solved    the solved groups, on the model's device
    batches   on the model's device
    """
    device = run.tensors.device
    if device.type == "meta":
        return None
    remove_observers(captured.graph_module)
    if run.offloads:
        for graph_module in (captured.graph_module, *(stage.graph_module for stage in stages)):
            place(graph_module, device, {name for name, _ in graph_module.named_buffers() if name in run.tensors})
    own, linears = [one.group for one in solved], [linear.name for group in groups for linear in group.linears]
    whole = next((batch for batch in batches if captured.refusal(batch) is None), batches[0])
    short = shortened(whole)
    with evaluating(model):
        try:
            for batch in (short, whole) if short is not whole else (short,):
                verdict = _compare(_Check(model, captured, stages, batch, device), own, linears)
                if verdict is not None:
                    return verdict
        except torch.OutOfMemoryError:
            log.warning("%s: not checked with quantized linears, because memory ran out", type(model).__name__)
            return None
    log.warning("%s: not checked with quantized linears, because no batch of its graph runs", type(model).__name__)
    return None
