"""What runs where: device, versions, providers, what is native and what emulated, and a short self-test of each op."""

import importlib.metadata
import time

import torch

from .. import formats, ops
from ..formats import FORMATS
from . import PROVIDERS, forced, resolve

VERSIONS = ("torch", "triton", "transformers", "wush-compile")
# Rows that reach every kind of kernel.
ROWS = (1, 5, 64, 300)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def arithmetic(format: str, capability: tuple[int, int] | None) -> str:
    """How a device multiplies two tensors of this format, in words."""
    if format == "int4" or capability is None:
        return "reference: fp32 products of decoded values"
    if capability >= (10, 0):
        return "native FP4 tensor cores"
    if capability >= (9, 0) and format == "mxfp4":
        return "emulated, exact: integer dot products up to 4 rows, FP8 tensor cores above"
    return "emulated, exact: integer dot products up to 4 rows, BF16 tensor cores above"


def self_test(device: torch.device) -> list[dict]:
    """One entry a format and op: `ok`, `error` (relative, of products; share of bytes, of the quantizer), `seconds`."""
    results = []
    generator = torch.Generator().manual_seed(0)
    for format, fmt in FORMATS.items():
        group, k, n = fmt.group_size, 512, 256
        x = torch.randint(-24, 25, (37, k), generator=generator).to(device, torch.bfloat16)
        t = torch.randint(-3, 4, (k // group, group, group), generator=generator).to(device, torch.bfloat16)
        for rule in fmt.scale_rules:
            start = time.perf_counter()
            got = torch.ops.wush.transform_quantize(x, t, None, format, rule)
            want = ops.REFERENCE["transform_quantize"](x, t, None, format, rule)
            wrong = max((a != b).float().mean().item() for a, b in zip(got, want, strict=True))
            results.append({"op": "transform_quantize", "format": format, "case": rule, "ok": wrong == 0,
                            "error": wrong, "seconds": time.perf_counter() - start})
        w = formats.quantize(torch.randn(n, k, generator=generator).to(device), format, "absmax")
        wide = formats.dequantize(*w, format).double()
        for rows in ROWS:
            start = time.perf_counter()
            q = formats.quantize(torch.randn(rows, k, generator=generator).to(device), format, "absmax")
            got = torch.ops.wush.fp4_linear(*q, None, *w, None, None, None, format, torch.bfloat16)
            want = formats.dequantize(*q, format).double() @ wide.T
            error = ((got.double() - want).norm() / want.norm()).item()
            results.append({"op": "fp4_linear", "format": format, "case": f"{rows} rows", "ok": error < 3e-3,
                            "error": error, "seconds": time.perf_counter() - start})
    return results


def examine(device: torch.device | str | None = None) -> dict:
    """Everything the report has: `device`, `capability`, `versions`, `forced`, `providers` (name -> used or why not),
    `ops` (op -> names in the order in which they are asked), `arithmetic` (format -> words), `self_test`. Default: the
    current GPU, else the CPU."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    capability, providers, table = None, {}, {}
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        capability = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        table = {op: [provider for provider, _ in entries] for op, entries in resolve(index).items()}
        providers = {p.name: p.unavailable(capability) or "used" for p in PROVIDERS}
    else:
        name = device.type
        providers = {p.name: f"does not run on {device.type}" for p in PROVIDERS}
    return {
        "device": name,
        "capability": capability,
        "versions": {package: _version(package) for package in VERSIONS} | {"cuda": torch.version.cuda},
        "forced": forced(),
        "providers": providers | {"reference": "always"},
        "ops": {op: [*table.get(op, []), "reference"] for op in ops.REFERENCE},
        "arithmetic": {format: arithmetic(format, capability) for format in FORMATS},
        "self_test": self_test(device),
    }
