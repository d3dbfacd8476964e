"""One arm of an experiment: load the policy, train it by one method with one seed, evaluate it along the way."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from . import processes, provenance, toy, vllm_options
from .baselines import OPTIONS, GVPOConfig, GVPOTrainer
from .checked import CheckedGRPOTrainer
from .config import GCPOConfig
from .data import Row, as_conversations, check_prompt_lengths, load_with_source
from .errors import UserError
from .experiment import fingerprint
from .guards import Guards
from .overlap import benchmark_index, refuser
from .plan import make_plan
from .qlora import LoraSettings, choose_precision, load_policy, prepare_quantized
from .resuming import Saver, digest
from .rewards import load_judge, load_rewards
from .settings import Settings, shaping
from .trainer import GCPOTrainer
from .watching import TensorBoard, Watch, check_reporters

GCPO_SETTINGS = (
    "estimator", "phi", "control", "kl_context", "eq13_reduction", "similarity", "upsilon_map", "feature_token",
    "candidate_order", "context_max_tokens", "integrated_max_tokens",
)  # fmt: skip
GUARDS = ("on_divergence", "on_collapse", "max_kl", "equal_reward_steps", "max_empty")
TRAINERS = {"grpo": CheckedGRPOTrainer, "gcpo": GCPOTrainer, "dr_grpo": CheckedGRPOTrainer, "gvpo": GVPOTrainer}


def train(settings: Settings, out: Path) -> dict[str, Any]:
    """Train and evaluate; the record of `results.json`. See `experiment.run_arm`."""
    started = time.time()
    method, seed = settings.methods[0], settings.seeds[0]
    torch.set_num_threads(settings.threads)
    check_reporters(settings.report_to)
    if torch.cuda.is_available() and processes.count() > 1:
        torch.cuda.set_device(processes.local_rank())
    if settings.model == "toy" and not (toy.POLICY / "config.json").exists():
        raise UserError(f"model: no policy at {toy.POLICY}; make it with `gcpo-repro pretrain --out {toy.POLICY}`")
    train_rows, eval_rows, sources = _questions(settings)
    rewards = load_rewards(settings.reward, settings.data, settings.max_completion_length, settings.length_margin)
    vllm_options.require(settings)
    sharded = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
    make_plan(settings, out, processes.count(), sharded=sharded).refuse()  # before any download
    lora = LoraSettings(r=settings.lora_rank, alpha=2 * settings.lora_rank) if settings.lora_rank else None
    model, tokenizer, peft_config = load_policy(
        toy.POLICY if settings.model == "toy" else settings.model, settings.quantization, lora, settings.dtype,
        settings.device, settings.model_revision or None,
    )  # fmt: skip
    train_rows, eval_rows = (_asked(settings, rows, tokenizer, model) for rows in (train_rows, eval_rows))
    args = trainer_config(settings, out, model)
    trainer = TRAINERS[method](
        model, rewards, args, Dataset.from_list(train_rows), processing_class=tokenizer, peft_config=peft_config
    )
    prepare_quantized(trainer.model)  # GRPO gets the same float32 adapters as GCPO
    progress = out / "progress.jsonl" if processes.is_main() else Path(os.devnull)
    judge = load_judge(settings.reward, settings.data)
    watch = Watch(settings, trainer, eval_rows, judge, progress)  # every process evaluates the same, so none waits
    if processes.is_main() and "tensorboard" in settings.report_to:
        trainer.add_callback(TensorBoard(out / "tensorboard"))  # before Watch, which tells it the evaluations
    trainer.add_callback(watch)
    guards = Guards(trainer, out, **{name: getattr(settings, name) for name in GUARDS}, say=watch.say)
    trainer.add_callback(guards)
    trainer.remove_callback(PrinterCallback)  # Watch says it in one line
    saver = Saver(trainer, out, settings.save_every, _identity(settings, train_rows, eval_rows))
    trainer.add_callback(saver)  # after those whose records it saves
    checkpoint = saver.restore()
    if checkpoint is None:
        watch.evaluate(0)
    saver.train(checkpoint)
    watch.evaluate(trainer.state.global_step)
    trainer.save_model(str(out / "policy"))
    return {
        **provenance.record(settings.as_dict(), seed, started), **saver.history(), "kind": "arm", "method": method,
        "processes": processes.count(),
        "evaluations": watch.evaluations, "steps": watch.steps, "warnings": guards.warnings, "data": sources,
    }  # fmt: skip


def _identity(settings: Settings, *rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a training shares with the checkpoints it may go on from."""
    return {
        "settings": shaping(settings), "data": digest(*rows), "code": fingerprint(settings), "versions": provenance.versions(),
        "processes": processes.count(),
    }  # fmt: skip


