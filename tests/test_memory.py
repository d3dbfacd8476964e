"""The memory estimate against transformers' own counts, tensors that autograd really saves, and measured peaks (slow)."""

import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config, Qwen2ForCausalLM

from gcpo_repro import LoraSettings, UserError, arm, cli, load_policy, plan
from gcpo_repro.architecture import _KNOWN, architecture, known, stored_bytes
from gcpo_repro.memory import activation_bytes, estimate, kv_bytes, resident
from gcpo_repro.qlora import prepare_quantized
from gcpo_repro.settings import arm_settings, load_settings, make_settings

PROFILES = Path(__file__).parents[1] / "notebooks/profiles"
TOTALS = {  # as the models' pages on the Hub count their safetensors
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
}

# The model's sizes


@pytest.mark.parametrize("model", TOTALS)
def test_known_models_have_their_published_size(model):
    assert known(model).parameters == TOTALS[model]


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-0.5B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"])
def test_the_arithmetic_is_transformers_own(model):
    d, layers, heads, kv_heads, mlp, vocab, window, tied = _KNOWN[model]
    config = Qwen2Config(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=mlp,
        vocab_size=vocab, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        real = Qwen2ForCausalLM(config)
        real.tie_weights()
        total = real.num_parameters()
        linear = [m for m in real.model.modules() if isinstance(m, torch.nn.Linear)]
        adapted = get_peft_model(real, LoraSettings(r=3).peft_config())
    found = known(model)
    assert found.parameters == total and found.linear == sum(m.weight.numel() for m in linear)
    assert 3 * found.lora_per_rank == adapted.get_nb_trainable_parameters()[0]


def test_a_folders_sizes_are_those_of_its_model(tiny_folder):
    model = Qwen2ForCausalLM.from_pretrained(tiny_folder)
    found = architecture(str(tiny_folder))
    assert found.parameters == model.num_parameters()
    assert (found.hidden, found.layers, found.heads, found.kv_heads, found.window) == (64, 2, 4, 2, 512)
    assert stored_bytes(str(tiny_folder)) == (tiny_folder / "model.safetensors").stat().st_size
    assert stored_bytes("nobody/none") == 0 and architecture("toy").layers == 3


def test_unknown_models_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="no such folder: check the path"):
        architecture(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="model: 'runs/x/policy': no such folder"):
        architecture("runs/x/policy")
    with pytest.raises(UserError, match="the configuration of 'nobody/none' cannot be read"):
        architecture("nobody/none")


# The parts of the estimate


def saved_bytes(model, inputs, mixed):
    """Bytes that autograd keeps for the tokens, each storage once; other sizes than multiples of their number are weights."""
    tokens, kept, alive = inputs["input_ids"].numel(), {}, []

    def keep(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.nbytes() % tokens == 0:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        model(**inputs, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("rank, mixed", [(16, False), (0, False), (16, True), (0, True)])
def test_activations_are_those_that_autograd_keeps(rank, mixed):
    """Two depths, so that what is there once (embeddings, final norm, rotary angles) drops out."""
    rows, width, found = 31, 47, []  # primes, which divide no weight's size
    base = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=192, vocab_size=64)
    torch.manual_seed(0)
    for layers in (1, 3):
        model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, **base))
        if rank:
            model = get_peft_model(model.bfloat16() if mixed else model, LoraSettings(r=rank).peft_config())
        ids = torch.randint(3, 60, (rows, width))
        mask = torch.ones_like(ids)
        mask[0, :5] = 0  # padding: without any, no mask is made
        body = (model.get_base_model() if rank else model).model.train()
        found.append(saved_bytes(body, {"input_ids": ids, "attention_mask": mask}, mixed))
    shape = dataclasses.replace(known("Qwen/Qwen2.5-0.5B-Instruct"), hidden=64, heads=4, kv_heads=2, head_dim=16, mlp=192)
    expected = activation_bytes(shape, rank, width, 2 if rank and mixed else 4, 2 if mixed else 4) * rows * width * 2
    assert expected == pytest.approx(found[1] - found[0], rel=0.03)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_weights_take_what_the_loaded_model_takes(tmp_path, quantization):
    torch.manual_seed(0)  # wide enough for the quantisation's own constants to be small
    config = Qwen2Config(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512, vocab_size=64,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    from transformers import BitsAndBytesConfig

    how = {"nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)}
    how["int8"] = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=how.get(quantization), device_map={"": "cpu"}
    )
    settings = make_settings({"quantization": quantization})
    expected = resident(settings, architecture(str(tmp_path)), False, 4, 4)["weights"]
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    constants = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)  # not in the footprint
    assert (constants > 0) == (quantization == "nf4")
    assert expected == pytest.approx(model.get_memory_footprint() + constants, rel=0.01)


