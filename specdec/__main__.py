"""The command line: generate, train, distill, bench, export, reproduce. Wrong input ends with one sentence and exit status 2."""

import argparse
import codecs
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from . import bench, peers, report, roofline
from .data import tokens_for, write_json
from .distill import DIVERGENCES, TEXTS, load_or_distill
from .drafting import drafter_of
from .engine import Trace, generate, speculate
from .export import export_model, model_card
from .inference import ready, ready_rule
from .profiles import PROFILES, get_profile
from .reproduce import available, compare_batches, compare_recipes, measure_again, reproduce
from .sampling import RULES, Randomness, Sampling
from .train import load_or_train


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"specdec: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nspecdec: interrupted; what was finished is kept, and the same command goes on from there.", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="specdec", description="Lossless speculative decoding, from scratch.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, summary, example, device: str | None = "cpu"):
        sub = commands.add_parser(
            name, help=summary, description=summary, epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--profile", help=f"one of {', '.join(PROFILES)} (default: $SPECDEC_PROFILE, else cpu)")
        if device is not None:
            sub.add_argument("--device", default=device, help=f"cpu or cuda (default: {device})")
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "generate", run_generate, "stream text from the target, sped up by a draft",
        'specdec generate --prompt "The people of" --k 4 --temperature 0.8',
    )  # fmt: skip
    sub.add_argument("--prompt", required=True, help="text to continue; an empty one begins a new text")
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
        "torchrun --nproc-per-node 2 -m specdec train --profile seed --model target", device=None,
    )  # fmt: skip
    sub.add_argument("--model", default="target", help="target, small, medium or distilled (default: target)")
    sub.add_argument("--distill-loss", help=f"{', '.join(DIVERGENCES)} or cross-entropy, the control (default: the profile's)")
    sub.add_argument("--distill-texts", help=f"whose text is read: {', '.join(TEXTS)} (default: the profile's)")

    sub = command(
        "distill", run_distill, "distil a draft by every recipe and compare them, into results/",
        "specdec distill --profile cpu --role small",
    )  # fmt: skip
    sub.add_argument("--role", default="small", help="small or medium (default: small)")
    sub.add_argument("--batches", action="store_true", help="instead: a draft that was trained on its target's batches, and one that "
                     "drew its own")  # fmt: skip

    sub = command(
        "bench", run_bench, "measure the target alone, the draft alone, and both, as notebook 06 does",
        "specdec bench --profile cpu --json bench.json",
    )  # fmt: skip
    sub.add_argument("--json", metavar="FILE", help="also write the table there")
    instead = sub.add_mutually_exclusive_group()
    instead.add_argument("--roofline", action="store_true", help="a decoding step of every model beside the floor that memory sets, "
                     "of the profile's and, with random weights, of the seed's sizes")  # fmt: skip
    instead.add_argument("--again", action="store_true", help="only what the headline quotes, once more, beside earlier runs in results/")
    instead.add_argument("--peers", action="store_true", help="measure transformers on the same weights instead, into results/")
    sub.add_argument("--draft", help="with --peers: small, medium or distilled (default: small)")
    sub.add_argument("--prompts", type=int, help="with --peers: how many prompts the best settings meet (default: the profile's)")

    sub = command(
        "export", run_export, "write a trained model as a Hugging Face folder, with its tokenizer and model card",
        "specdec export --profile cpu --role small --out specdec-cpu-small", device=None,
    )  # fmt: skip
    sub.add_argument("--role", default="target", help="target, small, medium or distilled (default: target)")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="a new folder; its name becomes the model's")

    sub = command(
        "reproduce", run_reproduce, "data, training, distillation and benchmark in one unattended run, into results/",
        "specdec reproduce --profile seed --minutes 25 --data text:corpus/*.txt.xz", device=None,
    )  # fmt: skip
    sub.add_argument("--minutes", type=float, help="shorten all schedules so that the run fits into so many minutes")
    sub.add_argument("--tokens", help="shorten all schedules so that the target reads so many tokens, for example 300M")
    sub.add_argument("--data", metavar="text:PATH", help="take the text from local files instead of the profile's source")
    sub.add_argument("--drafts", default="small,medium", help="which drafts beside the target (default: small,medium)")
    sub.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    return top


def model_named(profile, name: str, device: str | torch.device = "cpu"):
    """A trained model by the name that the command line gives it."""
    return trained(profile, name, device)[0]


def trained(profile, name: str, device: str | torch.device = "cpu"):
    """The same with its history."""
    return load_or_distill(profile, device=device) if name == "distilled" else load_or_train(profile, name, device=device)


def check(what: str, name: str, names) -> None:
    """Before anything is loaded or trained for it."""
    if name not in names:
        raise ValueError(f"there is no {what} {name!r}; choose {', '.join(names)}.")


def drafts(profile) -> list[str]:
    return [role for role in profile.models if role != "target"]


