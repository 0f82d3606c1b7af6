"""Warms up: does the one-time work of a process in threads while the model is traced.

Tracing keeps one CPU core busy and leaves the GPU idle. At the same time, the threads check weights, compile kernels,
load libraries and pin memory. Their results are dropped. They call no module, because tracing replaces the call of a
module in every thread. A task that fails is only logged: the run reports the error when it does the same work.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from .. import feedback, formats
from ..config import WushConfig
from ..data import Batch
from ..kernels.dispatch import resolve
from ..modules import feedback_arguments, stores_global_scale
from ..passes.calibration.observe import GROUP_SAMPLE_ROWS
from ..phases import phase
from ..recipe import Recipe
from ..solver.loss import layer_loss
from ..solver.solution import block_size, moment_shape, weight_rule
from ..solver.solve import ROUNDED_ELEMENTS, solve
from ..solver.transforms import PANEL
from .context import Run
from .inputs import input_embeddings
from .microbatch import largest_batch, sequences

log = logging.getLogger("wush_compile")
# Weight rows of a group that the warm-up solves. Compiled kernels do not depend on the number.
WARM_UP_ROWS = 256


def _run(op: str, *args: object) -> object:
    """Runs `wush::op` by the provider that accepts the call. `dispatch` would drop a provider for good if it failed."""
    entries = resolve(args[0].device.index).get(op, ()) if args[0].is_cuda else ()
    default = getattr(torch.ops.wush, op)
    return next((one.run for _, one in entries if one.refuses(*args) is None), default)(*args)


def _input(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns [tokens, width], not all zeros."""
    return (torch.arange(width, device=device) % 7 - 3).to(dtype).expand(tokens, width).contiguous()


def _product(rows: int, width: int, tokens: int, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> None:
    """Runs a linear with a weight of [rows, width], unquantized and quantized."""
    x = _input(tokens, width, dtype, device)
    torch.nn.functional.linear(x, _input(rows, width, dtype, device))
    fmt, one = formats.get_format(recipe.format), torch.ones(1, device=device)
    g = [
        one if stores_global_scale(format, rule) else None
        for format, rule in ((recipe.operand, recipe.operand_rule), (recipe.format, weight_rule(recipe)))
    ]
    block = block_size(recipe, width)
    t = torch.eye(block, dtype=dtype, device=device)
    blocks = {"identity": 0, "hadamard": 1}.get(recipe.transform, width // block)
    t = t.expand(blocks, block, block).contiguous() if blocks else None
    numbers = None
    if recipe.rounds_with_feedback:
        numbers = torch.zeros(feedback.shape(recipe.format, width), dtype=torch.bfloat16, device=device)
    tail = feedback_arguments(numbers)
    if recipe.factors_rows:
        g[1] = torch.ones(rows, dtype=torch.bfloat16, device=device)
    codes, scales = _run("transform_quantize", x, t, g[0], recipe.operand, recipe.operand_rule, *tail)
    layout = () if recipe.operand == recipe.format else ("rows", recipe.operand)
    weight = torch.zeros(rows, width // fmt.per_byte, dtype=torch.uint8, device=device)
    weight_scales = torch.ones(rows, width // fmt.group_size, dtype=fmt.scale_dtype, device=device)
    _run("fp4_linear", codes, scales, g[0], weight, weight_scales, g[1], None, None, recipe.format, dtype, *layout)
    if recipe.solver == "rtn" and recipe.format not in formats.WEIGHT_FORMATS:
        chunk = _input(max(1, ROUNDED_ELEMENTS // width), width, torch.float32, device)
        _run(
            "transform_quantize", chunk, None, None if recipe.factors_rows else g[1], recipe.format, weight_rule(recipe)
        )


def _solutions(sizes: list[tuple[int, Recipe]], tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    """Solves small groups of these widths sequentially, because the first cuSOLVER call must happen in one thread."""
    for width, recipe in sizes:
        _solution(width, tokens, recipe, dtype, device)


def _solution(width: int, tokens: int, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = _input(tokens, width, dtype, device), _input(WARM_UP_ROWS, width, dtype, device)
    moment = torch.zeros(moment_shape(recipe, width), device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    sample = torch.zeros(GROUP_SAMPLE_ROWS, width, dtype=dtype, device=device)
    _run("observe", x, None, moment, count, sample, recipe.seed)
    solution = solve(weight, recipe, moment=moment, count=tokens, sample=sample, name="warm-up")
    layer_loss(sample[:WARM_UP_ROWS], weight, solution, recipe)


def _pin(count: int, nbytes: int) -> None:
    """Pins memory for `count` values and frees it. PyTorch keeps freed memory pinned for the next request."""
    blocks = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
    del blocks


def warm_up_tasks(model: nn.Module, batches: list[Batch], config: WushConfig, run: Run) -> Iterator[Callable[[], None]]:
    """Yields the one-time tasks that quantizing this model on these batches would otherwise do later."""
    linears = {
        (module.out_features, module.in_features, module.weight.dtype, config.recipe_of(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not config.ignores(name)
    }
    linears = {linear for linear in linears if linear[1] % linear[3].group_size == 0}
    counts = [sequences(batch) for batch in batches]
    if not linears or None in counts:
        return
    longest, own = max(batch["input_ids"].shape[1] for batch in batches), -(-sum(counts) // run.ranks.size)
    batch_size = run.batch_size or largest_batch(own, longest)
    tokens, device = batch_size * longest, run.device
    embeddings = input_embeddings(model)
    in_memory = run.activations_dir is None
    if in_memory and device.type == "cuda" and isinstance(embeddings, nn.Embedding) and not embeddings.weight.is_cuda:
        # One value for each micro-batch, and two in flight.
        nbytes = tokens * embeddings.embedding_dim * embeddings.weight.element_size()
        yield functools.partial(_pin, -(-own // batch_size) + 2, nbytes)
    # A moment wider than a panel is factored in another way, which leaves other strides. Take the least width of each.
    sizes = {(w > PANEL, recipe): (w, recipe) for _, w, _, recipe in sorted(linears, key=lambda x: -x[1])}
    dtype = next(iter(linears))[2]
    yield functools.partial(_solutions, sorted(sizes.values(), key=str), tokens, dtype, device)
    for out, width, dtype, recipe in sorted(linears, key=str):
        yield functools.partial(_product, out, width, tokens, recipe, dtype, device)


def _attempt(task: Callable[[], None], device: torch.device) -> None:
    try:
        with torch.no_grad(), torch.cuda.device(device):
            task()
    except Exception as error:
        log.debug("%s in the warm-up: %s", type(error).__name__, error)


@contextlib.contextmanager
def run_during(check: Callable[[], None], tasks: Iterable[Callable[[], None]], device: torch.device) -> Iterator[None]:
    """Runs `check` and each of `tasks` in a thread while the block runs. Then waits, and raises any error of `check`.

    On a CPU only `check` runs, because there is nothing to warm up.
    """
    tasks = list(tasks) if device.type == "cuda" else []
    with ThreadPoolExecutor(1 + len(tasks), "warm-up") as pool:
        checked = pool.submit(check)
        for task in tasks:
            pool.submit(_attempt, task, device)
        yield
        with phase("warm-up"):
            pool.shutdown()
            checked.result()
            if tasks:
                torch.cuda.empty_cache()  # because the size of micro-batches depends on the free memory
