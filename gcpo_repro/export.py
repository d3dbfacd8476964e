"""A trained policy as a folder that others can load: adapter or merged model, tokenizer, generation settings, model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .evaluation.stats import pass_at_1
from .settings import Settings, make_settings

DTYPES = ("auto", "bfloat16", "float16", "float32")
PROBES, PROBE_TOKENS = 8, 24  # texts on which a merged model is compared with the trained policy, and what it adds to each
QUESTIONS = [
    f"What is {a} + {b}? Put the final answer in \\boxed{{}}." for a, b in zip(range(17, 25), range(61, 69), strict=True)
]


def export(run: Path, to: Path, merge: bool = False, dtype: str = "auto") -> dict[str, Any]:
    """Write the policy of a finished arm to `to`. Nothing is asked of a network.

    Args:
        run: folder of an arm, which holds results.json and policy/.
        to: a folder that is absent or empty; it is complete or not there.
        merge: add the adapter to the weights and write a whole model. Of quantised weights those are taken that the policy was
            trained with, not the ones before rounding: so the merged model is the trained policy.
        dtype: of a merged model; "auto" is bfloat16 for quantised weights, else the training's own.

    Returns:
        {"kind": "adapter" | "merged" | "whole", "difference": … or None}: how far a merged model's logits, loaded with plain
        transformers, are from the trained policy's (`compare`).

    Raises:
        UserError: no finished arm, several of them, a folder that is not empty, a base model that is not on this machine.
    """
    record = arm_record(run)
    settings = make_settings(record["config"])
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is unknown, choose from {', '.join(DTYPES)}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"to: {str(to)!r} is there and not empty; name a new folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as name:
        draft = Path(name, "export")
        draft.mkdir()
        kind = "whole" if not settings.lora_rank else "merged" if merge else "adapter"
        difference = _write_merged(settings, run / "policy", draft, dtype) if kind == "merged" else None
        if kind != "merged":
            _copy_weights(run / "policy", draft)
        _write_companions(settings, run / "policy", draft)
        (draft / "training.yaml").write_text(yaml.safe_dump(settings.as_dict(), sort_keys=False))
        (draft / "README.md").write_text(card(record, settings, kind, difference))
        if to.exists():
            to.rmdir()
        draft.rename(to)
    return {"kind": kind, "difference": difference}


def arm_record(run: Path) -> dict[str, Any]:
    """The results.json of a finished arm. Raises UserError: none, or of another kind."""
    try:
        record: dict[str, Any] = json.loads((run / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"run: {str(run)!r} holds no finished training ({error}); name the folder of an arm") from error
    if record.get("kind") == "experiment":
        arms = [f"{arm['method']}-seed{arm['seed']}" for arm in record["arms"]]
        raise UserError(f"run: {str(run)!r} holds {len(arms)} arms; name one of its folders: {', '.join(arms)}")
    if record.get("kind") != "arm" or not (run / "policy").is_dir():
        raise UserError(f"run: {str(run)!r} is no training's folder, or its policy/ is gone; train again")
    return record


def _copy_weights(policy: Path, to: Path) -> None:
    names = [path for path in policy.iterdir() if path.suffix == ".safetensors" or path.name == "adapter_config.json"]
    names += [path for path in policy.iterdir() if path.name in ("config.json", "model.safetensors.index.json")]
    if not any(path.suffix == ".safetensors" for path in names):
        raise UserError(f"run: {str(policy)!r} holds no *.safetensors; train again")
    for path in names:
        shutil.copy2(path, to / path.name)


def _base(settings: Settings) -> str:
    from .toy import POLICY

    return str(POLICY) if settings.model == "toy" else settings.model


def _write_companions(settings: Settings, policy: Path, to: Path) -> None:
    """Tokenizer and generation settings."""
    from transformers import AutoTokenizer, GenerationConfig

    AutoTokenizer.from_pretrained(policy, local_files_only=True).save_pretrained(to)
    source = policy if (policy / "generation_config.json").is_file() else _base(settings)
    try:
        GenerationConfig.from_pretrained(source, local_files_only=True).save_pretrained(to)
    except OSError:
        print(f"export: {_base(settings)} has no generation settings on this machine, so none are written", flush=True)


def load_trained(settings: Settings, policy: Path) -> tuple[Any, Any]:
    """The trained policy as it was at the end of training, and its tokenizer; from this machine alone."""
    from peft import PeftModel

    from .qlora import LoraSettings, load_policy, prepare_quantized

    lora = LoraSettings(settings.lora_rank, 2 * settings.lora_rank)
    model, tokenizer, _ = load_policy(
        _base(settings), settings.quantization, lora, settings.dtype, settings.device, settings.model_revision or None, True
    )
    trained = PeftModel.from_pretrained(model, str(policy), is_trainable=True)
    prepare_quantized(trained)  # the adapters in float32, as they were trained
    return trained.eval(), tokenizer


def _write_merged(settings: Settings, policy: Path, to: Path, dtype: str) -> dict[str, float]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trained, tokenizer = load_trained(settings, policy)
    own = str(trained.dtype).removeprefix("torch.")
    kind = getattr(torch, dtype if dtype != "auto" else own if settings.quantization == "none" else "bfloat16")
    probes = _probes(settings, trained, tokenizer)
    expected = _logits(trained, probes)
    options = {"revision": settings.model_revision} if settings.model_revision else {}
    config = AutoConfig.from_pretrained(_base(settings), local_files_only=True, **options)
    merged: Any = AutoModelForCausalLM.from_config(config, dtype=kind)
    weights = merged_weights(trained)
    if lost := dict(merged.named_parameters(remove_duplicate=False)).keys() - weights.keys():
        raise RuntimeError(f"merging lost {sorted(lost)[:3]}")
    merged.load_state_dict(weights, strict=False)  # buffers that the model computes for itself are not among them
    merged.tie_weights()
    merged.save_pretrained(to)
    del merged, trained
    plain = AutoModelForCausalLM.from_pretrained(to, dtype=kind, local_files_only=True)
    return {**compare(expected, _logits(plain, probes)), "tokens": float(sum(map(len, probes)))}


def merged_weights(trained: Any) -> dict[str, Any]:
    """W + (alpha / r) B A of each adapted layer in float32, W dequantised as the layer uses it; other weights as they are."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    weights: dict[str, Any] = {}
    base = trained.get_base_model()
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if "lora_" not in name:
            weights[name.replace(".base_layer.", ".")] = parameter.detach()
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            layer = module.get_base_layer()
            delta = sum(module.get_delta_weight(adapter).float() for adapter in module.active_adapters)
            weights[f"{name}.weight"] = dequantize_module_weight(layer).detach().float() + delta
    return weights


