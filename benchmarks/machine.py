"""The machine that a benchmark ran on."""

import platform
import re
from pathlib import Path


def read_processor() -> str:
    """Return the processor's model."""
    path = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else []
    return models[0] if models else platform.processor() or platform.machine()