def run_generate(options) -> None:
    profile = get_profile(options.profile)
    device, sampling = available(options.device), Sampling(options.temperature, options.top_k, options.top_p)
    randomness = Randomness(options.seed, device)
    check("rule", options.rule, RULES)
    check("model", options.draft, [*drafts(profile), "distilled"])
    if options.k < 1 and not options.no_draft:
        raise ValueError(f"k is {options.k}; draft at least 1 token a round, or pass --no-draft.")
    if options.max_new_tokens < 0:
        raise ValueError(f"--max-new-tokens is {options.max_new_tokens}; give 0 or more.")
    tokenizer = tokens_for(profile).tokenizer
    prompt, context = tokenizer.encode_ordinary(options.prompt) or [tokenizer.eot_token], profile.models["target"].context
    if len(prompt) > context:
        raise ValueError(f"the prompt has {len(prompt)} tokens and the context {context}; shorten the prompt.")
    target, trace = ready(model_named(profile, "target", device), passes="compiled"), Trace()
    common = dict(
        max_new_tokens=options.max_new_tokens, sampling=sampling, stop=(tokenizer.eot_token,),
        randomness=randomness, trace=trace,
    )  # fmt: skip
    if options.no_draft:
        stream = generate(target, prompt, **common)
    else:
        draft = ready(model_named(profile, options.draft, device), passes="compiled")
        rule = ready_rule(RULES[options.rule], "compiled", device)
        stream = speculate(target, prompt, drafter=drafter_of(draft), k=options.k, rule=rule, **common)
    began, decoder = time.perf_counter(), codecs.getincrementaldecoder("utf-8")("replace")
    print(options.prompt, end="", flush=True)
    for token in stream:
        if token != tokenizer.eot_token:  # a character may be spread over several tokens
            print(decoder.decode(tokenizer.decode_single_token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True), end="", flush=True)
    seconds = time.perf_counter() - began
    counts = bench.summary([trace])
    line = f"{counts['tokens'] / seconds:.1f} tokens/s, ended by {trace.finish}"
    if trace.rounds:
        line += f", {counts['tokens'] / counts['rounds']:.2f} tokens per round"
        line += f", accepted ÷ examined {counts['accepted'] / max(1, counts['examined']):.2f}"
    print(f"\n[{line}]", file=sys.stderr)


def run_train(options) -> None:
    profile = get_profile(options.profile)
    check("model", options.model, [*profile.models, "distilled"])
    if (options.distill_loss or options.distill_texts) and options.model != "distilled":
        raise ValueError(f"a {options.model} model is trained on the text itself; give --model distilled with --distill-…")
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
            _, history = load_or_distill(profile, options.distill_loss, texts=options.distill_texts, device=device)
        else:
            _, history = load_or_train(profile, options.model, device=device)
    finally:
        if parallel:
            chief = dist.get_rank() == 0
            dist.destroy_process_group()
    if not parallel or chief:
        print(f"{profile.name} {options.model}: validation loss {history.validation_loss:.4f} nats a token "
              f"after {history.rows[-1]['tokens']:,d} tokens and {history.seconds:.0f} s")  # fmt: skip


def run_distill(options) -> None:
    profile = get_profile(options.profile)
    check("model", options.role, drafts(profile))
    compare = compare_batches if options.batches else compare_recipes
    compare(profile, role=options.role, device=available(options.device), say=lambda line: print(line, flush=True))


def run_bench(options) -> None:
    if not options.peers and (options.draft or options.prompts is not None):
        raise ValueError("--draft and --prompts are for --peers; give it too, or leave them out.")
    if options.json and (options.roofline or options.peers or options.again):
        raise ValueError("--json is for the table of notebook 06; the others write into results/ by themselves.")
    if options.prompts is not None and options.prompts < 1:
        raise ValueError(f"--prompts is {options.prompts}; give at least 1.")
    if options.roofline:
        return run_roofline(options)
    if options.peers:
        return run_peers(options)
    if options.again:
        return run_again(options)
    profile = get_profile(options.profile)
    if options.json and (os.path.isdir(options.json) or not os.access(Path(options.json).parent, os.W_OK)):
        raise ValueError(f"{options.json!r} cannot be written; name a file in a folder that is there.")
    device, data = available(options.device), tokens_for(profile)
    models = {name: model_named(profile, name, device) for name in ("target", "small", "medium")}
    result = bench.run(*bench.equip(models, profile.bench, data), data, profile.bench)
    if options.json:
        write_json(Path(options.json), {"cells": result.cells, "provenance": report.provenance(profile.name)})
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
    for key, best in (item for item in result.best.items() if "k" in item[1]):
        line = f"{key} on fresh prompts: {best['speedup']:.2f}× (k = {best['k']})"
        if key in result.as_block:
            line += f", judged as a block {result.as_block[key]['speedup']:.2f}× (k = {result.as_block[key]['k']})"
        print(line)
    for key, costs in result.costs.items():
        print(f"{key}: c = {costs.c:.3f}, v = " + ", ".join(f"{m}: {v:.2f}" for m, v in costs.v.items()) + f", o = {costs.o:.3f}")
    for name, ratio in result.aa.items():
        print(f"A ÷ A, {name}: {ratio['value']:.3f}")
    for where, errors in (("in the sweep", result.sweep_errors), ("on fresh prompts", result.fresh_errors)):
        print(f"predicted against measured {where}: R² {errors['r2']:.2f}, {errors['mean_error']:+.0%} on average, "
              f"{errors['within']} of {errors['n']} within the interval")  # fmt: skip


