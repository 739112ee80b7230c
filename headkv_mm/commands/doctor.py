# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm doctor`: what is installed, what will run, and whether it works."""

from __future__ import annotations

import argparse
import json
from typing import Any

from headkv_mm.commands.compile_kernels import compile_cpu_kernels

HELP = "check the installation, and compile the CPU kernels"
EXAMPLE = "headkv-mm doctor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Print what was found; the exit status is 1 if something does not work."""
    findings = examine()
    if args.json:
        print(json.dumps(findings, indent=2))
    else:
        _print(findings)
    return 0 if findings["ok"] else 1


def examine() -> dict[str, Any]:
    """Versions, devices, kernels and the embedded model; "ok" says whether all of it works."""
    from headkv_mm.commands.versions import versions

    kernels, model = _kernels(), _embedded_model()
    return {
        "versions": versions(),
        "device": _device(),
        "kernels": kernels,
        "embedded_model": model,
        "ok": kernels["error"] is None and model["error"] is None,
    }


def _device() -> dict[str, Any]:
    """The accelerator that pipelines would use, and CPU threads."""
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {"name": name, "cuda": torch.cuda.is_available(), "threads": torch.get_num_threads()}


def _kernels() -> dict[str, Any]:
    """Which backend serves which device, after a test of each; compiles the CPU kernels on the way."""
    import torch

    from headkv_mm.kernels import dispatch

    found: dict[str, Any] = {"error": None}
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    try:
        for device in devices:
            found[device] = dispatch.backend_for(torch.zeros(1, device=device))
        found["seconds_to_compile"] = round(compile_cpu_kernels((torch.float32,)), 2)
        for device in devices:
            found[f"{device}_difference"] = _difference(device)
            if found[f"{device}_difference"] > 1e-3:
                found["error"] = (
                    f"the {found[device]} kernels differ from plain torch by {found[f'{device}_difference']:.1e}"
                )
    except Exception as error:
        found["error"] = _one_line(error)
    return found


def _difference(device: str) -> float:
    """Largest difference between attention by the device's kernel and by plain torch, on a small ragged store."""
    import torch

    from headkv_mm.kernels import dispatch, reference

    generator = torch.Generator().manual_seed(0)
    length = torch.tensor([[5, 9], [1, 12]], dtype=torch.int32)  # [B, G]
    start = torch.tensor([[0, 12], [24, 36]], dtype=torch.int32)
    query = torch.randn(2, 4, 16, generator=generator)  # [B, H, D]
    keys, values = torch.randn(2, 48, 16, generator=generator)  # [N, D] each
    arguments = [tensor.to(device) for tensor in (query, keys, values, start, length)]
    wanted = reference.ragged_decode(*arguments, scale=0.25)
    return float((dispatch.ragged_decode(*arguments, scale=0.25) - wanted).abs().max())


def _embedded_model() -> dict[str, Any]:
    """Whether the embedded text-to-image model is there and whole."""
    found: dict[str, Any] = {"path": None, "bytes": None, "parameters": None, "error": None}
    try:
        from headkv_mm.demo import image_model_path
        from headkv_mm.pipelines.loading import load_image_model

        folder = image_model_path()
        found["path"] = str(folder)
        found["bytes"] = sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors")
        found["parameters"] = sum(item.numel() for item in load_image_model(folder).parameters())
    except Exception as error:
        found["error"] = _one_line(error)
    return found


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _print(findings: dict[str, Any]) -> None:
    for name, version in findings["versions"].items():
        print(f"{name:<14} {version or 'not installed'}")
    device, kernels, model = findings["device"], findings["kernels"], findings["embedded_model"]
    print(f"{'device':<14} {device['name']}, {device['threads']} CPU threads")
    if kernels["error"] is None:
        served = ", ".join(f"{name}: {kernels[name]}" for name in ("cpu", "cuda") if name in kernels)
        print(f"{'kernels':<14} {served} (checked against plain torch; compiled in {kernels['seconds_to_compile']} s)")
    else:
        print(f"{'kernels':<14} BROKEN: {kernels['error']}")
    if model["error"] is None:
        print(f"{'image model':<14} {model['parameters']:,} parameters, {model['bytes']:,} bytes in {model['path']}")
    else:
        print(f"{'image model':<14} BROKEN: {model['error']}")
    print("everything works" if findings["ok"] else "something does not work: see above")
