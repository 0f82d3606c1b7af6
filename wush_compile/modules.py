"""Quantized linears at run time: a `WushGroup` owns the buffers, and each `WushLinear` is a row range of a group.

A group is a child of its first member. The members hold the group in a list, so that it appears only once in the module
tree. They call the group as a module, so that its hooks fire, those of offloading among them.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from . import feedback
from .errors import WushError
from .formats import channels, dequantize, get_format
from .kernels import facts
from .ops import core as ops  # noqa: F401  (registers torch.ops.wush)
from .ops.straight_through import StraightThrough
from .recipe import Recipe


class Member(NamedTuple):
    """One linear of a group: the name of its module, its row range in the group's buffers, and the names of the
    embeddings that look up the same rows (a tied head)."""

    name: str
    start: int
    stop: int
    has_bias: bool
    embeddings: tuple[str, ...] = ()


def stores_global_scale(format: str, rule: str) -> bool:
    """Whether a tensor quantized by this rule has a global scale: always in nvfp4; in mxfp4 for `paper` (g = 3)."""
    return format == "nvfp4" or (format == "mxfp4" and rule == "paper")


def buffer_layout(
    recipe: Recipe,
    rows: int,
    width: int,
    block_size: int,
    dtype: torch.dtype,
    has_bias: bool,
    experts: int | None = None,
) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    """Shape and dtype of each buffer of a group of `rows` x `width`; None for a buffer that the recipe lacks.

    experts: how many experts have such a weight each; None for a group of linears.
    """
    fmt = get_format(recipe.format)
    blocks = {"identity": None, "hadamard": 1}.get(recipe.transform, width // block_size)
    weight_global = None
    if stores_global_scale(recipe.format, recipe.weight_scale_rule):
        weight_global = (experts or 1,), torch.float32
    elif recipe.factors_rows and experts is None:
        weight_global = (rows,), torch.bfloat16
    input_global = stores_global_scale(recipe.operand, recipe.activation_scale_rule)
    each = () if experts is None else (experts,)
    return {
        "weight_packed": ((*each, rows, width // fmt.per_byte), torch.uint8),
        "weight_scale": ((*each, rows, width // fmt.group_size), fmt.scale_dtype),
        "weight_global_scale": weight_global,
        "input_transform": None if blocks is None else ((blocks, block_size, block_size), dtype),
        "input_global_scale": ((1,), torch.float32) if input_global else None,
        "input_feedback": (
            (feedback.shape(recipe.format, width), torch.bfloat16) if recipe.rounds_with_feedback else None
        ),
        "bias": ((*each, rows), dtype) if has_bias else None,
    }


def feedback_arguments(feedback: Tensor | None) -> tuple:
    """The last arguments of `transform_quantize`, (scale_layout, feedback); none without feedback, so that a graph of
    rounding to nearest names neither."""
    return () if feedback is None else ("rows", feedback)


def needs_gradient(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether autograd records a linear of x. An exported program holds the ops alone, which refuse gradients."""
    wanted = x.requires_grad or (bias is not None and bias.requires_grad)
    # The flag behind `torch.compiler.is_exporting()`. torch 2.11's function is True in all that Dynamo traces.
    return torch.is_grad_enabled() and wanted and not torch.compiler._is_exporting_flag


