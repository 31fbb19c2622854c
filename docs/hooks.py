"""What mkdocs does beside its plugins: the version, what search finds first, and links to other projects' types."""

import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocstrings import Inventory

ROOT = Path(__file__).parent.parent
TORCH = {
    "torch.Tensor": "tensors.html",
    "torch.dtype": "tensor_attributes.html",
    "torch.device": "tensor_attributes.html",
    "torch.Generator": "generated/torch.Generator.html",
    "torch.nn.Module": "generated/torch.nn.Module.html",
    "torch.nn.Embedding": "generated/torch.nn.Embedding.html",
    "torch.nn.Linear": "generated/torch.nn.Linear.html",
    "torch.nn.TransformerEncoder": "generated/torch.nn.TransformerEncoder.html",
    "torch.nn.TransformerEncoderLayer": "generated/torch.nn.TransformerEncoderLayer.html",
    "torch.nn.Parameter": "generated/torch.nn.parameter.Parameter.html",
}
PYTHON = {
    **dict.fromkeys(("bool", "float", "int", "slice"), "library/functions.html"),
    **dict.fromkeys(("bytes", "dict", "list", "range", "str", "tuple"), "library/stdtypes.html"),
    **{
        f"collections.abc.{name}": "library/collections.abc.html"
        for name in ("Callable", "Collection", "Iterable", "Iterator", "Mapping", "Sequence")
    },
    **{f"typing.{name}": "library/typing.html" for name in ("Any", "Literal", "NamedTuple", "NoReturn")},
    "object": "library/functions.html",
    "os.PathLike": "library/os.html",
    "pathlib.Path": "library/pathlib.html",
}
MATPLOTLIB = {"matplotlib.figure.Figure": "api/figure_api.html"}
# The names link to where they are documented; nothing is asked of these sites when the documentation is built.
SITES = {
    "https://docs.pytorch.org/docs/stable/": TORCH,
    "https://docs.python.org/3/": PYTHON,
    "https://matplotlib.org/stable/": MATPLOTLIB,
}
# What is looked up stands first; what is read once, or is a list of everything, last.
BOOST = {
    **{"api/loop.md": 8.0, "api/": 4.0, "questions.md": 2.5, "troubleshooting.md": 2.0, "citation.md": 8.0},
    **{"full-scale.md": 0.5, "changelog.md": 0.2},
}


@event_priority(100)  # before mkdocstrings reads them
def on_config(config: Any) -> Any:
    """The package's version for the header; the names of other projects."""
    source = (ROOT / "adadepth" / "__init__.py").read_text("utf-8")
    config.extra["release"] = re.findall(r'__version__ = "(.*)"', source)[0]
    handler = config.plugins["mkdocstrings"].config.handlers["python"]
    handler["inventories"] = [{"url": inventory(names).as_uri(), "base_url": site} for site, names in SITES.items()]
    return config


def inventory(names: dict[str, str]) -> Path:
    """A file that says where each name stands, as Sphinx writes it."""
    listed = Inventory()
    for name, page in names.items():
        listed.register(name=name, domain="py", role="class", uri=f"{page}#{name}")
    path = Path(tempfile.mkdtemp()) / "objects.inv"
    path.write_bytes(listed.format_sphinx())
    return path


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: object) -> str:
    """How early search finds a page; what the names of shapes in signatures link to."""
    del kwargs
    path = page.file.src_uri
    boost = next((boost for start, boost in BOOST.items() if path.startswith(start)), None)
    if boost is not None:
        page.meta.setdefault("search", {})["boost"] = boost
    if path == "api/index.md":
        shapes = [f"jaxtyping.{kind}" for kind in ("Bool", "Float", "Int", "Integer", "Shaped")]
        for names in re.findall(r"^\| (`[A-Z].*?) \|", markdown, re.MULTILINE):
            named = re.findall(r"\w+", names)
            shapes += [f"adadepth.{'losses' if name == 'LossRows' else '_types'}.{name}" for name in named]
        for name in shapes:
            config.plugins["autorefs"].register_anchor(page, name, "how-shapes-are-written", primary=True)
    return markdown
