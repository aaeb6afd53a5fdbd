// The filter card. It paints what the session shows and sends one operation at a time; a key pressed while an answer is
// on its way waits. Texts are untrusted: they reach the page through textContent alone.

const FIELDS = "textarea, input, select, [contenteditable='true']";
const SILENCE = 5000; // ms without an answer after which the last key counts as not confirmed
const TYPE_KEYS = { c: "cognitive", a: "affective", i: "instrumental", u: "unclear" };
const NAVIGATION = new Set(["n", "p", "arrowright", "arrowleft"]);

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function fill(node, text, leaking) {
  // One text as it is; words of `leaking` marked.
  if (!leaking?.size) { node.textContent = text; return; }
  node.replaceChildren(...text.split(/([\p{L}\p{N}]+(?:['’][\p{L}\p{N}]+)*)/u).map((part) =>
    leaking.has(part.toLowerCase().replaceAll("’", "'")) ? h("mark", { textContent: part }) : document.createTextNode(part)));
}

const clock = (seconds) => seconds < 1 ? "under 1 s" : seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min`
  : `${(seconds / 3600).toFixed(1)} h`;
const words = (name) => name.replaceAll("_", " ");
const two = (value) => value === null || value === undefined ? "–" : value.toFixed(2);

function render({ model, el }) {
  const choices = model.get("choices");
  const me = Math.random().toString(36).slice(2);
  let count = 0, pending = "", queue = [], silence = 0, silent = false;
  let view = null, meter = {}, proposal = {}, mode = "", guesses = [], field = null, shadow = false;

  // ---- the parts, made once -------------------------------------------------------------------------------------
  const part = (tag, name, props = {}) => h(tag, { className: `fc-${name}`, ...props });
  const number = part("strong", "number"), badge = part("span", "badge"), flag = part("span", "badge"), saved = part("span", "saved", { role: "status" });
  const alarm = part("p", "alarm", { role: "alert" }), notice = part("p", "notice", { role: "status" }), about = part("p", "about");
  const scenario = part("p", "scenario", { dir: "auto" }), comment = part("p", "comment", { dir: "auto" });
  const stale = part("p", "stale"), others = part("p", "others"), prompt = part("div", "prompt", { role: "group", ariaLabel: "Choose" });
  const slots = [0, 1, 2].map((i) => {
    const text = part("p", "text", { dir: "auto", tabIndex: 0, ariaLabel: `Text of response ${i + 1}`, role: "group" }), kind = part("span", "kind"), edited = part("span", "edited");
    const box = part("article", "response", { ariaLabel: `Response ${i + 1}` });
    const body = part("div", "body");
    body.append(text);
    box.append(h("header", {}, h("span", { className: "fc-slot", textContent: i + 1 }), kind, edited), body);
    return { box, body, text, kind, edited };
  });
  const bar = part("progress", "bar", { ariaLabel: "Cards done" }), pace = part("p", "pace"), strata = part("table", "strata");
  const gauge = part("div", "gauge"), panel = part("section", "panel", { ariaLabel: "Details", hidden: true });

  const button = (key, label, kind = "") => h("button", { type: "button", className: `fc-button ${kind}`, onclick: () => press(key) },
    h("kbd", { textContent: key.length === 1 ? key.toUpperCase() : { escape: "Esc" }[key] ?? key }), ` ${label}`);
  const actions = part("div", "actions", { role: "toolbar", ariaLabel: "Decide" });
  actions.append(button("a", "accept", "fc-yes"), button("r", "reject…", "fc-no"), button("f", "flag"), button("g", "guess types"), button("e", "edit…"),
    button("c", "comment"), button("u", "undo"), button("y", "redo"));
  const select = (label, names, key) => {
    const node = h("select", { ariaLabel: label, onchange: () => { send("view", { [key]: node.value }); card.focus({ preventScroll: true }); } }, ...names.map(([value, text]) => h("option", { value, textContent: text })));
    return node;
  };
  const filter = select("Filter", choices.filters.map((name) => [name, name]), "filter");
  const stratum = select("Stratum", [["", "all strata"], ...choices.strata.map((name) => [name, words(name)])], "stratum");
  const where = part("span", "where");
  const moves = part("div", "actions", { role: "toolbar", ariaLabel: "Move" });
  moves.append(button("p", "previous"), button("n", "next"), button("j", "jump…"), button("/", "search…"), button("v", "view:"), filter, stratum, where);
  const tools = part("div", "actions", { role: "toolbar", ariaLabel: "Tools" });
  tools.append(button("l", "leaking words"), button("i", "agreement"), button("b", "keep the best…"), button("?", "keys"));
  const hint = part("p", "hint", { textContent: "Click the card, or move to it with Tab, and use its keys." });

  const top = part("div", "top");
  top.append(number, badge, flag, h("span", { className: "fc-space" }), h("span", { className: "fc-who", textContent: choices.annotator }), saved);
  const answers = part("div", "responses");
  answers.append(...slots.map((slot) => slot.box));
  const main = part("div", "main"), side = part("aside", "side", { ariaLabel: "Progress and leakage" });
  const foot = part("div", "foot"), measure = (title, ...nodes) => h("div", { className: "fc-measure" }, h("h3", { textContent: title }), ...nodes);
  foot.append(notice, hint);
  main.append(top, alarm, stale, scenario, about, answers, comment, others, prompt, actions, moves, tools, foot, panel);
  side.append(measure("Progress", bar, pace, strata), measure("Do words give the types away?", gauge));
  const card = h("div", { className: "fc-card tex2jax_ignore mathjax_ignore", tabIndex: 0, role: "group", ariaLabel: `Filter card of ${choices.annotator}; press question mark for its keys` }, main, side);
  card.dataset.lmSuppressShortcuts = "true";
  card.addEventListener("keydown", onkey, true);
  card.addEventListener("focusin", () => card.classList.add("fc-on"));
  card.addEventListener("focusout", (event) => card.classList.toggle("fc-on", card.contains(event.relatedTarget)));
  el.append(card);

  // ---- to and from the session ----------------------------------------------------------------------------------
  function send(op, more = {}) {
    if (silent) { op = "hello"; more = {}; } // what was pressed may have been saved after all: look first
    pending = `${me}-${++count}`;
    saved.textContent = "saving…";
    clearTimeout(silence);
    silence = setTimeout(unanswered, SILENCE);
    model.send({ id: pending, op, card: view?.at, ...more });
  }

  function unanswered() {
    silent = true; queue = [];
    saved.textContent = "not confirmed";
    alarm.textContent = "The kernel does not answer, so the last key is not confirmed as saved. Wait while it works; if it was restarted, reload this page and run the cell again. The card goes on from the journal.";
    alarm.hidden = false;
  }

  function receive(message) {
    if (message.meter) { meter = message.meter; paintGauge(); if (view) paintTexts(); }
    if (message.proposal) { proposal = message.proposal; if (panel.dataset.shows === "keep") paintProposal(); }
    if (message.agreement) paintAgreement(message.agreement);
    if (!message.view) return;
    const moved = view && view.at !== message.view.at;
    view = message.view;
    if (moved) close();
    paint();
    if (message.re !== pending && !(silent && message.re?.startsWith(me))) return; // a late answer is an answer
    pending = ""; silent = false;
    clearTimeout(silence);
    saved.textContent = view.writable ? "saved" : "read only";
    while (queue.length && !pending) act(queue.shift());
  }

  // ---- keys -----------------------------------------------------------------------------------------------------
  function onkey(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || event.key === "Tab" || event.key === "Shift") return;
    if (event.target.closest(FIELDS)) return;
    if (event.target.closest("button") && (event.key === "Enter" || event.key === " ")) return;
    let key = event.key.toLowerCase();
    if (!/^[ -~]+$/.test(key) && /^Key[A-Z]$/.test(event.code)) key = event.code[3].toLowerCase(); // other scripts' layouts
    if (!known(key)) return;
    event.preventDefault();
    event.stopPropagation();
    if (event.repeat && !NAVIGATION.has(key)) return; // a key held down decides one card, not ten
    press(key);
  }

  function press(key) {
    if (pending && !silent) { if (queue.length < 50) queue.push(key); } else act(key);
  }

  function known(key) {
    return mode ? /^([1-6]|[a-z]|escape|backspace)$/.test(key) : key in keys || key === "escape";
  }

  const keys = {
    a: () => send("accept"), r: () => ask("reject"), f: () => send("flag"), g: () => ask("guess"), e: () => ask("edit"),
    c: () => type("comment", "Comment", view.comment, (text) => send("comment", { text })),
    u: () => send("undo"), y: () => send("redo"), n: () => send("next"), p: () => send("previous"),
    arrowright: () => send("next"), arrowleft: () => send("previous"),
    j: () => type("jump", `Jump to card (1 to ${view.total})`, "", (text) => /^\s*\d+\s*$/.test(text) && send("jump", { number: Number(text) })),
    "/": () => type("search", "Search in scenarios and responses", view.search, (text) => send("view", { search: text })),
    v: () => send("view", { filter: choices.filters[(choices.filters.indexOf(view.filter) + 1) % choices.filters.length] }),
    l: () => { shadow = !shadow; paintTexts(); },
    i: () => shut("agreement") || send("agreement"),
    b: () => { if (shut("keep")) return; proposal = {}; show("keep"); paintProposal(); send("propose"); },
    "?": () => shut("keys") || paintKeys(),
  };

  function act(key) {
    if (!view) return;
    if (key === "escape") { close(); return; }
    if (mode === "reject") {
      const reason = choices.reasons[Number(key) - 1];
      if (reason) { close(); send("reject", { reason }); }
    } else if (mode === "edit") {
      if ("123".includes(key)) { close(); edit(Number(key) - 1); }
    } else if (mode === "guess") {
      if (key === "backspace") guesses.pop();
      else if (TYPE_KEYS[key]) guesses.push(TYPE_KEYS[key]);
      if (guesses.length === slots.length) { const types = guesses; close(); send("guess", { types }); } else paintGuess();
    } else keys[key]?.();
  }

  function ask(what) {
    if (!view.writable) { notice.textContent = "Read only: nothing can be changed here."; return; }
    close();
    mode = what;
    if (what === "guess") {
      if (!view.guessable) { mode = ""; send("guess", { types: [] }); return; }
      paintGuess();
      return;
    }
    const names = what === "reject" ? choices.reasons : ["response 1", "response 2", "response 3"];
    prompt.replaceChildren(h("span", { textContent: what === "reject" ? "Reject, because:" : "Edit:" }), ...names.map((name, i) => button(String(i + 1), name)), button("escape", "cancel"));
    prompt.hidden = false;
  }

  function close() {
    const held = card.contains(document.activeElement);
    mode = ""; guesses = [];
    prompt.replaceChildren();
    prompt.hidden = true;
    if (field) { const gone = field; field = null; gone.hold.remove(); if (gone.text) gone.text.hidden = false; }
    for (const slot of slots) slot.box.classList.remove("fc-now");
    if (view) paintKinds();
    if (held && (!card.contains(document.activeElement) || document.activeElement.closest("[hidden]"))) card.focus({ preventScroll: true }); // what was focused is gone
  }

  function type(name, label, value, done) {
    close();
    const input = h("input", { type: "text", value, ariaLabel: label, dir: "auto", inputMode: name === "jump" ? "numeric" : "text" });
    prompt.hidden = false; // before the input is focused: what is hidden takes no focus
    writing(prompt, input, done, label, (event) => event.key === "Enter");
  }

  function edit(i) {
    const { body, text } = slots[i];
    const area = h("textarea", { value: view.responses[i].text, ariaLabel: `Wording of response ${i + 1}`, dir: "auto", rows: 8 });
    text.hidden = true;
    writing(body, area, (wording) => send("edit", { slot: i, text: wording }), "", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey), text);
  }

  function writing(parent, input, done, label, finished, text = null) {
    const finish = () => { const value = input.value; leave(); done(value); };
    const leave = () => { close(); card.focus({ preventScroll: true }); };
    input.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (finished(event)) { event.preventDefault(); finish(); } else if (event.key === "Escape") { event.preventDefault(); leave(); }
    });
    const small = (key, name, onclick) => h("button", { type: "button", className: "fc-button", onclick }, h("kbd", { textContent: key }), ` ${name}`);
    const hold = h("div", { className: "fc-field" }, ...(label ? [h("span", { textContent: label })] : []), input,
      small(text ? "Ctrl+Enter" : "Enter", text ? "keep as a new version" : "go", finish), small("Esc", "cancel", leave));
    field = { hold, text };
    parent.append(hold);
    input.focus();
    if (!text) input.select();
  }

  // ---- painting -------------------------------------------------------------------------------------------------
  function put(node, text) { node.textContent = text; node.hidden = !text; }

  function paint() {
    put(number, `Card ${view.at + 1} of ${view.total}`);
    put(badge, view.decision ? { accept: "accepted", reject: `rejected: ${view.reason}` }[view.decision] : "");
    badge.className = `fc-badge fc-${view.decision}`;
    put(flag, view.flagged ? "flagged" : "");
    put(alarm, [view.writable ? "" : "Read only: another kernel, or a newer card of this one, holds this journal. Close it and run the cell again; nothing pressed here is saved.",
      view.torn ? "The journal's last line was torn by a crash; it had never been confirmed and is left out." : ""].filter(Boolean).join(" "));
    put(stale, view.stale.length ? `Stale, about an earlier text and not applied: ${view.stale.join("; ")}` : "");
    put(about, view.about ? [view.about.id, words(view.about.context), words(view.about.domain), `register ${view.about.register}`].filter(Boolean).join(" · ") : "");
    put(comment, view.comment ? `Comment: ${view.comment}` : "");
    put(others, Object.keys(view.others).length ? `Others: ${Object.entries(view.others).map(([name, vote]) => `${name} ${vote}`).join("; ")}${view.adjudicating ? ". Your decision settles it." : ""}` : "");
    put(notice, view.notice);
    if (!field?.text) for (const slot of slots) slot.text.scrollTop = 0;
    paintKinds();
    paintTexts();
    filter.value = view.filter;
    stratum.value = view.stratum;
    put(where, view.filter === "all" && !view.stratum && !view.search ? "" : `${view.place_in_view || "–"} of ${view.in_view} in view${view.search ? `, “${view.search}”` : ""}`);
    paintProgress();
    card.dataset.serial = String(Number(card.dataset.serial ?? 0) + 1);
    card.dataset.at = view.at;
  }

  function paintKinds() {
    slots.forEach((slot, i) => {
      const type = view.about?.types[i] ?? "", guess = mode === "guess" ? guesses[i] : view.guesses[i];
      slot.kind.textContent = [type, guess ? `guessed ${guess}` : ""].filter(Boolean).join(", ");
      slot.box.dataset.type = type;
      slot.box.classList.toggle("fc-now", mode === "guess" && guesses.length === i);
      const edits = view.responses[i]?.edits;
      slot.edited.textContent = edits ? `edited, version ${edits + 1}` : "";
      slot.box.hidden = !view.responses[i];
    });
  }

  function paintTexts() {
    const leaking = shadow ? new Set(Object.values(meter.words ?? {}).flat()) : null;
    fill(scenario, view.scenario, null);
    slots.forEach((slot, i) => view.responses[i] && fill(slot.text, view.responses[i].text, leaking));
  }

  function paintGuess() {
    prompt.replaceChildren(h("span", { textContent: `Response ${guesses.length + 1} is` }), ...Object.entries(TYPE_KEYS).map(([key, name]) => button(key, name)), button("escape", "cancel"));
    prompt.hidden = false;
    paintKinds();
  }

  function paintProgress() {
    const p = view.progress;
    bar.max = view.total; bar.value = p.done;
    pace.textContent = `${p.done} of ${view.total} cards done, ${p.accepted} accepted` + (p.pace ? `; ${clock(p.pace)} a card, ${clock(p.left)} left` : "");
    const rows = p.strata.map((row) => h("tr", {}, h("th", { scope: "row", textContent: words(row.name) }), h("td", { textContent: `${row.accepted} / ${row.quota}` })));
    const short = p.strata.reduce((sum, row) => sum + Math.max(row.quota - row.accepted, 0), 0);
    const over = Object.entries(p.over).map(([name, share]) => `${words(name)} ${Math.round(100 * share)}%`);
    strata.replaceChildren(h("caption", { textContent: short ? `Accepted of what ${p.target} scenarios need; ${short} to go` : `All ${p.target} scenarios' quotas are filled` }), h("tbody", {}, ...rows));
    if (over.length) strata.caption.textContent += `. Over 10% of a domain: ${over.join(", ")}`;
  }

  function paintGauge() {
    if (meter.error) { gauge.replaceChildren(h("p", { textContent: `No reading: ${meter.error}` })); return; }
    if (!meter.pairs?.length) { gauge.replaceChildren(h("p", { textContent: "A reading needs 10 accepted cards of a register." })); return; }
    gauge.replaceChildren(...meter.pairs.map((row) => {
      const across = row.evaluation === "transfer";
      const fillbar = h("span", { className: "fc-fill" });
      fillbar.style.width = `${Math.max(row.auroc - 0.5, 0) * 200}%`;
      fillbar.classList.toggle("fc-high", row.auroc > (across ? 0.8 : 0.98));
      return h("div", { className: "fc-reading" }, h("span", { textContent: `${row.pair}  ${two(row.auroc)}` }), h("span", { className: "fc-scale", ariaHidden: "true" }, fillbar),
        h("small", { textContent: `${across ? "across registers" : row.evaluation.replace("within:", "within ")}, by ${row.baseline}` }));
    }), h("small", { textContent: `AUROC of the best quick baseline; .50 is chance. L marks the words that leak most.` }));
  }

  function show(name, ...children) {
    const held = panel.contains(document.activeElement);
    panel.dataset.shows = name; panel.hidden = false; panel.replaceChildren(...children);
    if (held) card.focus({ preventScroll: true });
  }
  function shut(name) {
    if (panel.hidden || panel.dataset.shows !== name) return false;
    panel.hidden = true; panel.dataset.shows = "";
    return true;
  }

  function paintAgreement(rows) {
    const body = rows.map((row) => h("tr", {}, ...[words(row.measure), row.annotators, two(row.estimate), `${two(row.ci_low)} to ${two(row.ci_high)}`, row.n].map((text) => h("td", { textContent: text }))));
    show("agreement", h("h3", { textContent: "Agreement" }), rows.length ? h("table", {}, h("thead", {}, h("tr", {}, ...["measure", "annotators", "value", "95% interval", "n"].map((text) => h("th", { scope: "col", textContent: text })))), h("tbody", {}, ...body))
      : h("p", { textContent: "Nothing to compare yet: it takes a second annotator, guesses, or cards that came twice." }),
      h("p", { textContent: "The view “disagreements” lists what to adjudicate." }));
  }

  function paintProposal() {
    const found = proposal.scenarios, unfolded = Boolean(panel.querySelector("details")?.open);
    if (proposal.error) { show("keep", h("h3", { textContent: "Keep the best" }), h("p", { textContent: `No proposal: ${proposal.error}` })); return; }
    if (!found) { show("keep", h("h3", { textContent: "Keep the best" }), h("p", { textContent: "Choosing…" })); return; }
    if (!found.length && !proposal.left_out.length) { show("keep", h("h3", { textContent: "Keep the best" }), h("p", { textContent: "No scenario is accepted in all its registers yet; there is nothing to choose from." })); return; }
    const pairs = Object.keys(proposal.before);
    const line = (name, areas) => h("tr", {}, h("th", { scope: "row", textContent: name }), ...pairs.map((pair) => h("td", { textContent: two(areas[pair]) })));
    const short = Object.entries(proposal.short).map(([name, n]) => `${words(name)} lacks ${n}`), over = Object.entries(proposal.domains).map(([name, share]) => `${words(name)} ${Math.round(100 * share)}%`);
    const choice = (id, pin) => h("button", { type: "button", className: "fc-button", onclick: () => { if (!pending) send("pin", { scenario: id, choice: pin }); } }, { in: "always in", out: "leave out", free: "free again" }[pin]);
    const item = (id, inside) => h("li", {}, h("span", { textContent: id }), ...(proposal.pins?.[id] ? [h("em", { textContent: ` chosen: ${proposal.pins[id]} ` }), choice(id, "free")] : [choice(id, inside ? "out" : "in")]));
    show("keep", h("h3", { textContent: `Keep the best: ${found.length} of ${found.length + proposal.left_out.length} accepted scenarios` }),
      h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col", textContent: "AUROC of words" }), ...pairs.map((pair) => h("th", { scope: "col", textContent: pair })))),
        h("tbody", {}, line("all accepted", proposal.before), line("drawn by chance under the quotas", proposal.drawn), line("proposed", proposal.after))),
      h("p", { textContent: `It costs ${proposal.left_out.length} accepted scenarios${short.length ? `; ${short.join(", ")}` : "; every quota is filled"}${over.length ? `; domains over 10%: ${over.join(", ")}` : ""}. The proposal was chosen by this score, so its own figure flatters it.` }),
      h("button", { type: "button", className: "fc-button fc-yes", disabled: !view.writable || !found.length, onclick: () => { if (!pending) send("keep", { scenarios: found }); } }, "confirm this selection"),
      h("details", { open: unfolded }, h("summary", { textContent: "override: scenarios in and out" }), h("h4", { textContent: "in" }), h("ul", {}, ...found.map((id) => item(id, true))), h("h4", { textContent: "out" }), h("ul", {}, ...proposal.left_out.map((id) => item(id, false)))));
  }

  function paintKeys() {
    const rows = [["A", "accept"], ["R, then 1 to 6", "reject with a reason"], ["F", "flag, or take the flag away"], ["G, then C A I U", "guess the type of each response (before the decision)"],
      ["E, then 1 to 3", "edit a response; Ctrl+Enter keeps it as a new version"], ["C", "comment"], ["U, Y", "undo, redo, without limit"], ["N P → ←", "next, previous"], ["J", "jump to a card"], ["/", "search"],
      ["V", "next view: unlabelled, accepted, rejected, flagged, stale, disagreements"], ["L", "mark the words that leak most"], ["I", "agreement"], ["B", "keep the best"], ["Esc", "leave a question or a field"], ["?", "this list"]];
    show("keys", h("h3", { textContent: "Keys" }), h("table", {}, h("tbody", {}, ...rows.map(([key, what]) => h("tr", {}, h("th", { scope: "row" }, h("kbd", { textContent: key })), h("td", { textContent: what }))))));
  }

  for (const node of [alarm, stale, about, comment, others, notice, badge, flag, prompt]) node.hidden = true;
  paintGauge();
  model.on("msg:custom", receive);
  send("hello");
  return () => { model.off("msg:custom", receive); clearTimeout(silence); };
}

export default { render };
