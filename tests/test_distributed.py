"""Two processes give what one gives: loss, gradient norm, Υ, weights, for every method and option that groups matter to.

Generation is replaced by answers that depend only on their place in the batch, so that one process and two see the same. The
cases run twice: here, and in one launched script (`python -m tests.test_distributed`), because each process pays for its imports.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from click.testing import CliRunner
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from gcpo_repro import GCPOConfig, GCPOTrainer, LoraSettings, UserError, cli, processes, toy
from gcpo_repro.baselines import OPTIONS, GVPOConfig, GVPOTrainer
from gcpo_repro.checked import CheckedGRPOTrainer

ROOT = Path(__file__).parents[1]
ROWS, LONGEST = 8, 6  # answers in a generated batch of all processes; tokens of an answer
PROMPTS = [f"{a}+{b}=?" for a in (1, 22, 333) for b in (4, 5)]
TOLERANCE = 1e-5


def digits(completions, **kwargs):
    return [float(sum(character in "0123456789" for character in text)) for text in completions]


def gaps(completions, **kwargs):
    return [None if value % 2 else value for value in digits(completions)]


def gaps_or_constant(completions, prompts, **kwargs):
    return [1.0 if prompt.endswith("4=?") else value for prompt, value in zip(prompts, gaps(completions), strict=True)]


def by_place(completions, **kwargs):
    first = len(completions) if not processes.is_main() else 0
    return [float((first + k) % 3) for k in range(len(completions))]


def fails_on_one_process(completions, **kwargs):
    if not processes.is_main():
        raise RuntimeError("this process cannot grade")
    return digits(completions)


TRAINERS = {"gcpo": GCPOTrainer, "gvpo": GVPOTrainer, "grpo": CheckedGRPOTrainer, "dr_grpo": CheckedGRPOTrainer}
# name: (method, options); n = 8 is one group, which two processes share 4 + 4. Reward and quantization are ours, not TRL's.
CASES = {
    "one group": ("gcpo", {"num_generations": 8}),
    "two groups, iterations": ("gcpo", {"num_iterations": 2, "max_steps": 4, "epsilon": 0.05}),
    "accumulation 4": ("gcpo", {"num_generations": 8, "gradient_accumulation_steps": 4}),
    "truncated": ("gcpo", {"num_generations": 8, "mask_truncated_completions": True}),
    "unscorable, no variance": ("gcpo", {"reward": gaps_or_constant}),
    "gvpo, iterations": ("gvpo", {"num_generations": 8, "num_iterations": 2, "max_steps": 4, "learning_rate": 0.01}),
    "evaluation": ("gcpo", {"evaluate": True, "max_steps": 1}),
    # real generation: top_k = 1 leaves nothing to chance
    "greedy": (
        "gcpo", {"sampled": True, "top_k": 1, "estimator": "rollout", "num_rollouts": 1, "num_generations": 8, "reward": by_place}
    ),
}
MORE = {
    "accumulation 2": ("gcpo", {"num_generations": 8, "gradient_accumulation_steps": 2}),
    "whole model": ("gcpo", {"num_generations": 8, "lora": False}),
    "nf4": ("gcpo", {"num_generations": 8, "quantization": "nf4"}),
    "rollout": ("gcpo", {"num_generations": 8, "estimator": "rollout", "num_rollouts": 2, "num_integrated": 2}),
    "theorem": ("gcpo", {"phi": "theorem"}),
    "foreign": ("gcpo", {"control": "foreign", "num_integrated": 2}),
    "permuted": ("gcpo", {"control": "permuted", "num_generations": 8}),
    "centroid": ("gcpo", {"control": "centroid_loo", "kappa": 0.0, "num_generations": 8}),
    "constant": ("gcpo", {"control": "constant", "num_generations": 8}),
    "collider KL, shuffled": ("gcpo", {"kl_context": "collider", "candidate_order": "shuffled", "num_generations": 8}),
    "short contexts": ("gcpo", {"context_max_tokens": 2, "integrated_max_tokens": 2, "num_integrated": 2}),
    "small passes": ("gcpo", {"scoring_tokens": 40, "num_generations": 8}),
    "checkpointing": ("gcpo", {"gradient_checkpointing": True, "num_generations": 8}),
    "grpo": ("grpo", {"num_generations": 8}),
    "dr_grpo, accumulation": ("dr_grpo", {"num_generations": 8, "gradient_accumulation_steps": 2}),
    "gvpo, accumulation, gaps": ("gvpo", {"num_generations": 8, "gradient_accumulation_steps": 2, "reward": gaps}),
    "gvpo, evaluation": ("gvpo", {"evaluate": True, "max_steps": 1, "mask_truncated_completions": True}),
}
SAMPLED = ("gcpo", {"num_generations": 8, "estimator": "rollout", "num_rollouts": 2, "num_integrated": 2, "sampled": True})


# A case, in however many processes there are


def build(folder, out, method, reward=digits, quantization="none", lora=True, evaluate=False, sampled=False, **options):
    """A trainer of `method` for ROWS answers at a time over all processes, whose answers are stand-ins unless `sampled`."""
    accumulation = options.get("gradient_accumulation_steps", 1)
    settings = dict(
        per_device_train_batch_size=ROWS // processes.count() // accumulation, num_generations=4, max_completion_length=LONGEST,
        max_steps=2, learning_rate=0.002, optim="sgd", beta=0.1, lr_scheduler_type="constant", logging_steps=1, report_to=[],
        use_cpu=True, gradient_checkpointing=False, save_strategy="no", seed=3, disable_tqdm=True, max_grad_norm=1e9,
        per_device_eval_batch_size=ROWS // processes.count(),
    )  # fmt: skip
    if method != "gvpo":
        settings |= {"candidate_prefix": "|", "integration_suffix": "!"}
    config = (GVPOConfig if method == "gvpo" else GCPOConfig)(str(out), **{**settings, **OPTIONS[method], **options})
    tokenizer, model, peft_config = load(folder, quantization, lora)
    torch.manual_seed(5)  # of the adapters' initial values
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    evaluated = Dataset.from_dict({"prompt": PROMPTS + PROMPTS[:2]}) if evaluate else None  # full batches, as eval_loss needs
    trainer = TRAINERS[method](
        model, reward, config, prompts, evaluated, processing_class=tokenizer, peft_config=peft_config
    )
    with torch.no_grad():  # B of LoRA is 0: the policy would be the reference
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    if not sampled:
        stub_generation(trainer)
    return trainer


def load(folder, quantization, lora):
    if quantization != "none":
        from gcpo_repro import load_policy

        model, tokenizer, peft_config = load_policy(folder, quantization, LoraSettings(r=4), device="cpu")
        return tokenizer, model, peft_config
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return tokenizer, model, LoraSettings(r=4).peft_config() if lora else None


def stub_generation(trainer):
    """Answers by their place in the batch of all processes, the longer ones on the last process; others by their context."""
    calls, end = [], trainer.processing_class.eos_token_id

    def written(random_source, longest):
        length = random_source.randint(1, longest)
        ids = [random_source.randint(8, 34) for _ in range(length)]
        return ids if length == longest else [*ids[:-1], end]

    def answers(prompt_ids, *rest, **kwargs):
        calls.append(None)
        first = trainer.accelerator.process_index * len(prompt_ids)
        total = trainer.accelerator.num_processes * len(prompt_ids)
        places = range(first, first + len(prompt_ids))
        return [written(random.Random(f"{len(calls)} {k}"), 2 if 2 * k < total else LONGEST) for k in places], None

    def outputs(contexts, max_tokens=0, *rest):
        everything = [str(context) for context in gather_object(contexts)]  # of all processes, in the order of the rows
        first = sum(gather_object([len(contexts)])[: trainer.accelerator.process_index])
        before = [everything[: first + k].count(everything[first + k]) for k in range(len(contexts))]
        named = zip(everything[first : first + len(contexts)], before, strict=True)
        return [written(random.Random(f"{context} {k}"), max_tokens or LONGEST) for context, k in named]

    trainer._generate_single_turn = answers
    if isinstance(trainer, GCPOTrainer):
        trainer._sample = outputs


def run_case(folder, out, method, options):
    """What must not depend on the number of processes: per step the logged numbers, all advantages, the weights at the end."""
    trainer = build(folder, out, method, **options)
    advantages = []
    generate = trainer._generate_and_score_completions

    def keep(inputs):
        output = generate(inputs)
        advantages.append(trainer.accelerator.gather(output["advantages"]).tolist())
        return output

    trainer._generate_and_score_completions = keep
    trainer.train()
    watched = ("loss", "grad_norm", "reward", "gcpo/kl")
    if "gradient_accumulation_steps" not in options:  # TRL's means over the tokens of a pass depend on who is in it
        watched += ("kl", "entropy", "clip_ratio/region_mean")
    watched += tuple(f"gcpo/upsilon_{name}" for name in ("mean", "std", "min", "negative"))
    found = {
        "steps": [{k: entry[k] for k in watched if k in entry} for entry in trainer.state.log_history if "loss" in entry],
        "advantages": advantages,
        "weights": weights_of(trainer),
    }
    if "lora" in options:
        found["sharded"] = any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
    if options.get("evaluate"):
        found["evaluation"] = {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_reward", "eval_kl")}
    return found


def weights_of(trainer):
    """Two projections of the trained weights: enough to tell two models apart."""
    flat = torch.cat([full(p).detach().float().flatten() for p in trainer.model.parameters() if p.requires_grad])
    direction = torch.randn(len(flat), generator=torch.Generator().manual_seed(9))
    return [flat.norm().item(), (flat @ direction).item()]


def full(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def worker(folder, out, names, last=""):
    """The launched script: run the cases, the main process writes them down; then, if asked, one process fails."""
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    out = Path(out)
    every = {**CASES, **MORE, **SHARDED, "sampled": SAMPLED}
    found = {name: run_case(folder, out / "trainer", *every[name]) for name in names.split(";")}
    written = {"processes": processes.count(), "cases": found}
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(written))
    if last == "arm":
        result = train_arm(out / "arm")
        (out / f"arm{os.environ['RANK']}.json").write_text(json.dumps(result["evaluations"]))
    if last == "fail":
        build(folder, out / "trainer", "gcpo", reward=fails_on_one_process).train()


def train_arm(out):
    """A whole arm of the toy policy with evaluations in between; all weights are trained."""
    from gcpo_repro import arm
    from gcpo_repro.settings import Settings

    return arm.train(
        Settings(
            methods="gcpo", seeds=0, quantization="none", lora_rank=0, device="cpu", steps=2, eval_every=1, eval_questions=4,
            eval_samples=2, batch_size=16, device_batch_size=8, train_questions=32, num_integrated=2, learning_rate=1e-4,
        ), out,
    )  # fmt: skip


def shard_on_cpu():
    """accelerate shards on accelerators alone, and falls back to DDP; torch's fully_shard works over gloo as well."""
    initialise = AcceleratorState.__init__

    def sharded(self, *arguments, fsdp_plugin=None, **kwargs):
        initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharded


