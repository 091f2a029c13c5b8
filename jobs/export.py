"""The export steps of a run file: `python -m jobs.export CONFIG [KEY=VALUE]...`."""

from weaksam.cli import run_job

if __name__ == "__main__":
    run_job("export")
