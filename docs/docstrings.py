"""Docstrings for the API reference: descriptions of parameters and fields become lists.

A paragraph that begins with the name of a parameter and a colon describes parameters, one per sentence:
`model: its name. plan: a Plan, or the name of one.`
"""

import re

import griffe


class Fields(griffe.Extension):
    """An extension of griffe that rewrites the docstrings of a package."""

    def on_package(self, *, pkg, **kwargs):
        """Rewrite every docstring of the package."""
        self._walk(pkg)

    def _walk(self, thing):
        for member in thing.members.values():
            if member.is_alias:
                continue
            if member.docstring and (names := _names(member)):
                member.docstring.value = _listed(member.docstring.value, names)
            if member.is_module or member.is_class:
                self._walk(member)


def _names(thing):
    if thing.is_function:
        return [parameter.name for parameter in thing.parameters]
    if thing.is_class:
        return [name for name, member in thing.members.items() if member.is_attribute] + [
            p.name for p in thing.parameters
        ]
    return []


def _listed(text, names):
    name = "|".join(map(re.escape, names))
    start = re.compile(rf"(?:^|(?<=\. )|(?<=\.\n))((?:{name})(?:, (?:{name}))*): ")
    paragraphs = text.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if start.match(paragraph):
            paragraphs[i] = start.sub(lambda m: f"\n- `{m[1].replace(', ', '`, `')}`: ", paragraph).lstrip()
    return "\n\n".join(paragraphs)
