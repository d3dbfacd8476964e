"""Loading and training quantised policies: what is trainable, what the traps would do, what bad input says."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, Qwen2ForCausalLM

from gcpo_repro import GCPOTrainer, LoraSettings, UserError, arm, load_policy, qlora
from gcpo_repro.qlora import choose_device, choose_precision, prepare_quantized
from tests.test_trainer import make


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_loads_trains_and_reports_its_size(tiny_folder, tmp_path, quantization, capsys):
    model, tokenizer, peft_config = load_policy(tiny_folder, quantization, LoraSettings(r=4, alpha=8))
    printed, weights = capsys.readouterr().out, model.get_memory_footprint()
    adapted = get_peft_model(model, peft_config)
    trainable, total = adapted.get_nb_trainable_parameters()
    full = Qwen2ForCausalLM.from_pretrained(tiny_folder).num_parameters()
    assert f"{trainable:,} trainable of {full + trainable:,} parameters" in printed and quantization in printed
    assert f"{weights / 1e6:,.1f} MB weights" in printed
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id is not None
    # 2 layers; attention q, k, v, o and MLP gate, up, down: rank 4 on both sides of each
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 64), (64, 64), (64, 64)]
    assert trainable == 2 * sum(4 * (a + b) for a, b in widths)


def test_no_adapters_means_every_weight(tiny_folder, capsys):
    model, _, peft_config = load_policy(tiny_folder, "none", lora=None)
    assert peft_config is None and all(p.requires_grad for p in model.parameters())
    assert "(100.00%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"quantization": "nf3"}, "quantization: 'nf3' is unknown, choose one of nf4, int8, none"),
        ({"lora": None}, "lora: None with quantization='nf4' leaves nothing to train"),
        ({"dtype": "half"}, "dtype: 'half' is unknown"),
        ({"device": "tpu?"}, "device: 'tpu\\?' is not a device"),
        ({"lora": LoraSettings(r=0)}, "r = 0"),
    ],
)
def test_bad_arguments(tiny_folder, arguments, message):
    with pytest.raises(UserError, match=message):
        load_policy(tiny_folder, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_where_there_is_none(tiny_folder):
    with pytest.raises(UserError, match="sees no CUDA device; use 'auto' or 'cpu'"):
        load_policy(tiny_folder, device="cuda")


def test_missing_and_corrupt_models(tiny_folder, tmp_path):
    for path in (tmp_path / "nowhere", "runs/x/policy", "./policy", "~/policy"):  # before the Hub explains its ids' grammar
        with pytest.raises(UserError, match="^model: '.*': no such folder: check the path"):
            load_policy(path)
    with pytest.raises(UserError, match="check the name, the network"):
        load_policy("nobody/no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder holds nothing"):
        load_policy(tmp_path / "empty")
    torn = tmp_path / "torn"
    shutil.copytree(tiny_folder, torn)
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="could not be loaded .*needs config.json, the tokenizer and whole"):
        load_policy(torn)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match="could not be loaded"):
        load_policy(broken)


def gradients(model, ids):
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_survive_an_evaluation(tiny_folder):
    """bitsandbytes 0.50 repacks 4-bit weights at the first forward in evaluation mode; see `prepare_quantized`."""
    model, _, peft_config = load_policy(tiny_folder, "nf4", LoraSettings(r=4))
    peft_config.init_lora_weights = False
    model = get_peft_model(model, peft_config)
    ids = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    before = gradients(model, ids)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients(model, ids)
    assert before.keys() == after.keys() and min(g.abs().max() for g in before.values()) > 0
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, msg=name)


def test_the_switch_reaches_every_quantised_layer(tiny_folder):
    model, _, _ = load_policy(tiny_folder, "nf4")
    switches = [m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(switches) == 14 and not any(switches)


def test_adapters_move_at_the_papers_learning_rate(tiny_folder, tmp_path):
    """In bfloat16 an update of 1e-6 to a weight of 0.01 rounds to nothing; TRL casts QLoRA adapters to it."""

    from tests.test_trainer import PROMPTS, digits

    model, tokenizer, peft_config = load_policy(tiny_folder, "nf4", LoraSettings(r=4))
    peft_config.init_lora_weights = False  # so that no weight is zero, where bfloat16 is fine as well
    config = make(tiny_folder, tmp_path, learning_rate=1e-6, max_steps=1).args
    from datasets import Dataset

    trainer = GCPOTrainer(
        model, digits, config, Dataset.from_dict({"prompt": PROMPTS}), processing_class=tokenizer, peft_config=peft_config
    )
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in trainable.items()}
    trainer.train()
    moved = [name for name in before if (trainable[name] != before[name]).any()]
    assert len(moved) == len(before)
    lost = [name for name in before if (trainable[name].bfloat16() == before[name].bfloat16()).float().mean() > 0.9]
    assert len(lost) == len(before)  # the same step would have vanished


def test_quantised_without_trainable_adapters_is_refused(tiny_folder, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from tests.test_trainer import PROMPTS, digits

    quantised = AutoModelForCausalLM.from_pretrained(
        tiny_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    _, tokenizer, peft_config = load_policy(tiny_folder, "none")
    adapted = get_peft_model(quantised, peft_config)
    adapted.save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(adapted.unload(), tmp_path / "adapter")  # is_trainable defaults to False
    with pytest.raises(UserError, match="no trainable adapter, so nothing would be trained"):
        prepare_quantized(frozen)
    config = make(tiny_folder, tmp_path, beta=0.0).args
    with pytest.raises(UserError, match="no trainable adapter"):
        GCPOTrainer(frozen, digits, config, Dataset.from_dict({"prompt": PROMPTS}), processing_class=tokenizer)


def test_revision_and_config_reach_the_loader(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    model, _, _ = load_policy(str(tiny_folder), "none", dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model.config.hidden_size == config["hidden_size"]


# Number formats


def on(monkeypatch, kind):
    """As if on a T4, an A100, an Apple machine or a CPU."""
    cuda = kind in ("t4", "a100")
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    # A T4 says yes where emulation counts: the question must exclude it.
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: kind == "a100" or including_emulation)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: kind == "mps")
    assert qlora.hardware_has_bf16() == (kind == "a100")


@pytest.mark.parametrize(
    "kind, adapters, weights, compute, reason",
    [
        ("cpu", True, torch.float32, torch.float32, "CPU"),
        ("a100", True, torch.bfloat16, torch.bfloat16, "has units for it"),
        ("t4", True, torch.float16, torch.float16, "has none for bfloat16"),
        ("a100", False, torch.float32, torch.bfloat16, "small updates need float32"),
        ("t4", False, torch.float32, torch.float16, "small updates need float32"),
        ("mps", True, torch.float32, torch.float32, "CPU"),
    ],
)
def test_precision_follows_the_hardware_and_says_why(monkeypatch, kind, adapters, weights, compute, reason):
    on(monkeypatch, kind)
    found = choose_precision("auto", choose_device("auto"), adapters)
    assert (found.weights, found.compute) == (weights, compute) and reason in found.reason
    assert ("with loss scaling" in str(found)) == (compute == torch.float16)
    names = [str(dtype).removeprefix("torch.") for dtype in (weights, compute)]
    assert str(found).startswith(f"precision: {names[0]} weights, computed in {names[1]}")


def test_precision_as_asked_for(monkeypatch):
    assert choose_precision("bfloat16", "cpu").weights == torch.bfloat16
    with pytest.raises(UserError, match="'float16' needs loss scaling, which works on CUDA alone, not on a CPU"):
        choose_precision("float16", "cpu")
    on(monkeypatch, "t4")
    assert choose_precision("float32", "cuda").compute == torch.float32


def test_mps_degrades_with_a_message(monkeypatch, capsys):
    on(monkeypatch, "mps")
    assert choose_device("auto").type == "cpu" and "MPS is there, but untested" in capsys.readouterr().out
    assert choose_device("mps", "nf4").type == "cpu" and "does not train nf4 weights on MPS" in capsys.readouterr().out
    assert choose_device("mps", "none").type == "mps" and capsys.readouterr().out == ""
    on(monkeypatch, "cpu")
    with pytest.raises(UserError, match="torch sees no MPS device"):
        choose_device("mps")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantised_layers_and_the_others_have_one_format(tiny_folder, quantization, dtype, capsys):
    model, _, peft_config = load_policy(tiny_folder, quantization, LoraSettings(r=4), str(dtype).removeprefix("torch."))
    assert "precision: " in capsys.readouterr().out
    adapted = get_peft_model(model, peft_config)
    prepare_quantized(adapted)
    frozen = {p.dtype for p in adapted.parameters() if not p.requires_grad}
    assert frozen - {torch.uint8} == {dtype}
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    layers = [m for m in adapted.modules() if hasattr(m, "compute_dtype")]
    assert {layer.compute_dtype for layer in layers} == ({dtype} if quantization == "nf4" else set())


@pytest.mark.parametrize("kind, expected", [("t4", (False, True)), ("a100", (True, False)), ("cpu", (False, False))])
@pytest.mark.parametrize("rank", [0, 16])
def test_the_trainer_scales_losses_where_it_computes_in_float16(monkeypatch, tmp_path, kind, expected, rank):
    from types import SimpleNamespace

    from gcpo_repro.settings import arm_settings, make_settings

    on(monkeypatch, kind)
    asked = {}
    monkeypatch.setattr(arm, "GCPOConfig", lambda **options: asked.update(options))
    settings = arm_settings(make_settings({"lora_rank": rank, "quantization": "none"}), "gcpo", 0)
    device = torch.device("cpu" if kind == "cpu" else "cuda")
    arm.trainer_config(settings, tmp_path, SimpleNamespace(device=device, dtype=torch.float32))
    assert (asked["bf16"], asked["fp16"]) == expected and asked["use_cpu"] == (kind == "cpu")


def test_known_noise_is_silenced_and_nothing_else(tiny_folder):
    """In a process of its own: the messages come at the first import."""
    import subprocess
    import sys

    code = (
        "import logging, warnings; from click.testing import CliRunner; from gcpo_repro import cli; "
        "CliRunner().invoke(cli.main, ['runs', '/nowhere']); log = logging.getLogger('bitsandbytes.backends.cpu.ops'); "
        "log.warning('Failed to load CPU gemm_4bit_forward from x'); log.warning('kept line'); "
        "warnings.warn('`gradient_checkpointing` is deprecated', FutureWarning); warnings.warn('kept warning', FutureWarning)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "kept line" in done.stderr and "kept warning" in done.stderr
    assert "gemm_4bit" not in done.stderr and "gradient_checkpointing" not in done.stderr
