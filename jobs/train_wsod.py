"""The train_wsod steps of a run file: `python -m jobs.train_wsod CONFIG [KEY=VALUE]...`."""

from weaksam.cli.main import run_job

if __name__ == "__main__":
    run_job("train_wsod")
