"""Runs the steps of one stage of a run file: `python -m jobs.stage NAME CONFIG [KEY=VALUE]...`."""

from weaksam.cli.run_command import run_job

if __name__ == "__main__":
    run_job(of_stage=True)
