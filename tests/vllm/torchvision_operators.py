"""Declares two operators in an installed torchvision that was built for CUDA, so that it imports beside a CPU's torch.

    .venv-vllm/bin/python tests/vllm/torchvision_operators.py

LLaVA and Qwen3-VL in vLLM import transformers' image processors, which import torchvision. Its registry build has a
library that needs CUDA's; without this library its import fails at `torchvision::nms`. Nothing calls the operators.
A torchvision whose library loads is left as it is.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

DECLARED = """

if not _has_ops():  # declared by tests/vllm/torchvision_operators.py
    _declared = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).with_name("extension.py")
    text = file.read_text()
    if DECLARED not in text:
        file.write_text(text + DECLARED)


if __name__ == "__main__":
    main()
