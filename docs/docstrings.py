"""How our docstrings become pages: each paragraph `Label: text` stands by itself, and lists of names are lists.

Classes and functions end in a link to their source.
"""

import re

from griffe import Class, Extension, Function, Object

SOURCE = "https://github.com/adadepth/adadepth/blob/main"

LABEL = re.compile(r"(Arguments|Attributes|Raises|Returns|Shapes|Source|Unit):(?: (.*))?")
ITEM = re.compile(r" {4}(\w+(?:, \w+)*): (.*)")


def laid_out(docstring: str) -> str:
    """A docstring as Markdown."""
    lines = []
    for line in docstring.splitlines():
        if label := LABEL.fullmatch(line):
            lines += ["", f"**{label[1]}:** {label[2] or ''}".rstrip(), *([] if label[2] else [""])]
        elif item := ITEM.fullmatch(line):
            lines.append(f"- {', '.join(f'`{name}`' for name in item[1].split(', '))}: {item[2]}")
        else:
            lines.append(line)
    return "\n".join(lines)


def source(obj: Object) -> str:
    """A link to the first line of a class or a function of a module; of others nothing."""
    if not isinstance(obj, Class | Function) or obj.parent is None or not obj.parent.is_module:
        return ""
    return f"\n\n[Source code]({SOURCE}/{obj.relative_package_filepath}#L{obj.lineno}){{ .source }}"


class Docstrings(Extension):
    """Lays out every docstring that is loaded."""

    def on_object(self, *, obj: Object, **kwargs: object) -> None:
        """After an object was read."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = laid_out(obj.docstring.value) + source(obj)
