"""Examines the nodes of a cluster for what a run needs: `python -m jobs.doctor CONFIG [KEY=VALUE]... [--json]`."""

import sys

import typer

from weaksam.cli.terminal import end_on_sigterm, guarded
from weaksam.cluster.doctor import run_doctor

if __name__ == "__main__":
    arguments = [text for text in sys.argv[1:] if text != "--json"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    end_on_sigterm()
    try:
        guarded(run_doctor)(arguments[0], arguments[1:], as_json="--json" in sys.argv)
    except typer.Exit as end:
        sys.exit(end.exit_code)
