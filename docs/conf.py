"""The documentation site, which `make docs` builds: the Markdown pages of this folder, and an API page a package."""

import importlib
import re
from typing import Any

from docutils.nodes import SkipNode, math_block
from docutils.utils.math.latex2mathml import tex2mathml

import blockdiag

project = "blockdiag"
author = "the blockdiag authors"
project_copyright = author
version = release = blockdiag.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # of nn.Module.forward and the like
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 130
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
copybutton_exclude = ".linenos, .gp, .go"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_math_renderer = "mathml"
html_title = f"blockdiag {version}"

# All references to public names must resolve. Those to other projects are not looked up, as CI has no network for
# intersphinx, nor those to private modules, which stand in type hints.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!blockdiag(\.[a-z]+)?\.\w+$).*")]

# What several packages export is documented on the page of the first of them, and the others link to it.
PACKAGES = ("blockdiag", "blockdiag.nn", "blockdiag.compression", "blockdiag.ensemble", "blockdiag.backends")


def public_name(target: Any) -> str | None:
    """The name that an object is documented by, or None if no package exports it."""
    for package in map(importlib.import_module, PACKAGES):
        for name in getattr(package, "__all__", ()):
            if getattr(package, name) is target:
                return f"{package.__name__}.{name}"
    return None


def skip_member(app: Any, what: str, name: str, target: Any, skip: bool, options: Any) -> bool | None:
    if type(target).__name__ == "_tuplegetter":  # a field of a NamedTuple: "Alias for field number 0"
        return True
    public = public_name(target) if what == "module" else None
    return True if public and f"api/{public.split('.')[-2]}" != app.env.docname else None


def link_to_elsewhere(app: Any, what: str, name: str, target: Any, options: Any, lines: list[str]) -> None:
    if what != "module" or name not in PACKAGES:
        return
    public = {public_name(getattr(target, each)) for each in getattr(target, "__all__", ())}
    links = [f":py:obj:`~{each}`" for each in sorted(filter(None, public)) if each.rpartition(".")[0] != name]
    if links:
        lines += ["", f"Exported here too, and documented with another package: {', '.join(links)}.", ""]


def resolve_short_name(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Links `BlockDiagLinear`, as docstrings call what they stand beside, to `blockdiag.BlockDiagLinear`."""
    if node["refdomain"] != "py":
        return None
    packages = (package for package in PACKAGES if f"{package}.{node['reftarget']}" in env.domains["py"].objects)
    target = f"{next(packages, '')}.{node['reftarget']}"
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


def visit_math(translator: Any, node: Any) -> None:
    """Math as MathML, which browsers draw by themselves. MathJax would have to be fetched by every reader."""
    text = re.sub(r"\\text\{[^}]*\}", lambda match: match[0].replace(r"\_", "_"), node.astext())  # docutils keeps \\_
    translator.body.append(f"<p>{tex2mathml(text)}</p>" if isinstance(node, math_block) else tex2mathml(text))
    raise SkipNode


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-docstring", link_to_elsewhere)
    app.connect("missing-reference", resolve_short_name)
