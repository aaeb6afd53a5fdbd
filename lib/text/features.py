"""The lexical family: every way we know to tell two sorts of text apart by their surface.

A probe on a model's activations says something about the model only where these fail. Each `Baseline` holds counts of
the whole corpus, which need no fitting; vocabulary, inverse document frequencies, means and scales are fitted on the
training rows that `matrix` and `gram` are given, and on nothing else.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer

from lib.errors import BadInput

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
SCALES = ("l1-std", "l2", "binary")
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
class Baseline:
    """One text representation with one classifier. `counts` [text, feature] needs no fitting.

    scale: "std" (standardise), "l1-std" (divide by the row's sum, then standardise), "l2", "binary" or "tfidf".
    model: "logistic" (penalty chosen by inner folds) or "naive bayes" (multinomial; Bernoulli where scale is binary).
    """

    name: str
    counts: sparse.csr_matrix
    scale: str
    model: str = "logistic"
    names: Callable[[], Sequence[str]] | None = None

    def matrix(self, train: np.ndarray) -> sparse.csr_matrix | np.ndarray:
        """Features [text, feature] of all rows, fitted on the rows `train`; a feature unseen in training is zero."""
        counts, df = self.counts, document_frequency(self.counts[train])
        if self.scale == "std":
            return standardise(counts.toarray(), train)
        counts = counts[:, df >= (2 if self.scale == "l1-std" else 1)]
        if self.scale == "binary":
            return (counts > 0).astype(np.float64)
        if self.scale == "tfidf":
            idf = np.log((1 + len(train)) / (1 + df[df >= 1])) + 1
            return norm_rows(counts @ sparse.diags(idf), order=2)
        scaled = norm_rows(counts, order=1 if self.scale == "l1-std" else 2)
        if self.model == "naive bayes" or self.scale == "l2":
            return scaled
        return standardise(scaled.toarray(), train)

    def gram(self, train: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Inner products [row, training row] of the fitted features."""
        X = self.matrix(train)
        K = X[rows] @ X[train].T
        return K.toarray() if sparse.issparse(K) else K

    def columns(self, train: np.ndarray) -> np.ndarray:
        """Names of the columns of `matrix(train)`."""
        keep = document_frequency(self.counts[train]) >= {"std": 0, "l1-std": 2}.get(self.scale, 1)
        return np.asarray(self.names() if self.names else np.arange(len(keep)).astype(str), dtype=object)[keep]


def document_frequency(counts: sparse.csr_matrix) -> np.ndarray:
    """Number of rows in which each column is not zero."""
    return np.bincount(counts.indices[counts.data != 0], minlength=counts.shape[1])


def norm_rows(counts: sparse.csr_matrix, *, order: int) -> sparse.csr_matrix:
    """Rows divided by their L1 or L2 norm; empty rows stay empty."""
    norm = np.asarray(abs(counts).power(order).sum(axis=1)).ravel() ** (1 / order)
    return (sparse.diags(1 / np.where(norm > 0, norm, 1)) @ counts).tocsr()


def standardise(X: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Columns centred and scaled by the training rows; columns constant there become zero."""
    mean, std = X[train].mean(axis=0), X[train].std(axis=0)
    constant = std <= 1e-12 * np.maximum(1, abs(mean))
    return np.where(constant, 0, (X - mean) / np.where(constant, 1, std))


def words(text: str) -> list[str]:
    """Words in their own case, one-letter words and punctuation marks included."""
    return WORD.findall(text.replace("’", "'"))


def style(text: str) -> list[float]:
    """Twelve numbers about form: sentences, word length, case, punctuation and person, per word where they grow."""
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


def opener(text: str) -> list[str]:
    """The first three words, each with its place, and the first two together."""
    first = [w.lower() for w in words(text) if w[0].isalnum()][:3]
    return [f"{i}:{w}" for i, w in enumerate(first)] + [" ".join(first[:2])]


def counted(texts: Sequence, analyzer: Callable) -> tuple[sparse.csr_matrix, Callable]:
    """Counts [text, feature] of what `analyzer` returns, and the features' names."""
    vectorizer = CountVectorizer(analyzer=analyzer)
    try:
        return vectorizer.fit_transform(texts).astype(np.float64), vectorizer.get_feature_names_out
    except ValueError:
        return sparse.csr_matrix((len(texts), 1)), lambda: ["(none)"]


def dense(texts: Sequence[str], describe: Callable) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.array([describe(t) for t in texts], dtype=np.float64))


def bags(label: str, counts: sparse.csr_matrix, names: Callable) -> list[Baseline]:
    """A bag of tokens under the three scalings and the two classifiers."""
    return [Baseline(f"{label}, {scale}, {model}", counts, scale, model, names)
            for scale in SCALES for model in ("logistic", "naive bayes")]


def family(texts: Sequence[str], *, token_ids: Sequence[Sequence[int]] | None = None) -> list[Baseline]:
    """All lexical baselines of methods.md §2 on these texts; bags of the model's own tokens where ids are given."""
    texts = list(texts)
    if not all(isinstance(t, str) and t.strip() for t in texts):
        raise BadInput("texts: every response must be a non-empty string")
    if token_ids is not None and len(token_ids) != len(texts):
        raise BadInput(f"token_ids: {len(token_ids)} lists for {len(texts)} texts")
    low = [t.lower().replace("’", "'") for t in texts]
    grams = CountVectorizer(ngram_range=(1, 2)).build_analyzer()
    chars = CountVectorizer(ngram_range=(2, 4), analyzer="char_wb").build_analyzer()
    found = [
        Baseline("length", dense(texts, length), "std", names=lambda: ["words", "characters"]),
        Baseline("style", dense(texts, style), "std"),
        Baseline("function words", *_scaled(low, lambda t: [w for w in words(t) if w in FUNCTION_WORDS], "l1-std")),
        Baseline("first three words", *_scaled(texts, opener, "l2")),
        Baseline("TF-IDF 1-2-grams", *_scaled(low, grams, "tfidf")),
        Baseline("TF-IDF characters 2-4", *_scaled(low, chars, "tfidf")),
        *bags("words", *counted(texts, words)),
    ]
    if token_ids is not None:
        found += bags("model tokens", *counted([[str(int(i)) for i in ids] for ids in token_ids], list))
    return found


def _scaled(texts: Sequence, analyzer: Callable, scale: str) -> tuple:
    counts, names = counted(texts, analyzer)
    return counts, scale, "logistic", names
