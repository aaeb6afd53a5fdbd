"""The filter card in a real JupyterLab, with a real kernel, driven by keys in Chromium."""

import json
import os
import random
import re
import shutil
import signal
import statistics
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lib.text.cards import hashes, items_of, order
from lib.text.labels import REASONS, fold, read_journal
from tests import lab
from tests.lab import (
    CARD,
    axe_source,
    chromium,
    ended,
    focus,
    jupyterlab,
    notebook,
    open_card,
    press,
    save_raw,
    serious,
    texts_of,
    undisturbed,
)

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One JupyterLab for all tests here; each has a notebook, a kernel and a dataset of its own."""
    folder = tmp_path_factory.mktemp("filter") / "notebooks"
    folder.mkdir()
    before = os.environ.get("EMPATHY_OUTPUTS")
    os.environ["EMPATHY_OUTPUTS"] = str(folder.parent / "outputs")
    with jupyterlab(folder) as found:
        yield found
    os.environ.pop("EMPATHY_OUTPUTS") if before is None else os.environ.update(EMPATHY_OUTPUTS=before)


@pytest.fixture(scope="module")
def browser():
    with chromium() as new_page:
        yield new_page


@pytest.fixture
def start(server, browser, request):
    """`start(texts)`: a page with the card of a notebook of this test's own, and the journal's path."""
    name, pages = re.sub(r"[^a-z]+", "-", request.node.name.removeprefix("test_").lower()).strip("-"), []

    def begin(texts, **size):
        save_raw(f"tiny--{name}", texts)
        journals = server.folder.parent / name
        journals.mkdir()
        notebook(server.folder, name, study=f"tiny--{name}", journals=str(journals), annotator="ada", n_keep=90)
        page = browser(**size)
        page.notebook = f"{name}.ipynb"
        pages.append(page)
        open_card(page, server, page.notebook)
        return page, journals / "ada.jsonl"
    yield begin
    for page in pages:
        page.screenshot(path=str(server.folder.parent / f"{name}.png"))  # looked at where the test failed
        page.close()
    for session in server.api("sessions"):
        server.api(f"sessions/{session['id']}", "DELETE")


def state_of(path: Path, texts):
    return fold(read_journal(path)[0], hashes(items_of(texts)))


def at(page) -> int:
    return int(page.locator(CARD).last.get_attribute("data-at"))


def save(page) -> None:
    page.locator("[data-jp-item-name='save']").first.click()
    page.wait_for_timeout(1500)


def restart_and_run(page, server) -> None:
    """Restart the kernel by the menu, as a person does, then run all cells again."""
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name="Restart Kernel and Run All Cells…").click()
    old = page.locator(CARD).last.element_handle()
    page.locator(".jp-Dialog .jp-mod-accept").click()
    page.wait_for_function("([s, old]) => { const card = [...document.querySelectorAll(s)].at(-1); return card && card !== old && card.dataset.serial > 0; }",
                           arg=[CARD, old], timeout=120_000)
    ended(page)
    focus(page)


def test_a_person_labels_sixty_items_by_keys_alone(server, start):
    """60 decisions, 5 edits, 7 undos, jumps, a reload and a restart of the kernel; the fold equals what was done."""
    texts = texts_of(60)
    page, path = start(texts)
    places, rng = order(items_of(texts), "ada"), random.Random(1)
    decided, edits, taken = {}, {}, []

    def decide(page, keys, what):
        decided[places[at(page)].key] = what
        for key in keys[:-1]:
            page.keyboard.press(key)
        press(page, keys[-1])

    def label(page, n):
        for _ in range(n):
            reason = rng.randrange(6)
            decide(page, *(("a", ("accept", "")) if rng.random() < 0.7 else (["r", str(reason + 1)], ("reject", REASONS[reason]))))

    def edit(page, slot):
        here = places[at(page)]
        page.keyboard.press("e")
        page.keyboard.press(str(slot + 1))
        page.keyboard.press("Control+End")
        page.keyboard.type(" a added by hand")  # letters that are keys outside of a text field
        press(page, "Control+Enter")
        label = here.types[slot]
        edits[here.item.key, label] = here.item.responses[label] + " a added by hand"

    def undo(page, n):
        for _ in range(n):
            press(page, "u")
            taken.append((places[at(page)].key, decided.pop(places[at(page)].key)))

    label(page, 20)
    edit(page, 0), edit(page, 2)
    label(page, 4)
    undo(page, 1), press(page, "y")
    decided |= [taken[-1]]
    undo(page, 3)
    label(page, 3)
    page.keyboard.press("j")
    page.keyboard.type("101")
    press(page, "Enter")
    assert at(page) == 100
    label(page, 6)
    edit(page, 1)
    save(page)
    here = at(page)
    page.reload()
    focus(page)
    assert at(page) == here, "the reloaded page shows the card the person was at"
    label(page, 10)
    undo(page, 3)
    label(page, 3)
    here = at(page)
    restart_and_run(page, server)
    assert at(page) == here, "after a restart of the kernel it goes on where it was"
    edit(page, 0), edit(page, 1)
    label(page, 60 - len(decided))
    assert not page.errors and "saved" in page.locator(".fc-saved").last.inner_text()

    state = state_of(path, texts)
    assert {key: (card.decision, card.reason) for key, card in state.cards.items() if card.decision} == decided and len(decided) == 60
    assert {(key, label): found[-1] for key, by in state.edits.items() for label, found in by.items()} == edits and len(edits) == 5
    assert sum(record.event == "undo" for record in read_journal(path)[0]) == len(taken) == 7
    cells = json.loads((server.folder / page.notebook).read_text())["cells"]
    assert len(cells) == len(json.loads((lab.ROOT / "notebooks/02_filter.ipynb").read_text())["cells"]), "no key reached the notebook"


MEASURE = """
selector => {
  const card = [...document.querySelectorAll(selector)].at(-1);
  window.latencies = [];
  let start = 0;
  addEventListener('keydown', () => { start = performance.now(); }, true);
  new MutationObserver(() => {
    if (!start) return;
    const from = start; start = 0;
    requestAnimationFrame(() => { const channel = new MessageChannel(); channel.port1.onmessage = () => latencies.push(performance.now() - from); channel.port2.postMessage(0); });
  }).observe(card, { attributes: true, attributeFilter: ['data-serial'] });
}
"""


def test_a_key_is_saved_and_the_next_card_painted_at_once(server, start):
    """At 400 items, with the meter at work: median at most 100 ms and 95% within 250 ms, best of three rounds."""
    texts = texts_of(200)
    page, path = start(texts)
    for _ in range(120):
        press(page, "a")
    page.evaluate(MEASURE, CARD)
    for attempt in range(3):
        page.evaluate("latencies.length = 0")
        with undisturbed(server):
            for _ in range(60):
                press(page, "a")
                page.wait_for_timeout(150)
        found = sorted(page.evaluate("latencies"))
        median, late = statistics.median(found), found[int(0.95 * len(found))]
        print(f"round {attempt}: median {median:.0f} ms, p95 {late:.0f} ms, n {len(found)}, load {os.getloadavg()[0]:.1f}")
        if median <= 100 and late <= 250:
            break
    assert len(found) == 60 and median <= 100 and late <= 250
    page.locator(".fc-reading").first.wait_for(timeout=30_000)
    total = 120 + 60 * (attempt + 1)
    assert f"{total} of 420 cards done" in page.locator(".fc-pace").last.inner_text()
    assert len(read_journal(path)[0]) == total


def test_killed_kernels_lose_nothing_that_was_acknowledged(server, start):
    """Real kernels, killed while keys are being pressed; what the page had called saved is in the journal."""
    texts, rng = texts_of(120), random.Random(3)
    page, path = start(texts)
    places, confirmed = order(items_of(texts), "ada"), set()

    def again(old):
        """A page opened anew, as the card says; JupyterLab has started the kernel again by itself."""
        for _ in range(100):
            with suppress(StopIteration, psutil.Error):
                if server.kernel_process(old.notebook).is_running():
                    break
            old.wait_for_timeout(200)
        open_card(old, server, old.notebook)

    for life in range(3):
        for _ in range(6):
            here = at(page)
            press(page, "a")
            confirmed.add(places[here].key)
        for _ in range(rng.randrange(1, 4)):
            page.keyboard.press("a")  # in flight when the kernel dies
        server.kernel_process(page.notebook).send_signal(signal.SIGKILL)
        if life == 0:
            page.keyboard.press("a")
            page.locator(".fc-alarm").last.wait_for(timeout=20_000)
            assert "not confirmed" in page.locator(".fc-card").last.inner_text()
        again(page)
        state = state_of(path, texts)
        assert confirmed <= {key for key, card in state.cards.items() if card.decision == "accept"}


HOSTILE = {("s000", "plain", "cognitive"): "<script>alert('x'); document.title = 'stolen'</script> and <b>bold</b>",
           ("s001", "plain", "affective"): "<img src=x onerror=\"alert('x')\"> <iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
           ("s002", "plain", "instrumental"): r"Pay $\LaTeX$ and $$\frac{1}{0}$$ \(x^2\) **not bold** [link](javascript:alert(1))",
           ("s003", "plain", "cognitive"): "שלום לך, אני שומע אותך \u202e reversed \u202c مرحبا بك",
           ("s004", "plain", "affective"): "👩🏽‍🚀 🏳️‍🌈 e\u0301 \u200b zero \ufeff width 🫠",
           ("s005", "plain", "instrumental"): " ".join(f"word{i}" for i in range(5000))}


def goto(page, number: int) -> None:
    page.keyboard.press("j")
    page.keyboard.type(str(number))
    press(page, "Enter")


def test_hostile_texts_are_shown_as_text(start):
    texts = texts_of(12, registers=("plain",), hostile=HOSTILE)
    page, path = start(texts)
    card = page.locator(CARD)
    places = order(items_of(texts), "ada")
    first = {p.key: i for i, p in reversed(list(enumerate(places)))}
    for (scenario, register, label), text in HOSTILE.items():
        here = first[f"{scenario}/{register}"]
        goto(page, here + 1)
        shown = page.locator(".fc-text").nth(places[here].types.index(label))
        assert shown.evaluate("node => node.textContent") == text
        assert shown.evaluate("node => node.children.length") == 0, "text alone, no element"
        for other in ("plain", "counter", "cognitive", "affective", "instrumental"):
            assert other not in card.evaluate("node => [...node.querySelectorAll('.fc-kind, .fc-about, .fc-badge')].map(n => n.textContent).join(' ')")
        press(page, "a")
    goto(page, first["s005/plain"] + 1)
    tall = card.bounding_box()["height"]
    assert tall < 2500, "a long response scrolls in its own box"
    page.keyboard.press("c")
    page.keyboard.type("<img src=x onerror=alert(1)> aрф")
    press(page, "Enter")
    assert "<img src=x onerror=alert(1)> aрф" in page.locator(".fc-comment").inner_text()
    assert not page.errors and page.title() != "stolen"
    assert page.locator(".fc-card img, .fc-card script, .fc-card iframe, .fc-card mjx-container").count() == 0
    state = state_of(path, texts)
    assert sum(card.decision == "accept" for card in state.cards.values()) == 6


def test_keys_never_steal_typing_nor_reach_jupyterlab(start):
    texts = texts_of(12)
    page, path = start(texts)
    cells = page.locator(".jp-Cell").count()
    for key in ("d", "d", "x", "z", "b", "b", "Escape", "m", "0", "0", "h", "s", "o", "k", "q"):  # JupyterLab's own in command mode
        page.keyboard.press(key)
    page.wait_for_timeout(500)
    assert page.locator(".jp-Cell").count() == cells and not page.locator(".jp-Dialog").count()
    page.keyboard.press("/")
    page.keyboard.type("arnp jufe")
    assert page.locator(".fc-field input").input_value() == "arnp jufe" and not read_records(path)
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    page.keyboard.type("aaa uuu rrr")
    press(page, "Enter")
    assert [record.event for record in read_records(path)] == ["comment"]
    page.keyboard.press("Control+a")
    page.keyboard.press("Alt+a")
    page.wait_for_timeout(300)
    assert len(read_records(path)) == 1, "keys with modifiers are not the card's"
    page.keyboard.down("a"), page.keyboard.down("a"), page.keyboard.down("a"), page.keyboard.up("a")
    page.wait_for_timeout(1000)
    assert [record.event for record in read_records(path)] == ["comment", "accept"], "a key held down decides one card"
    for key in ("g", "c", "a"):
        page.keyboard.press(key)
    press(page, "i")
    press(page, "f")
    page.get_by_role("button", name="reject").click()
    page.get_by_role("button", name="unsafe").click()
    page.wait_for_timeout(1000)
    assert [record.event for record in read_records(path)][2:] == ["guess", "flag", "reject"]
    press(page, "u"), press(page, "y")  # the card has kept the focus that a button took
    code = page.locator(".jp-CodeCell .cm-content").filter(has_text="FilterCard(raw")
    code.click()
    page.keyboard.type("aa")
    page.wait_for_timeout(300)
    assert len(read_records(path)) == 7 and "aa" in code.inner_text(), "outside the card its keys are letters"


def read_records(path: Path):
    return read_journal(path)[0] if path.exists() else []


def test_a_second_kernel_says_that_it_is_read_only(server, browser, start):
    page, path = start(texts_of(12))
    shutil.copy(server.folder / page.notebook, server.folder / "again.ipynb")
    press(page, "a")
    other = browser()
    open_card(other, server, "again.ipynb")
    alarm = other.locator(".fc-alarm").last
    alarm.wait_for()
    assert "Read only" in alarm.inner_text()
    press(other, "a")
    assert "reading only" in other.locator(".fc-notice").last.inner_text() and len(read_records(path)) == 1
    page.bring_to_front()
    focus(page)
    press(page, "a")
    assert len(read_records(path)) == 2


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    return axe_source(tmp_path_factory.mktemp("axe"))


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_nothing_serious_for_axe_and_it_fits(server, start, axe, theme):
    """No serious accessibility violation in any state of the card, and nothing cut off at 1,000 px."""
    texts = texts_of(24)
    server.theme(theme)
    page, path = start(texts, width=1000, height=900)
    card = page.locator(CARD)
    assert page.evaluate("document.body.dataset.jpThemeLight") == ("false" if theme == "Dark" else "true")
    page.add_script_tag(content=axe)
    assert not serious(page, CARD)
    for _ in range(48):
        press(page, "a")
    page.keyboard.press("r")
    assert not serious(page, CARD)
    press(page, "2")
    press(page, "f")
    press(page, "p")
    page.locator(".fc-reading").first.wait_for(timeout=60_000)
    for keys in ("l", "?", "e1"):
        for key in keys:
            page.keyboard.press(key)
        assert not serious(page, CARD)
    page.keyboard.press("Escape")
    press(page, "i")
    assert not serious(page, CARD)
    page.keyboard.press("b")
    page.get_by_role("button", name="confirm").wait_for(timeout=60_000)
    page.locator(".fc-panel details summary").click()
    assert not serious(page, CARD)
    assert card.evaluate("node => node.scrollWidth <= node.clientWidth + 1")
    page.get_by_role("button", name="leave out").first.click()
    page.get_by_text("chosen: out").wait_for(timeout=60_000)
    page.get_by_role("button", name="confirm").click()
    page.get_by_text("Confirmed:").wait_for(timeout=20_000)
    events = [record.event for record in read_records(path)]
    assert events[-2:] == ["pin", "keep"]
