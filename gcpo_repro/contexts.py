"""What the policy is shown besides the question: the integration prompt and the collider contexts x_{i,l}.

Token ids are concatenated, never decoded and tokenised again, so a candidate is read exactly as it was written.

    integration prompt       q  [sep_1] y_0  [sep_2] y_1 …  [sep_n] y_{n-1}  [end]        -> y_n     (paper, step 2)
    collider context x_{i,l} q  [sep_1] y_0 … (without y_i) …  [sep_n] y_{n,l}  [end]     -> y_i     (paper, step 3)

One template serves both: y_{n,l} takes the last place, so that contexts of one i share their prefix. With a plain
prompt everything follows the question; in a conversation it is appended to the last user message:

    >>> builder = ContextBuilder(tokenizer, "\\n\\nCandidate {k}:\\n", "\\n\\nFinal answer:\\n")
    >>> builder.integration("1+1=?", [[17, 4], [9]])  # ids of "1+1=?\\n\\nCandidate 1:\\n", 17, 4, ids of …
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import UserError

Prompt = str | list[dict[str, Any]]
Ids = list[int]

# Ours: the paper does not print the prompt that asks for the integrated output.
CANDIDATE_PREFIX = "\n\nCandidate answer {k}:\n"
INTEGRATION_SUFFIX = "\n\nCompare the candidate answers and write one final answer to the question above.\n"

_HERE = "\u2402candidates\u2403"  # stands where the candidates go while a chat template is rendered


class ContextBuilder:
    """Builds contexts as lists of token ids.

    Args:
        tokenizer: the policy's tokenizer.
        candidate_prefix: text before each candidate; `{k}` becomes its number, counted from 1.
        integration_suffix: text after the last candidate.
        max_tokens: keep only the last `max_tokens` tokens of each candidate (its conclusion); 0 keeps all.
        strip: token ids taken off a candidate's end before it is shown (end-of-sequence, padding).
        chat: further arguments for `apply_chat_template`.

    Raises:
        UserError: a template that the tokenizer cannot write, such as words for the toy policy, which knows digits.
    """

    def __init__(
        self,
        tokenizer: Any,
        candidate_prefix: str = CANDIDATE_PREFIX,
        integration_suffix: str = INTEGRATION_SUFFIX,
        max_tokens: int = 0,
        strip: Sequence[int] = (),
        chat: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.candidate_prefix = candidate_prefix
        self.integration_suffix = integration_suffix
        self.max_tokens = max_tokens
        self.strip = frozenset(strip)
        self.chat = chat or {}
        self._kept: tuple[dict[str, Ids], dict[str, Ids]] = ({}, {})  # without and with special tokens
        first_prefix = candidate_prefix.replace("{k}", "1")
        for name, text in (("candidate_prefix", first_prefix), ("integration_suffix", integration_suffix)):
            read = tokenizer.decode(self._tokens(text))
            if "".join(read.split()) != "".join(text.split()):  # some tokenizers change white space
                raise UserError(f"{name}: the tokenizer reads {text!r} as {read!r}; use text that it knows")

    def integration(self, prompt: Prompt, candidates: Sequence[Ids]) -> Ids:
        """Question and all candidates: what the policy reads before it writes the integrated output y_n."""
        if not candidates:
            return sum(self._split(prompt), [])
        prefix, end = self.parts(prompt, candidates[:-1], candidates[-1])
        return prefix + end

    def collider(self, prompt: Prompt, candidates: Sequence[Ids], i: int, y_n: Ids) -> Ids:
        """x_{i,l}: the question, every candidate except y_i, and the integrated output y_{n,l} in the last place."""
        prefix, end = self.parts(prompt, [*candidates[:i], *candidates[i + 1 :]], y_n)
        return prefix + end

    def parts(self, prompt: Prompt, others: Sequence[Ids], last: Ids) -> tuple[Ids, Ids]:
        """A context in two parts: what the contexts of one candidate share, and `last` with all that follows; neither is empty.

        Their concatenation shows `others`, then `last`, each behind its numbered prefix.
        """
        head, tail = self._split(prompt)
        prefix = list(head)
        for k, candidate in enumerate(others, start=1):
            prefix += self._tokens(self.candidate_prefix.replace("{k}", str(k))) + self._shown(candidate)
        prefix += self._tokens(self.candidate_prefix.replace("{k}", str(len(others) + 1)))
        end = self._shown(last) + tail
        return (prefix, end) if end else (prefix[:-1], prefix[-1:])

    def _shown(self, candidate: Ids) -> Ids:
        end = len(candidate)
        while end and candidate[end - 1] in self.strip:
            end -= 1
        return list(candidate[max(0, end - self.max_tokens) if self.max_tokens else 0 : end])

    def _tokens(self, text: str, special: bool = False) -> Ids:
        """The same few texts stand in every context: kept, for tokenizing took a tenth of GCPO's own time."""
        if text not in self._kept[special]:
            if len(self._kept[special]) >= 4096:
                self._kept[special].clear()
            ids = self.tokenizer(text, add_special_tokens=special)["input_ids"] if text or special else []
            self._kept[special][text] = list(ids)
        return self._kept[special][text]

    def _split(self, prompt: Prompt) -> tuple[Ids, Ids]:
        """Token ids before the first candidate and after the last one."""
        if isinstance(prompt, str):
            return self._tokens(prompt, special=True), self._tokens(self.integration_suffix)
        last = max((k for k, message in enumerate(prompt) if message["role"] == "user"), default=None)
        if last is None:
            raise UserError(f"prompt: no message has the role 'user', got {[m['role'] for m in prompt]}; add one")
        if not isinstance(prompt[last]["content"], str):
            raise UserError("prompt: a message's content must be text; images and content blocks are not supported")
        messages = [dict(message) for message in prompt]
        messages[last]["content"] += _HERE
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.chat
        )
        parts = text.split(_HERE)
        if len(parts) != 2:
            raise UserError(
                f"processing_class: its chat template shows the last user message {len(parts) - 1} times; "
                "GCPO needs it exactly once to place the candidates, use another chat_template"
            )
        return self._tokens(parts[0]), self._tokens(self.integration_suffix + parts[1])