def test_optimiser_and_cache_take_what_they_hold(tiny_folder):
    model, _, peft_config = load_policy(tiny_folder, "nf4", LoraSettings(r=4))
    model = get_peft_model(model, peft_config)
    prepare_quantized(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    ids = torch.randint(3, 40, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = sum(p.grad.nbytes for p in trained)
    optimiser.step()
    moments = sum(v.nbytes for state in optimiser.state.values() for name, v in state.items() if name != "step")
    shape = architecture(str(tiny_folder))
    stays = resident(make_settings({"lora_rank": 4}), shape, False, 4, 4)
    assert (stays["adapters"], stays["gradients"], stays["optimiser"]) == (gradients, gradients, moments)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    assert kv_bytes(shape, 4) * ids.numel() == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_what_costs_memory_and_what_saves_it():
    shape = known("Qwen/Qwen2.5-1.5B-Instruct")

    def total(cuda=True, e=2, **changes):
        base = {"batch_size": 64, "device_batch_size": 16, "max_completion_length": 512, "group_size": 8, "methods": ["gcpo"]}
        return estimate(make_settings(base | changes), shape, 256, cuda, e, 2)

    usual = total()
    assert total(gradient_checkpointing=True).phases["loss"] < usual.phases["loss"] / 4
    assert total(device_batch_size=8).phases["loss"] == pytest.approx(usual.phases["loss"] / 2, rel=0.05)
    assert total(context_max_tokens=64).phases["integration"] < usual.phases["integration"] / 2
    assert total(estimator="rollout").phases["rollouts"] > usual.phases["generation"]
    assert set(total(methods=["grpo"]).phases) == {"generation", "evaluation", "loss"}
    whole = total(quantization="none", lora_rank=0, e=4)
    assert whole.stays["reference"] == whole.stays["weights"] == 4 * shape.parameters  # π_ref is a second model then
    assert whole.stays["optimiser"] == 8 * shape.parameters
    halves = estimate(make_settings({"quantization": "none", "lora_rank": 0}), shape, 256, True, 4, 2, processes=2, shards=2)
    assert halves.stays["optimiser"] == 4 * shape.parameters


# The plan


def dry_run(*arguments):
    return CliRunner().invoke(cli.main, ["train", "--dry-run", *map(str, arguments)])


@pytest.mark.parametrize(
    "profile, gigabytes, processes", [("t4", 15.5, 1), ("gpu24", 23.5, 1), ("gpu80", 79, 1), ("paper", 79, 8)]
)
def test_each_profile_fits_the_device_it_is_made_for(profile, gigabytes, processes):
    config = PROFILES / profile / "05_train_qlora.yaml"
    done = dry_run("--config", config, "--device-gb", gigabytes, "--processes", processes)
    assert done.exit_code == 0, done.output
    for part in ("model", "precision", "data", "arms", "step", "tokens", "memory", "disk", "machine"):
        assert sum(line.startswith(f"{part} ") for line in done.stdout.splitlines()) == 1, part
    for item in ("weights", "gradients", "optimiser", "evaluation", "contexts", "loss"):
        assert f"{item} " in done.stdout, item


def test_what_does_not_fit_is_refused_with_the_profile_that_does(tmp_path):
    done = dry_run("--config", PROFILES / "gpu80/05_train_qlora.yaml", "--device-gb", 16, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "model      Qwen/Qwen2.5-7B-Instruct: 7.62 G parameters" in done.stdout
    assert "Error: memory: about" in done.stderr and "profile t4 fits" in done.stderr
    assert not (tmp_path / "out").exists()
    assert plan.fitting_profile(plan.Machine("cpu", "CPU", 1e12, 1e12)) == "profile cpu"
    assert plan.fitting_profile(plan.Machine("cuda", "H200", 150e9, 150e9)) == "profile gpu80"


def test_effective_batch_and_tokens_are_told(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model: toy\nmethods: [gcpo]\nseeds: [1]\ngroup_size: 4\nmore: [batch_size=32, device_batch_size=8]\n")
    said = dry_run("--config", config).stdout
    assert "32 answers = 8 questions x 4; 8 in a forward pass, accumulated x 4" in said
    assert "a step writes at most 768 (answers), 768 (integrated outputs)" in said  # 32 x 24 and 8 x 4 x 24
    assert "gcpo x seeds 1; 1 at a time; 40 steps" in said
    assert "--device-gb and --processes plan" in CliRunner().invoke(
        cli.main, ["train", "--config", str(config), "--device-gb", "9"]
    ).stderr  # fmt: skip


def test_training_is_refused_before_the_model_is_loaded(monkeypatch, tmp_path):
    small = plan.Machine("cpu", "CPU", 4e8, 3e8)
    monkeypatch.setattr(plan, "this_machine", lambda settings: small)
    monkeypatch.setattr(arm, "load_policy", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"memory: about 0\.\d GB are needed, and CPU has 0\.3 GB free; profile cpu fits"):
        arm.train(arm_settings(load_settings(PROFILES / "smoke/05_train_qlora.yaml"), "gcpo", 0), tmp_path)


def test_a_full_disk_is_told_before_a_download(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1e5))
    monkeypatch.setattr(plan, "this_machine", lambda settings: plan.Machine("cuda", "T4", 16e9, 15.5e9))
    settings = load_settings(PROFILES / "t4/05_train_qlora.yaml")
    monkeypatch.setattr(plan, "stored_bytes", lambda model: 0)
    assert "disk: the download take about 1.0 GB" in plan.make_plan(settings, tmp_path).problem
    monkeypatch.setattr(plan, "stored_bytes", lambda model: 10**9)
    assert "disk: the results take" in plan.make_plan(settings, tmp_path / "a/b").problem


def test_a_containers_limit_counts(monkeypatch):
    held = {"/sys/fs/cgroup/memory.max": 2e9, "/sys/fs/cgroup/memory.current": 1.5e9}
    monkeypatch.setattr(plan, "_number", held.get)
    found = plan.this_machine(make_settings({"device": "cpu"}))
    assert (found.total, found.free) == (2e9, 0.5e9)


def test_quantised_weights_cannot_all_be_trained(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("more: [lora_rank=0]\n")
    assert "lora_rank: 0 trains every weight, which quantization = 'nf4' freezes" in dry_run("--config", config).stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
@pytest.mark.parametrize("case", ["5M-none", "5M-nf4", "40M-none", "40M-nf4", "150M-none", "150M-nf4", "40M-none-checkpointing"])
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(case):
    from tests.benchmarks.memory import measured_apart

    found = measured_apart(case)
    assert found["weights_estimated_mb"] == pytest.approx(found["weights_mb"], rel=0.02)
    assert found["ratio"] == pytest.approx(1, abs=0.2), found
