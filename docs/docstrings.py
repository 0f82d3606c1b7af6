"""Turns the docstrings' plain-text lists into Markdown for the site: a griffe extension.

Docstrings list their arguments in one of two ways:

    name                        name      what it is
        What it is.             another   what that is

Both become definition lists. Other text stays as it is.
"""

import inspect
import re

import griffe

_ALIGNED = re.compile(r"^(\w[\w.]*(?:, \w+)*|`[^`]+`) {2,}(\S.*)$")
_NAME = re.compile(r"^\w[\w ]*(?:, \w+)*$")


def _markdown(text: str) -> str:
    lines, out, fence = text.split("\n"), [], False
    for i, line in enumerate(lines):
        following = lines[i + 1] if i + 1 < len(lines) else ""
        first = i == 0 or not lines[i - 1].strip() or lines[i - 1].startswith(" ") or _ALIGNED.match(lines[i - 1])
        aligned = _ALIGNED.match(line)
        if aligned and not fence:
            out += ["", f"`{aligned[1].strip('`')}`", "", f":   {aligned[2]}"]
        elif _NAME.match(line) and following.startswith("    ") and first and not fence:
            out += ["", f"`{line}`", ""]
        elif line.startswith("    ") and out and (out[-1].startswith((":   ", "    ")) or _opened(out)):
            out.append(("    " if out[-1] else ":   ") + line.strip())
        else:
            out.append(line)
    return "\n".join(out)


def _opened(out: list[str]) -> bool:
    """Whether the last two entries are the name of a definition that waits for its text."""
    return len(out) > 1 and out[-1] == "" and re.fullmatch(r"`\w[\w ,]*`", out[-2]) is not None


class Docstrings(griffe.Extension):
    """Rewrites every docstring after it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _markdown(inspect.cleandoc(obj.docstring.value))
