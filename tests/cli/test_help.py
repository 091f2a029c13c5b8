"""What the command line explains: its commands, the stages and their settings, its version."""

from __future__ import annotations

import pytest

import weaksam
from tests.cli.commands import WEAKSAM, call
from weaksam.cli import main as cli
from weaksam.pipeline import listings
from weaksam.stages import STAGES


def test_the_help_of_each_command_says_what_it_does() -> None:
    result = call(WEAKSAM, "--help").stdout
    commands = {command.callback.__name__: command.callback for command in cli.app.registered_commands}  # type: ignore
    for name, function in commands.items():
        assert f"│ {name} " in result
        assert (function.__doc__ or "").strip().endswith(".")
    result = call(WEAKSAM, "run", "--help").stdout
    assert "Run the steps of CONFIG." in result
    assert "KEY=VALUE" in result
    assert "--only" in result


def test_every_stage_and_every_setting_is_explained() -> None:
    result = call(WEAKSAM, "stages").stdout
    for name, stage in STAGES.items():
        assert name in result
        assert stage.summary in result
        assert stage.summary.endswith(".")
        for key, kind, default, sentence in listings.settings_rows(stage.config):
            assert sentence.endswith("."), f"{name}: {key} has no sentence"
            assert kind
            assert default


@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_shows_every_key_with_its_type_default_and_sentence(name: str) -> None:
    result = call(WEAKSAM, "stages", name).stdout
    lines = {line.split()[0]: line for line in result.splitlines() if line.startswith(" ") and line[1:2].strip()}
    for key, kind, default, sentence in listings.settings_rows(STAGES[name].config):
        assert kind in lines[key]
        assert default in lines[key]
        assert sentence[:60] in lines[key]


def test_an_unknown_stage_is_told_with_the_known_ones() -> None:
    result = call(WEAKSAM, "stages", "proposal")
    assert result.returncode == 2
    assert "there is no stage 'proposal': stages are index, train_classifier, proposals" in result.stderr


def test_the_version_is_that_of_the_package() -> None:
    shown = call(WEAKSAM, "--version")
    assert (shown.returncode, shown.stdout) == (0, f"weaksam {weaksam.__version__}\n")
