"""What the published package computed (``fixtures/golden``), and the options that run on it."""

import json
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "fixtures"
GOLDEN = DATA / "golden"


def golden_options(family: str) -> list[str]:
    """Options that run on the golden model and tokens of ``family``."""
    folder = GOLDEN / family
    return [
        *("--model-name-or-path", str(folder), "--dataset-name", str(folder / "tokens.jsonl")),
        *("--data-column", "input_ids", "--window-size", "32", "--attention-sink-size", "4", "--dtype", "float32"),
    ]


def golden_tokens(family: str) -> torch.Tensor:
    return torch.tensor(json.loads((GOLDEN / family / "tokens.jsonl").read_text())["input_ids"])
