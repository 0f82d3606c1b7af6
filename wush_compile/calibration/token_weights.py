"""Weighs the tokens of calibration by gradients (docs/spec.md §3): one pass, forward and backward, before the stages.

The weight of a token in a group is the norm of d(log-likelihood) / d(output of the group's linears), divided by the
mean over all tokens, and at most `LARGEST_WEIGHT`. The log-likelihood is of tokens that are sampled from the model's
own prediction, so that the weights say what the prediction depends on, whatever the data are.

The pass runs stage by stage. Forward, it keeps the values between stages. Backward, it runs each stage again with
gradients. So a GPU holds the weights of one stage, and the values inside of one. As many micro-batches go together as
have room for the values between stages: only one if the weights stay on the device.
"""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from ..data import Batch
from ..errors import WushError
from ..passes.calibration.group import LinearGroup
from ..passes.calibration.taps import SensitiveTap, Tap, tapped
from ..solver.sensitivity import Sensitivity, uses_sensitivity
from ..solver.solution import uses_moment
from .activations import Activations
from .context import Run
from .likelihood import NoGradient, predictions, sampled_gradient
from .microbatch import MicroBatch, regroup, sequences, traced_bytes
from .tensors import Loader
from .variants import Variant, Variants

log = logging.getLogger("wush_compile")
LARGEST_WEIGHT = 20.0
# The power of a gradient's norm in the weight. 2 is the curvature of the log-likelihood. On SmolLM2 1, 1.5 and 2 do not
# differ (benchmarks/trial_token_weights.py); with massive tokens 1 leaves 10 % of their harm, and 2 too little of their
# own precision (benchmarks/trial_massive_tokens.py).
POWER = 1.5
# Tokens in a micro-batch of the pass: it also runs the head, whose logits are larger than anything in a layer.
PASS_TOKENS = 4096
# The share of the host's memory for the values between stages, where the weights are loaded stage by stage.
HELD_SHARE = 0.25
# The kernels for attention of a GPU whose gradients are the same in every run. Those of flash attention and cuDNN add
# up in an order that changes, whatever `torch.use_deterministic_algorithms` says: two runs then had other codes.
SAME_IN_EVERY_RUN = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class TokenWeights:
    """What gradients say, by group number.

    of_group      the fp32 weights of each unit (see `MicroBatch`) of this process
    sensitivity   what errors of the group's input cost, from the tokens of all processes
    """

    of_group: dict[int, list[Tensor]]
    sensitivity: dict[int, Sensitivity] = field(default_factory=dict)

    def __contains__(self, group: int) -> bool:
        return group in self.of_group

    def of(self, group: int, batch: MicroBatch, device: torch.device) -> Tensor:
        """Returns the weights of a micro-batch's rows [rows]."""
        return torch.cat([self.of_group[group][unit] for unit in batch.units]).to(device)


def wanted_groups(groups: list[LinearGroup]) -> set[int]:
    """Returns the numbers of the groups whose recipe weighs tokens by gradients. Rows of experts are not tokens."""
    weighed = [(i, g.recipe) for i, g in enumerate(groups) if g.experts is None]
    return {i for i, recipe in weighed if recipe.token_weights == "gradient" and uses_moment(recipe)}


# -- the pass --------------------------------------------------------------------------------------------------------