class WushGroup(nn.Module):
    """Quantized linears that share their input: one transform, one packed weight [N, K/2], int8: [N, K]. N counts all
    stacked rows.

    `buffer_layout` describes the buffers. If only some members have a bias, the others have zeros in the buffer, so
    that all stay one matmul.
    """

    def __init__(self, members: Sequence[Member], recipe: Recipe, block_size: int, buffers: dict[str, Tensor | None]):
        super().__init__()
        self.members = tuple(members)
        self.recipe = recipe
        self.format = recipe.format
        self.operand, self.scale_rule = recipe.operand, recipe.operand_rule
        # The last arguments of `fp4_linear`, (scale_layout, activation_format); none where both are the defaults.
        self.layout = () if recipe.activation_format == "same" else ("rows", recipe.operand)
        self.block_size = block_size
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self._shared = None

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        facts.refresh(self.buffers(recurse=False))  # captured CUDA graphs replay without Python

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [.., K] -> (codes, scales) of the recipe's activation format; 4 bits: [.., K/2], [.., K/G]."""
        return torch.ops.wush.transform_quantize(
            x,
            self.input_transform,
            self.input_global_scale,
            self.operand,
            self.scale_rule,
            *feedback_arguments(self.input_feedback),
        )

    def _quantize_once(self, x: Tensor, member: int) -> tuple[Tensor, Tensor]:
        """`quantize_input`, computed once for all members that get the same tensor in eager mode on a CPU.

        Compiled graphs share by rewriting, and CUDA graphs replay without Python. Each member takes a result of another
        member at most once, so a tensor that changes without a new version is never mistaken for the old one.
        """
        if torch.compiler.is_compiling() or len(self.members) == 1 or x.device.type != "cpu" or x.is_inference():
            return self.quantize_input(x)
        shared = self._shared
        if shared is not None:
            source, version, served, result = shared
            if source() is x and version == x._version and member not in served:
                served.add(member)
                if len(served) == len(self.members):
                    self._shared = None
                return result
        result = self.quantize_input(x)
        self._shared = (weakref.ref(x), x._version, {member}, result)
        return result

    def forward(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x [.., K] -> [.., stop − start], the output of one member; ids [..] -> fp32 [.., K], rows of its weight."""
        if not x.is_floating_point():
            return self._look_up(x, start, stop)
        weight, weight_scale, bias = self.weight_packed, self.weight_scale, self.bias
        weight_global_scale = self.factors_of(start, stop)
        if len(self.members) > 1:
            weight, weight_scale = weight[start:stop], weight_scale[start:stop]
            bias = None if bias is None else bias[start:stop]
        if needs_gradient(x, bias):
            with torch.no_grad():
                codes, scales = self._quantize_once(x, start)
            return StraightThrough.apply(
                x,
                codes,
                scales,
                self.input_transform,
                self.input_global_scale,
                weight,
                weight_scale,
                weight_global_scale,
                bias,
                self.format,
                *self.layout,
            )
        codes, scales = self._quantize_once(x, start)
        return torch.ops.wush.fp4_linear(
            codes,
            scales,
            self.input_global_scale,
            weight,
            weight_scale,
            weight_global_scale,
            bias,
            None,
            self.format,
            x.dtype,
            *self.layout,
        )

    def factors_of(self, start: int, stop: int) -> Tensor | None:
        """`weight_global_scale` of a range of rows: that of the whole weight, or the rows' own factors."""
        g = self.weight_global_scale
        return g[start:stop] if g is not None and g.dtype == torch.bfloat16 and len(self.members) > 1 else g

    def _look_up(self, ids: Tensor, start: int, stop: int) -> Tensor:
        ids = ids.to(self.weight_packed.device)  # a head and its embedding may be on two devices
        codes, scales = (F.embedding(ids, t[start:stop]) for t in (self.weight_packed, self.weight_scale))
        g = self.factors_of(start, stop)
        return dequantize(codes, scales, self.format, g[ids] if g is not None and g.dtype == torch.bfloat16 else g)

    def install(self, model: nn.Module) -> None:
        """Puts the members into the model, in place of the linears of the same names, which are freed."""
        for member in self.members:
            old = model.get_submodule(member.name)
            linear = WushLinear(self, member, old.weight.dtype)
            linear.train(old.training)
            linear._forward_hooks, linear._forward_pre_hooks = old._forward_hooks, old._forward_pre_hooks
            linear._forward_hooks_with_kwargs = old._forward_hooks_with_kwargs
            linear._forward_hooks_always_called = old._forward_hooks_always_called
            linear._forward_pre_hooks_with_kwargs = old._forward_pre_hooks_with_kwargs
            owner, _, leaf = member.name.rpartition(".")
            parent = model.get_submodule(owner)
            if isinstance(parent, nn.TransformerEncoderLayer):
                parent.activation_relu_or_gelu = 0  # no fast path, which multiplies with `weight` and skips the linears
            setattr(parent, leaf, linear)

    def _apply(self, fn, recurse=True):
        # Casting a model (`model.half()`) must not round scales and transforms. As bytes they only change device.
        return super()._apply(
            lambda t: fn(t.view(torch.uint8)).view(t.dtype) if t.is_floating_point() else fn(t), recurse
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shared": None}  # a weak reference can be neither copied nor pickled

    @property
    def width(self) -> int:
        """Input channels K."""
        return channels(self.weight_packed, self.format)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K), the rows and the width of the stacked weights; of experts (E, N, K)."""
        return *self.weight_packed.shape[:-1], self.width

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def extra_repr(self) -> str:
        rows, width = self.weight_packed.shape[0], self.width
        activations = f", activations={self.operand}" if self.layout else ""
        return f"{self.format}{activations}, in_features={width}, rows={rows}, members={[m.name for m in self.members]}"


READ_ONLY = (
    "the weight and the bias of a quantized linear are read-only: change them, then quantize; if the model's own "
    "forward changes them, switch that off in its configuration and quantize again (RWKV: config.rescale_every = 0)"
)


class ComputedTensor(torch.Tensor):
    """A read-only tensor whose values are computed where an op needs them; shape, dtype and device cost nothing."""

    # transformers initializes only tensors without this mark.
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.compute = compute
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.data.__set__:  # a new object each time
            raise WushError(READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:  # `.data`, which code may write to
            return cls(args[0].compute, args[0].shape, args[0].dtype, args[0].device)
        named = zip((a.name for a in func._schema.arguments), args)
        given = {**dict(named), **(kwargs or {})}
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(given.get(argument.name), cls):
                raise WushError(READ_ONLY)
        args, kwargs = pytree.tree_map_only(cls, lambda t: t.compute(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: int):
        return self.compute().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.compute().clone()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"


class WushLinear(nn.Linear):
    """A quantized linear layer: [.., in_features] -> [.., out_features], a row range of its `WushGroup`.

    An `nn.Linear` for code that looks for linears (peft, for one) or reads their `weight` and `bias`. Both are
    computed when read, are no parameters, and cannot be changed.
    """

    def __init__(self, group: WushGroup, member: Member, weight_dtype: torch.dtype):
        nn.Module.__init__(self)  # not nn.Linear's, which makes parameters
        self._group = [group]  # in a list: only the first member registers it
        if group.members[0] == member:
            self.group = group
        self.in_features = group.width
        self.out_features = member.stop - member.start
        self.start, self.stop, self.has_bias = member.start, member.stop, member.has_bias
        self.weight_dtype = weight_dtype

    @property
    def weight(self) -> Tensor:
        """`dequantize()` in the dtype of the linear that was quantized: [out_features, in_features]."""
        return self._computed(
            lambda: self.dequantize().to(self.weight_dtype), (self.out_features, self.in_features), self.weight_dtype
        )

    @property
    def bias(self) -> Tensor | None:
        """The linear's rows of its group's bias [out_features]; None without a bias."""
        if not self.has_bias:
            return None
        return self._computed(
            lambda: self.owner.bias[self.start : self.stop], (self.out_features,), self.owner.bias.dtype
        )

    def _computed(self, compute: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_dynamo_compiling():  # dead code in the graph, if only the dtype is read
            return compute()
        return ComputedTensor(compute, shape, dtype, self.owner.weight_packed.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self

    @property
    def owner(self) -> WushGroup:
        """The group that holds this linear's buffers."""
        return self._group[0]

    def forward(self, x: Tensor) -> Tensor:
        return self._group[0](x, self.start, self.stop)

    def dequantize(self) -> Tensor:
        """The effective weight in the original basis, fp32 [out_features, in_features]: Q(W T⁻¹) T."""
        group, rows = self.owner, slice(self.start, self.stop)
        g = group.factors_of(self.start, self.stop)
        w = dequantize(group.weight_packed[rows], group.weight_scale[rows], group.format, g)
        if group.input_transform is None:
            return w
        blocks = w.unflatten(-1, (-1, group.block_size))  # [N, K/B, B]
        t = group.input_transform.to(torch.float32)  # [K/B or 1, B, B]
        return torch.einsum("nkb,kbc->nkc", blocks, t.expand(blocks.shape[1], -1, -1)).flatten(-2)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}, "
            f"format={self.owner.format}"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside an `OptimizedModule`, a `DataParallel` or a `DistributedDataParallel`."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