def _probes(settings: Settings, model: Any, tokenizer: Any) -> list[list[int]]:
    """Questions with the policy's own likeliest continuation."""
    from . import toy
    from .data import as_conversations, prompt_ids
    from .evaluation.sampling import respond

    asked = [row["prompt"] for row in toy.questions("held_out", PROBES, 0)] if settings.model == "toy" else QUESTIONS
    rows = as_conversations([{"prompt": text, "answer": ""} for text in asked], tokenizer)
    contexts = [prompt_ids(row["prompt"], tokenizer) for row in rows]
    answers = respond(model, tokenizer, contexts, PROBE_TOKENS, seed=0, temperature=0)
    return [context + answer for context, answer in zip(contexts, answers, strict=True)]


def _logits(model: Any, probes: list[list[int]]) -> Any:
    """Logits at every token of the probes, one text at a time, (tokens, vocabulary) in float32."""
    import torch

    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in probes])


def compare(expected: Any, found: Any) -> dict[str, float]:
    """How far logits (tokens, vocabulary) are from the expected ones: the largest and the mean absolute difference, the mean
    KL(expected ‖ found) in nats, and the share of tokens whose likeliest successor is the same."""
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return {
        "largest": (expected - found).abs().max().item(),
        "mean": (expected - found).abs().mean().item(),
        "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
        "same_choice": (expected.argmax(-1) == found.argmax(-1)).float().mean().item(),
    }


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Upload an export to the Hub; the only function here that uses a network. Raises UserError where the Hub refuses."""
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:  # network, login and naming errors, each with kinds of its own
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"push: {repository!r} refused ({cause}); is it owner/name, and did `hf auth login` succeed?") from error
    return str(address)


# --- the model card ------------------------------------------------------------------------------------------


def card(record: dict[str, Any], settings: Settings, kind: str, difference: dict[str, float] | None) -> str:
    """README.md of the export, all numbers from the run's own record."""
    method, local = settings.methods[0].upper(), Path(_base(settings)).exists()
    head = {
        "library_name": "peft" if kind == "adapter" else "transformers", "pipeline_tag": "text-generation",
        "tags": ["gcpo-repro", settings.methods[0], "trl"], **({} if local else {"base_model": settings.model}),
    }  # fmt: skip
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {settings.model} trained with {method}",
        f"{_WHAT[kind].format(base=settings.model)} Made by `gcpo-repro` {record['versions']['gcpo-repro']}.",
        "## Evaluation", _evaluation(record, settings),
        "## Loading", _loading(record, settings, kind),
        *(["## Difference from the trained policy", _difference(settings, difference)] if difference else []),
        "## Recipe", _recipe(record, settings),
        "## Limits",
        "Trained to give final answers that a grader accepts on the questions above, and measured on nothing else. The licence "
        "of the base model and of the data applies.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


