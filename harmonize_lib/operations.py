"""Floating-point operations, counted: what a computation costs on whatever machine."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Operations(TorchDispatchMode):
    """Within this context the operations of convolutions, linear layers and attention are counted, backward too.

    PyTorch's counts, without the hooks of its own counter, which allow no second derivative of an input and which
    contextual decomposition has no rule for.

    Attributes
    ----------
    total : int
        Counted so far; a multiplication and an addition are two.
    """

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operation and count it."""
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result
