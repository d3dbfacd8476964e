"""Models that answer: identified, so that no other takes their place in a resumed evaluation, and run by transformers or vLLM."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from .. import toy
from ..errors import UserError
from ..qlora import load_policy
from .sampling import end_ids, respond

Written = list[tuple[list[int], bool]]  # for each context the token ids of a response, and whether it was cut off
Writer = Callable[[list[list[int]], int, int], Written]  # contexts, most tokens of a response, seed
REMEDY = "check the name, the network and, for gated models, your access; or give a local folder"
WEIGHTS_AND_SETTINGS = {".json", ".safetensors", ".bin", ".model", ".jinja"}


@dataclass(frozen=True)
class Model:
    """A model by its source, a Hub id or folder, its adapter's, and what tells both from others of the same name.

    `revision` is the Hub's commit or None, `files` a hash of a folder's files or None; `window` the longest text in tokens.
    """

    source: str
    adapter: str | None = None
    revision: str | None = None
    files: str | None = None
    adapter_revision: str | None = None
    adapter_files: str | None = None
    window: int | None = None


def identify(model: str | Path, adapter: str | Path | None = None) -> Model:
    """The model of that name: "toy", a Hub id or a folder. Raises UserError: not found, or an adapter alone."""
    source = str(toy.POLICY if str(model) == "toy" else model)
    folder = Path(source)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UserError(f"model: {source!r} is an adapter; give the model that it was trained on, and this as adapter")
    if adapter is not None and Path(adapter).exists() and not (Path(adapter) / "adapter_config.json").exists():
        raise UserError(f"adapter: {str(adapter)!r} holds no adapter_config.json; give the folder that the training saved")
    revision = None if folder.is_dir() else _commit("model", source, "config.json")
    config = _loaded(AutoConfig, source, "configuration", revision=revision)
    found = Model(
        source, revision=revision, files=_folder_hash(folder),
        window=getattr(config.get_text_config(), "max_position_embeddings", None),
    )  # fmt: skip
    if adapter is None:
        return found
    commit = None if Path(adapter).is_dir() else _commit("adapter", str(adapter), "adapter_config.json")
    return replace(found, adapter=str(adapter), adapter_revision=commit, adapter_files=_folder_hash(Path(adapter)))


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer, padding on the left."""
    tokenizer = _loaded(AutoTokenizer, model.source, "tokenizer", padding_side="left", revision=model.revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def transformers_writer(model: Model, temperature: float, top_p: float) -> Writer:
    """Batches through transformers, on CUDA if there is one. Only these two settings shape the draw: penalties and the like that
    a model's own generation_config.json brings are left out."""
    policy, tokenizer, _ = load_policy(model.source, "none", None, revision=model.revision)
    base: Any = policy
    base.generation_config = GenerationConfig(eos_token_id=end_ids(base, tokenizer), pad_token_id=tokenizer.pad_token_id)
    if model.adapter is not None:
        try:
            policy = PeftModel.from_pretrained(base, model.adapter, revision=model.adapter_revision)
        except Exception as error:
            raise UserError(f"adapter: {model.adapter!r} could not be put on {model.source!r} ({_first_line(error)})") from error
    ends = set(end_ids(base, tokenizer))

    def write(contexts: list[list[int]], max_tokens: int, seed: int) -> Written:
        try:
            responses = respond(policy, tokenizer, contexts, max_tokens, seed, temperature, len(contexts), top_p)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"batch_size: {len(contexts)} answers of up to {max_tokens} tokens do not fit into memory; go on in the same "
                f"folder with {max(len(contexts) // 2, 1)}"
            ) from error
        return [(ids, ids[-1] not in ends) for ids in responses]

    return write


def vllm_writer(model: Model, temperature: float, top_p: float) -> Writer:
    """Batches through vLLM, each request with a seed of its own. Untested: the project's machines have no GPU."""
    require_backend("vllm")
    vllm: Any = importlib.import_module("vllm")
    lora_request: Any = importlib.import_module("vllm.lora.request")
    engine = vllm.LLM(model.source, revision=model.revision, enable_lora=model.adapter is not None)
    lora = None if model.adapter is None else lora_request.LoRARequest("adapter", 1, model.adapter)

    def write(contexts: list[list[int]], max_tokens: int, seed: int) -> Written:
        draws = [
            vllm.SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=(seed + k) % 2**63)
            for k in range(len(contexts))
        ]
        prompts = [{"prompt_token_ids": ids} for ids in contexts]
        outputs = [request.outputs[0] for request in engine.generate(prompts, draws, lora_request=lora, use_tqdm=False)]
        return [(list(output.token_ids), output.finish_reason == "length") for output in outputs]

    return write


WRITERS = {"transformers": transformers_writer, "vllm": vllm_writer}


def require_backend(backend: str) -> None:
    """Raise UserError where the backend is not installed."""
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError('backend: vllm is not installed; pip install "gcpo-repro[vllm]", or use backend transformers')


def _folder_hash(folder: Path) -> str | None:
    """Of names, sizes, and each file's first and last MiB: tells two trained models apart, in little time. None: no folder."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in WEIGHTS_AND_SETTINGS and p.is_file()):
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{path.name} {size} ".encode() + file.read(2**20))
            file.seek(max(size - 2**20, 0))
            digest.update(file.read())
    return digest.hexdigest()


def _commit(what: str, source: str, file: str) -> str:
    """The commit of a Hub repository, from where the client keeps its file."""
    try:
        return Path(hf_hub_download(source, file)).parent.name
    except Exception as error:  # no such folder or repository, no network, no access
        raise UserError(
            f"{what}: {source!r} is no folder, and not to be had from the Hub ({_first_line(error)}); {REMEDY}"
        ) from error


def _loaded(kind: Any, source: str, what: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(source, **{key: value for key, value in options.items() if value is not None})
    except Exception as error:
        raise UserError(f"model: the {what} of {source!r} could not be loaded ({_first_line(error)}); {REMEDY}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
