"""Which architectures are quantized: every model type of the installed transformers, and torch's own transformers.

    python benchmarks/coverage.py --out benchmarks/results/coverage_cpu.json [--only 'llama*' bert] [--jobs 2]

Each architecture runs in a process of its own, with a limit of time and memory, as a tiny random model in fp32
(tiny_models.py), with the default settings of `quantize`. A run goes on where it stopped: rows that the file has are
kept (`--again STATUS` repeats those that have not passed). The columns, in order:

    eager     the 16-bit model runs a forward. Without it nothing else is measured, and the row is not counted.
    quantized `quantize` returns, or raises an error that is named
    graph     `quantize` ran one batch through the installed model, and it agreed with the rewritten graph
    saved     what `wc.save` wrote and `wc.load` read returns the same, bit for bit
    generate  `generate` runs, and the loaded model generates the same tokens
    compile   traced by Dynamo and AOTAutograd, with the execution passes of `torch.compile(backend="wush")`, the graph
              returns what the model returns in eager mode, bit for bit. Its ops run one by one: no code is generated,
              since that takes a minute a model. The passes also run on Inductor's form of the graph (`compiled`).
    export    `torch.export` + `fuse` return what the model returns, bit for bit
    images    a vision-language model is quantized on text with images, and its graph agrees; the others are on text

A column is `true`, an error, or `null` where it does not apply: the 16-bit model cannot do it either (its reason is
under `not_applicable`).
"""

import argparse
import collections
import contextlib
import copy
import fnmatch
import functools
import json
import logging
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from common import environment, write_json
from tiny_models import TORCH, architectures, inputs_of, tiny_model, with_images
from torch import Tensor, nn
from torch.utils import _pytree as pytree

COLUMNS = ("quantized", "graph", "saved", "generate", "compile", "export", "images")
BATCHES = 3
# A column is this and a distance where the passes change nothing, and the trace that torch makes differs from eager.
TRACE = "the trace itself differs by "
# .. and this where a pass changes how a tensor lies in memory (a residual that was transposed), and a later reduction
# on the CPU adds in another order. More than `ROUNDING` is a fault.
LAYOUT, ROUNDING = "by another order of additions it differs by ", 1e-6


def reason(error: BaseException) -> str:
    """Class and message of an error; of one that torch.compile passes on, the error itself."""
    error = getattr(error, "inner_exception", error)
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/[^\s:'\")]+", "DIR", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:400]}"


def tensors(result: object) -> list[Tensor]:
    """The tensors of a model's result, without its cache."""
    if hasattr(result, "items") and not isinstance(result, dict):
        result = dict(result.items())
    if isinstance(result, dict):
        result = {name: value for name, value in result.items() if name not in ("past_key_values", "cache_params")}
    found = []
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "items"):
            found += tensors(leaf)
    return found


def call(model: Callable, batch: object) -> list[Tensor]:
    torch.manual_seed(3)
    with torch.no_grad():
        return [t.clone() for t in tensors(model(**batch) if isinstance(batch, dict) else model(*batch))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether tensors are equal, bit for bit; NaN equals NaN."""
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(a, b, strict=True)
    )


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The relative Euclidean distance of all floating-point values together."""
    pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True) if x.is_floating_point()]
    norm = sum(float(y.nan_to_num().square().sum()) for _, y in pairs) ** 0.5
    return sum(float((x - y).nan_to_num().square().sum()) for x, y in pairs) ** 0.5 / (norm or 1)


# -- columns ---------------------------------------------------------------------------------------------------------


class Differs(Exception):
    """A column's results are not what they should be."""


def explained(by_passes: float, by_all: float) -> str:
    """Why a graph with passes differs from eager mode. Raises `Differs` if the passes change more than rounding."""
    if by_passes > ROUNDING:
        raise Differs(f"after the execution passes a graph differs by {by_passes:.2g}")
    return f"{LAYOUT}{by_passes:.2g}" if by_passes else f"{TRACE}{by_all:.2g}"


def copies(inputs: list) -> list:
    """The inputs of a graph for another run, since a graph may write into them."""
    return [i.clone() if isinstance(i, Tensor) else i for i in inputs]


