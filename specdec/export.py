"""Models as Hugging Face folders, out and back in, and `load`, which reads whatever kind of model it is given.

`ArceeForCausalLM` of transformers is this very architecture: RMSNorm, rotary positions by halves, grouped-query
attention, an MLP without a gate, an untied head, no biases. Only names and the packing of q, k and v differ, so the way
there and back keeps every bit. Nothing here needs transformers. A folder appears whole or not at all.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import tiktoken
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .checkpoint import load_model, load_weights
from .data import END_OF_TEXT, TokenData, write_json
from .model import ModelConfig, Transformer

_TEXTS = {  # what a model card says of a source; local files are known by their hash alone
    "sotu": "State of the Union addresses, 1790 to today; works of the US Government",
    "openwebtext": "OpenWebText: web pages, whose rights are their authors'",
    "text": "local text files",
}


def export_model(
    model: Transformer, folder: Path, tokenizer: tiktoken.Encoding | None = None, card: str | None = None
) -> Path:
    """Write ``model`` to a new ``folder`` as an ArceeForCausalLM, with its tokenizer and its model card if given.

    ValueError if something is there already or if the tokenizer is not the model's.
    """
    folder, config = Path(folder), model.config
    if folder.exists():
        raise ValueError(f"there is something in {folder.name!r} already; delete it or name another folder.")
    if tokenizer is not None and tokenizer.n_vocab != config.n_ids:
        message = f"the tokenizer has {tokenizer.n_vocab} ids and the model {config.n_ids}; export it with its own."
        raise ValueError(message)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix="partial-") as scratch:
        new = Path(scratch) / "model"
        new.mkdir()
        save_file(arcee_weights(model), new / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            write_tokenizer(tokenizer, config.context, new)
        if card is not None:
            (new / "README.md").write_text(card, encoding="utf-8")
        write_json(new / "generation_config.json", generation_config(config))
        write_json(new / "config.json", arcee_config(config, model.dtype))  # last: without it nobody takes it for a model
        for path in new.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(new, folder)
    return folder


def load(
    name_or_folder: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> Transformer:
    """A model in eval mode from a specdec checkpoint, a Hugging Face folder, or "org/name" on the Hugging Face hub.

    ``dtype`` None keeps what is stored. ValueError, in one sentence, for whatever is not such a model.
    """
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; give a name of torch's, for example float32 or bfloat16.")
    folder = Path(name_or_folder)
    if not folder.exists():
        folder = _download(str(name_or_folder))
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"there is no model in {folder.name!r}; name a folder that holds a config.json.") from None
    except ValueError as error:
        raise ValueError(f"config.json in {folder.name!r} is damaged; export or train that model again.") from error
    ours = isinstance(saved, dict) and "model" in saved
    model = load_model(folder)[0] if ours else _import_model(folder, saved)
    return model.to(device, getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def _download(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"there is no folder {Path(name).name!r}; name one that holds a model, or org/name on the hub.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # no network, no such model, no permission: each has its own kind
        raise ValueError(
            f"there is no folder {name!r} here, and the Hugging Face hub did not give that model "
            f"({type(error).__name__}); check the name and the network."
        ) from error


def _import_model(folder: Path, saved: dict) -> Transformer:
    config = model_config(saved, folder.name)
    try:
        theirs = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        message = f"model.safetensors in {folder.name!r} is missing or cut short; export or download that model again."
        raise ValueError(message) from error
    weights = own_weights(theirs, config, folder.name)
    model = Transformer(config).to(weights["embedding.weight"].dtype)
    load_weights(model, weights, folder.name)
    return model.eval()


# ---- the same weights under other names


def weight_names(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """Each of our weights and, one below the other, the Arcee weights that it consists of."""
    yield "embedding.weight", ["model.embed_tokens.weight"]
    for i in range(config.n_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield f"{ours}.attention_norm.weight", [f"{theirs}.input_layernorm.weight"]
        yield f"{ours}.attention.qkv.weight", [f"{theirs}.self_attn.{x}_proj.weight" for x in "qkv"]
        yield f"{ours}.attention.out.weight", [f"{theirs}.self_attn.o_proj.weight"]
        yield f"{ours}.mlp_norm.weight", [f"{theirs}.post_attention_layernorm.weight"]
        yield f"{ours}.mlp.up.weight", [f"{theirs}.mlp.up_proj.weight"]
        yield f"{ours}.mlp.down.weight", [f"{theirs}.mlp.down_proj.weight"]
    yield "norm.weight", ["model.norm.weight"]
    yield "head.weight", ["lm_head.weight"]


def arcee_weights(model: Transformer) -> dict[str, Tensor]:
    """The weights by the names that transformers knows, on the CPU."""
    own, config, out = model.state_dict(), model.config, {}
    queries, keys = config.n_heads * config.head_size, config.n_kv_heads * config.head_size
    for ours, theirs in weight_names(config):
        weight = own[ours].cpu()
        parts = weight.split([queries, keys, keys]) if len(theirs) == 3 else [weight]
        out |= {name: part.clone() for name, part in zip(theirs, parts)}  # parts that share memory cannot be saved
    return out


def own_weights(theirs: dict[str, Tensor], config: ModelConfig, name: str) -> dict[str, Tensor]:
    """The same by our names; ValueError if they are not all there, or not all."""
    pairs = list(weight_names(config))
    expected = {part for _, parts in pairs for part in parts}
    extra, missing = sorted(theirs.keys() - expected), sorted(expected - theirs.keys())
    if any("gate_proj" in part for part in extra):
        raise ValueError(f"{name!r} has a gated MLP, which specdec does not have; choose a model without gates.")
    if any(part.endswith("bias") for part in extra):
        raise ValueError(f"{name!r} has biases, which specdec does not have; choose a model without them.")
    if extra or missing:
        found = f"lack {missing[0]}" if missing else f"have {extra[0]}"
        raise ValueError(f"the weights in {name!r} {found}, unlike its config.json; export or download it again.")
    try:
        return {ours: torch.cat([theirs[part] for part in parts]) for ours, parts in pairs}
    except RuntimeError as error:
        raise ValueError(f"the weights in {name!r} do not fit together; export or download it again.") from error


# ---- the same shape in other words


def arcee_config(config: ModelConfig, dtype: torch.dtype) -> dict:
    """``config.json``. Everything is said, because what Arcee takes for granted is not what we have."""
    return {
        "architectures": ["ArceeForCausalLM"],
        "model_type": "arcee",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": config.activation,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # where transformers before version 5 looks
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": config.n_ids - 1,  # end-of-text is the last id of every encoding of ours
        "eos_token_id": config.n_ids - 1,
        "pad_token_id": None,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
        "n_ids": config.n_ids,  # these two are ours alone, and make the way back exact
        "dropout": config.dropout,
    }


def model_config(saved: dict, name: str) -> ModelConfig:
    """The shape that a ``config.json`` describes; ValueError if it is not one that a Transformer can have."""
    kind = saved.get("model_type") if isinstance(saved, dict) else None
    if kind != "arcee":
        message = f"{name!r} holds a model of type {kind!r}; specdec reads its own checkpoints and type 'arcee' only."
        raise ValueError(message)
    rope = (saved.get("rope_scaling") or {}) | (saved.get("rope_parameters") or {})
    scaling = rope.get("rope_type", rope.get("type", "default"))
    try:
        width, heads = saved["hidden_size"], saved["num_attention_heads"]
        for wrong, what in (
            (saved.get("attention_bias") or saved.get("mlp_bias"), "biases"),
            (saved.get("tie_word_embeddings"), "a head tied to its embedding"),
            (scaling != "default", f"rope scaling of type {scaling!r}"),
            (saved["hidden_act"] not in ("gelu", "relu2"), f"the activation {saved['hidden_act']!r}"),
            (saved["intermediate_size"] != 4 * width, f"an MLP of {saved['intermediate_size']} instead of 4 × {width}"),
            (saved.get("head_dim") not in (None, width / heads), f"heads of {saved.get('head_dim')}, not {width} ÷ {heads}"),
        ):
            if wrong:
                raise ValueError(f"{name!r} has {what}, which specdec does not have; choose another model.")
        return ModelConfig(
            n_layers=saved["num_hidden_layers"],
            n_heads=heads,
            width=width,
            n_kv_heads=saved.get("num_key_value_heads") or heads,
            vocab_size=saved["vocab_size"],
            n_ids=saved.get("n_ids", saved["vocab_size"]),
            context=saved["max_position_embeddings"],
            dropout=saved.get("dropout", 0.0),
            rope_theta=rope.get("rope_theta", saved.get("rope_theta", 10_000.0)),
            norm_eps=saved["rms_norm_eps"],
            activation=saved["hidden_act"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json in {name!r} is incomplete ({error}); export or download it again.") from error


def generation_config(config: ModelConfig) -> dict:
    """``generation_config.json``: where a text ends, and the padding ids, which must never come out."""
    eot, padding = config.n_ids - 1, list(range(config.n_ids, config.vocab_size))
    return {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot} | ({"suppress_tokens": padding} if padding else {})


# ---- the tokenizer and the card


def write_tokenizer(tokenizer: tiktoken.Encoding, context: int, folder: Path) -> None:
    """GPT-2's own two files, cut to the merges that ``tokenizer`` has: ``vocab.json`` and ``merges.txt``."""
    tokens = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab - 1)]
    vocabulary = {letters(token): i for i, token in enumerate(tokens)} | {END_OF_TEXT: tokenizer.eot_token}
    lines = [f"{letters(left)} {letters(right)}" for left, right in merges(tokens)]
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": context, "add_prefix_space": False}
    write_json(folder / "tokenizer_config.json", settings | special | {"clean_up_tokenization_spaces": False})


