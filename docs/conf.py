"""How Sphinx builds the documentation; ``make docs`` runs it."""

import os
import typing

from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

import invertible

project = "invertible"
author = "The invertible developers"
copyright = "2026, The invertible developers"  # noqa: A001 - Sphinx's name
version = release = invertible.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # the default MathJax comes from a server
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "tutorials"]  # tutorials becomes learn

# The tutorials are scripts, which run on every build and fail it when they fail.
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "learn",
    "filename_pattern": ".*",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "run_stale_examples": True,
    "write_computation_times": False,
    "remove_config_comments": True,
    "parallel": 2,  # in processes of their own
}
os.environ["OMP_NUM_THREADS"] = "1"  # small convolutions on busy cores are far slower with more
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself otherwise

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
# A layer's class docstring says what its forward and inverse do.
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]

nitpick_ignore_regex = [
    # No links into torch's documentation: the build needs no network.
    ("py:.*", r"(torch|hypothesis|st|collections|numpy|contextlib)\..*|Tensor"),
    # A layer's docstring mentions its two methods, which have no entry of their own.
    ("py:meth", "forward|inverse"),
]

linkcheck_ignore = [r"\.\./_images/"]  # a picture that opens by itself, made by the HTML builder

html_theme = "furo"
html_title = f"invertible {release}"
html_logo = html_favicon = "_static/logo.svg"
# Of the version that is built, where the host says so: search engines prefer the stable one.
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"  # neither prompts nor output


def types_of_constructor(
    app: Sphinx, what: str, name: str, obj: typing.Any, *_: typing.Any
) -> None:
    """Shows the types of a constructor's arguments.

    autodoc looks the types of a class up among the annotations of its attributes, and leaves
    those of the constructor unresolved.
    """
    if what == "class":
        hints = typing.get_type_hints(obj.__init__, localns=vars(invertible))
        hints.pop("return", None)
        found = {name: stringify_annotation(hint, "smart") for name, hint in hints.items()}
        app.env.current_document.autodoc_annotations[name] = found


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", types_of_constructor)
