"""A conversation that goes on: only what is new is ever fed, and only what the strategy keeps is held."""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from sinkbench.api.decoding import Detokenizer, Sampling, Session, stream_tokens
from sinkbench.errors import UserError
from sinkbench.strategies import Plan

MARK = "\x02answer\x02"


class Chat:
    """A conversation with ``model`` by the chat template of ``tokenizer``.

    The text of the conversation is not kept: each message is put into the template alone, as it would read
    behind an answer. So memory does not grow with the number of turns, unless ``plan`` drops nothing.

    Raises:
        UserError: the tokenizer has no chat template, or one whose turns cannot be told apart; or the model's
            positions cannot stream.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        plan: Plan,
        sampling: Sampling,
        seed: int = 0,
        system: str | None = None,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("this model has no chat template: choose an instruct model, or sinkbench generate")
        self.model, self.tokenizer, self.plan, self.sampling = model, tokenizer, plan, sampling
        self.generator = torch.Generator().manual_seed(seed)
        self._opening = [{"role": "system", "content": system}] if system else []
        self._stops = self._stop_ids()
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        self.session = Session(self.model, self.plan)
        self.turns = self.tokens = 0

    def say(self, message: str, max_new_tokens: int) -> Iterator[str]:
        """The answer to ``message``, piece by piece."""
        fed = self._encoded(self._first(message) if not self.turns else self._next(message))
        self.turns += 1
        self.tokens += len(fed)
        detokenizer = Detokenizer(self.tokenizer)
        with closing(stream_tokens(self.session, fed, self.sampling, self.generator)) as generated:
            for said in islice(generated, max_new_tokens):
                if said.token in self._stops:
                    return
                self.tokens += 1
                yield detokenizer.put(said.token)
        # the last token was said but never read, as the answer was cut: it is read with the next message
        self.session.read([said.token])

    def stats(self) -> str:
        """Cache and memory, in one line."""
        memory = psutil.Process().memory_info().rss
        most = self.plan.context or self.plan.window
        room = "no limit" if most is None else f"of {most:,}"
        return (
            f"{self.turns:,} turns, {self.tokens:,} tokens so far; cache: {self.session.held:,} entries ({room}), "
            f"{self.session.kv_cache_bytes / 2**20:.1f} MiB; process: {memory / 2**20:,.0f} MiB"
        )

    def _first(self, message: str) -> str:
        return self._rendered([*self._opening, {"role": "user", "content": message}])

    def _next(self, message: str) -> str:
        """How ``message`` reads behind an answer, from the end of the answer on."""
        turns = [{"role": "user", "content": "."}, {"role": "assistant", "content": MARK}]
        _, mark, after = self._rendered([*turns, {"role": "user", "content": message}]).partition(MARK)
        if not mark:
            raise UserError("the chat template of this model does not show what was answered: it cannot go on")
        return after

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _encoded(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: those of the model, and what the template puts behind one."""
        ends = self.model.generation_config.eos_token_id
        ids = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        behind = self._encoded(self._next("."))[:1]
        ids |= set(behind) & set(self.tokenizer.all_special_ids)
        return frozenset(ids - {None})