# Launching


def launch(*command, timeout, env=None):
    """Run in a session of its own, so that a hang ends with all of its processes: (exit code, stdout, stderr)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        start_new_session=True, env=environment,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"no end after {timeout} s: a deadlock? {err[-2000:]}")
    return process.returncode, out, err


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)


def agree(found, expected, where=""):
    """Equal within TOLERANCE, relative where numbers exceed 1; NaN equals NaN."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            agree(found[key], expected[key], f"{where}, {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for k, (one, other) in enumerate(zip(found, expected, strict=True)):
            agree(one, other, f"{where}[{k}]")
    else:
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True), where


def compare(folder, tmp_path, cases, last="", timeout=240):
    code, _, err = launch(*TORCHRUN, "-m", "tests.test_distributed", folder, tmp_path, ";".join(cases), last, timeout=timeout)
    assert (tmp_path / "1.json").exists(), err[-3000:]
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert main["processes"] == other["processes"] == 2
    here = {name: run_case(folder, tmp_path / "here", *case) for name, case in cases.items()}
    for name in cases:
        agree(main["cases"][name], here[name], name)
        agree(other["cases"][name]["weights"], here[name]["weights"], f"{name}, on the other process")
    return here, code, err


def test_two_processes_give_what_one_gives_and_a_process_that_fails_ends_them_with_its_message(tiny_folder, tmp_path):
    here, code, err = compare(tiny_folder, tmp_path, CASES, last="fail")
    assert code != 0
    assert "UserError: reward_funcs: fails_on_one_process failed with RuntimeError: this process cannot grade" in err

    # and the cases say something: each option acts
    here["accumulation 2"] = run_case(tiny_folder, tmp_path / "here", *MORE["accumulation 2"])
    first = {name: case["steps"][0] for name, case in here.items()}
    assert all(step["grad_norm"] > 1e-3 for step in first.values())
    for name in ("accumulation 2", "accumulation 4"):
        for number in ("loss", "grad_norm", "gcpo/upsilon_mean"):
            assert first[name][number] == pytest.approx(first["one group"][number], rel=1e-5)
        agree(here[name]["weights"], here["one group"]["weights"])
    assert here["two groups, iterations"]["steps"][1]["clip_ratio/region_mean"] > 0
    assert here["two groups, iterations"]["steps"][0]["clip_ratio/region_mean"] == 0
    assert first["truncated"]["grad_norm"] != pytest.approx(first["one group"]["grad_norm"], rel=1e-3)
    groups = [row[start : start + 4] for row in here["unscorable, no variance"]["advantages"] for start in (0, 4)]
    zeros = {sum(value == 0 for value in group) for group in groups}
    assert 4 in zeros and zeros & {1, 2}  # all of a constant group, some of another
    assert here["evaluation"]["evaluation"]["eval_reward"] > 0


