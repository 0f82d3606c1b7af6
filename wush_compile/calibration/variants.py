"""The graphs of a run: the model's graph, and further ones for batches that this graph is not valid for.

A trace may hold only for some sizes of the inputs: a model that loops over chunks of its sequence has another graph for
another number of chunks. All graphs of a run have the same stages and the same groups. A stage observes all batches,
each in its own graph, before its groups are solved.
"""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, fx
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from ..capture.export import Captured, capture
from ..errors import CaptureError, DataError
from ..passes.calibration.cut import Part, cut, leading_to, resumable
from ..passes.calibration.group import LinearGroup, find_again
from ..passes.calibration.observe import (
    Observation,
    corrects_weights,
    insert_observers,
    observed,
    observers,
    reference_name,
    remove_observers,
    share,
    weigh_observers,
    weight_name,
)
from ..passes.calibration.partition import partition
from ..passes.calibration.place import place
from ..passes.calibration.reference import sources, unobserved
from ..passes.calibration.rewrite import rewrite
from .activations import Activations
from .context import Run
from .microbatch import MicroBatch
from .solve_group import Solved

if TYPE_CHECKING:
    from .token_weights import TokenWeights

# More graphs than this take longer to trace than a user expects, and hint at data that nobody wants to mix.
MAX_GRAPHS = 8
# In front of the name of a value inside of a stage: a rewritten graph may call a value as another stage calls one.
INSIDE = "inside."


def used(graph_module: fx.GraphModule) -> set[str]:
    """Returns the names of the tensors in a graph."""
    return {n.target for n in graph_module.graph.nodes if n.op == "get_attr"}


def _stored(activations: Activations) -> set[str]:
    """Returns the names of the values inside of a stage that are kept."""
    return {n.removeprefix(INSIDE) for n in activations.names(0) if n.startswith(INSIDE)}


def _next(
    graph_module: fx.GraphModule,
    activations: Activations,
    wanted: list[fx.Node],
    border: bool,
    returns: bool = True,
) -> Part:
    """Cuts out what leads from the values of a stage that are there to the wanted ones, if it can with its border."""
    border = border and resumable(graph_module)
    return cut(graph_module, wanted, _stored(activations), returns=returns, border=border)


