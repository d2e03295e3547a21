"""The server of docs/api.md, as it stands there, on loopback."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs/api.md"


@pytest.fixture(scope="module")
def served():
    """What the snippet defines, its server running on a free port."""
    section = DOCUMENT.read_text().partition("## A server that streams")[2]
    code = re.search(r"```python\n(.*?)```", section, re.S).group(1)
    free = code.replace('("127.0.0.1", 8000)', '("127.0.0.1", 0)').replace("server.serve_forever()\n", "")
    assert free.count("8000") == free.count("serve_forever") == 0
    names = {}
    exec(free, names)
    names["Handler"].log_message = lambda *_: None
    thread = threading.Thread(target=names["server"].serve_forever)
    thread.start()
    yield names
    names["server"].shutdown()
    names["server"].server_close()
    thread.join()


@pytest.mark.heavy
def test_requests_at_once_get_what_each_would_get_alone(served):
    model, tokenizer, port = served["model"], served["tokenizer"], served["server"].server_address[1]
    texts = ["In the beginning", "Once upon a time " * 80, "The Lord said", "And it came to pass " * 70]
    settings = {"max_new_tokens": 12, "do_sample": False}

    def ask(text, **more):
        body = json.dumps({"prompt": text, **settings, **more}).encode()
        with urlopen(Request(f"http://127.0.0.1:{port}", body), timeout=120) as answer:
            return answer.read().decode()

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, text) for text in texts * 2]
        broken = pool.submit(ask, "a text", cache_implementation="static")
        for text, answer in zip(texts * 2, answers):
            inputs = tokenizer(text, return_tensors="pt")
            made = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
            assert answer.result() == tokenizer.decode(made)
    assert "does not go with attention sinks" in broken.result()
