"""Whether a device supports bf16 natively."""

from __future__ import annotations

import torch


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 natively; CPUs that emulate it take ten times as long as with fp32."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE"))
