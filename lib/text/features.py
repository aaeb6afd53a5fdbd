"""The lexical family: every way we know to tell two sorts of text apart by their surface.

A probe on a model's activations says something about the model only where these fail. What a baseline learns from
texts (vocabulary, document frequencies, means, scales, class counts) it learns from the training rows alone.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer

from lib.errors import BadInput

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
FUNCTION_WORDS = frozenset("""
a about above after again against all almost along already also although always am an and another any anyone anything
are aren't around as at away back be because been before being below between both but by can can't cannot could couldn't
did didn't do does doesn't doing don't done down during each either else enough even ever every everyone everything for
from further get gets getting go goes going got had hadn't has hasn't have haven't having he he's her here here's hers
herself him himself his how however i i'd i'll i'm i've if in instead into is isn't it it'd it'll it's its itself just
less let let's like made make makes many may maybe me might mine more most much must my myself near neither never next
no nobody none nor not nothing now of off often on once one only onto or other others our ours out over own perhaps put
quite rather really same shall she she's should shouldn't since so some somebody someone something somewhere soon still
such than that that'll that's the their theirs them themselves then there there's these they they'd they'll they're
they've thing things this those though through to together too toward towards under unless until up upon us very was
wasn't way we we'd we'll we're we've well were weren't what what's whatever when where whether which while who whoever
whole whom whose why will with within without won't would wouldn't yes yet you you'd you'll you're you've your yours
yourself
""".split())


@dataclass(frozen=True)
class Counted:
    """Counts [text, feature] of a corpus; `names` are read when weights are shown."""

    counts: sparse.csr_matrix
    names: Callable[[], Sequence[str]]

    def common(self) -> sparse.csr_matrix:
        """The columns that occur in two texts or more: no other can say anything about a text it was not seen in."""
        return self.counts[:, document_frequency(self.counts) >= 2]


Gram = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(training rows, rows) -> inner products [row, training row] of features fitted on the training rows."""


@dataclass(frozen=True)
class Logistic:
    """A baseline for the dual solver, by its inner products."""

    name: str
    gram: Gram


