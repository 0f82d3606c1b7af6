"""`torch.compile(model, backend="wush")` and `fuse(exported_program)`: the execution passes, then Inductor.

The backend bakes nothing into a graph: weights, scales and transforms are graph inputs, so decoder layers that share
one compiled graph (regional compilation) each run with their own. Its only state is whether it has warned, and whether
it has compiled a quantized linear; no graph depends on either.
"""

import functools
import hashlib
import itertools
import warnings
from pathlib import Path

import torch
from torch.fx import Graph, GraphModule

from .errors import CaptureError, one_of
from .graphs.log import GraphTrace, Recorder, recording
from .graphs.printing import readable_name
from .kernels import dispatch as kernels
from .ops import fused as fused_ops  # noqa: F401  (registers the ops that passes emit)
from .passes import pipeline as passes
from .passes.execution.fold_weights import fold_weights, weight_of

_ROOT = Path(__file__).parent
_LINEAR_OPS = ("linear", "mm", "addmm", "matmul", "bmm")
_seen = {"warning": False, "quantized": False}


def _sources(root: Path) -> list[Path]:
    """The files that decide what a graph becomes, those in sub-folders too; `kernels` decides by what it refuses."""
    folders = (sorted((root / folder).rglob("*.py")) for folder in ("passes", "kernels", "ops"))
    return [*itertools.chain(*folders), root / "backend.py", root / "formats.py"]


@functools.cache
def _digest(root: Path) -> str:
    """sha256 of the names and contents of the sources below `root`."""
    digest = hashlib.sha256()
    for path in _sources(root):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _providers() -> tuple:
    """The providers of each op on this machine's CPU and GPUs. A cached graph is only valid for these."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    tables = (kernels.resolve(device) for device in (None, *devices))
    return kernels.forced(), *(
        tuple((op, tuple(name for name, _ in entries)) for op, entries in sorted(table.items())) for table in tables
    )


def cache_key(steps: tuple) -> tuple:
    """What a graph that these passes made depends on, besides the graph itself."""
    return _digest(_ROOT), tuple(step.__name__ for step in steps), _providers()


@functools.cache
def _pass_class() -> type:
    # Inductor is imported on first use: the import takes seconds, and eager users do not need it.
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class ExecutionPasses(CustomGraphPass):
        """The execution passes as Inductor's `post_grad_custom_pre_pass`, behind `first`, the user's own pass.

        `names` and `recorder` only serve `trace_graphs`.
        """

        def __init__(self, first=None, names=None, recorder=None):
            self.steps, self.first, self.names, self.recorder = passes.EXECUTION, first, names, recorder

        def __call__(self, graph: Graph) -> None:
            if self.first is not None:
                self.first(graph)
            after = None
            if self.recorder:
                self.recorder.snapshot("incoming", graph, self.names)
                after = functools.partial(self.recorder.snapshot, names=self.names)
            passes.run(graph, self.steps, after)

        def uuid(self):
            if self.first is not None and not hasattr(self.first, "uuid"):
                return None  # a plain function has no key: Inductor must not cache
            return *cache_key(self.steps), None if self.first is None else self.first.uuid()

    return ExecutionPasses


def _options(mode: str | None, options: dict | None) -> dict:
    """Inductor's settings for `mode=` and `options=`, read as `torch.compile` reads them."""
    from torch._inductor import config, list_mode_options

    patches = dict(list_mode_options(mode)) if mode else {}
    known = config.get_config_copy()
    for name, setting in (options or {}).items():
        patches[one_of("Inductor option", name.replace("-", "_"), known)] = setting
    return patches


def _graphs(gm: GraphModule):
    return (m.graph for m in gm.modules() if isinstance(m, GraphModule))


def has_wush_ops(gm: GraphModule) -> bool:
    """Whether a graph, or one nested in it, calls a wush op."""
    return any(str(n.target).startswith("wush.") for g in _graphs(gm) for n in g.nodes if n.op == "call_function")


