"""`lay_out_scales`: swizzled scales between a quantizer and its products, on a pretended Blackwell GPU; codes in lane
order, on a pretended Hopper GPU.

The graph is lowered for fake tensors on that GPU, and then run on the CPU, where the reference defines every layout.
"""

import pytest
import torch
from expecttest import TestCase as ExpectTest
from test_lower import exported, on_gpu
from torch import nn

from wush_compile import formats
from wush_compile.graphs.printing import count_ops, print_graph
from wush_compile.kernels import dispatch as kernels
from wush_compile.kernels import scaled_mm
from wush_compile.ops import fused as fused_ops
from wush_compile.ops.layouts import from_lanes, swizzled_shape, to_lanes
from wush_compile.passes import pipeline as passes
from wush_compile.passes.pattern import arguments, is_wush

wush = torch.ops.wush
QUANTIZERS = ("transform_quantize", *fused_ops.FUSED_REFERENCE)


def rows_only(*args):
    return "rows only" if {"swizzled", "lanes"} & {a for a in args[-2:] if isinstance(a, str)} else None


def table(**refusals):
    """Op -> what its one provider refuses; by default every op is taken in every layout."""
    every = {op: lambda *args: None for op in (*QUANTIZERS, "fp4_linear")} | refusals
    return {op: [("mine", kernels.Implementation(None, refuses))] for op, refuses in every.items() if refuses}


@pytest.fixture
def blackwell(monkeypatch):
    """Sets the providers of the pretended GPU."""

    def use(**refusals):
        monkeypatch.setattr(kernels, "resolve", lambda device: {} if device is None else table(**refusals))

    use()
    return use


class Mlp(nn.Module):
    """Norm, gate and up, SiLU, down: a quantizer with two products, and one with a single product."""

    def __init__(self, format, width=96, hidden=160, activation="same"):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        for name, (n, k) in {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}.items():
            codes, scales = formats.quantize(torch.randn(n, k, generator=generator), format, "absmax")
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scales", scales)
        self.format = format
        self.operand = {"same": (format, "absmax"), "fp8": ("fp8", "token"), "none": ("none", "none")}[activation]
        self.layout = () if activation == "same" else ("rows", activation)
        self.transform = (
            None if activation == "same" else nn.Buffer(torch.randn(1, 32, 32, generator=generator).bfloat16())
        )

    def quantize(self, x):
        return wush.transform_quantize(x, self.transform, None, *self.operand)

    def linear(self, quantized, name):
        weight = getattr(self, f"{name}_codes"), getattr(self, f"{name}_scales")
        return wush.fp4_linear(*quantized, None, *weight, None, None, None, self.format, torch.bfloat16, *self.layout)

    def forward(self, x):
        quantized = self.quantize(self.norm(x))
        gate, up = self.linear(quantized, "gate"), self.linear(quantized, "up")
        return x + self.linear(self.quantize(nn.functional.silu(gate) * up), "down")


def lowered(model, *inputs):
    """(program, its graph) with every pass but the layout of scales done, as if on the GPU."""
    program = exported(model, *inputs)
    passes.run(program.graph, passes.EXECUTION)
    return program, on_gpu(program)


def layouts(graph):
    """(op, scale layout) of every wush op of a graph."""
    return [(n.target._opname, arguments(n)["scale_layout"]) for n in graph.nodes if is_wush(n)]


def sample(*lead, width=96):
    return torch.randn(*lead, width, generator=torch.Generator().manual_seed(len(lead))).bfloat16()


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("lead", [(0,), (1,), (3,), (17,), (129,), (2, 0), (2, 65)])
def test_the_swizzled_graph_computes_the_same_bits(blackwell, format, lead):
    model, x = Mlp(format), sample(*lead)
    with torch.no_grad():
        want = model(x)
    program, graph = lowered(model, sample(*(max(size, 2) for size in lead)))
    assert passes.lay_out_scales(graph) == 2
    assert {layout for _, layout in layouts(graph)} == {"swizzled"} and count_ops(graph)["fp4_linear"] == 3
    assert passes.lay_out_scales(graph) == 0
    got = on_cpu(program, graph, x)
    assert torch.equal(got, want) and got.dtype == want.dtype


