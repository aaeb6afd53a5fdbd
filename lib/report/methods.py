"""How each criterion is measured, in a paragraph for the page, and what the same code says where the truth is known."""

METHODS = {
    "probes": "A logistic probe is trained on one register of the training scenarios and tested on the other register of held-out ones, both ways; T is the "
              "smaller AUROC. Folds never part scenarios that resemble one another. The same is done with every text baseline, the embedding layer and each layer "
              "of a random-weight twin; the lead Δ is T minus the best of these. Null: labels permuted within triplets, the maximum over layers and penalties. "
              "PASS needs Δ's interval above 0 and T above chance also without what length and style explain.",
    "separation": "κ is the cosine of the Cognitive and the Affective effect, each measured from neutral texts of the same scenario, with numerator and "
                  "denominator as unbiased products across scenarios, so noise neither inflates nor shrinks it; its interval is a jackknife over scenario clusters. "
                  "The literal one-vs-rest cosine of three classes is negative by construction, which N0 and N1 show. PASS needs κ's interval below the bound, also "
                  "whitened and without length and style, and directions that carry over to the other register.",
    "clusters": "Latents of two sparse autoencoders from different seeds are averaged over each reply, centred within scenario and clustered by k-means. The number "
                "of clusters comes from the gap statistic against surrogates with the same covariance and no clusters, its stability from resampled scenario "
                "clusters, its meaning from the adjusted Rand index with the types. An autoencoder that fails its gates gives no verdict.",
    "convergence": "Cluster directions and probe directions, found on different halves of the scenarios, are matched one to one; the mean matched cosine is "
                   "compared with exchanged types and with directions of equal covariance, and divided by what the reliabilities of both allow.",
    "specificity": "O is the overlap of the three-class structure of empathy with that of its controls (valence-stripped and non-empathy texts), from unbiased "
                   "products: 1 the same structure, 0 none in common. Beside it a style classifier is carried from one condition to the other. PASS needs O's interval "
                   "below its bound and classifiers that do not carry over; FAIL needs equivalence.",
    "causality": "A direction is removed from the prompt's representation only; D is the change of the empathic reply's log-probability per token minus that of the "
                 "reply it is set against. Directions come from the other half of the scenarios in the other register. Null: random directions that disturb with equal "
                 "energy. PASS also needs a judge of free replies, and an edit that stays inside the coherent range on neutral text.",
    "bandwidth": "Effective dimension (participation ratio of the empathy effect, unbiased in the number of texts) times the coherent steering range (the doses at "
                 "which greedy replies stay inside the 95% band of unsteered log-perplexity). It is compared with formality at the same number of texts.",
}
# What each flag or reason asks for: (what to look for, what to do). Read after a row's own sentence on power.
REMEDIES = (
    ("LL-only", "a judge of free replies: set `08_causality.judge: true` in the params, with ANTHROPIC_API_KEY in the environment"),
    ("CENSORED", "a wider grid of doses: `09_bandwidth.coeffs`"),
    ("ONE-REGISTER", "a second register: the same replies in other words, or the bundled texts"),
    ("LEAKY", "texts whose words give less away: filter them in `02_filter`, where the meter shows what leaks"),
    ("ENCODER", "nothing more of the same: a sentence encoder knows it too, so it is in the language before it is in this model"),
    ("gates", "an autoencoder that passes its gates: `04_sae.d_sae`, `k`, `n_samples`, or another layer"),
    ("no coefficient keeps", "smaller doses: `09_bandwidth.coeffs`"),
)


def answers_for(criterion: str, known: list[dict]) -> str:
    """The known-answer cases of a criterion, in words."""
    own = [row for row in known if row["criterion"] == criterion]
    return "Known answers, simulated: " + "; ".join(f"{row['data']}: {row['verdict']}, should be {row['expected']}" for row in own) + "." if own else ""


def remedies(row: dict) -> list[str]:
    """What would decide an INCONCLUSIVE row, beyond its own sentence on power."""
    said = f"{row['flags']} {row['reason']}"
    return [remedy for sign, remedy in REMEDIES if sign in said]