@pytest.mark.parametrize("method", ["gvpo", "dr_grpo"])
def test_accumulation_does_not_change_a_baselines_gradient(tiny_folder, tmp_path, method):
    cases = [{"num_generations": 8, "gradient_accumulation_steps": steps} for steps in (1, 2, 4)]
    whole, *split = (run_case(tiny_folder, tmp_path, method, options) for options in cases)
    assert whole["steps"][0]["grad_norm"] > 1e-2
    for found in split:
        agree([step["grad_norm"] for step in found["steps"]], [step["grad_norm"] for step in whole["steps"]])
        agree([step["loss"] for step in found["steps"]], [step["loss"] for step in whole["steps"]])
        agree(found["weights"], whole["weights"])


@pytest.mark.slow
def test_two_processes_give_what_one_gives_with_every_option(tiny_folder, tmp_path):
    here, code, err = compare(tiny_folder, tmp_path, MORE, timeout=400)
    assert code == 0, err[-3000:]
    gradients = {name: case["steps"][0]["grad_norm"] for name, case in here.items()}
    for name in ("small passes", "checkpointing"):  # these change only how it is computed
        assert gradients.pop(name) == pytest.approx(gradients["accumulation 2"], rel=1e-5)
    assert len(set(gradients.values())) == len(gradients), "two options do the same"


