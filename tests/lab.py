"""A real JupyterLab with a real kernel and Chromium on it, for the tests of what is used by hand."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import jupytext
import nbformat
import pandas as pd
import psutil

from lib.store import Study
from tests.conftest import ROOT

CARD = ".fc-card"


def texts_of(n: int, *, registers=("plain", "counter"), hostile: dict | None = None) -> pd.DataFrame:
    """A raw text table of `n` scenarios over five contexts; `hostile` {(scenario, register, label): response}."""
    contexts = ("crisis_support", "emotional_disclosure", "frustration", "casual_conversation", "technical_assistance")
    says = {"cognitive": "You had counted on the {} because it was to settle something, so its silence reads as an answer to you, number {}.",
            "affective": "Oh, that is such a sad thing about the {}; I feel the sting of it with you and I am right here, number {}.",
            "instrumental": "Ring the {} office tomorrow before ten, ask who is in charge, and get the new date in writing, number {}."}
    things = ("bakery", "violin", "harbour", "orchard", "telescope", "bicycle", "library", "snowstorm", "passport", "chimney", "lantern", "ferry")
    rows = []
    for s in range(n):
        for register in registers:
            for label, text in says.items():
                thing = things[s % len(things)]
                response = text.format(thing, s) + (" Truly so." if register == "counter" else "")
                rows.append((f"empathy/s{s:03d}/{register}/{label}", f"s{s:03d}", s, contexts[s % 5], thing, "empathy", register, label,
                             f"My {thing} plan number {s} fell through and nobody called back.", (hostile or {}).get((f"s{s:03d}", register, label), response)))
    columns = ["text_id", "scenario_id", "cluster", "context", "domain", "condition", "register", "label", "scenario", "response"]
    return pd.DataFrame(rows, columns=columns).assign(untouched=True)


def notebook(folder: Path, name: str, *, of: str = "02_filter", **parameters) -> Path:
    """A copy of a notebook whose parameters cell holds these values, as a person would type them."""
    content = jupytext.read(ROOT / "notebooks" / f"{of}.py")
    for cell in content.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = "\n".join([cell.source, *(f"{name} = {value!r}" for name, value in parameters.items())])
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / f"{name}.ipynb"
    nbformat.write(content, path)
    return path


def save_raw(run: str, texts: pd.DataFrame) -> None:
    """What stage 01 would leave for stage 02."""
    Study(run, "01_generate").save_table("dataset/raw/texts.csv", texts)


class Lab:
    """`folder`: where its notebooks lie; `pid`: the server's."""

    def __init__(self, folder: Path, port: int, token: str, settings: Path):
        self.folder, self.base, self.token, self.settings, self.pid = folder, f"http://127.0.0.1:{port}", token, settings, 0

    def url(self, name: str) -> str:
        return f"{self.base}/lab/workspaces/{name.removesuffix('.ipynb')}/tree/{name}?token={self.token}"

    def api(self, path: str, method: str = "GET"):
        request = urllib.request.Request(f"{self.base}/api/{path}", method=method, headers={"Authorization": f"token {self.token}"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return json.loads(answer.read() or b"null")

    def kernel(self, name: str) -> str:
        """The id of the kernel behind a notebook."""
        return next(session["kernel"]["id"] for session in self.api("sessions") if session["path"] == name)

    def kernel_process(self, name: str) -> psutil.Process:
        """Its process."""
        wanted = self.kernel(name)
        return next(p for p in psutil.Process(self.pid).children(recursive=True) if wanted in " ".join(p.cmdline()))

    def theme(self, name: str) -> None:
        """The theme of pages opened from now on."""
        self.set("apputils-extension/themes", {"theme": f"JupyterLab {name}"})

    def set(self, plugin: str, values: dict) -> None:
        path = self.settings / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


@contextmanager
def jupyterlab(folder: Path):
    """A JupyterLab server on a free port, with settings and workspaces of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, own = secrets.token_hex(16), folder.parent / f"{folder.name}-lab"
    lab = Lab(folder, port, token, own / "settings")
    lab.theme("Light")
    lab.set("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False})
    words = ["--no-browser", "--allow-root", f"--port={port}", f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}",
             f"--LabApp.user_settings_dir={own / 'settings'}", f"--LabApp.workspaces_dir={own / 'workspaces'}"]
    log = (own / "log").open("wb")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], stdout=log, stderr=log, start_new_session=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_RUNTIME_DIR": str(own / "runtime"), "JUPYTER_CONFIG_DIR": str(own / "config"), "IPYTHONDIR": str(own / "ipython")})
    lab.pid = server.pid
    try:
        for _ in range(600):
            try:
                lab.api("status")
                break
            except OSError:
                assert server.poll() is None, (own / "log").read_text()[-2000:]
                time.sleep(0.2)
        yield lab
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
        log.close()


def open_card(page, lab: Lab, name: str):
    """Open the notebook, run all its cells, and focus its card."""
    page.goto(lab.url(name))
    page.locator(".jp-Notebook").first.wait_for(timeout=60_000)
    page.get_by_text("| Idle").first.wait_for(timeout=60_000)
    run_all(page)
    return focus(page)


def run_all(page) -> None:
    """Run all cells by the menu, in a kernel that has run none yet."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-Notebook .jp-InputPrompt").filter(has_text="*").first.wait_for(state="attached", timeout=20_000)
    ended(page)


def ended(page) -> None:
    """Wait until the last cell has run, so that what follows meets an idle kernel."""
    page.wait_for_function("![...document.querySelectorAll('.jp-Notebook .jp-InputPrompt')].some(node => node.textContent.includes('*'))", timeout=180_000)


def focus(page):
    card = page.locator(CARD).last
    card.wait_for(timeout=60_000)
    page.wait_for_function("s => [...document.querySelectorAll(s)].at(-1)?.dataset.serial > 0", arg=CARD, timeout=60_000)
    card.scroll_into_view_if_needed()
    card.focus()
    return card


def serial(page) -> int:
    return int(page.locator(CARD).last.get_attribute("data-serial"))


def press(page, *keys: str) -> None:
    """Press keys one after the other; each waits until the card says that all is saved."""
    for key in keys:
        before = serial(page)
        page.keyboard.press(key)
        page.wait_for_function("([s, n]) => Number([...document.querySelectorAll(s)].at(-1).dataset.serial) > n", arg=[CARD, before], timeout=20_000)


@contextmanager
def undisturbed(lab: Lab):
    """Server, kernels and browser go before whatever else this machine is busy with, where the system allows it."""
    processes = [p for tree in (psutil.Process(lab.pid), psutil.Process()) for p in (tree, *tree.children(recursive=True))]
    threads = [thread.id for p in processes if p.nice() == 0 for thread in p.threads()]

    def priority(value: int) -> None:
        for thread in threads:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, value)
        for process in processes:  # where Linux shares the processor out by session, that is what counts
            with suppress(OSError):
                Path(f"/proc/{process.pid}/autogroup").write_text(str(value))
    priority(-20)
    try:
        yield
    finally:
        priority(0)


@contextmanager
def chromium():
    """`open(**context)`: a new page of Debian's Chromium that collects scripts' dialogs in `page.errors`."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])

        def new_page(width: int = 1280, height: int = 1000):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.errors = []
            page.on("dialog", lambda dialog: dialog.accept() if dialog.type == "beforeunload" else (page.errors.append("a script ran"), dialog.dismiss()))
            return page
        yield new_page
        browser.close()


def axe_source(folder: Path) -> str:
    """The source of axe-core, from npm."""
    done = subprocess.run(["npm", "pack", "axe-core@4.14.1", "--silent"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"npm could not fetch axe-core: {done.stderr[-300:]}"
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


def serious(page, selector: str) -> list[str]:
    """axe's serious and critical violations in a part of a page that holds axe."""
    found = page.evaluate(f"async () => (await axe.run(document.querySelector('{selector}'))).violations")
    return [f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in ("serious", "critical")]
