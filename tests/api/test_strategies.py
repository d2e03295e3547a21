"""The drop-in classes take every strategy: a model's own forward and generate then follow it."""

import pytest
import tiny
import torch

import sinkbench
from sinkbench.engines.stepwise import Stepwise
from sinkbench.errors import UserError

ASKED = {
    "h2o": {"strategy": "h2o", "strategy_parameters": {"recent": 6}},
    "tova": {"strategy": "tova"},
    "context_shift": {"strategy": "context_shift"},
    "text": {"positions": "text"},
}


@pytest.mark.parametrize("name", ASKED)
def test_a_forward_gives_the_nlls_of_the_stepwise_engine(name, tmp_path):
    tiny.shared("llama").save_pretrained(tmp_path)
    sizes = {"attention_sink_size": 4, "attention_sink_window_size": 12}
    model = sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, **sizes, **ASKED[name])
    stream, asked = tiny.tokens(50), ASKED[name]
    with torch.no_grad():
        logits = model(stream[None]).logits[0, :-1]
    got = -logits.double().log_softmax(-1).gather(1, stream[1:, None])[:, 0]
    plain = tiny.shared("llama")
    parameters = asked.get("strategy_parameters", {})
    plan = tiny.plan(plain, asked.get("strategy", "attention_sinks"), 16, 4, asked.get("positions"), **parameters)
    wanted = [steps.nll[0] for steps in Stepwise(plain).run(plan, stream)]
    assert got.tolist() == pytest.approx(wanted, abs=2e-4)


def test_generation_goes_on_in_constant_memory(tmp_path):
    tiny.shared("llama").save_pretrained(tmp_path)
    model = sinkbench.AutoModelForCausalLM.from_pretrained(
        tmp_path, attention_sink_window_size=12, strategy="h2o", strategy_parameters={"recent": 6}
    )
    out = model.generate(
        tiny.tokens(5)[None], max_new_tokens=60, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    assert out.sequences.shape == (1, 65)
    assert out.past_key_values.held == 16


def test_what_cannot_be_is_one_line(tmp_path):
    tiny.shared("llama").save_pretrained(tmp_path)
    for asked, said in (
        ({"strategy": "h2x"}, "is no strategy"),
        ({"strategy": "h2o", "strategy_parameters": {"resent": 1}}, "did you mean recent"),
        ({"positions": "up"}, "one of cache, text"),
    ):
        with pytest.raises(UserError, match=said):
            sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, **asked)