class _Pass:
    """The pass of one graph's micro-batches."""

    def __init__(
        self,
        variant: Variant,
        wanted: set[int],
        run: Run,
        loader: Loader,
        offset: int,
        seed: int,
        make: Callable[[int], Tap],
    ):
        """offset: the number of this process's first unit among all processes' units. make: the tap of a group."""
        self.variant, self.run, self.loader, self.offset, self.seed = variant, run, loader, offset, seed
        self.predictions = predictions(variant.captured)
        self.stages = variant.stages
        self.made = [tapped(stage, variant.groups, wanted, make) for stage in self.stages]
        self.first = min((k for k, (_, taps) in enumerate(self.made) if taps), default=len(self.stages))
        self.inputs = [p.name for p in variant.captured.placeholders()]
        # Gradients flow into values that a stage makes from the first one with a group on.
        self.flows = [{n for s in self.stages[self.first : k] for n in s.outputs} for k in range(len(self.stages))]

    def together(self, batch: MicroBatch) -> int:
        """Returns how many micro-batches like this one to run together."""
        if not self.run.offloads:
            return 1
        inputs = [n for stage in self.stages for n in stage.graph_module.graph.find_nodes(op="placeholder")]
        held = sum({n.name: traced_bytes(n.meta.get("val")) for n in inputs}.values())
        given = sum(traced_bytes(p.meta.get("val")) for p in self.variant.captured.placeholders())
        actual = sum(t.nbytes for t in pytree.tree_leaves(batch.inputs) if isinstance(t, Tensor))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return max(1, int(HELD_SHARE * memory / max(held * actual / given, 1)))

    def _load(self, number: int, following: int | None) -> dict[str, Tensor]:
        def names(k: int) -> list[str]:
            used = self.made[k][0].graph.find_nodes(op="get_attr")
            return [n.target for n in used if n.target in self.run.tensors]

        loaded = self.loader.take(number, names(number))
        if following is not None:
            self.loader.start(following, names(following))
        return loaded

    def run_chunk(self, batches: list[MicroBatch], values: list[dict]) -> Iterator[tuple[int, int, tuple]]:
        """Runs micro-batches on the values of the graph's inputs. Yields (group, batch, what its tap collected)."""
        run, last = self.run, len(self.stages) - 1
        forward = Activations(values, run.device, run.offloads, run.activations_dir)
        for k in range(last):
            loaded = self._load(k, k + 1)
            for index, inputs in enumerate(forward.read(self.stages[k].inputs)):
                outputs = functional_call(self.made[k][0], loaded, tuple(inputs))
                forward.write(index, dict(zip(self.stages[k].outputs, outputs, strict=True)))
        backward = Activations([{} for _ in batches], run.device, run.offloads, run.activations_dir)
        for k in range(last, self.first - 1, -1):
            loaded = self._load(k, k - 1 if k > self.first else None)
            gradients = (self._take(backward, i, self.stages[k].outputs) for i in range(len(batches)))
            for index, inputs in enumerate(forward.read(self.stages[k].inputs)):
                made = self._backward(k, loaded, inputs, next(gradients), batches[index])
                before = self._take(backward, index, made)
                backward.write(index, {n: g + before[n] if n in before else g for n, g in made.items()})
                for group, tap in self.made[k][1].items():
                    yield group, index, tap.take()

    @staticmethod
    def _take(store: Activations, index: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns the gradients of a batch that are kept under these names, and drops them."""
        present = [n for n in names if n in store.names(index)]
        found = {n: store.get(index, n) for n in present}
        store.drop(index, present)
        return found

    def _backward(self, k: int, loaded: dict, inputs: list, gradients: dict[str, Tensor], batch: MicroBatch) -> dict:
        """Returns the gradients of a stage's inputs by name, from those of its outputs. The taps get those inside."""
        stage, (module, taps) = self.stages[k], self.made[k]
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in zip(stage.inputs, inputs, strict=True)
            if name in self.flows[k] and isinstance(value, Tensor) and value.is_floating_point()
        }
        anchor = torch.zeros((), device=self.run.device, requires_grad=True)
        for tap in taps.values():
            tap.anchor, tap.tensors = anchor, loaded
        with torch.enable_grad(), self._attention():
            arguments = [leaves.get(name, value) for name, value in zip(stage.inputs, inputs, strict=True)]
            outputs = dict(zip(stage.outputs, functional_call(module, loaded, tuple(arguments)), strict=True))
        mask = self._mask(batch)
        for name, kind in self.predictions.items():
            if name in outputs:
                first = batch.units[0] + self.offset
                own = sampled_gradient(outputs[name].detach(), kind, mask, first, self.seed)
                gradients[name] = gradients[name] + own if name in gradients else own
        flowing = [n for n, g in gradients.items() if isinstance(outputs[n], Tensor) and outputs[n].requires_grad]
        if not flowing:
            return {}
        found = torch.autograd.grad(
            [outputs[n] for n in flowing],
            [*leaves.values(), anchor],
            [gradients[n] for n in flowing],
            allow_unused=True,
        )
        return {name: g for name, g in zip(leaves, found) if g is not None}

    def _attention(self) -> contextlib.AbstractContextManager:
        """Attention whose gradients are the same in every run. The kernels of a CPU are."""
        return sdpa_kernel(SAME_IN_EVERY_RUN) if self.run.device.type == "cuda" else contextlib.nullcontext()

    def _mask(self, batch: MicroBatch) -> Tensor | None:
        """Returns the mask of the rows that the model predicts."""
        inputs = batch.inputs if isinstance(batch.inputs, dict) else {}
        decoder = any(name.startswith("decoder_") for name in inputs)
        mask = inputs.get("decoder_attention_mask" if decoder else "attention_mask")
        return None if mask is None else mask.to(self.run.device)


