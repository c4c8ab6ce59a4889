"""Pre-training: the encoder beats counting and copying on held-out patients, by a margin and with an interval; the baselines against naive loops and
scikit-learn; a step over several batches is a step on the mean over their units; weights move from every objective to a survival model."""
import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sklearn.naive_bayes import BernoulliNB

from ehr_sequencing.behrt import BEHRT, BEHRTConfig
from ehr_sequencing.bootstrap import draw_counts
from ehr_sequencing.events import EventTable, event_table
from ehr_sequencing.masked_codes import BEHRTForMLM, token_rates
from ehr_sequencing.next_visit import most_frequent, next_visit_rates, own_history, repeat_last_visit
from ehr_sequencing.pretraining import (OBJECTIVES, LogLinearCodes, bootstrap_means, compare_masked, compare_next_visit, masked_hits, masked_places, own_codes, pretrain, pretraining_loader,
                                        pretraining_model, same_visit, unigram, visible_codes)
from ehr_sequencing.sequences import build_store
from ehr_sequencing.survival import BEHRTForSurvival
from ehr_sequencing.synthetic import OUTCOME_CODE, simulate_cohort
from ehr_sequencing.steps import make_accelerator, mean_loss, train_step
from ehr_sequencing.training import Trainer
from ehr_sequencing.vocabulary import MASK, fit_vocabulary

QUIET = {"device": "cpu", "show_progress": False}
many = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
some = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "The same digits on any number of cores."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def records():
    "A store of 1,500 synthetic patients whose vocabulary knows the 900 training patients only, and the rows of each part."
    cohort = simulate_cohort(1500, seed=0, hazard_ratio=3)
    ids = np.random.default_rng(0).permutation(cohort.table.events["subject_id"].unique().sort().to_numpy())
    parts = dict(zip(("train", "validation", "test"), np.split(ids, [900, 1050])))
    store = build_store(cohort.table, fit_vocabulary(cohort.table.events, subject_ids=parts["train"], exclude=[OUTCOME_CODE], n_value_bins=5))
    return store, {name: np.flatnonzero(np.isin(store.subject_ids, part)) for name, part in parts.items()}


def low(result, first, second):
    "Lower end of the interval of a difference."
    return result.difference(first, second).interval(f"{first} - {second}")[0]


def test_masked_codes_beat_counting(records):
    "BEHRT names hidden codes of held-out patients better than frequencies and than the codes of the same visit, by three points at least and beyond chance."
    store, rows = records
    config = BEHRTConfig.small(len(store.vocabulary), attention="bidirectional", visit_heads=2)
    model, history = pretrain(store, rows["train"], rows["validation"], config, masking=0.3, epochs=11, patients_per_step=8, max_tokens=128, **QUIET)
    rates = token_rates(store, rows["train"])
    linear = LogLinearCodes(rates)
    def asked(part, **options): return pretraining_loader(store, rows[part], config, max_tokens=128, mask_seed=7, **options)
    Trainer(linear, asked("train", shuffle=True, max_patients=8), asked("validation"), epochs=10, learning_rate=3e-2, patients_per_step=8, weight_decay=0.01, **QUIET).fit()
    bayes = {f"Bayes {a}": same_visit(store, rows["train"], a) for a in (10, 100, 1000)}
    result = compare_masked({"BEHRT": model, "unigram": unigram(rates), "log-linear": linear} | bayes, asked("test"), ks=(1, 5))
    for name in ("unigram", "log-linear", *bayes):
        for k in (1, 5):
            assert low(result, f"BEHRT, top {k}", f"{name}, top {k}") > 0, (name, k)
            assert result.estimates[f"BEHRT, top {k}"] > result.estimates[f"{name}, top {k}"] + 0.03, (name, k)
    assert history[-1]["validation_loss"] < history[0]["validation_loss"] - 0.3


def test_next_visit_beats_copying(records):
    "Among ten codes BEHRT finds more of the next visit than the last visit or frequencies do, and more of what is new than either."
    store, rows = records
    config = BEHRTConfig.small(len(store.vocabulary))
    model, _ = pretrain(store, rows["train"], rows["validation"], config, "next_visit", epochs=5, patients_per_step=8, max_tokens=128, **QUIET)
    rates = next_visit_rates(store, rows["train"])
    scores = {"BEHRT": model, "repeat": repeat_last_visit(rates), "frequent": most_frequent(rates), "own": own_history(rates)}
    result = compare_next_visit(scores, pretraining_loader(store, rows["test"], config, "next_visit", max_tokens=128))
    for name in ("repeat", "frequent"):
        for kind in ("all", "new"):
            assert low(result, f"BEHRT, {kind}, recall", f"{name}, {kind}, recall") > 0, (name, kind)
    assert result.estimates["BEHRT, all, recall"] > result.estimates["repeat, all, recall"] + 0.02
    assert result.estimates["own, all, recall"] > result.estimates["repeat, all, recall"]  # the baseline to fear is counted, too


