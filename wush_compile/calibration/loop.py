"""The stage loop: observe -> solve -> commit -> propagate, one decoder layer after the other.

1. Run every batch through the stage with observers in its graph: second moments and samples of each group's input.
2. Solve each group, and rewrite its linears in the stage's graph into quantized ones.
3. Hand the solved groups to the journal, if there is one: it writes them during step 4.
4. Run every batch through the rewritten stage: the next stage sees what the *quantized* model produces.

Nothing is installed in the model here. A stage's weights are brought to the compute device when it is reached and dropped
when it is left (`tensors`); every batch's live values wait where `Activations` keeps them; moments are one stage's. When a
micro-batch does not fit, or a run goes on where another stopped, the finished stages are run again from the inputs: step 4
alone, from what the journal holds.
"""

import logging
import os

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..capture.export import Captured
from ..config import WushConfig
from ..data import Batch
from ..errors import DataError, NonFiniteError
from ..passes.calibration.group import LinearGroup
from ..passes.calibration.observe import Observation, allocate, insert_observers, observed, remove_observers
from ..passes.calibration.partition import Stage, partition
from ..passes.calibration.place import place
from ..passes.calibration.rewrite import rewrite
from ..phases import phase
from ..solver.solution import solve_cost
from .activations import Activations
from .journal import Journal
from .microbatch import MicroBatch, choose_rows, regroup, sequences
from .progress import Progress
from .ranks import ALONE, Alone
from .solve_group import Solved, solve_group
from .tensors import Leaver, Loader, ModelTensors

log = logging.getLogger("wush_compile")
AS_GIVEN = 2**31  # stands for a micro-batch without a limit where ranks compare theirs


def _warn_if_short(groups: list[LinearGroup], tokens: int, config: WushConfig) -> None:
    if config.solver == "gptq" or config.moments == "conditional":
        wide = max(groups, key=lambda g: g.width)
        if tokens < wide.width:
            log.warning(
                "%d calibration tokens are fewer than the %d channels of %s: its second moment is rank-deficient and rests "
                "on damping; give at least %d tokens",
                tokens,
                wide.width,
                wide.name,
                4 * wide.width,
            )


def _used(stage: Stage) -> set[str]:
    """Names of the tensors in a stage's graph."""
    return {n.target for n in stage.graph_module.graph.nodes if n.op == "get_attr"}