def collected(
    variants: Variants,
    wanted: set[int],
    windows: list,
    size: int | None,
    offset: int,
    seed: int,
    run: Run,
    make: Callable[[int], Tap],
) -> Iterator[tuple[int, MicroBatch, tuple[Tensor, int]]]:
    """Runs the pass with micro-batches of `size` sequences. Yields (group number, micro-batch, what its tap took)."""
    variants.route(regroup(windows, size))
    loader = Loader(run.tensors, run.device)
    try:
        for variant in variants:
            if not variant.batches:
                continue
            work = _Pass(variant, wanted, run, loader, offset, seed, make)
            values = variant.activations.read(work.inputs)
            for chunk in _chunks(variant.batches, work.together):
                inputs = [dict(zip(work.inputs, next(values), strict=True)) for _ in chunk]
                for group, index, taken in work.run_chunk(chunk, inputs):
                    yield group, chunk[index], taken
    finally:
        loader.close()


@dataclass
class _Norms:
    """The norms of a group's rows, by unit, and how many rows are not masked. `units` is None if rows have no unit."""

    units: dict[int, Tensor] | None
    kept: int = 0
    sensitivity: Sensitivity | None = None

    def add(self, batch: MicroBatch, squares: Tensor, kept: int, sensitivity: Sensitivity | None = None) -> None:
        if sensitivity is not None:
            self.sensitivity = sensitivity.cpu().joined(self.sensitivity)
        if self.units is None or len(squares) % len(batch.units):
            self.units = None
            return
        self.kept += kept
        self.units |= dict(zip(batch.units, squares.sqrt().cpu().view(len(batch.units), -1), strict=True))


def _joined(a: Sensitivity | None, b: Sensitivity | None) -> Sensitivity | None:
    return a.joined(b) if a is not None else b


def _chunks(batches: list[MicroBatch], together: Callable[[MicroBatch], int]) -> Iterator[list[MicroBatch]]:
    while batches:
        count = together(max(batches, key=MicroBatch.tokens))
        yield batches[:count]
        batches = batches[count:]


