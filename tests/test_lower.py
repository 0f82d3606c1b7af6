"""`lower` and `inline`: the graph for a GPU, traced with tensors that pretend to be on one."""

import ast
from types import SimpleNamespace

import pytest
import torch
from pass_harness import check_graph
from test_passes import Norm, Quantizer, x_like
from torch import nn

from wush_compile import formats
from wush_compile.graphs.printing import count_ops, print_graph
from wush_compile.kernels import dispatch as kernels
from wush_compile.passes import pipeline as passes
from wush_compile.passes.execution.fold_weights import fold_weights
from wush_compile.passes.pattern import op_name, value

wush = torch.ops.wush


def on_gpu(program: torch.export.ExportedProgram) -> torch.fx.Graph:
    """The program's graph as of a model on a GPU: only the recorded values of the nodes change."""

    def move(fake):
        if not isinstance(fake, torch.Tensor):
            return fake
        with fake.fake_mode:
            return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="cuda:0")

    for node in program.graph.nodes:
        node.meta["val"] = torch.utils._pytree.tree_map(move, node.meta.get("val"))
    return program.graph


def exported(model: nn.Module, *inputs: torch.Tensor) -> torch.export.ExportedProgram:
    any_rows = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    with torch.no_grad():
        return torch.export.export(model, inputs, dynamic_shapes=(any_rows,) if len(inputs) > 1 else any_rows)


class Gate(nn.Module):
    def forward(self, gate, up):
        return nn.functional.silu(gate) * up


