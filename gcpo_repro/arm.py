"""One arm of an experiment: load the policy, train it by one method with one seed, evaluate it along the way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from . import provenance, toy
from .config import GCPOConfig
from .data import as_conversations, check_prompt_lengths, load_reward, load_rows
from .errors import UserError
from .qlora import LoraSettings, load_policy, prepare_quantized
from .settings import Settings
from .trainer import CheckedGRPOTrainer, GCPOTrainer
from .watching import Watch

GCPO_SETTINGS = (
    "estimator", "phi", "control", "kl_context", "eq13_reduction", "similarity", "upsilon_map", "feature_token",
    "candidate_order", "context_max_tokens", "integrated_max_tokens",
)  # fmt: skip
TRAINERS = {"grpo": CheckedGRPOTrainer, "gcpo": GCPOTrainer}


def train(settings: Settings, out: Path) -> dict[str, Any]:
    """Train and evaluate; the record of `results.json`. See `experiment.run_arm`."""
    started = time.time()
    method, seed = settings.methods[0], settings.seeds[0]
    torch.set_num_threads(settings.threads)
    if settings.model == "toy" and not (toy.POLICY / "config.json").exists():
        raise UserError(f"model: no policy at {toy.POLICY}; make it with `gcpo-repro pretrain --out {toy.POLICY}`")
    lora = LoraSettings(r=settings.lora_rank, alpha=2 * settings.lora_rank) if settings.lora_rank else None
    model, tokenizer, peft_config = load_policy(
        toy.POLICY if settings.model == "toy" else settings.model, settings.quantization, lora, settings.dtype,
        settings.device, settings.model_revision or None,
    )  # fmt: skip
    reward = load_reward(settings.reward, settings.data)
    train_rows, eval_rows = _rows(settings, tokenizer, model)
    args = trainer_config(settings, out, model)
    trainer = TRAINERS[method](
        model, reward, args, Dataset.from_list(train_rows), processing_class=tokenizer, peft_config=peft_config
    )
    prepare_quantized(trainer.model)  # GRPO gets the same float32 adapters as GCPO
    watch = Watch(settings, trainer, eval_rows, reward, out / "progress.jsonl")
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)  # Watch says it in one line
    watch.evaluate(0)
    trainer.train()
    watch.evaluate(trainer.state.global_step)
    trainer.save_model(str(out / "policy"))
    return {
        **provenance.record(settings.as_dict(), seed, started), "kind": "arm", "method": method,
        "evaluations": watch.evaluations, "steps": watch.steps,
    }  # fmt: skip


def trainer_config(settings: Settings, out: Path, model: Any) -> GCPOConfig:
    """The trainer's configuration; GRPO gets the same one and ignores what is GCPO's."""
    template: dict[str, Any] = toy.TEMPLATE if settings.model == "toy" else {}
    return GCPOConfig(
        str(out / "trainer"), seed=settings.seeds[0], max_steps=settings.steps,
        per_device_train_batch_size=settings.device_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.device_batch_size,
        num_generations=settings.group_size, max_completion_length=settings.max_completion_length,
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, lr_scheduler_type="constant",
        temperature=settings.temperature, beta=settings.beta, alpha=settings.alpha, kappa=settings.kappa,
        num_integrated=settings.num_integrated or None, num_rollouts=settings.num_rollouts or None,
        **{name: getattr(settings, name) for name in GCPO_SETTINGS},
        gradient_checkpointing=settings.gradient_checkpointing, use_cpu=model.device.type == "cpu",
        bf16=model.dtype == torch.bfloat16, fp16=model.dtype == torch.float16,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
        **template,
    )  # fmt: skip


def _rows(settings: Settings, tokenizer: Any, model: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions to train on and, apart from them, questions to evaluate on; the same for every method and seed."""
    columns = {
        "config": settings.data_config, "prompt_column": settings.prompt_column,
        "answer_column": settings.answer_column, "template": settings.prompt_template,
    }  # fmt: skip
    evaluated, trained, seed = settings.eval_questions, settings.train_questions, settings.eval_seed
    if settings.data == "toy":
        train_rows = load_rows("toy", trained, seed, "train", template=settings.prompt_template)
        eval_rows = load_rows("toy", evaluated, seed, "held_out", template=settings.prompt_template)
    elif settings.eval_data:
        train_rows = load_rows(settings.data, trained, seed, settings.data_split, **columns)
        eval_rows = load_rows(settings.eval_data, evaluated, seed, settings.eval_split, **columns)
    else:
        rows = load_rows(settings.data, trained + evaluated if trained else 0, seed, settings.data_split, **columns)
        eval_rows, train_rows = rows[:evaluated], rows[evaluated:]
        if not train_rows:
            raise UserError(
                f"eval_questions: {evaluated} leaves none of the {len(rows)} rows of {settings.data!r} to train on; ask for fewer"
            )
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    both = [as_conversations(rows, tokenizer, settings.system_prompt) for rows in (train_rows, eval_rows)]
    for rows in both:
        check_prompt_lengths(rows, tokenizer, window, settings.max_completion_length)
    return both[0], both[1]