_WHAT = {
    "adapter": "A LoRA adapter for {base}.",
    "merged": "{base} with a trained LoRA adapter added to its weights.",
    "whole": "{base}, all weights trained.",
}


def _evaluation(record: dict[str, Any], settings: Settings) -> str:
    lines = ["| step | pass@1, % | 95% interval |", "|---|---|---|"]
    for evaluation in record["evaluations"]:
        counts = evaluation["counts"]
        found = pass_at_1(counts["correct"], counts["samples"], method="wilson")
        lines.append(f"| {evaluation['step']} | {100 * found.mean:.1f} | {100 * found.low:.1f} to {100 * found.high:.1f} |")
    counts = record["evaluations"][-1]["counts"]
    questions = settings.eval_data or f"{settings.data} (questions that were not trained on)"
    return "\n".join(lines) + (
        f"\n\n{len(counts['correct'])} questions of {questions}, answers: {counts['samples']} to each at temperature "
        f"{settings.temperature:g}, of at most {settings.max_completion_length} tokens, sampling seed {counts['seed']}; "
        f"the interval is over questions, for this one training seed ({record['seed']})."
    )


def _loading(record: dict[str, Any], settings: Settings, kind: str) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    load = "model = AutoModelForCausalLM.from_pretrained(folder)"
    if kind == "adapter" and settings.quantization != "none":
        lines[0] = "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig"
        four = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.{}'
        own = "bfloat16" if record["hardware"]["gpus"] else "float32"
        bits = (
            four.format(own if settings.dtype == "auto" else settings.dtype)
            if settings.quantization == "nf4"
            else "load_in_8bit=True"
        )
        load = f"weights = BitsAndBytesConfig({bits})  # as in training\n"
        load += "model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=weights)"
    lines += ['folder = "."  # this folder', 'tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")', load]
    base = "the toy policy that `gcpo-repro` installs" if settings.model == "toy" else f"`{settings.model}`"
    needs = f" The adapter needs `peft` and its base model, {base}." if kind == "adapter" else ""
    return "```python\n" + "\n".join(lines) + f"\n```\n\nPlain transformers is enough.{needs}"


def _difference(settings: Settings, found: dict[str, float]) -> str:
    return (
        f"Trained with {settings.quantization} weights; the merged weights are rounded again. On {found['tokens']:.0f} tokens "
        f"the logits of this model, loaded with plain transformers, differ by at most {found['largest']:.2g} and by "
        f"{found['mean']:.2g} on average; KL {found['kl']:.2g} nats a token; the likeliest next token is the same for "
        f"{100 * found['same_choice']:.1f}%."
    )


def _recipe(record: dict[str, Any], settings: Settings) -> str:
    changed = [
        f"| {item.name} | {getattr(settings, item.name)} |"
        for item in fields(Settings)
        if getattr(settings, item.name) != item.default
    ]
    versions = ", ".join(
        f"{name} {record['versions'][name]}" for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")
    )
    machine = record["hardware"]
    device = ", ".join(gpu["name"] for gpu in machine["gpus"]) or machine["cpu"]
    return (
        "What differs from the defaults; all of it is in `training.yaml`, which `gcpo-repro train --config` reads.\n\n"
        "| setting | value |\n|---|---|\n"
        + "\n".join(changed)
        + f"\n\n{record['wall_time_seconds']:.0f} s on {device}; {versions}; "
        f"commit {record['commit']}."
    )
