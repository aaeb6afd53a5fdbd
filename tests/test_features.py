"""Text baselines are fitted on training rows only, equal scikit-learn where it has them, and see what they should."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.naive_bayes import MultinomialNB

from lib.errors import BadInput
from lib.stats.auroc import auroc
from lib.stats.contrasts import make_design
from lib.stats.crossfit import gram_source, out_of_fold
from lib.text import features
from lib.text.features import Logistic, NaiveBayes, family
from lib.text.synthetic import triplets

TRAIN = np.arange(60)


@pytest.fixture(scope="module")
def texts():
    return list(triplets(30, seed=0)["response"])


def by_name(texts, **more):
    return {b.name: b for b in family(texts, **more)}


@pytest.mark.parametrize(("name", "vectorizer"), [
    ("TF-IDF 1-2-grams", TfidfVectorizer(ngram_range=(1, 2))),
    ("TF-IDF characters 2-4", TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)))])
def test_tfidf_is_scikit_learns_fitted_on_training_texts(texts, name, vectorizer):
    fitted = vectorizer.fit([texts[i] for i in TRAIN])
    rows = np.arange(50, 100)
    expected = fitted.transform([texts[i] for i in rows]) @ fitted.transform([texts[i] for i in TRAIN]).T
    assert abs(by_name(texts)[name].gram(TRAIN, rows) - expected.toarray()).max() < 1e-5


def test_naive_bayes_is_scikit_learns(texts):
    y = np.where(np.arange(60) % 2, 1, -1)
    bayes = by_name(texts)["words, L2, naive Bayes"]
    rows = np.arange(60, 90)
    seen = features.document_frequency(bayes.X[TRAIN]) > 0
    model = MultinomialNB(fit_prior=False).fit(bayes.X[TRAIN], y)
    weights = (model.feature_log_prob_[1] - model.feature_log_prob_[0]) * seen
    assert np.allclose(bayes.scores(TRAIN, rows, y[None])[0], bayes.X[rows] @ weights)


def test_nothing_is_learned_from_texts_outside_training(texts):
    """Changing a held-out text may change its own scores, but no inner product among the others."""
    other = [*texts[:-1], "Zebra zebra! Utterly, quite 7 different: why?"]
    rows, y = np.arange(len(texts) - 1), np.where(np.arange(60) % 2, 1, -1)[None]
    before, after = by_name(texts), by_name(other)
    for name, baseline in before.items():
        if isinstance(baseline, Logistic):
            assert np.allclose(baseline.gram(TRAIN, rows), after[name].gram(TRAIN, rows), atol=1e-5), name
        else:
            a, b = (each.scores(TRAIN, rows, y)[0] for each in (baseline, after[name]))
            assert np.corrcoef(a, b)[0, 1] > 0.9999, name


def test_words_keep_case_punctuation_and_single_letters():
    assert features.words("I’d go — but a dog, no? A 2nd.") == ["I'd", "go", "—", "but", "a", "dog", ",", "no", "?", "A", "2nd", "."]


def test_style_and_length_read_the_form():
    short, long = "I go. You stay.", "Whatever happens, the committee's deliberations continue; nobody, however, objects!"
    assert features.length(long)[1] > features.length(short)[1]
    assert features.style(short)[0] < features.style(long)[0]
    assert features.style(short)[-3] > 0 and features.style(long)[-3] == 0  # first person
    assert np.isfinite(features.style("?!")).all()


def test_opener_and_function_words():
    assert features.opener("Well, I never did") == ["0:well", "1:i", "2:never", "well i"]
    assert {"i", "you", "the", "don't"} <= features.FUNCTION_WORDS and "kettle" not in features.FUNCTION_WORDS


def test_family_has_every_member_once(texts):
    ids = [[len(w) for w in t.split()] for t in texts]
    names = [b.name for b in family(texts, token_ids=ids)]
    assert len(set(names)) == len(names) == 18
    for label in ("words", "model tokens"):
        for scale in ("L1 standardised, logistic", "L2, logistic", "binary, logistic", "L1, naive Bayes", "L2, naive Bayes", "binary, naive Bayes"):
            assert f"{label}, {scale}" in names


@pytest.mark.parametrize(("spoil", "blind", "seeing"), [
    (lambda t, k: t + " Aber" * (8 * k), "first three words", "length"),
    (lambda t, k: t.replace(" ", ", " if k else " ", 9), "first three words", "style"),
    (lambda t, k: f"{'Yes my dear' if k else 'Well no sir'} {t}", "length", "first three words"),
    (lambda t, k: t + (" and so it was" if k else " but then we will"), "first three words", "function words"),
    (lambda t, k: t + (" Q" if k else " q"), "TF-IDF 1-2-grams", "words, binary, logistic")])
def test_each_baseline_sees_its_own_kind_of_difference(spoil, blind, seeing):
    table = triplets(40, seed=1, share=0.0, registers=("plain",))
    table = table[table["label"] != "instrumental"].reset_index(drop=True)
    k = (table["label"] == "affective").to_numpy()
    texts = [spoil(t, int(i)) for t, i in zip(table["response"], k, strict=True)]
    design = make_design(table["label"], table["register"], table["cluster"], seed=0, n_repeats=2,
                         contrasts={"A/C": (("affective",), ("cognitive",))})
    found = by_name(texts)
    scores = out_of_fold(gram_source([found[blind].gram, found[seeing].gram]), design, n_layers=2, tol=1e-4)
    low, high = auroc(scores[:, :, 0, 0], k).mean(axis=1)
    assert low < 0.68 and high > 0.9


def test_bad_texts_are_named():
    with pytest.raises(BadInput, match="non-empty"):
        family(["fine", "  "])
    with pytest.raises(BadInput, match="token_ids"):
        family(["fine", "too"], token_ids=[[1]])


def test_texts_without_a_word_still_have_a_family():
    for baseline in family(["?!", "...", "!", ";"] * 3):
        found = baseline.gram(np.arange(8), np.arange(12)) if isinstance(baseline, Logistic) else \
            baseline.scores(np.arange(8), np.arange(12), np.array([[1, -1] * 4]))
        assert np.isfinite(found).all(), baseline.name
    assert isinstance(baseline, NaiveBayes)
