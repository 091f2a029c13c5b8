"""Runs every step of a run file: `python -m jobs.pipeline CONFIG [KEY=VALUE]...`."""

from weaksam.cli.run_command import run_job

if __name__ == "__main__":
    run_job()
