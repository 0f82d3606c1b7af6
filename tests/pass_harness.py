"""One way to test a pass: `PassBackend` keeps the graph before and after, checks both, and runs the result.

The graph is the one AOTAutograd makes with Inductor's decompositions, executed by ATen without code generation, so that
a result which differs in one bit is the pass's doing.
"""

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from wush_compile.graphs.printing import count_ops, print_graph, readable_name
from wush_compile.passes import pipeline as passes


class PassBackend:
    """A `torch.compile` backend that runs `steps` and nothing else.

    before, after  the graphs' texts; `counts_before`, `counts_after` how often each wush op is called
    changes        pass -> number of changes it reported
    """

    def __init__(self, *steps):
        self.steps = steps or passes.EXECUTION
        self.graphs = 0

    def __call__(self, gm, inputs):
        self.names = [readable_name(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
        return aot_autograd(fw_compiler=self._compile, decompositions=select_decomp_table())(gm, inputs)

    def _compile(self, gm, inputs):
        self.graphs += 1
        self.before, self.counts_before = self.text(gm.graph), count_ops(gm.graph)
        self.changes = passes.run(gm.graph, self.steps)
        self.after, self.counts_after = self.text(gm.graph), count_ops(gm.graph)
        self.graph = gm.graph
        check_graph(gm, inputs)
        again = passes.run(gm.graph, self.steps)
        assert not any(again.values()), f"a second run changed the graph: {again}"
        assert self.text(gm.graph) == self.after
        gm.recompile()
        return make_boxed_func(gm.forward)

    def text(self, graph: Graph, layer: int | None = None) -> str:
        return print_graph(graph, self.names, layer)


def check_graph(gm, inputs) -> None:
    """Every node's recorded value is what its op makes of its arguments; the graph is well formed; none is dead."""
    gm.graph.lint()
    recorded = {n: n.meta.get("val") for n in gm.graph.nodes if n.op != "output"}
    for node in gm.graph.nodes:
        assert node.users or node.op in ("placeholder", "output") or node.is_impure(), f"{node} is dead"
    mode = next((v.fake_mode for v in recorded.values() if isinstance(v, FakeTensor)), None)
    given = [v for n, v in recorded.items() if n.op == "placeholder"]
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*given)
    for node, before in recorded.items():
        for a, b in zip(_tensors(before), _tensors(node.meta.get("val")), strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device), node


def _tensors(value) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def run(model, *args, steps=(), dynamic=False, **kwargs) -> PassBackend:
    """Compiles a model with these passes, demands the bits that eager gives, and returns what was seen."""
    torch._dynamo.reset()
    backend = PassBackend(*steps)
    with torch.no_grad():
        expected = model(*args, **kwargs)
        actual = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    for a, b in zip(_leaves(actual), _leaves(expected), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    return backend


def _leaves(output) -> list[torch.Tensor]:
    return _tensors(list(output.values()) if isinstance(output, dict) else output)
