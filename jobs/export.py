"""The export steps of a run file: `python -m jobs.export CONFIG [KEY=VALUE]...`."""

from weaksam.cli.main import run_job

if __name__ == "__main__":
    run_job("export")
