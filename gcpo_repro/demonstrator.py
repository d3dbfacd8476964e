"""The teacher of the toy policy: a demonstrator that errs on purpose, and the batches drawn from it.

Shapes: B questions, n candidates, K = 3 steps, 10 digits. A *fact* is (operation, value, digit), 200 in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import toy

K = len(toy.STEPS)


@dataclass(frozen=True)
class Recipe:
    """Every choice that shapes the policy; shares are of the steps."""

    steps: int = 1000
    grow_share: float = 0.5  # at first up to 3 candidates, growing to 8 over this share
    random_until: float = 0.75  # integration examples with random candidates: all at first, none from here
    check_share: float = 0.15  # a start that does not follow random candidates by then is given up
    attempts: int = 4
    nf4_share: float = 0.1  # the last steps, with weights rounded to NF4
    learning_rate: float = 2e-3  # warm-up of 40 steps, then half a cosine
    tokens: int = 3000  # of integration examples in a step, beside 48 plain ones
    hidden: int = 128
    mlp: int = 256
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    hard_share: float = 0.3  # of the 200 facts (operation, value, digit)
    right_hard: float = 0.5  # the demonstrator's probability of the right digit on a hard fact
    right_easy: float = 0.94
    distractor: float = 0.8  # share of a fact's errors that falls on one digit of its own
    right_weight: float = 6.0  # of a right candidate's vote in integration


class Demonstrator:
    """Writes responses that err systematically: some facts are hard, and most errors on a fact are the same error."""

    def __init__(self, recipe: Recipe, generator: torch.Generator):
        self.recipe, self.generator = recipe, generator
        sign = torch.tensor([1, -1])[:, None, None]
        self.right = (torch.arange(10)[None, :, None] + sign * torch.arange(10)) % 10  # (operation, value, digit)
        order = torch.rand(20, 10, generator=generator).argsort(1)  # as many hard facts for each value
        hard = (order < round(10 * recipe.hard_share)).view(2, 10, 10)
        right = torch.where(hard, recipe.right_hard, recipe.right_easy)[..., None]
        wrong = (self.right + torch.randint(1, 10, (2, 10, 10), generator=generator)) % 10
        law = ((1 - right) * (1 - recipe.distractor) / 8).repeat(1, 1, 1, 10)
        law.scatter_(-1, wrong[..., None], (1 - right) * recipe.distractor)
        self.law = law.scatter_(-1, self.right[..., None], right)  # (2, 10, 10, 10): P(next value | fact)

    def _draw(self, probabilities: Tensor) -> Tensor:
        flat = torch.multinomial(probabilities.reshape(-1, 10), 1, generator=self.generator)
        return flat.view(probabilities.shape[:-1])

    def answer(self, facts: Tensor, start: Tensor, n: int, noise: Tensor) -> Tensor:
        """n responses to each question: digits (B, n, K). facts (B, K, 2), start (B,), noise (B,): share of chance."""
        value, digits = start[:, None].expand(-1, n), []
        for k in range(K):
            law = self.law[facts[:, k, 0, None], value, facts[:, k, 1, None]]
            value = self._draw(law * (1 - noise[:, None, None]) + noise[:, None, None] / 10)
            digits.append(value)
        return torch.stack(digits, -1)

    def laws(self, facts: Tensor, start: Tensor, digits: Tensor) -> Tensor:
        """The law of every digit given the one before it: digits (B, n, K) -> (B, n, K, 10)."""
        before = torch.cat([start[:, None, None].expand(-1, digits.shape[1], 1), digits[..., :-1]], -1)
        return self.law[facts[:, None, :, 0], before, facts[:, None, :, 1]]

    def integrate(self, facts: Tensor, start: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
        """One response to n candidates, (B, n, K) -> digits (B, K) and their law (B, K, 10).

        At each step the candidates that stand at the response's own value vote, right ones with more weight; so
        candidates that are right in different places can be combined into a right response.
        """
        value, chosen, laws = start, [], []
        for k in range(K):
            same = torch.ones_like(digits[:, :, 0]) if k == 0 else digits[:, :, k - 1] == value[:, None]
            right = digits[:, :, k] == self.right[facts[:, k, 0], value, facts[:, k, 1]][:, None]
            votes = same * torch.where(right, self.recipe.right_weight, 1.0)
            law = torch.zeros(len(value), 10).scatter_add_(1, digits[:, :, k], votes)
            laws.append(law / law.sum(1, keepdim=True))
            value = self._draw(laws[-1])
            chosen.append(value)
        return torch.stack(chosen, -1), torch.stack(laws, 1)


class Examples:
    """Batches of token ids with the laws of their digits, drawn from the train split only."""

    def __init__(self, recipe: Recipe, generator: torch.Generator):
        self.generator, self.demonstrator = generator, Demonstrator(recipe, generator)
        tokenizer = toy.build_tokenizer()
        self.questions = tokenizer(list(toy.pool("train")), return_tensors="pt").input_ids.to(torch.uint8)
        single = tokenizer.convert_tokens_to_ids
        self.zero, self.plus, self.eos = single("0"), single("+"), tokenizer.eos_token_id
        self.names = torch.tensor(single(list(toy.STEPS)))
        self.bar, self.bang = single(toy.CANDIDATE_SEPARATOR), single(toy.INTEGRATION_SUFFIX)

    def _text(self, digits: Tensor) -> Tensor:
        """Digits (..., K) -> ids of the response without EOS (..., 2K)."""
        return torch.stack([self.names.expand(digits.shape), digits + self.zero], -1).flatten(-2)

    def batch(self, n: int, rows: int, random_share: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """ids (rows, length), law of the response (rows, K, 10), laws of the candidates (rows, n, K, 10) or None."""
        rand = lambda *shape: torch.rand(*shape, generator=self.generator)  # noqa: E731
        question = self.questions[torch.randint(len(self.questions), (rows,), generator=self.generator)].long()
        start = question[:, 0] - self.zero
        facts = torch.stack([question[:, 2:-1:3] - self.plus, question[:, 3:-1:3] - self.zero], -1)  # (rows, K, 2)
        if n == 0:
            digits = self.demonstrator.answer(facts, start, 1, torch.zeros(rows))
            law = self.demonstrator.laws(facts, start, digits)
            return torch.cat([question, self._text(digits[:, 0])], 1), law[:, 0], None
        noise = (0.7 + 0.3 * rand(rows)) * (rand(rows) < random_share)
        candidates = self.demonstrator.answer(facts, start, n, noise)
        digits, law = self.demonstrator.integrate(facts, start, candidates)
        shown = torch.cat([torch.full((rows, n, 1), self.bar), self._text(candidates)], -1).flatten(1)
        ids = torch.cat([question, shown, torch.full((rows, 1), self.bang), self._text(digits)], 1)
        return ids, law, self.demonstrator.laws(facts, start, candidates)

    def loss(self, model: nn.Module, n: int, rows: int, random_share: float) -> Tensor:
        """Cross-entropy of the response's digits (to the law), names and EOS, and of the candidates' digits."""
        ids, law, candidate_laws = self.batch(n, rows, random_share)
        logps = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        response = logps[:, -2 * K - 1 :]  # predicts name, digit, name, digit ... EOS
        fixed = torch.cat([self.names, torch.tensor([self.eos])]).expand(rows, -1)
        total = self._cross_entropy(law, response[:, 1::2]) - response[:, ::2].gather(-1, fixed[..., None]).mean()
        if candidate_laws is None:
            return total
        first = self.questions.shape[1]
        blocks = logps[:, first : first + n * (2 * K + 1)].view(rows, n, 2 * K + 1, -1)
        return 2 * total + self._cross_entropy(candidate_laws, blocks[:, :, 1::2])

    @torch.no_grad()
    def lost(self, model: nn.Module, rows: int = 200) -> float:
        """How badly the policy follows 3 random candidates after the first step, in nats (mean KL per digit)."""
        ids, law, _ = self.batch(3, rows, random_share=1.0)
        logps = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[:, -2 * K :: 2]
        entropy = -torch.special.entr(law[:, 1:]).sum(-1).mean()
        return (entropy - (law[:, 1:] * logps[:, 1:, self.zero : self.zero + 10]).sum(-1).mean()).item()

    def _cross_entropy(self, law: Tensor, logps: Tensor) -> Tensor:
        return -K * (law * logps[..., self.zero : self.zero + 10]).sum(-1).mean()