@pytest.mark.slow
def test_accelerate_launch_with_real_sampling_does_not_stop(tiny_folder, tmp_path):
    """Answers of different lengths on each process, drawn by the policy itself; the adapters stay equal."""
    command = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 0)
    code, _, err = launch(*command, "-m", "tests.test_distributed", tiny_folder, tmp_path, "sampled;one group", timeout=240)
    assert code == 0, err[-3000:]
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert main["processes"] == 2
    assert main["cases"]["sampled"]["weights"] == pytest.approx(other["cases"]["sampled"]["weights"], rel=1e-6)
    expected = run_case(tiny_folder, tmp_path / "here", *CASES["one group"])
    agree(main["cases"]["one group"], expected)


PROFILES = ROOT / "notebooks" / "profiles" / "accelerate"
SHARDED = {
    "whole model": MORE["whole model"],
    "adapters": ("gcpo", {"num_generations": 8, "lora": True}),
    "whole model, rollout": ("gcpo", {**MORE["rollout"][1], "lora": False}),
    "whole model, greedy": ("gcpo", {**CASES["greedy"][1], "lora": False}),
    "whole model, gvpo": ("gvpo", {**CASES["gvpo, iterations"][1], "lora": False}),
}


@pytest.mark.slow
def test_sharded_weights_over_gloo_give_what_one_process_gives(tiny_folder, tmp_path):
    command = ("-m", "accelerate.commands.launch", "--config_file", PROFILES / "fsdp2.yaml", "--main_process_port", 0)
    code, _, err = launch(*command, "-m", "tests.test_distributed", tiny_folder, tmp_path, ";".join(SHARDED), "arm", timeout=300)
    assert code == 0, err[-3000:]
    # evaluation and saving with sharded weights: every process evaluates alike, the saved policy is whole
    evaluations = [json.loads((tmp_path / f"arm{rank}.json").read_text()) for rank in (0, 1)]
    assert evaluations[0] == evaluations[1] and [e["step"] for e in evaluations[0]] == [0, 1, 2]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "arm" / "policy")
    before = AutoModelForCausalLM.from_pretrained(toy.POLICY)
    assert [p.shape for p in saved.parameters()] == [p.shape for p in before.parameters()]
    assert any((a != b).any() for a, b in zip(saved.parameters(), before.parameters(), strict=True))
    found = json.loads((tmp_path / "0.json").read_text())
    for name, case in SHARDED.items():
        assert found["cases"][name].pop("sharded"), "the weights were not divided"
        here = run_case(tiny_folder, tmp_path / "here", *case)
        assert not here.pop("sharded")
        agree(found["cases"][name], here, name)


