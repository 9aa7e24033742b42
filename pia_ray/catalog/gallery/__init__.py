"""The results of an output as one page, `index.html`: `page` writes it, `rows` chooses and packs its rows, `summary`
makes its head. `page_files/` holds its markup, style and script.
"""

from pia_ray.catalog.gallery.page import NAME, gallery_html, write_gallery
from pia_ray.catalog.gallery.rows import MOST_ROWS

__all__ = ["MOST_ROWS", "NAME", "gallery_html", "write_gallery"]
