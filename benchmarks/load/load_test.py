"""The load test: round after round, each contender's server answers more and more concurrent clients."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.load import report
from benchmarks.load.clients import Completion, LevelResult, run_clients
from benchmarks.load.contenders import OFF, ServedModel, ServerContender, server_flags
from benchmarks.load.questions import MIXED, SILENT, QuestionSet
from benchmarks.load.server import Server, serving
from fastav.bench.measure import rotated
from fastav.engines.vllm import server_args
from fastav.errors import FastAVError
from fastav.layout import Layout

WARMUP_NUMBER = 90_000  # of the first question that warms a server up
KINDS = math.lcm(len(MIXED), len(SILENT))  # after which questions are of the same kinds again
ASKING = 0.8  # share of a timed level in which clients ask; the rest is for the last answers
SHORTEST = 1.0  # second of a timed level, below which it is left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The size of a load test.

    levels: numbers of concurrent clients. least, each: questions of a level: at least `least`, and `each` for each
    client. new: tokens of an answer. seconds: time after which no level begins. start: seconds that a server may take
    to start. patience: seconds that a client waits for an answer. timed: whether levels have a time instead of a
    number of questions: what is left of `seconds` is divided among contenders and levels. Then no question is repeated
    and each is about media of its own, so that vLLM's caches may be on.
    """

    levels: Sequence[int]
    rounds: int
    least: int
    each: float | int
    new: int
    seconds: float | int
    start: float | int
    patience: float | int
    timed: bool = False

    def questions(self, level: int) -> int:
        """The number of questions of a level."""
        return max(self.least, round(self.each * level))

    def numbers(self, place: int) -> range:
        """The numbers of the questions of the level in this place; of a timed level, more than it has time for."""
        if not self.timed:
            return range(self.questions(self.levels[place]))
        each = WARMUP_NUMBER // len(self.levels) // KINDS * KINDS
        return range(place * each, (place + 1) * each)


def divided(now: float | int, end: float | int, parts: int) -> float | int:
    """The time of the next of several parts of equal length."""
    return max(end - now, 0) / parts