@pytest.mark.parametrize("file", sorted(path.name for path in PROFILES.glob("*.yaml")))
def test_accelerate_reads_its_profiles(file):
    """Every key is one that accelerate knows, and stands where `accelerate launch` looks for it."""
    config = load_config_from_file(str(PROFILES / file))
    nested = {**config.fsdp_config, **config.deepspeed_config}
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(nested) <= set(known)
    assert config.num_processes == 2 and config.mixed_precision == "no"
    kinds = {"ddp.yaml": "MULTI_GPU", "fsdp2.yaml": "FSDP", "zero2.yaml": "DEEPSPEED", "zero3.yaml": "DEEPSPEED"}
    assert config.distributed_type == kinds[file]
    assert nested.get("zero_stage") == {"zero2.yaml": 2, "zero3.yaml": 3}.get(file)
    assert nested.get("fsdp_version") == (2 if file == "fsdp2.yaml" else None)


# The command

TOY = """\
methods: [gcpo, gvpo]
seeds: [0]
steps: 2
eval_questions: 4
eval_samples: 2
more: ["eval_every=1", "batch_size=16", "train_questions=32", "device=cpu", "device_batch_size=8", "num_integrated=2"]
"""
TRAIN = ("-m", "gcpo_repro.cli", "train", "--config")


