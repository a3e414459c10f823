import pytest

from specdec.__main__ import main


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
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["generate", "--prompt", "a", "--top-p", "0"], "top_p is 0"),
        (["generate", "--prompt", "a", "--k", "0"], "k is 0"),
        (["generate", "--prompt", "a", "--draft", "huge"], "no model 'huge'"),
        (["generate", "--prompt", "a", "--rule", "luck"], "no rule 'luck'"),
        (["generate", "--prompt", "a " * 200], "shorten the prompt"),
        (["train", "--model", "huge"], "no model 'huge'"),
        (["train", "--model", "distilled", "--distill-loss", "luck"], "no divergence 'luck'"),
    ],
)
def test_bad_input_ends_with_a_sentence_and_status_2(arguments, sentence, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


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

    from specdec import __main__ as cli

    profile = cli.get_profile("ci")
    small = replace(profile, bench=replace(profile.bench, n_prompts=2, n_sweep_prompts=1, new_tokens=6, ks=(1, 2)))
    monkeypatch.setattr(cli, "get_profile", lambda name: small)
    assert main(["bench", "--json", str(tmp_path / "bench.json")]) == 0
    out = capsys.readouterr().out
    arms = "A ", "B small", "B medium", "C small k=1", "C small k=2", "C medium k=2"
    for part in (*arms, "small T=1 on fresh prompts", "judged as a block", "A ÷ A", "R²"):
        assert part in out
    assert (tmp_path / "bench.json").exists()
