"""How well the cheap estimators agree with the literal algorithm, on the toy policy: `gcpo_repro.agreement`, as a table.

    python tests/benchmarks/agreement.py [--questions 64] [--rollouts 64] [--json figures/data/agreement.json]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from gcpo_repro import agreement, load_policy, provenance, toy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64, help="held-out questions, one group each")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=64, help="M of the reference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.time()
    policy, tokenizer, _ = load_policy(toy.POLICY, quantization="none", lora=None)
    table = agreement.study(
        policy, tokenizer, toy.questions("held_out", args.questions, args.seed), toy.exact_reward, args.group_size,
        args.rollouts, toy.RESPONSE_LENGTH + 1, args.seed, **toy.TEMPLATE,
    )  # fmt: skip
    print(table.drop(columns="approximates").round(3).T.to_string())
    if args.json:
        config = {key: value for key, value in vars(args).items() if key != "json"}
        content = {"settings": json.loads(table.reset_index().to_json(orient="records", double_precision=6))}
        provenance.write_json(args.json, {**content, **provenance.record(config, args.seed, started)})


if __name__ == "__main__":
    main()