@pytest.mark.slow
def test_the_command_in_two_processes(tmp_path):
    config = tmp_path / "toy.yaml"
    config.write_text(TOY)
    one = ("--method", "gcpo", "--seed", 0)
    code, printed, err = launch(*TORCHRUN, *TRAIN, config, *one, "--out", tmp_path / "two", timeout=120)
    assert code == 0, err[-3000:]
    lines = printed.splitlines()
    for start in ("policy: ", "step 0: pass_at_1", "step 1: reward", "step 1: pass_at_1", "step 2: reward", "results: "):
        assert sum(line.startswith(start) for line in lines) == 1, start
    code, _, err = launch(*TRAIN, config, *one, "--out", tmp_path / "one", timeout=120)
    assert code == 0, err[-3000:]
    found, alone = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    assert (found["processes"], alone["processes"]) == (2, 1) and found["config"] == alone["config"]
    assert found["evaluations"][0] == alone["evaluations"][0]  # the same questions and draws
    assert [step["step"] for step in found["steps"]] == [1, 2]
    written = [sorted(p.relative_to(tmp_path / name).as_posix() for p in (tmp_path / name).iterdir()) for name in ("two", "one")]
    assert written[0] == written[1]
    assert len((tmp_path / "two" / "progress.jsonl").read_text().splitlines()) == 5

    code, printed, err = launch(*TORCHRUN, *TRAIN, config, "--out", tmp_path / "arms", timeout=60)
    assert code != 0 and "Error: train: 2 arms in 2 processes" in err and "--method and --seed" in err
    assert not (tmp_path / "arms").exists()

    lonely = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2)
    code, printed, err = launch(*lonely, *TRAIN, config, *one, "--out", tmp_path / "lonely", timeout=60)
    assert code != 0 and "Error: accelerate launch: several processes were asked for" in err
    assert f"torchrun --nproc_per_node N -m gcpo_repro.cli train --config {config} --method gcpo" in err
    assert not (tmp_path / "lonely").exists()


def test_only_train_takes_several_processes(environment, tmp_path):
    environment.setenv("WORLD_SIZE", "2")
    found = CliRunner().invoke(cli.main, ["runs", str(tmp_path)])
    assert found.exit_code == 1 and "runs: started in 2 processes" in found.output
    environment.delenv("WORLD_SIZE")
    assert CliRunner().invoke(cli.main, ["runs", str(tmp_path)]).exit_code == 0


def test_the_batch_is_that_of_all_processes(environment):
    from gcpo_repro import arm
    from gcpo_repro.settings import Settings

    settings = Settings(batch_size=64, device_batch_size=16)
    assert arm._accumulation(settings) == 4
    environment.setenv("WORLD_SIZE", "2")
    assert arm._accumulation(settings) == 2
    with pytest.raises(UserError, match="device_batch_size: 64 answers on each of 2 processes .* set it to 32 or a part of that"):
        arm._accumulation(Settings(batch_size=64, device_batch_size=64))


# Knowing the processes


@pytest.fixture
def environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_or_as_torchrun_starts_them(environment, capsys):
    assert (processes.count(), processes.is_main(), processes.local_rank()) == (1, True, 0)
    environment.setenv("WORLD_SIZE", "4")
    environment.setenv("RANK", "3")
    environment.setenv("LOCAL_RANK", "1")
    assert (processes.count(), processes.is_main(), processes.local_rank()) == (4, False, 1)
    with processes.quiet_unless_main():
        print("from process 3")
    environment.setenv("RANK", "0")
    with processes.quiet_unless_main():
        print("from the main process")
    assert capsys.readouterr().out == "from the main process\n"


@pytest.mark.parametrize(
    "variables, lost",
    [
        ({}, False),
        ({"MASTER_ADDR": "node7"}, False),  # a cluster's habit
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),  # accelerate launch --num_processes 1
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}, False),
    ],
)
def test_a_lost_process_is_noticed(environment, variables, lost):
    for name, value in variables.items():
        environment.setenv(name, value)
    if lost:
        with pytest.raises(UserError, match="torchrun --nproc_per_node"):
            processes.refuse_lost()
    else:
        processes.refuse_lost()


if __name__ == "__main__":
    worker(*sys.argv[1:])
