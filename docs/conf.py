"""The site: python -m sphinx -W --keep-going docs docs/_build/html

Nothing is fetched, neither to build it nor to read it. Formulas become MathML, which
browsers draw by themselves: MathJax and KaTeX are scripts and fonts from a network, or
megabytes beside the pages. Links to files outside of this folder become downloads.
"""

import logging
import re

import math_core
from docutils import nodes

import pranam_optax

project = html_title = "pranam_optax"
copyright = "the authors of pranam_optax"
version = release = pranam_optax.__version__
extensions = ["myst_nb", "sphinx_copybutton"]
extensions += ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_math_renderer = "mathml"
copybutton_exclude = ".gp, .go"  # prompts and output

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"  # a notebook runs again when its code has changed
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

default_role = "code"  # docstrings write `name` as Markdown does
maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_custom_sections = ["Returns"]  # sentences, whose colons end no type

to_mathml = math_core.LatexToMathML()


def visit_math(writer, node):
    latex, display = node.astext().strip(), isinstance(node, nodes.math_block)
    if display and r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"  # as elsewhere in Sphinx
    mathml = to_mathml.convert_with_local_state(latex, displaystyle=display)
    writer.body.append(f'<div class="math">{mathml}</div>' if display else mathml)
    raise nodes.SkipNode


def unlink_outside(app, docname, source):
    """Pages of Markdown outside of this folder are on no site: their names are left."""
    if "/" not in docname:
        source[0] = re.sub(r"\[([^][]+)\]\(\.\./[^()]*\.md[^()]*\)", r"\1", source[0])


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("source-read", unlink_outside)
    # A page that a toctree names by a pattern may be split, or not be there yet.
    logging.getLogger("sphinx.sphinx.directives.other").addFilter(
        lambda record: getattr(record, "subtype", None) != "empty_glob"
    )