def trainer_config(settings: Settings, out: Path, model: Any) -> GCPOConfig:
    """The trainer's configuration; the baselines get the same one, ignore what is GCPO's, and change their `OPTIONS`."""
    method, template = settings.methods[0], toy.TEMPLATE if settings.model == "toy" else {}
    compute = choose_precision(settings.dtype, model.device, settings.lora_rank > 0).compute
    shared: dict[str, Any] = dict(
        output_dir=str(out / "trainer"), seed=settings.seeds[0], max_steps=settings.steps,
        per_device_train_batch_size=settings.device_batch_size,
        gradient_accumulation_steps=_accumulation(settings),
        num_generations=settings.group_size, num_iterations=settings.num_iterations,
        max_completion_length=settings.max_completion_length,
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, lr_scheduler_type="constant",
        temperature=settings.temperature, beta=settings.beta, alpha=settings.alpha, kappa=settings.kappa,
        num_integrated=settings.num_integrated or None, num_rollouts=settings.num_rollouts or None,
        **{name: getattr(settings, name) for name in GCPO_SETTINGS},
        gradient_checkpointing=settings.gradient_checkpointing, use_cpu=model.device.type == "cpu",
        bf16=compute == torch.bfloat16, fp16=compute == torch.float16, **vllm_options.options(settings),
        reward_weights=list(settings.reward_weights), logging_steps=1, logging_nan_inf_filter=False,
        report_to=[name for name in settings.report_to if name != "tensorboard"], run_name=f"{method}-seed{settings.seeds[0]}",
        project="gcpo-repro", save_strategy="no", disable_tqdm=True,
        **template,
    )  # fmt: skip
    if method == "gvpo":
        return GVPOConfig(**{**shared, **OPTIONS[method], "gvpo_beta": settings.gvpo_beta})
    return GCPOConfig(**{**shared, **OPTIONS[method]})


def _accumulation(settings: Settings) -> int:
    """Forward passes per optimiser step, on each process."""
    at_once = settings.device_batch_size * processes.count()
    if settings.batch_size % at_once:
        raise UserError(
            f"device_batch_size: {settings.device_batch_size} answers on each of {processes.count()} processes do not divide "
            f"batch_size = {settings.batch_size}; set it to {settings.batch_size // processes.count() or 1} or a part of that"
        )
    return settings.batch_size // at_once


def _questions(settings: Settings) -> tuple[list[Row], list[Row], dict[str, Any]]:
    """Questions to train on and, apart from them, questions to evaluate on, the same for every method and seed; their sources."""
    columns: dict[str, Any] = {
        "config": settings.data_config, "prompt_column": settings.prompt_column, "answer_column": settings.answer_column,
        "template": settings.prompt_template,
    }  # fmt: skip
    evaluated, trained, seed = settings.eval_questions, settings.train_questions, settings.eval_seed
    if settings.data == "toy":
        if settings.check_overlap:
            raise UserError("check_overlap: the toy task's questions stand in no benchmark; leave it out")
        train_rows, used = load_with_source("toy", trained, seed, "train", template=settings.prompt_template)
        eval_rows, held_out = load_with_source("toy", evaluated, seed, "held_out", template=settings.prompt_template)
        return train_rows, eval_rows, {"train": used, "eval": held_out}
    refuse = refuser(benchmark_index(settings.check_overlap)) if settings.check_overlap else None
    training = {**columns, "revision": settings.data_revision, "refuse": refuse}
    if settings.eval_data:
        train_rows, used = load_with_source(settings.data, trained, seed, settings.data_split, **training)
        eval_rows, held_out = load_with_source(settings.eval_data, evaluated, seed, settings.eval_split, **columns)
        return train_rows, eval_rows, {"train": used, "eval": held_out}
    rows, used = load_with_source(settings.data, trained + evaluated if trained else 0, seed, settings.data_split, **training)
    if len(rows) <= evaluated:
        raise UserError(
            f"eval_questions: {evaluated} leaves none of the {len(rows)} rows of {settings.data!r} to train on; ask for fewer"
        )
    return rows[evaluated:], rows[:evaluated], {"train": used, "eval": used}


def _asked(settings: Settings, rows: list[Row], tokenizer: Any, model: Any) -> list[dict[str, Any]]:
    """Rows as the trainer takes them; each fits into the model's window."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked = as_conversations(rows, tokenizer, settings.system_prompt)
    check_prompt_lengths(asked, tokenizer, window, settings.max_completion_length)
    return asked