@st.composite
def masked_batches(draw):
    "Batches with copies, special tokens, tokens of no visit, padding, and masked places that show [MASK], another code or themselves."
    n, length, size = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(6, 9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    truth, visits = generator.integers(0, size, (n, length)), np.cumsum(generator.random((n, length)) < 0.4, axis=1) - 1
    mask = np.arange(length) < generator.integers(1, length + 1, (n, 1))
    truth, visits = np.where(mask, truth, 0), np.where(mask, visits, -1)
    chosen = mask & (truth >= 5) & (generator.random((n, length)) < 0.4)
    shown = np.where(chosen, generator.choice([MASK, MASK, 5, size - 1], (n, length)), truth)
    width = max(1, chosen.sum(1).max())
    places = np.full((n, width), -1)
    labels = np.full((n, width), -100)
    for b in range(n):
        at = np.flatnonzero(chosen[b])
        places[b, :len(at)], labels[b, :len(at)] = at, truth[b, at]
    arrays = {"codes": shown, "visit_ids": visits, "attention_mask": mask, "masked_positions": places, "masked_labels": labels, "rows": np.arange(n) * 3}
    return {k: torch.from_numpy(v) for k, v in arrays.items()}, size


@many
@given(masked_batches())
def test_visible_codes(drawn):
    "What shows around a masked code, by loops over tokens."
    batch, size = drawn
    here, others = visible_codes(batch, size)
    rows, positions, labels = (t.tolist() for t in masked_places(batch))
    assert here.shape == others.shape == (len(rows), size)
    for i, (row, position) in enumerate(zip(rows, positions)):
        codes, visits, real = (batch[k][row].tolist() for k in ("codes", "visit_ids", "attention_mask"))
        near, far = set(), {}
        for j, (code, visit) in enumerate(zip(codes, visits)):
            if not real[j] or code < 5: continue
            if visit == visits[position]: near |= {code} if j != position else set()
            else: far.setdefault(code, set()).add(visit)
        assert here[i].nonzero().flatten().tolist() == sorted(near)
        assert others[i].tolist() == [len(far.get(code, ())) for code in range(size)]
    assert own_codes(torch.full((size,), 1 / size))(batch).shape == (len(rows), size)


@many
@given(masked_batches(), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_hits_by_hand(drawn, seed, k):
    "A hit is the chance to stand among the first k under a random order of tied codes; only places that show [MASK] count."
    batch, size = drawn
    scores = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (int((batch["masked_labels"] >= 0).sum()), size))).float()
    rows, positions, labels = masked_places(batch)
    counted = [i for i in range(len(rows)) if batch["codes"][rows[i], positions[i]] == MASK]
    if not counted:
        with pytest.raises(ValueError, match="no batch hides a code"): masked_hits({"s": lambda b: scores}, [batch], (k,))
        return
    patients, hits = masked_hits({"s": lambda b: scores}, [batch], (k,))
    for n, i in enumerate(counted):
        s, label = scores[i].tolist(), int(labels[i])
        above, tied = sum(s[c] > s[label] for c in range(5, size)), sum(s[c] == s[label] for c in range(5, size))
        assert hits["s"][n, 0] == pytest.approx(min(max((k - above) / tied, 0), 1), abs=1e-6)
        assert patients[n] == 3 * int(rows[i])


def visits_store(visits):
    "A store in which every list of codes is the only visit of a patient."
    rows = [(i, 0, code) for i, codes in enumerate(visits) for code in codes]
    frame = pl.DataFrame(rows, schema=["subject_id", "day", "code"], orient="row").with_columns(time=pl.datetime(2020, 1, 1) + pl.duration(days=pl.col("day"))).drop("day")
    events = event_table(frame)
    return build_store(EventTable(events), fit_vocabulary(events, min_patients=1))


