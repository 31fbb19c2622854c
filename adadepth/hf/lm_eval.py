"""Lm-eval's command line with `--model adadepth` in it: `python -m adadepth.hf.lm_eval --model adadepth ...`."""

from . import harness as harness  # isort: skip  (it says what to install where lm-eval is missing)
from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
