"""The documentation: every snippet runs and prints what stands below it, and the site is whole and stands alone.

A page is one program: its python blocks run in order in one namespace. What a block prints is the text block right
below it; with none below it prints nothing. A block may end in an error that it is to show: the text then ends in
the last line of the traceback. All pages are run so but those of docs/methods/, which have a test of their own.

A block whose title is the path of a file quotes that file, and is not run: its lines stand there, in this order; a
line of three dots leaves some out.
"""

import contextlib
import importlib
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import adadepth as ad

pytestmark = [
    pytest.mark.plain,  # snippets run as they do for a user, without the hook that checks shapes
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Dynamo's own
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
OWN = {page: text for page, text in PAGES.items() if not page.startswith("methods/")}
SNIPPET = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
QUOTE = re.compile(r'^```(?:python|yaml) title="(.+?)"\n(.*?)^```$', re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """What a page sets for its process does not reach the next."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_printoptions(profile="default")


def run(code: str, where: str, namespace: dict[str, object], *, may_fail: bool) -> str:
    """What a snippet prints, and the last line of its traceback if it may fail."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, where, "exec"), namespace)
    except Exception as error:
        if not may_fail:
            raise
        printed.write("".join(traceback.format_exception_only(error)))
    return printed.getvalue()


@pytest.mark.parametrize("page", [page for page in OWN if "```python" in OWN[page]])
def test_a_page_runs_and_prints_what_it_shows(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if re.search(r"adadepth\.hf|transformers", OWN[page]):
        pytest.importorskip("transformers")
    if "from examples.adaponderlm" in OWN[page]:
        pytest.importorskip("omegaconf")
    if "import viz" in OWN[page]:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"docs_{re.sub(r'[^a-z]', '_', page)}")
    monkeypatch.setattr(ad.RecurrentWrapper, "self_check", True)
    monkeypatch.setitem(sys.modules, module.__name__, module)  # classes of a page are found as those of a module
    torch.manual_seed(987654)  # not what a page was written with: what is random in it, it seeds itself
    for found in SNIPPET.finditer(OWN[page]):
        line = OWN[page].count("\n", 0, found.start()) + 1
        code, text = "\n" * line + found[1], found[2] or ""
        got = run(code, str(DOCS / page), vars(module), may_fail=bool(re.search(r"^\w*Error: ", text, re.MULTILINE)))
        assert got == text, f"{page}, the snippet at line {line}"


@pytest.mark.parametrize("page", OWN)
def test_no_block_escapes_the_tests(page: str) -> None:
    fences = re.findall(r"^[ >]*(?:```|~~~).*$", OWN[page], re.MULTILINE)
    opened = Counter(fences[::2])
    assert sum(opened.pop(fence) for fence in [*opened] if " title=" in fence) == len(QUOTE.findall(OWN[page]))
    assert set(opened) <= {"```python", "```text", "```sh", "```bibtex"}
    assert set(fences[1::2]) <= {"```"}
    snippets = SNIPPET.findall(OWN[page])
    assert opened["```python"] == len(snippets)
    assert opened["```text"] == sum(bool(text) for _, text in snippets)
    assert all(len(line) <= 88 for code, _ in snippets for line in code.splitlines())


QUOTES = [
    pytest.param(path, quoted, id=f"{page}: {path}, {quoted.strip().splitlines()[0].strip()}")
    for page, text in OWN.items()
    for path, quoted in QUOTE.findall(text)
]


@pytest.mark.parametrize(("path", "quoted"), QUOTES)
def test_a_quotation_stands_in_its_source(path: str, quoted: str) -> None:
    lines, at = (ROOT / path).read_text().splitlines(), 0
    for part in re.split(r"^\.\.\.\n", quoted, flags=re.MULTILINE):
        wanted = part.splitlines()
        starts = range(at, len(lines) - len(wanted) + 1)
        found = [i for i in starts if dedented(lines[i : i + len(wanted)]) == dedented(wanted)]
        assert found, f"{path} has not, or not in this place:\n{part}"
        at = found[0] + len(wanted)


def dedented(lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines))


COMMANDS = [
    pytest.param(line, id=f"{page}: {line}")
    for page, text in {**OWN, "README.md": (ROOT / "README.md").read_text()}.items()
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_names_what_exists(line: str) -> None:
    match shlex.split(line, comments=True):
        case ["pip", "install", what]:
            extras = re.findall(r"[\w-]+", what)
            assert {*extras} <= tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
                "optional-dependencies"
            ].keys()
        case ["make", target, *settings]:
            makefile = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{target}:", makefile, re.MULTILINE)
            assert all(f"$({setting.partition('=')[0]})" in makefile for setting in settings)
        case ["accelerate", "launch", *words] if any(word.endswith("train.py") for word in words):
            pytest.importorskip("accelerate")
            pytest.importorskip("omegaconf")
            from examples.adaponderlm import config, train

            at = next(i for i, word in enumerate(words) if word.endswith("train.py"))
            assert all((ROOT / word).is_file() for word in words[: at + 1] if re.search(r"\.(py|yaml)$", word))
            parsed = train.arguments(words[at + 1 :])
            config.read(parsed.config, parsed.overrides)
        case ["python", "-m", "adadepth.hf.lm_eval", "--model", "adadepth", "--model_args", arguments, *_]:
            pytest.importorskip("lm_eval")
            taken = inspect.signature(importlib.import_module("adadepth.hf.harness").AdaptiveLM).parameters
            assert {pair.partition("=")[0] for pair in arguments.split(",")} <= taken.keys()
        case ["python", "-m", module, *arguments]:
            path = ROOT / module.replace(".", "/")
            source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
            assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))
        case ["curl", "http://localhost:8000/v1/completions", "--json", body]:
            assert json.loads(body).keys() == {"model", "prompt", "max_tokens", "max_depth"}
        case other:
            pytest.fail(f"say here how to check {other}")


