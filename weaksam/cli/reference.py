"""The configuration reference: every key of every stage and of a cluster file, as Markdown."""

from __future__ import annotations

import inspect
from typing import Any

from weaksam.cluster.settings import ClusterSettings
from weaksam.pipeline.listings import recipe_lines, settings_rows
from weaksam.stages import STAGES

_HEAD = """# Configuration

Every key of every stage, and of a cluster file. Written by `weaksam stages --markdown`: do not edit.

A run file has `run`, the URI of the folder where everything of the run lives; `endpoint`, the URL of an S3 server other
than Amazon's, if any; `addressing: virtual` for a server with a host name for each bucket; and `steps`, a mapping of
names to settings. Each step names its `stage` and, by their names, the steps it reads. Any setting can be given on the
command line: `steps.<step>.<key>=<value>`.
"""


def reference() -> str:
    """Returns the whole document."""
    parts = [_HEAD]
    for stage in STAGES.values():
        reads = ", ".join(stage.read_kinds) or "a dataset"
        parts.append(_section(stage.name, f"{reads} → {stage.writes}", stage.config))
    return "\n".join([*parts, _section("A cluster file", "", ClusterSettings)])


def _section(title: str, reads: str, config: Any) -> str:
    rows = [_row(*row) for row in settings_rows(config)]
    head = "\n\n".join(filter(None, [f"## {title}", reads, inspect.cleandoc(config.__doc__ or "")]))
    recipes = "".join(f"- {line}\n" for line in recipe_lines(config))
    other = f"\nOther defaults:\n\n{recipes}" if recipes else ""
    return f"{head}\n\n| key | type | default | meaning |\n|---|---|---|---|\n{''.join(rows)}{other}"


def _row(key: str, kind: str, default: str, meaning: str) -> str:
    kind, default = (text.replace("|", "\\|") for text in (kind, default))
    meaning = meaning.replace("|", "\\|").replace("<", "&lt;")
    return f"| `{key}` | `{kind}` | {default if default == 'required' else f'`{default}`'} | {meaning} |\n"
