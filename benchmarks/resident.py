"""Memory of this process, as Linux counts it in /proc. For the benchmarks that compare it."""

from pathlib import Path


def resident(name: str) -> int:
    """Bytes: VmRSS is what is resident now, VmHWM the most since `forget_peak`, RssAnon its own, RssFile of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    """VmHWM starts anew."""
    Path("/proc/self/clear_refs").write_text("5")