class WushEmbedding(nn.Embedding):
    """An embedding that looks up the rows of a quantized linear, its tied head: [..] -> [.., embedding_dim].

    `weight` is the linear's: computed when it is read.
    """

    def __init__(self, linear: WushLinear, like: nn.Embedding):
        nn.Module.__init__(self)  # not nn.Embedding's, which makes parameters
        self._linear = [linear]  # in a list: the module tree has it in its own place
        self.num_embeddings, self.embedding_dim = linear.out_features, linear.in_features
        for name in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
            setattr(self, name, getattr(like, name))

    @property
    def weight(self) -> Tensor:
        """The rows in the dtype of the embedding before quantization: [num_embeddings, embedding_dim]."""
        return self._linear[0].weight

    def forward(self, input: Tensor) -> Tensor:
        linear = self._linear[0]
        return linear.owner(input, linear.start, linear.stop).to(input.device, linear.weight_dtype)


def named_groups(model: nn.Module) -> Iterator[tuple[str, WushGroup]]:
    """(path, group) of every group of a quantized model, in the order of the module tree."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, WushGroup))


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has any quantized linear."""
    return next(named_groups(model), None) is not None


def install_group(model: nn.Module, group: WushGroup) -> None:
    """Puts a group into the model, in place of the weights of the same names, which are freed.

    Embeddings that share the weight of a member then look up its rows.
    """
    group.install(model)
    for member in group.members:
        for name in member.embeddings:
            owner, _, leaf = name.rpartition(".")
            old = model.get_submodule(name)
            embedding = WushEmbedding(model.get_submodule(member.name), old)
            embedding.train(old.training)
            embedding._forward_hooks, embedding._forward_pre_hooks = old._forward_hooks, old._forward_pre_hooks
            embedding._forward_hooks_with_kwargs = old._forward_hooks_with_kwargs
            setattr(model.get_submodule(owner), leaf, embedding)
