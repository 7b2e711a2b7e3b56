"""How much memory there is, and how much a call takes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from stabie_ase.system.allocator import return_freed_memory


def free_bytes(device: torch.device) -> float | None:
    """What is left of the device's memory, or of this process's share of the machine's; None where nobody tells."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    amounts = [amount for amount in (_free_of_machine(), _free_of_group()) if amount is not None]
    return min(amounts, default=None)


def taken_bytes(function: Callable[[], object], device: torch.device) -> float | None:
    """The most that a call holds beyond what was held before it; None where that cannot be measured.

    On a CPU it is the growth of the resident memory.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    return_freed_memory()  # what an earlier call has left would not be seen to grow
    measurable = _forget_peak()
    before = _status("VmRSS") if measurable else None
    function()
    after = _status("VmHWM") if measurable else None
    return None if before is None or after is None else max(after - before, 0)


def most_used_bytes(device: torch.device) -> float | None:
    """Largest amount in use so far: of the device, or of the process on a CPU; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out; on a CPU torch says so in words only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _free_of_machine() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _free_of_group(folder: Path = Path("/sys/fs/cgroup")) -> float | None:
    """What the limit of a container (cgroup 2) leaves; files it keeps in memory can be dropped and do not count."""
    try:
        limit, used = float((folder / "memory.max").read_text()), float((folder / "memory.current").read_text())
        kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # none, or "max"
        return None
    return limit - used + float(kept.get("inactive_file", 0))


def _forget_peak() -> bool:
    """Let the kernel count the peak of the resident memory from here on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> float | None:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith(name + ":")), None)
