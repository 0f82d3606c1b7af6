"""`lower` and `inline`: the graph for a GPU, traced with tensors that pretend to be on one."""

import ast
import functools
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
from wush_compile.passes.execution.fold_weights import fold_weights, weight_of
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
            assert len(args) == arguments and args[-4:] == ("mxfp4", "absmax", "rows", None)
            return reason

        return [("triton", kernels.Implementation(None, refuses))]

    arguments = len(getattr(wush, fused).default._schema.arguments)
    table = {} if kernels_for == "none" else {"transform_quantize": implementation(7)}
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
    device = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device_=None: device)


class Product(nn.Module):
    """A quantized linear of N x K."""

    def __init__(self, format, rows=128, k=256, factors=False):
        super().__init__()
        codes, scales = formats.quantize(x_like(rows, k, dtype=torch.float32, seed=3), format, "absmax")
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("factors", torch.ones(rows, dtype=torch.bfloat16) if factors else None)
        self.format = format

    def forward(self, x):
        xq, xs = wush.transform_quantize(x, None, None, self.format, "absmax")
        weight = self.codes, self.scales, self.factors
        return wush.fp4_linear(xq, xs, None, *weight, None, None, self.format, x.dtype)


LIBRARY = ("_scaled_mm", "mm")


def launches(graph: torch.fx.Graph, m: int | None = None) -> list[tuple[str, tuple]]:
    """(kernel, grid) of every launch of a Triton kernel, grids as what was recorded of them; a product of the library
    by its name, without a grid. Of a `torch.cond` both branches.

    With m: what runs for m rows of each input, grids as numbers."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    def number(size):
        expression = getattr(getattr(size, "node", None), "expr", size)
        symbols = getattr(expression, "free_symbols", ())
        return expression.subs(dict.fromkeys(symbols, m)) if m is not None and symbols else size

    found = []
    for node in graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            (grid,) = torch.fx.map_arg(node.kwargs["grid"], lambda n: n.meta["val"])
            grid = tuple(map(number, grid))
            if m is None or all(size > 0 for size in grid):
                found.append((kernel.fn.__name__, grid))
        elif op_name(node) in LIBRARY:
            found.append((op_name(node), ()))
        elif node.target is torch.ops.higher_order.cond:
            predicate, *branches = node.args[:3]
            taken = branches if m is None else [branches[not number(predicate.meta["val"])]]
            for branch in taken:
                found += launches(getattr(graph.owning_module, branch.target).graph, m)
    return found


def graphs(program: torch.fx.GraphModule) -> list[torch.fx.Graph]:
    """Its graph and those of branches."""
    return [m.graph for m in program.modules() if isinstance(m, torch.fx.GraphModule)]


@pytest.fixture(autouse=True)
def branches(monkeypatch):
    """Graphs as of PyTorch 2.13."""
    pytest.importorskip("triton")
    monkeypatch.setattr("wush_compile.kernels.triton.packaged.linear.TORCH", (2, 13))


PREPARE = ("upcast_fp8_kernel", "upcast_bf16_kernel", "upcast_both_kernel", "lane_order_kernel")
ROWS = (1, 2, 3, 4, 5, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 511, 512, 5000)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_packages_for_a_gpu_run_what_eager_chooses_for_any_number_of_rows(format, known, hopper):
    """But for Gluon's kernels, and the library's fp8 product where the weights are not known."""
    from wush_compile.kernels.triton.linear.choose import Fused, Gemv, choose

    program = exported(Product(format), x_like(5, 256))
    graph = on_gpu(program)
    passes.run(graph, passes.packaging(functools.partial(weight_of, program)) if known else passes.PACKAGING)
    assert not count_ops(graph)
    names = {Gemv: "gemv_kernel", Fused: "fused_gemm_kernel"}
    for m in ROWS:
        quantizer, *prepared, (product, grid) = launches(graph, m)
        assert quantizer[0] == "flat_transform_quantize_kernel" and len(prepared) <= 2, m
        assert all(name in PREPARE for name, _ in prepared), m
        chosen = choose(format, m, 128, 256, portable=True, library=known)
        name = names.get(type(chosen), {"library": "_scaled_mm", "bf16": "mm"}.get(chosen))
        assert product == name, (m, product)
        if isinstance(chosen, Fused):
            assert grid == (-(-128 // chosen.block_n) * -(-m // chosen.block_m), chosen.split_k, 1), m
            assert len(prepared) == (not chosen.packed), m
    assert not launches(graph, 0)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_packages_divide_by_factors_of_rows_in_the_same_kernels(format, known, hopper):
    """Each product of Triton's reads them; behind the library's in bf16 stands a division of fp32 sums."""
    found = []
    for factors in (False, True):
        program = exported(Product(format, factors=factors), x_like(5, 256))
        graph = on_gpu(program)
        passes.run(graph, passes.packaging(functools.partial(weight_of, program)) if known else passes.PACKAGING)
        assert not count_ops(graph)
        found.append([[name for name, _ in launches(graph, m)] for m in ROWS])
    assert found[0] == found[1]
    inside = [node for graph in graphs(program.graph_module) for node in graph.nodes]
    reading = [node for node in inside if "gw" in node.kwargs.get("kwargs", ())]
    assert len(reading) > 5 and all(value(n.kwargs["kwargs"]["gw"]).dtype == torch.bfloat16 for n in reading)
    assert all(n.kwargs["kwargs"]["SCALED_W"] is True for n in reading)
    sums = [value(node).dtype for node in inside if op_name(node) == "mm"]
    assert all(dtype == torch.float32 for dtype in sums) and len(sums) == (format == "nvfp4")


def test_packages_for_a_gpu_leave_out_what_the_shapes_rule_out(hopper):
    with torch.no_grad():
        program = torch.export.export(Product("mxfp4"), (x_like(5, 256),))
    graph = on_gpu(program)
    passes.run(graph, passes.PACKAGING)
    assert [name for name, _ in launches(graph)] == ["flat_transform_quantize_kernel", "fused_gemm_kernel"]


class WideProduct(nn.Module):
    """A linear of 128 x K with activations of 8 or 16 bits."""

    def __init__(self, format, activation, k=256, dtype=torch.bfloat16):
        super().__init__()
        codes, scales = formats.quantize(x_like(128, k, dtype=torch.float32, seed=3), format, formats_rule(format))
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("transform", torch.eye(32, dtype=dtype)[None])
        self.format, self.activation = format, activation

    def forward(self, x):
        rule = formats.ACTIVATION_FORMATS[self.activation].scale_rules[0]
        xq, xs = wush.transform_quantize(x, self.transform, None, self.activation, rule)
        call = xq, xs, None, self.codes, self.scales, None, None, None, self.format, x.dtype
        return wush.fp4_linear(*call, activation_format=self.activation)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "format, capability, k, many",
    [
        ("mxfp4", (9, 0), 256, "fused_gemm_kernel"),
        ("nvfp4", (9, 0), 256, "fused_gemm_kernel"),
        ("mxfp4", (8, 0), 256, "fused_gemm_kernel"),
        ("mxfp4", (8, 0), 96, "mm"),
        ("nvfp4", (9, 0), 96, "mm"),
    ],
)
def test_packages_of_older_pytorch_hold_no_branch(format, capability, k, many, known, hopper, monkeypatch):
    """A product of the library then serves all rows or none."""
    from wush_compile.kernels.triton.packaged import linear

    monkeypatch.setattr(linear, "TORCH", (2, 11))
    assert torch._inductor.config.allow_buffer_reuse and not linear.has_branches()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    program = exported(Product(format, k=k), x_like(5, k))
    graph = on_gpu(program)
    passes.run(graph, passes.packaging(functools.partial(weight_of, program)) if known else passes.PACKAGING)
    assert not count_ops(graph) and len(graphs(program.graph_module)) == 1
    for m in ROWS:
        last = launches(graph, m)[-1][0]
        assert last == many or m < 5 and last == "gemv_kernel", (m, last)
    with torch._inductor.config.patch(allow_buffer_reuse=False):
        assert linear.has_branches()


def formats_rule(format: str) -> str:
    return formats.get_format(format).scale_rules[0]


# (format, activation, compute capability, channels) -> by the number of rows, the last kernel.
FEW, MANY = "fused_gemm_kernel", "mm"
WIDE = {
    ("mxfp4", "fp8", (9, 0), 256): {1: FEW, 256: FEW, 257: "_scaled_mm"},
    ("mxfp4", "none", (9, 0), 256): {1: FEW, 256: FEW, 257: MANY},
    ("nvfp4", "fp8", (9, 0), 256): {1: FEW, 256: FEW, 257: MANY},
    ("nvfp4", "none", (9, 0), 256): {1: FEW, 256: FEW, 257: MANY},
    ("nvfp4", "none", (9, 0), 96): {1: MANY, 257: MANY},
    ("mxfp4", "fp8", (8, 9), 256): {1: FEW, 128: FEW, 129: MANY},
    ("mxfp4", "none", (10, 0), 256): {1: MANY, 257: MANY},
    ("int8", "none", (9, 0), 256): {1: "int8_gemv_kernel", 2: "int8_gemm_kernel", 64: "int8_gemm_kernel", 65: MANY},
    ("int8", "fp8", (8, 0), 256): {1: "int8_gemv_kernel", 2: "int8_gemm_kernel", 64: "int8_gemm_kernel", 65: MANY},
}


@pytest.mark.parametrize("case", WIDE, ids=lambda case: f"{case[0]}-{case[1]}-{case[2][0]}{case[2][1]}-{case[3]}")
def test_packages_for_a_gpu_take_activations_of_8_and_16_bits(case, hopper, monkeypatch):
    format, activation, capability, k = case
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    program = exported(WideProduct(format, activation, k), x_like(5, k))
    graph = on_gpu(program)
    passes.run(graph, passes.packaging(functools.partial(weight_of, program)))
    assert not count_ops(graph)
    for m, product in WIDE[case].items():
        names = [name for name, _ in launches(graph, m)]
        assert names[0] == "flat_token_kernel" and names[-1] == product, (m, names)
        assert [n for n in names[1:-1] if n not in PREPARE] in ([], ["int8_upcast_kernel"], ["mm"]), (m, names)


class Experts(nn.Module):
    """Experts of a width that is no multiple of 128, with a bias; rows of the input by an index."""

    def __init__(self, format: str, experts: int = 2, activation: str = "same"):
        super().__init__()
        torch.manual_seed(0)
        self.format, self.activation = format, activation
        codes, scales = formats.quantize(torch.randn(experts, 24, 160), format, "absmax")
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.randn(experts, 24))

    def forward(self, x, offs, index):
        wide = formats.ACTIVATION_FORMATS.get(self.activation)
        quantizer = (self.format, "absmax") if wide is None else (wide.name, wide.scale_rules[0])
        q = wush.transform_quantize(x, None, None, *quantizer)
        rest = None, offs, self.bias, self.format, torch.float32
        options = dict(activation_format=self.activation, index=index)
        return wush.fp4_grouped_linear(*q, None, self.codes, self.scales, *rest, **options)


EXPERTS_INPUT = (x_like(3, 160), torch.tensor([2, 5], dtype=torch.int32), torch.tensor([2, 0, 0, 1, 2, 1]))


def experts_program(format: str, experts: int = 2, activation: str = "same") -> torch.export.ExportedProgram:
    sizes, (x, _, index) = ({0: torch.export.Dim.AUTO}, None, {0: torch.export.Dim.AUTO}), EXPERTS_INPUT
    offs = torch.arange(1, experts + 1, dtype=torch.int32) * 2
    with torch.no_grad():
        return torch.export.export(Experts(format, experts, activation), (x, offs, index), dynamic_shapes=sizes)


@pytest.mark.parametrize("activation", ["same", "fp8", "none"])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_experts_in_a_package_for_a_gpu(capability, format, activation, hopper, monkeypatch):
    """One product for any number of rows, and one form of its operand: those that eager chooses, without Gluon."""
    from wush_compile.kernels.triton.grouped.choose import Gemm, Gemv, Scaled, choose, grouped_format

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    program = experts_program(format, 8, activation)
    graph = on_gpu(program)
    passes.run(graph, passes.PACKAGING)
    assert not count_ops(graph)
    kernels = {Gemv: "grouped_gemv_kernel", Gemm: "grouped_gemm_kernel", Scaled: "grouped_scaled_kernel"}
    for m in (1, 2, 3, 16, 64, 65, 192, 193, 512, 513, 4095, 4096, 9000):
        names = [name for name, _ in launches(graph, m) if name.startswith(("grouped", "upcast", "lane"))]
        kind = grouped_format(format, activation, capability)
        chosen = choose(kind, activation, m, 8, 24, 160, capability, portable=True)
        assert names[-1] == kernels[type(chosen)] and len(names) <= 2, (m, names)
        assert isinstance(chosen, Gemm) <= (len(names) == 2), (m, names)
    assert not [name for name, _ in launches(graph, 0) if name.startswith(("grouped", "upcast", "lane"))]


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


SEEN = {
    ("mxfp4", None): 5,
    ("mxfp4", "factors"): 5,
    ("nvfp4", None): 4,
    ("mxfp4", "fp8"): 4,
    ("nvfp4", "none"): 4,
    ("int8", "fp8"): 4,
    ("experts", None): 5,
}


@pytest.mark.parametrize("format, activation", SEEN)
def test_inductor_finds_in_the_kernels_what_the_launches_declare(format, activation, hopper, monkeypatch):
    """Counters too are written, and are zeros again when a kernel ends: they are no output. An assertion about offsets
    counts as a write."""
    import triton
    from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table
    from triton.backends.compiler import GPUTarget

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    if format == "experts":
        program = experts_program("mxfp4", experts=8)
    elif activation in (None, "factors"):
        program = exported(Product(format, factors=activation is not None), x_like(5, 256))
    else:
        program = exported(WideProduct(format, activation), x_like(5, 256))
    graph = on_gpu(program)
    passes.run(graph, passes.packaging(functools.partial(weight_of, program)))
    seen = set()
    for graph in graphs(program.graph_module):
        for node in graph.nodes:
            if "triton_kernel_wrapper" not in str(node.target):
                continue
            name = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
            arguments = torch.fx.map_arg(node.kwargs["kwargs"], value)
            indices = node.kwargs["kernel_idx"], node.kwargs["constant_args_idx"]
            written = set(get_mutated_tensors(*indices, arguments, {}))
            assert written - {"arrivals", "counters", "offs"} == set(node.kwargs["tensors_to_clone"]), name
            seen.add(name)
    assert len(seen) == SEEN[format, activation], seen


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_the_text_that_inductor_makes_of_the_kernels_is_python(format, hopper):
    """It goes into a string of the code that packages are made with, constants and all."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code as text_of

    program = exported(Product(format), x_like(5, 256))
    passes.run(on_gpu(program), passes.PACKAGING)
    nodes = [node for graph in graphs(program.graph_module) for node in graph.nodes]
    kernels = {node.kwargs["kernel_idx"] for node in nodes if "triton_kernel_wrapper" in str(node.target)}
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
    assert packaged.refuses("fp4_linear", *linear) is None
    assert "swizzled" in packaged.refuses("fp4_linear", *linear, "swizzled")
    bf16 = torch.zeros(2, 96, dtype=torch.bfloat16), torch.zeros(2, 0), *linear[2:-2], "int4", *linear[-1:]
    assert "int4" in packaged.refuses("fp4_linear", *bf16, "rows", "none")
    assert "int4" in packaged.refuses("transform_quantize", x, None, None, "int4", "gaussian")
    assert "torch.float32" in packaged.refuses("fp4_linear", x.float(), *linear[1:], "rows", "none")


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
