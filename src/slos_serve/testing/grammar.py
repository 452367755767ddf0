"""Structured output without a tokenizer: vLLM's own manager over a grammar that accepts every token."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputBackend, StructuredOutputGrammar


class DryGrammar(StructuredOutputGrammar):
    """Accepts everything and counts what it accepted, so that an answer that skips it is noticed."""

    def __init__(self) -> None:
        self.num_accepted = 0

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Advance by ``tokens``."""
        self.num_accepted += len(tokens)
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """All drafts are allowed."""
        return tokens

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens."""
        self.num_accepted -= num_tokens

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        """Every token is allowed."""
        bitmask[batch_index].fill_(-1)

    def is_terminated(self) -> bool:
        """Never: the answer ends by its length."""
        return False

    def reset(self) -> None:
        """Start again."""
        self.num_accepted = 0


class _DryBackend(StructuredOutputBackend):
    def compile_grammar(self, *_: Any, **__: Any) -> StructuredOutputGrammar:
        return DryGrammar()

    def allocate_token_bitmask(self, max_num_seqs: int) -> torch.Tensor:
        return torch.zeros((max_num_seqs, 1), dtype=torch.int32)

    def destroy(self) -> None:
        pass


class GrammarCompiler:
    """Compiles grammars in virtual time: each is ready a given number of engine steps after its request came."""

    def __init__(self, manager: StructuredOutputManager) -> None:
        self._manager = manager
        self._compiling: list[tuple[int, Future[StructuredOutputGrammar]]] = []
        self._steps = 0

    def submit(self, request: Request, steps: int) -> None:
        """Begin to compile a request's grammar, as ``StructuredOutputManager.grammar_init`` does."""
        if self._manager.backend is None:
            self._manager.backend = _DryBackend(self._manager.vllm_config, tokenizer=None, vocab_size=1)
        future: Future[StructuredOutputGrammar] = Future()
        assert request.structured_output_request is not None
        request.structured_output_request.grammar = future
        if steps <= 0:
            future.set_result(DryGrammar())
        else:
            self._compiling.append((self._steps + steps, future))

    def step(self) -> None:
        """An engine step has passed."""
        self._steps += 1
        for due, future in self._compiling:
            if due <= self._steps:
                future.set_result(DryGrammar())
        self._compiling = [(due, future) for due, future in self._compiling if due > self._steps]