def objects(module: types.ModuleType) -> list[object]:
    """The public functions and classes that a module gives its users."""
    names = (name for name in vars(module) if not name.startswith("_"))
    things = [vars(module)[name] for name in names]
    things = [thing for thing in things if inspect.isroutine(thing) or inspect.isclass(thing)]
    return [thing for thing in things if re.match(r"adadepth(?!.*\._)", thing.__module__)]


def test_every_public_name_is_on_one_page_of_the_api() -> None:
    public: list[Any] = [*objects(ad), *own(ad.testing), *own(ad.diagnostics)]
    public += objects(importlib.import_module("adadepth.viz"))
    if importlib.util.find_spec("transformers"):
        public += objects(importlib.import_module("adadepth.hf"))
    shown = [resolve(name) for page, text in OWN.items() for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)]
    counts = Counter(id(thing) for thing in shown if thing is not None)
    assert {thing.__name__: counts[id(thing)] for thing in public if counts[id(thing)] != 1} == {}


def own(module: types.ModuleType) -> list[object]:
    """What a module defines itself, of what it gives its users."""
    return [thing for thing in objects(module) if thing.__module__ == module.__name__]


def resolve(name: str) -> object:
    """The object of that name; None without the extra that it needs."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError:
        return None


def test_shape_names_are_those_of_the_signatures() -> None:
    kinds = {**vars(importlib.import_module("adadepth._types")), **vars(importlib.import_module("adadepth.losses"))}
    for names, shape in re.findall(r"^\| (`[A-Z].*?) \| `\((.*?)\)`", PAGES["api/index.md"], re.MULTILINE):
        for name in re.findall(r"\w+", names):
            axes = re.sub(r"\*\w+", "...", kinds[name].dim_str)
            assert axes.split() == shape.replace("head_dim", axes.split()[-1]).split(", "), name


def test_the_picture_on_the_home_page_is_what_its_snippet_prints() -> None:
    depths = [int(n) for n in re.findall(r"\d", SNIPPET.findall(PAGES["index.md"])[0][1].split("tensor")[1])]
    cells = re.findall(r'class="on" x="(\d+)"', (DOCS / "images" / "depth.svg").read_text())
    assert [count for _, count in sorted(Counter(map(int, cells)).items())] == depths


def test_the_picture_of_the_readme_is_of_its_quick_start() -> None:
    """The rows are of its task: what is shaded is two hops away, and ran two iterations."""
    picture = (DOCS / "images" / "hops.svg").read_text()
    numbers = torch.tensor([int(n) for n in re.findall(r'font-size="14" fill="#7d8291">(\d)<', picture)]).view(-1, 12)
    first = torch.minimum(numbers, torch.arange(12))
    far = first != torch.minimum(numbers.gather(1, first), first)
    cells = re.findall(r'class="(on|off|far)" x="(\d+)" y="(\d+)"', picture)
    ran, shaded = torch.zeros_like(numbers), torch.zeros_like(numbers)
    for kind, x, y in cells:
        row, column = int(y) // 76, (int(x) - 8) // 40
        (shaded if kind == "far" else ran)[row, column] += kind != "off"
    assert len(numbers) == 3
    assert torch.equal(shaded.bool(), far) and torch.equal(ran, far + 1)


def test_the_heat_map_is_what_its_snippet_makes() -> None:
    text, deep = re.findall(r'"(depth that .*?)"|int\(n\) for n in "(\d+)"', PAGES["losses-and-diagnostics.md"])
    heat = importlib.import_module("adadepth.viz").heat_map(
        list(text[0]), torch.tensor([int(n) for n in deep[1]]), steps=4
    )
    assert heat == (DOCS / "images" / "heat.html").read_text()


# The site, built


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # of the theme, about its own future
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


def test_every_page_is_in_the_navigation() -> None:
    pages = re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(pages) == sorted(PAGES)


class Loads(HTMLParser):
    """What a page would fetch by itself."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster") or (name == "href" and tag in ("link", "image", "use")):
                self.found.append(value or "")
            self.found += re.findall(r"url\(([^)]*)\)", value or "") if name == "style" else []


