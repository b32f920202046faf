"""A record as one HTML file that needs no network: tables to sort and search, plots, light and dark.

`page` gathers what is shown, `plots` what is drawn; `page.html`, `page.css` and `page.js` say how. Before this: the
record, and where they were made a comparison and a lowered program. After it: a browser.
"""

from .page import Artefact, as_html

__all__ = ["Artefact", "as_html"]
