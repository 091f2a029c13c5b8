"""The pseudo_masks steps of a run file: `python -m jobs.pseudo_masks CONFIG [KEY=VALUE]...`."""

from weaksam.cli.main import run_job

if __name__ == "__main__":
    run_job("pseudo_masks")
