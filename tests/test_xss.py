"""Texts that are programs: in scenarios, responses, names and questions they are shown as they are, and never run.

Over a hundred payloads go through the filter card's own script, the report, a figure's hover text, and the audit's page, in
Chromium. Each would set `window.hit`; that they can is shown first.
"""

import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from lib import audit
from lib.report import html
from lib.text import filter_widget
from lib.text.labels import REASONS, TYPES
from lib.text.session import FILTERS, Session
from tests.lab import chromium, texts_of

pytestmark = pytest.mark.browser
RUN = "window.hit=1"
VECTORS = [
    f"<script>{RUN}</script>", f"<ScRiPt >{RUN}</sCrIpT>", f"<script/x>{RUN}</script>", f"<img src=x onerror={RUN}>", f"<img/src=x/onerror={RUN}>", f"<img src=x onerror='{RUN}'", f'<IMG SRC="" ONERROR="{RUN}">',
    f"<svg onload={RUN}>", f"<svg><script>{RUN}</script></svg>", f"<svg/onload={RUN}//", f"<svg><animate onbegin={RUN} attributeName=x dur=1s>", f"<body onload={RUN}>", f"<iframe src='javascript:parent.{RUN}'></iframe>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>", f"<object data='javascript:{RUN}'></object>", f"<embed src='javascript:{RUN}'>", f"<a href='javascript:{RUN}'>click</a>", f"<a href='JaVaScRiPt&colon;{RUN}'>click</a>",
    f"<a href='java\tscript:{RUN}'>click</a>", f"<input autofocus onfocus={RUN}>", f"<select autofocus onfocus={RUN}>", f"<textarea autofocus onfocus={RUN}>", f"<details open ontoggle={RUN}>", f"<video><source onerror={RUN}></video>",
    f"<audio src=x onerror={RUN}>", f"<marquee onstart={RUN}>", f"<math><mi xlink:href='javascript:{RUN}'>x</mi></math>", f"<form action='javascript:{RUN}'><button>x</button></form>", f"<div style='animation-name:x' onanimationstart={RUN}>",
    f"<div onmouseover={RUN}>over me</div>", f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>", f"<link rel=stylesheet href='javascript:{RUN}'>", f"<base href='javascript:{RUN}//'>", f"<template><script>{RUN}</script></template>",
    f"<noscript><p title='</noscript><img src=x onerror={RUN}>'>", f"javascript:{RUN}", f"javascript:/*--></title></style></textarea></script>*/{RUN}//", f"data:text/html,<script>{RUN}</script>", f"' onmouseover='{RUN}", f'" autofocus onfocus="{RUN}',
    f"` onerror=`{RUN}", f"';{RUN};//", f'";{RUN};//', f"\\';{RUN};//", f"${{{RUN}}}", f"{{{{{RUN}}}}}", f"{{% print({RUN}) %}}", f"&lt;script&gt;{RUN}&lt;/script&gt;", f"&#60;img src=x onerror={RUN}&#62;", f"\u003cimg src=x onerror={RUN}\u003e",
    f"%3Cscript%3E{RUN}%3C/script%3E", f"<<script>{RUN}//<</script>", f"<!--><img src=x onerror={RUN}>-->", f"<![CDATA[<img src=x onerror={RUN}>]]>", f"$\\href{{javascript:{RUN}}}{{x}}$", f"[x](javascript:{RUN})", f"\u2028{RUN}\u2029"]
BEFORE = ["", '">', "</script>", "</textarea></title></style>-->"]
PAYLOADS = list(dict.fromkeys(before + vector for before in BEFORE for vector in VECTORS))[:160]
COMING_ALIVE = """() => { for (const node of document.querySelectorAll('body *')) for (const kind of ['mouseover', 'focus', 'click'])
    if (!(kind === 'click' && node.closest('button, a, summary'))) node.dispatchEvent(new Event(kind, { bubbles: false })); }"""
BAD_PLACES = """() => [...document.querySelectorAll('*')].flatMap(node => [...node.attributes].filter(a => /^on/i.test(a.name) ||
    (/href|src|action|data$/i.test(a.name) && /^[\\s\\0-\\x20]*(javascript|vbscript|data:text)/i.test(a.value))).map(a => `${node.tagName} ${a.name}=${a.value.slice(0, 60)}`))"""


@pytest.fixture(scope="module")
def new_page():
    with chromium() as found:
        yield found


def hits(page) -> list:
    """What ran, or could be made to run by a click."""
    page.evaluate(COMING_ALIVE)
    page.wait_for_timeout(250)
    return [*page.errors, *(["window.hit"] if page.evaluate("window.hit") else []), *page.evaluate(BAD_PLACES)]


