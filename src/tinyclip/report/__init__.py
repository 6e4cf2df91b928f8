"""`tinyclip report`: what runs wrote, as one HTML page that needs nothing else. A leaf: nothing imports it.

read.py      a run directory -> values, with a note of everything that is damaged or missing
charts.py    values -> SVG, each figure with a description and a table of its numbers
examples.py  teacher and student -> the queries where they differ, with thumbnails
page.py      all of it -> the page (page.html.jinja, page.css)
"""

from tinyclip.report.page import report

__all__ = ["report"]