@dataclass(frozen=True)
class NaiveBayes:
    """A baseline with class-conditional token rates, add-one smoothed: multinomial, or Bernoulli where `binary`.

    X [text, feature] is counts, 0/1, or rows of another norm, which are brought to the size of a mean text.
    """

    name: str
    X: sparse.csr_matrix
    binary: bool

    def scores(self, train: np.ndarray, rows: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Log-odds [contrast, row] after training on Y [contrast, training row] of +1, -1 and 0 (left out)."""
        X = self.X[train]
        first, second = ((Y == sign).astype(float) @ X for sign in (1, -1))
        seen = document_frequency(X) > 0
        if self.binary:
            p, q = ((n + 1) / ((Y == sign).sum(axis=1, keepdims=True) + 2) for n, sign in ((first, 1), (second, -1)))
            weights, offset = np.log(p / (1 - p)) - np.log(q / (1 - q)), np.log(1 - p) - np.log(1 - q)
            return (self.X[rows] @ (weights * seen).T + (offset * seen).sum(axis=1)).T
        p, q = ((n + 1) / (n + 1).sum(axis=1, keepdims=True) for n in (first, second))
        return (self.X[rows] @ ((np.log(p) - np.log(q)) * seen).T).T


def document_frequency(counts: sparse.csr_matrix) -> np.ndarray:
    """Number of rows in which each column is not zero."""
    return np.bincount(counts.indices[counts.data != 0], minlength=counts.shape[1])


def scaled_rows(counts: sparse.csr_matrix, *, order: int) -> sparse.csr_matrix:
    """Rows divided by their L1 or L2 norm; empty rows stay empty."""
    norm = np.asarray(abs(counts).power(order).sum(axis=1)).ravel() ** (1 / order)
    return (sparse.diags(1 / np.where(norm > 0, norm, 1)) @ counts).tocsr()


def fixed(X: sparse.csr_matrix) -> Gram:
    """Nothing to fit: tokens unseen in training have no inner product with a training row."""
    K = (X @ X.T).toarray().astype(np.float32)
    return lambda train, rows: K[rows[:, None], train]


def standardised(X: np.ndarray, *, min_texts: int = 1) -> Gram:
    """Columns centred and scaled by the training rows; those in fewer than `min_texts` of them are left out."""
    X = np.ascontiguousarray(X, np.float32)
    floor = 1e-6 * X.var(axis=0)

    def gram(train: np.ndarray, rows: np.ndarray) -> np.ndarray:
        Z = X[train]
        keep = (np.count_nonzero(Z, axis=0) >= min_texts) & (Z.var(axis=0) > floor)
        mean, scale = Z[:, keep].mean(axis=0), 1 / Z[:, keep].std(axis=0)
        return ((X[rows][:, keep] - mean) * scale) @ ((Z[:, keep] - mean) * scale).T

    return gram


def tfidf(counted: Counted) -> Gram:
    """Rows of count x (1 + log((1 + n) / (1 + df))) with df from n training rows, divided by their L2 norms.

    Columns found in one text only enter through that text's norm, and only where it is a training row.
    """
    C = counted.common().toarray().astype(np.float32)
    squares = C**2
    rare = np.asarray(counted.counts.power(2).sum(axis=1)).ravel() - squares.sum(axis=1)

    def gram(train: np.ndarray, rows: np.ndarray) -> np.ndarray:
        Z = C[train]
        df = np.count_nonzero(Z, axis=0)
        idf = np.where(df > 0, np.log((1 + len(train)) / (1 + df)) + 1, 0).astype(np.float32)
        alone = np.zeros(len(C))
        alone[train] = (np.log((1 + len(train)) / 2) + 1) ** 2 * rare[train]
        norm = np.sqrt(np.maximum(squares @ idf**2 + alone, 1e-12)).astype(np.float32)
        K = C[rows] @ (Z * idf**2).T / norm[rows, None] / norm[train]
        return K + (rows[:, None] == train) * (alone / norm**2)[train].astype(np.float32)

    return gram


def words(text: str) -> list[str]:
    """Words in their own case, one-letter words and punctuation marks included."""
    return WORD.findall(text.replace("’", "'"))


def style(text: str) -> list[float]:
    """Thirteen numbers about form: sentences, word length, variety, case, punctuation and person, per word."""
    tokens = words(text)
    spelled = [t for t in tokens if t[0].isalnum()]
    n, lower = max(len(spelled), 1), [t.lower() for t in spelled]
    sentences = max(len(re.findall(r"[.!?]+", text)), 1)
    marks = [sum(tokens.count(c) for c in chars) / n for chars in (",", ".", "?", "!", ":;", "-–—()")]
    person = [sum(w.split("'")[0] in who for w in lower) / n for who in ({"i", "me", "my", "mine"}, {"you", "your"})]
    return [n / sentences, sum(map(len, spelled)) / n, len(set(lower)) / n,
            sum(t[0].isupper() for t in spelled) / n, *marks, *person, text.count("'") / n]


def length(text: str) -> list[float]:
    """Log numbers of words and of characters."""
    return [np.log1p(len(text.split())), np.log1p(len(text))]


def form(texts: Sequence[str]) -> np.ndarray:
    """Length and style [text, feature]: what a text looks like, whatever it says."""
    return np.array([length(t) + style(t) for t in texts])


def opener(text: str) -> list[str]:
    """The first three words, each with its place, and the first two together."""
    first = [w.lower() for w in words(text) if w[0].isalnum()][:3]
    return [f"{i}:{w}" for i, w in enumerate(first)] + [" ".join(first[:2])]


def count(texts: Sequence, analyzer: Callable) -> Counted:
    """Counts of what `analyzer` finds in each text."""
    vectorizer = CountVectorizer(analyzer=analyzer)
    try:
        return Counted(vectorizer.fit_transform(texts).astype(np.float64), vectorizer.get_feature_names_out)
    except ValueError:  # not a single feature in the whole corpus
        return Counted(sparse.csr_matrix((len(texts), 1)), lambda: ["(none)"])


def ngrams(texts: Sequence[str]) -> Counted:
    """Words and pairs of words, lower case."""
    return count([t.lower().replace("’", "'") for t in texts], CountVectorizer(ngram_range=(1, 2)).build_analyzer())


def bags(label: str, counted: Counted) -> list[Logistic | NaiveBayes]:
    """A bag of tokens under the three scalings and the two classifiers."""
    counts = counted.counts
    l1, l2, binary = scaled_rows(counts, order=1), scaled_rows(counts, order=2), (counts > 0).astype(np.float64)
    like_text = {name: X * (counts.sum() / max(X.sum(), 1e-12)) for name, X in (("L1", l1), ("L2", l2))}
    common = document_frequency(counts) >= 2
    return [Logistic(f"{label}, L1 standardised, logistic", standardised(l1[:, common].toarray(), min_texts=2)),
            Logistic(f"{label}, L2, logistic", fixed(l2)), Logistic(f"{label}, binary, logistic", fixed(binary)),
            NaiveBayes(f"{label}, L1, naive Bayes", like_text["L1"], False),
            NaiveBayes(f"{label}, L2, naive Bayes", like_text["L2"], False),
            NaiveBayes(f"{label}, binary, naive Bayes", binary, True)]


def family(texts: Sequence[str], *, token_ids: Sequence[Sequence[int]] | None = None) -> list[Logistic | NaiveBayes]:
    """All lexical baselines of methods.md §2 on these texts; bags of the model's own tokens where ids are given."""
    texts = list(texts)
    if not all(isinstance(t, str) and t.strip() for t in texts):
        raise BadInput("texts: every response must be a non-empty string")
    if token_ids is not None and len(token_ids) != len(texts):
        raise BadInput(f"token_ids: {len(token_ids)} lists for {len(texts)} texts")
    low = [t.lower().replace("’", "'") for t in texts]
    function = count(low, lambda t: [w for w in words(t) if w in FUNCTION_WORDS])
    chars = count(low, CountVectorizer(ngram_range=(2, 4), analyzer="char_wb").build_analyzer())
    found = [Logistic("length", standardised(np.array([length(t) for t in texts]))),
             Logistic("style", standardised(np.array([style(t) for t in texts]))),
             Logistic("function words", standardised(scaled_rows(function.counts, order=1).toarray(), min_texts=2)),
             Logistic("first three words", fixed(scaled_rows(count(texts, opener).counts, order=2))),
             Logistic("TF-IDF 1-2-grams", tfidf(ngrams(texts))),
             Logistic("TF-IDF characters 2-4", tfidf(chars)),
             *bags("words", count(texts, words))]
    if token_ids is not None:
        found += bags("model tokens", count([[str(int(i)) for i in ids] for ids in token_ids], list))
    return found