def pass_size(windows: list[Batch], batch_size: int | None) -> int | None:
    """Returns the sequences in a micro-batch of the pass; None for batches as they are."""
    counts = [sequences(batch) for batch in windows]
    if None in counts:
        return batch_size
    longest = max(batch["input_ids"].shape[1] for batch in windows)
    return min(max(1, PASS_TOKENS // longest), batch_size or max(counts))


def measure(
    variants: Variants,
    groups: list[LinearGroup],
    wanted: set[int],
    windows: list[Batch],
    batch_size: int | None,
    run: Run,
) -> dict[str, Tensor]:
    """Returns the weights of the whole run, of all processes: for each group `weights` [rows] and `rows` [units].

    With them the fields of the group's `Sensitivity`, if its transform follows from one.
    """
    units = run.ranks.gather(sum(sequences(batch) or 1 for batch in windows))
    offset, size = sum(units[: run.ranks.rank]), run.ranks.smallest(pass_size(windows, batch_size) or 0) or None
    while True:
        reason, smaller = None, size
        try:
            found = {i: _Norms({}) for i in wanted}
            seed = min(groups[i].recipe.seed for i in wanted)
            taps = {i: SensitiveTap(groups[i]) if uses_sensitivity(groups[i].recipe) else Tap() for i in wanted}
            for i, batch, taken in collected(variants, wanted, windows, size, offset, seed, run, taps.__getitem__):
                found[i].add(batch, *taken)
        except torch.OutOfMemoryError:
            smaller = (size or 1) // 2
            reason = None if smaller else "one sequence does not fit the memory for a backward pass"
        except (NoGradient, WushError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
        reasons = [r for r in run.ranks.gather(reason) if r is not None]
        if reasons:
            log.warning("calibration tokens count alike, not by their gradients: %s", reasons[0])
            return {"units": torch.tensor(units)}
        agreed = run.ranks.smallest(size if smaller is None else smaller) if size is not None else None
        if agreed == size:
            break
        size = agreed
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    weights, without = {"units": torch.tensor(units)}, []
    for i in sorted(wanted):
        own = found[i].units
        mine = None if own is None else ([own[unit] for unit in sorted(own)], found[i].kept, found[i].sensitivity)
        shares = run.ranks.gather(mine)
        if None in shares:  # its rows do not belong to sequences
            without.append(groups[i].name)
            continue
        parts = [part for share, *_ in shares for part in share]
        weight, kept = torch.cat(parts).to(torch.float64) ** POWER, sum(count for _, count, _ in shares)
        mean = weight.sum() / max(kept, 1)
        if 0 < mean < math.inf:
            weights[f"{groups[i].name}.weights"] = (weight / mean).clamp(max=LARGEST_WEIGHT).to(torch.float32)
            weights[f"{groups[i].name}.rows"] = torch.tensor([len(part) for part in parts])
            if (whole := functools.reduce(_joined, (own for *_, own in shares))) is not None:
                fields = {"moment": whole.moment, "x": whole.x, "gradient": whole.gradient}
                weights |= {f"{groups[i].name}.{key}": tensor for key, tensor in fields.items()}
        else:
            without.append(groups[i].name)
    if without:
        log.warning(
            "the calibration tokens of %s count alike: no gradient reaches %s",
            without[0] + (f" and {len(without) - 1} more groups" if without[1:] else ""),
            "them" if without[1:] else "it",
        )
    return weights


def token_weights(
    variants: Variants, groups: list[LinearGroup], windows: list[Batch], batch_size: int | None, run: Run
) -> TokenWeights:
    """Returns the weights of this process's tokens, for the groups that want and can have them.

    A journal keeps the weights, so that a run that goes on has the same ones.
    """
    wanted = wanted_groups(groups)
    if not wanted:
        return TokenWeights({})

    def make() -> dict[str, Tensor]:
        return measure(variants, groups, wanted, windows, batch_size, run)

    return assigned(make() if run.journal is None else run.journal.remember("token_weights", make), groups, wanted, run)


def assigned(whole: dict[str, Tensor], groups: list[LinearGroup], wanted: set[int], run: Run) -> TokenWeights:
    """Returns this process's part of what `measure` has found."""
    units = whole["units"].tolist()
    own = slice(sum(units[: run.ranks.rank]), sum(units[: run.ranks.rank + 1]))
    found = TokenWeights({})
    for i in sorted(wanted):
        name = groups[i].name
        if (rows := whole.get(f"{name}.rows")) is None:
            continue
        found.of_group[i] = list(whole[f"{name}.weights"].split(rows.tolist())[own])
        if (moment := whole.get(f"{name}.moment")) is not None:
            tokens = int((whole[f"{name}.weights"] > 0).sum())
            found.sensitivity[i] = Sensitivity(moment, tokens, whole[f"{name}.x"], whole[f"{name}.gradient"])
    return found
