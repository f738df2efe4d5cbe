"""The documentation tells the truth: its code runs, its names exist, its links lead somewhere."""

import ast
import re
import textwrap
from inspect import cleandoc
from pathlib import Path

import pytest
import torch
from registry import EXPORTED

import invertible
from invertible import testing
from invertible.testing import strategies

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = {"_build", "learn"}  # the tutorials run when they become pages of learn
PAGES = sorted(
    [*ROOT.glob("*.md")]
    + [page for page in DOCS.rglob("*.rst") if page.relative_to(DOCS).parts[0] not in GENERATED]
)
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))

FENCE = re.compile(r"^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"^\.\. code-block:: python\n\n(?P<code>(?:(?: {3}.*)?\n)+)", re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page, each behind as many empty lines as stand before it there.

    So errors bear the line numbers of the page.
    """
    text = page.read_text()
    pattern = FENCE if page.suffix == ".md" else DIRECTIVE
    return [
        "\n" * text.count("\n", 0, match.start("code")) + textwrap.dedent(match["code"])
        for match in pattern.finditer(text)
    ]


@pytest.fixture
def _restored():
    """Puts back what code for readers may set: the default dtype and the random state."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(dtype)


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_the_code_of_a_page_runs(page):
    names = {"__name__": page.stem}
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_line_can_break_between_a_number_and_its_percent_sign(page):
    assert not re.findall(r"\d\s+%", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_python_escapes_the_test_above(page):
    text = page.read_text()
    marked = len(re.findall(r"```py|(code-block|code|sourcecode)::\s*py", text))
    assert marked == len(blocks(page))
    assert ">>> " not in text, "show code in python blocks; examples in docstrings may have prompts"


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("invertible", invertible.__all__),
        ("invertible.testing", testing.__all__),
        ("invertible.testing.strategies", strategies.__all__),
    ],
)
def test_the_reference_has_every_public_name(module, names):
    found = set()
    for page in (DOCS / "api").glob("*.rst"):
        found |= documented(page.read_text())
    assert {f"{module}.{name}" for name in names if name != "testing"} <= found


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_the_docstring_of_a_layer_has_its_formula_its_shapes_and_an_example(name):
    text = cleandoc(getattr(invertible, name).__doc__)  # Python indents it only before 3.13
    assert "math:" in text
    assert re.findall(r"^(Shape|Example):$", text, re.MULTILINE) == ["Shape", "Example"]


def documented(text: str) -> set[str]:
    """The full names of what the directives of a page describe."""
    found, scope = set(), ""
    for line in text.splitlines():
        if match := re.match(r"\.\. (?:py:)?(?:currentmodule|automodule):: (\S+)", line):
            scope = match[1]
        elif match := re.match(r"\.\. (?:py:|auto)\w+:: (\w+)", line):
            found.add(f"{scope}.{match[1]}")
        elif match := re.match(r" {3}:members: (\w.*)", line):
            found |= {f"{scope}.{name}" for name in match[1].split(", ")}
    return found


@pytest.mark.parametrize("page", TUTORIALS, ids=name_of)
def test_a_tutorial_opens_with_its_title_and_what_it_teaches(page):
    title, rule, blank, *text = ast.get_docstring(ast.parse(page.read_text())).splitlines()
    assert rule == "=" * len(title)
    assert not blank
    assert text
    assert f"({page.relative_to(ROOT)})" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=name_of)
def test_links_to_files_and_targets_of_make_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= set(rules)


def test_the_citation_has_the_version_of_the_package():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {invertible.__version__}\n" in citation
