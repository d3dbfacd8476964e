"""vLLM as the generator of training, through TRL: which settings pass through, which combinations are refused. Untested: no
machine of ours has had a GPU and vLLM."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .settings import Settings

MODES = ("colocate", "server")
PASSED = (
    "vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_max_model_length",
)  # fmt: skip


def check(settings: Settings, defaults: dict[str, Any]) -> None:
    """Raise UserError for settings that contradict each other.

    Args:
        settings: of the training.
        defaults: of its fields; a vLLM setting that differs from its own means something only with use_vllm.
    """
    s = settings
    if s.vllm_mode not in MODES:
        raise UserError(f"vllm_mode: {s.vllm_mode!r} is unknown, choose from {', '.join(MODES)}")
    if not s.use_vllm:
        for name in PASSED:
            if getattr(s, name) != defaults[name]:
                raise UserError(f"{name}: {getattr(s, name)!r} has no effect without use_vllm; set use_vllm=true or leave it out")
        return
    if s.quantization != "none":
        raise UserError(
            f"use_vllm: not with quantization = {s.quantization!r}: TRL would merge the adapters into rounded weights for vLLM, "
            "which then samples from another policy than the trained one (trl#3466); set quantization=none"
        )
    if s.device.startswith(("cpu", "mps")):
        raise UserError(f"use_vllm: not with device = {s.device!r}; vLLM needs CUDA, set device=auto")
    if s.vllm_mode == "server" and not s.vllm_server_base_url:
        raise UserError(
            f"vllm_server_base_url: '' with vllm_mode = 'server'; start `vllm serve {s.model}` and give its address, such as "
            "http://localhost:8000"
        )
    if s.vllm_mode == "colocate" and s.vllm_server_base_url:
        raise UserError(
            f"vllm_server_base_url: {s.vllm_server_base_url!r} with vllm_mode = 'colocate', which has no server; set "
            "vllm_mode=server"
        )
    for name in ("vllm_tensor_parallel_size", "vllm_gpu_memory_utilization"):
        if s.vllm_mode == "server" and getattr(s, name) != defaults[name]:
            raise UserError(f"{name}: {getattr(s, name)} with vllm_mode = 'server'; give it to `vllm serve` instead")
    if not 0 < s.vllm_gpu_memory_utilization < 1:
        raise UserError(f"vllm_gpu_memory_utilization: {s.vllm_gpu_memory_utilization} must lie between 0 and 1")


def require(settings: Settings) -> None:
    """Raise UserError where use_vllm cannot work on this machine, before a model is loaded."""
    if not settings.use_vllm:
        return
    if find_spec("vllm") is None:
        raise UserError('use_vllm: vLLM is not installed; `pip install "gcpo-repro[vllm]"`, or set use_vllm=false')
    import torch

    if not torch.cuda.is_available():
        raise UserError("use_vllm: vLLM needs a CUDA device, and torch sees none; set use_vllm=false")


def options(settings: Settings) -> dict[str, Any]:
    """The trainer's options, in TRL's own names; empty without use_vllm."""
    if not settings.use_vllm:
        return {}
    given = {name: getattr(settings, name) or None for name in PASSED}
    return {"use_vllm": True, **given}
