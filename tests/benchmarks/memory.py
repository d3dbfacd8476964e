"""The memory that the first steps add, measured against `gcpo_repro.memory`'s estimate, on models of three sizes.

    python tests/benchmarks/memory.py [--json figures/data/memory.json] [--cases 5M-none 40M-nf4 …]

Each case is a process of its own with a policy of random weights: peak RSS of two steps minus RSS before them (on Linux; the
peak counter is set back through /proc/self/clear_refs). Before, a step of the toy policy loads what is imported late, and
every weight is read once, since safetensors maps files lazily.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {
    "5M": dict(hidden_size=256, num_hidden_layers=5, intermediate_size=768, num_attention_heads=4, vocab_size=4096),
    "40M": dict(hidden_size=512, num_hidden_layers=10, intermediate_size=1536, num_attention_heads=8, vocab_size=16384),
    "150M": dict(hidden_size=768, num_hidden_layers=18, intermediate_size=2304, num_attention_heads=12, vocab_size=32768),
}
WORK = {"5M": (32, 64), "40M": (16, 48), "150M": (8, 48)}  # answers of a step, tokens of each
CASES = [f"{size}-{quantization}" for size in SIZES for quantization in ("none", "nf4")]


def settings_of(case: str, model: str) -> Any:
    from gcpo_repro.settings import make_settings

    size, quantization, *rest = case.split("-")
    rows, tokens = (8, 8) if model == "toy" else WORK[size]
    return make_settings({
        "methods": ["gcpo"], "seeds": [0], "model": model, "quantization": quantization, "group_size": 4, "batch_size": rows,
        "device_batch_size": rows, "max_completion_length": tokens, "learning_rate": 1e-5, "device": "cpu", "report_to": [],
        "gradient_checkpointing": "checkpointing" in rest, "lora_rank": 0 if "full" in rest else 16,
    })  # fmt: skip


def save_model(size: str, folder: Path) -> None:
    """A Qwen2 of that size with random weights, and the toy task's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    from gcpo_repro import toy

    config = json.loads((toy.POLICY / "config.json").read_text()) | SIZES[size]
    config |= {"num_key_value_heads": 2, "layer_types": None, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen2Config(**config)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy.POLICY).save_pretrained(folder)


def make(settings: Any, folder: str) -> Any:
    from datasets import Dataset

    from gcpo_repro import GCPOTrainer, arm, toy
    from gcpo_repro.qlora import LoraSettings, load_policy

    lora = LoraSettings(settings.lora_rank) if settings.lora_rank else None
    source = toy.POLICY if settings.model == "toy" else settings.model
    model, tokenizer, peft_config = load_policy(source, settings.quantization, lora, device="cpu")
    args = arm.trainer_config(settings, Path(folder), model)
    args.candidate_prefix, args.integration_suffix = toy.TEMPLATE.values()
    args.generation_kwargs = {"suppress_tokens": [tokenizer.eos_token_id]}  # every answer as long as it may be
    rows = Dataset.from_list(toy.questions("train", 256, 0))
    trainer = GCPOTrainer(model, _reward, args, rows, processing_class=tokenizer, peft_config=peft_config)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    if settings.gradient_checkpointing:  # Trainer.train() would do this
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    return trainer


def _reward(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(str(text)) + sum(map(ord, str(text))) % 7) for text in completions]


def step(trainer: Any) -> None:
    rows = next(iter(trainer.get_train_dataloader()))
    trainer._compute_loss(trainer.model, trainer._generate_and_score_completions(rows)).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def _memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def measure(case: str) -> dict[str, float]:
    """One case, in this process."""
    import torch

    from gcpo_repro import toy
    from gcpo_repro.architecture import architecture
    from gcpo_repro.memory import estimate

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        step(make(settings_of(case, "toy"), folder))
        gc.collect()
        loaded = _memory("VmRSS")
        model = Path(folder, "model")
        save_model(case.split("-")[0], model)
        settings = settings_of(case, str(model))
        trainer = make(settings, folder)
        for parameter in trainer.model.parameters():
            parameter.detach().view(torch.uint8).max()
        gc.collect()
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        started = time.perf_counter()
        for _ in range(2):
            step(trainer)
        measured, seconds = _memory("VmHWM") - before, time.perf_counter() - started
        expected = estimate(settings, architecture(str(model)), len(toy.pool("train")[0]), cuda=False)
        weights = trainer.model.get_base_model() if settings.lora_rank else trainer.model
        held = {name: p for name, p in weights.named_parameters() if "lora_" not in name}
        footprint = sum(p.nbytes for p in held.values())
        states = [p.quant_state for p in held.values() if hasattr(p, "quant_state")]
        footprint += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
        return {
            "libraries_mb": loaded / 1e6, "weights_mb": footprint / 1e6, "weights_estimated_mb": expected.stays["weights"] / 1e6,
            "measured_mb": measured / 1e6, "estimated_mb": expected.step / 1e6, "ratio": expected.step / measured,
            "seconds": seconds, **{f"{name}_mb": size / 1e6 for name, size in expected.phases.items()},
        }  # fmt: skip


def measured_apart(case: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--measure", case], check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="size-quantization[-full][-checkpointing]")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args.measure)))
    from gcpo_repro import provenance

    started, found = time.time(), {}
    for case in args.cases:
        found[case] = measured_apart(case)
        print(case, {name: round(value, 2) for name, value in found[case].items()}, flush=True)
    if args.json:
        config = {"cases": args.cases, "sizes": SIZES, "answers_and_tokens": WORK}
        provenance.write_json(args.json, {**provenance.record(config, 0, started), "cases": found})
    return None


if __name__ == "__main__":
    main()
