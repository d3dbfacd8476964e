"""What a step costs: TRL's GRPO, GCPO fast, GCPO with full contexts, GCPO to the paper's letter, and the token floor of each.

    python tests/benchmarks/step_cost.py [--group-size 8] [--tokens 128] [--literal-tokens 32] [--repeats 5] [--json FILE]

One run, interleaved, medians; a policy of random weights that never ends early, so that all answers have the same length. The
floor counts tokens: decoded ones at the rate of the GRPO step's own generation, read ones at the rate of a plain forward pass,
both measured in this run. Memory: a process of its own for each method, peak RSS minus RSS before the first step (on CUDA,
max_memory_allocated).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from trl import GRPOTrainer

from gcpo_repro import GCPOConfig, GCPOTrainer, provenance, toy
from gcpo_repro.qlora import load_policy

METHODS = ("grpo", "fast", "full", "literal")


def model_folder(args: argparse.Namespace, folder: Path) -> str:
    """The given model, or a policy of the toy policy's size with random weights and room for the contexts."""
    if args.model:
        return str(args.model)
    config = Qwen2Config(**{**json.loads((toy.POLICY / "config.json").read_text()), "max_position_embeddings": 16384})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy.POLICY).save_pretrained(folder)
    return str(folder)


def reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Something that differs between answers."""
    return [float(sum(map(ord, str(text))) % 7) for text in completions]


def make(method: str, args: argparse.Namespace, source: str, tokens: int) -> GRPOTrainer:
    model, tokenizer, peft_config = load_policy(source, args.quantization)
    n, cuda = args.group_size, torch.cuda.is_available()
    common: dict[str, Any] = dict(
        max_steps=100, per_device_train_batch_size=args.groups * n, num_generations=n, max_completion_length=tokens,
        use_cpu=not cuda, gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True,
        learning_rate=1e-5, **toy.TEMPLATE, scoring_tokens=args.scoring_tokens,
        generation_kwargs={"suppress_tokens": [tokenizer.eos_token_id]},
    )  # fmt: skip
    if method == "full":  # whole candidates and a whole y_n, L = 2
        common["num_integrated"] = 2
    build = {"grpo": GCPOConfig, "fast": GCPOConfig.fast, "full": GCPOConfig, "literal": GCPOConfig.paper}[method]
    config = build(tempfile.mkdtemp(), **common)
    rows = Dataset.from_list(toy.questions("train", 256, 0))
    trainer_class = GRPOTrainer if method == "grpo" else GCPOTrainer
    return trainer_class(model, reward, config, rows, processing_class=tokenizer, peft_config=peft_config or LoraConfig())


class Stepper:
    """One optimiser step at a time, timed; counts the tokens that the policy reads and decodes."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        self.batches = iter(trainer.get_train_dataloader())
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        self.generate_seconds = 0.0
        generate = trainer._generate

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return generate(*arguments)
            finally:
                self.generate_seconds += time.perf_counter() - started

        trainer._generate = timed

    def step(self) -> float:
        trainer = self.trainer
        rows = next(self.batches)
        _synchronise()
        started = time.perf_counter()
        batch = trainer._generate_and_score_completions(rows)
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        _synchronise()
        return time.perf_counter() - started


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def extra_tokens(method: str, args: argparse.Namespace, tokens: int, query: int) -> tuple[int, int]:
    """(read, decoded) tokens of one group beyond GRPO's, where nothing that the group shares is read twice.

    z_i costs a decoded token each, π(y_i | q) nothing. The integration prompt is read once; y_n is decoded behind it, and
    each x_i goes on from it where y_i stood, so that n (n − 1) / 2 candidates are read again.
    """
    n, Q = args.group_size, query
    L, K = {"fast": (2, max(1, tokens // 8)), "full": (2, tokens), "literal": (n, tokens)}[method]
    read = Q + n * (K + 1) + 1  # integration prompt
    read += n * (n - 1) // 2 * (K + 1) + n * L * (K + 2 + tokens)  # the rest of the prefixes; y_n and y_i behind them
    decoded = n + L * K
    if method == "literal":  # n rollouts from each context, which is read once more; then φ of each rollout
        decoded += n * L * n * tokens
        read += n * L * (Q + n * (K + 1) + 1) + n * L * n * (Q + tokens)
    return read, decoded


def rates(
    trainer: GRPOTrainer, stepper: Stepper, args: argparse.Namespace, tokens: int, query: int, steps: int
) -> tuple[float, float]:
    """Seconds per token read (a forward pass of a group's answers) and per token decoded (GRPO's own generation)."""
    count = args.groups * args.group_size
    ids = torch.randint(3, 20, (count, query + tokens), device=trainer.model.device)
    times = []
    for _ in range(3):
        _synchronise()
        started = time.perf_counter()
        with torch.no_grad():
            trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
        _synchronise()
        times.append(time.perf_counter() - started)
    return statistics.median(times) / ids.numel(), stepper.generate_seconds / steps / (count * tokens)


def memory(method: str, args: argparse.Namespace, source: str, tokens: int) -> float:
    """Bytes that steps add, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", method, "--model", source, "--group-size", str(args.group_size)]
    command += ["--tokens", str(tokens), "--quantization", args.quantization, "--groups", str(args.groups)]
    command += ["--scoring-tokens", str(args.scoring_tokens), "--threads", str(args.threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(args: argparse.Namespace) -> None:
    stepper = Stepper(make(args.memory_of, args, args.model, args.tokens))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            stepper.step()
        print(torch.cuda.max_memory_allocated() - before)
        return
    before = psutil.Process().memory_info().rss
    for _ in range(3):
        stepper.step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def run(args: argparse.Namespace, source: str) -> dict[str, Any]:
    sizes = {method: args.literal_tokens if method == "literal" else args.tokens for method in METHODS}
    pairs = {"grpo": args.tokens, "fast": args.tokens, "full": args.tokens}
    if args.literal_tokens:
        pairs |= {"grpo, short": args.literal_tokens, "literal": args.literal_tokens}
    steppers = {name: Stepper(make(name.split(",")[0], args, source, tokens)) for name, tokens in pairs.items()}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for repeat in range(args.repeats + 1):  # interleaved: a busy moment meets all of them; the first round warms up
        for name, stepper in steppers.items():
            if repeat == 0:
                stepper.step()
                stepper.generate_seconds = 0.0
            elif name != "literal" or repeat <= max(1, args.repeats // 4):
                times[name].append(stepper.step())
    query = len(toy.pool("train")[0])
    read, decode = rates(steppers["grpo"].trainer, steppers["grpo"], args, args.tokens, query, args.repeats)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    found: dict[str, Any] = {"grpo_seconds": seconds["grpo"], "read_us": read * 1e6, "decode_us": decode * 1e6}
    answers = args.groups * args.group_size  # π_ref reads them, and the loss
    found |= {"grpo_read_tokens": 2 * answers * (query + args.tokens), "grpo_decoded_tokens": answers * args.tokens}
    for method in ("fast", "full"):
        more = [args.groups * count for count in extra_tokens(method, args, sizes[method], query)]
        floor = seconds["grpo"] + more[0] * read + more[1] * decode
        found |= {
            f"{method}_seconds": seconds[method], f"{method}_ratio": seconds[method] / seconds["grpo"],
            f"{method}_floor_ratio": floor / seconds["grpo"], f"{method}_over_floor": seconds[method] / floor,
            f"{method}_read_tokens": more[0], f"{method}_decoded_tokens": more[1],
        }  # fmt: skip
    if args.literal_tokens:
        found["literal_ratio"], found["literal_tokens"] = seconds["literal"] / seconds["grpo, short"], args.literal_tokens
        more = [args.groups * count for count in extra_tokens("literal", args, args.literal_tokens, query)]
        found |= {"literal_seconds": seconds["literal"], "literal_read_tokens": more[0], "literal_decoded_tokens": more[1]}
    if args.memory:
        peaks = {method: memory(method, args, source, args.tokens) for method in ("grpo", "fast", "full")}
        found |= {f"{method}_memory_mb": peak / 1e6 for method, peak in peaks.items()}
        found |= {f"{method}_memory_ratio": peaks[method] / peaks["grpo"] for method in ("fast", "full")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--groups", type=int, default=4, help="questions per step")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--literal-tokens", type=int, default=16, help="answer length for the literal algorithm; 0 leaves it out")
    parser.add_argument("--model", default="", help="folder or Hub id; default: the toy policy's size, random weights")
    parser.add_argument("--quantization", default="none", choices=("none", "nf4", "int8"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scoring-tokens", type=int, default=GCPOConfig.scoring_tokens)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        return measure_memory(args)
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        found = run(args, model_folder(args, Path(folder)))
    for name, value in found.items():
        print(f"{name:22} {value:12.3f}")
    if args.json:
        config = {key: str(value) for key, value in vars(args).items()}
        provenance.write_json(args.json, {**found, **provenance.record(config, 0, started)})
    return None


if __name__ == "__main__":
    main()
