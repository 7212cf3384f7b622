"""Requests that vLLM answers with status 500 although only the client can mend them: they get 400 and the reason."""

from functools import cache, wraps
from typing import Any

from fastav.engines.vllm import compat
from fastav.errors import PlanError, reason_of

JSON_MARKS = '{}":'  # without which no JSON object can be written
GRAMMARS_OF_JSON = ("json", "json_object", "structural_tag")
NO_ANSWER = {"ClientConnectionError", "ClientPayloadError"}  # of aiohttp, besides those that are an OSError
OTHER_REASONS = {"ClientResponseError", "HTTPError", "UnidentifiedImageError"}  # vLLM tells these apart itself


def check_grammar(params: Any, tokenizer: Any) -> None:
    """Refuse to write JSON with a vocabulary that cannot, such as that of `tiny`.  Raises: PlanError."""
    grammar = getattr(params, "structured_outputs", None)
    if grammar is None or tokenizer is None:
        return
    if any(getattr(grammar, name, None) for name in GRAMMARS_OF_JSON) and (missing := _missing_marks(tokenizer)):
        raise PlanError(f"this model cannot write JSON: its vocabulary has no {missing}", "leave response_format out")


@cache
def _missing_marks(tokenizer: Any) -> str:
    vocabulary = tokenizer.get_vocab()
    return " ".join(mark for mark in JSON_MARKS if not any(mark in token for token in vocabulary))


def explain_fetching() -> None:
    """Make vLLM answer with 400 when a medium's host or file cannot be read; a second call does nothing."""
    connector = compat.MediaConnector
    if not hasattr(connector, "_fastav"):
        connector._fastav = True
        connector.load_from_url = _explained(connector.load_from_url)
        connector.load_from_url_async = _explained_async(connector.load_from_url_async)


def _explained(load: Any) -> Any:
    @wraps(load)
    def load_from_url(self: Any, url: str, *args: Any, **kwargs: Any) -> Any:
        _require_readable(self, url)
        try:
            return load(self, url, *args, **kwargs)
        except Exception as error:
            raise _explanation(url, error) from error

    return load_from_url


def _explained_async(load: Any) -> Any:
    @wraps(load)
    async def load_from_url_async(self: Any, url: str, *args: Any, **kwargs: Any) -> Any:
        _require_readable(self, url)
        try:
            return await load(self, url, *args, **kwargs)
        except Exception as error:
            raise _explanation(url, error) from error

    return load_from_url_async


def _require_readable(connector: Any, url: str) -> None:
    """Raises: VLLMValidationError for a file, if the operator allows none."""
    if url[:5].lower() == "file:" and connector.allowed_local_media_path is None:
        raise compat.VLLMValidationError(
            "this server reads no files of its own: send the medium's content as a data: URL "
            "(the operator can allow a folder with --allowed-local-media-path)"
        )


def _explanation(url: str, error: Exception) -> Exception:
    """What to raise in place of an error of reading a medium."""
    classes = {kind.__name__ for kind in type(error).__mro__}
    if classes & OTHER_REASONS or not (isinstance(error, OSError) or classes & NO_ANSWER):
        return error
    shown = "this data: URL" if url[:5].lower() == "data:" else url[:200]
    return compat.VLLMValidationError(f"{shown} cannot be read: {reason_of(error)}")
