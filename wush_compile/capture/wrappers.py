"""Takes off what others put around a model: `torch.compile`, data parallelism, the offload hooks of accelerate."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..modules import unwrapped as unwrapped


def _hooks(module: nn.Module) -> Iterator[object]:
    """Yields the hooks of accelerate on one module, which holds them as `_hf_hook`."""
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def offloaded_tensors(model: nn.Module) -> dict[str, tuple[Mapping[str, Tensor], str]]:
    """Returns, by name, where the hooks of accelerate hold the values of tensors on the meta device: (map, key)."""
    found: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for path, module in model.named_modules():
        for hook in _hooks(module):
            values = getattr(hook, "weights_map", None)
            if values is None or not getattr(hook, "offload", False):
                continue
            recurse = getattr(hook, "place_submodules", False)
            for named in (module.named_parameters, module.named_buffers):
                for key, tensor in named(recurse=recurse, remove_duplicate=False):
                    if tensor.is_meta:
                        found[f"{path}.{key}" if path else key] = values, key
    return found


def execution_device(model: nn.Module) -> torch.device:
    """Returns the device to which the hooks of an offloaded model bring its weights; the CPU if no hook says."""
    devices = (getattr(hook, "execution_device", None) for module in model.modules() for hook in _hooks(module))
    device = next((d for d in devices if d is not None), "cpu")
    return torch.empty(0, device=device).device


def without_hooks(model: nn.Module) -> nn.Module:
    """Removes the hooks of accelerate from a copy of a model, which `meta_copy` has made."""
    for module in model.modules():
        own = vars(module)
        if "_old_forward" in own:
            forward = own.pop("_old_forward")
            del own["forward"]
            if getattr(forward, "__func__", None) is not type(module).forward:
                module.forward = forward
        own.pop("_hf_hook", None)
    return model
