"""`gcpo-repro train --dry-run`: what a training would do and need, and whether this machine holds it, before any download."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from .architecture import Architecture, architecture, stored_bytes
from .errors import UserError
from .memory import ADAM_BYTES, FLOAT_BYTES, Estimate, Load, estimate, load
from .settings import Settings

# Tokens of the longest prompt, template included: bounds by eye, since the data are not read. "toy" is exact.
PROMPT_TOKENS = {
    "toy": 16, "gsm8k": 320, "math": 512, "aime-1983-2023": 512, "aime-1989-2023": 512, "numinamath": 768,
}  # fmt: skip
UNKNOWN_PROMPT = 512
PROFILES = {"gpu80": 79e9, "gpu24": 23.5e9, "t4": 15.5e9}  # bytes of the device that each is made for
KEPT_CHECKPOINTS = 2
STORED_BYTES = 2  # of a parameter on the Hub, where most models are bfloat16


@dataclass(frozen=True)
class Machine:
    """Where a training is to run: "cuda" or "cpu", its memory and what is free, in bytes; `real`: not merely thought of."""

    kind: str
    name: str
    total: float
    free: float
    real: bool = True


@dataclass(frozen=True)
class Plan:
    """What `text` shows of a training, and why it cannot run ("" if it can)."""

    settings: Settings
    shape: Architecture
    work: Load
    memory: Estimate
    machine: Machine
    processes: int
    precision: str
    download: float
    results: float
    problem: str

    def refuse(self) -> None:
        """Raise UserError if the machine cannot hold it."""
        if self.problem:
            raise UserError(self.problem)


def this_machine(settings: Settings) -> Machine:
    """The CUDA device or the CPU that `settings.device` names; on a CPU with the container's limit, where there is one."""
    import psutil
    import torch

    from .qlora import choose_device

    device = choose_device(settings.device, settings.quantization)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Machine("cuda", torch.cuda.get_device_name(device), total, free)
    memory = psutil.virtual_memory()
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if 0 < limit < memory.total:
        return Machine("cpu", "CPU, in a container", limit, min(memory.available, limit - used))
    return Machine("cpu", "CPU", memory.total, memory.available)


