"""The settings of a training experiment: one file serves `gcpo-repro train --config`, notebook 05 and papermill's `-f`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from . import vllm_options
from .errors import UserError

METHODS = ("grpo", "gcpo", "dr_grpo", "gvpo")
PUBLISHED_ONLY = ("rest_mcts",)  # compared in the paper, without a training of ours
NOT_SHAPING = (  # a resumed training is the same to the bit, whoever watches it
    "workers", "save_every", "report_to", "completions_every", "on_divergence", "on_collapse", "max_kl", "equal_reward_steps",
    "max_empty",
)  # fmt: skip
REPORTERS = ("tensorboard", "trackio", "wandb")
ACTIONS = ("stop", "warn", "off")
NOTEBOOK_ONLY = ("out_dir", "run_dir", "check_claims")


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a training experiment; the keys of a configuration file, each int, float, str, bool or list.

    Raises UserError for a value of the wrong kind or outside its range.
    """

    methods: tuple[str, ...] = ("grpo", "gcpo")
    seeds: tuple[int, ...] = (0, 1, 2)
    model: str = "toy"  # "toy", a Hub id or a local folder
    model_revision: str = ""
    quantization: str = "nf4"
    lora_rank: int = 16  # 0: train every weight (quantization "none")
    dtype: str = "auto"
    device: str = "auto"
    data: str = "toy"  # "toy", a local file or a Hub id
    data_split: str = "train"
    data_config: str = ""
    data_revision: str = ""  # of a Hub data set; "" is the newest, whose commit is in results.json
    check_overlap: tuple[str, ...] = ()  # benchmarks whose problems are not trained on; "all" is each of them
    eval_data: str = ""  # "" takes questions of `data` that are not trained on
    eval_split: str = "test"
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    prompt_template: str = "{prompt}"  # or a name: boxed, answer_tags
    system_prompt: str = ""
    reward: tuple[str, ...] = ("exact",)  # exact, format, length, module:function
    reward_weights: tuple[float, ...] = (1.0,)  # one for each reward; the default is 1 for all
    length_margin: int = 0  # tokens in which the length penalty grows; 0: a fifth of max_completion_length (DAPO)
    estimator: str = "state"
    phi: str = "algorithm"
    control: str = "none"
    kl_context: str = "query"
    eq13_reduction: str = "mean"
    similarity: str = "cosine"
    upsilon_map: str = "raw"
    feature_token: str = "last"
    candidate_order: str = "sampled"
    alpha: float = 2.0  # paper, §experiments: best of its grid
    kappa: float = 0.06  # paper: best of its grid
    beta: float = 0.04  # of grpo and gcpo; not in the paper, the value of GRPO's first publication
    gvpo_beta: float = 0.1  # GVPO's own β: its authors' runs
    group_size: int = 4
    num_integrated: int = 0  # L; 0: the group size, as in the paper
    num_rollouts: int = 0  # M; 0: the group size, as in the paper
    context_max_tokens: int = 0
    integrated_max_tokens: int = 0
    steps: int = 40
    batch_size: int = 64  # answers per optimiser step
    device_batch_size: int = 64  # answers per forward pass; the rest is accumulated
    learning_rate: float = 1.0e-3
    weight_decay: float = 0.01  # paper
    num_iterations: int = 1  # optimiser steps with the same answers; GRPO's μ, above 1 the clip acts
    temperature: float = 1.0
    max_completion_length: int = 24
    gradient_checkpointing: bool = False
    train_questions: int = 2048
    eval_questions: int = 256
    eval_samples: int = 4
    eval_every: int = 20  # optimiser steps; 0: only before and after
    eval_seed: int = 20260
    eval_batch_size: int = 256  # answers written at a time in an evaluation: its memory
    save_every: int = 10  # optimiser steps between checkpoints; 0: only at a signal and at the end
    report_to: tuple[str, ...] = ("tensorboard",)  # also trackio, wandb; [] for none
    completions_every: int = 10  # optimiser steps between tables of completions; 0: none
    on_divergence: str = "stop"  # loss or gradient not finite, KL above max_kl: stop, warn or off
    on_collapse: str = "warn"  # rewards all equal for long, empty or cut-off answers: stop, warn or off
    max_kl: float = 10.0  # nats per token, to the reference and to π'_ref; 0: no bound
    equal_reward_steps: int = 20  # steps in a row in which every group's rewards are equal
    max_empty: float = 0.5  # share of empty completions
    use_vllm: bool = False  # vLLM generates the answers (untested); CUDA, and quantization "none"
    vllm_mode: str = "colocate"  # in the training's own process, or "server": `vllm serve` elsewhere
    vllm_server_base_url: str = ""  # of the server, such as http://localhost:8000
    vllm_gpu_memory_utilization: float = 0.3  # share of the device that a colocated vLLM takes; TRL's default
    vllm_tensor_parallel_size: int = 1  # devices that a colocated vLLM spreads over
    vllm_max_model_length: int = 0  # tokens of its longest context; 0: the model's window
    workers: int = 2  # arms trained at the same time, each with `threads` threads
    threads: int = 1

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _coerced(item.name, getattr(self, item.name), item.default))
        for method in self.methods:
            if method in PUBLISHED_ONLY:
                raise UserError(
                    f"methods: {method!r} cannot be trained here, only its published numbers are known (`gcpo-repro audit`); "
                    f"choose from {', '.join(METHODS)}"
                )
            if method not in METHODS:
                raise UserError(f"methods: {method!r} is unknown, choose from {', '.join(METHODS)}")
        for name, values in (("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name}: {list(values)} must name at least one, and none twice")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise UserError(f"seeds: {list(self.seeds)} must lie between 0 and 2**32 - 1")
        lowest = {"group_size": 2, "lora_rank": 0, "num_integrated": 0, "num_rollouts": 0, "context_max_tokens": 0}
        lowest |= {"integrated_max_tokens": 0, "eval_every": 0, "eval_seed": 0}
        lowest |= {"train_questions": 0}  # all there are
        lowest |= {"length_margin": 0, "completions_every": 0}
        lowest |= {"save_every": 0}
        lowest |= {"vllm_max_model_length": 0}
        for item in fields(self):
            value, least = getattr(self, item.name), lowest.get(item.name, 1)
            if type(value) is int and value < least:
                raise UserError(f"{item.name}: {value} must be at least {least}")
            if type(value) is float and not 0 <= value < float("inf"):
                raise UserError(f"{item.name}: {value} must be finite and not negative")
        if len(self.reward_weights) == 1:
            object.__setattr__(self, "reward_weights", self.reward_weights * len(self.reward))
        _check_watching(self)
        vllm_options.check(self, {item.name: item.default for item in fields(self)})
        if self.temperature == 0:
            raise UserError("temperature: 0 leaves nothing to sample, give a positive one (1 is the default)")
        if self.batch_size % self.device_batch_size or self.batch_size % self.group_size:
            raise UserError(
                f"batch_size: {self.batch_size} must be a multiple of group_size = {self.group_size} (whole groups) and of "
                f"device_batch_size = {self.device_batch_size}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and scalars, for YAML and JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _check_watching(settings: Settings) -> None:
    """The rewards' weights, and what watches over the training."""
    names, weights = settings.reward, settings.reward_weights
    if not names or len(set(names)) < len(names) or len(weights) != len(names):
        raise UserError(
            f"reward_weights: {list(weights)} must be one number for each of reward = {list(names)}, which names none twice"
        )
    if not all(-float("inf") < weight < float("inf") for weight in weights) or not any(weights):
        raise UserError(f"reward_weights: {list(weights)} must be finite, and not all 0")
    if unknown := sorted(set(settings.report_to) - set(REPORTERS)):
        raise UserError(f"report_to: {', '.join(unknown)} unknown, choose from {', '.join(REPORTERS)}")
    for name in ("on_divergence", "on_collapse"):
        if getattr(settings, name) not in ACTIONS:
            raise UserError(f"{name}: {getattr(settings, name)!r} is unknown, choose from {', '.join(ACTIONS)}")


def _coerced(name: str, value: Any, default: Any) -> Any:
    """The value in the default's type. YAML 1.1 reads 1e-6 as a string, so a string that is a number will do."""
    try:
        if isinstance(default, tuple):
            items = value if isinstance(value, (list, tuple)) else [value]
            return tuple(_coerced(name, item, default[0] if default else "") for item in items)
        if isinstance(default, bool) or isinstance(value, bool):
            if isinstance(default, bool) and isinstance(value, bool):
                return value
            raise ValueError
        if isinstance(default, float) and isinstance(value, (int, float, str)):
            return float(value)
        if isinstance(default, int) and int(value) == float(value):
            return int(value)
        if isinstance(default, str) and isinstance(value, str):
            return value
        raise ValueError
    except (TypeError, ValueError, OverflowError):
        kind = "list of " + type(default[0] if default else "").__name__ if isinstance(default, tuple) else type(default).__name__
        raise UserError(f"{name}: {value!r} is not a {kind}") from None


def load_settings(path: str | Path) -> Settings:
    """Settings from a YAML file (a parameter file of notebook 05). Raises UserError: unreadable, or an unknown key."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config: {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"config: {str(path)!r} must hold 'name: value' lines")
    return make_settings(content)


def make_settings(values: dict[str, Any]) -> Settings:
    """Settings from a mapping, such as a notebook's parameters.

    `more`, a list of "name=value", adds settings that notebook 05 has no parameter for; `out_dir` and `run_dir` say where
    a notebook writes and reads, `check_claims` what it asserts: no settings.

    Raises UserError: an unknown name, one that is given twice.
    """
    values = {key: value for key, value in values.items() if key not in NOTEBOOK_ONLY}
    more = values.pop("more", [])
    if not isinstance(more, (list, tuple)):
        raise UserError(f"more: {more!r} must be a list of 'name=value'")
    for entry in more:
        name, sign, value = str(entry).partition("=")
        if not sign or name in values:
            raise UserError(f"more: {entry!r} must be 'name=value', with a name that is not given elsewhere")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"more: {entry!r} must be 'name=value', and its value is no YAML") from None
    known = [item.name for item in fields(Settings)]
    unknown = sorted(str(name) for name in set(values) - set(known))
    if unknown:
        raise UserError(f"config: unknown setting {', '.join(unknown)}; known are {', '.join(known)}")
    return Settings(**values)


def shaping(settings: Settings) -> dict[str, Any]:
    """The settings that shape a result; a training may be gone on with where these are the same."""
    return {name: value for name, value in settings.as_dict().items() if name not in NOT_SHAPING}


def arm_settings(settings: Settings, method: str, seed: int) -> Settings:
    """The settings of one arm alone; how many arms run beside it does not change its result."""
    return replace(settings, methods=(method,), seeds=(seed,), workers=1)


def select(settings: Settings, method: str | None, seeds: Sequence[int]) -> Settings:
    """Settings narrowed by the command line's --method and --seed."""
    return replace(settings, methods=(method,) if method else settings.methods, seeds=tuple(seeds) or settings.seeds)
