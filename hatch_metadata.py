"""What a release says of itself beside pyproject.toml: addresses, and README.md with links that work everywhere."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<picture>!?)(?P<label>\[[^\]]*\]\()(?P<path>(?!\w+:|#)[^)\s]+)(?=\))")


class Metadata(MetadataHookInterface):
    """Called by hatchling, also for an editable installation."""

    def update(self, metadata: dict) -> None:
        """Fill in what pyproject.toml calls dynamic."""
        repository = self.config["repository"]
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, repository)}
        metadata["urls"] = {
            "Repository": repository,
            "Documentation": f"{repository}/tree/main/docs",
            "Changelog": f"{repository}/blob/main/CHANGELOG.md",
            "Issues": f"{repository}/issues",
        }


def absolute(text: str, repository: str) -> str:
    """Markdown whose relative links lead into the repository; pictures to the file itself."""

    def target(link: re.Match[str]) -> str:
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}{link['label']}{repository}/{kind}/main/{link['path']}"

    return LINK.sub(target, text)
