"""Co-occurrence against counting pairs by hand and a full singular value decomposition, neighbours against scikit-learn, purity against loops and with the level of its test,
chapters of real codes, and labels that do not overlap."""
import itertools
import math
from collections import Counter

import matplotlib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from ehr_sequencing.code_map import code_chapter, cooccurrence_vectors, map_codes, nearest_codes, neighbour_purity, plot_code_map, ppmi_vectors
from ehr_sequencing.sequences import build_store
from ehr_sequencing.synthetic import CODES, CONDITIONS, OUTCOME_CODE, simulate_cohort
from ehr_sequencing.vocabulary import SPECIAL_TOKENS, Vocabulary, fit_vocabulary

matplotlib.use("Agg")
many = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
S = len(SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def store():
    cohort = simulate_cohort(80, seed=5)
    return build_store(cohort.table, fit_vocabulary(cohort.table.events, exclude=[OUTCOME_CODE], n_value_bins=3))


@pytest.mark.parametrize("within", ["visit", "patient"])
def test_cooccurrence_is_counting(store, within):
    rows = np.arange(0, len(store), 2)
    pairs = Counter()
    for row in rows:
        visits = [store.vocabulary.encode(names) for _, names in store[int(row)]]
        own = store.static_tokens[store.static_offsets[row]:store.static_offsets[row + 1]].tolist()
        visits[0] = [t for t in visits[0] if t not in own]  # facts belong to no visit
        for unit in (visits if within == "visit" else [sum(visits, [])]):
            pairs.update(itertools.permutations({t for t in unit if t >= S}, 2))
    n = len(store.vocabulary)
    together = np.zeros((n, n))
    for (i, j), count in pairs.items(): together[i, j] = count
    each = together.sum(1)
    with np.errstate(all="ignore"): information = np.nan_to_num(np.maximum(np.log(together * together.sum() / np.outer(each, each)), 0), nan=0, posinf=0, neginf=0)
    left, size, _ = np.linalg.svd(information)
    mine, full = cooccurrence_vectors(store, rows, within, 12), left[:, :12] * np.sqrt(size[:12])
    np.testing.assert_allclose(np.linalg.norm(mine, axis=0), np.sqrt(size[:12]), rtol=2e-2)
    np.testing.assert_allclose(mine[:, :3] @ mine[:, :3].T, full[:, :3] @ full[:, :3].T, atol=2e-2 * size[0])
    assert not mine[:S].any()


def test_ppmi_knows_nothing_of_independent_codes():
    rate = np.random.default_rng(0).uniform(1, 5, 12)
    np.testing.assert_allclose(ppmi_vectors(np.outer(rate, rate), 3), 0, atol=1e-5)


@st.composite
def clouds(draw):
    "A vocabulary with bins, vectors of which some are zero or not known, and groups of some codes."
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes, bins = draw(st.integers(4, 12)), draw(st.integers(0, 3))
    tokens = [*SPECIAL_TOKENS, *(f"C{i}" for i in range(codes)), *(f"LAB{b}//Q{q}" for b in range(bins) for q in (1, 2, 3))]
    vocabulary = Vocabulary(tokens, {f"LAB{b}": [0.0, 1.0] for b in range(bins)})
    vectors = generator.normal(size=(len(tokens), 3))
    gone = generator.random(len(tokens)) < draw(st.sampled_from([0.0, 0.2]))
    vectors[gone] = draw(st.sampled_from([0.0, np.nan]))
    names = [f"C{i}" for i in range(codes)] + [f"LAB{b}" for b in range(bins)]
    groups = {name: int(generator.integers(0, 3)) for name in names if generator.random() < 0.8}
    return vocabulary, vectors, groups, draw(st.integers(1, 4))


def base(token): return token.rpartition("//Q")[0] or token


@many
@given(clouds())
def test_neighbours_are_those_of_scikit_learn(drawn):
    vocabulary, vectors, _, k = drawn
    usable = [i for i in range(S, len(vocabulary)) if np.isfinite(vectors[i]).all() and vectors[i].any()]
    for row in usable:
        others = [i for i in usable if i != row]
        found = nearest_codes(vectors, vocabulary, vocabulary.tokens[row], k)
        if not others: assert found.empty; continue
        distance, place = NearestNeighbors(n_neighbors=min(k, len(others)), metric="cosine").fit(vectors[others]).kneighbors(vectors[[row]])
        assert found.index.tolist() == [vocabulary.tokens[others[j]] for j in place[0]]
        np.testing.assert_allclose(found["similarity"], 1 - distance[0], atol=1e-9)
        apart = nearest_codes(vectors, vocabulary, vocabulary.tokens[row], len(vocabulary), same_code=False)
        assert set(apart.index) == {vocabulary.tokens[i] for i in others if base(vocabulary.tokens[i]) != base(vocabulary.tokens[row])}


@many
@given(clouds())
def test_purity_is_the_loop(drawn):
    vocabulary, vectors, groups, k = drawn
    usable = [i for i in range(S, len(vocabulary)) if np.isfinite(vectors[i]).all() and vectors[i].any()]
    labelled = [i for i in usable if base(vocabulary.tokens[i]) in groups]
    codes = {base(vocabulary.tokens[i]) for i in labelled}
    if len({groups[c] for c in codes}) < 2 or len(codes) < 3:
        with pytest.raises(ValueError, match="at least two groups"): neighbour_purity(vectors, vocabulary, groups, k, 10)
        return
    shares = []
    for i in labelled:
        near = nearest_codes(vectors, vocabulary, vocabulary.tokens[i], k, same_code=False).index
        shares.append(sum(groups.get(base(t)) == groups[base(vocabulary.tokens[i])] for t in near) / k)
    found = neighbour_purity(vectors, vocabulary, groups, k, 50)
    assert math.isclose(found.purity, np.mean(shares), abs_tol=1e-12) and found.n_codes == len(codes)
    assert 0 <= found.low <= found.high <= 1 and 0 < found.p_value <= 1 and found.chance <= found.chance_high + 1e-12


def test_purity_finds_groups_and_keeps_its_level():
    "Labels at random: the test says so at a level of 10 % in about one of ten. Groups that are there: always found, also where every code has three bins."
    tokens = [*SPECIAL_TOKENS, *(f"LAB{b}//Q{q}" for b in range(24) for q in (1, 2, 3))]
    vocabulary, groups = Vocabulary(tokens, {f"LAB{b}": [0.0, 1.0] for b in range(24)}), {f"LAB{b}": b % 4 for b in range(24)}
    p_values = []
    for seed in range(120):
        generator = np.random.default_rng(seed)
        centres = np.repeat(generator.normal(size=(24, 6)), 3, 0)  # the bins of a code lie together, whatever its group
        vectors = np.vstack([np.zeros((S, 6)), centres + 0.3 * generator.normal(size=centres.shape)])
        p_values.append(neighbour_purity(vectors, vocabulary, groups, 5, 99, seed).p_value)
        if seed < 10:
            middle = np.repeat(generator.normal(size=(4, 6))[np.arange(24) % 4], 3, 0)
            real = neighbour_purity(np.vstack([np.zeros((S, 6)), middle + 0.3 * centres]), vocabulary, groups, 5, 99, seed)
            assert real.p_value == 0.01 and real.low > real.chance_high
    assert 0.03 < np.mean(np.array(p_values) <= 0.1) < 0.2


def test_chapters():
    "Every code of the synthetic cohort has one; the boundaries of the classifications lie where they are printed."
    named = {code: code_chapter(code) for code in CODES}
    assert not any(chapter in ("other", "ICD, other") for code, chapter in named.items() if "//" in code)
    assert {code_chapter(c.codes[0]) for c in CONDITIONS.values()} == {"circulatory", "endocrine and metabolic", "genitourinary", "respiratory", "mental", "musculoskeletal"}
    pairs = {"B99": "infections", "C00": "neoplasms", "D49": "neoplasms", "D50": "blood and immune system", "D89.9": "blood and immune system", "E00": "endocrine and metabolic", "H59": "eye", "H60": "ear", "H95": "ear", "S00": "injury and poisoning",
             "T88": "injury and poisoning", "V00": "external causes", "Y99": "external causes", "Z99": "contact with services", "U07.1": "special purposes"}
    for code, chapter in pairs.items(): assert code_chapter(f"ICD10CM//{code}") == code_chapter(f"ICD10//{code.replace('.', '')}") == code_chapter(f"DIAGNOSIS//ICD//10//{code}") == chapter
    nine = {"001.0": "infections", "139": "infections", "239.9": "neoplasms", "279": "endocrine and metabolic", "280": "blood and immune system", "359": "nervous system", "379": "eye", "389.9": "ear", "459": "circulatory", "799.9": "symptoms and findings", "800": "injury and poisoning", "999": "injury and poisoning"}
    for code, chapter in nine.items(): assert code_chapter(f"ICD9CM//{code}") == code_chapter(f"DIAGNOSIS//ICD//9//{code.replace('.', '')}") == chapter


def test_labels_do_not_overlap(store):
    import matplotlib.pyplot as plt
    generator = np.random.default_rng(0)
    points = map_codes(generator.normal(size=(len(store.vocabulary), 8)), "pca")
    ax = plot_code_map(points, store.vocabulary, n_labels=60)
    boxes = [t.get_window_extent() for t in ax.texts]
    frame = ax.get_window_extent()
    assert 10 < len(boxes) <= 60 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)
    sizes = sum(len(c.get_offsets()) for c in ax.collections)
    assert sizes == len(store.vocabulary) - S  # every code is a point, once
    assert {t.get_text() for t in ax.texts} <= {store.vocabulary.name_of(t) for t in store.vocabulary.tokens}
    plt.close("all")
