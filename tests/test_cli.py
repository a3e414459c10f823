import subprocess
import sys

import pytest
from conftest import make_model

from specdec import __main__ as cli
from specdec.__main__ import main
from specdec.train import History


@pytest.fixture(scope="module", autouse=True)
def build(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECDEC_BUILD", str(tmp_path_factory.mktemp("build")))
        patch.setenv("SPECDEC_PROFILE", "ci")
        yield


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "--prompt", "a", "--profile", "huge"], "there is no profile 'huge'"),
        (["generate", "--prompt", "a", "--profile", ""], "there is no profile ''"),
        (["generate", "--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["generate", "--prompt", "a", "--top-p", "0"], "top_p is 0"),
        (["generate", "--prompt", "a", "--k", "0"], "k is 0"),
        (["generate", "--prompt", "a", "--draft", "huge"], "no model 'huge'"),
        (["generate", "--prompt", "a", "--rule", "luck"], "no rule 'luck'"),
        (["generate", "--prompt", "a " * 200], "shorten the prompt"),
        (["train", "--model", "huge"], "no model 'huge'"),
        (["train", "--model", "distilled", "--distill-loss", "luck"], "no divergence 'luck'"),
        (["train", "--model", "distilled", "--distill-loss", "cross-entropy", "--distill-texts", "luck"], "no text of 'luck'"),
        (["bench", "--peers", "--draft", "huge"], "no model 'huge'"),
    ],
)
def test_bad_input_ends_with_a_sentence_and_status_2(arguments, sentence, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "--prompt", "a", "--draft", "nope"], "no model 'nope'; choose small, medium, distilled"),
        (["generate", "--prompt", "a", "--max-new-tokens", "-1"], "--max-new-tokens is -1; give 0 or more"),
        (["generate", "--prompt", "a", "--seed", str(10**23)], "give a number of 64 bits"),
        (["distill", "--role", "target"], "no model 'target'; choose small, medium"),
        (["export", "--role", "nope", "--out", "new"], "no model 'nope'"),
        (["export", "--out", "."], "already; delete it or name another folder"),
        (["bench", "--json", "/nonexistent/x.json"], "cannot be written; name a file in a folder that is there"),
        (["bench", "--json", "."], "cannot be written"),
        (["bench", "--prompts", "3"], "give it too, or leave them out"),
        (["bench", "--peers", "--prompts", "0"], "give at least 1"),
        (["bench", "--again", "--json", "x.json"], "write into results/ by themselves"),
        (["generate", "--prompt", "a " * 200], "shorten the prompt"),
        (["train", "--model", "nope"], "no model 'nope'; choose target, small, medium, distilled"),
        (["train", "--model", "small", "--distill-loss", "forward-kl"], "give --model distilled"),
        (["reproduce", "--data", "text:"], "write text:PATH"),
        (["reproduce", "--profile", "ci@20k", "--tokens", "10k"], "names its budget"),
        *((command, "the device 'nope' is not here; choose cpu")
          for command in (["reproduce", "--device", "nope"], ["bench", "--device", "nope"], ["bench", "--again", "--device", "nope"],
                          ["bench", "--roofline", "--device", "nope"], ["generate", "--prompt", "a", "--device", "nope"])),
        (["reproduce", "--minutes", "inf"], "are no budget"),
    ],
)
def test_what_can_be_refused_at_once_is(arguments, sentence, capsys, monkeypatch):
    for name in ("load_or_train", "load_or_distill", "compare_recipes"):
        monkeypatch.setattr(cli, name, None)
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_that_cannot_be_read_gets_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(cli, "get_profile", lambda name: open("/nonexistent/file"))
    assert main(["train"]) == 2
    assert "No such file" in capsys.readouterr().err