def on_cpu(program, graph, x):
    """What a changed graph computes."""
    graph.lint()
    program.graph_module.recompile()
    state = dict(program.named_parameters()) | dict(program.named_buffers())
    signature = program.graph_signature
    given = [state[name] for name in (*signature.parameters, *signature.buffers)]
    with torch.no_grad():
        (got,) = program.graph_module(*given, x)
    return got


@pytest.mark.parametrize("activation", ["same", "fp8", "none"])
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_the_graph_in_lane_order_computes_the_same_bits(blackwell, activation, rows):
    format = "nvfp4" if activation == "same" else "mxfp4"
    model, x = Mlp(format, 128, 256, activation), sample(rows, width=128)
    with torch.no_grad():
        want = model(x)
    program, graph = lowered(model, sample(max(rows, 2), width=128))
    blackwell(fp4_linear=lambda *args: "no swizzled scales" if "swizzled" in args[-2:] else None)
    assert passes.lay_out_scales(graph) == 2
    assert {layout for _, layout in layouts(graph)} == {"lanes"} and count_ops(graph)["fp4_linear"] == 3
    assert passes.lay_out_scales(graph) == 0
    assert torch.equal(on_cpu(program, graph, x), want)
    blackwell(fp4_linear=rows_only)
    assert passes.lay_out_scales(lowered(model, sample(5, width=128))[1]) == 0


def test_other_readers_of_codes_keep_them_in_order(blackwell):
    class Reads(Mlp):
        def forward(self, x):
            codes, scales = self.quantize(x)
            return self.linear((codes, scales), "gate"), codes

    with torch.no_grad():
        program = torch.export.export(Reads("mxfp4", 128, 256, "fp8"), (sample(4, width=128),))
    graph = on_gpu(program)
    assert passes.lay_out_scales(graph) == 0 and {layout for _, layout in layouts(graph)} == {"rows"}


def test_recorded_shapes_are_what_the_ops_return(blackwell):
    _, graph = lowered(Mlp("nvfp4"), sample(5))
    before = {n: n.meta["val"] for n in graph.nodes if is_wush(n, "fp4_linear")}
    passes.lay_out_scales(graph)
    for node in graph.nodes:
        if is_wush(node, *QUANTIZERS):
            assert node.meta["val"][1].dim() == 4 and node.meta["val"][1].shape[2:] == (32, 16)
        if is_wush(node, "fp4_linear"):
            assert node.meta["val"].shape == before[node].shape


def test_recorded_arguments_of_changed_calls_are_forgotten(blackwell):
    """Inductor pairs `eager_input_vals` with the arguments: those of the old call are too few."""
    _, graph = lowered(Mlp("nvfp4"), sample(5))
    calls = [node for node in graph.nodes if is_wush(node, *QUANTIZERS, "fp4_linear")]
    for node in calls:
        node.meta["eager_input_vals"] = (), {}
    passes.lay_out_scales(graph)
    changed = [node for node in calls if arguments(node)["scale_layout"] == "swizzled"]
    assert changed and all(("eager_input_vals" in node.meta) == (node not in changed) for node in calls)


class Reads(Mlp):
    """The scales of one activation, read by a product and by something else."""

    def __init__(self, other):
        super().__init__("mxfp4")
        self.other = other

    def forward(self, x):
        codes, scales = self.quantize(x)
        return self.linear((codes, scales), "gate"), self.other(self, codes, scales)


