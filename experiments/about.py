"""What a page of results states: the command, the machine, the versions and the commit."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path

import timm
import torch

ROOT = Path(__file__).resolve().parents[1]


def commit(root: Path = ROOT, *options: str) -> str:
    """Return the commit of a checkout, marked if it has changes; "unknown" outside of git."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", *options]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def about(device: torch.device | None = None) -> list[str]:
    """Return the lines with the command, the machine, the versions and the commit."""
    if device is not None and device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        able = torch.cpu.get_capabilities()
        units = ", ".join(u for u in ("avx2", "avx512_bf16", "amx_bf16") if able.get(u))
        machine = f"{platform.machine()} CPU ({units}), {torch.get_num_threads()} thread(s)"
    versions = f"torch {torch.__version__.split('+')[0]}, timm {timm.__version__}"
    return [
        "```",
        shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "```",
        "",
        f"{machine}; {versions}; commit {commit()}.",
    ]