@some
@given(st.integers(0, 2**32 - 1), st.integers(3, 6))
def test_bayes_is_scikit_learns(seed, n_codes):
    "Without smoothing, Bayes' rule is `BernoulliNB` fitted on every code of every visit, with the rest of its visit as features."
    generator = np.random.default_rng(seed)
    table = generator.random((60, n_codes)) < 0.5
    table = table[table.sum(1) > 1]
    names = [f"C{j}" for j in range(n_codes)]
    store = visits_store([[names[j] for j in np.flatnonzero(row)] for row in table])
    features, answers = zip(*((np.where(np.arange(n_codes) == c, False, row), c) for row in table for c in np.flatnonzero(row)))
    both = np.array([[(table[:, c] & table[:, j]).sum() for j in range(n_codes)] for c in range(n_codes)])
    if ((both == 0) | (both == table.sum(0)[:, None]))[~np.eye(n_codes, dtype=bool)].any() or len(set(answers)) < n_codes: assume(False)  # a share of 0 or 1 is clipped, by each in its own way
    theirs = BernoulliNB(alpha=1e-12, force_alpha=True).fit(np.array(features), answers)
    order = store.vocabulary.encode(names)
    for row in table[:5]:
        c = int(np.flatnonzero(row)[0])
        rest = [j for j in np.flatnonzero(row) if j != c]
        batch = {"rows": torch.tensor([0]), "codes": torch.tensor([[MASK, *(order[j] for j in rest)]]), "visit_ids": torch.zeros(1, len(rest) + 1, dtype=torch.long),
                 "attention_mask": torch.ones(1, len(rest) + 1, dtype=torch.bool), "masked_positions": torch.tensor([[0]]), "masked_labels": torch.tensor([[order[c]]])}
        ours = same_visit(store, smoothing=1e-12, masking=0.0)(batch)[0, order].numpy()
        expected = theirs.predict_joint_log_proba(np.isin(np.arange(n_codes), rest)[None])[0]
        hidden = [j for j in range(n_codes) if j not in rest]
        np.testing.assert_allclose((ours - ours[c])[hidden], (expected - expected[c])[hidden], atol=5e-3)
        assert (ours[rest] < -1e5).all()


def test_baselines_know_training_patients_only(records):
    "Counts over some rows are counts over a store of these rows alone."
    store, rows = records
    batch = next(iter(pretraining_loader(store, rows["test"][:20], BEHRTConfig(len(store.vocabulary)))))
    part = store.take(rows["train"])
    assert torch.equal(token_rates(store, rows["train"]), token_rates(part))
    torch.testing.assert_close(same_visit(store, rows["train"])(batch), same_visit(part)(batch))


def test_log_linear_learns_pairs():
    "Where each code has one partner, the partner gives it away."
    store = visits_store([["A", "B"]] * 40 + [["C", "D"]] * 40)
    config, rates = BEHRTConfig(len(store.vocabulary)), token_rates(store)
    def asked(rows): return pretraining_loader(store, rows, config, masking=0.3)
    for history in (False, True):
        model = LogLinearCodes(rates, history)
        Trainer(model, asked(np.arange(0, 80, 2)), asked(np.arange(1, 80, 2)), epochs=20, learning_rate=0.3, weight_decay=0.0, patients_per_step=4, **QUIET).fit()
        truth = []
        for batch in asked(np.arange(80)):
            here, labels = visible_codes(batch, len(rates))[0], masked_places(batch)[2]
            truth += (model(batch).argmax(1) == labels)[here.any(1)].tolist()
        assert np.mean(truth) > 0.9  # all but those whose partner is another code put there at random


def test_masks_stay_in_validation_and_change_in_training(records):
    "The same loader asks the same, another epoch asks something else."
    store, rows = records
    loader = pretraining_loader(store, rows["validation"][:30], BEHRTConfig(len(store.vocabulary)))
    first, again = ([b["masked_labels"] for b in loader] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    loader.set_epoch(1)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, (b["masked_labels"] for b in loader)))


@pytest.mark.parametrize("attention", ["bidirectional", "visit_causal"])
def test_a_step_is_the_mean_over_units(records, attention):
    "The gradient of a step over batches of many sizes, one of them without a masked code, is that of the mean over all masked codes."
    store, rows = records
    config = BEHRTConfig(len(store.vocabulary), 16, 32, 1, 2, attention=attention, dropout=0.0)
    torch.manual_seed(0)
    model = pretraining_model(store, rows["train"], config)
    group = [next(iter(pretraining_loader(store, rows["train"][part], config, max_tokens=64))) for part in (slice(0, 1), slice(1, 4), slice(4, 12))]
    group.append({k: torch.full_like(v, -1) if k == "masked_positions" else torch.full_like(v, -100) if k == "masked_labels" else v for k, v in group[1].items()})
    labels = torch.cat([masked_places(b)[2] for b in group])
    expected = F.cross_entropy(torch.cat([model(b) for b in group]), labels)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    class Still(torch.optim.Optimizer):
        "Leaves the weights as they are."
        def __init__(self, parameters): super().__init__(parameters, {})
        def step(self): pass
    loss, units = train_step(model, Still(model.parameters()), make_accelerator("cpu"), group, 1e9, "here")
    assert units == len(labels) and loss == pytest.approx(expected.item(), rel=1e-5)
    for p, g in zip(model.parameters(), gradients): torch.testing.assert_close(p.grad, g, atol=1e-6, rtol=1e-4)
    assert mean_loss(model, group, "cpu") == pytest.approx(expected.item(), rel=1e-5)