def test_the_payloads_would_run(new_page):
    """Put into a page as HTML, most of them do: a page where none ran has kept them out."""
    page, ran = new_page(), 0
    assert len(PAYLOADS) >= 100
    for payload in PAYLOADS[:24]:
        page.set_content(f"<!doctype html><body><div>{payload}</div>")
        ran += bool(hits(page)) if payload.startswith("<") else 0
    page.close()
    assert ran >= 15


def hostile(content, payload: str, keep=("filter", "stratum", "decision", "op")):
    """A copy of what the session sends in which every text that is no choice is the payload."""
    if isinstance(content, dict):
        return {key: value if key in keep else hostile(value, payload) for key, value in content.items()}
    if isinstance(content, list):
        return [hostile(value, payload) for value in content]
    return payload if isinstance(content, str) else content


def test_the_filter_card(new_page, tmp_path):
    texts = texts_of(len(PAYLOADS), registers=("plain",))
    number = texts.scenario_id.str[1:].astype(int)
    texts["scenario"] = texts["response"] = [PAYLOADS[n] for n in number]
    texts["response"] = texts["response"] + texts["label"]
    session = Session(texts, tmp_path, "ada", n_keep=9)
    page = new_page()
    script = filter_widget.FilterCard._esm.read_text() if hasattr(filter_widget.FilterCard._esm, "read_text") else str(filter_widget.FilterCard._esm)
    choices = {"reasons": list(REASONS), "types": list(TYPES), "filters": list(FILTERS), "strata": list(session.quota), "annotator": PAYLOADS[3]}
    page.set_content("<!doctype html><body><div id=here></div>")
    page.add_script_tag(content=script.replace("export default { render };", "window.draw = render;"))
    page.evaluate("""choices => { window.model = { get: () => choices, send: message => { window.asked = message; }, off: () => 0, on: (name, receive) => { window.receive = receive; } };
        draw({ model: window.model, el: document.getElementById('here') }); }""", choices)
    shown = []
    for at, place in enumerate(session.places):
        session.at, payload = at, place.item.scenario
        if at % 4 == 0:
            session.do("comment", {"card": at, "text": payload})
            session.do("accept", {"card": at})
            session.at = at
        true = session.shown()
        pair = {"pair": payload, "auroc": 0.9, "evaluation": payload, "baseline": payload}
        more = {"meter": {"pairs": [pair], "words": {payload: [payload, "script"]}}, "proposal": {"scenarios": [payload], "left_out": [payload + "2"], "before": {payload: 0.5}, "drawn": {}, "after": {}, "short": {payload: 1}, "domains": {payload: 0.5}, "pins": {payload: "in"}},
                "agreement": [{"measure": payload, "annotators": payload, "estimate": 0.5, "ci_low": 0, "ci_high": 1, "n": 3}]}
        about = {"types": [payload] * 3, "register": payload, "context": payload, "domain": payload, "id": payload}
        worse = {**hostile(true, payload), "about": about, "others": {payload: payload}, "stale": [payload], "notice": payload, "comment": payload, "search": payload, "decision": "reject", "reason": payload}
        shown += [(payload, *page.evaluate("""([view, worse, more]) => { const text = () => document.querySelector('.fc-scenario').textContent;
            receive({ view }); const seen = text(); receive({ view: worse, ...more }); receive({ meter: { error: worse.notice }, proposal: { error: worse.notice } });
            const key = k => document.querySelector('.fc-card').dispatchEvent(new KeyboardEvent('keydown', { key: k, bubbles: true }));
            receive({ re: window.asked.id, view: worse, ...more }); for (const k of ['l', 'b']) key(k); receive({ re: window.asked.id, view: worse, ...more }); for (const k of ['e', '1']) key(k);
            return [seen, text()]; }""", [true, worse, more]))]
    assert not hits(page)
    assert {payload for payload, _, _ in shown} == set(PAYLOADS) and [each for each in shown if len(set(each)) > 1] == [], "a text is not shown as it is"
    session.journal.close()
    page.close()


def row_of(text: str) -> dict:
    return {"study": text, "criterion": text, "metric": text, "literal_value": 0.5, "literal_verdict": text, "p_literal_N0": 0.1, "p_literal_N1": 0.1, "verdict": text, "reason": text, "estimate": 0.1, "ci_low": 0.0,
            "ci_high": 0.2, "p": 0.5, "null": text, "text_baseline": 0.4, "text_baseline_name": text, "flags": text, "artifact": text, "cell": text, "stage": text, "data": text, "expected": text, "n_pass": 1, "n_models": 2, "r": 1, "p_pc": 0.5}