def test_the_end_of_a_text_is_printed_whole_or_not(capsys, monkeypatch):
    """Bytes that are no character yet are not swallowed."""
    tokenizer = cli.tokens_for(cli.get_profile("ci")).tokenizer
    first, second = (tokenizer.encode_single_token(bytes([byte])) for byte in "é".encode())
    for tokens, text in (([first, second], "aé"), ([first], "a\ufffd"), ([second, first, second], "a\ufffdé")):
        monkeypatch.setattr(cli, "generate", lambda *_, **__: iter(tokens))
        monkeypatch.setattr(cli, "model_named", lambda *_: make_model())
        assert main(["generate", "--prompt", "a", "--no-draft"]) == 0
        assert capsys.readouterr().out == text


def test_a_distilled_model_is_trained_where_the_others_are(monkeypatch):
    given = {}
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli.torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(cli, "load_or_distill", lambda *_, **options: given.update(options) or (None, History([])))
    with pytest.raises(IndexError):
        main(["train", "--model", "distilled"])
    assert given["device"] == "cuda:0"


@pytest.mark.parametrize(
    "command", ["generate --prompt a", "generate --prompt a --draft distilled", "bench", "bench --roofline", "bench --again", "distill",
                "distill --batches"],
)
def test_a_device_that_is_asked_for_is_the_one_that_computes(command, monkeypatch, capsys):
    def reached(*_, device, **__):
        raise ValueError(f"on {device}")

    monkeypatch.setattr(cli, "available", lambda device: {"cuda": "cpu:0", "cpu": "cpu"}[device])
    for name in ("load_or_train", "load_or_distill", "compare_recipes", "compare_batches", "measure_again"):
        monkeypatch.setattr(cli, name, reached)
    monkeypatch.setattr(cli.roofline, "survey", reached)
    for asked, there in ((["--device", "cuda"], "cpu:0"), ([], "cpu")):
        assert main([*command.split(), *asked]) == 2 and capsys.readouterr().err == f"specdec: on {there}\n"


def test_generate_is_repeatable_and_reports(capsys):
    texts = []
    for _ in range(2):
        assert main(["generate", "--prompt", "The people", "--max-new-tokens", "20", "--seed", "1", "--top-k", "50"]) == 0
        out = capsys.readouterr()
        texts.append(out.out)
        assert "tokens/s" in out.err and "tokens per round" in out.err and "accepted ÷ examined" in out.err
    assert texts[0] == texts[1] and texts[0].startswith("The people")
    assert main(["generate", "--prompt", "The people", "--max-new-tokens", "5", "--no-draft"]) == 0
    assert "tokens per round" not in capsys.readouterr().err


def test_an_empty_prompt_begins_a_new_text(capsys):
    assert main(["generate", "--prompt", "", "--max-new-tokens", "4", "--seed", "1", "--no-draft", "--k", "0"]) == 0
    assert capsys.readouterr().out


def test_whoever_stops_reading_or_waiting_gets_no_traceback(monkeypatch, capfd):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_or_train", pressed)
    assert main(["train"]) == 130 and "goes on from there" in capfd.readouterr().err
    script = "import sys; from specdec.__main__ import main; sys.exit(main(['generate', '--prompt', 'a ' * 9, '--max-new-tokens', '90']))"
    done = subprocess.run(f"{sys.executable} -c \"{script}\" | head -c 1", shell=True, capture_output=True, text=True)
    assert done.stdout == "a" and "Traceback" not in done.stderr


def test_train_says_what_it_did(capsys):
    assert main(["train", "--model", "small"]) == 0
    assert "validation loss" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["generate", "train", "bench"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "example:" in capsys.readouterr().out


def test_bench_prints_every_cell(capsys, monkeypatch, tmp_path):
    from dataclasses import replace

    profile = cli.get_profile("ci")
    small = replace(profile, bench=replace(profile.bench, n_prompts=2, n_sweep_prompts=1, new_tokens=6, ks=(1, 2)))
    monkeypatch.setattr(cli, "get_profile", lambda name: small)
    assert main(["bench", "--json", str(tmp_path / "bench.json")]) == 0
    out = capsys.readouterr().out
    arms = "A ", "B small", "B medium", "C small k=1", "C small k=2", "C medium k=2"
    for part in (*arms, "small T=1 on fresh prompts", "judged as a block", "A ÷ A", "R²"):
        assert part in out
    assert (tmp_path / "bench.json").exists()