OTHERS = {
    "the output": lambda model, codes, scales: scales,
    "a slice": lambda model, codes, scales: model.linear((codes[:1], scales[:1]), "up"),
    "a split": lambda model, codes, scales: [
        model.linear(part, "up") for part in zip(codes.split([1, 3]), scales.split([1, 3]))
    ],
    "a weight": lambda model, codes, scales: wush.fp4_linear(
        codes, scales, None, codes, scales, None, None, None, "mxfp4", torch.bfloat16
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_readers_keep_rows(blackwell, other):
    with torch.no_grad():
        program = torch.export.export(Reads(OTHERS[other]), (sample(4),))
    graph = on_gpu(program)
    assert passes.lay_out_scales(graph) == 0 and {layout for _, layout in layouts(graph)} == {"rows"}


@pytest.mark.parametrize(
    "refusals",
    [
        {"fp4_linear": rows_only},
        {"fp4_linear": None},
        dict.fromkeys(QUANTIZERS, rows_only),
        {"fp4_linear": lambda *args: "never"},
    ],
)
def test_rows_stay_where_a_provider_does_not_take_swizzled_scales(blackwell, refusals):
    blackwell(**refusals)
    _, graph = lowered(Mlp("mxfp4"), sample(5))
    assert passes.lay_out_scales(graph) == 0


def test_each_quantizer_is_decided_alone(blackwell):
    blackwell(rms_norm_transform_quantize=rows_only)
    _, graph = lowered(Mlp("mxfp4"), sample(5))
    assert passes.lay_out_scales(graph) == 1
    assert layouts(graph) == [
        ("rms_norm_transform_quantize", "rows"),
        ("fp4_linear", "rows"),
        ("fp4_linear", "rows"),
        ("silu_mul_transform_quantize", "swizzled"),
        ("fp4_linear", "swizzled"),
    ]


def test_the_layout_does_not_change_who_computes(blackwell, monkeypatch):
    """One provider is first for rows, another one takes swizzled scales: rows stay."""
    both = [("first", kernels.Implementation(None, rows_only)), ("second", table()["fp4_linear"][0][1])]
    monkeypatch.setattr(kernels, "resolve", lambda device: table() | {"fp4_linear": both})
    _, graph = lowered(Mlp("mxfp4"), sample(5))
    assert passes.lay_out_scales(graph) == 0


@pytest.mark.parametrize("rows, swizzled", [(64, True), (63, False), (None, False)])
def test_scaled_mm_is_asked_without_a_guess_at_the_number_of_rows(blackwell, monkeypatch, rows, swizzled):
    """The provider refuses few rows: a graph for any number of rows keeps the row layout, and gets no guard."""
    monkeypatch.setattr(scaled_mm, "problem", lambda *args: None)
    blackwell(fp4_linear=scaled_mm.refuses_fp4_linear)
    model, x = Mlp("mxfp4"), sample(rows or 100)
    with torch.no_grad():
        program = exported(model, x) if rows is None else torch.export.export(model, (x,))
    graph = on_gpu(program)
    sizes = [size for n in graph.nodes if n.op == "placeholder" for size in n.meta["val"].shape]
    guards = [len(size.node.shape_env.guards) for size in sizes if isinstance(size, torch.SymInt)]
    assert passes.lay_out_scales(graph) == 2 * swizzled
    assert guards == [len(size.node.shape_env.guards) for size in sizes if isinstance(size, torch.SymInt)]
    assert bool(guards) == (rows is None)


def test_on_a_cpu_scales_stay_in_rows(blackwell):
    program = exported(Mlp("mxfp4"), sample(5))
    passes.run(program.graph, passes.EXECUTION)
    assert {layout for _, layout in layouts(program.graph)} == {"rows"}


def test_packages_keep_rows():
    assert passes.lay_out_scales in passes.EXECUTION and passes.lay_out_scales not in passes.PACKAGING


@pytest.mark.parametrize("format", formats.FORMATS)
def test_the_ops_agree_in_both_layouts(format):
    fmt, x = formats.get_format(format), sample(3, 50)
    rule = fmt.scale_rules[0]
    codes, scales = wush.transform_quantize(x, None, None, format, rule)
    again, swizzled = wush.transform_quantize(x, None, None, format, rule, "swizzled")
    assert torch.equal(codes, again) and swizzled.shape == swizzled_shape(150, 96 // fmt.group_size)
    rest = None, *formats.quantize(torch.randn(8, 96), format, rule), None, None, None, format, torch.bfloat16
    assert torch.equal(wush.fp4_linear(codes, scales, *rest), wush.fp4_linear(codes, swizzled, *rest, "swizzled"))
    torch.library.opcheck(wush.fp4_linear, (codes, swizzled, *rest, "swizzled"))
    with pytest.raises(ValueError, match="not one of rows, swizzled"):
        wush.transform_quantize(x.to("meta"), None, None, format, rule, "tiled")


def test_values_of_nvfp4_have_the_same_product(blackwell, format="nvfp4"):
    x = sample(3, 5, width=256) * torch.exp2(torch.arange(-4.0, 4.0).repeat_interleave(32)).bfloat16()
    g = torch.tensor([2.0])
    rows = wush.transform_quantize(x, None, g, format, "absmax")
    lanes = wush.transform_quantize(x, None, g, format, "absmax", "lanes")
    assert lanes[0].shape == x.shape and lanes[0].dtype == torch.bfloat16
    assert lanes[1].shape == (3, 5, 0) and lanes[1].dtype == torch.float32
    torch.library.opcheck(wush.transform_quantize, (x, None, g, format, "absmax", "lanes"))
    rest = g, *formats.quantize(torch.randn(8, 256), format, "absmax"), None, None, None, format, torch.bfloat16
    assert torch.equal(wush.fp4_linear(*lanes, *rest, "lanes"), wush.fp4_linear(*rows, *rest))
    torch.library.opcheck(wush.fp4_linear, (*lanes, *rest, "lanes"))
    with pytest.raises(RuntimeError, match="not lanes"):
        wush.transform_quantize(x.to("meta"), None, None, "mxfp4", "absmax", "lanes")


@pytest.mark.parametrize("activation, rule", [("fp8", "token"), ("none", "none")])
def test_the_ops_agree_in_lane_order(blackwell, activation, rule):
    x = sample(3, 5, width=256)
    codes, scales = wush.transform_quantize(x, None, None, activation, rule)
    ordered, same = wush.transform_quantize(x, None, None, activation, rule, "lanes")
    assert torch.equal(to_lanes(codes, activation), ordered) and torch.equal(from_lanes(ordered, activation), codes)
    assert torch.equal(scales, same) and not torch.equal(codes, ordered)
    torch.library.opcheck(wush.transform_quantize, (x, None, None, activation, rule, "lanes"))
    rest = None, *formats.quantize(torch.randn(8, 256), "mxfp4", "absmax"), None, None, None, "mxfp4", torch.bfloat16
    want = wush.fp4_linear(codes, scales, *rest, "rows", activation)
    assert torch.equal(wush.fp4_linear(ordered, scales, *rest, "lanes", activation), want)
    torch.library.opcheck(wush.fp4_linear, (ordered, scales, *rest, "lanes", activation))
    with pytest.raises(RuntimeError, match="not lanes"):
        wush.transform_quantize(sample(3).to("meta"), None, None, activation, rule, "lanes")


class Text(ExpectTest):
    def test_the_graph(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "resolve", lambda device: table())
            _, graph = lowered(Mlp("mxfp4"), sample(5))
            passes.lay_out_scales(graph)
        self.assertExpectedInline(
            print_graph(graph),
            """\
rms_norm_transform_quantize = wush.rms_norm_transform_quantize(x, norm_weight, 1e-06, None, 'wide', None, None, 'mxfp4', 'absmax', 'swizzled')  # (u8[s0, 48], u8[-(((-s0)//128)), 1, 32, 16])
fp4_linear = wush.fp4_linear(rms_norm_transform_quantize[0], rms_norm_transform_quantize[1], None, gate_codes, gate_scales, None, None, None, 'mxfp4', bf16, 'swizzled')  # bf16[s0, 160]
fp4_linear_1 = wush.fp4_linear(rms_norm_transform_quantize[0], rms_norm_transform_quantize[1], None, up_codes, up_scales, None, None, None, 'mxfp4', bf16, 'swizzled')  # bf16[s0, 160]
silu_mul_transform_quantize = wush.silu_mul_transform_quantize(fp4_linear, fp4_linear_1, None, None, 'mxfp4', 'absmax', 'swizzled')  # (u8[s0, 80], u8[-(((-s0)//128)), 2, 32, 16])
fp4_linear_2 = wush.fp4_linear(silu_mul_transform_quantize[0], silu_mul_transform_quantize[1], None, down_codes, down_scales, None, None, x, 'mxfp4', bf16, 'swizzled')  # bf16[s0, 96]
return (fp4_linear_2)""",  # noqa: E501
        )
