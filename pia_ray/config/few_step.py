"""Few-step models: the steps, guidance and scheduler with which the authors of each kind run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

FewStep = Literal[
    "hyper-1",
    "hyper-2",
    "hyper-4",
    "hyper-8",
    "hyper-8-cfg",
    "hyper-12-cfg",
    "lcm-4",
    "lcm-8",
    "tcd-4",
    "tcd-8",
    "lightning-2",
    "lightning-4",
    "lightning-8",
]


def _run_with(scheduler: str, steps: int, *, guidance: float = 1.0, eta: float = 0.0) -> Mapping[str, Any]:
    return {"scheduler": scheduler, "num_inference_steps": steps, "guidance_scale": guidance, "eta": eta}


FEW_STEP: Final[Mapping[FewStep, Mapping[str, Any]]] = {
    "hyper-1": _run_with("tcd", 1, eta=1.0),
    "hyper-2": _run_with("ddim-trailing", 2),
    "hyper-4": _run_with("ddim-trailing", 4),
    "hyper-8": _run_with("ddim-trailing", 8),
    "hyper-8-cfg": _run_with("ddim-trailing", 8, guidance=5.0),
    "hyper-12-cfg": _run_with("ddim-trailing", 12, guidance=5.0),
    "lcm-4": _run_with("lcm", 4),
    "lcm-8": _run_with("lcm", 8),
    "tcd-4": _run_with("tcd", 4, eta=0.3),
    "tcd-8": _run_with("tcd", 8, eta=0.3),
    "lightning-2": _run_with("euler-trailing", 2),
    "lightning-4": _run_with("euler-trailing", 4),
    "lightning-8": _run_with("euler-trailing", 8),
}
"""Values of knobs by kind. Guidance 1 is none, which the model cards write as 0.

Source: Hyper-SD, arXiv 2404.13686; LCM-LoRA, arXiv 2311.05556; TCD, arXiv 2402.19159; Lightning, arXiv 2402.13929 and
2403.12706; and their model cards.
"""
