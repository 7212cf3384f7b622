"""What a request to the server may cost."""

from dataclasses import dataclass, fields

from fastav.errors import FastAVError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a server, so that one request cannot take what the others need.

    body_bytes: of the body of a request. files_bytes: of all uploaded files together.
    media: clips, sounds and images of a request. media_seconds: their length together. pixels: of a picture or frame.
    decoded_bytes: frames and sound that are read for a request. decode_seconds: to decode a request's media.
    decode_memory: bytes of one decoding process, beyond those that it starts with.
    new_tokens: of an answer. request_seconds: from the start of a request to the end of its answer.
    queue: requests that wait. text_chars: of all texts of a request. messages: of a request.

    Raises: FastAVError for a limit that is not positive.
    """

    body_bytes: int = 64_000_000
    files_bytes: int = 512_000_000
    media: int = 16
    media_seconds: float | int = 3600
    pixels: int = 7680 * 4320
    decoded_bytes: int = 2 * 2**30
    decode_seconds: float | int = 60
    decode_memory: int = 4 * 2**30
    new_tokens: int = 4096
    request_seconds: float | int = 300
    queue: int = 64
    text_chars: int = 200_000
    messages: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise FastAVError(
                    f"the limit {field.name} must be positive, got {value}", "leave it out for its default"
                )