def compiled(model: nn.Module, batch: object) -> dict[str, object]:
    """Runs the model as Dynamo traces it, op by op, with the execution passes. Raises `Differs` from eager mode.

    The passes run on two forms of each graph: the ATen ops that eager mode runs, whose result is returned, and
    Inductor's decompositions of them, which round differently: `decomposed` says by how much at most.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    from wush_compile.backend import has_wush_ops
    from wush_compile.passes import pipeline

    seen = {"graphs": 0, "passes": collections.Counter(), "decomposed": 0.0, "passes_distance": 0.0}

    def fused(gm, example_inputs, counts=True, **kwargs):
        view_to_reshape(gm)
        plain = None
        if has_wush_ops(gm):
            plain = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph)) if counts else None
            found = pipeline.run(gm.graph)
            if counts:
                seen["graphs"] += 1
                seen["passes"].update(found)
            gm.recompile()

        def run(inputs):
            if plain is not None:
                with torch.random.fork_rng():
                    expected = tensors(plain(*copies(inputs)))
            result = gm(*inputs)
            if plain is not None and not same(tensors(result), expected):
                seen["passes_distance"] = max(seen["passes_distance"], distance(tensors(result), expected))
            inputs.clear()
            return result

        run._boxed_call = True
        return run

    def backend(gm, example_inputs):
        as_eager = aot_autograd(fw_compiler=fused, inference_compiler=fused, decompositions={})(gm, example_inputs)
        if not has_wush_ops(gm):
            return as_eager
        decomposed = compile_fx(gm, example_inputs, inner_compile=functools.partial(fused, counts=False))

        def run(*inputs):
            with torch.random.fork_rng():
                other = tensors(decomposed(*copies(inputs)))
            result = as_eager(*inputs)
            seen["decomposed"] = max(seen["decomposed"], distance(other, tensors(result)))
            return result

        return run

    torch._dynamo.reset()
    result, eager = call(torch.compile(model, backend=backend), batch), call(model, batch)
    return {
        "compile": same(result, eager) or explained(seen["passes_distance"], distance(result, eager)),
        "graphs": seen["graphs"],
        "passes": {name: count for name, count in seen["passes"].items() if count},
        "decomposed": float(f"{seen['decomposed']:.2g}"),
    }


def generated(model: nn.Module, batch: dict) -> Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        result = model.generate(**batch, max_new_tokens=4, do_sample=False)
    return torch.cat([t.flatten().double() for t in tensors(result)])


def exported(model: nn.Module, batch: object) -> torch.export.ExportedProgram:
    from wush_compile.capture.export import traceable

    args, kwargs = ((), batch) if isinstance(batch, dict) else (batch, {})
    with traceable(model, batch), torch.no_grad():
        return torch.export.export(model, args, kwargs, strict=False)


def run_program(program: torch.export.ExportedProgram, batch: object) -> list[Tensor]:
    args, kwargs = ((), batch) if isinstance(batch, dict) else (batch, {})
    module = program.module()
    return call(lambda: module(*args, **kwargs), ())


def run_traced(model: nn.Module, batch: object) -> list[Tensor]:
    """What the model returns with the forward that an export traces."""
    from wush_compile.capture.export import traceable

    with traceable(model, batch):
        return call(model, batch)


@contextlib.contextmanager
def said(lines: list[str]):
    """Collects what the library logs."""

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    log, handler = logging.getLogger("wush_compile"), Handler()
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def running_model(name: str, class_name: str) -> tuple[nn.Module, object]:
    """A tiny model and a batch that it runs on. Raises the first error of those that do not run."""
    failure = None
    for narrow in (True, False) if name not in TORCH else (True,):
        try:
            model = tiny_model(name, class_name, narrow)
        except Exception as error:
            failure = failure or error
            continue
        for batch in inputs_of(model):
            try:
                if any(t.is_floating_point() for t in call(model, batch)):
                    return model, batch
            except Exception as error:
                failure = failure or error
    raise failure or NotImplementedError("no rule makes its inputs")


def linears(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]


def varied(batch: object) -> object:
    """Another batch of the same shapes."""

    def other(t: Tensor) -> Tensor:
        return t * 1.1 if t.is_floating_point() else t

    return pytree.tree_map(other, batch)


def measure(name: str, columns: tuple[str, ...], emit: Callable[[dict], None]) -> None:
    """Measures one architecture; `emit` gets what is known as soon as it is."""
    import wush_compile as wc
    from wush_compile.errors import WushError

    def attempt(column: str, function: Callable[[], object]) -> bool:
        began = time.process_time()
        try:
            found = function()
        except Exception as error:
            emit({column: reason(error), f"{column}_s": round(time.process_time() - began, 1)})
            if os.environ.get("COVERAGE_TRACE"):
                import traceback

                traceback.print_exc()
            return False
        emit({f"{column}_s": round(time.process_time() - began, 1), column: True, **(found or {})})
        return True

    class_name, kind = architectures()[name]
    emit({"class": class_name, "kind": kind})
    try:
        model, batch = running_model(name, class_name)
    except Exception as error:
        emit({"eager": f"not run: {reason(error)}"})
        return
    total = linears(model)
    emit({"eager": True, "parameters": sum(p.numel() for p in model.parameters()), "linears": len(total)})
    emit({"inputs": {k: list(v.shape) for k, v in batch.items()} if isinstance(batch, dict) else None})
    if "quantized" not in columns:
        return
    steady = same(call(model, batch), call(model, batch))
    not_applicable = {}

    generates = None
    if "generate" in columns and getattr(model, "can_generate", lambda: False)() and isinstance(batch, dict):
        try:
            generates = generated(model, batch)
        except Exception as error:
            not_applicable["generate"] = reason(error)
    original = copy.deepcopy(model)
    lines: list[str] = []
    with said(lines):
        try:
            began = time.process_time()
            wc.quantize(model, [varied(batch) for _ in range(BATCHES - 1)] + [batch], progress=False)
        except Exception as error:
            emit({"quantized": reason(error), "refused": isinstance(error, WushError)})
            if os.environ.get("COVERAGE_TRACE"):
                import traceback

                traceback.print_exc()
            return
    record = model.wush_quantization
    members = [m for g in record.groups for m in g["members"]]
    left = collections.Counter(record.ignored[n].split(":")[0] for n in total if n in record.ignored)
    emit(
        {
            "quantized": True,
            "quantized_s": round(time.process_time() - began, 1),
            "linears_quantized": len([n for n in total if n in members]),
            "left": dict(left.most_common(4)),
            "graph": record.run["verified"] is not None or next((x for x in lines if "not checked" in x), False),
            "equal": record.run["verified"],
        }
    )
    reference = call(model, batch)
    emit({"change": float(f"{distance(reference, call(original, batch)):.2g}")})
    if "saved" in columns:

        def saved() -> None:
            with tempfile.TemporaryDirectory() as folder:
                wc.save(model, folder)
                again = wc.load(folder) if name not in TORCH else wc.load(folder, model=tiny_model(name, name))
            if type(again) is not type(model):
                raise Differs(f"loaded as {type(again).__name__}")
            if steady and not same(call(again.eval(), batch), reference):
                raise Differs(f"the loaded model differs by {distance(call(again, batch), reference):.2g}")
            if generates is not None and "generate" in columns:
                attempt("generate", lambda: equal_tokens(again))

        def equal_tokens(again: nn.Module) -> None:
            if not torch.equal(generated(again, batch), generated(model, batch)):
                raise Differs("the loaded model generates other tokens")

        attempt("saved", saved)
    if "export" in columns:

        def export_and_fuse() -> dict:
            program = exported(model, batch)
            before = run_program(program, batch)
            after, eager = run_program(wc.fuse(program), batch), run_traced(model, batch)
            by_passes = 0.0 if same(before, after) else distance(after, before)
            return {"export": same(after, eager) or explained(by_passes, distance(after, eager))}

        if not attempt("export", export_and_fuse):
            try:
                run_program(exported(original, batch), batch)
            except Exception as error:
                not_applicable["export"] = reason(error)
    if "compile" in columns and not attempt("compile", lambda: compiled(model, batch)):
        try:
            compiled(original, batch)
        except Exception as error:
            not_applicable["compile"] = reason(error)
    if "images" in columns and kind in ("vision-language", "multimodal") and "pixel_values" not in batch:
        pictures = with_images(original, call)

        def quantized_on_images() -> None:
            wc.quantize(original, [pictures, varied(pictures)], progress=False)
            if original.wush_quantization.run["verified"] is None:
                raise Differs("not checked")

        if pictures is None:
            not_applicable["images"] = "no batch with images could be made"
        else:
            attempt("images", quantized_on_images)
    emit({"not_applicable": not_applicable, "done": True, "seconds": round(time.process_time(), 1)})


# -- processes -------------------------------------------------------------------------------------------------------


def start(name: str, columns: tuple[str, ...], folder: Path, seconds: int, memory: int) -> int:
    """Forks a process that measures one architecture. Imports are done once, before."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        output = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        warnings.simplefilter("ignore")
        lines = (folder / f"{name}.jsonl").open("w")

        def emit(row: dict) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()

        measure(name, columns, emit)
        status = 0
    except Exception:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def collected(name: str, folder: Path, status: int) -> dict:
    """What a process has said; why it ended early."""
    row: dict = {}
    for line in (folder / f"{name}.jsonl").read_text().splitlines():
        row.update(json.loads(line))
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        why = "out of time" if number in (signal.SIGXCPU, signal.SIGKILL) else f"killed by signal {number}"
        missing = next((c for c in ("eager", *COLUMNS) if c not in row), None)
        row.update({missing: why} if missing else {}, stopped=why)
    elif status and row.get("eager") in (None, True):
        row["stopped"] = f"the benchmark failed: exit status {os.waitstatus_to_exitcode(status)}"
    return row