def merges(tokens: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The two tokens that each token after the 256 bytes was merged from: what is left of it before its last merge."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for token in tokens[256:]:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, len(tokens)) for left, right in zip(parts, parts[1:])]
            first = pairs.index(min(pairs))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        yield parts[0], parts[1]


_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_LETTERS = dict(zip(_PRINTED + [b for b in range(256) if b not in _PRINTED], map(chr, _PRINTED + list(range(256, 324)))))


def letters(token: bytes) -> str:
    """Bytes as GPT-2's files spell them: printed ones as themselves, the other 68 as the letters from U+0100 on."""
    return "".join(_LETTERS[byte] for byte in token)


def model_card(model: Transformer, name: str, data: TokenData, trainings: dict[str, dict]) -> str:
    """``README.md`` with the hub's header. ``trainings`` are the last rows of its histories, by what was learned."""
    config, source = model.config, data.info["config"]["source"].partition(":")[0]
    header = {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["specdec", "speculative-decoding"],
    }
    if source != "text":  # of local files we know nothing
        header["language"] = "en"
    facts = {
        "weights": f"{model.n_params():,}; read per token {model.n_params(read_per_token=True):,}",
        "layers × width": f"{config.n_layers} × {config.width}",
        "attention": f"{config.n_heads} heads on {config.n_kv_heads} key-value heads",
        "activation": config.activation,
        "ids": f"{config.n_ids:,} of GPT-2's byte-pair encoding, in {config.vocab_size:,} rows",
        "context": f"{config.context:,} tokens",
        "data type": str(model.dtype).removeprefix("torch."),
        "text": f"{_TEXTS[source]}; {len(data.train):,} tokens, split by documents, sha256 `{data.sha256}`",
    }
    for label, row in trainings.items():
        facts[label] = f"{row['tokens']:,} tokens in {row['iteration']:,} steps"
        facts[f"validation loss after {label}"] = f"{row['validation_loss']:.4f} nats a token"
    return "\n".join([
        "---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", "",
        f"# {name}", "",
        "Trained from scratch for specdec, a report on lossless speculative decoding, and good for nothing else: a small",
        "decoder-only Transformer with rotary positions, RMSNorm, grouped-query attention, no gate, no biases, untied head.", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), "",
        "## How to load it", "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer  # 5.0 or newer", "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```", "",
        "or, as a target or a draft of specdec's own engine:", "",
        "```python",
        "import specdec", "",
        f'model = specdec.load("{name}")',
        "```", "",
        "Engines that take for granted that an Arcee model squares its ReLU compute something else where the activation",
        "above is gelu.", "",
    ])  # fmt: skip
