"""All of it: contenders by turns, round after round, each asked by more and more clients at once."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastav.bench.load import clients, report
from fastav.bench.load.clients import Said, Seen
from fastav.bench.load.contenders import OFF, Contender, Subject, arguments
from fastav.bench.load.prompts import Asking
from fastav.bench.load.server import Server, serving
from fastav.engines.vllm import server_args
from fastav.errors import FastAVError
from fastav.layout import Layout

WARMING = 90_000  # numbers of questions that warm a server up


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much is asked.

    levels: clients at once. least, each: questions of a level: so many at least, and so many for each client. new:
    tokens of an answer. seconds: of everything, after which no level begins. start: seconds that a server may take to
    be ready. patience: seconds that a client waits for an answer.
    """

    levels: Sequence[int]
    rounds: int
    least: int
    each: float | int
    new: int
    seconds: float | int
    start: float | int
    patience: float | int

    def questions(self, level: int) -> int:
        """Of one level."""
        return max(self.least, round(self.each * level))


@dataclass(kw_only=True)
class Suite:
    """The benchmark of one model.

    common: flags of every server. steady: whether a question that comes again must be answered alike, which
    half precision does not promise. layouts: of prompts of each kind. wrong: what must not be, in words.
    """

    of: Subject
    contenders: Sequence[Contender]
    bounds: Bounds
    common: Mapping[str, str | None]
    max_model_len: int
    steady: bool
    folder: Path
    say: Callable[[str], Any]
    asking: Asking = field(init=False)
    layouts: Mapping[str, Layout] = field(init=False)
    runs: list[dict[str, Any]] = field(default_factory=list)
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    _known: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)  # answers, by contender and question
    _again: dict[str, list[bool]] = field(default_factory=dict)  # whether what was asked again was answered alike
    _prompts: dict[str, dict[str, int]] = field(default_factory=dict)  # tokens by contender and kind, from the server

    def __post_init__(self) -> None:
        self.asking = Asking(self.of.adapter)

    def prepare(self, processor: Any) -> None:
        """Find out what prompts look like.  Raises: FastAVError if the longest has no room."""
        numbers = range(len(self.asking.kinds))
        self.layouts = {
            self.asking.kind(number).name: self.asking.layout(processor, number, self.folder) for number in numbers
        }
        most = max(map(len, self.layouts.values())) + self.bounds.new
        if most > self.max_model_len:
            raise FastAVError(f"prompt and answer take {most:,} tokens, and --max-model-len is {self.max_model_len:,}")

    def run(self, write: Callable[[Mapping[str, Any]], Any]) -> None:
        """Measure.  A contender whose server fails is out; the others go on.

        write: called with what is known after every server.
        Raises: FastAVError if all are out.
        """
        end = time.monotonic() + self.bounds.seconds
        out: dict[str, FastAVError] = {}
        for number in range(self.bounds.rounds):
            turn = number % len(self.contenders)
            for one in (*self.contenders[turn:], *self.contenders[:turn]):
                if one.name in out or time.monotonic() >= end:
                    continue
                try:
                    self._serve(one, number, end)
                except FastAVError as error:
                    out[one.name] = error
                    self.wrong.append(f"{one.name}: {error}")
                    self.say(f"  {error}")
                    if len(out) == len(self.contenders):
                        raise
                write(self.found())

    def _serve(self, one: Contender, number: int, end: float | int) -> None:
        """One contender's server in one round."""
        words = server_args.server_command(self.of.source, arguments(self.of, one, self.common, self.max_model_len))
        self.say(f"round {number + 1}, {one.name}: starting the server")
        log, start = self.folder / f"{one.name.replace('/', '-')}-{number}.log", time.perf_counter()
        environment = server_args.ENVIRONMENT
        with serving(words, environment, log, seconds=self.bounds.start) as server:
            ready = time.perf_counter() - start
            told = [
                "python" if word == sys.executable else self.of.name if word == self.of.source else word
                for word in words
            ]
            known = self.servers.setdefault(one.name, {"environment": dict(environment), "command": told, "start": []})
            known["start"].append(ready)
            self._require_pruning(one, server)
            self._warm(server)
            for level in self.bounds.levels:
                if time.monotonic() >= end:
                    return
                numbers = range(self.bounds.questions(level))
                seen = clients.load(
                    server, self.asking, numbers, level, new=self.bounds.new, patience=self.bounds.patience
                )
                self._check(one, level, numbers, seen)
                self.runs.append(found := report.run(one.name, number, level, seen))
                self.say(report.line(found))

    def _require_pruning(self, one: Contender, server: Server) -> None:
        """Raises: FastAVError if the server's log does not say what is expected of it."""
        pruning = "fastav: pruning" in server.log
        if pruning != one.prunes:
            raise FastAVError(
                f"the server of {one.name} {'prunes' if pruning else 'does not say that it prunes'}",
                "is fastav installed where vLLM is, with its entry points?",
            )

    def _warm(self, server: Server) -> None:
        """A question of every kind, two at a time: what is compiled or filled on first use is there afterwards."""
        numbers = [WARMING - WARMING % len(self.asking.kinds) + at for at in range(len(self.asking.kinds))]
        clients.load(server, self.asking, numbers, 2, new=self.bounds.new, patience=self.bounds.patience)

    def _check(self, one: Contender, level: int, numbers: Sequence[int], seen: Seen) -> None:
        """Note what must not be: no answer, prompts of other lengths, blocks that are not given back."""
        where = f"{one.name}, {level} clients"
        if lost := set(numbers) - {said.number for said in seen.said}:
            self.wrong.append(f"{where}: {len(lost)} questions were lost")
        self.wrong += [f"{where}: question {said.number}: {said.error}" for said in seen.said if said.error]
        if seen.after.running or seen.after.waiting or seen.after.cache:
            self.wrong.append(f"{where}: when all is answered the server holds {asdict(seen.after)}")
        for said in seen.said:
            if not said.error:
                self._compare(one, where, said)

    def _compare(self, one: Contender, where: str, said: Said) -> None:
        """Hold an answer against what is known of its question."""
        kind = self.asking.kind(said.number).name
        expected = None if one.evs else len(self.layouts[kind])
        counted = self._prompts.setdefault(one.name, {}).setdefault(kind, said.prompt)
        if said.prompt != (counted if expected is None else expected):
            self.wrong.append(f"{where}: a prompt about a {kind} has {said.prompt} tokens, not {expected or counted}")
        first = self._known.setdefault((one.name, said.number), said.tokens)
        if first is not said.tokens:
            self._again.setdefault(one.name, []).append(first == said.tokens)
            if self.steady and first != said.tokens:
                self.wrong.append(f"{where}: question {said.number} is answered otherwise than before")

    def found(self) -> dict[str, Any]:
        """What is known so far, as JSON holds it."""
        return {
            "servers": self.servers,
            "plans": {one.name: [step.to_dict() for step in one.plan.steps] for one in self.contenders},
            "prompts": [self._prompt(kind, layout) for kind, layout in self.layouts.items()],
            "answers": {one.name: self._answers(one.name) for one in self.contenders if one.name in self.servers},
            "rows": report.rows(self.runs),
            "runs": self.runs,
            "wrong": self.wrong,
        }

    def _prompt(self, kind: str, layout: Layout) -> dict[str, Any]:
        """A kind of prompt: its tokens, those that the server counts, and the mean and last layer's of every plan."""
        held = {one.name: one.plan.tokens(layout, self.of.unpruned.depth) for one in self.contenders if not one.evs}
        return {
            "kind": kind,
            "tokens": len(layout),
            "by_modality": layout.by_modality(),
            "counted": {name: kinds[kind] for name, kinds in self._prompts.items() if kind in kinds},
            "mean_layer": {name: sum(tokens) / len(tokens) for name, tokens in held.items()},
            "last_layer": {name: tokens[-1] for name, tokens in held.items()},
        }

    def _answers(self, name: str) -> dict[str, int]:
        """How many answers came again, how many of those differed, and how many questions are answered as unpruned."""
        mine = {number: tokens for (whose, number), tokens in self._known.items() if whose == name}
        theirs = {number: tokens for (whose, number), tokens in self._known.items() if whose == OFF}
        both = mine.keys() & theirs.keys()
        again = self._again.get(name, [])
        return {
            "again": len(again),
            "differed": again.count(False),
            "questions": len(both),
            "as_off": sum(mine[number] == theirs[number] for number in both),
        }
