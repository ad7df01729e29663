"""An extension of griffe: docstrings as mkdocstrings reads them."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Write ``Example:`` as a section, and :class:`Name` as code."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change an object's docstring before it is parsed."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r":(class|func|meth|data):`~?", "`", text)
