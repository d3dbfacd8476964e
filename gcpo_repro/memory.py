"""How much memory a training needs, estimated from the sizes of the model and the settings before anything is loaded.

What stays (weights, adapters, optimiser) is counted; of the phases of a step (generation, contexts, loss) the largest is added.
d, f: hidden and MLP width, q and kv: widths of queries and of keys; e: bytes of a stored number, c: of one in a layer's work.
The activations of a layer were read off with `saved_tensors_hooks` (tests/test_memory.py does so again); peaks on a CPU are
compared with the estimates by tests/benchmarks/memory.py. On CUDA nothing was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from .architecture import Architecture
from .settings import Settings

NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # double quantisation (arXiv 2305.14314, §3)
INT8_BYTES = 1.0
ADAM_BYTES, FLOAT_BYTES = 8, 4  # two moments in float32
HEAD_TOKENS, HEAD_VOCAB = 4096, 32_768  # tile of TRL's head: TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE
HEAD_COPIES = {"forward": 5, "backward": 8}  # tiles that its CPU code holds at once
SCORING_TOKENS = 16_384  # GCPOConfig.scoring_tokens
# On a CPU, glibc keeps freed blocks of up to 32 MB between those in use: the peaks measured are 1.09 to 1.42 times the
# tensors alive, from run to run, and equal to them (1.01) where MALLOC_MMAP_THRESHOLD_=65536 hands every block back.
HEAP = 1.25
INSTRUCTION = 24  # tokens of the text around the candidates
LIBRARIES = {"cpu": 0.6e9, "cuda": 1.5e9}  # CPU: measured RSS after a step; CUDA: context, workspaces, fragments: a guess


@dataclass(frozen=True)
class Load:
    """What one process works on, in rows and tokens.

    Args:
        rows: answers that it generates at a time; batch: those of a forward pass with gradients; group: n.
        prompt, answer: tokens of a question and of the longest answer.
        shown: of each candidate in a context; ending: of an integrated output there.
        contexts: L; 0 where none are read. rollouts: M where they are sampled, else 0.
    """

    rows: int
    batch: int
    group: int
    prompt: int
    answer: int
    shown: int
    ending: int
    contexts: int
    rollouts: int

    @property
    def integration(self) -> int:
        """Tokens that an integrated output is written behind."""
        return self.prompt + self.group * (self.shown + 1) + INSTRUCTION

    @property
    def collider(self) -> int:
        """Tokens of a context x_{i,l}."""
        return self.prompt + (self.group - 1) * (self.shown + 1) + self.ending + INSTRUCTION


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device: what stays for the whole training, and what each phase of a step adds for a while."""

    stays: dict[str, float]
    phases: dict[str, float]

    @property
    def step(self) -> float:
        """What the first steps add to a loaded trainer: gradients, the optimiser's moments, their largest phase."""
        largest = max(size for name, size in self.phases.items() if name != "evaluation")
        return self.stays["gradients"] + self.stays["optimiser"] + largest

    @property
    def total(self) -> float:
        return sum(self.stays.values()) + max(self.phases.values())


def load(settings: Settings, prompt_tokens: int, processes: int = 1) -> Load:
    """The work of one of `processes` processes; with several methods that of the costliest, which is GCPO."""
    s = settings
    integrates = "gcpo" in s.methods and (s.control != "constant" or s.kappa > 0)
    reads = integrates and (s.kappa > 0 or s.control not in ("centroid", "centroid_loo"))
    shown = min(s.max_completion_length, s.context_max_tokens or s.max_completion_length)
    return Load(
        s.batch_size // processes, s.device_batch_size, s.group_size, prompt_tokens, s.max_completion_length, shown,
        min(shown, s.integrated_max_tokens or shown), (s.num_integrated or s.group_size) if reads else 0,
        (s.num_rollouts or s.group_size) if reads and s.estimator == "rollout" else 0,
    )  # fmt: skip


