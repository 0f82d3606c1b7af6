"""Training on top of quantized linears: gradients against float64, in eager mode, compiled, and with checkpointing."""

import copy

import pytest
import torch
from helpers import branches, quantize
from models import pair, pair_rows, plain, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import wush_compile as wc
from wush_compile import formats
from wush_compile.errors import GradientError
from wush_compile.modules import WushLinear, named_groups
from wush_compile.ops.straight_through import ExpertsStraightThrough, StraightThrough

SETTINGS = {
    "mxfp4, one transform": {"transform": "hadamard"},
    "mxfp4, a transform a block": {"transform": "wush"},
    "nvfp4": {"format": "nvfp4", "transform": "hadamard"},
    "int4, no transform": {"format": "int4", "transform": "identity"},
    "16-bit activations": {"activation_format": None, "transform": "hadamard"},
    "fp8 activations": {"activation_format": "fp8", "transform": "hadamard"},
}


class Straight(torch.autograd.Function):
    """Value of `y`, gradient of `exact`: the definition of straight-through."""

    @staticmethod
    def forward(ctx, exact, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_dequantized_weight(settings, dtype):
    """Bound: one rounding of each product to `dtype`, fp32 sums over at most 64 terms."""
    model, x = branches(dtype, **settings)
    bound = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}[dtype]
    for linear in (model.q, model.k, model.out):
        rows = torch.randn(3, 5, linear.in_features).to(dtype).requires_grad_()
        given = torch.randn(3, 5, linear.out_features).to(dtype)
        y = linear(rows)
        with torch.no_grad():
            assert torch.equal(y, linear(rows))
        y.backward(given)
        expected = given.double() @ linear.dequantize().double()
        assert rows.grad.dtype == dtype
        assert (rows.grad.double() - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("experts", [False, True], ids=["linear", "experts"])
def test_gradients_in_fp16_where_the_transformed_weight_overflows(experts):
    """W T⁻¹ is about 2e6 and T about 1e-5: neither W T⁻¹ nor grad W T⁻¹ fits fp16, and the gradient does."""
    torch.manual_seed(0)
    rows = torch.randn(4, 64)
    codes, scales = (t[None] if experts else t for t in formats.quantize(2e6 * torch.randn(32, 64), "mxfp4", "mse"))
    transform = (1e-5 * torch.linalg.qr(torch.randn(2, 32, 32))[0]).half()
    x = rows.half().requires_grad_()
    quantized = torch.ops.wush.transform_quantize(x.detach(), transform, None, "mxfp4", "mse")
    weight = (codes, scales, None)
    if experts:
        offs = torch.tensor([4], dtype=torch.int32)
        y = ExpertsStraightThrough.apply(x, *quantized, transform, None, *weight, offs, None, "mxfp4", (), None)
    else:
        y = StraightThrough.apply(x, *quantized, transform, None, *weight, None, "mxfp4")
    given = torch.randn(4, 32).half()
    y.backward(given)
    wide = formats.dequantize(codes, scales, "mxfp4").reshape(32, 2, 32).double()
    expected = given.double() @ torch.einsum("nkb,kbc->nkc", wide, transform.double()).flatten(1)
    assert (x.grad.double() - expected).norm() <= 1e-3 * expected.norm()


def test_whole_model_has_straight_through_gradients():
    """Every parameter's gradient, against the same forward values with exact linears behind them, in float64."""
    model, x = branches(transform="hadamard")
    x.requires_grad_()
    model(x).square().sum().backward()
    actual = [x.grad, model.norm.weight.grad, model.norm.bias.grad]

    wide, reference = x.detach().double().requires_grad_(), copy.deepcopy(model.norm).double()
    reference.zero_grad()

    def linear(module, h):
        exact = h @ module.dequantize().double().T
        return Straight.apply(exact, module(h.detach().float()).double())

    h = reference(wide)
    y = linear(model.out, torch.cat((linear(model.q, h), linear(model.k, h)), -1))
    y.square().sum().backward()
    for a, e in zip(actual, [wide.grad, reference.weight.grad, reference.bias.grad], strict=True):
        assert (a.double() - e).norm() <= 1e-4 * e.norm()


def test_bias_can_train_and_weights_do_not():
    model, x = branches()
    group = model.out.owner
    group.bias.requires_grad_()
    y = model.out(torch.randn(4, 96))
    given = torch.randn_like(y)
    y.backward(given)
    assert torch.allclose(group.bias.grad, given.sum(0), rtol=1e-5, atol=1e-6)
    for _, other in named_groups(model):
        assert all(b.grad is None for n, b in other.named_buffers() if n != "bias")


def parameter_gradients(model: nn.Module, run, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    run(x).float().square().sum().backward()
    return [p.grad for p in model.parameters()]


class Adapted(nn.Module):
    """A quantized model behind a layer that trains."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.first, self.base = nn.Linear(width, width, dtype=torch.bfloat16), pair()

    def forward(self, x):
        return self.base(self.first(x))


def test_compiled_and_checkpointed_gradients_are_eager_ones():
    torch.manual_seed(0)
    model, x = Adapted(), pair_rows(8)
    expected = parameter_gradients(model, model, x)
    assert all(g.norm() > 0 for g in expected)
    for reentrant in (False, True):

        def run(x, reentrant=reentrant):
            return checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)

        assert all(map(torch.equal, parameter_gradients(model, run, x), expected))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, parameter_gradients(model, compiled, x), expected))
    torch._dynamo.reset()


def test_no_gradient_costs_nothing():
    """Without a gradient the graph is as before: no autograd node, in grad mode too."""
    model, x = branches()
    model.requires_grad_(False)
    assert model(x).grad_fn is None
    with torch.no_grad():
        assert model(x.requires_grad_()).grad_fn is None


def test_ops_refuse_gradients():
    """An exported program holds the ops alone: it runs without gradients, and says so where one is asked for."""
    model, x = branches()
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(x))
    with pytest.raises(GradientError, match=r"transform_quantize passes no gradient on: .*torch\.no_grad"):
        program.module()(x)
    codes, scales = torch.ops.wush.transform_quantize(x, None, None, "mxfp4", "absmax")
    operands = (codes, scales, None, codes.reshape(-1, 32), scales.reshape(-1, 2), None, None)
    residual = torch.zeros(5, 7, 35, requires_grad=True)
    with pytest.raises(GradientError, match="fp4_linear"):
        torch.ops.wush.fp4_linear(*operands, residual, "mxfp4", torch.float32)


def test_lora_of_peft_trains():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ids = tokens(2, 16)
    model = quantize(plain("llama", torch.float32), ids)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model(ids).logits
    targets = ["q_proj", "v_proj", "down_proj"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0))
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * len(targets) and all(p.dtype == torch.float32 for p in trained)
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(12):
        loss = tuned(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(wc.WushError, match="read-only"):
        tuned.merge_and_unload()
    plain_again = tuned.unload()
    with torch.no_grad():
        assert torch.equal(plain_again(ids).logits, before)
    after = plain_again.state_dict()
    assert list(after) == list(base) and all(torch.equal(after[n].view(-1), t.view(-1)) for n, t in base.items())
    assert sum(isinstance(m, WushLinear) for m in plain_again.modules()) == 14
