import json
import lzma

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import data as module
from specdec.data import (
    DataConfig, batch, documents, held_out_prompts, load_tokenizer, prepare, split, window,
)  # fmt: skip


def test_gpt2s_ids():
    gpt2 = load_tokenizer()
    assert gpt2.encode("hello world") == [31373, 995]
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)


@given(text=st.text(max_size=60), n=st.sampled_from([0, 255, 3839, None]))
@settings(max_examples=60, deadline=None)
def test_any_cut_of_the_merges_is_an_encoding(text, n):
    tokenizer = load_tokenizer(n)
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text and all(i < 256 + (50_000 if n is None else n) for i in ids)
    if n == 0:
        assert len(ids) == len(text.encode())


def test_fewer_merges_never_give_fewer_tokens():
    text = "The state of the union, and of its tokens, is strong. " * 5
    lengths = [len(load_tokenizer(n).encode(text)) for n in (None, 3839, 255, 0)]
    assert lengths == sorted(lengths)


def test_another_file_is_not_gpt2s(monkeypatch):
    monkeypatch.setitem(module._SHA256, "vocab.bpe", "0" * 64)
    with pytest.raises(ValueError, match="is not GPT-2's"):
        load_tokenizer.__wrapped__()


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"Document {i}.\n\nIt says {i * 7} and ends.")
    (folder / "6.txt").write_text("Document 3.\n\nIt says 21 and ends.")  # a copy of number 3
    return folder


def texts_of(data, tokens):
    return [data.tokenizer.decode(part.tolist()) for part in np.split(tokens, np.flatnonzero(tokens == data.eot) + 1)]


def test_no_text_is_in_both_parts(corpus, tmp_path):
    config = DataConfig(source=f"text:{corpus}", validation_fraction=0.4)
    parts = split(config)
    assert len(parts["train"]) + len(parts["validation"]) == 6 and not set(parts["train"]) & set(parts["validation"])
    data = prepare(config, tmp_path / "tokens")
    train, validation = (texts_of(data, np.asarray(t)) for t in (data.train, data.validation))
    assert not set(train[:-1]) & set(validation[:-1])
    assert len(train) - 1 == len(parts["train"]) and all(t.endswith("<|endoftext|>") for t in train[:-1])


def test_the_seed_of_the_split_is_in_the_config(corpus):
    parts = [split(DataConfig(source=f"text:{corpus}", seed=s))["validation"] for s in range(8)]
    assert len({tuple(p) for p in parts}) > 1 and split(DataConfig(source=f"text:{corpus}", seed=0))["validation"] == parts[0]


def test_many_documents_in_one_file_packed_or_not(tmp_path):
    text = "First.\n\nStill first.\n<|endoftext|>\nSecond.\n<|endoftext|>\nThird."
    (tmp_path / "a.txt").write_text(text)
    with lzma.open(tmp_path / "b.txt.xz", "wt") as file:
        file.write(text)
    expected = ["First.\n\nStill first.", "Second.", "Third."]
    assert list(documents(DataConfig(source=f"text:{tmp_path / 'a.txt'}"))) == expected
    assert list(documents(DataConfig(source=f"text:{tmp_path / 'b.txt.xz'}"))) == expected
    assert list(documents(DataConfig(source=f"text:{tmp_path}/*.txt", max_documents=2))) == expected[:2]
    assert list(documents(DataConfig(source=f"text:{tmp_path}/a.txt", max_bytes=25))) == expected[:1]


def test_sotu_is_there():
    first = next(documents(DataConfig()))
    assert "Senate" in first


@pytest.mark.parametrize(
    ("source", "message"),
    [("wikipedia", "no source 'wikipedia'"), ("text:", "no source"), ("text:/no/such/file", "no file at"),
     ("text:{}/empty.txt", "holds no text"), ("text:{}/one.txt", "needs two"), ("text:{}/latin.txt", "not UTF-8")],
)  # fmt: skip
def test_a_bad_source_gets_a_sentence(source, message, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("Only one.")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        split(DataConfig(source=source.format(tmp_path)))


def test_openwebtext_streams_a_pinned_revision(monkeypatch):
    import datasets

    asked = {}

    def fake(**options):
        asked.update(options)
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert list(documents(DataConfig(source="openwebtext"))) == ["one", "two"]
    assert asked["streaming"] and asked["split"] == "train" and asked["revision"]

    def unreachable(**options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="could not be reached"):
        list(documents(DataConfig(source="openwebtext")))


def test_preparing_twice_reads_what_is_there(corpus, tmp_path, monkeypatch):
    config = DataConfig(source=f"text:{corpus}")
    first = prepare(config, tmp_path / "t")
    monkeypatch.setattr(module, "split", lambda config: pytest.fail("prepared again"))
    second = prepare(config, tmp_path / "t")
    assert first.sha256 == second.sha256 and np.array_equal(first.train, second.train)
    assert isinstance(second.train, np.memmap) and second.train.dtype == np.uint16
    assert json.loads(next((tmp_path / "t").glob("*/info.json")).read_text())["files"]["train"]["tokens"] == len(second.train)


@pytest.mark.parametrize("damage", ["cut", "changed", "no json", "half a json"])
def test_what_is_damaged_is_made_again(corpus, tmp_path, damage):
    config = DataConfig(source=f"text:{corpus}")
    good = prepare(config, tmp_path / "t")
    expected, sha256 = np.asarray(good.train).copy(), good.sha256
    folder = next((tmp_path / "t").iterdir())
    if damage == "cut":
        (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-10])
    elif damage == "changed":
        (folder / "train.bin").write_bytes(b"xx" + (folder / "train.bin").read_bytes()[2:])
    elif damage == "no json":
        (folder / "info.json").unlink()
    else:
        (folder / "info.json").write_text('{"files": ')
    again = prepare(config, tmp_path / "t")
    assert again.sha256 == sha256 and np.array_equal(again.train, expected)


def test_an_interrupted_preparation_leaves_nothing_that_looks_finished(corpus, tmp_path, monkeypatch):
    config = DataConfig(source=f"text:{corpus}")

    def cut(path, value):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", cut)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, tmp_path / "t")
    assert not list((tmp_path / "t").rglob("*.json"))
    assert len(prepare(config, tmp_path / "t").train) > 0


def test_batches_are_windows_and_their_continuation(toy_data):
    ids, targets = batch(toy_data.train, 3, 10, torch.Generator().manual_seed(0))
    assert ids.shape == targets.shape == (3, 10) and ids.dtype == torch.int64
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    again, _ = batch(toy_data.train, 3, 10, torch.Generator().manual_seed(0))
    assert torch.equal(ids, again)
    last, end = window(toy_data.train, [len(toy_data.train) - 11], 10)
    assert end[0, -1] == int(toy_data.train[-1])
    with pytest.raises(ValueError, match="too few"):
        window(toy_data.train[:5], [0], 10)


def test_prompts_never_cross_the_end_of_a_document(corpus, tmp_path):
    data = prepare(DataConfig(source=f"text:{corpus}", validation_fraction=0.5), tmp_path / "t")
    prompts = held_out_prompts(data, 5, 4)
    assert prompts == held_out_prompts(data, 5, 4) and all(len(p) == 4 and data.eot not in p for p in prompts)
    joined = np.asarray(data.validation).tobytes()
    assert all(np.array(p, dtype=np.uint16).tobytes() in joined for p in prompts)
    with pytest.raises(ValueError, match="ask for fewer or shorter"):
        held_out_prompts(data, 5, 500)