@many
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-3, 3)), min_size=2, max_size=20), st.integers(0, 5))
def test_means_by_patient(values, seed):
    "Drawing patients multiplies all their values; by copying them out."
    patients, numbers = np.array([p for p, _ in values]), np.array([x for _, x in values])
    assume(len(set(patients)) > 1)
    boot = bootstrap_means({"x": (patients, numbers), "y": (patients, 2 * numbers)}, n_resamples=20, seed=seed)
    assert boot.estimates["x"] == pytest.approx(numbers.mean(), abs=1e-9)
    everybody = sorted(set(patients.tolist()))
    for counts, x, y in zip(np.concatenate(list(draw_counts(len(everybody), 20, seed))), boot.draws["x"], boot.draws["y"]):
        copies = np.concatenate([np.tile(numbers[patients == p], c) for p, c in zip(everybody, counts)])
        assert x == pytest.approx(copies.mean(), abs=1e-9) and y == pytest.approx(2 * x, abs=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_move(records, tmp_path, objective):
    "From every objective into an encoder and into a survival model, which trains on; the vocabulary comes along."
    store, rows = records
    config = BEHRTConfig(len(store.vocabulary), 16, 32, 1, 2)
    model, history = pretrain(store, rows["train"][:60], rows["validation"][:30], config, objective, tmp_path / "model", epochs=2, max_tokens=64, after_epoch=lambda m: {"seen": 1}, **QUIET)
    assert [row["seen"] for row in history] == [1, 1] and {"train_loss", "validation_loss"} <= set(history[0])
    for target, options in ((BEHRT, {}), (BEHRTForSurvival, {"horizons": (365, 1825)})):
        loaded = target.from_pretrained(tmp_path / "model", **options)
        encoder = loaded if target is BEHRT else loaded.behrt
        assert all(torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), model.behrt.state_dict().values()))
        assert loaded.vocabulary == store.vocabulary


@pytest.mark.parametrize("objective", ["next_visit", "both"])
def test_who_is_asked_about_the_next_visit(records, objective):
    "Bidirectional attention is asked once a patient, with the answer cut off; visit-causal attention after every visit that has a next one. Single visits are of use for masked codes alone."
    store, rows = records
    both_ways, causal = (BEHRTConfig(len(store.vocabulary), 16, 32, 1, 2, attention=attention) for attention in ("bidirectional", "visit_causal"))
    several = rows["test"][store.n_visits[rows["test"]] > 1]
    assert len(several) < len(rows["test"])
    loader = pretraining_loader(store, rows["test"], both_ways, objective)
    np.testing.assert_array_equal(loader.rows, several)
    for batch in loader:
        assert (batch["next_mask"].sum(1) == 1).all()
        np.testing.assert_array_equal(batch["first_visits"] + batch["sequence_mask"].sum(1) + 1, store.n_visits[batch["rows"]])
    np.testing.assert_array_equal(pretraining_loader(store, rows["test"], causal, objective).rows, several if objective == "next_visit" else rows["test"])
    _, history = pretrain(store, rows["train"][:40], rows["validation"][:20], both_ways, objective, epochs=1, max_tokens=64, **QUIET)
    assert np.isfinite(history[0]["validation_loss"])


def test_pretrain_says_what_is_wrong(records):
    "Objectives, vocabularies, parts and patients that cannot work."
    store, rows = records
    config, alone = BEHRTConfig(len(store.vocabulary), 16, 32, 1, 2), np.flatnonzero(store.n_visits == 1)
    assert len(alone) > 3
    for objective, train, validation, settings_, message in (("mask", rows["train"], rows["test"], config, "expected one of mlm, next_visit, both, contrastive"), ("both", alone[:-1], alone[-1:], config, "no patient has two visits"),
                                                             ("next_visit", np.setdiff1d(rows["train"], alone), alone, config, "no patient has two visits"), ("mlm", rows["train"], rows["train"], config, "are training patients too"),
                                                             ("mlm", rows["train"], rows["test"], BEHRTConfig(9), "vocab_size is 9")):
        with pytest.raises(ValueError, match=message): pretrain(store, train, validation, settings_, objective, **QUIET)
    model, _ = pretrain(store, alone[:-8], alone[-8:], config, "mlm", masking=0.5, epochs=1, **QUIET)  # one visit is enough for masked codes
    assert isinstance(model, BEHRTForMLM)