def _has_linear(gm: GraphModule) -> bool:
    calls = (n.target for g in _graphs(gm) for n in g.nodes if n.op != "placeholder")
    names = (getattr(target, "__name__", str(target)) for target in calls)
    return any(name.split(".")[0] in _LINEAR_OPS for name in names)


def wush(gm: GraphModule, example_inputs, *, mode: str | None = None, options: dict | None = None):
    """The `torch.compile` backend: Inductor, with the execution passes in front of its own.

    mode, options: as for `torch.compile`. A model without a quantized linear is compiled by plain Inductor, with one
    warning.
    """
    from torch._inductor.compile_fx import compile_fx

    patches = _options(mode, options)
    if not has_wush_ops(gm):
        # Not a mistake: a graph break may leave a quantized model's embedding or head in a graph of its own.
        if _has_linear(gm) and not _seen["quantized"] and not _seen["warning"]:
            _seen["warning"] = True
            warnings.warn(
                "backend='wush' found no quantized linear and compiles with plain Inductor: "
                "call wush_compile.quantize(model) before torch.compile",
                stacklevel=2,
            )
        return compile_fx(gm, example_inputs, config_patches=patches)
    _seen["quantized"] = True
    from torch._inductor import config

    recorder = Recorder()
    names = [readable_name(n.target) for n in gm.graph.nodes if n.op == "placeholder"] if recorder else None
    recorder.snapshot("dynamo", gm.graph)
    first = patches.get("post_grad_custom_pre_pass", config.post_grad_custom_pre_pass)
    patches["post_grad_custom_pre_pass"] = _pass_class()(first=first, names=names, recorder=recorder)
    if recorder and hasattr(config, "_post_fusion_custom_pass"):
        patches["_post_fusion_custom_pass"] = recorder.scheduled
    return compile_fx(gm, example_inputs, config_patches=patches)


class _Recorded(Exception):
    """Ends a compile that only serves to record the graph."""


def _end(graph: Graph) -> None:
    # A pass that is a plain function has no key, so that Inductor and AOTAutograd look nothing up in their caches.
    raise _Recorded


def preview(model: torch.nn.Module, *args, **kwargs) -> GraphTrace:
    """The graph that the backend hands to Inductor for a model on these inputs, step by step.

    The backend compiles as always, and stops before code is generated. The model does not run. Raises `CaptureError` if
    the model does not trace as one graph, or if its graph has no quantized linear.
    """
    backend = functools.partial(wush, options={"post_grad_custom_post_pass": _end})
    with recording() as log, torch.no_grad():
        try:
            torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
        except Exception as error:
            if not log.graphs or log.graphs[0].snapshots[-1].step != passes.EXECUTION[-1].__name__:
                reason = str(error).strip().split("\n")[0]
                raise CaptureError(
                    f"torch.compile cannot trace {type(model).__name__} as one graph: {type(error).__name__}: {reason}"
                ) from error
    if not log.graphs:
        raise CaptureError(f"the forward of {type(model).__name__} runs no quantized linear")
    return log.graphs[0]


def fuse(program: torch.export.ExportedProgram, *, inline: bool = False) -> torch.export.ExportedProgram:
    """Runs the execution passes on an exported program, in place, and returns it. Its signature does not change, but
    for constants that `inline` adds.

    inline: also replace every wush op by launches of Triton kernels, or by the arithmetic that defines it. A package of
    the program (`torch._inductor.aoti_compile_and_package`) then runs without wush_compile and without Python. Make the
    package in the same process: kernels are not saved with a program.
    """
    recorder = Recorder()
    names = None
    if recorder:
        targets = program.graph_signature
        known = {**targets.inputs_to_parameters, **targets.inputs_to_buffers}
        names = [known.get(n.name, n.name) for n in program.graph.nodes if n.op == "placeholder"]
    recorder.snapshot("incoming", program.graph, names)
    steps = passes.packaging(functools.partial(weight_of, program)) if inline else passes.EXECUTION
    passes.run(program.graph, steps, functools.partial(recorder.snapshot, names=names))
    if inline:
        fold_weights(program)
    program.graph_module.recompile()
    return program