def test_reading_a_page_asks_nothing_of_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    fetched = [(page, url) for page in pages for url in Loads(page.read_text()).found if not url.startswith("data:")]
    assert [(page.name, url) for page, url in fetched if re.match(r"\w+:|//", url)] == []
    paths = [(page, page.parent / url.partition("#")[0].partition("?")[0]) for page, url in fetched]
    assert [(page.name, path) for page, path in paths if page.name != "404.html" and not path.exists()] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)]*", styles) == []
    assert not any('class="mermaid"' in page.read_text() for page in pages)  # its script would come from elsewhere


def test_a_page_says_its_version_and_links_types_and_sources(site: Path) -> None:
    page = (site / "api" / "loop.html").read_text()
    assert f">{ad.__version__}</li>" in page
    assert 'data-md-component="source"' not in page  # the theme's script asks GitHub for stars where it is
    assert 'href="https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module"' in page
    assert 'href="index.html#how-shapes-are-written"' in page
    path, line = re.findall(r"/blob/main/(adadepth/loop/wrapper\.py)#L(\d+)", page)[0]
    assert (ROOT / path).read_text().splitlines()[int(line) - 1].startswith(("@", "class RecurrentWrapper"))
    card = re.findall(r'property="og:image" content=".*/raw/main/(.*?)"', page)
    assert len(card) == 1 and (ROOT / card[0]).exists()


def test_search_works_from_disk(site: Path) -> None:
    """The index is a script, and so is what stands in for workers, which a page from disk may not start."""
    assert (site / "search" / "search_index.js").read_text().startswith("var __index = ")
    assert 'src="assets/iframe-worker.js"' in (site / "index.html").read_text()


def test_docstrings_are_on_their_page_whole(site: Path) -> None:
    for page, text in OWN.items():
        html = (site / page).with_suffix(".html").read_text()
        words = letters(re.sub(r"<[^>]*>", "", html))
        for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE):
            thing = resolve(name)
            missing = [] if thing is None else [part for part in paragraphs(thing) if letters(part) not in words]
            assert missing == [], name


def paragraphs(thing: object) -> list[str]:
    return re.split(r"\n\s*\n", inspect.getdoc(thing) or "")


def letters(text: str) -> str:
    """What is left of a text whatever its markup: `&lt;` and `<` and `` ` `` go, letters and digits stay."""
    return re.sub(r"&\w+;|&#\d+;|[\W_]", "", text)
