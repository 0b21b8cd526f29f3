"""The site: python -m sphinx -W --keep-going docs docs/_build/html

Nothing is fetched, neither while it is built nor while it is read. Formulas become
MathML, which browsers draw by themselves: MathJax and KaTeX would be scripts and fonts
from a network, or megabytes beside the pages. Links to files outside of this folder
become downloads.
"""

import logging
import re

import math_core
from docutils import nodes

import pranam_optax

project = "pranam_optax"
copyright = "the authors of pranam_optax"
version = release = pranam_optax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "pranam_optax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4

nb_execution_mode = "cache"  # a notebook runs again when its code has changed
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
default_role = "code"  # docstrings write `name` as Markdown does
maximum_signature_line_length = 70
napoleon_numpy_docstring = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

to_mathml = math_core.LatexToMathML()


def visit_math(writer, node):
    """A formula of several lines is aligned at its &, as Sphinx does it elsewhere."""
    latex, display = node.astext().strip(), isinstance(node, nodes.math_block)
    if display and r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    mathml = to_mathml.convert_with_local_state(latex, displaystyle=display)
    writer.body.append(f'<div class="math">{mathml}</div>' if display else mathml)
    raise nodes.SkipNode


def unlink_outside(app, docname, source):
    """A page of Markdown outside of this folder is on no site: its name is left."""
    source[0] = re.sub(r"\[([^][]+)\]\(\.\./[^()]*\.md\)", r"\1", source[0])


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("source-read", unlink_outside)
    # A page that a toctree names by a pattern may be split, or not be there yet.
    logging.getLogger("sphinx.sphinx.directives.other").addFilter(
        lambda record: getattr(record, "subtype", None) != "empty_glob"
    )