def walk(names: list[str], columns: tuple[str, ...], jobs: int, seconds: int, memory: int, keep: Callable) -> None:
    """Measures architectures, `jobs` at a time; `keep(name, row)` gets each row as it comes."""
    running: dict[int, tuple[str, float]] = {}
    left = list(names)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(os.environ.get("COVERAGE_LOGS") or scratch)
        folder.mkdir(exist_ok=True)
        while left or running:
            while left and len(running) < jobs:
                name = left.pop(0)
                running[start(name, columns, folder, seconds, memory)] = (name, time.time())
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in running:
                name, began = running.pop(pid)
                keep(name, {**collected(name, folder, status), "wall": round(time.time() - began, 1)})
                continue
            for pid, (_, began) in running.items():
                if time.time() - began > 6 * seconds:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def passed(row: dict) -> bool:
    """Whether every column that applies is true."""
    return row.get("eager") is True and row.get("quantized") is True and all(holds(row, c) for c in COLUMNS)


def holds(row: dict, column: str) -> bool:
    """Whether a column is true, or does not apply."""
    value = row.get(column)
    traced = isinstance(value, str) and value.startswith((TRACE, LAYOUT))
    return value is True or traced or value is None or column in row.get("not_applicable", {})


def summary(rows: dict[str, dict]) -> str:
    runs = [row for row in rows.values() if row.get("eager") is True]
    lines = [f"{len(rows)} walked, {len(runs)} run, {sum(map(passed, runs))} pass every column"]
    for column in COLUMNS:
        found = [row for row in runs if column in row and column not in row.get("not_applicable", {})]
        out = sum(column in row.get("not_applicable", {}) for row in runs)
        lines.append(f"{column:10} {sum(holds(row, column) for row in found)} of {len(found)} ({out} do not apply)")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="patterns of model types")
    parser.add_argument("--columns", nargs="*", default=list(COLUMNS), choices=("eager", *COLUMNS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=240, help="CPU seconds for one architecture")
    parser.add_argument("--memory", type=float, default=5, help="GiB for one architecture")
    parser.add_argument("--again", action="store_true", help="repeat architectures that have not passed")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = [n for n in architectures() if not args.only or any(fnmatch.fnmatch(n, p) for p in args.only)]
    result = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    result = {**environment(torch.device("cpu")), "rows": result["rows"]}
    random.Random(0).shuffle(names)  # a run that is cut short is a fair sample
    todo = [n for n in names if n not in result["rows"] or (args.again and not passed(result["rows"][n]))]

    import torch._inductor.compile_fx as _  # noqa: F401
    import transformers.modeling_utils  # noqa: F401  (imported once, before the processes are forked)

    import wush_compile.backend
    import wush_compile.calibration.run
    import wush_compile.checkpoint.save_load
    import wush_compile.passes.pipeline  # noqa: F401

    def keep(name: str, row: dict) -> None:
        result["rows"][name] = row
        result["rows"] = dict(sorted(result["rows"].items()))
        write_json(args.out, result)
        bad = {c: row[c] for c in ("eager", *COLUMNS) if c in row and row[c] is not True}
        print(f"{len(result['rows'])}/{len(names)} {name} {row['wall']} s", bad or "ok", flush=True)

    walk(todo, tuple(args.columns), args.jobs, args.seconds, int(args.memory * 2**30), keep)
    print(summary({name: result["rows"][name] for name in names if name in result["rows"]}))


if __name__ == "__main__":
    main()
