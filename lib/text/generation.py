"""Generation: scenarios, plain triplets, counter triplets and controls, written and blindly judged by language models.

scenario → plain triplet → counter triplet (against the n-grams of all plain ones) → rewrite rounds → controls. Every
paid reply is in `paid/<study>.journal.jsonl` before it is looked at; a rerun resumes and pays for nothing twice.
`max_usd` counts over the life of that journal.
"""

from pathlib import Path

import pandas as pd

from lib.errors import BadInput
from lib.params import load_params
from lib.text import wording
from lib.text.api import Api, Pace, Unavailable, api_key
from lib.text.briefs import BRIEFS, EMOTIONS, SETTINGS, TYPES, Slot, plan, request, safety, variety
from lib.text.budget import Ledger, Price, price_of
from lib.text.dataset import LABELS, SCHEMAS, Item
from lib.text.journal import Journal, journal_path
from lib.text.purchases import Purchases
from lib.text.writer import Stopped, Writer

ROUNDS, REWRITE_ATTEMPTS = 2, 2
RETRIES = 1.15  # the estimate's allowance for answers that are turned down
PER_TRIPLET = {"scenario": 1, "plain": 1, "counter": 1, "rewrite": 0.8, "judge": 8.4, "stripped": 1, "stripped_counter": 1 / 3,
               "non_empathy": 2 / 3, "non_empathy_counter": 1 / 3, "formality": 1}
CONTROLS = ("stripped", "stripped_counter", "non_empathy", "non_empathy_counter", "formality")
Items = list[tuple[str, Item]]


def wanted(stage: str, n_triplets: int) -> int:
    """How many of a stage a set of `n_triplets` has."""
    return max(1, round(PER_TRIPLET[stage] * n_triplets))


def write_triplets(writer: Writer, slots: list[Slot]) -> None:
    """Scenarios and both registers, each judged blind."""
    draft, seed = writer.draft, writer.seed

    def scenario(slot: Slot, attempt: int) -> dict:
        about = variety(slot, seed=seed, attempt=attempt)
        return {**about, "setting": SETTINGS[slot.context], "domain": slot.domain.replace("_", " "), "valence": slot.valence,
                "person": {"self": "the writer", "other": "somebody the writer cares about"}[slot.person]}

    def plain(slot: Slot, attempt: int) -> dict:
        return {**draft["scenario"][slot.id], "context": slot.context.replace("_", " "), "safety": safety(slot.context),
                "manner": variety(slot, seed=seed, attempt=attempt)["manner"]}

    def counter(slot: Slot, attempt: int) -> dict:
        own = draft["plain"][slot.id]
        return {**draft["scenario"][slot.id], **own, "context": slot.context.replace("_", " "), "feedback": feedback,
                "safety": safety(slot.context, own["safety_step"])}

    writer.settle("scenario", slots, scenario)
    writer.settle("plain", having(slots, draft["scenario"]), plain, judged=True)
    feedback = writer.frozen("counter", lambda: wording.plain_feedback(wording.look(items_of(writer, slots), writer.thresholds)))
    writer.settle("counter", having(slots, draft["plain"]), counter, judged=True)
    for number in range(ROUNDS):
        rewrite(writer, slots, number)


def rewrite(writer: Writer, slots: list[Slot], number: int) -> None:
    """One rewrite round of the counter register; a rewrite that is turned down leaves the text as it was."""
    draft = writer.draft

    def find() -> dict:
        found = wording.rewrite_feedback(wording.look(items_of(writer, slots), writer.thresholds), writer.thresholds)
        ngrams = sorted({ngram for marks in found.values() for ngram in marks})
        ids = [slot.id for slot in having(slots, draft["counter"]) if not wording.untouched(slot.number)
               and wording.contains(" ".join(draft["counter"][slot.id].values()), ngrams)]
        return {"ids": ids, "feedback": "\n".join(f"{what}: {', '.join(marks)}" for what, marks in found.items())}

    def revise(slot: Slot, attempt: int) -> dict:
        return {**draft["scenario"][slot.id], **draft["counter"][slot.id], "context": slot.context.replace("_", " "),
                "feedback": todo["feedback"], "safety": safety(slot.context, draft["plain"][slot.id]["safety_step"])}

    todo = writer.frozen(f"rewrite-{number + 1}", find)
    chosen = [slot for slot in having(slots, draft["counter"]) if slot.id in todo["ids"]]
    try:
        writer.settle("rewrite", chosen, revise, attempts=REWRITE_ATTEMPTS, judged=True)
    finally:
        draft["counter"] |= draft["rewrite"]
        draft["rewrite"] = {}


