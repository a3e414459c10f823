"""The command line: generate, train, bench. Wrong input ends with one sentence and exit status 2."""

import argparse
import json
import os
import sys
import time

import torch
import torch.distributed as dist

from . import bench, report
from .data import tokens_for
from .distill import DIVERGENCES, load_or_distill
from .drafting import DraftModel
from .engine import Trace, generate, speculate
from .inference import ready
from .profiles import PROFILES, get_profile
from .sampling import RULES, Randomness, Sampling
from .train import load_or_train


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"specdec: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="specdec", description="Lossless speculative decoding, from scratch.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, summary, example):
        sub = commands.add_parser(
            name, help=summary, description=summary, epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--profile", help=f"one of {', '.join(PROFILES)} (default: $SPECDEC_PROFILE, else cpu)")
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "generate", run_generate, "stream text from the target, sped up by a draft",
        'specdec generate --prompt "The people of" --k 4 --temperature 0.8',
    )  # fmt: skip
    sub.add_argument("--prompt", required=True, help="text to continue")
    sub.add_argument("--draft", default="small", help="small, medium or distilled (default: small)")
    sub.add_argument("--no-draft", action="store_true", help="the target alone")
    sub.add_argument("--k", type=int, default=4, help="drafted tokens per round (default: 4)")
    sub.add_argument("--rule", default="token-wise", help=f"one of {', '.join(RULES)} (default: token-wise)")
    sub.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    sub.add_argument("--top-k", type=int, help="keep the k most probable tokens")
    sub.add_argument("--top-p", type=float, help="keep the most probable tokens that together reach p")
    sub.add_argument("--max-new-tokens", type=int, default=100, help="(default: 100)")
    sub.add_argument("--seed", type=int, help="the same seed gives the same text (default: another text every time)")

    sub = command(
        "train", run_train, "train a model of a profile, or take up a training that was cut off",
        "torchrun --nproc-per-node 2 -m specdec train --profile seed --model target",
    )  # fmt: skip
    sub.add_argument("--model", default="target", help="target, small, medium or distilled (default: target)")
    sub.add_argument("--distill-loss", default="forward-kl", help=f"{', '.join(DIVERGENCES)} or cross-entropy, the control")

    sub = command(
        "bench", run_bench, "measure the target alone, the draft alone, and both, as notebook 06 does",
        "specdec bench --profile cpu --json bench.json",
    )  # fmt: skip
    sub.add_argument("--json", metavar="FILE", help="also write the table there")
    return top


def model_named(profile, name: str):
    """A trained model by the name that the command line gives it."""
    return load_or_distill(profile)[0] if name == "distilled" else load_or_train(profile, name)[0]


def run_generate(options) -> None:
    profile = get_profile(options.profile)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    if options.rule not in RULES:
        raise ValueError(f"there is no rule {options.rule!r}; choose {', '.join(RULES)}.")
    if options.k < 1:
        raise ValueError(f"k is {options.k}; draft at least 1 token a round, or pass --no-draft.")
    tokenizer = tokens_for(profile).tokenizer
    prompt = tokenizer.encode_ordinary(options.prompt)
    target, trace = ready(model_named(profile, "target")), Trace()
    randomness = Randomness(options.seed, target.device)
    common = dict(
        max_new_tokens=options.max_new_tokens, sampling=sampling, stop=(tokenizer.eot_token,),
        randomness=randomness, trace=trace,
    )  # fmt: skip
    if options.no_draft:
        stream = generate(target, prompt, **common)
    else:
        drafter = DraftModel(ready(model_named(profile, options.draft)))
        stream = speculate(target, prompt, drafter=drafter, k=options.k, rule=RULES[options.rule], **common)
    began, pending = time.perf_counter(), b""
    print(options.prompt, end="", flush=True)
    for token in stream:
        if token != tokenizer.eot_token:
            pending += tokenizer.decode_single_token_bytes(token)
            text = pending.decode("utf-8", errors="ignore")  # a character may be spread over several tokens
            if text.encode() == pending or len(pending) > 8:
                print(pending.decode("utf-8", errors="replace"), end="", flush=True)
                pending = b""
    seconds = time.perf_counter() - began
    counts = bench.summary([trace])
    line = f"{counts['tokens'] / seconds:.1f} tokens/s, ended by {trace.finish}"
    if trace.rounds:
        line += f", {counts['tokens'] / counts['rounds']:.2f} tokens per round"
        line += f", accepted ÷ examined {counts['accepted'] / max(1, counts['examined']):.2f}"
    print(f"\n[{line}]", file=sys.stderr)


def run_train(options) -> None:
    profile = get_profile(options.profile)
    parallel = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if parallel:
        dist.init_process_group("nccl" if device != "cpu" else "gloo")
        if dist.get_rank() == 0:
            tokens_for(profile)  # one process prepares, the others find it ready
        dist.barrier()
    try:
        if options.model == "distilled":
            _, history = load_or_distill(profile, options.distill_loss)
        else:
            _, history = load_or_train(profile, options.model, device=device)
    finally:
        if parallel:
            chief = dist.get_rank() == 0
            dist.destroy_process_group()
    if not parallel or chief:
        print(f"{profile.name} {options.model}: validation loss {history.validation_loss:.4f} nats a token "
              f"after {history.rows[-1]['tokens']:,d} tokens and {history.seconds:.0f} s")  # fmt: skip


def run_bench(options) -> None:
    profile = get_profile(options.profile)
    drafts = {name: model_named(profile, name) for name in ("small", "medium")}
    result = bench.run(model_named(profile, "target"), drafts, tokens_for(profile), profile.bench)
    print(f"{'arm':16s} {'T':>3s} {'tokens/s':>9s} {'speed-up':>9s} {'95% interval':>14s} {'predicted':>9s} {'accepted÷examined':>18s}")
    for cell in result.cells:
        speculative = "predicted" in cell
        name = cell["arm"] + ("" if cell["speedup"] >= 1 or not speculative else " *")
        line = f"{name:16s} {cell['temperature']:3g} {cell['tokens_per_second']:9.1f} {cell['speedup']:8.2f}×"
        line += f" [{cell['ci95_low']:5.2f}, {cell['ci95_high']:5.2f}]"
        if speculative:
            line += f" {cell['predicted']:9.2f} {cell['accepted_per_examined']:18.2f}"
        print(line)
    print("* slower than the target alone")
    for key, costs in result.costs.items():
        print(f"{key}: c = {costs.c:.3f}, v = " + ", ".join(f"{m}: {v:.2f}" for m, v in costs.v.items()) + f", o = {costs.o:.3f}")
    for name, ratio in result.aa.items():
        print(f"A ÷ A, {name}: {ratio['value']:.3f}")
    print(f"R² of predicted against measured: {result.r2:.2f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"cells": result.cells, "provenance": report.provenance(profile.name)}, file, indent=2)


if __name__ == "__main__":
    sys.exit(main())
