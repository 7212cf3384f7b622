"""What layouts read of media that vLLM knows already.

The process that a request arrives in sends each medium to the engine once, and later its hash alone, as long as both
have it in their caches. Its own cache holds no features, so what layouts read of them is kept here: some numbers each.
"""

from collections.abc import Collection, Mapping
from typing import Any

MIN_PRUNED = 1024  # media; below, forgetting some is not worth the look


class LayoutFeatures:
    """What layouts read of media, by their hash.

    names: of the features that layouts read. cache: vLLM's for processed media; None if it is off.
    """

    def __init__(self, names: Collection[str], cache: Any) -> None:
        self._names, self._cache = names, cache
        self._known: dict[str, Mapping[str, Any]] = {}
        self._limit = MIN_PRUNED

    def of(self, features: list[Any]) -> list[Mapping[str, Any]] | None:
        """What layouts read of a prompt's media, in its order.

        None if vLLM withholds a medium that never came: the engine does not have it either, and refuses the request.
        """
        media = []
        for feature in sorted(features, key=lambda feature: feature.mm_position.offset):
            if feature.data is not None:
                known = {name: feature.data[name] for name in self._names if name in feature.data}
                if self._cache is not None and feature.mm_hash is not None:
                    self._remember(feature.mm_hash, known)
            elif (known := self._known.get(feature.mm_hash)) is None:
                return None
            media.append(known)
        return media

    def _remember(self, mm_hash: str, known: Mapping[str, Any]) -> None:
        self._known[mm_hash] = known
        if len(self._known) > self._limit:
            self._known = {key: value for key, value in self._known.items() if self._cache.is_cached_item(key)}
            self._known[mm_hash] = known
            self._limit = max(MIN_PRUNED, 2 * len(self._known))
