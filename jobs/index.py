"""The index steps of a run file: `python -m jobs.index CONFIG [KEY=VALUE]...`."""

from weaksam.cli.main import run_job

if __name__ == "__main__":
    run_job("index")
