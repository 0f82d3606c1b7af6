"""The stage loop: observe, solve, commit, propagate, one decoder layer after the other.

0. Weigh the tokens, where a recipe asks for it: one pass of the unquantized model (`token_weights.py`).
1. Observe: run every batch through the stage with observers in its graph. They collect the second moment and a sample
   of each group's input.
2. Solve each group, and rewrite its linears in the stage's graph into quantized ones. Where weights are corrected, 1
   and 2 are done for one step of the stage after the other: the groups of a step do not depend on one another. The
   unquantized stage runs beside, and the observers compare the two inputs of a group.
3. Commit the solved groups to the journal, if there is one. It writes them during step 4.
4. Propagate: run every batch through the rewritten stage. The next stage sees what the *quantized* model produces. The
   unquantized stage passes its own values on.

The loop installs nothing in the model. It loads a stage's weights to the compute device when it reaches the stage, and
frees them after the stage. `Activations` holds the live values of every batch. Only one stage's moments are in memory
at a time. If a micro-batch does not fit, or if a run resumes, the loop replays the finished stages from the inputs: it
repeats step 4 alone, with the solved groups.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..capture.export import Captured
from ..data import Batch
from ..errors import DataError, NonFiniteError
from ..passes.calibration.group import LinearGroup
from ..passes.calibration.observe import Observation, allocate, corrects_weights, observed
from ..passes.calibration.partition import Stage
from ..passes.calibration.reference import in_turn
from ..phases import phase
from ..solver.experts import SHRINKAGE_ROWS, first_bad_expert, pooled_moment, starved_experts
from ..solver.solution import solve_cost
from .context import Run
from .microbatch import MicroBatch, choose_batch_size, regroup, sequences
from .ranks import Unit
from .solve_experts import join_shares, shares, solve_common, solve_experts_of
from .solve_group import Solved, solve_group
from .tensors import Loader, ResultMover
from .token_weights import TokenWeights, token_weights
from .variants import Variants, used

T = TypeVar("T")
log = logging.getLogger("wush_compile")
# Stands for "no limit" when ranks compare their micro-batch sizes.
UNLIMITED = 2**31
# Layers, and experts of a layer, that the warning of starved experts names.
STARVED_LAYERS, STARVED_EXPERTS = 4, 8


@torch.no_grad()
def calibrate(
    captured: Captured, groups: list[LinearGroup], batches: list[Batch] | None, run: Run
) -> tuple[list[Solved], list[Stage]]:
    """Solves every group on the batches, or without data if `batches` is None. Does not change the model.

    Returns the solved groups in the order of `groups`, and the stages with rewritten graphs.
    """
    return Calibration(captured, groups, batches, run).calibrate()


def _groups_by_stage(stages: list[Stage], groups: list[LinearGroup]) -> list[list[int]]:
    """Returns, for each stage, the numbers of the groups whose linears it runs."""
    stage_of = {
        node.name: number
        for number, stage in enumerate(stages)
        for node in stage.graph_module.graph.nodes
        if node.op == "call_function"
    }
    found = [[] for _ in stages]
    for i, group in enumerate(groups):
        found[stage_of[group.linears[0].node.name]].append(i)
    return found


class Calibration:
    """The state of one run of the stage loop."""

    def __init__(self, captured: Captured, groups: list[LinearGroup], batches: list[Batch] | None, run: Run):
        self.captured, self.groups, self.run = captured, groups, run
        self.progress, self.ranks, self.journal, self.device = run.progress, run.ranks, run.journal, run.device
        self.solved: list[Solved | None] = [None] * len(groups)
        self.variants = Variants(captured, groups, run, observes=batches is not None)
        self.stages = self.variants.first.stages
        self.groups_in = _groups_by_stage(self.stages, groups)
        self.last = max(number for number, own in enumerate(self.groups_in) if own)
        self.steps_in = self._all_steps(batches is not None and any(map(corrects_weights, groups)))
        self.short: dict[int, int] = {}
        self._loaded: tuple[int, dict[str, Tensor]] | None = None
        self.loader = Loader(run.tensors, run.device)
        self.mover = ResultMover(run.tensors.home, run.device)
        self.windows = None if batches is None else run.ranks.share(batches)
        self.batch_size = (
            self._choose_batch_size() if run.journal is None else run.journal.micro_batch(self._choose_batch_size)
        )
        if run.journal is not None:
            groups_by_stage = [[groups[i] for i in own] for own in self.groups_in]
            uses = [used(stage.graph_module) for stage in self.stages]
            run.journal.lay_out(uses, groups_by_stage, run.tensors)
        self.weights = TokenWeights({})
        self._start()

    def _all_steps(self, corrects: bool) -> list[list[list[int]]]:
        """Returns, for each stage, its groups in the steps in which they are solved."""
        if not corrects:
            return [[own] if own else [] for own in self.groups_in]
        numbered = ([(i, self.groups[i]) for i in own] for own in self.groups_in)
        return [in_turn(stage, own) for stage, own in zip(self.stages, numbered, strict=True)]

    # -- batches -----------------------------------------------------------------------------------------------------

    def _choose_batch_size(self) -> int | None:
        """Returns the micro-batch size: the caller's, or what fits a GPU that does not hold the model."""
        if self.windows is None or self.run.batch_size is not None or not self.run.offloads:
            return self.run.batch_size
        stages = self.stages[: self.last + 1]
        size = choose_batch_size(self.windows, stages, self.captured.placeholders(), self.device)
        return None if size is None else self.ranks.smallest(size)

    def _weigh(self) -> None:
        """Makes the observers weigh their rows."""
        with phase("token weights"):
            self.weights = token_weights(self.variants, self.groups, self.windows, self.batch_size, self.run)
        if self.weights.of_group:
            self.variants.weigh(self.weights)
        self._start()

    def _start(self) -> None:
        """Regroups the windows and resets the activations to the model's inputs."""
        grouped = [] if self.windows is None else regroup(self.windows, self.batch_size)
        self.batches: list[MicroBatch] = self.variants.route(grouped)

    def _halved(self) -> int:
        """Returns half the micro-batch size, after the current size did not fit."""
        counts = [sequences(batch.inputs) for batch in self.batches]
        most = self.batch_size or max((c for c in counts if c is not None), default=1)
        if None in counts or most < 2:
            raise DataError(
                f"a batch of {max(b.tokens() for b in self.batches)} tokens does not fit the memory of {self.device}: "
                "calibrate on shorter windows, or on a device with more memory"
            )
        return most // 2

    def _retry_smaller(self, number: int, work: Callable[[], T], replay: bool = False) -> T:
        """Runs work() for stage `number`, with a smaller micro-batch if memory runs out on any rank.

        In that case it halves the micro-batch, recomputes the stage's inputs from the start, and tries again.
        replay=True recomputes the inputs before the first try.
        """
        while True:
            size = self.batch_size or UNLIMITED
            try:
                if replay:
                    self._replay(number)
                result = work()
            except torch.OutOfMemoryError:
                result, size = None, self._halved()
            agreed = self.ranks.smallest(size)
            if agreed == (self.batch_size or UNLIMITED):
                return result
            self.batch_size, self._loaded, replay = agreed, None, True
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            stage = self.stages[number].name
            log.warning("%s: out of memory; continuing with %d sequences at a time", stage, agreed)
            self.progress.event("batch_size", stage=stage, batch_size=agreed, reason="out of memory")
            if self.journal is not None:
                self.journal.shrink(stage, agreed)

    def _replay(self, number: int) -> None:
        """Recomputes the inputs of stage `number` from the model's inputs."""
        self._start()
        for earlier in range(number):
            self._propagate(earlier)

    # -- a stage -----------------------------------------------------------------------------------------------------

    def _names(self, number: int) -> list[str]:
        """Returns the names of the model's tensors that a stage uses."""
        return [name for name in self.variants.used(number) if name in self.run.tensors]

    def _load(self, number: int) -> dict[str, Tensor]:
        """Returns a stage's weights and solved groups on the compute device, and drops those of another stage."""
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None
            with phase("transfers"):
                loaded = self.loader.take(number, self._names(number))
                for i in self.groups_in[number]:
                    if self.solved[i] is not None:
                        self.mover.wait()  # in a replay, the stage's groups may still be in transfer
                        group = self.solved[i].group
                        buffers = self.journal.buffers(group) if group.weight_packed.is_meta else group.named_buffers()
                        loaded |= {f"wush_group_{i}.{name}": buffer.to(self.device) for name, buffer in buffers}
            self._loaded = (number, loaded)
        return self._loaded[1]

    def _observe(self, number: int, step: list[int]) -> dict[int, Observation]:
        """Runs every batch through what leads to these groups of a stage. Returns what their observers saw."""
        graph_module = self.stages[number].graph_module
        with phase("forwards"):
            loaded, batches, finite = self._load(number), iter(self.batches), []
            seen = {i: allocate(graph_module, i, self.device) for i in observed(graph_module) if i in step}
            self.variants.observe_into(number, seen)
            for variant in self.variants:
                for _ in variant.observe(number, loaded, step):
                    # A NaN or Inf in an input reaches the diagonal of its moment, so checking K values is enough.
                    moments = [s.moment.diagonal(dim1=-2, dim2=-1) for s in seen.values()]
                    finite.append(torch.stack([diagonal.isfinite().all() for diagonal in moments]))
                    self.progress.advance(next(batches).tokens())
            self._check_finite(seen, torch.stack(finite).cpu())
        return seen

    def _warn_if_short(self, seen: dict[int, Observation]) -> None:
        """Warns of a group that uses its whole second moment and has more channels than it has seen tokens.

        Of groups with as many tokens, as in all layers of a decoder, it names the widest of the first stage alone.
        """
        for i in sorted(seen, key=lambda i: -self.groups[i].width):
            group, count = self.groups[i], int(seen[i].count.sum())
            whole = group.recipe.solver == "gptq" or group.recipe.moments == "conditional"
            if whole and count < group.width and group.width > self.short.get(count, 0):
                self.short[count] = group.width
                log.warning(
                    "%d calibration tokens are fewer than the %d channels of %s: its second moment is rank-deficient "
                    "and rests on damping; give at least %d tokens",
                    count,
                    group.width,
                    group.name,
                    4 * group.width,
                )

    def _check_finite(self, seen: dict[int, Observation], finite: Tensor) -> None:
        """Raises `NonFiniteError` unless all moments are finite.

        seen     the groups' observations, in order
        finite   bool [batches, groups]: whether a group's moment is finite after each batch
        """
        if not finite.all():
            batch, group = (~finite).nonzero()[0].tolist()
            where = f"{self.batches[batch]}" + (f" of rank {self.ranks.rank}" if self.ranks.size > 1 else "")
            number, observation = list(seen.items())[group]
            name = self.groups[number].name
            if self.groups[number].experts is not None:
                name += f"[{first_bad_expert(observation.moment)}]"
            raise NonFiniteError(
                f"{name}: its calibration inputs hold NaN or Inf in {where}, or "
                "overflow fp32 when squared; repair the data or the model, or put the layer in ignore"
            )

    def _units(self, i: int) -> list[Unit]:
        """The units of work in which group `i` is solved: one, or shares of its experts."""
        experts = self.groups[i].experts
        return [(i, 0)] if experts is None else [(i, k) for k in range(len(shares(experts, self.ranks.size)))]

    def _cost(self, unit: Unit) -> float:
        group = self.groups[unit[0]]
        cost = solve_cost(group.recipe, sum(linear.rows for linear in group.linears), group.width)
        return cost * (group.experts or 1) / len(self._units(unit[0]))

    def _solve(self, number: int, own: list[int]) -> None:
        """Observes groups of a stage, solves them and rewrites its graph."""
        stage, seen = self.stages[number], {}
        if self.windows is not None:
            seen = self._retry_smaller(number, lambda: self._observe(number, own))
            with phase("reduce"):
                self.ranks.reduce(seen, {unit: self._cost(unit) for i in seen for unit in self._units(i)})
                for i, observation in seen.items():
                    observation.sensitivity = self.weights.sensitivity.get(i)
                    if observation.expert is not None and observation.pooled is None:
                        name = self.groups[i].name
                        observation.pooled = pooled_moment(observation.moment, observation.count, name)
            self._warn_if_short(seen)
            self.variants.remove_observers(number, own)
        loaded = self._load(number)

        left = len(own)  # to be solved, here or by other processes
        experts = [i for i in own if self.groups[i].experts is not None]
        common: dict[Unit, Solved] = {}

        def solve_unit(unit: Unit) -> Solved:
            nonlocal left
            i, share = unit
            group = self.groups[i]
            self.progress.at(stage.name, f"solving {group.name.rpartition('.')[2]}")
            with phase("solve"):
                if group.experts is None:
                    solved = solve_group(group, loaded, seen.pop(i, None))
                elif share < 0:
                    return solve_common(group, loaded, seen.get(i))
                else:
                    part = shares(group.experts, self.ranks.size)[share]
                    solved = solve_experts_of(group, loaded, seen.get(i), part, common[i, -1])
            self.progress.at(stage.name, group.name, solved.report.get("relative_loss"))
            if share == 0:
                self.progress.advance()
                left -= 1
            return solved

        with phase("exchange"):
            common |= self.ranks.solve([(i, -1) for i in experts], solve_unit)
            parts = self.ranks.solve([unit for i in own for unit in self._units(i)], solve_unit)
        solutions = {i: parts[i, 0] for i in own}
        for i in experts:
            joined = [parts[unit] for unit in self._units(i)]
            solutions[i] = join_shares(self.groups[i], loaded, seen.pop(i, None), common[i, -1], joined)
        for i, solved in solutions.items():
            solved.report["token_weights"] = "gradient" if i in self.weights else "uniform"
        self.progress.advance(steps=left)
        for i, solved in solutions.items():
            self.solved[i], report = solved, solved.report
            self.progress.event("group", stage=stage.name, group=self.groups[i].name, **report)
            if report.get("damping_tries", 0) > 1:
                log.warning(
                    "%s: its second moment was not positive definite; damping was added %d times",
                    self.groups[i].name,
                    report["damping_tries"],
                )
        self.variants.rewrite(number, solutions)
        for name in set(loaded) - self.variants.used(number):  # frees the original weights on the device
            del loaded[name]

    def _propagate(self, number: int) -> None:
        """Runs every batch through a stage and keeps the outputs."""
        with phase("forwards"):
            loaded, batches = self._load(number), iter(self.batches)
            for variant in self.variants:
                for _ in variant.propagate(number, loaded):
                    self.progress.advance(next(batches).tokens())

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _resume(self) -> int:
        """Restores the stages that the journal holds. Returns the number of the first stage to run."""
        number = self.ranks.smallest(0 if self.journal is None else self.journal.finished())
        for k in range(min(number, self.last + 1)):
            self.variants.remove_observers(k)
            for i in self.groups_in[k]:
                self.solved[i] = Solved(*self.journal.restore(self.groups[i], k, self.run.tensors.home))
            self.variants.rewrite(k, {i: self.solved[i] for i in self.groups_in[k]})
        if number:
            self.progress.event("resumed", stages=number)
            self.progress.note(
                f"found {number} of {len(self.stages)} stages finished in {self.journal.target}"
                + (f": going on with {self.stages[number].name}" if number < len(self.stages) else "")
            )
        return number

    def _steps(self, first: int) -> int:
        """Returns the steps of the progress bar if the loop starts at stage `first`."""
        groups = sum(map(len, self.groups_in[first:]))
        if self.windows is None:
            return groups
        replayed = first if first <= self.last else 0
        todo = sum(len(self.steps_in[k]) + (k < self.last) for k in range(first, self.last + 1))
        return groups + (replayed + todo) * len(self.batches)

    def calibrate(self) -> tuple[list[Solved], list[Stage]]:
        """Runs the stages up to the last one with a group. A journal also gets the tensors of later stages."""
        if self.windows is not None:
            self._weigh()
        first = self._resume()
        self.progress.begin(self._steps(first), self.device, "step")
        if 0 < first <= self.last and self.windows is not None:
            self._retry_smaller(first, lambda: None, replay=True)
        for number in range(first, len(self.stages) if self.journal is not None else self.last + 1):
            stage, own = self.stages[number], self.groups_in[number]
            self.progress.at(stage.name)
            for step in self.steps_in[number]:
                self._solve(number, step)
            if self.journal is not None:
                with phase("journal"):
                    self.journal.commit(number, {self.groups[i].name: self.solved[i] for i in own})
            if number < self.last and self.windows is not None:
                self.loader.start(number + 1, self._names(number + 1))
                self._retry_smaller(number, lambda number=number: self._propagate(number))
            if self.journal is not None:
                with phase("journal"):
                    self.journal.settle(self.ranks)
            speed = round(self.progress.tokens_per_second(), 1)
            self.progress.event("stage", stage=stage.name, tokens_per_second=speed)
            self._loaded = None
            self.mover.start([self.solved[i].group for i in own])
        self.loader.close()
        self.mover.close()
        self._warn_of_starved()
        return self.solved, self.stages

    def _warn_of_starved(self) -> None:
        """Warns of experts that saw too few tokens, once for a layer: both products of its experts see the same."""
        starved = {}
        for group, one in zip(self.groups, self.solved, strict=True):
            if one is not None and (numbers := starved_experts(one.report, group.recipe)):
                starved[group.name.rpartition(".")[0]] = numbers
        if starved:
            some = "; ".join(f"{path}: {_listed(numbers)}" for path, numbers in list(starved.items())[:STARVED_LAYERS])
            more = f"; and {len(starved) - STARVED_LAYERS} more layers" if len(starved) > STARVED_LAYERS else ""
            log.warning(
                "%d experts saw fewer than %d calibration tokens and lean on the moment of their layer's other experts "
                "(%s%s): give more data, or data of more kinds; the report has the tokens of each expert",
                sum(map(len, starved.values())),
                SHRINKAGE_ROWS,
                some,
                more,
            )


def _listed(numbers: list[int]) -> str:
    """The first of some numbers."""
    more = f" and {len(numbers) - STARVED_EXPERTS} more" if len(numbers) > STARVED_EXPERTS else ""
    return ", ".join(map(str, numbers[:STARVED_EXPERTS])) + more
