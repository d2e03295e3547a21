"""A finished run under any protocol is known by its key, and not run again."""

import pytest
from golden import GOLDEN

import sinkbench
from sinkbench.config import PROTOCOLS, RunConfig
from sinkbench.runs.record import device_name
from sinkbench.sweeps.plan import planned


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_finished_run_is_skipped(protocol, tmp_path):
    text = GOLDEN / "llama" / "tokens.jsonl"
    options = {"model_name_or_path": str(GOLDEN / "llama"), "dataset_name": str(text), "data_column": "input_ids"}
    options |= {"experiment": "transformers", "num_tokens": 40, "output_dir": tmp_path, "protocol": protocol}
    options |= {} if protocol == "stream" else {"context_length": 16}
    sinkbench.run(**options)
    config = RunConfig(**options)
    (cell,) = planned([config], tmp_path, {device_name(config.device_map)})
    assert cell.skipped
