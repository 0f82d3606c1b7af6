"""Weights that make up for the groups in front of them: the algebra, the observer, the steps, and what it gains."""

import copy

import pytest
import torch
from models import plain, tokens
from torch import nn
from torch.library import opcheck

import wush_compile as wc
from wush_compile.calibration import loop, solve_group, variants
from wush_compile.capture.export import capture
from wush_compile.data import normalize
from wush_compile.errors import ConfigError, DataError, NonFiniteError
from wush_compile.passes.calibration.cut import cut, resumable
from wush_compile.passes.calibration.group import find_groups
from wush_compile.passes.calibration.partition import partition
from wush_compile.passes.calibration.reference import in_turn
from wush_compile.solver.correction import corrected

wush = torch.ops.wush
DATA = [tokens(6, 64, seed=1)]


def moments(rows: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.T @ rows, rows.T @ (reference - rows)


# -- the algebra -----------------------------------------------------------------------------------------------------


def test_a_linear_change_of_the_inputs_is_undone():
    """Where X = X̂ M, the whole correction gives the output of X."""
    rows, weight = torch.randn(400, 32), torch.randn(24, 32)
    x = rows @ (torch.eye(32) + 0.1 * torch.randn(32, 32))
    recipe = wc.WushConfig(correction=1.0, damping=0.0).recipe
    w = corrected(weight, *moments(rows, x), recipe, "linear")
    torch.testing.assert_close(rows @ w.T, x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_goes_so_far(share):
    rows, weight = torch.randn(90, 32), torch.randn(7, 32)
    given = moments(rows, rows + 0.2 * torch.randn(90, 32))
    whole, part = (
        corrected(weight, *given, wc.WushConfig(correction=a).recipe, "linear") - weight for a in (1.0, share)
    )
    assert whole.abs().max() > 0.01
    torch.testing.assert_close(part, share * whole, rtol=1e-4, atol=1e-6)


def test_the_whole_correction_is_the_least_squares_fit():
    """The gradient of the damped loss is zero there: no other weights have a smaller one."""
    rows, weight = torch.randn(200, 32).double(), torch.randn(5, 32).double()
    x = rows + 0.3 * torch.randn(200, 32)
    recipe = wc.WushConfig(correction=1.0, damping=0.05).recipe
    w = corrected(weight, *moments(rows, x), recipe, "linear")
    damping = 0.05 * (rows.T @ rows).diagonal().mean()
    gradient = (rows @ w.T - x @ weight.T).T @ rows + damping * (w - weight)
    assert gradient.norm() < 1e-9 * (x @ weight.T).norm() * rows.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_that_are_the_same_change_nothing(dtype):
    rows, weight = torch.randn(50, 32), torch.randn(3, 32).to(dtype)
    w = corrected(weight, *moments(rows, rows), wc.WushConfig().recipe, "linear")
    assert w.dtype == dtype and torch.equal(w, weight)


def test_no_tokens_change_nothing():
    zero, weight = torch.zeros(32, 32), torch.randn(3, 32)
    assert torch.equal(corrected(weight, zero, zero, wc.WushConfig().recipe, "linear"), weight)


@pytest.mark.parametrize("where", [0, 1])
def test_infinite_moments_are_our_error(where):
    given = [torch.eye(32), torch.zeros(32, 32)]
    given[where][3, 3] = torch.inf
    with pytest.raises(NonFiniteError, match="layers.7.o: its calibration inputs, here or in the unquantized model"):
        corrected(torch.randn(3, 32), *given, wc.WushConfig().recipe, "layers.7.o")


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_outside_of_its_range(share):
    with pytest.raises(ConfigError, match="correction is a share of the whole correction, from 0 to 1"):
        wc.WushConfig(correction=share)


# -- the observer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 3, 17, 129])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_observe_cross(rows, masked, weighed):
    x, reference = torch.randn(rows, 32).bfloat16(), torch.randn(rows, 32).bfloat16()
    mask = torch.arange(rows) % 3 if masked else None
    weight = torch.rand(rows) if weighed else None
    cross = torch.ones(32, 32)
    if masked:  # what padding holds is nobody's business
        x[mask == 0], reference[mask == 0] = torch.nan, torch.inf
    wush.observe_cross(x, mask, reference, cross, weight)
    if masked:
        x[mask == 0], reference[mask == 0] = 0, 0
    scale = (weight if weighed else torch.ones(rows)).double() * ((mask != 0) if masked else 1)
    expected = 1 + (x.double() * scale[:, None]).T @ (reference.double() - x.double())
    torch.testing.assert_close(cross.double(), expected, rtol=1e-5, atol=1e-5)


def test_opcheck():
    x = torch.randn(2, 3, 32).bfloat16()
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    opcheck(wush.observe_cross.default, (x, mask, x + 1, torch.zeros(32, 32), torch.rand(6)))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 17, 4096])
def test_observe_cross_on_a_gpu(rows):
    x, reference = (torch.randn(rows, 64, device="cuda").bfloat16() for _ in range(2))
    weight, cross = torch.rand(rows, device="cuda"), torch.zeros(64, 64, device="cuda")
    wush.observe_cross(x, None, reference, cross, weight)
    expected = (x.double() * weight.double()[:, None]).T @ (reference.double() - x.double())
    assert (cross.double() - expected).norm() <= 2.0**-8 * expected.norm()  # two operands rounded to bf16


