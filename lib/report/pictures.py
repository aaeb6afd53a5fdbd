"""A static picture of every figure, for code hosts and print, drawn by a local Chromium; without one, figures stay interactive only."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import plotly.graph_objects as go
import plotly.io as pio
from nbconvert import HTMLExporter

from lib.files import sha256, write_atomic
from lib.seals import sealed_or_none
from lib.store import Study, meta_path

PLOTLY, SVG = "application/vnd.plotly.v1+json", "image/svg+xml"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT = 60  # seconds for one picture
WIDTH = 950  # pixels; a notebook's text column


def browser() -> str:
    """A Chromium on this machine, or an empty string."""
    return os.environ.get("BROWSER_PATH") or next((found for name in BROWSERS if (found := shutil.which(name))), "")


def browser_problem() -> str:
    """Why no picture can be drawn, or an empty string. Asked beforehand, as a browser that does not start is waited for without end."""
    if not (path := browser()):
        return "no Chromium on this machine"
    try:
        subprocess.run([path, "--version"], check=True, capture_output=True, timeout=TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{Path(path).name} does not start ({type(error).__name__})"
    return ""


class Pictures:
    """Draws figures while open; one browser for all of them. `missing` says why there is none, if so."""

    def __enter__(self) -> "Pictures":
        self.missing = browser_problem()
        if not self.missing:
            import kaleido  # takes half a second, and only where pictures are drawn
            self._kaleido = kaleido
            kaleido.start_sync_server(n=1, timeout=TIMEOUT, silence_warnings=True)
        return self

    def __exit__(self, *_) -> None:
        if not self.missing:
            self._kaleido.stop_sync_server(silence_warnings=True)

    def draw(self, figure: go.Figure | dict, kind: str = "svg") -> bytes:
        """A figure as "svg" or "pdf"."""
        height = (figure["layout"]["height"] if isinstance(figure, dict) else figure.layout.height) or 400
        return self._kaleido.calc_fig_sync(figure, opts={"format": kind, "width": WIDTH, "height": height})

    def shown(self, figure: go.Figure) -> dict:
        """A figure for `display(…, raw=True)`: interactive where the viewer can, a picture elsewhere."""
        bundle = {PLOTLY: json.loads(pio.to_json(figure))}
        return bundle | ({} if self.missing else {SVG: self.draw(figure).decode()})

    def illustrate(self, notebook: Path) -> int:
        """Put a picture beside every interactive figure of an executed notebook that has none; returns how many."""
        content, drawn = nbformat.read(notebook, as_version=4), 0
        for cell in content.cells:
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if not self.missing and PLOTLY in data and SVG not in data:
                    data[SVG], drawn = self.draw(dict(data[PLOTLY])).decode(), drawn + 1
        if drawn:
            write_atomic(notebook, nbformat.writes(content).encode())
        return drawn

    def export(self, home: Study, name: str, figure: go.Figure) -> None:
        """Save a figure as `name`.svg and `name`.pdf of a study, where it is not there yet as it is."""
        mark = sha256(figure.to_json().encode())
        for kind in ("svg", "pdf"):
            there = sealed_or_none(meta_path(home.path(f"{name}.{kind}"))) or {}
            if there.get("figure") != mark or not home.has(f"{name}.{kind}"):
                home.save(f"{name}.{kind}", self.draw(figure, kind), figure=mark)


def notebook_page(notebook: Path) -> bool:
    """Write an executed notebook as HTML beside it, where that is not there yet; returns whether it was written."""
    page, mark = notebook.with_suffix(".html"), f"<!-- made of {sha256(notebook)} -->".encode()
    if page.exists() and page.read_bytes().endswith(mark):
        return False
    # nothing is fetched from elsewhere: figures are pictures here, and there are no formulas
    offline = {"require_js_url": "", "jquery_url": "", "mathjax_url": "", "mermaid_js_url": "", "widget_renderer_url": "", "jupyter_widgets_base_url": ""}
    body, _ = HTMLExporter(template_name="lab", exclude_input_prompt=True, exclude_output_prompt=True, **offline).from_filename(str(notebook))
    write_atomic(page, body.encode() + mark)
    return True
