"""What all commands have in common: help, quiet, old names, JSON, crashes, widths."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_chat import run
from test_cli import COMMANDS, ctxprune
from typer.main import get_command
from typer.testing import CliRunner

from ctxprune.cli import info
from ctxprune.cli.command import RENAMED, _renamed
from ctxprune.cli.console import err, say
from ctxprune.cli.main import CRASHED, app
from ctxprune.pruner.errors import CtxpruneError

Make = Callable[[str], Path]


def shown(*arguments: str, columns: int = 100) -> str:
    """What a command prints, and that it ends well."""
    done = CliRunner().invoke(app, [*arguments], env={"COLUMNS": str(columns), "NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_short_and_long_help_are_one(name: str) -> None:
    command = [name] if name else []
    assert shown(*command, "-h") == shown(*command, "--help")


def test_the_version_has_a_short_name() -> None:
    assert shown("-V") == shown("--version")
    assert re.fullmatch(r"ctxprune \d+\.\d+\S*\n", shown("-V"))


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal_and_is_whole(name: str, columns: int) -> None:
    text = shown(name, "--help", columns=columns)
    assert max(map(len, text.splitlines())) <= columns and "\u2026" not in text
    for option in get_command(app).commands[name].params:  # type: ignore[attr-defined]
        if option.param_type_name == "option":
            assert all(flag in text for flag in option.opts)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_old_name_is_understood_and_not_shown(name: str) -> None:
    known = {flag for p in get_command(app).commands[name].params for flag in p.opts}  # type: ignore[attr-defined]
    for old, names in RENAMED.items():
        now = [new for new in names if new in known]
        if old not in known and now:
            assert [_renamed(old, known), _renamed(f"{old}=1", known)] == [now[0], f"{now[0]}=1"]
            assert f"{old} " not in shown(name, "--help")
        else:
            assert _renamed(old, known) == old


def test_what_stands_behind_a_double_dash_is_no_option(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run(["bench", "--", "--context"], monkeypatch) == 2
    assert "unexpected extra argument" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_json_takes_no_file(name: str) -> None:
    """One meaning: what else goes to stdout does not, and the result does."""
    options = {flag: p for p in get_command(app).commands[name].params for flag in p.opts}  # type: ignore[attr-defined]
    assert "--json" not in options or options["--json"].is_flag


@pytest.mark.parametrize("arguments", [["-q", "info", "m"], ["info", "-q", "m"]])
def test_quiet_leaves_errors_alone(
    arguments: list[str],
    tiny_folder: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    tiny_folder("gpt2").rename(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".ctxprune").mkdir()
    (tmp_path / ".ctxprune" / "current").write_text("m\n")
    capsys.readouterr()
    assert run([word for word in arguments if word != "m"], monkeypatch) == 0
    assert capsys.readouterr().err == ""
    assert run(arguments, monkeypatch) == 0
    say("not printed")
    assert capsys.readouterr().err == ""
    assert run([*arguments[:-1], "none"], monkeypatch) == 2
    assert "there is no folder `none`" in capsys.readouterr().err
    assert run(["info"], monkeypatch) == 0
    assert capsys.readouterr().err == "model: m\n" and not err.quiet


def test_verbose_lets_libraries_log(tiny_folder: Make, tmp_path: Path) -> None:
    folder = str(tiny_folder("gpt2"))
    said = ["generate", "--model", folder, "--policy", "sink", "--sparsity", "0.5", "It was"]
    silent = ctxprune(*said, "--max-new-tokens", "2", cwd=tmp_path)
    loud = ctxprune(*said, "--max-new-tokens", "2", "-v", cwd=tmp_path)
    assert "config.json" not in silent.stderr and "config.json" in loud.stderr
    assert silent.stdout == loud.stdout


@pytest.fixture
def broken_info(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Any) -> Any:
        raise RuntimeError("a fault\nof ours")

    monkeypatch.setattr(info, "current", fails)


def test_a_crash_says_where_its_traceback_is(
    broken_info: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run(["info", "m"], monkeypatch) == CRASHED == 70
    told = capsys.readouterr().err
    (log,) = tmp_path.glob("ctxprune-*.log")
    assert "error: ctxprune crashed: RuntimeError: a fault\n" in told
    assert str(log) in told and "report" in told and "Traceback" not in told
    assert "ctxprune" in log.read_text().splitlines()[0] and "info m" in log.read_text()
    assert "Traceback" in log.read_text()


def test_a_verbose_crash_shows_its_traceback(
    broken_info: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("ctxprune.cli.main.is_verbose", lambda: True)
    assert run(["info", "m"], monkeypatch) == CRASHED
    assert "Traceback" in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_a_mistake_of_the_user_is_no_crash(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refuses(folder: Any) -> Any:
        raise CtxpruneError("this is not so", "do that")

    monkeypatch.setattr(info, "current", refuses)
    assert run(["info", "m"], monkeypatch) == 2
    assert capsys.readouterr().err == "error: this is not so\n\nhint: do that\n"


def test_a_shell_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the shell is found out, and where tests run there may be none.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = ctxprune("--show-completion", "bash", cwd=tmp_path)
    assert "complete" in done.stdout
    asked = {"_CTXPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "ctxprune ch", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ctxprune.cli.main"],
        cwd=tmp_path,
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["chat"], done.stderr


def test_info_tells_the_memory_of_a_tuned_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["convert", "--out", "m"], monkeypatch) == 0
    assert run(["info", "--json"], monkeypatch) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["memory"] == {} and about["dtype"] == "float16" and about["positions"] == 1024
    settings = json.loads((tmp_path / "m" / "ctxprune.json").read_text())
    settings["config"] |= {"levels": {"0.8": [0.2] * 4}, "tuned": 0.8}
    (tmp_path / "m" / "ctxprune.json").write_text(json.dumps(settings))
    assert run(["info", "--json"], monkeypatch) == 0
    held = json.loads(capsys.readouterr().out)["memory"]
    # Learned positions end at 1,024: no longer text is told of. Keys and values of 192 numbers.
    assert list(held) == ["1024"] and held["1024"]["dense_kv_bytes"] == 4 * 2 * 192 * 2 * 1024
    assert 0.05 < held["1024"]["share"] < 0.2
    assert run(["info"], monkeypatch) == 0
    text = capsys.readouterr().out
    for part in ("4 of 4 attention layers", "float16", "6 of keys, of width 32", "0.8", "1,024"):
        assert part in text
