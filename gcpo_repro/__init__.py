"""GCPO (Group Causal Policy Optimization, AAAI 2026): its causal analysis, its loss, and a trainer like TRL's.

Names are loaded when first used, so that `import gcpo_repro` costs milliseconds and no torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_HOME = {
    "GCPOConfig": "config",
    "GCPOTrainer": "trainer",
    "GVPOConfig": "baselines",
    "GVPOTrainer": "baselines",
    "LoraSettings": "qlora",
    "load_policy": "qlora",
    "gcpo_loss": "loss",
    "group_advantages": "loss",
    "k3": "loss",
    "projected_reference": "loss",
    "projected_target": "loss",
    "upsilon": "loss",
    "UserError": "errors",
}
__all__ = ["__version__", *_HOME]

try:
    __version__ = version("gcpo-repro")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gcpo_repro' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