def estimate(
    settings: Settings, shape: Architecture, prompt_tokens: int, cuda: bool, weights_bytes: int = 4, compute_bytes: int = 4,
    processes: int = 1, shards: int = 1,
) -> Estimate:  # fmt: skip
    """The memory of one arm on one device.

    Args:
        settings, shape: of the training and its model.
        prompt_tokens: the longest prompt.
        cuda: on CUDA, where TRL's head works in one tile, or on a CPU.
        weights_bytes, compute_bytes: of a weight as stored and in a layer's work (`qlora.choose_precision`).
        processes: that share the batch; shards: over which weights, gradients and moments are divided (FSDP, ZeRO-3).
    """
    work = load(settings, prompt_tokens, processes)
    stays = resident(settings, shape, cuda, weights_bytes, compute_bytes, shards)
    e, c = weights_bytes, compute_bytes
    tested = min(settings.eval_batch_size, settings.eval_questions * settings.eval_samples)
    phases = {
        "generation": _generation(shape, work.prompt, work.answer, work.rows, e, settings.use_vllm),
        "evaluation": _generation(shape, work.prompt, work.answer, tested, e, False),
    }
    if work.contexts:
        phases["contexts"] = _contexts(shape, work, cuda, e, c)
        groups = -(-work.rows // work.group)
        phases["integration"] = _generation(
            shape, work.integration, work.answer, min(work.rows, groups * work.contexts), e, settings.use_vllm
        )
    if work.rollouts:
        phases["rollouts"] = _generation(shape, work.collider, work.answer, work.rows, e, settings.use_vllm)
    phases["loss"] = _loss(settings, shape, work, cuda, e, c)
    return Estimate(stays, {name: size * (1 if cuda else HEAP) for name, size in phases.items()})


def resident(
    settings: Settings, shape: Architecture, cuda: bool, e: int, c: int, shards: int = 1
) -> dict[str, float]:  # fmt: skip
    """Bytes that stay: the libraries, the weights, a second copy of them as π_ref where no adapter can be switched off, what is
    trained, its gradients and Adam's moments."""
    full = settings.lora_rank == 0
    weights = {"nf4": NF4_BYTES, "int8": INT8_BYTES}.get(settings.quantization, e) * shape.linear
    weights += e * (shape.parameters - shape.linear)
    trained = shape.parameters if full else settings.lora_rank * shape.lora_per_rank
    cast = c * shape.parameters / shards if full and c < e else 0.0  # autocast keeps the weights of a pass in its format, too
    return {
        "libraries": LIBRARIES["cuda" if cuda else "cpu"],
        "weights": weights / shards,
        "reference": weights / shards if full and settings.beta > 0 else 0.0,
        "adapters": 0.0 if full else FLOAT_BYTES * trained,
        "weights in compute format": cast,
        "gradients": FLOAT_BYTES * trained / shards,
        "optimiser": ADAM_BYTES * trained / shards,
    }


def kv_bytes(shape: Architecture, e: int) -> int:
    """Keys and values of one token in every layer."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * e


def activation_bytes(shape: Architecture, rank: int, width: int, e: int, c: int) -> float:
    """What one token in one layer keeps for the backward pass, in a row of `width` tokens.

    The norms keep their input (and with trained weights their output) in float32, attention q, k, v (repeated for every
    head) and its output, the MLP gate, its activation, up and their product, LoRA its input and what A makes of it. Where
    layers compute in fewer bits, each of them casts and keeps an input of its own. And the mask's row.
    """
    d, q, f = shape.hidden, shape.heads * shape.head_dim, shape.mlp
    mixed, full = c < FLOAT_BYTES, rank == 0
    if mixed and full:
        numbers = c * (5 * d + 4 * q + 4 * f) + FLOAT_BYTES * 4 * d
    elif mixed:
        numbers = c * (5 * d + 5 * q + 4 * f + 7 * rank) + FLOAT_BYTES * 2 * d
    else:
        numbers = e * ((6 if full else 4) * d + 4 * q + 4 * f + 7 * rank)
    return numbers + c * width + FLOAT_BYTES * (shape.heads + 2)


def _reading(shape: Architecture, rows: int, new: int, width: int, e: int) -> float:
    """What reading `new` tokens in rows of `width` holds at once without gradients: one layer's work and the mask."""
    d, q, f = shape.hidden, shape.heads * shape.head_dim, shape.mlp
    layer = max(2 * d + 3 * f, 2 * d + 4 * q) * new + 2 * q * width
    return rows * (layer * e + new * width * (1 + e))


def _head(shape: Architecture, tokens: int, way: str, cuda: bool, c: int) -> float:
    """TRL's fused head: tiles of the logits, several on a CPU."""
    tile = min(tokens, HEAD_TOKENS) * min(shape.vocab, HEAD_VOCAB)
    return tile * c if cuda else tile * FLOAT_BYTES * HEAD_COPIES[way]


def _generation(shape: Architecture, context: int, answer: int, rows: int, e: int, vllm: bool) -> float:
    if vllm:
        return 0.0  # in vLLM's own memory
    width = context + answer
    one_layer = rows * width * kv_bytes(shape, e) / shape.layers  # the cache grows by copying, layer by layer
    logits = 4 * rows * shape.vocab * FLOAT_BYTES  # sampling: logits, probabilities, their order
    return rows * width * kv_bytes(shape, e) + max(one_layer + logits, _reading(shape, rows, context, context, e))


def _contexts(shape: Architecture, work: Load, cuda: bool, e: int, c: int) -> float:
    groups, width = -(-work.rows // work.group), work.collider + work.answer
    trunks = groups * work.integration * kv_bytes(shape, e)
    rows = min(work.rows, max(1, SCORING_TOKENS // width))
    new = work.ending + work.answer + INSTRUCTION // 2
    states = work.contexts * rows * new * shape.hidden * e
    cache = rows * width * kv_bytes(shape, e) * (1 + 1 / shape.layers)
    return trunks + cache + states + max(_reading(shape, rows, new, width, e), _head(shape, rows * new, "forward", cuda, c))


def _loss(settings: Settings, shape: Architecture, work: Load, cuda: bool, e: int, c: int) -> float:
    width = (work.collider if settings.kl_context == "collider" and work.contexts else work.prompt) + work.answer
    tokens = work.batch * width
    layer = activation_bytes(shape, settings.lora_rank, width, e, c)
    head = _head(shape, tokens, "backward", cuda, c) + 2 * tokens * shape.hidden * FLOAT_BYTES
    if not settings.gradient_checkpointing:
        return tokens * shape.layers * layer + head
    kept = tokens * shape.layers * shape.hidden * e  # each layer's input; one layer is computed again at a time
    return kept + max(head, 1.5 * tokens * layer)
