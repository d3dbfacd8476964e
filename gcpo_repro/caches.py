"""Keys and values of what the policy has read: a cache that is cropped and gone on from many times, at little cost."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def has_standard_cache(model: Any) -> bool:
    """Whether keys and values of every layer grow by one per token and can be cropped (no sliding windows, no recurrence)."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def roomy_cache(model: Any, room: int) -> DynamicCache:
    """A cache with space for `room` tokens more than are first written: new ones are written behind the old ones.

    transformers' own cache copies all keys and values for each token; with 1,000 tokens of context that was a third of the
    time of decoding.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer(room) for _ in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):
    """`keys` and `values` (N, heads, S, features) are views of the first S places of larger tensors."""

    keys: Tensor
    values: Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.space: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        old, new = (self.keys, self.values), (key_states, value_states)
        # Inherited methods (repeating, selecting rows) put other tensors in the place of the views.
        fits = self.space and all(
            space.shape[2] >= after and (before == 0 or space.data_ptr() == held.data_ptr())
            and space.shape[0] == fresh.shape[0] for space, held, fresh in zip(self.space, old, new, strict=True)
        )  # fmt: skip
        if not fits:
            size = after + (self.room if before == 0 else max(self.room, after // 4))
            self.space = [fresh.new_empty(*fresh.shape[:2], size, fresh.shape[3]) for fresh in new]
            if before:
                for space, held in zip(self.space, old, strict=True):
                    space[:, :, :before] = held
        for space, fresh in zip(self.space, new, strict=True):
            space[:, :, before:after] = fresh
        self.keys, self.values = (space[:, :, :after] for space in self.space)
        return self.keys, self.values
