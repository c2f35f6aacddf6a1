"""Configuration of the documentation: ``make docs``.

Neither a build nor its pages need a network.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]
# The processes that draw the gallery must find this checkout too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])

import deepmix

# --- Project ---------------------------------------------------------------------------

project = "deepmix"
author = "deepmix developers"
copyright = "deepmix developers, BSD-3-Clause"
version = release = deepmix.__version__

# --- Sphinx ----------------------------------------------------------------------------

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
    "matplotlib.sphinxext.plot_directive",
    "sphinx_gallery.gen_gallery",
    "benchmark_tables",
]

templates_path = ["_templates"]
exclude_patterns = ["_build", "**.ipynb_checkpoints", "examples"]
default_role = "py:obj"
nitpicky = False
suppress_warnings = ["config.cache"]  # sphinx-gallery's configuration cannot be pickled

# --- Docstrings ------------------------------------------------------------------------

autosummary_generate = True
autodoc_typehints = "none"
numpydoc_show_class_members = False  # the templates list them
numpydoc_xref_param_type = False

# --- Figures ---------------------------------------------------------------------------

plot_formats = [("png", 110)]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_include_source = True

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "download_all_examples": False,
    "write_computation_times": False,  # its page would load scripts from other hosts
    "min_reported_time": 0,
    "show_memory": False,
    "show_signature": False,
    "remove_config_comments": True,
    "thumbnail_size": (400, 280),
    "matplotlib_animations": False,
}

# --- Equations -------------------------------------------------------------------------

# MathJax comes with the pages, since its usual host is out of reach behind many firewalls. Of the
# package "sphinx-mathjax-offline" only the files are used, MathJax 3.2.2 as it was published: as
# an extension it copies them too, but it does not say that Sphinx may run it in parallel.
mathjax_files = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static"
mathjax_path = "mathjax/tex-chtml.js"

# --- HTML ------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = "deepmix"
html_static_path = ["_static", str(mathjax_files)]
html_css_files = ["deepmix.css"]
html_show_sourcelink = False
html_sidebars = {
    page: [] for page in ("index", "install", "user_guide", "notation", "benchmarks", "changelog")
}
html_theme_options = {
    "show_prev_next": False,
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "secondary_sidebar_items": {"**": ["page-toc"], "benchmarks": [], "index": []},
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "friendly",
}