def write_controls(writer: Writer, slots: list[Slot]) -> None:
    """Valence-stripped items of the triplets, non-empathy items and formality pairs; a third also in the counter register."""
    draft, n = writer.draft, len(slots)
    emotional = plan(wanted("non_empathy", n), seed=writer.seed + 1, prefix="ne")
    pairs = plan(wanted("formality", n), seed=writer.seed + 2, prefix="fo")

    def non_empathy(slot: Slot, attempt: int) -> dict:
        return {**variety(slot, seed=writer.seed + 1, attempt=attempt), "emotion": EMOTIONS[slot.number % len(EMOTIONS)]}

    def formality(slot: Slot, attempt: int) -> dict:
        return {**variety(slot, seed=writer.seed + 2, attempt=attempt), "setting": SETTINGS[slot.context].partition(":")[0],
                "domain": slot.domain.replace("_", " ")}

    def counter_of(stage: str):
        def values(slot: Slot, attempt: int) -> dict:
            own = draft[stage][slot.id]
            texts = "\n".join(f"{label}: {own[label]}" for label in BRIEFS[f"{stage}_counter"].fields)
            return {"scenario": own["scenario"], "texts": texts}
        return values

    writer.settle("stripped", having(slots, draft["plain"]),
                  lambda slot, attempt: {"scenario": draft["scenario"][slot.id]["scenario"]})
    writer.settle("non_empathy", emotional, non_empathy)
    writer.settle("formality", pairs, formality)
    for stage, of in (("stripped", slots), ("non_empathy", emotional)):
        some = having(of, draft[stage])[:wanted(f"{stage}_counter", n)]
        writer.settle(f"{stage}_counter", some, counter_of(stage))


def having(slots: list[Slot], texts: dict) -> list[Slot]:
    return [slot for slot in slots if slot.id in texts]


def items_of(writer: Writer, slots: list[Slot]) -> Items:
    """What the draft holds, in the dataset's schema: triplets first, plain before counter."""
    draft, items = writer.draft, []

    def add(condition: str, stage: str, id_: str, **about) -> None:
        fields = {name: text for name, text in draft[stage][id_].items() if name in LABELS[condition]}
        items.append((condition, SCHEMAS[condition].model_validate({"id": id_, **about, **fields})))

    for register in ("plain", "counter"):
        for slot in having(slots, draft[register]):
            add("empathy", register, slot.id, context=slot.context, domain=slot.domain, register=register,
                scenario=draft["scenario"][slot.id]["scenario"])
    about = {slot.id: {"context": slot.context, "domain": slot.domain} for slot in slots}
    for condition, stage in (("valence_stripped", "stripped"), ("non_empathy", "non_empathy"), ("formality", "formality")):
        for suffix, register in (("", "plain"), ("_counter", "counter")):
            for id_ in draft.get(stage + suffix, {}):
                tied = {"triplet_id": id_, **about[id_]} if condition == "valence_stripped" else {}
                add(condition, stage + suffix, id_, register=register, scenario=draft[stage][id_]["scenario"], **tied)
    return items


def generate(study_root: Path, *, n_triplets: int, controls: bool, model: str, judge_model: str, prices: dict, max_usd: float,
             batches: bool, seed: int, base_url: str | None = None, pace: Pace | None = None) -> Items:
    """`(condition, item)` of a generated dataset, complete or as far as the budget went; what is missing is printed.

    `prices`: `{model: (input, output)}`, USD per million tokens at the full rate; batches cost half. Raises BadInput
    where a setting, the key or the budget allows no triplet at all. Needs no key where the journal has every reply.
    """
    if n_triplets < 1 or seed < 0:
        raise BadInput("n_triplets must be 1 or more, seed 0 or more")
    study = Path(study_root).name.partition("--")[0]
    priced = {name: price_of(name, prices, batches=batches) for name in (model, judge_model)}
    journal = Journal(journal_path(study), secret=api_key(needed=False))
    try:
        api = Api(pace=pace or Pace(), base_url=base_url, redact=journal.redact)
        purchases = Purchases(journal, Ledger(journal, max_usd), api, batches=batches)

        def announce() -> None:
            table = tabulate(api, priced, n_triplets=n_triplets, controls=controls, model=model, judge_model=judge_model)
            purchases.expected = int(table.requests.sum())
            print(f"estimate: {table.requests.sum()} requests, ${table.usd.sum():.2f} in all; "
                  f"limit ${max_usd:.2f}, spent so far ${purchases.ledger.spent:.2f}")

        writer = Writer(purchases, model, judge_model, priced, seed, load_params(study).thresholds, announce)
        return run(writer, plan(n_triplets, seed=seed), controls=controls)
    finally:
        journal.close()