class Variant:
    """A graph in stages, and the batches that go through it.

    groups       the run's groups in this graph; None for a group that it does not reach
    references   the unquantized stages, if the weights of any group are corrected; else empty
    """

    def __init__(self, captured: Captured, groups: list[LinearGroup | None], run: Run, observes: bool):
        self.captured, self.groups, self._run = captured, groups, run
        graph_module = captured.graph_module
        if run.offloads:
            place(graph_module, run.device, {name for name, _ in graph_module.named_buffers() if name in run.tensors})
        if observes:
            insert_observers(graph_module, groups)
        self.stages = partition(graph_module)
        self._corrected = {i for i, group in enumerate(groups) if observes and group and corrects_weights(group)}
        self.references = [unobserved(stage.graph_module) for stage in self.stages] if self._corrected else []
        self.last_use = {name: number for number, stage in enumerate(self.stages) for name in stage.inputs}
        self.activations: Activations | None = None
        self.reference_activations: Activations | None = None
        self.batches: list[MicroBatch] = []
        self._weights: TokenWeights | None = None

    def start(self, batches: list[MicroBatch], first: int) -> None:
        """Resets the activations to the inputs of these batches, of which the first has the number `first`."""
        values = [self.captured.flatten(first + i, batch.inputs) for i, batch in enumerate(batches)]
        if not resumable(self.captured.graph_module):  # the data stay the caller's
            values = [tree_map_only(Tensor, Tensor.clone, own) for own in values]
        run, self.batches = self._run, batches
        self.activations = Activations(values, run.device, run.offloads, run.activations_dir)
        if self.references:
            values = [dict(own) for own in values]
            self.reference_activations = Activations(values, run.device, run.offloads, run.activations_dir)

    def _call(self, module: fx.GraphModule, tensors: dict[str, Tensor], inputs: list, batch: MicroBatch) -> tuple:
        try:
            return functional_call(module, tensors, tuple(inputs))
        except RuntimeError as error:  # an assertion of a graph that was traced with the values of a batch
            if not str(error).startswith("Runtime assertion failed"):
                raise
            raise DataError(
                f"{batch} makes {type(self.captured.model).__name__} run other code than the traced batch: "
                "calibrate on batches that are alike (padding, empty parts), or quantize a submodule"
            ) from error

    def _forwards(
        self,
        part: Part,
        loaded: dict[str, Tensor],
        activations: Activations,
        dead: Collection[str] = (),
        more: Iterator[dict[str, Tensor]] | None = None,
    ) -> Iterator[tuple]:
        """Runs every batch through a part of a stage. Keeps its border, and yields what else it returns.

        dead   the names of the values that nothing reads after it
        more   tensors of each batch, beside those that are loaded
        """
        read = used(part.graph_module)  # without the weights behind the observers
        tensors = {name: tensor for name, tensor in loaded.items() if name in read}
        inside = _stored(activations)
        names = [INSIDE + name if name in inside else name for name in part.inputs]
        overwrites = not resumable(part.graph_module)
        for index, (batch, inputs) in enumerate(zip(self.batches, activations.read(names), strict=True)):
            if overwrites:  # maybe what is kept
                inputs = tree_map_only(Tensor, Tensor.clone, inputs)
            own = tensors if more is None else tensors | next(more)
            outputs = self._call(part.graph_module, own, inputs, batch)
            first = len(outputs) - len(part.border)
            kept = zip(part.border, outputs[first:], strict=True)
            activations.write(index, {INSIDE + name: value for name, value in kept})
            activations.drop(index, dead)
            yield outputs[:first]

    def observe(self, number: int, loaded: dict[str, Tensor], groups: Collection[int]) -> Iterator[None]:
        """Runs every batch to the observers of these groups of a stage. Yields after each batch.

        It goes on from where the last call for the stage ended, and keeps the values that the next one needs.
        """
        if not self.batches:
            return
        graph_module, reached = self.stages[number].graph_module, observed(self.stages[number].graph_module)
        later = [i for i in reached if i not in groups]
        weighted = [] if self._weights is None else [i for i in reached if i in groups and i in self._weights]
        corrected = [i for i in reached if i in groups and i in self._corrected]
        theirs = None
        if corrected:
            reference, activations = self.references[number], self.reference_activations
            wanted = sources(reference, [(i, self.groups[i]) for i in corrected])
            part = _next(reference, activations, wanted, border=bool(later))
            wanted = sources(reference, [(i, self.groups[i]) for i in later if i in self._corrected])
            dead = self._dead(number, reference, activations, part, wanted)
            theirs = self._forwards(part, loaded, activations, dead)

        def given() -> Iterator[dict[str, Tensor]]:
            for batch in self.batches:
                tensors = {weight_name(i): self._weights.of(i, batch, self._run.device) for i in weighted}
                if theirs is not None:
                    tensors |= dict(zip(map(reference_name, corrected), next(theirs), strict=True))
                yield tensors

        # Values behind a linear that will be rewritten cannot be kept. Experts read other values once rewritten.
        unsolved = [self.groups[i] for i in reached]
        names = {linear.node.name for group in unsolved for linear in group.linears}
        inside = leading_to(graph_module, observers(graph_module, groups), _stored(self.activations))
        border = bool(later) and not any(node.name in names for node in inside)
        border &= all(group.experts is None for group in unsolved)
        part = _next(graph_module, self.activations, observers(graph_module, groups), border, returns=False)
        dead = self._dead(number, graph_module, self.activations, part, observers(graph_module, later))
        for _ in self._forwards(part, loaded, self.activations, dead, given()):
            yield

    def _dead(
        self, number: int, graph_module: fx.GraphModule, activations: Activations, part: Part, wanted: list[fx.Node]
    ) -> list[str]:
        """Returns the names of the values that, once a part of a stage has run, nobody reads: neither what leads to
        the wanted nodes and to the end of the stage, nor later stages."""
        ends = next(n for n in graph_module.graph.nodes if n.op == "output").all_input_nodes
        stored = _stored(activations) | set(part.border)
        needed = {node.name for node in leading_to(graph_module, [*wanted, *ends], stored)}
        inputs = [n for n in self.stages[number].inputs if n not in needed and self.last_use[n] == number]
        return inputs + [INSIDE + name for name in stored if name not in needed]

    def propagate(self, number: int, loaded: dict[str, Tensor]) -> Iterator[None]:
        """Runs every batch to the end of a stage with these tensors, and keeps the outputs. Yields after each batch."""
        if not self.batches:
            return
        for index, outputs in enumerate(self._ends(self.stages[number].graph_module, loaded, self.activations)):
            self._keep(self.activations, number, index, outputs)
            yield
        if self.references:
            reference, activations = self.references[number], self.reference_activations
            for index, outputs in enumerate(self._ends(reference, loaded, activations)):
                self._keep(activations, number, index, outputs)

    def _ends(
        self, graph_module: fx.GraphModule, loaded: dict[str, Tensor], activations: Activations
    ) -> Iterator[tuple]:
        """Runs every batch to the end of a stage. Yields the stage's outputs."""
        [results] = next(node for node in graph_module.graph.nodes if node.op == "output").args
        return self._forwards(_next(graph_module, activations, results, False), loaded, activations)

    def _keep(self, activations: Activations, number: int, index: int, outputs: tuple) -> None:
        """Keeps a stage's outputs for its batch `index`, and drops the values that no later stage reads."""
        activations.write(index, dict(zip(self.stages[number].outputs, outputs, strict=True)))
        activations.drop(index, [n for n in activations.names(index) if self.last_use.get(n, -1) <= number])

    def weigh(self, weights: "TokenWeights") -> None:
        """Makes the observers of all stages weigh their rows."""
        self._weights = weights
        for stage in self.stages:
            weigh_observers(stage.graph_module, weights)

    def observe_into(self, number: int, seen: dict[int, Observation]) -> None:
        """Makes the observers of a stage add to these buffers."""
        graph_module = self.stages[number].graph_module
        for i in observed(graph_module):
            if i in seen:
                share(graph_module, i, seen[i])

    def remove_observers(self, number: int, groups: Collection[int] | None = None) -> None:
        """Removes the observers of these groups of a stage, or of all."""
        remove_observers(self.stages[number].graph_module, groups)

    def used(self, number: int) -> set[str]:
        """Returns the names of the tensors in the graphs of a stage."""
        reference = used(self.references[number]) if self.references else set()
        return used(self.stages[number].graph_module) | reference

    def rewrite(self, number: int, solved: dict[int, Solved]) -> None:
        """Rewrites the solved groups, by number, of a stage."""
        reached = [(self.groups[i], one.group, f"wush_group_{i}") for i, one in solved.items() if self.groups[i]]
        rewrite(self.stages[number].graph_module, reached)