def _groups_by_stage(stages: list[Stage], groups: list[LinearGroup]) -> list[list[int]]:
    """For each stage the numbers of the groups whose linears it runs."""
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
    """One run of the stage loop. `calibrate` has the arguments; without batches groups are solved without data."""

    def __init__(
        self,
        captured: Captured,
        groups: list[LinearGroup],
        batches: list[Batch] | None,
        config: WushConfig,
        *,
        tensors: ModelTensors,
        device: torch.device,
        progress: Progress,
        team: Alone = ALONE,
        journal: Journal | None = None,
        batch_size: int | None = None,
        activations_dir: str | os.PathLike | None = None,
    ):
        self.captured, self.groups, self.config = captured, groups, config
        self.tensors, self.device, self.progress, self.team, self.journal = tensors, device, progress, team, journal
        self.activations_dir = activations_dir
        self.solved: list[Solved | None] = [None] * len(groups)
        graph_module = captured.graph_module
        if device != tensors.device:
            place(graph_module, device, {name for name, _ in graph_module.named_buffers() if name in tensors})
        if batches is not None:
            mask = next((p for p in captured.placeholders() if p.name == "attention_mask"), None)
            insert_observers(graph_module, groups, config, mask)
        self.stages = partition(graph_module)
        self.groups_in = _groups_by_stage(self.stages, groups)
        self.last = max(number for number, own in enumerate(self.groups_in) if own)
        self.last_use = {name: number for number, stage in enumerate(self.stages) for name in stage.inputs}
        self._loaded: tuple[int, dict[str, Tensor]] | None = None
        self.loader, self.leaver = Loader(tensors, device), Leaver(tensors.home, device)
        self.windows = None if batches is None else team.share(batches)

        def choose() -> int | None:
            beside = self.windows is not None and batch_size is None and device != tensors.device
            return self._choose_rows() if beside else batch_size

        self.rows = choose() if journal is None else journal.rows(choose)
        if journal is not None:
            journal.lay_out(
                [_used(stage) for stage in self.stages], [[groups[i] for i in own] for own in self.groups_in], tensors
            )
        self._start()

    # -- batches ---------------------------------------------------------------------------------------------------------

    def _choose_rows(self) -> int | None:
        rows = choose_rows(self.windows, self.stages[: self.last + 1], self.captured.placeholders(), self.device)
        return None if rows is None else self.team.smallest(rows)

    def _start(self) -> None:
        """Back to the inputs: no stage has been run."""
        if self.windows is None:
            self.batches, self.activations = [], None
            return
        self.batches: list[MicroBatch] = regroup(self.windows, self.rows)
        values = [self.captured.flatten(i, batch.inputs) for i, batch in enumerate(self.batches)]
        self.activations = Activations(values, self.device, self.device != self.tensors.device, self.activations_dir)

    def _halved(self) -> int:
        """The next smaller micro-batch; called where the current one does not fit."""
        counts = [sequences(batch.inputs) for batch in self.batches]
        most = self.rows or max((c for c in counts if c is not None), default=1)
        if None in counts or most < 2:
            raise DataError(
                f"a batch of {max(b.tokens() for b in self.batches)} tokens does not fit the memory of {self.device}: "
                "calibrate on shorter windows, or on a device with more memory"
            )
        return most // 2

    def _fitting(self, number: int, work, replay: bool = False):
        """`work()`, with every batch at stage `number`: where memory is too small, with half the micro-batch, from the
        inputs through the finished stages. `replay`: do that at once."""
        while True:
            rows = self.rows or AS_GIVEN
            try:
                if replay:
                    self._replay(number)
                result = work()
            except torch.OutOfMemoryError:
                result, rows = None, self._halved()
            agreed = self.team.smallest(rows)
            if agreed == (self.rows or AS_GIVEN):
                return result
            self.rows, self._loaded, replay = agreed, None, True
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            stage = self.stages[number].name
            log.warning("%s: out of memory; on with %d sequences at a time", stage, agreed)
            self.progress.event("batch_size", stage=stage, batch_size=agreed, reason="out of memory")
            if self.journal is not None:
                self.journal.shrink(stage, agreed)

    def _replay(self, number: int) -> None:
        self._start()
        for earlier in range(number):
            self._propagate(earlier)

    # -- a stage ---------------------------------------------------------------------------------------------------------

    def _names(self, number: int) -> list[str]:
        """The model's tensors that a stage uses."""
        return [name for name in _used(self.stages[number]) if name in self.tensors]

    def _load(self, number: int) -> dict[str, Tensor]:
        """The weights of a stage on the compute device, and what is solved of it; no other stage's."""
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None
            with phase("transfers"):
                loaded = self.loader.take(number, self._names(number))
                for i in self.groups_in[number]:
                    if self.solved[i] is not None:
                        self.leaver.wait()  # a stage that is run again: what is solved of it may be on its way
                        group = self.solved[i].group
                        buffers = self.journal.buffers(group) if group.weight_packed.is_meta else group.named_buffers()
                        loaded |= {f"wush_group_{i}.{name}": buffer.to(self.device) for name, buffer in buffers}
            self._loaded = (number, loaded)
        return self._loaded[1]

    def _forwards(self, number: int):
        """(index, outputs) of every batch through the stage."""
        stage, loaded = self.stages[number], self._load(number)
        for index, inputs in enumerate(self.activations.read(stage.inputs)):
            yield index, functional_call(stage.graph_module, loaded, tuple(inputs))
            self.progress.advance(self.batches[index].tokens())

    def _observe(self, number: int) -> dict[int, Observation]:
        graph_module = self.stages[number].graph_module
        with phase("forwards"):
            self._load(number)
            seen = {i: allocate(graph_module, i, self.device) for i in observed(graph_module)}
            finite = [
                # A NaN or Inf in an input is one on the diagonal of its moment: a check of K values, not of all.
                torch.stack([s.moment.diagonal(dim1=-2, dim2=-1).isfinite().all() for s in seen.values()])
                for _ in self._forwards(number)
            ]
            self._check_finite(list(seen), torch.stack(finite).cpu())
        return seen

    def _check_finite(self, numbers: list[int], finite: Tensor) -> None:
        """finite: bool [batches, groups], of the moments after each batch."""
        if not finite.all():
            batch, group = (~finite).nonzero()[0].tolist()
            where = f"{self.batches[batch]}" + (f" of rank {self.team.rank}" if self.team.size > 1 else "")
            raise NonFiniteError(
                f"{self.groups[numbers[group]].name}: its calibration inputs hold NaN or Inf in {where}, or "
                "overflow fp32 when squared; repair the data or the model, or put the layer in ignore"
            )

    def _cost(self, group: LinearGroup) -> float:
        return solve_cost(self.config, sum(linear.rows for linear in group.linears), group.width)

    def _solve(self, number: int) -> None:
        stage, own = self.stages[number], self.groups_in[number]
        seen = {}
        if self.activations is not None:
            seen = self._fitting(number, lambda: self._observe(number))
            with phase("reduce"):
                self.team.reduce(seen, {i: self._cost(self.groups[i]) for i in seen})
            if not any(self.groups_in[:number]):
                _warn_if_short(self.groups, int(next(iter(seen.values())).count), self.config)
            remove_observers(stage.graph_module)
        loaded = self._load(number)

        def one(i: int) -> Solved:
            self.progress.at(stage.name, f"solving {self.groups[i].name.rpartition('.')[2]}")
            with phase("solve"):
                solved = solve_group(self.groups[i], loaded, self.config, seen.pop(i, None))
            self.progress.at(stage.name, self.groups[i].name, solved.report.get("relative_loss"))
            if self.activations is None:
                self.progress.advance()
            return solved

        with phase("exchange"):
            solutions = self.team.solve(own, one)
        for i, solved in solutions.items():
            self.solved[i], report = solved, solved.report
            self.progress.event("group", stage=stage.name, group=self.groups[i].name, **report)
            if report.get("damping_tries", 0) > 1:
                log.warning(
                    "%s: its second moment was not positive definite; damping was added %d times",
                    self.groups[i].name,
                    report["damping_tries"],
                )
        self._rewrite(number)
        for name in set(loaded) - _used(stage):  # what has been replaced leaves the device
            del loaded[name]

    def _rewrite(self, number: int) -> None:
        rewrite(
            self.stages[number].graph_module,
            [(self.groups[i], self.solved[i].group, f"wush_group_{i}") for i in self.groups_in[number]],
        )

    def _propagate(self, number: int) -> None:
        stage = self.stages[number]
        with phase("forwards"):
            for index, outputs in self._forwards(number):
                self.activations.write(index, dict(zip(stage.outputs, outputs, strict=True)))
                dead = [n for n in self.activations.names(index) if self.last_use.get(n, -1) <= number]
                self.activations.drop(index, dead)

    # -- the run ---------------------------------------------------------------------------------------------------------

    def _resume(self) -> int:
        """The first stage to do: those before it are in the journal."""
        number = self.team.smallest(0 if self.journal is None else self.journal.finished())
        for k in range(min(number, self.last + 1)):
            remove_observers(self.stages[k].graph_module)
            for i in self.groups_in[k]:
                self.solved[i] = Solved(*self.journal.restore(self.groups[i], k, self.tensors.home))
            self._rewrite(k)
        if number:
            self.progress.event("resumed", stages=number)
        return number

    def _steps(self, first: int) -> int:
        if self.activations is None:
            return sum(map(len, self.groups_in))
        replayed = first if first <= self.last else 0
        todo = sum(bool(self.groups_in[k]) + (k < self.last) for k in range(first, self.last + 1))
        return (replayed + todo) * len(self.batches)

    def run(self) -> tuple[list[Solved], list[Stage]]:
        """All stages up to the last that has a group; with a journal, the rest is copied into it."""
        first = self._resume()
        self.progress.begin(self._steps(first), self.device, "batch" if self.batches else "group")
        if 0 < first <= self.last and self.activations is not None:
            self._fitting(first, lambda: None, replay=True)
        for number in range(first, len(self.stages) if self.journal is not None else self.last + 1):
            stage, own = self.stages[number], self.groups_in[number]
            self.progress.at(stage.name)
            if own:
                self._solve(number)
            if self.journal is not None:
                with phase("journal"):
                    self.journal.commit(number, {self.groups[i].name: self.solved[i] for i in own})
            if number < self.last and self.activations is not None:
                self.loader.start(number + 1, self._names(number + 1))
                self._fitting(number, lambda number=number: self._propagate(number))
            if self.journal is not None:
                with phase("journal"):
                    self.journal.settle(self.team)
            self.progress.event(
                "stage", stage=stage.name, tokens_per_second=round(self.progress.tokens_per_second(), 1)
            )
            self._loaded = None
            self.leaver.start([self.solved[i].group for i in own])
        self.loader.close()
        self.leaver.close()
        return self.solved, self.stages


@torch.no_grad()
def calibrate(
    model: nn.Module,
    captured: Captured,
    groups: list[LinearGroup],
    batches: list[Batch] | None,
    config: WushConfig,
    progress: bool | Progress = True,
    *,
    device: torch.device | None = None,
    tensors: ModelTensors | None = None,
    **settings,
) -> tuple[list[Solved], list[Stage]]:
    """Solves every group on the batches (None: without data); the model stays as it is.

    device    where to compute: by default where the model is. Elsewhere, one stage's weights are there at a time
    tensors   where the weights come from: by default from the model
    settings  team, journal, batch_size (sequences a forward; None: chosen on a GPU, as given elsewhere), activations_dir

    Returns the solved groups, in the order of `groups`, and the stages with rewritten graphs.
    """
    tensors = ModelTensors(model) if tensors is None else tensors
    own = progress if isinstance(progress, Progress) else Progress(progress)
    try:
        return Calibration(
            captured,
            groups,
            batches,
            config,
            tensors=tensors,
            device=tensors.device if device is None else device,
            progress=own,
            **settings,
        ).run()
    except Exception as error:
        settings.get("team", ALONE).fail(error)
        raise
    finally:
        if own is not progress:
            own.close()
