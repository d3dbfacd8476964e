"""GCPO on top of TRL's GRPO. Five methods of `trl.GRPOTrainer` are extended, none is copied:

* `_calculate_rewards`: keeps the candidates' token ids.
* `_generate_single_turn`: takes the features z_i of the candidates from the keys and values that sampling leaves behind.
* `_generate_and_score_completions`: steps 2-4 of the paper, while the group is still whole (TRL shuffles afterwards):
  integrated outputs, collider contexts, features; Υ is folded into the advantages, log π(y_i | x_{i,l}) is stored.
* `_get_per_token_logps_and_entropies`: remembers the live log-probabilities of the loss's own forward pass.
* `_compute_loss`: adds κ KL(π_θ ‖ π'_ref) to TRL's loss (Eq. 10). π(y_i | q) of Eq. 13 is what TRL has there anyway.

The equations themselves are in `loss.py`; the readable whole of the objective is `loss.gcpo_loss`. B local rows, n to a
group, L integrated outputs, M rollouts, T tokens, H features. Every process generates and reads equally often.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from .caches import has_standard_cache
from .checked import CheckedGRPOTrainer, refuse_unsupported
from .config import GCPOConfig
from .contexts import ContextBuilder
from .errors import UserError
from .generation import generate_behind_prefixes
from .loss import k3, projected_reference, projected_target, upsilon
from .metrics import upsilon_metrics
from .qlora import prepare_quantized
from .scoring import Ids, Reader, StateCapture, Trunks, attention_mask, eval_mode, has_dropout, padded, score, score_colliders

__all__ = ["GCPOConfig", "GCPOTrainer"]


class GCPOTrainer(CheckedGRPOTrainer):
    """Trains with Group Causal Policy Optimization; used exactly like `trl.GRPOTrainer`.

    Text-only prompts, plain or conversational. In evaluation nothing is integrated (Υ = 1, κ = 0). Metrics are logged
    under `gcpo/`; the README explains each.

    Raises:
        UserError: tools, images, environments or a `rollout_func`; a quantised model without trainable adapters; a
            model whose window cannot hold the contexts; a reward function that fails.
    """

    _tag_names = ["trl", "gcpo"]
    _name = "GCPO"

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: GCPOConfig | None = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if args is None:
            args = GCPOConfig(f"{model if isinstance(model, str) else 'model'}-GCPO".split("/")[-1])
        if not isinstance(args, GCPOConfig):
            raise UserError(f"args: got a {type(args).__name__}, pass a GCPOConfig (it takes every GRPOConfig option)")
        refuse_unsupported(train_dataset, processing_class, kwargs)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        prepare_quantized(self.model)
        self._contexts = ContextBuilder(
            self.processing_class, args.candidate_prefix, args.integration_suffix, args.context_max_tokens,
            strip=(*self.eos_token_ids, self._tokenizer.pad_token_id), chat=self.chat_template_kwargs,
        )  # fmt: skip
        self._window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._candidates: list[list[int]] = []
        self._rewards = torch.empty(0)
        self._sampled_states: Tensor | None = None  # z_i, where sampling has left them
        self._live_logps: Tensor | None = None
        self._extra_tokens = 0
        self._cache_is_standard = has_standard_cache(self.model)
        self._drops_out = has_dropout(self.model)
        self._reader = Reader(
            self._forward, self._tokenizer.pad_token_id, args.scoring_tokens, self.accelerator.device, args.feature_token,
            tuple(self.eos_token_ids), self._global_max,
        )  # fmt: skip
        if self._integrates:
            self._check_window()
            self._check_foreign()
            self._announce_cost()

    @property
    def _integrates(self) -> bool:
        """Whether a step needs features or contexts at all; without Υ and κ GCPO is GRPO and costs what GRPO costs."""
        return self.args.control != "constant" or self.args.kappa > 0

    @property
    def _reads_contexts(self) -> bool:
        """Whether the contexts x_{i,l} are needed: not for a target of z̄ alone, without κ."""
        return self.args.kappa > 0 or self.args.control not in ("constant", "centroid", "centroid_loo")

    def _check_window(self) -> None:
        shown = self.max_completion_length
        if self.args.context_max_tokens:
            shown = min(shown, self.args.context_max_tokens)
        needed = self.num_generations * shown + self.max_completion_length
        if self._window is not None and needed > self._window:
            raise UserError(
                f"context_max_tokens: a context may take {self.num_generations} candidates x {shown} tokens + "
                f"{self.max_completion_length} of the answer = {needed} tokens, and the model reads {self._window}; "
                "lower context_max_tokens, num_generations or max_completion_length"
            )

    def _check_foreign(self) -> None:
        per_step = self.args.per_device_train_batch_size * self.args.steps_per_generation * self.accelerator.num_processes
        if self.args.control == "foreign" and per_step < 2 * self.num_generations:
            raise UserError(
                f"control: 'foreign' takes y_n of another question, but a generation batch of {per_step} answers holds one "
                f"group of {self.num_generations}; raise per_device_train_batch_size"
            )

    def _announce_cost(self) -> None:
        args, n, L, M = self.args, self.num_generations, self.args.num_integrated, self.args.num_rollouts
        rolls = args.estimator == "rollout" and args.control not in ("constant", "centroid", "centroid_loo")
        if not (rolls and self.accelerator.is_main_process):
            return
        integrated = L if args.phi == "algorithm" else 1 + n + n * (L - 1)  # theorem: also n spare answers
        print(
            f"estimator 'rollout': per question {n} answers + {integrated} for the integrated outputs + {n}·{L}·{M} rollouts = "
            f"{n + integrated + n * L * M} generations (GRPO: {n}); estimator 'state' needs {n + integrated}",
            flush=True,
        )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._candidates = [list(ids) for ids in completion_ids_list]  # y_i, raw and unpadded, end-of-sequence included
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        weights = self.reward_weights.to(rewards.device)
        self._rewards = torch.where(rewards.isnan().all(1), torch.nan, (rewards * weights).nansum(1))  # (all rows,)
        return rewards

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        asks_states = self.model.training and self._integrates and self.args.feature_token == "last"
        if not asks_states or self._samples_plainly:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        written, self._sampled_states = self._generate_behind_prefixes(prompt_ids, self.max_completion_length, states=True)
        return written, None

    def _generate_and_score_completions(self, inputs):
        self._sampled_states = None
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output  # Υ = 1, κ = 0
        unscorable = self._rewards.isnan().float().mean().item()
        self._log_gcpo({"unscorable": unscorable})
        if self._integrates:
            started, self._extra_tokens = time.perf_counter(), 0
            with torch.no_grad(), eval_mode(self.model):
                self._integrate_and_project(inputs, output)
            seconds = time.perf_counter() - started
            self._log_gcpo({"extra_seconds": seconds, "extra_generated_tokens": float(self._extra_tokens)})
        if self.args.control == "constant":
            output["advantages"] = output["advantages"] * self.args.alpha  # B_i = α A_i
        return output

    def _integrate_and_project(self, inputs, output) -> None:
        """Steps 2-4 of the paper for the local rows."""
        mask = output["prompt_mask"].bool()
        q = [ids[seen].tolist() for ids, seen in zip(output["prompt_ids"], mask, strict=True)]
        z, Z = self._sampled_states, None
        if z is None or self._drops_out:  # dropout would be noise in the ratios of Eq. 13: both of its sides without it
            under_q = score(self._reader, q, self._candidates)  # z_i and log π(y_i | q)
            z = under_q.response_state
            if self._drops_out and self.args.kappa > 0:
                output["query_logps"] = self._as_completions(under_q.logps, output)
        if self._reads_contexts:
            Z = self._read_contexts(output, q, *self._collider_contexts([example["prompt"] for example in inputs], q))
        if self.args.control != "constant":
            self._fold_upsilon(output, z, Z)

    def _collider_contexts(self, prompts, q: list[Ids]) -> tuple[list[Ids], list[list[Ids]], Trunks | None, list[int]]:
        """Step 2: what the contexts x_{i,l} of each local candidate share, and their L ends, which show y_{n,l}.

        And the local groups' integration prompts, read once, for the sampling of y_n and for the contexts; by row.
        """
        n, L, rows = self.num_generations, self.args.num_integrated, self._rows(len(q))
        everything = gather_object(self._candidates)
        groups = [everything[row // n * n : row // n * n + n] for row in rows]  # a group may be split across processes
        orders = [self._order(row // n) for row in rows]
        places = [row % n for row in rows]
        trunk_of = [row // n - rows[0] // n for row in rows]
        firsts = [trunk_of.index(k) for k in range(trunk_of[-1] + 1)]  # a row of each local group
        whole = [self._contexts.integration(prompts[k], [groups[k][j] for j in orders[k]]) for k in firsts]
        trunks = None
        if self._cache_is_standard and self.args.scoring == "prefix":
            trunks = Trunks(self._reader, self.model, whole)
        whole = [whole[k] for k in trunk_of]
        if self.args.phi == "algorithm":
            written = self._one_each(whole, [place < L for place in places], trunks, trunk_of)
            y_n = [written[row // n * n : row // n * n + L] for row in self._foreign(rows, len(written))]
        else:  # y_{n,0} as observed, the others with a fresh y_i' in the place of y_i
            observed = self._one_each(whole, [place == 0 for place in places], trunks, trunk_of)
            spare = self._sample(q)
            replaced = [
                self._contexts.integration(prompt, [fresh if j == i else group[j] for j in order])
                for prompt, group, order, i, fresh in zip(prompts, groups, orders, places, spare, strict=True)
            ]
            others = self._sample([context for context in replaced for _ in range(L - 1)], self.args.integrated_max_tokens)
            first = [observed[row // n * n] for row in self._foreign(rows, len(observed))]
            y_n = [[one, *others[k * (L - 1) : (k + 1) * (L - 1)]] for k, one in enumerate(first)]
        self.last_group = {**self.last_group, "y_n": y_n}
        parts = [
            [self._contexts.parts(prompt, [group[j] for j in order if j != i], out) for out in outs]
            for prompt, group, order, i, outs in zip(prompts, groups, orders, places, y_n, strict=True)
        ]
        return [row[0][0] for row in parts], [[end for _, end in row] for row in parts], trunks, trunk_of

    def _rows(self, count: int) -> range:
        """Numbers of the local rows among those of all processes."""
        first = self.accelerator.process_index * count
        return range(first, first + count)

    def _foreign(self, rows: range, total: int) -> list[int]:
        """The rows whose y_n is used: their own, or for control "foreign" those of the next group."""
        shift = self.num_generations if self.args.control == "foreign" else 0
        return [(row + shift) % total for row in rows]

    def _order(self, group: int) -> list[int]:
        """In which order the candidates of this group are shown; the same on every process."""
        order = list(range(self.num_generations))
        if self.args.candidate_order == "shuffled":
            random.Random(f"{self.args.seed} {self.state.global_step} {group}").shuffle(order)
        return order

    def _one_each(self, contexts: list[Ids], wanted: list[bool], trunks: Trunks | None, trunk_of: list[int]) -> list[Ids]:
        """An integrated output for each wanted context, at its row in a list of all processes' rows (else empty)."""
        asked = [k for k, want in enumerate(wanted) if want]
        # A process that wants none still generates once: sharded models generate together or not at all.
        rows = asked or [0]
        behind = [trunk_of[k] for k in rows]
        written = self._sample([contexts[k] for k in rows], self.args.integrated_max_tokens, trunks, behind)
        local: list[Ids] = [[] for _ in contexts]
        for k, ids in zip(asked, written[: len(asked)], strict=True):
            local[k] = ids
        if asked:
            lengths = [float(len(ids)) for ids in written]
            self._log_gcpo({
                "integrated_length": sum(lengths) / len(lengths),
                "integrated_truncated": sum(ids[-1] not in self._contexts.strip for ids in written) / len(lengths),
            })  # fmt: skip
        return gather_object(local)

    def _read_contexts(self, output, q, prefixes, ends, trunks: Trunks | None, trunk_of: list[int]) -> Tensor | None:
        """Steps 3 and 4: log π(y_i | x_{i,l}) into the output; returns Z_{i,l,m} (B, L, M, H), M = 1 for estimator "state"."""
        L, M, reader = self.args.num_integrated, self.args.num_rollouts, self._reader
        states = None
        if self.args.kappa > 0 or self.args.estimator == "state":
            logps_x, states = score_colliders(
                reader, prefixes, ends, self._candidates, self.args.scoring, self.model, trunks, trunk_of
            )
        if self.args.kappa > 0:
            output["collider_logps"] = self._as_completions(logps_x, output)
            if self.args.kl_context == "collider":
                contexts = [prefix + row[0] for prefix, row in zip(prefixes, ends, strict=True)]
                ids, seen = padded(contexts, reader.pad_id, "left")
                output["collider_ids"], output["collider_mask"] = ids.to(reader.device), seen.to(reader.device)
        if self.args.control in ("constant", "centroid", "centroid_loo"):
            return None
        if self.args.estimator == "state":
            assert states is not None
            return states[:, :, None]
        x = [prefix + end for prefix, row in zip(prefixes, ends, strict=True) for end in row]
        rollouts = self._sample([context for context in x for _ in range(M)])
        read = score(reader, [ids for ids in q for _ in range(L * M)], rollouts)
        return read.response_state.view(len(q), L, M, -1)

    def _fold_upsilon(self, output, z: Tensor, Z: Tensor | None) -> None:
        """B_i = A_i · Υ_i (Eq. 11), for whole groups, then back to the local rows; and what Υ did, in numbers."""
        n, rows = self.num_generations, self._rows(len(z))
        z = self.accelerator.gather(z)  # (all rows, H)
        if Z is not None:
            Z = self.accelerator.gather(Z.mean(2, keepdim=True))  # only the mean over M enters; (all rows, L, 1, H)
        upsilons = torch.cat([
            self._group_upsilon(z[s : s + n], None if Z is None else Z[s : s + n], s // n) for s in range(0, len(z), n)
        ])  # fmt: skip
        self.last_group = {**self.last_group, "upsilon": upsilons}
        output["advantages"] = output["advantages"] * upsilons[rows.start : rows.stop].to(output["advantages"])
        lengths = torch.tensor([float(len(ids)) for ids in gather_object(self._candidates)], device=z.device)
        self._log_gcpo(upsilon_metrics(upsilons, z, Z, self._rewards.to(z.device), lengths, n))

    def _group_upsilon(self, z: Tensor, Z: Tensor | None, group: int) -> Tensor:
        """Υ (n,) of one group, z (n, H), Z (n, L, 1, H), by the chosen target or control."""
        args, n = self.args, len(z)
        if args.control == "centroid":
            target = z.mean(0, keepdim=True).expand_as(z)  # z̄
        elif args.control == "centroid_loo":
            target = (z.sum(0, keepdim=True) - z) / (n - 1)  # z̄_{−i}
        else:
            assert Z is not None
            target = projected_target(z, Z)
        upsilons = upsilon(z, target, args.alpha, args.similarity, args.upsilon_map)
        if args.control == "permuted":
            order = list(range(n))
            random.Random(f"permuted {args.seed} {self.state.global_step} {group}").shuffle(order)
            upsilons = upsilons[order]
        return upsilons

    def _as_completions(self, logps: Tensor, output) -> Tensor:
        """(…, T) -> (…, C): TRL may pad the answers further (pad_to_multiple_of); the padding is masked out of the loss."""
        return torch.nn.functional.pad(logps, (0, output["completion_ids"].size(1) - logps.size(-1)))

    @property
    def _samples_plainly(self) -> bool:
        """Whether responses come from TRL's own sampling alone: another engine, or a cache that can't be repeated."""
        return self.use_vllm or self.use_transformers_continuous_batching or not self._cache_is_standard

    def _sample(
        self, contexts: list[Ids], max_tokens: int = 0, trunks: Trunks | None = None, trunk_of: Sequence[int] = ()
    ) -> list[Ids]:
        """One response from the policy to each context, of at most `max_tokens` (0: max_completion_length)."""
        longest, limit = max(map(len, contexts)), max_tokens or self.max_completion_length
        if self._window is not None and longest + limit > self._window:
            raise UserError(
                f"context_max_tokens: a context of {longest} tokens + {limit} of the answer exceeds the model's window of "
                f"{self._window}; show less of each candidate (context_max_tokens) or use shorter prompts"
            )
        size = self.args.per_device_train_batch_size * self.args.steps_per_generation
        written: list[Ids] = []
        for start in range(0, len(contexts), size):
            part = contexts[start : start + size]
            if self._samples_plainly:
                written += self._plain_generate(part, limit)
            else:
                written += self._generate_behind_prefixes(part, limit, trunks, trunk_of[start : start + size])[0]
        self._extra_tokens += sum(map(len, written))
        return written

    def _plain_generate(self, contexts: list[Ids], limit: int) -> list[Ids]:
        return [ids[:limit] for ids in super()._generate_single_turn(contexts, None, {}, 1)[0]]

    def _generate_behind_prefixes(
        self, contexts: list[Ids], limit: int, trunks: Trunks | None = None, trunk_of: Sequence[int] = (), states: bool = False
    ):
        args = self.args
        with (
            unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, gather_deepspeed3_params=args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs, gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):  # fmt: skip
            return generate_behind_prefixes(
                self._reader, model, contexts, limit, self.generation_config, trunks, trunk_of, states
            )

    def _forward(self, ids: Tensor, seen: Tensor, positions: Tensor, cache: Any, width: int) -> tuple[Tensor, Tensor]:
        """How the policy is read: `Reader.forward` through TRL's fused head. The temperature is in it; no logits are kept."""
        labels = ids.masked_fill(seen[:, -ids.shape[1] :] == 0, -100)
        labels[:, :-width] = -100
        with self.accelerator.autocast(), StateCapture(self.model) as capture:
            logps = self.model(
                input_ids=ids, attention_mask=attention_mask(self.model, seen, ids.shape[1]), position_ids=positions,
                past_key_values=cache, labels=labels, fused_lm_head=True,
            ).log_probs  # fmt: skip
            assert capture.states is not None
            return logps[:, -width:], capture.states

    def _global_max(self, width: int) -> int:
        """The same on every process, so that all make equally many passes."""
        return int(self.accelerator.gather(torch.tensor([width], device=self.accelerator.device)).max())

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._live_logps = result[0]
        return result

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        logps, self._live_logps = self._live_logps, None
        if "collider_logps" not in inputs:
            return loss
        mask = inputs["completion_mask"].bool()
        # log π(y_i | q) of the policy that wrote y_i. TRL keeps it where the policy may have changed since.
        logps_q = inputs.get("query_logps", inputs.get("old_per_token_logps", logps)).detach()
        logps_q = logps_q.masked_fill(~mask, 0.0)
        log_ref, low, high = projected_reference(inputs["collider_logps"], logps_q, mask, self.args.eq13_reduction)  # Eq. 13
        counts = self.accelerator.reduce(torch.stack([low, high, torch.ones_like(low)]) * mask.sum(), "sum")
        low, high = counts[:2] / counts[2].clamp(min=1)  # of the tokens of all processes
        self._log_gcpo({"clamped_low": low.item(), "clamped_high": high.item()})
        if "collider_ids" in inputs:  # Eq. 12 as printed: π_θ(y_i | x_i)
            ids = torch.cat([inputs["collider_ids"], inputs["completion_ids"]], 1)
            seen = torch.cat([inputs["collider_mask"], inputs["completion_mask"]], 1)
            logps = GRPOTrainer._get_per_token_logps_and_entropies(self, model, ids, seen, mask.shape[1])[0]
        reference = torch.where(mask, log_ref, logps.detach())
        kl = torch.where(mask, k3(logps, reference), 0.0)  # Eq. 12, (B, C)
        term = (kl.sum(1) / mask.sum(1).clamp(min=1)).mean()
        self._log_gcpo({"kl": self.accelerator.gather(term.detach()).mean().item()})
        return loss + self.args.kappa * term / self.current_gradient_accumulation_steps

    def _log_gcpo(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics["train"][f"gcpo/{name}"].append(value)