class Variants:
    """All graphs of a run. The first one is the model's; `route` adds the others."""

    def __init__(self, captured: Captured, groups: list[LinearGroup], run: Run, observes: bool):
        self._groups, self._run, self._observes = groups, run, observes
        self._all = [Variant(captured, list(groups), run, observes)]
        self._solved: list[tuple[int, dict[int, Solved]]] = []
        self._weights: TokenWeights | None = None

    def __iter__(self) -> Iterator[Variant]:
        return iter(self._all)

    @property
    def first(self) -> Variant:
        """The model's graph."""
        return self._all[0]

    def route(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """Starts every graph with its batches. Returns all batches in the order in which they run.

        Raises `DataError` if a batch needs a graph that cannot be had.
        """
        of: dict[int, list[MicroBatch]] = {}
        for batch in batches:
            of.setdefault(self._number_for(batch), []).append(batch)
        ordered: list[MicroBatch] = []
        for number, variant in enumerate(self._all):
            own = of.get(number, [])
            variant.start(own, len(ordered))
            ordered += own
        return ordered

    def _number_for(self, batch: MicroBatch) -> int:
        refusal = None
        for number, variant in enumerate(self._all):
            reason = variant.captured.refusal(batch.inputs)
            if reason is None:
                return number
            refusal = refusal or reason
        if len(self._all) == MAX_GRAPHS:
            raise DataError(
                f"{batch} needs graph number {MAX_GRAPHS + 1}, because the model runs other ops for every size of its "
                f"inputs (the first graph holds for {refusal}): give batches of one size"
            )
        self._all.append(self._trace(batch, refusal))
        return len(self._all) - 1

    def _trace(self, batch: MicroBatch, refusal: str) -> Variant:
        try:
            captured = capture(self.first.captured.model, [batch.inputs])
            groups = find_again(captured.graph_module, captured.model, self._groups)
            variant = Variant(captured, groups, self._run, self._observes)
            if [s.name for s in variant.stages] != [s.name for s in self.first.stages]:
                raise CaptureError("it runs other layers than the traced batch")
        except CaptureError as error:
            raise DataError(
                f"{batch} needs a graph of its own, because the model's graph holds only for {refusal}, and cannot "
                f"have one: {error}. Give batches of one size"
            ) from error
        if self._weights is not None:
            variant.weigh(self._weights)
        for number, solved in self._solved:  # traced late, for a smaller micro-batch
            variant.remove_observers(number, solved)
            variant.rewrite(number, solved)
        return variant

    def weigh(self, weights: "TokenWeights") -> None:
        """Makes the observers of all stages in all graphs weigh their rows."""
        self._weights = weights
        for variant in self._all:
            variant.weigh(weights)

    def observe_into(self, number: int, seen: dict[int, Observation]) -> None:
        """Makes the observers of a stage in all graphs add to these buffers."""
        for variant in self._all:
            variant.observe_into(number, seen)

    def remove_observers(self, number: int, groups: Collection[int] | None = None) -> None:
        """Removes the observers of these groups of a stage, or of all, from all graphs."""
        for variant in self._all:
            variant.remove_observers(number, groups)

    def rewrite(self, number: int, solved: dict[int, Solved]) -> None:
        """Rewrites the solved groups, by number, of a stage in all graphs."""
        for variant in self._all:
            variant.rewrite(number, solved)
        self._solved.append((number, solved))

    def used(self, number: int) -> set[str]:
        """Returns the names of the tensors in the graphs of a stage."""
        return set().union(*(variant.used(number) for variant in self._all))