# -- the steps -------------------------------------------------------------------------------------------------------


class Parallel(nn.Module):
    """Attention and MLP read the same norm, as in GPT-J; the attention's output is read twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.v, self.o, self.up, self.down = (nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        return x + self.o(torch.sigmoid(self.v(y))) + self.down(torch.tanh(self.up(y)))


def steps_of(model: nn.Module, data: list, config: wc.WushConfig) -> list[list[list[str]]]:
    captured = capture(model, normalize(data, model=model))
    groups, _ = find_groups(captured.graph_module, model, config)
    names = {i: "+".join(linear.name for linear in group.linears) for i, group in enumerate(groups)}
    found = []
    for stage in partition(captured.graph_module):
        here = {n.name for n in stage.graph_module.graph.nodes if n.op == "call_function"}
        own = [(i, group) for i, group in enumerate(groups) if group.linears[0].node.name in here]
        found.append([[names[i] for i in step] for step in in_turn(stage, own)])
    return found


def test_a_layer_of_llama_has_four_steps():
    steps = steps_of(plain("llama", layers=1), DATA, wc.WushConfig())
    prefix = "model.layers.0."
    assert [[[name.replace(prefix, "") for name in step] for step in stage] for stage in steps if stage] == [
        [
            ["self_attn.q_proj+self_attn.k_proj+self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj+mlp.up_proj"],
            ["mlp.down_proj"],
        ]
    ]


def test_groups_that_do_not_depend_on_one_another_are_solved_together():
    data = [torch.randn(2, 8, 64)]
    assert [s for s in steps_of(Parallel(), data, wc.WushConfig()) if s] == [[["v+up"], ["o", "down"]]]
    alone = wc.WushConfig(share_transform=False)
    assert [s for s in steps_of(Parallel(), data, alone) if s] == [[["v", "up"], ["o", "down"]]]


def solved(model: nn.Module, monkeypatch, data=DATA, **settings) -> tuple[nn.Module, dict, list]:
    """(the quantized model, the crosses by group, the groups of each observing pass)."""
    crosses, passes = {}, []

    def spy(weight, moment, cross, recipe, name):
        crosses[name] = cross.double()
        return corrected(weight, moment, cross, recipe, name)

    observe = variants.Variant.observe

    def watched(variant, number, loaded, groups):
        passes.append(list(groups))
        return observe(variant, number, loaded, groups)

    with monkeypatch.context() as patch:
        patch.setattr(solve_group, "corrected", spy)
        patch.setattr(variants.Variant, "observe", watched)
        return wc.quantize(model, data, progress=False, **settings), crosses, passes


def inputs_of(model: nn.Module, names: list[str], data: list) -> dict[str, torch.Tensor]:
    """The rows [n, K] that these linears read, float64."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name in names
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in rows]).double() for name, rows in seen.items()}


def test_the_two_inputs_are_those_of_the_two_models(monkeypatch):
    """What stands in front of a group is quantized when the group is observed, as in the finished model."""
    original = plain("llama", torch.float32)
    model, crosses, passes = solved(plain("llama", torch.float32), monkeypatch, token_weights="uniform")
    assert passes == [[i] for i in range(8)]
    x, rows = (inputs_of(m, list(crosses), DATA) for m in (original, model))
    for name, cross in crosses.items():
        expected = rows[name].T @ (x[name] - rows[name])
        assert (cross - expected).norm() <= 1e-4 * expected.norm(), name
    first, *others = crosses.values()
    assert first.norm() == 0 and all(cross.norm() > 0 for cross in others)


def parts_of(model: nn.Module, monkeypatch, resumable: bool = True) -> tuple[dict, list[int]]:
    """(the quantized model's tensors, the quantized linears in each part of a stage that was run)."""
    linears = []

    def watched(*args, **options):
        part = cut(*args, **options)
        nodes = part.graph_module.graph.nodes
        linears.append(sum(node.target is wush.fp4_linear.default for node in nodes))
        return part

    with monkeypatch.context() as patch:
        patch.setattr(variants, "cut", watched)
        if not resumable:
            patch.setattr(variants, "resumable", lambda graph_module: False)
        return wc.quantize(model, DATA, progress=False).state_dict(), linears


