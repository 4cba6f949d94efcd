"""Whether half precision pays on a machine: measured, never assumed."""

from __future__ import annotations

import time

import torch


def faster_in_bf16(device: torch.device, tokens: int = 1024, tries: int = 5) -> bool:
    """Whether products of `tokens` rows with a small language model's weights are clearly faster in bf16 here."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(tokens, 576, dtype=dtype, device=device), torch.ones(1536, 576, dtype=dtype, device=device)
        times = []
        for _ in range(tries):
            start = time.perf_counter()
            float((a @ b.T)[0, 0])
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) * 1.2 < seconds(torch.float32)
