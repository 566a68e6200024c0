"""Writes fastai_steps.json: where the cases of steps.py end with the optimizers of fastai.

Not run by the tests. It needs fastai (written with 2.8.12, torch 2.13, CPU):
`PYTHONPATH=. python tests/optim/make_fastai_steps.py`.
"""

import json
from pathlib import Path

import fastai
from fastai import optimizer

from tests.optim.steps import CASES, case


def main():
    ends = {name: [round(v, 8) for v in case(name, optimizer)] for name in CASES}
    lines = [f" {json.dumps(name)}: {json.dumps(values)}" for name, values in ends.items()]
    text = f'{{"fastai": "{fastai.__version__}", "ends": {{\n' + ",\n".join(lines) + "\n}}\n"
    Path(__file__).with_name("fastai_steps.json").write_text(text)


if __name__ == "__main__":
    main()