def hover_figure(texts: list[str]) -> go.Figure:
    """Payloads wherever the project's figures put names and texts: hover, legend, axes, cells, annotations, titles."""
    figure = go.Figure(go.Scatter(x=np.arange(len(texts)), y=np.arange(len(texts)), mode="markers", text=texts, customdata=texts, name=texts[0], hovertemplate="%{text}: %{y:.2f} %{customdata}"))
    for text in texts[::10]:
        figure.add_trace(go.Scatter(x=[0], y=[0], name=text, hovertext=text))
    figure.add_hline(0.5, annotation_text=texts[3])
    figure.update_layout(showlegend=True, title=texts[4], xaxis_title=texts[5], legend_title=texts[6])
    return figure


def part_of(text: str, content) -> dict:
    return {"title": text, "text": text, "content": content, "alt": text, "method": text, "known": text, "sources": [{"artifact": text, "cell": text}]}


def test_the_report(new_page, tmp_path):
    rows = [row_of(text) for text in PAYLOADS]
    parts = [part_of(text, pd.DataFrame({text: [text, text]})) for text in PAYLOADS]
    cells = go.Figure(go.Heatmap(z=[[1.0] * len(PAYLOADS)] * 2, x=PAYLOADS, y=PAYLOADS[:2], text=[PAYLOADS] * 2, texttemplate="%{text}"))
    parts += [part_of(PAYLOADS[8], figure) for figure in (hover_figure(PAYLOADS), cells)]
    sections = [{"run": text, "question": text, "model_id": text, "layer": text, "license": text, "missing": [text], "parts": parts if not number else [],
                 "deciding": [{"criterion": text, "metric": text, "what": text}]} for number, text in enumerate(PAYLOADS)]
    columns = [{"run": text, "model_id": text, "trained": True, "why_not": why} for text in PAYLOADS[:5] for why in ("", text)]
    lines = [{"criterion": text, "question": text, "majority": row_of(text), "cells": [row_of(text), {"missing": text}]} for text in PAYLOADS]
    page_html = html.render(answer=PAYLOADS[0], rows=rows, matrix={"columns": columns, "rows": lines}, unreadable={text: text for text in PAYLOADS}, marks={text: text for text in PAYLOADS},
                            depth=hover_figure(PAYLOADS[:9]), sections=sections, known_answers=rows, limits=PAYLOADS, texts_note=PAYLOADS[1],
                            preregistration={"hash": PAYLOADS[2], "thresholds": {text: {text: text} for text in PAYLOADS}})
    path = tmp_path / "report.html"
    path.write_text(page_html)
    page = new_page()
    page.goto(path.as_uri())
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_selector(".js-plotly-plot .main-svg")
    labels = page.evaluate("""async n => { const plot = [...document.querySelectorAll('.js-plotly-plot')].find(each => (each.data?.[0]?.customdata?.length ?? 0) == n), found = [];
        for (let i = 0; i < n; i++) {  // plotly draws a hover label at most every 50 ms
            Plotly.Fx.hover(plot, [{ curveNumber: 0, pointNumber: i }]); await new Promise(done => setTimeout(done, 60));
            found.push(plot.querySelectorAll('.hoverlayer .hovertext').length, ...plot.querySelectorAll('.hoverlayer :is(script, img, iframe, foreignObject, [href^=javascript])')); }
        return found; }""", len(PAYLOADS))
    assert labels == [1] * len(PAYLOADS), "a hover label is missing, or holds more than text"
    assert not hits(page)
    cells = page.locator("#rows + p + div td:first-child").all_text_contents()
    assert [re.sub(r"\s", " ", text) for text in cells[:len(PAYLOADS)]] == [re.sub(r"\s", " ", text) for text in PAYLOADS], "a text is not shown as it is"
    page.close()


def test_the_audits_page(new_page, outputs):
    """Names of other people's columns and labels."""
    table = pd.DataFrame([{"contrast": PAYLOADS[number % 3], "evaluation": "within", "family": "text", "baseline": text, "auroc": 0.9, "ci_low": 0.8, "ci_high": 1.0, "n": 9} for number, text in enumerate(PAYLOADS)])
    path = audit.write_page(table, PAYLOADS, PAYLOADS[0], 0.6)
    page = new_page()
    page.goto(path.as_uri())
    page.wait_for_selector(".js-plotly-plot .main-svg")
    assert path.parent == outputs / "audit" and not hits(page)
    page.close()