def run(writer: Writer, slots: list[Slot], *, controls: bool) -> Items:
    """All stages, as far as they go; then what there is."""
    stopped = ""
    try:
        write_triplets(writer, slots)
        if controls:
            write_controls(writer, slots)
    except (Stopped, Unavailable) as reason:
        stopped = str(reason)
    finally:
        writer.purchases.close()
    items = items_of(writer, slots)
    if not items:
        raise BadInput(f"nothing was generated: {stopped or 'every answer was turned down'}")
    report(writer, len(slots), controls=controls, stopped=stopped)
    return items


def report(writer: Writer, n_triplets: int, *, controls: bool, stopped: str) -> None:
    """Print what there is, what is missing and why, what was turned down, and what it cost."""
    stages = ("scenario", "plain", "counter", *(CONTROLS if controls else ()))
    have = {stage: (len(writer.draft[stage]), wanted(stage, n_triplets)) for stage in stages}
    print("generated:", ", ".join(f"{stage} {n} of {of}" for stage, (n, of) in have.items()))
    missing = {stage: of - n for stage, (n, of) in have.items() if n < of}
    if missing:
        print("missing:", ", ".join(f"{n} {stage}" for stage, n in missing.items()), f"({stopped or 'every attempt was turned down'})")
    if writer.rejected:
        print("turned down:", ", ".join(f"{kind} {n}" for kind, n in sorted(writer.rejected.items())))
    ledger = writer.purchases.ledger
    if writer.purchases.journal.torn:
        print("journal: its last line was cut off by a kill")
    print(f"spent ${ledger.spent:.2f} of ${ledger.max_usd:.2f}; journal: {writer.purchases.journal.path.name}")


def estimate(*, n_triplets: int, controls: bool, model: str, judge_model: str, prices: dict, batches: bool,
             base_url: str | None = None, pace: Pace | None = None) -> pd.DataFrame:
    """Expected cost before anything is sent: `stage, model, requests, input_tokens, output_tokens, usd`.

    Input is counted by the API (free, but it needs the key), on stand-in texts of the usual length; output is that of
    a usual answer. A model that thinks before it answers costs more; `max_usd` holds whatever the estimate says.
    """
    key = api_key()
    api = Api(pace=pace or Pace(), base_url=base_url, redact=lambda text: text.replace(key, "[key]"))
    priced = {name: price_of(name, prices, batches=batches) for name in (model, judge_model)}
    try:
        return tabulate(api, priced, n_triplets=n_triplets, controls=controls, model=model, judge_model=judge_model)
    except Unavailable as error:
        raise BadInput(f"Anthropic API: no answer ({error}); try again") from None


def tabulate(api: Api, priced: dict[str, Price], *, n_triplets: int, controls: bool, model: str, judge_model: str) -> pd.DataFrame:
    """The table of `estimate`, one count of tokens a stage."""
    sentence = "When the van came back from the coast last Tuesday I found her old letters under the seat and sat there for an hour. "
    text = " ".join((sentence * 3).split()[:50])
    names = ("scenario", "reason", "feeling", "action", "context", "setting", "domain", "person", "valence", "voice", "particular",
             "manner", "safety", "feedback", "emotion", "response", *TYPES)
    values = dict.fromkeys(names, text) | {"texts": " ".join([text] * 3)}
    rows = []
    for stage, brief in BRIEFS.items():
        if stage in CONTROLS and not controls:
            continue
        name = judge_model if stage == "judge" else model
        n = round(wanted(stage, n_triplets) * RETRIES)
        tokens = api.count(request(stage, model=name, **values))
        usd = priced[name].cost({"input_tokens": n * tokens, "output_tokens": n * brief.expected})
        rows.append((stage, name, n, n * tokens, n * brief.expected, usd))
    return pd.DataFrame(rows, columns=["stage", "model", "requests", "input_tokens", "output_tokens", "usd"])
