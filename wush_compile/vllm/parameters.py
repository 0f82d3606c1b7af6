"""Where a tensor on disk goes in a linear of vLLM's model, on each rank of a tensor-parallel group.

A linear of vLLM holds one linear on disk, or several (qkv_proj: q_proj, k_proj, v_proj), or a rank's share of them.
vLLM tells a parameter which of them a tensor belongs to (`shard_id`) and which rows it has there. Here the linears may
be parts of several groups, with buffers of their own.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from ..errors import CheckpointError


def check_cut(prefix: str, step: int, width: int, whole: int) -> None:
    """Raises `CheckpointError` unless a rank's `width` of `whole` input channels is a multiple of `step`.

    That is the transform's block, or the format's group if it is larger.
    """
    if width % step == 0:
        return
    ranks = whole // width
    fits = next(n for n in range(ranks - 1, 0, -1) if whole % n == 0 and whole // n % step == 0)
    raise CheckpointError(
        f"{prefix}: tensor parallelism cuts its {whole} input channels into {width}, which is no multiple of the "
        f"transform's block of {step}: use tensor_parallel_size={fits}"
    )


class _Stacked:
    """Rows of some members of a linear, stacked.

    starts   number of a member in the linear -> its first row here; None if all members are here
    """

    def __init__(self, *, starts: dict[int, int] | None, **kwargs):
        super().__init__(**kwargs)
        self.starts = starts

    def _here(self, kwargs: dict) -> dict:
        if self.starts is None:
            return kwargs
        return kwargs | {"shard_offset": self.starts[self._shard_id_as_int(kwargs["shard_id"])]}

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs) -> None:
        super().load_merged_column_weight(loaded_weight, **self._here(kwargs))

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs) -> None:
        super().load_qkv_weight(loaded_weight, **self._here(kwargs))


class Rows(_Stacked, ModelWeightParameter):
    """Rows [N, ..] of some members of a linear. Column-parallel ranks cut N, row-parallel ranks the width."""


class Factors(_Stacked, ChannelQuantScaleParameter):
    """Factors [N] of the rows of some members of a linear. Column-parallel ranks cut N, row-parallel ranks hold all."""


class GlobalScales(PerTensorScaleParameter):
    """The global scales [members] of a group's rows: each member on disk has a copy.

    members   numbers of the members in the linear
    """

    def __init__(self, *, members: list[int], **kwargs):
        super().__init__(**kwargs)
        self.members = members

    def _load_into_shard_id(self, loaded_weight: Tensor, shard_id: str | int, **kwargs) -> None:
        self.data[self.members.index(self._shard_id_as_int(shard_id))].copy_(loaded_weight.reshape(()))


def load_whole(rank: int) -> Callable[..., None]:
    """The loader of a transform [K/B or 1, B, B], feedback [K/G, 6, G/4] or scale [1] of an input. Its dtype becomes
    that on disk.

    A parameter with fewer blocks than the tensor on disk is that of a row-parallel linear, and takes the rank's blocks.
    """

    def load(param: BasevLLMParameter, loaded_weight: Tensor, *shard_id) -> None:
        if param.dtype != loaded_weight.dtype:
            param.data = param.data.to(loaded_weight.dtype)
        count = param.shape[0]
        start = rank * count if loaded_weight.shape[0] != count else 0
        param.data.copy_(loaded_weight[start : start + count])

    return load


def replace(name: str, old: Tensor, new: Tensor) -> None:
    """Copies a tensor that was loaded again to the memory of the first one, which captured CUDA graphs read."""
    if old.shape != new.shape or old.dtype != new.dtype:
        raise CheckpointError(
            f"{name} is {new.dtype} {list(new.shape)}, and vLLM runs with {old.dtype} {list(old.shape)}: weights can "
            "be loaded again from a checkpoint with the same settings; start vLLM anew for another"
        )
    old.copy_(new)


def forwarded(target: Callable[[int], tuple[BasevLLMParameter, Callable[..., None]]]) -> BasevLLMParameter:
    """An empty parameter that hands each tensor on. `target(member)` gives the parameter and its loader."""

    def load(param: BasevLLMParameter, loaded_weight: Tensor, shard_id: str | int = 0) -> None:
        inner, loader = target(param._shard_id_as_int(shard_id))
        loader(inner, loaded_weight, shard_id)

    return BasevLLMParameter(data=torch.empty(0), weight_loader=load)
