"""What a process does once, done in threads while the model is traced: weights are checked, kernels compiled, libraries
loaded, memory pinned.

Tracing keeps one CPU core busy and a GPU idle. What runs here meanwhile computes nothing that is used, and is no module:
tracing replaces what a call of a module does, for all threads. Where a piece fails, the run itself says so when it comes to it.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from .. import formats
from ..config import WushConfig
from ..data import Batch
from ..kernels.dispatch import resolve
from ..modules import has_global_scale
from ..passes.calibration.group import ignored_by
from ..passes.calibration.observe import SAMPLE_ROWS
from ..phases import phase
from ..solver.loss import layer_loss
from ..solver.solution import block_size, moment_shape
from ..solver.solve import CHUNK_ELEMENTS, solve
from ..solver.transforms import PANEL
from .microbatch import most_rows, sequences

log = logging.getLogger("wush_compile")
# Rows of the group that is solved: what kernels are compiled for does not depend on them.
ROWS = 256


def _run(op: str, *args: object) -> object:
    """`wush::op` by the provider that will take it. Not through `dispatch`, which would leave a provider out for good that
    fails here."""
    entries = resolve(args[0].device.index).get(op, ()) if args[0].is_cuda else ()
    default = getattr(torch.ops.wush, op)
    return next((one.run for _, one in entries if one.refuses(*args) is None), default)(*args)


def _input(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[tokens, width]: anything but zeros."""
    return (torch.arange(width, device=device) % 7 - 3).to(dtype).expand(tokens, width).contiguous()


def _product(rows: int, width: int, tokens: int, config: WushConfig, dtype: torch.dtype, device: torch.device) -> None:
    """A linear of [rows, width], as it is and quantized."""
    x = _input(tokens, width, dtype, device)
    torch.nn.functional.linear(x, _input(rows, width, dtype, device))
    fmt, one = formats.get_format(config.format), torch.ones(1, device=device)
    g = [
        one if has_global_scale(config.format, rule) else None
        for rule in (config.activation_scale_rule, config.weight_scale_rule)
    ]
    block = block_size(config, width)
    t = torch.eye(block, dtype=dtype, device=device)
    blocks = {"identity": 0, "hadamard": 1}.get(config.transform, width // block)
    t = t.expand(blocks, block, block).contiguous() if blocks else None
    codes, scales = _run("transform_quantize", x, t, g[0], config.format, config.activation_scale_rule)
    weight = torch.zeros(rows, width // 2, dtype=torch.uint8, device=device)
    weight_scales = torch.ones(rows, width // fmt.group_size, dtype=fmt.scale_dtype, device=device)
    _run("fp4_linear", codes, scales, g[0], weight, weight_scales, g[1], None, None, config.format, dtype)
    if config.solver == "rtn":
        chunk = _input(max(1, CHUNK_ELEMENTS // width), width, torch.float32, device)
        _run("transform_quantize", chunk, None, g[1], config.format, config.weight_scale_rule)


def _solutions(widths: list[int], tokens: int, config: WushConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Small groups of these widths, observed and solved. One after the other: PyTorch loads cuSOLVER in the first call, which
    must be in one thread."""
    for width in widths:
        _solution(width, tokens, config, dtype, device)


def _solution(width: int, tokens: int, config: WushConfig, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = _input(tokens, width, dtype, device), _input(ROWS, width, dtype, device)
    moment = torch.zeros(moment_shape(config, width), device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    sample = torch.zeros(SAMPLE_ROWS, width, dtype=dtype, device=device)
    _run("observe", x, None, moment, count, sample, config.seed)
    solution = solve(weight, config, moment=moment, count=tokens, sample=sample, name="warm-up")
    layer_loss(sample[:ROWS], weight, solution, config)


def _pin(count: int, nbytes: int) -> None:
    """Pins memory for `count` values: freed here, it stays pinned for who asks next."""
    blocks = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
    del blocks


def pieces(
    model: nn.Module,
    batches: list[Batch],
    config: WushConfig,
    device: torch.device,
    processes: int = 1,
    batch_size: int | None = None,
    pins: bool = True,
) -> Iterator[Callable[[], None]]:
    """Pieces of work that a quantization of this model on these batches would otherwise do on its way, once each. `pins`:
    whether values between layers wait in CPU memory, unless the model is on the GPU."""
    linears = {
        (module.out_features, module.in_features, module.weight.dtype)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not ignored_by(name, config.ignore)
        and module.in_features % config.group_size == 0
    }
    counts = [sequences(batch) for batch in batches]
    if not linears or None in counts:
        return
    longest, own = max(batch["input_ids"].shape[1] for batch in batches), -(-sum(counts) // processes)
    rows = batch_size or most_rows(own, longest)
    tokens = rows * longest
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if pins and device.type == "cuda" and isinstance(embeddings, nn.Embedding) and not embeddings.weight.is_cuda:
        # A value for each micro-batch, and those on their way.
        nbytes = tokens * embeddings.embedding_dim * embeddings.weight.element_size()
        yield functools.partial(_pin, -(-own // rows) + 2, nbytes)
    # Moments wider than a panel are factored in another way, which leaves other strides: the least width of both kinds.
    widths = {w > PANEL: w for w in sorted((w for _, w, _ in linears), reverse=True)}
    dtype = next(dtype for _, _, dtype in linears)
    yield functools.partial(_solutions, sorted(widths.values()), tokens, config, dtype, device)
    for out, width, dtype in sorted(linears, key=str):
        yield functools.partial(_product, out, width, tokens, config, dtype, device)


def _attempt(piece: Callable[[], None], device: torch.device) -> None:
    try:
        with torch.no_grad(), torch.cuda.device(device):
            piece()
    except Exception as error:
        log.debug("%s in the warm-up: %s", type(error).__name__, error)


@contextlib.contextmanager
def meanwhile(check: Callable[[], None], work: Iterable[Callable[[], None]], device: torch.device) -> Iterator[None]:
    """Runs `check` and the pieces of `work`, each in a thread, while the block runs; then waits, and raises what `check` did.

    On a CPU there is nothing to warm up: `check` alone.
    """
    work = list(work) if device.type == "cuda" else []
    with ThreadPoolExecutor(1 + len(work), "warm-up") as pool:
        checked = pool.submit(check)
        for piece in work:
            pool.submit(_attempt, piece, device)
        yield
        with phase("warm-up"):
            pool.shutdown()
            checked.result()
            if work:
                torch.cuda.empty_cache()  # a micro-batch is chosen by how much memory is free
