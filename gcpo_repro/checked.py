"""The base of all trainers here: TRL's GRPO, which says what is wrong before a step is lost."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import ProcessorMixin
from trl import GRPOTrainer

from . import processes
from .errors import UserError


class CheckedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose reward functions must return usable numbers: else one message (UserError), before any step.

    `last_group` is the last batch that was generated for training: local "prompts", "completions", "ids" and "y_n" (L lists of
    ids for each), and for the rows of all processes "rewards" (one column a function) and "upsilon"; "y_n" and "upsilon" only
    where there are any.
    """

    last_group: dict[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        processes.refuse_lost()
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        names = ", ".join(self.reward_func_names)
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except Exception as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"reward_funcs: {names} failed with {cause}; return one number per completion, None where an answer cannot be "
                "scored"
            ) from error
        _refuse_unusable(rewards, self.reward_func_names)
        if self.model.training:
            self.last_group = dict(prompts=prompts, completions=completions, ids=completion_ids_list, rewards=rewards)
        return rewards


def refuse_unsupported(train_dataset: Any, processing_class: Any, kwargs: dict[str, Any]) -> None:
    for name in ("tools", "rollout_func", "environment_factory"):
        if kwargs.get(name):
            raise UserError(f"{name}: GCPO re-reads whole answers as text and does not support it; leave it out")
    if isinstance(processing_class, ProcessorMixin):
        raise UserError(
            f"processing_class: {type(processing_class).__name__} handles images, GCPO is text-only; pass a tokenizer"
        )
    columns = set(getattr(train_dataset, "column_names", None) or [])
    if columns & {"image", "images"}:
        raise UserError(f"train_dataset: column {sorted(columns & {'image', 'images'})[0]!r} found; GCPO is text-only")
    if columns and "prompt" not in columns:
        raise UserError(f"train_dataset: no column 'prompt' among {sorted(columns)}; rename the question's column")


def _refuse_unusable(rewards: Tensor, names: list[str]) -> None:
    for k, name in enumerate(names):
        if rewards[:, k].isinf().any():
            raise UserError(f"reward_funcs: {name} returned an infinite reward; return finite numbers, or None")
    if rewards.isnan().all():
        raise UserError(
            f"reward_funcs: {', '.join(names)} scored none of {len(rewards)} answers (all None or NaN); "
            "check the data set's answer column"
        )
