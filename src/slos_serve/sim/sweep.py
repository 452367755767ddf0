"""Drives many capacity searches on several processes, remembers every answer on disk, and reports progress."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Generic, TypeVar

from slos_serve.core.errors import InvalidFieldError
from slos_serve.sim.question import Answer, Question, answer

Result = TypeVar("Result")

# Whatever these packages hold can change an answer, but for what only decides which questions are asked.
_DECIDING = ("core", "perf", "planning", "policies", "routing", "metrics", "workload", "sim", "profiles")
_ASKING = (
    *("sim/search.py", "sim/bisection.py", "sim/rate_bounds.py", "sim/sweep.py"),
    *("sim/sizing.py", "sim/interval.py", "sim/seeds.py"),
)
OUR_POLICY = "slos-serve"
# What only our own policy and router run, and files that belong to one rival.
_OURS = ("planning/", "routing/", "policies/slos_serve.py", "sim/slo_router.py")
_RIVALS = {name: f"policies/{name}.py" for name in ("edf", "jitserve", "qoserve", "sarathi", "scorpio", "distserve")}


@cache
def _file_digests() -> dict[str, bytes]:
    """Digest of each file of the packages above, by its path within the package."""
    root = Path(str(resources.files("slos_serve")))
    files = [file for package in _DECIDING for file in sorted((root / package).rglob("*")) if file.is_file()]
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).digest()
        for file in files
        if "__pycache__" not in file.parts
    }


@cache
def source_digest(policy: str = OUR_POLICY) -> str:
    """Digest of the code and tables that a policy's answers depend on: a cache from others is not used.

    A rival depends neither on our planner and router, which only our policy can use, nor on another rival.
    """
    left_out: tuple[str, ...] = _ASKING
    if policy != OUR_POLICY:
        own = _RIVALS.get(policy.partition("-")[0])
        left_out += _OURS + tuple(file for file in _RIVALS.values() if file != own)
    digest = hashlib.sha256()
    for name, of_file in _file_digests().items():
        if not name.startswith(left_out):
            digest.update(name.encode() + of_file)
    return digest.hexdigest()[:16]


class AnswerFile:
    """Answers by question, appended to a JSON-lines file as they come, so that a search can be resumed.

    Raises:
        InvalidFieldError: the file cannot be read, or holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[tuple[str, str], Answer] = {}
        if path is None or not path.exists():
            return
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as fault:
            raise InvalidFieldError("--resume", str(path), f"a readable file ({fault})") from fault
        for line in lines:
            self._read(line)
        if len(lines) > 1 and not self._known:  # appending would spoil it; a single line may be half written
            raise InvalidFieldError("--resume", str(path), "a file that --resume began, or a new one")

    def _read(self, line: str) -> None:
        try:
            row = json.loads(line)
            self._known[row["code"], row["question"]] = Answer.from_json(row["answer"])
        except (ValueError, KeyError, TypeError):
            return  # the end of a line that an interrupted run left half written

    def get(self, question: Question) -> Answer | None:
        """A known answer."""
        return self._known.get((source_digest(question.policy), question.key()))

    def put(self, question: Question, found: Answer) -> None:
        """Remember an answer, on disk too."""
        code = source_digest(question.policy)
        self._known[code, question.key()] = found
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        row = {"code": code, "question": question.key(), "answer": asdict(found)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@dataclass
class _Running(Generic[Result]):
    """A search and what it waits for."""

    name: str
    search: Generator[list[Question], list[Answer], Result]
    questions: list[Question] = field(default_factory=list)
    answers: dict[str, Answer] = field(default_factory=dict)


def worker_pool(processes: int) -> ProcessPoolExecutor:
    """A pool whose workers end with this process, however it ends."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """A worker waits for work on a pipe that it holds open itself: the end of a killed parent must be watched for."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def run_searches(
    searches: Sequence[tuple[str, Generator[list[Question], list[Answer], Result]]],
    answers: AnswerFile,
    processes: int,
    on_answer: Callable[[str, Question, Answer], None],
    on_done: Callable[[str, Result], None],
) -> list[Result]:
    """Run searches side by side; results in the order of ``searches``.

    Args:
        searches: (name, search); names tell them apart in the callbacks.
        answers: what is known already.
        processes: how many simulations run at once; 1 runs them in this process.
        on_answer: told of every evaluation.
        on_done: told of every finished search.
    """
    results: dict[str, Result] = {}
    if processes <= 1:
        for name, search in searches:
            results[name] = _run_here(name, search, answers, on_answer)
            on_done(name, results[name])
        return [results[name] for name, _ in searches]
    waiting = list(searches)
    pool = worker_pool(processes)
    try:
        _run_in_pool(waiting, answers, pool, processes, results, on_answer, on_done)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [results[name] for name, _ in searches]


def _run_here(
    name: str,
    search: Generator[list[Question], list[Answer], Result],
    answers: AnswerFile,
    on_answer: Callable[[str, Question, Answer], None],
) -> Result:
    try:
        questions = next(search)
        while True:
            found = []
            for question in questions:
                known = answers.get(question)
                if known is None:
                    known = answer(question)
                    answers.put(question, known)
                on_answer(name, question, known)
                found.append(known)
            questions = search.send(found)
    except StopIteration as end:
        result: Result = end.value
        return result


def _run_in_pool(
    waiting: list[tuple[str, Generator[list[Question], list[Answer], Result]]],
    answers: AnswerFile,
    pool: ProcessPoolExecutor,
    processes: int,
    results: dict[str, Result],
    on_answer: Callable[[str, Question, Answer], None],
    on_done: Callable[[str, Result], None],
) -> None:
    """Keep about two searches a process under way, so that no process waits for a bisection."""
    pending: dict[Future[Answer], tuple[_Running[Result], Question]] = {}
    active = 0

    def advance(running: _Running[Result]) -> bool:
        """Feed a search while its answers are known; False when it ended."""
        while all(question.key() in running.answers for question in running.questions):
            given = [running.answers[question.key()] for question in running.questions]
            try:
                running.questions = running.search.send(given) if running.questions else next(running.search)
            except StopIteration as end:
                results[running.name] = end.value
                on_done(running.name, end.value)
                return False
            for question in running.questions:
                known = answers.get(question)
                if known is not None:
                    running.answers[question.key()] = known
                    on_answer(running.name, question, known)
        for question in running.questions:
            if question.key() not in running.answers:
                pending[pool.submit(answer, question)] = (running, question)
        return True

    while waiting or pending:
        while waiting and active < 2 * processes:
            name, search = waiting.pop(0)
            active += advance(_Running(name, search))
        done: Iterable[Future[Answer]] = wait(pending, return_when=FIRST_COMPLETED).done if pending else ()
        touched: list[_Running[Result]] = []
        for future in done:
            running, question = pending.pop(future)
            found = future.result()
            answers.put(question, found)
            running.answers[question.key()] = found
            on_answer(running.name, question, found)
            if running not in touched:
                touched.append(running)
        for running in touched:
            if all(question.key() in running.answers for question in running.questions):
                active -= not advance(running)
