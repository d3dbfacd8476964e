"""An exported policy is the trained one: same logits through plain transformers, no network, a card with the run's numbers."""

import json
import re
import socket

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from gcpo_repro import UserError, cli, experiment, toy
from gcpo_repro import export as exporting
from gcpo_repro.evaluation.stats import pass_at_1
from gcpo_repro.qlora import prepare_quantized
from gcpo_repro.settings import arm_settings, load_settings, make_settings

TINY = {
    "methods": ["gcpo"], "seeds": [3], "steps": 2, "eval_questions": 4, "eval_samples": 2, "eval_every": 0, "learning_rate": 1e-2,
    "batch_size": 8, "device_batch_size": 8, "train_questions": 16, "device": "cpu", "report_to": [], "workers": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """Trained folders by kind of weights, each made once."""
    made = {}

    def arm(kind="nf4"):
        if kind not in made:
            full = {"lora_rank": 0, "quantization": "none", "learning_rate": 1e-4}
            changes = full if kind == "full" else {"quantization": kind}
            made[kind] = tmp_path_factory.mktemp("arm") / "gcpo-seed3"
            experiment.run_arm(arm_settings(make_settings(TINY | changes), "gcpo", 3), made[kind])
        return made[kind]

    return arm


@pytest.fixture
def no_network(monkeypatch):
    def connect(*arguments):
        raise AssertionError(f"network: {arguments[1:]}")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


def texts():
    tokenizer = AutoTokenizer.from_pretrained(toy.POLICY, padding_side="left")
    rows = toy.questions("held_out", 16, seed=5)
    return tokenizer([row["prompt"] + "8a1b" for row in rows], return_tensors="pt", padding=True)


def logits(model):
    batch = texts()
    with torch.no_grad():
        return model.eval()(**batch).logits.float()[batch["attention_mask"].bool()]


def trained(folder):
    record = json.loads((folder / "results.json").read_text())
    return logits(exporting.load_trained(make_settings(record["config"]), folder / "policy")[0])


def test_an_adapter_gives_the_trained_logits(arms, tmp_path, no_network):
    found = exporting.export(arms(), tmp_path / "x")
    assert found == {"kind": "adapter", "difference": None}
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "x", quantization_config=four, dtype=torch.float32)
    prepare_quantized(plain, adapters=False)  # as in training, without bitsandbytes' bfloat16 kernel
    assert torch.equal(logits(plain), trained(arms()))
    fast = AutoModelForCausalLM.from_pretrained(tmp_path / "x", quantization_config=four, dtype=torch.float32)
    assert (logits(fast) - logits(plain)).abs().max() < 0.5  # with that kernel, where the processor has it
    untrained = AutoModelForCausalLM.from_pretrained(toy.POLICY, quantization_config=four)
    assert (logits(untrained) - logits(plain)).abs().max() > 0.1, "two steps at this rate must show"
    names = {path.name for path in (tmp_path / "x").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "generation_config.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    assert load_settings(tmp_path / "x/training.yaml").seeds == (3,)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_merged_model_is_the_trained_policy_up_to_rounding(arms, tmp_path, no_network, quantization):
    found = exporting.export(arms(quantization), tmp_path / "exact", merge=True, dtype="float32")["difference"]
    limit = 1e-3 if quantization == "nf4" else 0.5  # int8 layers round their inputs too, which no merged model repeats
    assert found["largest"] < limit and found["same_choice"] > 0.98
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype=torch.float32)
    assert (logits(plain) - trained(arms(quantization))).abs().max() < 2 * limit
    rounded = exporting.export(arms(quantization), tmp_path / "short", merge=True)["difference"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "short").dtype == torch.bfloat16
    assert found["largest"] < rounded["largest"] < 1
    said = (tmp_path / "short/README.md").read_text()
    assert f"differ by at most {rounded['largest']:.2g}" in said and f"KL {rounded['kl']:.2g} nats" in said