@dataclass(kw_only=True)
class LoadTest:
    """The load test of one model.

    common: flags of every server. deterministic: whether a repeated question must get the same answer, which half
    precision does not guarantee. layouts: of prompts by kind. wrong: errors that the test found, one line each.
    """

    model: ServedModel
    contenders: Sequence[ServerContender]
    bounds: Bounds
    common: Mapping[str, str | None]
    max_model_len: int
    deterministic: bool
    folder: Path
    output: Callable[[str], Any]
    questions: QuestionSet = field(init=False)
    layouts: Mapping[str, Layout] = field(init=False)
    runs: list[dict[str, Any]] = field(default_factory=list)
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    _answers: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=dict)  # by contender and question
    _repeats: dict[str, list[bool]] = field(default_factory=dict)  # by contender: whether repeated answers are equal
    _prompts: dict[str, dict[str, int]] = field(default_factory=dict)  # tokens by contender and kind, from the server

    def __post_init__(self) -> None:
        self.questions = QuestionSet(self.model.adapter, distinct=self.bounds.timed)

    def prepare(self, processor: Any) -> None:
        """Compute the layouts of prompts.  Raises: FastAVError if the longest does not fit."""
        questions = self.questions
        self.layouts = {
            kind.name: questions.layout(processor, number, self.folder) for number, kind in enumerate(questions.kinds)
        }
        most = max(map(len, self.layouts.values())) + self.bounds.new
        if most > self.max_model_len:
            raise FastAVError(f"prompt and answer take {most:,} tokens, and --max-model-len is {self.max_model_len:,}")

    def run(self, write: Callable[[Mapping[str, Any]], Any]) -> None:
        """Measure.  A contender whose server fails drops out; the others go on.

        write: called with the results so far after every server.
        Raises: FastAVError if all contenders fail.
        """
        end = time.monotonic() + self.bounds.seconds
        failed: set[str] = set()
        for number in range(self.bounds.rounds):
            for place, one in enumerate(rotated(self.contenders, number)):
                if one.name in failed or time.monotonic() >= end:
                    continue
                left = (self.bounds.rounds - number) * len(self.contenders) - place
                now = time.monotonic()
                try:
                    self._serve(one, number, now + divided(now, end, left) if self.bounds.timed else end)
                except FastAVError as error:
                    failed.add(one.name)
                    self.wrong.append(f"{one.name}: {error}")
                    self.output(f"  {error}")
                    if len(failed) == len(self.contenders):
                        raise
                write(self.results())

    def _serve(self, one: ServerContender, number: int, end: float | int) -> None:
        """Start a contender's server in one round, and run the levels on it."""
        arguments = server_flags(self.model, one, self.common, self.max_model_len)
        words = server_args.server_command(self.model.source, arguments)
        names = {sys.executable: "python", self.model.source: self.model.name}
        self.output(f"round {number + 1}, {one.name}: starting the server")
        log, start = self.folder / f"{one.name.replace('/', '-')}-{number}.log", time.perf_counter()
        longest = min(self.bounds.start, end - time.monotonic()) if self.bounds.timed else self.bounds.start
        with serving(words, {}, log, seconds=longest) as server:
            ready = time.perf_counter() - start
            command = [names.get(word, word) for word in words]
            entry = {"command": command, "start": []}
            self.servers.setdefault(one.name, entry)["start"].append(ready)
            self._require_pruning(one, server)
            # a question of every kind, two at a time, so that caches are filled and kernels compiled
            first = WARMUP_NUMBER - WARMUP_NUMBER % len(self.questions.kinds)
            self._ask(server, range(first, first + len(self.questions.kinds)), clients=2)
            for place, level in enumerate(self.bounds.levels):
                now = time.monotonic()
                seconds = ASKING * divided(now, end, len(self.bounds.levels) - place) if self.bounds.timed else math.inf
                if now >= end or seconds < SHORTEST:
                    if self.bounds.timed:
                        self.wrong.append(f"{one.name}: there was no time for {level} clients")
                    continue
                result = self._ask(server, self.bounds.numbers(place), clients=level, seconds=seconds)
                self._check(one, level, result)
                self.runs.append(run := report.run(one.name, number, level, result))
                self.output(report.line(run))

    def _ask(
        self, server: Server, numbers: Sequence[int], clients: int, seconds: float | int = math.inf
    ) -> LevelResult:
        new, patience = self.bounds.new, self.bounds.patience
        return run_clients(server, self.questions, numbers, clients, new=new, patience=patience, seconds=seconds)

    def _require_pruning(self, one: ServerContender, server: Server) -> None:
        """Raises: FastAVError if the server's log contradicts the contender."""
        pruning = "fastav: pruning" in server.log
        if pruning != one.prunes:
            raise FastAVError(
                f"the server of {one.name} {'prunes' if pruning else 'does not say that it prunes'}",
                "is fastav installed where vLLM is, with its entry points?",
            )

    def _check(self, one: ServerContender, level: int, result: LevelResult) -> None:
        """Note errors: missing answers, prompts of other lengths, blocks that the server does not free."""
        where, completions = f"{one.name}, {level} clients", result.completions
        if lost := set(result.asked) - {completion.number for completion in completions}:
            self.wrong.append(f"{where}: {len(lost)} questions were lost")
        if result.after.busy:
            self.wrong.append(f"{where}: after the last answer the server holds {asdict(result.after)}")
        for completion in completions:
            if completion.error:
                self.wrong.append(f"{where}: question {completion.number}: {completion.error}")
            else:
                self._compare(one, where, completion)

    def _compare(self, one: ServerContender, where: str, completion: Completion) -> None:
        """Compare an answer with the prompt's length, and with earlier answers to the same question."""
        number, tokens = completion.number, completion.tokens
        kind = self.questions.kind(number).name
        counted = self._prompts.setdefault(one.name, {}).setdefault(kind, completion.prompt)
        expected = counted if one.evs else len(self.layouts[kind])
        if completion.prompt != expected:
            self.wrong.append(f"{where}: a prompt about a {kind} has {completion.prompt} tokens, not {expected}")
        first = self._answers.setdefault(one.name, {}).setdefault(number, tokens)
        if first is not tokens:
            self._repeats.setdefault(one.name, []).append(first == tokens)
            # sums over chunks with other borders differ by rounding, which can decide between near scores
            if self.deterministic and not one.chunks and first != tokens:
                self.wrong.append(f"{where}: question {number} has another answer than before")

    def results(self) -> dict[str, Any]:
        """The results so far, as JSON holds them."""
        return {
            "servers": self.servers,
            "plans": {one.name: [step.to_dict() for step in one.plan.steps] for one in self.contenders},
            "prompts": [self._prompt(kind, layout) for kind, layout in self.layouts.items()],
            "answers": {one.name: self._agreement(one.name) for one in self.contenders if one.name in self.servers},
            "rows": report.rows(self.runs),
            "runs": self.runs,
            "wrong": self.wrong,
        }

    def _prompt(self, kind: str, layout: Layout) -> dict[str, Any]:
        """A kind of prompt: its tokens, the servers' counts, and each plan's tokens in the mean and last layer."""
        depth = self.model.unpruned.depth
        layers = {one.name: one.plan.tokens(layout, depth) for one in self.contenders if not one.evs}
        return {
            "kind": kind,
            "tokens": len(layout),
            "by_modality": layout.by_modality(),
            "counted": {name: kinds[kind] for name, kinds in self._prompts.items() if kind in kinds},
            "mean_layer": {name: sum(tokens) / len(tokens) for name, tokens in layers.items()},
            "last_layer": {name: tokens[-1] for name, tokens in layers.items()},
        }

    def _agreement(self, name: str) -> dict[str, int]:
        """How many answers were repeats, how many of them differed, and how many questions have the unpruned answer."""
        own, base = self._answers.get(name, {}), self._answers.get(OFF, {})
        both = own.keys() & base.keys()
        repeats = self._repeats.get(name, [])
        return {
            "again": len(repeats),
            "differed": repeats.count(False),
            "questions": len(both),
            "as_off": sum(own[number] == base[number] for number in both),
        }
