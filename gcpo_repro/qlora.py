"""QLoRA: loading a policy with quantised weights and trainable low-rank adapters, on a CPU or on CUDA alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from .architecture import refuse_what_is_neither_folder_nor_id
from .errors import UserError

QUANTIZATIONS = ("nf4", "int8", "none")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters. The paper fine-tunes fully; these are QLoRA's usual choices (arXiv 2305.14314, §4, app. B).

    Args:
        r: rank of the update.
        alpha: its scale is alpha / r.
        dropout: 0 by default: Eq. 13 compares log-probabilities, and dropout would be noise in the ratio of Eq. 9.
        target_modules: which linear layers; "all-linear" is every one but the head, as QLoRA recommends.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"

    def peft_config(self) -> LoraConfig:
        """The same as a `peft.LoraConfig`. Raises UserError for a rank below 1 or a dropout outside [0, 1)."""
        if self.r < 1 or not 0 <= self.dropout < 1:
            raise UserError(f"lora: r = {self.r} must be at least 1 and dropout = {self.dropout} in [0, 1)")
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets, task_type="CAUSAL_LM"
        )


def hardware_has_bf16() -> bool:
    """True only for CUDA hardware with bf16 units; a T4 emulates them, and torch's plain question says yes to that."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class Precision:
    """The number formats of a training, and why these: `weights` as they are stored, `compute` what layers work in."""

    weights: torch.dtype
    compute: torch.dtype
    reason: str

    def __str__(self) -> str:
        kinds = [str(kind).removeprefix("torch.") for kind in (self.weights, self.compute)]
        scaled = ", with loss scaling" if self.compute == torch.float16 else ""
        return f"precision: {kinds[0]} weights, computed in {kinds[1]}{scaled}: {self.reason}"


def choose_precision(dtype: str = "auto", device: torch.device | str = "cpu", adapters: bool = True) -> Precision:
    """The formats of a training; adapters, and whatever else is trained, are float32 in each of them.

    Args:
        dtype: "float32", "bfloat16", "float16" for the layers' work, or "auto": bfloat16 where a CUDA device has units
            for it, float16 on other CUDA devices (a T4 only emulates bfloat16), float32 elsewhere.
        device: where the policy is.
        adapters: whether adapters are trained. Then the frozen weights are stored in what layers work in; without them all
            weights are trained, and stay in float32: at the paper's learning rate of 1e-6 a bfloat16 weight would not move.

    Raises UserError: an unknown dtype, or float16 on a CPU, which has no loss scaling there.
    """
    kind = torch.device(device).type
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        if kind != "cuda":
            compute, reason = torch.float32, f"what a {kind.upper()} computes fast and exactly"
        elif hardware_has_bf16():
            compute, reason = torch.bfloat16, "this CUDA device has units for it"
        else:
            compute, reason = torch.float16, "this CUDA device has none for bfloat16"
    elif dtype not in known:
        raise UserError(f"dtype: {dtype!r} is unknown, choose 'auto' or one of {', '.join(known)}")
    else:
        compute, reason = known[dtype], "as asked for"
    if compute == torch.float16 and kind != "cuda":
        raise UserError(f"dtype: 'float16' needs loss scaling, which works on CUDA alone, not on a {kind.upper()}; use 'auto'")
    if not adapters and compute != torch.float32:
        return Precision(torch.float32, compute, f"{reason}; all weights are trained, and small updates need float32")
    return Precision(compute, compute, reason)