def test_merging_takes_the_rounded_weights_not_the_ones_before(arms, tmp_path):
    """Adding the adapter to the unquantised base gives another policy: that difference is what the export avoids."""
    exporting.export(arms(), tmp_path / "x", merge=True, dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(toy.POLICY, dtype=torch.float32)
    careless = PeftModel.from_pretrained(base, arms() / "policy").merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    expected = trained(arms())
    assert (logits(careless) - expected).abs().max() > 20 * (logits(ours) - expected).abs().max()


@pytest.mark.parametrize("kind", ["none", "full"])
def test_unquantised_policies_come_out_exactly(arms, tmp_path, no_network, kind):
    found = exporting.export(arms(kind), tmp_path / "x", merge=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    if kind == "full":
        assert found == {"kind": "whole", "difference": None}
        expected = logits(AutoModelForCausalLM.from_pretrained(arms(kind) / "policy", dtype=torch.float32))
        assert torch.equal(logits(plain), expected)
    else:
        assert found["difference"]["largest"] < 1e-4
        assert (logits(plain) - trained(arms(kind))).abs().max() < 1e-4


def test_it_answers_a_question(arms, tmp_path):
    exporting.export(arms(), tmp_path / "x", merge=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert GenerationConfig.from_pretrained(tmp_path / "x").eos_token_id == tokenizer.eos_token_id
    question = toy.questions("held_out", 1, seed=0)[0]["prompt"]
    ids = tokenizer(question, return_tensors="pt")
    answer = model.generate(**ids, do_sample=False, max_new_tokens=toy.RESPONSE_LENGTH)[0, ids["input_ids"].shape[1] :]
    assert re.fullmatch(r"(\da\db\dc|[\dabc])+\d?", tokenizer.decode(answer, skip_special_tokens=True).replace(" ", ""))


def test_the_card_states_the_runs_own_numbers(arms, tmp_path):
    exporting.export(arms(), tmp_path / "x")
    card, record = (tmp_path / "x/README.md").read_text(), json.loads((arms() / "results.json").read_text())
    for evaluation in record["evaluations"]:
        counts = evaluation["counts"]
        found = pass_at_1(counts["correct"], counts["samples"], method="wilson")
        row = f"| {evaluation['step']} | {100 * found.mean:.1f} | {100 * found.low:.1f} to {100 * found.high:.1f} |"
        assert row in card
    for text in ("library_name: peft", "bnb_4bit_compute_dtype=torch.float32", "| learning_rate | 0.01 |", record["commit"]):
        assert text in card, text


def test_what_is_refused(arms, tmp_path):
    with pytest.raises(UserError, match="holds no finished training"):
        exporting.export(tmp_path, tmp_path / "x")
    (tmp_path / "results.json").write_text(json.dumps({"kind": "experiment", "arms": [{"method": "gcpo", "seed": 3}]}))
    with pytest.raises(UserError, match="holds 1 arms; name one of its folders: gcpo-seed3"):
        exporting.export(tmp_path, tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is there and not empty"):
        exporting.export(arms(), tmp_path / "full")
    with pytest.raises(UserError, match="dtype: 'half' is unknown"):
        exporting.export(arms(), tmp_path / "x", dtype="half")
    assert not (tmp_path / "x").exists()


def test_a_failure_leaves_nothing_behind(arms, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exporting.export(arms(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_command_uploads_only_when_told(arms, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, **options):
            calls.append((name, options["private"]))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, folder_path))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    run = lambda *more: CliRunner().invoke(cli.main, ["export", "--run", str(arms()), *map(str, more)])  # noqa: E731
    assert run("--to", tmp_path / "a").stdout.endswith(f"adapter: {tmp_path / 'a'}\n") and calls == []
    assert "uploaded: https://hub/me/mine" in run("--to", tmp_path / "b", "--push", "me/mine").stdout
    assert calls == [("me/mine", True), ("me/mine", str(tmp_path / "b"))]
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: 1 / 0)
    assert "push: 'me/mine' refused (division by zero)" in run("--to", tmp_path / "c", "--push", "me/mine").stderr
