"""Other libraries' cross entropy on CUDA, with an adapter for each. They are timed if they are installed.

cut-cross-entropy is not included. It takes the hidden states and the last layer's weight, so most of its time is a
matrix product, which no other contender computes.
"""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

from .losses import Loss


@dataclass(frozen=True)
class Peer:
    """A peer's mean over class indices, without options."""

    package: str
    module: str
    loss: Callable[[ModuleType], Loss]
    overwrites: bool  # the forward pass writes the gradient over the logits

    def load(self) -> Loss:
        return self.loss(importlib.import_module(self.module))


PEERS: dict[str, Peer] = {
    "liger": Peer(
        "liger-kernel",
        "liger_kernel.transformers.cross_entropy",
        lambda m: m.LigerCrossEntropyLoss(),
        overwrites=True,
    ),
    "quack": Peer(
        "quack-kernels",
        "quack.cross_entropy",
        lambda m: lambda logits, target: m.cross_entropy(logits, target, reduction="mean"),
        overwrites=False,
    ),
}


def versions() -> dict[str, str]:
    """The versions of the peers that are installed."""
    found = {}
    for name, peer in PEERS.items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(peer.package)
    return found


def missing() -> dict[str, str]:
    """The peers that cannot be loaded here, and why."""
    reasons = {}
    for name, peer in PEERS.items():
        try:
            peer.load()
        except Exception as error:  # a package may raise anything if its own requirements are missing
            reasons[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return reasons
