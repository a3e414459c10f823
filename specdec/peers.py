"""transformers on the same weights: its own generation as arms that take turns with ours.

Both sides get the same prompts, number of new tokens, data type, threads and device, stop tokens off, padding ids never
emitted; each side may choose its settings on other prompts than the final ones. transformers is an optional extra,
imported only here and only when asked for.
"""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .bench import Arm, both, cell, equip, measure, speed_ratio, split_prompts, target_alone
from .data import TokenData
from .drafting import PromptLookup
from .export import export_model
from .model import Transformer
from .profiles import BenchConfig
from .sampling import Sampling

LONGER = (24,)  # drafted tokens a round, beyond the profile's, which are chosen for our costs
KINDS = ("alone", "draft", "lookup")  # transformers: generate, the same with an assistant model, or with prompt lookup


def transformers():
    """The library, quiet; ValueError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed; run `pip install 'specdec[peers]'`.") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def peer(model: Transformer, dtype: torch.dtype):
    """``model`` as transformers' own class, by way of its folder, as anybody would load it; without stop tokens."""
    with TemporaryDirectory() as scratch:
        folder = export_model(model, Path(scratch) / "model")
        theirs = transformers().ArceeForCausalLM.from_pretrained(folder, dtype=dtype)
    theirs.generation_config.eos_token_id = None
    return theirs.to(model.device).eval()


def their_arm(model, config: BenchConfig, sampling: Sampling, *, draft=None, drafting: dict | None = None, **options) -> Arm:
    """`generate` of transformers. ``draft`` assists as its settings ``drafting`` say; {} leaves the library's own."""
    options |= {"max_new_tokens": config.new_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
    if draft is not None:
        options["assistant_model"] = draft
        drafting = dict.fromkeys(("num_assistant_tokens", "num_assistant_tokens_schedule",
                                  "assistant_confidence_threshold")) | (drafting or {})  # fmt: skip
    assisted = draft is not None or "prompt_lookup_num_tokens" in options

    def run(prompt, randomness, trace):
        ids, passes = torch.tensor([prompt], device=model.device), []
        if draft is not None:
            draft.generation_config.update(**drafting)
        hook = model.register_forward_hook(lambda *_: passes.append(1)) if assisted else None
        with torch.random.fork_rng():  # it draws from torch's own generator and takes no other
            torch.manual_seed(randomness.generator.initial_seed())
            text = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        trace.tokens += text[0, len(prompt) :].tolist()
        trace.target_passes = len(trace.tokens)
        if hook is not None:
            hook.remove()
            trace.target_passes = len(passes)

    return run


@dataclass
class Comparison:
    """What `compare` measured: tables, one dict a line, and ``ratios`` ours ÷ theirs by kind and temperature."""

    cells: list[dict] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    ratios: dict[str, dict[str, dict]] = field(default_factory=dict)


def contestants(target, theirs, draft, their_draft, lookup, config: BenchConfig, sampling: Sampling) -> dict[str, dict[str, Arm]]:
    """Every arm by its family and its setting; the family "ours alone" is the baseline of both."""
    alone, assisted = (lambda **o: their_arm(theirs, config, sampling, **o)), {"draft": their_draft}
    longer = (*config.ks, *LONGER)  # each round costs them more, so a longer one may pay
    constant = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    return {
        "ours alone": {"": target_alone(target, config, sampling)},
        "ours draft": {f"k={k}": both(target, draft, k, config, sampling) for k in config.ks},
        "ours lookup": {f"k={k}": both(target, lookup, k, config, sampling) for k in config.ks},
        "transformers alone": {"": alone(), "static cache": alone(cache_implementation="static")},
        "transformers draft": {"": alone(**assisted)}
        | {f"k={k}": alone(**assisted, drafting={"num_assistant_tokens": k} | constant) for k in longer},
        "transformers lookup": {f"k={k}": alone(prompt_lookup_num_tokens=k) for k in longer},
    }


def compare(target: Transformer, draft: Transformer, data: TokenData, config: BenchConfig) -> Comparison:
    """Ours and theirs, alone, with ``draft`` and with prompt lookup: every setting on some held-out prompts, then each
    family's fastest on fresh ones. A family's empty setting is the library's default."""
    fast, drafters, _ = equip({"target": target, "draft": draft}, config, data)
    theirs, their_draft = (peer(model, fast.dtype) for model in (target, draft))
    lookup = PromptLookup(target.config.n_ids, device=fast.device)
    prompts = split_prompts(data, config)
    out = Comparison(ratios={kind: {} for kind in KINDS})
    for temperature in config.temperatures:
        families = contestants(fast, theirs, drafters["draft"], their_draft, lookup, config, Sampling(temperature))
        arms = {f"{family} {name}".strip(): arm for family, members in families.items() for name, arm in members.items()}
        rows = measure(arms, prompts.sweep, seed=config.seed, device=fast.device)
        table = {arm: cell(rows, arm, "ours alone") for arm in arms}
        best = {
            family: max((f"{family} {name}".strip() for name in members), key=lambda a: table[a]["tokens_per_second"])
            for family, members in families.items()
        }
        finalists = {arm: arms[arm] for arm in best.values()}
        again = measure(finalists, prompts.fresh, seed=config.seed + 1000, device=fast.device)
        for kind in KINDS:
            ratio = speed_ratio(again, best[f"ours {kind}"], best[f"transformers {kind}"])
            out.ratios[kind][f"T{temperature:g}"] = ratio
        for part, measured, names in (("sweep", rows, list(arms)), ("final", again, list(best.values()))):
            extra = {"temperature": temperature, "part": part}
            out.cells += [extra | cell(measured, arm, "ours alone") for arm in names]
            out.rows += [extra | row for row in measured]
    return out