def test_a_step_goes_on_from_the_one_before(monkeypatch):
    """No linear runs twice but gate and up, whose product is too wide to be kept: the same bytes as from the start."""
    state, linears = parts_of(plain("llama"), monkeypatch)
    # The parts: of the model, and of the unquantized one where there is a 0 in each pair.
    assert linears == [0, 0] + [0, 0, 0, 3, 0, 1, 0, 2, 3, 0] + [0, 0, 0, 3, 0, 1, 0, 2]
    whole, linears = parts_of(plain("llama"), monkeypatch, resumable=False)
    assert linears == [0, 0] + [0, 0, 0, 3, 0, 4, 0, 6, 7, 0] + [0, 0, 0, 3, 0, 4, 0, 6]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())


class Overwrites(nn.Module):
    """Adds in place to a value that is read before."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.a, self.b = (nn.Linear(64, 64) for _ in range(2))

    def forward(self, x):
        y = self.norm(x)
        y += torch.tanh(self.a(y))
        return self.b(torch.tanh(y))


class Activates(Overwrites):
    """Activates in place what was read before."""

    def forward(self, x):
        y = self.norm(x)
        z = self.a(y)
        return self.b(nn.functional.relu_(y)) + z


class OverwritesInput(Overwrites):
    """Adds in place to its input."""

    def forward(self, x):
        x += torch.tanh(self.a(self.norm(x)))
        return self.b(torch.tanh(x))


class OverwritesView(Overwrites):
    """Writes into a part of a value."""

    def forward(self, x):
        y = self.a(self.norm(x))
        z = torch.tanh(y)
        y[..., :32] = y[..., :32] + self.b(z)[..., :32]
        return self.c(y)

    def __init__(self):
        super().__init__()
        self.c = nn.Linear(64, 64)


@pytest.mark.parametrize("make", [Overwrites, Activates, OverwritesInput, OverwritesView])
def test_values_that_are_overwritten(make, monkeypatch):
    """A step starts anew, on copies, and each input is taken where the linear reads it."""
    data = [torch.randn(4, 24, 64) for _ in range(2)]
    given = [x.clone() for x in data]
    torch.manual_seed(0)
    original = make()
    model, crosses, passes = solved(copy.deepcopy(original), monkeypatch, data, token_weights="uniform")
    assert all(map(torch.equal, data, given)) and len(passes) == (1 if make is Activates else len(crosses))
    names = list(crosses)
    x, rows = (inputs_of(m, names, [batch.clone() for batch in data]) for m in (original, model))
    assert crosses["a"].norm() == 0
    for name in names[1:]:
        expected = rows[name].T @ (x[name] - rows[name])
        assert (crosses[name] - expected).norm() <= 1e-4 * expected.norm(), name


def test_the_pass_that_weighs_tokens_leaves_the_data_alone():
    data = [torch.randn(4, 24, 64) for _ in range(2)]
    given = [x.clone() for x in data]
    wc.quantize(OverwritesInput(), data, progress=False)
    assert all(map(torch.equal, data, given))


def test_which_graphs_overwrite_values():
    *_, stage = partition(capture(Overwrites(), normalize([torch.randn(2, 8, 64)])).graph_module)
    assert not resumable(stage.graph_module)
    assert all(resumable(s.graph_module) for s in partition(capture(plain("llama"), normalize(DATA)).graph_module))


class Selects(nn.Module):
    """Linears that read the rows which a mask selects."""

    def __init__(self):
        super().__init__()
        self.r, self.a, self.b = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        h = self.r(x).flatten(0, 1)
        keep = h[:, 0] > 0
        return h.index_put((keep,), self.b(torch.tanh(self.a(h[keep]))))


def test_rows_that_the_data_choose_are_not_corrected(monkeypatch):
    data = [torch.randn(4, 16, 64) for _ in range(3)]
    model, crosses, _ = solved(Selects(), monkeypatch, data, token_weights="uniform")
    assert list(crosses) == ["r"] and len(model.wush_quantization.groups) == 3


def test_other_rows_in_the_two_models_are_our_error():
    with pytest.raises(DataError, match="give correction=0"):
        wush.observe_cross(torch.randn(3, 32), None, torch.randn(4, 32), torch.zeros(32, 32))


class Swaps(nn.Module):
    """Runs its layers in another order for sequences of another length, in another graph."""

    def __init__(self):
        super().__init__()
        self.f, self.g, self.h = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        first, second = (self.f, self.g) if x.shape[1] == 8 else (self.g, self.f)
        return self.h(torch.tanh(second(torch.tanh(first(x)))))


def test_graphs_that_order_the_groups_differently(monkeypatch):
    """No value behind a linear is kept until that linear is rewritten: the same bytes as from the start."""
    data = [torch.randn(4, 8, 64), torch.randn(4, 16, 64)]
    states = []
    for from_the_start in (False, True):
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            if from_the_start:
                patch.setattr(variants, "resumable", lambda graph_module: False)
            states.append(wc.quantize(Swaps(), data, progress=False, token_weights="uniform").state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


class Strides(nn.Module):
    """Reads a value by its strides."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        t = torch.tanh(x).transpose(0, 1)
        y = self.b(torch.tanh(self.a(t)))
        return self.c(y + torch.as_strided(t, (16, 4, 64), (64, 1024, 1)))