def run_roofline(options) -> None:
    steps = roofline.survey(get_profile(options.profile), device=available(options.device))
    print(f"memory is read at {steps[0]['bandwidth'] / 1e9:.1f} GB/s, {steps[0]['bandwidth_most'] / 1e9:.1f} at most")
    print(f"{'model':18s} {'dtype':>9s} {'passes':>9s} {'MB a token':>10s} {'floor ms':>9s} {'step ms':>8s} {'of the floor':>12s} "
          f"{'v(2)':>5s} {'v(5)':>5s} {'v(9)':>5s}")  # fmt: skip
    for s in steps:
        verify = " ".join(f"{s[f'v{m}']:5.2f}" for m in (2, 5, 9) if f"v{m}" in s)
        print(f"{s['sizes'] + ' ' + s['model']:18s} {s['dtype']:>9s} {s['passes']:>9s} {s['bytes'] / 1e6:10.1f} "
              f"{s['floor_seconds'] * 1e3:9.2f} {s['seconds'] * 1e3:8.2f} {s['fraction']:12.0%} {verify}")  # fmt: skip


def run_again(options) -> None:
    measure_again(get_profile(options.profile), device=available(options.device), say=lambda line: print(line, flush=True))


def run_peers(options) -> None:
    profile, name = get_profile(options.profile), options.draft or "small"
    check("model", name, [*drafts(profile), "distilled"])
    device, library, began = available(options.device), peers.transformers(), time.perf_counter()
    target, draft = model_named(profile, "target", device), model_named(profile, name, device)
    bench_config = replace(profile.bench, n_prompts=options.prompts or profile.bench.n_prompts)
    result = peers.compare(target, draft, tokens_for(profile), bench_config)
    print(f"{'arm, each side at its best':34s} {'T':>3s} {'tokens/s':>9s} {'÷ ours alone':>12s} {'tokens per target pass':>23s}")
    for cell in (c for c in result.cells if c["part"] == "final"):
        print(f"{cell['arm']:34s} {cell['temperature']:3g} {cell['tokens_per_second']:9.1f} {cell['speedup']:11.2f}× "
              f"{cell['tokens_per_target_pass']:23.2f}")  # fmt: skip
    for kind, ratios in result.ratios.items():
        for temperature, ratio in ratios.items():
            low, high = ratio["ci95"]
            print(f"ours ÷ transformers {library.__version__}, {kind}, {temperature}: {ratio['value']:.2f} [{low:.2f}, {high:.2f}]")
    settings = {key: getattr(bench_config, key) for key in ("n_prompts", "new_tokens", "ks", "dtype", "passes")}
    report.record(
        profile.name, "peers", params=settings | {"draft": name, "transformers": library.__version__},
        values={"ours_by_theirs": result.ratios, "cells": result.cells}, rows=result.rows,
        seed=profile.bench.seed, seconds=time.perf_counter() - began,
    )  # fmt: skip


def run_export(options) -> None:
    profile, out = get_profile(options.profile), Path(options.out)
    check("model", options.role, [*profile.models, "distilled"])
    if out.exists():
        raise ValueError(f"there is something in {out.name!r} already; delete it or name another folder.")
    if not os.access(next(folder for folder in out.resolve().parents if folder.exists()), os.W_OK):
        raise ValueError(f"{options.out!r} cannot be written; name a folder where you may write.")
    (model, history), data = trained(profile, options.role), tokens_for(profile)
    trainings = {"training": history.rows[-1]}
    if options.role == "distilled":
        start = load_or_train(profile, "small")[1]
        trainings = {"training": start.rows[-1], "distillation": history.rows[-1]}
    export_model(model, out, data.tokenizer, model_card(model, out.name, data, trainings))
    print(f"{out}: {model.n_params():,} weights, {(out / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


def run_reproduce(options) -> None:
    profile = get_profile(options.profile)
    reproduce(
        options.profile or os.environ.get("SPECDEC_PROFILE") or profile.name, minutes=options.minutes, tokens=options.tokens,
        source=options.data, drafts=tuple(options.drafts.split(",")), device=options.device, say=lambda line: print(line, flush=True),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
