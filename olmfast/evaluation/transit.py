"""Small tensors between main memory and a device, without waiting for the work that is queued there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def sent(values: Sequence[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Numbers, or a tensor in main memory, on the device for whatever is queued there from now on."""
    here = torch.as_tensor(values)
    if device.type != "cuda":
        return here.to(device)
    return here.pin_memory().to(device, non_blocking=True)


class Fetched:
    """Tensors of a device on their way to main memory, behind what is queued now."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._here = list(tensors)
        if tensors and tensors[0].device.type == "cuda":
            self._here = [torch.empty_like(x, device="cpu", pin_memory=True) for x in tensors]
            for here, there in zip(self._here, tensors, strict=True):
                here.copy_(there, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[torch.Tensor]:
        """The tensors, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here
