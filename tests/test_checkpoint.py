"""A checkpoint is believed only when it is whole and fits; otherwise one sentence says what to do."""

import json
import os

import pytest
import torch

from specdec import checkpoint
from specdec.checkpoint import clear_training, load_model, load_training, save_model, save_training
from specdec.model import ModelConfig, Transformer

CONFIG = ModelConfig(2, 4, 32, 2, vocab_size=64, n_ids=60, context=32)


@pytest.fixture
def model():
    return Transformer(CONFIG, torch.Generator().manual_seed(0))


@pytest.fixture
def folder(model, tmp_path):
    save_model(model, tmp_path / "model", {"history": [{"iteration": 1}]})
    return tmp_path / "model"


def refusal(folder) -> str:
    """What `load_model` says when it refuses: one sentence, without the path to the folder."""
    with pytest.raises(ValueError) as error:
        load_model(folder)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence and str(folder.parent) not in sentence
    return sentence


def test_round_trip_keeps_every_bit(model, folder):
    loaded, info = load_model(folder)
    assert loaded.config == CONFIG and not loaded.training and info == {"history": [{"iteration": 1}]}
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]  # no temporary files are left


def test_save_replaces_an_older_model(model, folder):
    with torch.no_grad():
        model.head.weight += 1
    save_model(model, folder, {})
    assert torch.equal(load_model(folder)[0].head.weight, model.head.weight)


@pytest.mark.parametrize("kept", [0, 7, 500, -1])
def test_truncated_weights_are_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "delete it and train again" in refusal(folder)


def test_missing_parts_are_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "delete it and train again" in refusal(folder)
    (folder / "config.json").unlink()
    assert "train it first" in refusal(folder)
    assert "train it first" in refusal(folder.parent / "nowhere")


@pytest.mark.parametrize("text", ["", '{"model": {"n_la', "{}", "[]", '{"model": {"depth": 3}, "info": {}}'])
def test_damaged_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    assert "delete that folder and train again" in refusal(folder)


def test_config_without_info_is_refused(folder):
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model": saved["model"]}))
    assert "delete that folder and train again" in refusal(folder)


@pytest.mark.parametrize("changed", [{"n_layers": 1}, {"n_layers": 3}, {"width": 64}, {"n_kv_heads": 1}])
def test_weights_of_another_architecture_are_refused(folder, changed):
    saved = json.loads((folder / "config.json").read_text())
    saved["model"] |= changed
    (folder / "config.json").write_text(json.dumps(saved))
    assert "another architecture" in refusal(folder)


@pytest.mark.parametrize("written", ["model.safetensors", "config.json"])
def test_a_cut_save_never_looks_finished(model, tmp_path, monkeypatch, written):
    """Neither a first save nor one over a finished model leaves a loadable mixture when it is cut."""
    replace = os.replace

    def cut(source, target):
        if str(target).endswith(written):
            raise KeyboardInterrupt
        replace(source, target)

    save_model(model, tmp_path / "again", {})
    for folder in (tmp_path / "first", tmp_path / "again"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", cut)
            save_model(model, folder, {})
        assert "train it first" in refusal(folder)
        save_model(model, folder, {})
        load_model(folder)


def test_two_processes_do_not_write_into_one_file(model, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(checkpoint, "put_in_place", lambda partial, path: written.append((partial, path)))
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda: process)
        save_model(model, tmp_path, {})
        save_training(tmp_path, {})
    assert len({partial for partial, _ in written}) == 4 and len({path for _, path in written}) == 2


def test_resume_point(tmp_path, monkeypatch):
    assert load_training(tmp_path) is None
    save_training(tmp_path, {"iteration": 3, "weights": {"a": torch.arange(4)}})

    def cut(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", cut)
        save_training(tmp_path, {"iteration": 4})
    saved = load_training(tmp_path)  # the older point, whole
    assert saved["iteration"] == 3 and torch.equal(saved["weights"]["a"], torch.arange(4))
    clear_training(tmp_path)
    assert load_training(tmp_path) is None


def test_damaged_resume_point_is_refused(tmp_path):
    save_training(tmp_path, {"iteration": 3})
    path = tmp_path / "training.pt"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="delete it to start that training again"):
        load_training(tmp_path)


def test_what_cannot_be_written_is_told_as_the_system_tells_it(tmp_path, monkeypatch):
    """Libraries have errors of their own for a full disk, which nobody above would know."""

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="cannot be written .*; make room, then run it again"):
        checkpoint.save_training(tmp_path, {})
    assert not list(tmp_path.iterdir())