def test_values_in_files_keep_their_strides(tmp_path):
    states = []
    for directory in (None, tmp_path):
        torch.manual_seed(0)
        data = [torch.randn(4, 16, 64) for _ in range(2)]
        states.append(wc.quantize(Strides(), data, progress=False, activations_dir=directory).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_without_correction_a_stage_is_observed_once(monkeypatch):
    _, crosses, passes = solved(plain("llama"), monkeypatch, correction=0.0)
    assert not crosses and passes == [[0, 1, 2, 3], [4, 5, 6, 7]]
    _, crosses, passes = solved(plain("llama"), monkeypatch, solver="rtn")
    assert not crosses and len(passes) == 2


def test_an_override_corrects_some_groups(monkeypatch):
    _, crosses, passes = solved(
        plain("llama"), monkeypatch, correction=0.0, overrides={"*.down_proj": {"correction": 0.5}}
    )
    assert list(crosses) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"] and len(passes) == 8


def test_a_stage_with_padding_and_several_batches(monkeypatch):
    """Masked rows do not count on either side."""
    ids = tokens(4, 32, seed=2)
    mask = torch.ones_like(ids)
    mask[1, 20:] = mask[3, 5:] = 0
    padded = [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
    _, crosses, _ = solved(plain("llama", torch.float32), monkeypatch, padded, token_weights="uniform", sweeps=0)
    other = [ids.clone() for _ in range(2)]
    other[1][mask == 0] = 7  # what padding holds
    again = [{"input_ids": other[1][i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
    _, same, _ = solved(plain("llama", torch.float32), monkeypatch, again, token_weights="uniform", sweeps=0)
    for name, cross in crosses.items():
        assert (cross - same[name]).norm() <= 1e-4 * max(cross.norm(), 1e-9), name


# -- what it gains ---------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Linear layers alone, whose errors are linear in the input: the next layer can undo them."""

    def __init__(self, layers: int = 4, width: int = 64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_errors_of_weights_are_undone(format):
    errors, x = {}, torch.randn(512, 64)
    for share in (0.0, 0.25, 1.0):
        torch.manual_seed(0)
        model = Deep()
        exact = model(x)
        settings = dict(format=format, activation_format=None, token_weights="uniform", correction=share)
        wc.quantize(model, list(x.split(128)), progress=False, **settings)
        errors[share] = float((model(x) - exact).detach().square().sum())
    assert errors[0.25] < 0.85 * errors[0.0] and errors[1.0] < 0.6 * errors[0.0]


class Looped(nn.Module):
    """Loops over its batch: another size is another graph."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.f, self.g = (nn.Linear(64, 64) for _ in range(2))

    def forward(self, input_ids):
        return self.g(torch.tanh(self.f(torch.stack(list(self.embed(input_ids))))))


@pytest.mark.parametrize("make, groups", [(lambda: plain("llama", torch.float32), 8), (Looped, 2)])
def test_memory_that_runs_out_between_two_steps(monkeypatch, make, groups):
    """The inputs of the layer are computed again with what its earlier steps have solved, in a new graph too."""
    data, calls, fails = [{"input_ids": tokens(8, 32, seed=4) % 64}], [], [0]
    settings = dict(token_weights="uniform", batch_size=8, progress=False)
    call = variants.functional_call

    def failing(*args):
        calls.append(args)
        if len(calls) == fails[0]:
            raise torch.OutOfMemoryError("simulated")
        return call(*args)

    monkeypatch.setattr(variants, "functional_call", failing)
    wc.quantize(make(), data, **settings)
    whole, sizes = len(calls), []
    choose = loop.Calibration._halved
    monkeypatch.setattr(loop.Calibration, "_halved", lambda run: sizes.append(choose(run)) or sizes[-1])
    for fails[0] in range(1, whole + 1):
        calls.clear()
        record = wc.quantize(make(), data, **settings).wush_quantization
        assert sizes.pop() == 4 and not sizes
        assert [report["tokens"] for report in record.report.values()] == groups * [8 * 32]
