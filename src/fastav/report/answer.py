"""The page of answers: what one or several plans kept of a prompt, and what the model answered."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from fastav import __version__
from fastav.engine import Answer

SCHEMA = 1


def answer_report(runs: Sequence[Mapping[str, Any]]) -> str:
    """A self-contained HTML page of answers to one question, each under its plan.

    runs: at least one, each as `run_of` makes it; of the same model and question.
    """
    first = runs[0]["inspection"]
    data = {
        "schema": SCHEMA,
        "model": first["model"],
        "question": first["question"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "runs": list(runs),
    }
    return _filled(template(), "{{data}}", embedded(data))


def template() -> str:
    """The page without its data, for which it has the mark `{{data}}`."""
    page = _filled(read_text("answer.html"), "/*{{css}}*/", read_text("viewer.css"))
    return _filled(page, "/*{{js}}*/", read_text("viewer.js"))


def _filled(page: str, mark: str, content: str) -> str:
    before, found, after = page.partition(mark)
    assert found, f"the template has no {mark}"
    return before + content + after


def run_of(inspection: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    """One run for `answer_report`.  inspection: of the prompt under the answer's plan, as `to_json` makes it."""
    return {"plan": inspection["plan"], "text": answer.text, "usage": usage_of(answer), "inspection": dict(inspection)}


def usage_of(answer: Answer) -> dict[str, Any]:
    """The costs of an answer as a JSON object."""
    names = ("plan", "prompt_tokens", "tokens_per_layer", "flops", "kv_bytes", "seconds")
    return {name: value for name, value in answer.to_dict().items() if name in names}


def embedded(data: Mapping[str, Any]) -> str:
    """JSON for a script element of a page."""
    return json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def read_text(name: str) -> str:
    """A file of this package."""
    return resources.files("fastav.report").joinpath(name).read_text(encoding="utf-8")