def load_policy(
    model_name_or_path: str | Path,
    quantization: str = "nf4",
    lora: LoraSettings | None = LoraSettings(),  # noqa: B008 (frozen)
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    local_only: bool = False,
) -> tuple[nn.Module, Any, LoraConfig | None]:
    """Load a causal language model and its tokenizer for training.

    Args:
        model_name_or_path: a Hub id or a local folder.
        quantization: "nf4" (4 bits, double quantisation), "int8", or "none".
        lora: adapters to train on top; None trains every weight, which only "none" allows.
        dtype: "float32", "bfloat16", "float16" or "auto", see `choose_precision`. Quantised layers compute in it, the
            others are kept in it.
        device: "cpu", "cuda", "cuda:1" …, or "auto": CUDA if there is one, else the CPU.
        revision: Hub revision; None is the newest.
        local_only: never ask the Hub: a local folder, or what is in its cache.

    Returns:
        model, tokenizer (pads on the left), and the adapters' configuration for the trainer's `peft_config`.

    Raises:
        UserError: an unknown value, a model that is missing or corrupt, quantised weights without adapters.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(f"quantization: {quantization!r} is unknown, choose one of {', '.join(QUANTIZATIONS)}")
    if lora is None and quantization != "none":
        raise UserError(
            f"lora: None with quantization={quantization!r} leaves nothing to train (quantised weights are frozen); "
            "pass LoraSettings(), or quantization='none'"
        )
    target = choose_device(device, quantization)
    precision = choose_precision(dtype, target, lora is not None)
    peft_config = lora.peft_config() if lora is not None else None
    source = str(model_name_or_path)
    refuse_what_is_neither_folder_nor_id(source)
    options: dict[str, Any] = {"local_files_only": local_only, **({"revision": revision} if revision else {})}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **options)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=precision.weights, quantization_config=_bitsandbytes(quantization, precision.compute),
            device_map={"": target}, **options,
        )  # fmt: skip
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # every kind: OSError, ValueError, SafetensorError, JSON and Hub errors …
        raise UserError(f"model: {source!r} could not be loaded ({_first_line(error)}); {_remedy(source)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    prepare_quantized(model, adapters=False)
    print(f"{_summary(model, config, peft_config, quantization, target)}\n{precision}", flush=True)
    return model, tokenizer, peft_config


def prepare_quantized(model: Any, adapters: bool = True) -> None:
    """Make a quantised model trainable for what it seems to be; does nothing to others. Safe to call again.

    * bitsandbytes repacks 4-bit weights for AVX512-BF16 processors at the first forward pass in evaluation mode, for
      good, and the packed form has no backward pass: layers without a bias lose their gradient in silence. Switched off.
    * TRL casts the adapters to bfloat16; at the paper's learning rate of 1e-6 updates then round to nothing. Their
      trainable weights go back to float32.

    Args:
        model: quantised or not, with or without adapters.
        adapters: whether trainable adapters must be there by now.

    Raises:
        UserError: a quantised model without trainable adapters: it would train nothing.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if not adapters:
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise UserError(
            "peft_config: the model is quantised and has no trainable adapter, so nothing would be trained; "
            "pass peft_config=LoraConfig(...), or make the loaded adapter trainable (is_trainable=True)"
        )
    for parameter in trainable:
        parameter.data = parameter.data.float()


def choose_device(device: str = "auto", quantization: str = "none") -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU, which also stands in for MPS: bitsandbytes
    does not train there. Says so. Raises UserError: no device, or CUDA where there is none."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        if torch.backends.mps.is_available():
            print("device: MPS is there, but untested with this package; using the CPU (device='mps' tries it)", flush=True)
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device: {device!r} is not a device; use 'auto', 'cpu' or 'cuda'") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {device!r} asked for, but torch sees no CUDA device; use 'auto' or 'cpu'")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device: {device!r} asked for, but torch sees no MPS device; use 'auto' or 'cpu'")
    if chosen.type == "mps" and quantization != "none":
        print(f"device: bitsandbytes does not train {quantization} weights on MPS; using the CPU", flush=True)
        return torch.device("cpu")
    return chosen


def _bitsandbytes(quantization: str, compute: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "int8" else None


def _summary(model: Any, config: Any, peft_config: LoraConfig | None, quantization: str, device: torch.device) -> str:
    with torch.device("meta"):  # the architecture alone: counts weights without their values or their packing
        shape: Any = AutoModelForCausalLM.from_config(config)
        if peft_config is not None:
            shape = get_peft_model(shape, peft_config)
    shape.tie_weights() if hasattr(shape, "tie_weights") else None
    trainable = sum(p.numel() for p in shape.parameters() if p.requires_grad)
    total = sum(p.numel() for p in shape.parameters())
    weights = model.get_memory_footprint()
    training = trainable * 16 if peft_config is not None else trainable * 12  # fp32: weight, gradient, two Adam moments
    return (
        f"policy: {trainable:,} trainable of {total:,} parameters ({trainable / total:.2%}), {quantization}, "
        f"{str(model.dtype).removeprefix('torch.')} on {device}; memory: {weights / 1e6:,.1f} MB weights + "
        f"{training / 1e6:,.1f} MB for training them, before activations"
    )


def _remedy(source: str) -> str:
    path = Path(source)
    if path.is_dir():
        held = sorted(p.name for p in path.iterdir())[:8]
        return f"the folder holds {held or 'nothing'}: it needs config.json, the tokenizer and whole *.safetensors files"
    if path.is_absolute() or source.startswith((".", "~")):
        return "no such folder: check the path"
    return "check the name, the network and, for gated models, your access; or give a local folder"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
