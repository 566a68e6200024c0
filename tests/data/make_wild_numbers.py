"""Writes wild_numbers.json: what the scenes of wild_callbacks.py come to with fastai.

Not run by the tests. It needs fastai (written with 2.8.12): `python tests/data/make_wild_numbers.py`.
"""

import json
import runpy
from pathlib import Path

import fastai
from fastai.basics import DataLoader, DataLoaders

HERE = Path(__file__).parent


def rounded(value):
    """The value with seven digits of each number, so that the file stays small."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def main():
    wild = runpy.run_path(str(HERE / "wild_callbacks.py"))
    found = {}
    for name, scene in wild["SCENES"].items():
        train, valid = [list(zip(wild[x], wild[y], strict=True)) for x, y in (("X", "Y"), ("X_VALID", "Y_VALID"))]
        dls = DataLoaders(DataLoader(train, bs=6), DataLoader(valid, bs=6), device="cpu")
        found[name] = rounded(wild["numbers"](scene, dls))
    lines = [f"  {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in found.items()]
    text = f'{{\n "fastai": "{fastai.__version__}",\n "scenes": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    (HERE / "wild_numbers.json").write_text(text)


if __name__ == "__main__":
    main()