class ClampedGate(nn.Module):
    def forward(self, x):
        gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(min=-7.0, max=7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


FUSED = {
    "rms_norm_transform_quantize": (Norm("rounded", torch.bfloat16), (x_like(5, 64),)),
    "silu_mul_transform_quantize": (Gate(), (x_like(5, 64), x_like(5, 64, seed=1))),
    "activation_transform_quantize": (nn.ReLU(), (x_like(5, 64),)),
    "swiglu_oai_transform_quantize": (ClampedGate(), (x_like(5, 128),)),
    "rms_norm_keep_transform_quantize": (Norm("rounded", torch.bfloat16), (x_like(5, 64),)),
}


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize(
    "kernels_for, apart", [("quantizer", True), ("both", False), ("none", False), ("refused", True)]
)
def test_lower_takes_apart_what_a_gpu_has_only_the_quantizer_for(fused, kernels_for, apart, monkeypatch):
    prologue, inputs = FUSED[fused]

    class Forward(Quantizer):
        def forward(self, a, b=None):
            h = self.prologue(*(t for t in (a, b) if t is not None))
            codes, scales = wush.transform_quantize(h, self.transform, None, "mxfp4", "absmax")
            return (codes, scales, h) if "keep" in fused else (codes, scales)

    def implementation(arguments, reason=None):
        def refuses(*args):
            assert len(args) == arguments and args[-3:] == ("mxfp4", "absmax", "rows")
            return reason

        return [("triton", kernels.Implementation(None, refuses))]

    arguments = len(getattr(wush, fused).default._schema.arguments)
    table = {} if kernels_for == "none" else {"transform_quantize": implementation(6)}
    if kernels_for in ("both", "refused"):
        table[fused] = implementation(arguments, "too wide" if kernels_for == "refused" else None)
    monkeypatch.setattr(kernels, "resolve", lambda device: table)
    with torch.no_grad():
        program = torch.export.export(
            Forward(prologue), inputs, dynamic_shapes=({0: torch.export.Dim.AUTO},) * len(inputs)
        )
    passes.run(program.graph, passes.EXECUTION)  # on a CPU every op stays
    assert count_ops(program.graph) == {fused: 1}
    graph = on_gpu(program)
    assert passes.lower(graph) == apart
    assert count_ops(graph) == {"transform_quantize" if apart else fused: 1}
    names = {n.target._opname for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert names.isdisjoint({"silu", "rms_norm"}), "Inductor wants them decomposed"
    assert passes.lower(graph) == 0
    check_graph(program.graph_module, None)


@pytest.fixture
def hopper(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


class Product(nn.Module):
    """A quantized linear of N x 256."""

    def __init__(self, format, rows=128):
        super().__init__()
        codes, scales = formats.quantize(x_like(rows, 256, dtype=torch.float32, seed=3), format, "absmax")
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.format = format

    def forward(self, x):
        xq, xs = wush.transform_quantize(x, None, None, self.format, "absmax")
        return wush.fp4_linear(xq, xs, None, self.codes, self.scales, None, None, None, self.format, x.dtype)


def launches(graph: torch.fx.Graph) -> list[tuple[str, tuple]]:
    """(kernel, grid) of every launch of a Triton kernel, grids as what was recorded of them."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    found = []
    for node in graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            (grid,) = torch.fx.map_arg(node.kwargs["grid"], lambda n: n.meta["val"])
            found.append((kernel.fn.__name__, grid))
    return found


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_packages_for_a_gpu_launch_one_kernel_for_any_number_of_rows(format, hopper):
    program = exported(Product(format), x_like(5, 256))
    graph = on_gpu(program)
    passes.run(graph, passes.PACKAGING)
    assert not count_ops(graph)
    (x,) = [n for n in graph.nodes if n.op == "placeholder" and value(n).dtype == torch.bfloat16]
    rows = value(x).shape[0].node.expr
    grids = [(name, [getattr(getattr(g, "node", None), "expr", g) for g in grid]) for name, grid in launches(graph)]

    def programs(name: str, m: int) -> list[int]:
        """Of the launches of a kernel that have any program at m rows, how many programs."""
        counts = []
        for kernel, grid in grids:
            if kernel == name:
                sizes = [int(g.subs(rows, m)) if hasattr(g, "subs") else g for g in grid]
                counts.append(sizes[0] * sizes[1] * sizes[2])
        return [count for count in counts if count]

    for m in (1, 2, 16, 17, 64, 65, 128, 129, 5000):
        assert len(programs("flat_transform_quantize_kernel", m)) == 1, m
        products = programs("gemv_kernel", m), programs("fused_gemm_kernel", m)
        assert [len(p) for p in products] == ([1, 0] if m == 1 else [0, 1]), (m, products)
        assert len(programs("upcast_fp8_kernel", m)) + len(programs("upcast_bf16_kernel", m)) <= 1
    assert not any(sum(programs(name, 0)) for name, _ in grids)


def test_packages_for_a_gpu_leave_out_what_the_shapes_rule_out(hopper):
    with torch.no_grad():
        program = torch.export.export(Product("mxfp4"), (x_like(5, 256),))
    graph = on_gpu(program)
    passes.run(graph, passes.PACKAGING)
    assert [name for name, _ in launches(graph) if "expand" not in name] == [
        "flat_transform_quantize_kernel",
        "fused_gemm_kernel",
    ]


class Experts(nn.Module):
    """Two experts of a width that is no multiple of 128, with a bias; rows of the input by an index."""

    def __init__(self, format: str):
        super().__init__()
        torch.manual_seed(0)
        self.format = format
        codes, scales = formats.quantize(torch.randn(2, 24, 160), format, "absmax")
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.randn(2, 24))

    def forward(self, x, offs, index):
        q = wush.transform_quantize(x, None, None, self.format, "absmax")
        rest = None, offs, self.bias, self.format, torch.float32
        return wush.fp4_grouped_linear(*q, None, self.codes, self.scales, *rest, index=index)


EXPERTS_INPUT = (x_like(3, 160), torch.tensor([2, 5], dtype=torch.int32), torch.tensor([2, 0, 0, 1, 2, 1]))


def experts_program(format: str) -> torch.export.ExportedProgram:
    sizes = ({0: torch.export.Dim.AUTO}, None, {0: torch.export.Dim.AUTO})
    with torch.no_grad():
        return torch.export.export(Experts(format), EXPERTS_INPUT, dynamic_shapes=sizes)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_experts_in_a_package_for_a_gpu(format, hopper):
    """One product for any number of rows: few, more, many for two experts."""
    program = experts_program(format)
    graph = on_gpu(program)
    passes.run(graph, passes.PACKAGING)
    assert not count_ops(graph)
    (index,) = [n for n in graph.nodes if n.op == "placeholder" and value(n).dtype == torch.int64]
    rows = value(index).shape[0].node.expr
    products = [grid[0].node.expr for name, grid in launches(graph) if name == "grouped_gemm_kernel"]
    assert len(products) == 3
    for m in (1, 2, 16, 17, 48, 49, 5000):
        assert sum(int(grid.subs(rows, m)) > 0 for grid in products) == 1, m
    assert not any(int(grid.subs(rows, 0)) for grid in products)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4"])
def test_experts_in_a_package_for_a_cpu(format):
    program = experts_program(format)
    want = program.module()(*EXPERTS_INPUT)
    passes.run(program.graph, passes.PACKAGING)
    assert not count_ops(program.graph)
    program.graph_module.recompile()
    got = program.module()(*EXPERTS_INPUT)
    assert (got - want).norm() < 1e-6 * want.norm()  # fp32 sums in another order
    assert not got[5].any() and want[:5].any()


def test_equal_constants_of_a_package_are_made_once(hopper):
    model = nn.Sequential(Product("mxfp4", 256), Product("mxfp4", 256), Product("mxfp4", 256))
    graph = on_gpu(exported(model, x_like(5, 256)))
    passes.run(graph, passes.PACKAGING)
    made = [op_name(n) for n in graph.nodes if op_name(n) in ("arange", "full", "zeros")]
    assert len(made) == len({(n.target, str(n.args)) for n in graph.nodes if op_name(n) in ("arange", "full", "zeros")})
    assert made.count("arange") == 1


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_inductor_finds_in_the_kernels_what_the_launches_declare(format, hopper, monkeypatch):
    import triton
    from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table
    from triton.backends.compiler import GPUTarget

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    graph = on_gpu(exported(Product(format), x_like(5, 256)))
    passes.run(graph, passes.PACKAGING)
    seen = set()
    for node in graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            name = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
            arguments = torch.fx.map_arg(node.kwargs["kwargs"], value)
            indices = node.kwargs["kernel_idx"], node.kwargs["constant_args_idx"]
            written = set(get_mutated_tensors(*indices, arguments, {}))
            assert written - {"count"} == set(node.kwargs["tensors_to_clone"]), name
            seen.add(name)
    assert len(seen) == 4


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_the_text_that_inductor_makes_of_the_kernels_is_python(format, hopper):
    """It goes into a string of the code that packages are made with, constants and all."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as text_of

    graph = on_gpu(exported(Product(format), x_like(5, 256)))
    passes.run(graph, passes.PACKAGING)
    kernels = {node.kwargs["kernel_idx"] for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)}
    assert kernels
    for index in kernels:
        kernel = kernel_side_table.get_kernel(index)
        text = text_of(kernel if hasattr(kernel, "src") else kernel.fn).replace("'''", "\\'\\'\\'")
        compile(ast.literal_eval(f"'''{text}'''"), f"kernel {index}", "exec")


def test_packaged_launches_read_the_same_every_time(hopper):
    texts = []
    for _ in range(2):  # kernels and symbols are numbered on
        graph = on_gpu(exported(Product("mxfp4"), x_like(5, 256)))
        passes.run(graph, passes.PACKAGING)
        texts.append(print_graph(graph))
    assert texts[0] == texts[1]
    assert "= triton.gemv_kernel[" in texts[0] and "kernel_idx" not in texts[0] and " at 0x" not in texts[0]


def test_what_no_packaged_kernel_takes_says_why(hopper):
    from wush_compile.kernels.triton import packaged

    x, codes, scales = x_like(2, 96), torch.zeros(2, 48, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8)
    linear = (codes, scales, None, codes, scales, None, None, None, "mxfp4", torch.bfloat16)
    assert "width 96" in packaged.refuses("fp4_linear", (9, 0), *linear)
    assert "int4" in packaged.refuses("transform_quantize", (9, 0), x, None, None, "int4", "gaussian")
    wide = (torch.zeros(2, 64, dtype=torch.uint8),) * 2
    linear = (*wide, None, *wide, None, None, None, "mxfp4", torch.bfloat16)
    assert packaged.refuses("fp4_linear", (9, 0), *linear) is None
    assert "(8, 0)" in packaged.refuses("fp4_linear", (8, 0), *linear)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_a_package_computes_nothing_of_its_weights_alone(format, hopper):
    program = exported(nn.Sequential(Product(format, 256), Product(format, 256)), x_like(5, 256))
    graph = on_gpu(program)
    passes.run(graph, passes.PACKAGING)
    found = fold_weights(program)
    assert found == (2 if format == "mxfp4" else 0)
    tops = [t for name, t in program.constants.items() if name.startswith("wush_amax")]
    scales = [t for name, t in program.state_dict.items() if t.dtype == torch.uint8 and t.shape[-1] == 256 // 32]
    assert len(tops) == found and all(torch.equal(t, s.amax(-1)) for t, s in zip(tops, scales))
    assert "amax" not in {op_name(n) for n in graph.nodes}
    placeholders = [n.name for n in graph.nodes if n.op == "placeholder"]
    assert [s.arg.name for s in program.graph_signature.input_specs] == placeholders


class Facts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scales", torch.arange(12, dtype=torch.uint8).view(3, 4))
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return x + self.scales.amax(-1) + nn.functional.pad(self.scales, (0, 1)).view(-1)[:3] + self.weight.amax(-1)


def test_folded_weights_are_saved_with_the_program(tmp_path):
    x, model = torch.randn(2, 3), Facts()
    program = exported(model, x)
    assert fold_weights(program) == 2  # not what is made of the parameter
    program.graph_module.recompile()
    torch.export.save(program, tmp_path / "facts.pt2")
    for p in (program, torch.export.load(tmp_path / "facts.pt2")):
        assert torch.equal(p.module()(x), model(x))