def _number(path: str) -> float:
    try:
        return float(Path(path).read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return 0.0


def make_plan(
    settings: Settings, out: Path, processes: int = 1, device_gb: float | None = None, sharded: bool = True
) -> Plan:  # fmt: skip
    """The plan of a training.

    Args:
        settings: of all its arms.
        out: folder of the results, for the disk.
        processes: that will train together.
        device_gb: plan for a CUDA device of so many GB instead of for this machine.
        sharded: whether several processes divide a model that is trained whole (FSDP, ZeRO-3).

    Raises UserError: a model whose sizes cannot be known.
    """
    from .qlora import choose_precision

    machine = (
        Machine("cuda", f"a CUDA device of {device_gb:g} GB", device_gb * 1e9, device_gb * 1e9, False) if device_gb else None
    )
    machine = machine or this_machine(settings)
    cuda, adapters = machine.kind == "cuda", settings.lora_rank > 0
    shape = architecture(settings.model, settings.model_revision or None)
    if cuda and not machine.real and settings.dtype == "auto":
        weights, compute, precision = (2 if adapters else 4), 2, "precision: bfloat16 where the device has it, else float16"
    else:
        chosen = choose_precision(settings.dtype, settings.device if settings.device != "auto" else machine.kind, adapters)
        weights, compute, precision = chosen.weights.itemsize, chosen.compute.itemsize, str(chosen)
    prompt = PROMPT_TOKENS.get(settings.data, UNKNOWN_PROMPT)
    shards = processes if sharded and not adapters else 1
    memory = estimate(settings, shape, prompt, cuda, weights, compute, processes, shards)
    if settings.use_vllm and settings.vllm_mode == "colocate":
        memory = replace(memory, stays=memory.stays | {"vLLM": settings.vllm_gpu_memory_utilization * machine.total})
    held = stored_bytes(settings.model)
    trained = settings.lora_rank * shape.lora_per_rank or shape.parameters
    arms = len(settings.methods) * len(settings.seeds)
    results = arms * trained * (FLOAT_BYTES + KEPT_CHECKPOINTS * (FLOAT_BYTES + ADAM_BYTES))
    plan = Plan(
        settings, shape, load(settings, prompt, processes), memory, machine, processes, precision,
        0.0 if held else float(STORED_BYTES * shape.parameters), float(results), "",
    )  # fmt: skip
    return replace(plan, problem=_problem(plan, out))


def at_once(settings: Settings) -> int:
    """Arms that are in memory together."""
    return min(settings.workers, len(settings.methods) * len(settings.seeds))


def _problem(plan: Plan, out: Path) -> str:
    needed, machine = plan.memory.total * at_once(plan.settings), plan.machine
    if plan.settings.lora_rank == 0 and plan.settings.quantization != "none":
        frozen = plan.settings.quantization
        return f"lora_rank: 0 trains every weight, which quantization = {frozen!r} freezes; set quantization=none"
    if needed > machine.free:
        arms = f" for {at_once(plan.settings)} arms at a time (workers)" if at_once(plan.settings) > 1 else ""
        return (
            f"memory: about {needed / 1e9:.1f} GB are needed{arms}, and {machine.name} has {machine.free / 1e9:.1f} GB free; "
            f"{fitting_profile(machine)} fits (notebooks/profiles/), or lower device_batch_size, max_completion_length or "
            "group_size, or set gradient_checkpointing=true"
        )
    if not machine.real:
        return ""
    for what, size, folder in (("download", plan.download, _hub_cache()), ("results", plan.results, out)):
        free = shutil.disk_usage(_existing(folder)).free
        if size > free:
            return f"disk: the {what} take about {size / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free; make room"
    return ""


def fitting_profile(machine: Machine) -> str:
    """The largest profile made for such a machine."""
    fits = [name for name, size in PROFILES.items() if machine.kind == "cuda" and size <= machine.total]
    return f"profile {fits[0] if fits else 'cpu'}"


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def text(plan: Plan) -> str:
    """The plan for a reader, a line for each subject."""
    s, shape, work, machine = plan.settings, plan.shape, plan.work, plan.machine
    trained = s.lora_rank * shape.lora_per_rank or shape.parameters
    how = f"LoRA of rank {s.lora_rank}: {_count(trained)} trained" if s.lora_rank else "all of them trained"
    local = s.batch_size // plan.processes
    across = f", on each of {plan.processes} processes" if plan.processes > 1 else ""
    questions, tested = s.train_questions or "all", s.eval_data or "others of the same"
    lines = {
        "model": f"{s.model}: {_count(shape.parameters)} parameters ({shape.source}); {s.quantization}; {how}",
        "precision": plan.precision.removeprefix("precision: "),
        "data": f"{s.data}, {questions} questions; evaluated on {s.eval_questions} of {tested}, {s.eval_samples} answers to each",
        "arms": f"{', '.join(s.methods)} x seeds {', '.join(map(str, s.seeds))}; {at_once(s)} at a time; {s.steps} steps each",
        "step": f"{s.batch_size} answers = {s.batch_size // s.group_size} questions x {s.group_size}; {s.device_batch_size} in a "
        f"forward pass{across}, accumulated x {local // s.device_batch_size}",
        "tokens": _tokens(s, work),
        "memory": _memory(plan),
        "disk": f"{plan.download / 1e9:.2f} GB of weights to download; checkpoints and results up to {plan.results / 1e9:.2f} GB",
        "machine": f"{machine.name}: {machine.free / 1e9:.1f} GB free of {machine.total / 1e9:.1f} GB",
    }
    if machine.kind == "cpu" and shape.parameters > 1e8:
        lines["note"] = "on a CPU, a model of this size takes minutes to hours for a step"
    return "\n".join(f"{name:10} {line}" for name, line in lines.items())


def _tokens(s: Settings, work: Load) -> str:
    """At most, per step and over all processes."""
    groups, rows = s.batch_size // work.group, s.batch_size
    said = [f"a step writes at most {_count(rows * work.answer)} (answers)"]
    if work.contexts:
        said.append(f"{_count(groups * work.contexts * (s.integrated_max_tokens or work.answer))} (integrated outputs)")
    if work.rollouts:
        said.append(f"{_count(rows * work.contexts * work.rollouts * work.answer)} (rollouts)")
    trained = rows * (work.prompt + work.answer)
    read = rows * (work.collider + work.contexts * (work.ending + work.answer)) if work.contexts else 0
    return f"{', '.join(said)}; trains on {_count(trained)}, reads {_count(read)} in contexts; prompts of {work.prompt} assumed"


def _memory(plan: Plan) -> str:
    parts = [f"{name} {size / 1e9:.2f}" for name, size in plan.memory.stays.items() if size]
    phases = [f"{name} {size / 1e9:.2f}" for name, size in plan.memory.phases.items() if size]
    whole = f"about {plan.memory.total / 1e9:.1f} GB for an arm{' on each device' if plan.processes > 1 else ''}"
    return f"{whole}, in GB\n{'':10} = {' + '.join(parts)}\n{'':10} + the largest of {', '.join(phases)}"


def _count(number: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if number >= size:
            return f"{number / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{number:,.0f}"
