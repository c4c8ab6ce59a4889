"""Next-visit prediction against plain loops, scikit-learn, torchmetrics and every order of ties, on drawn records with facts, unknown codes, exclusions,
windows and cuts; memory; what the model sees; weights that move to another vocabulary."""
import datetime
import itertools
import math
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import peak_memory
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_score, recall_score
from torchmetrics.retrieval import RetrievalPrecision, RetrievalRecall

from ehr_sequencing.aggregation import assert_no_future_leakage, pool_visits
from ehr_sequencing.batches import BatchLoader, Compose, make_batch
from ehr_sequencing.behrt import BEHRTConfig
from ehr_sequencing.events import EventTable, event_table
from ehr_sequencing.masked_codes import MaskCodes
from ehr_sequencing.next_visit import (BEHRTForNextVisitPrediction, BEHRTForPretraining, attach_next_visit, codes_so_far, draw_cuts, evaluate_next_visit, hits_at_k, most_frequent, next_visit_loss,
                                       next_visit_rates, next_visit_targets, own_history, precision_at_k, recall_at_k, repeat_last_visit, target_codes)
from ehr_sequencing.sequences import build_store
from ehr_sequencing.vocabulary import SPECIAL_TOKENS, UNK, Vocabulary

CODES = [f"C{i}" for i in range(8)]
many = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
some = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def store_of(patients, facts=(), vocabulary=None, deduplicate=True):
    "A store of patients given as lists of visits (strings of codes); the code `?` is unknown to the vocabulary."
    begin = datetime.datetime(2010, 1, 1)
    rows = [(i, begin + datetime.timedelta(days=30 * v), c) for i, visits in enumerate(patients) for v, codes in enumerate(visits) for c in codes] + [(i, None, c) for i, c in facts]
    events = event_table(pl.DataFrame(rows, schema=["subject_id", "time", "code"], orient="row"))
    return build_store(EventTable(events), vocabulary or Vocabulary([*SPECIAL_TOKENS, *CODES, "FACT"]), deduplicate)


@st.composite
def records(draw):
    "Patients with repeated and unknown codes and facts, one of which is also a code of visits."
    seed, n = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 6))
    generator = np.random.default_rng(seed)
    patients = [[generator.choice([*CODES, "?"], generator.integers(1, 5)).tolist() for _ in range(generator.integers(1, 7))] for _ in range(n)]
    facts = [(i, c) for i in range(n) for c in ("FACT", CODES[0]) if generator.random() < 0.4]
    store = store_of(patients, facts, deduplicate=draw(st.booleans()))
    ends = [int(generator.integers(0, len(visits))) for visits in patients]
    return store, patients, facts, ends, draw(st.sampled_from([3, 6, 10, 512])), draw(st.sampled_from([(), ("C1", "C2*"), ("C0", "FACT")]))


def expected(patients, facts, batch, at, kept):
    "By loops over visits: (targets, had, number of visits with each code, codes of visit t) of each visit that is asked about, as sets and dicts of names."
    answers = []
    for b, row in enumerate(batch["rows"].tolist()):
        visits, first, last = patients[row], batch["first_visits"][b].item(), batch["first_visits"][b].item() + int(batch["sequence_mask"][b].sum()) - 1
        for t in (range(first, last) if at == "each" else [last] if last + 1 < len(visits) else []):
            past = [set(v) & kept for v in visits[:t + 1]]
            had = set().union(*past) | {c for i, c in facts if i == row and c in kept}
            answers.append((set(visits[t + 1]) & kept, had, {c: sum(c in v for v in past) for c in kept}, past[-1], t + 1))
    return answers


@some
@given(records(), st.sampled_from(["each", "end"]))
def test_targets_history_and_baselines_are_those_of_plain_loops(drawn, at):
    store, patients, facts, ends, limit, exclude = drawn
    vocabulary, size = store.vocabulary, len(store.vocabulary)
    mask = target_codes(vocabulary, exclude)
    kept = {t for t, k in zip(vocabulary.tokens, mask) if k}
    batch = attach_next_visit(make_batch(store, range(len(store)), ends, max_tokens=limit), store, at, mask)
    targets, had = next_visit_targets(batch, size), codes_so_far(batch, size)
    answers = expected(patients, facts, batch, at, kept)
    assert len(targets) == len(had) == len(answers) == int(batch["next_mask"].sum())
    beyond = batch["history_visits"].max(1).values - batch["sequence_mask"].sum(1)  # what was cut off stays out, but for the one visit that is asked about
    assert (beyond <= (0 if at == "end" else -1)).all()
    rates = torch.linspace(0.9, 0.01, size)
    repeat, own, frequent = (score(batch) for score in (repeat_last_visit(rates), own_history(rates, 2.0), most_frequent(rates)))
    for i, (wanted, before, counts, last, n) in enumerate(answers):
        names = lambda row: {t for t, x in zip(vocabulary.tokens, row) if x}
        assert names(targets[i]) == wanted and names(had[i]) == before
        for c, token in enumerate(vocabulary.tokens):
            assert own[i, c].item() == pytest.approx((counts.get(token, 0) + 2 * rates[c].item()) / (n + 2), abs=1e-6)
            assert repeat[i, c].item() == pytest.approx((token in last) + rates[c].item() / 2, abs=1e-6)
    assert frequent.equal(rates.expand(len(answers), -1))


@some
@given(records())
def test_rates_are_the_means_of_the_targets(drawn):
    store, patients, *_ = drawn
    asked = [v for visits in patients for v in visits[1:]]
    assume(asked)
    rates = next_visit_rates(store)
    for c, token in enumerate(store.vocabulary.tokens):
        n = sum(token in v for v in asked)
        assert rates[c].item() == pytest.approx((n + 0.5) / (len(asked) + 1) if c >= len(SPECIAL_TOKENS) else 0, abs=1e-6)


@some
@given(records())
def test_a_cut_history_is_asked_the_same_question_as_a_whole_one(drawn):
    store, patients, _, _, limit, _ = drawn
    size = len(store.vocabulary)
    whole = attach_next_visit(make_batch(store, range(len(store)), max_tokens=10_000), store)
    where, targets, had = whole["next_mask"].nonzero().tolist(), next_visit_targets(whole, size), codes_so_far(whole, size)
    for i, (b, t) in enumerate(where):
        cut = attach_next_visit(make_batch(store, [b], [t], max_tokens=limit), store, "end")
        assert next_visit_targets(cut, size).equal(targets[i:i + 1]) and codes_so_far(cut, size).equal(had[i:i + 1])


@some
@given(records(), st.integers(1, 4), st.integers(0, 1000))
def test_cuts_are_visits_that_have_a_next_one(drawn, per_patient, seed):
    store, patients, *_ = drawn
    if max(map(len, patients)) < 2:
        with pytest.raises(ValueError, match="none of these patients has two visits"): draw_cuts(store)
        return
    rows, ends = draw_cuts(store, per_patient=per_patient, seed=seed)
    for row, visits in enumerate(patients):
        mine = ends[rows == row].tolist()
        assert len(mine) == len(set(mine)) == min(per_patient, len(visits) - 1) and all(0 <= t < len(visits) - 1 for t in mine)
    batch = attach_next_visit(make_batch(store, rows, ends), store, "end")
    assert batch["next_mask"].sum(1).eq(1).all()
    assert [x.tolist() for x in draw_cuts(store, per_patient=per_patient, seed=seed)] == [rows.tolist(), ends.tolist()]


@many
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 8), st.sampled_from([1, 2, 3, 10]))
def test_hits_are_the_mean_over_all_orders_of_ties(seed, size, k, levels):
    generator = np.random.default_rng(seed)
    scores = torch.tensor(generator.integers(0, levels, (1, size)).astype(float))
    targets, candidates = torch.tensor(generator.random((1, size)) < 0.4), torch.tensor(generator.random((1, size)) < 0.7)
    hits = hits_at_k(scores, targets, k, candidates).item()
    listed = [c for c in range(size) if candidates[0, c]]
    tried = [sum(targets[0, c].item() for c in sorted(order, key=lambda c: -scores[0, c])[:k]) for order in itertools.permutations(listed)]
    assert hits == pytest.approx(np.mean(tried), abs=1e-6)


@many
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(2, 30), st.integers(1, 40))
def test_recall_and_precision_agree_with_scikit_learn_and_torchmetrics(seed, n, size, k):
    generator = np.random.default_rng(seed)
    scores = torch.tensor(generator.permuted(np.tile(1 + np.arange(size, dtype=np.float32), (n, 1)), axis=1))  # no ties; above 0, since torchmetrics never lists a score of 0 or less
    targets = torch.tensor(generator.random((n, size)) < generator.choice([0.05, 0.3, 0.9]))
    with_one = targets.any(1)
    if not with_one.any():
        with pytest.raises(ValueError, match="recall and precision are undefined"): recall_at_k(scores, targets, k)
        return
    ours = recall_at_k(scores, targets, k), precision_at_k(scores, targets, k)
    visit = torch.arange(n).repeat_interleave(size)
    theirs = [metric(empty_target_action="skip", top_k=k)(scores.flatten(), targets.flatten(), visit).item() for metric in (RetrievalRecall, RetrievalPrecision)]
    assert ours == pytest.approx(theirs, abs=1e-6)
    if k <= size:
        listed = torch.zeros_like(targets).scatter_(1, scores.topk(k).indices, True)
        assert ours == pytest.approx([metric(targets[with_one].numpy(), listed[with_one].numpy(), average="samples") for metric in (recall_score, precision_score)], abs=1e-6)
    m = targets.sum(1)[with_one]
    assert ours[0] <= (m.clamp(max=k) / m).mean() + 1e-6 and ours[1] <= (m.clamp(max=k) / k).mean() + 1e-6
    assert recall_at_k(targets.float(), targets, k) == pytest.approx((m.clamp(max=k) / m).double().mean().item(), abs=1e-6)


@some
@given(records(), st.integers(0, 2**32 - 1))
def test_the_loss_is_cross_entropy_and_batches_add_up(drawn, seed):
    store, _, _, ends, limit, exclude = drawn
    size = len(store.vocabulary)
    batch = attach_next_visit(make_batch(store, range(len(store)), ends, max_tokens=limit), store, targets=target_codes(store.vocabulary, exclude))
    n = int(batch["next_mask"].sum())
    z = torch.randn(n, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed % 2**31)).mul(5).requires_grad_()
    loss, weight = next_visit_loss(z, batch)
    loss.backward()
    assert weight == n
    if not n:
        assert loss.item() == 0 and z.grad is not None
        return
    other = z.detach().clone().requires_grad_()
    theirs = F.binary_cross_entropy_with_logits(other[:, 5:], next_visit_targets(batch, size)[:, 5:].double(), reduction="none").sum(1).mean()
    theirs.backward()
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(z.grad, other.grad)
    total, at = 0.0, 0
    for row in range(len(store)):
        one = attach_next_visit(make_batch(store, [row], [ends[row]], max_tokens=limit), store, targets=target_codes(store.vocabulary, exclude))
        m = int(one["next_mask"].sum())
        part, w = next_visit_loss(z[at:at + m], one)
        total, at = total + part.item() * w, at + m
    assert total / n == pytest.approx(loss.item())
    for dtype in (torch.float16, torch.bfloat16):
        low = next_visit_loss(z.detach().to(dtype), batch)[0]
        assert low.dtype == torch.float32 and low.item() == pytest.approx(loss.item(), rel=0.02)
    assert torch.isfinite(next_visit_loss(z.detach() * 1e5, batch)[0])


@pytest.fixture(scope="module")
def cohort():
    generator = np.random.default_rng(0)
    return store_of([[generator.choice(CODES, generator.integers(1, 4)).tolist() for _ in range(generator.integers(1, 12))] for _ in range(60)])


def test_evaluation_does_not_depend_on_batches(cohort):
    rates = next_visit_rates(cohort)
    attach = partial(attach_next_visit, store=cohort)
    tables = [evaluate_next_visit(own_history(rates), BatchLoader(cohort, transform=attach, token_budget=budget, shuffle=shuffle, num_workers=workers), ks=(1, 3, 50))
              for budget, shuffle, workers in ((60, False, 0), (200, True, 0), (10_000, False, 1))]
    for table in tables[1:]:
        assert table.drop(columns=["recall", "precision"]).equals(tables[0].drop(columns=["recall", "precision"]))
        np.testing.assert_allclose(table[["recall", "precision"]], tables[0][["recall", "precision"]], rtol=1e-9)
    assert (tables[0]["visits"] + tables[0]["left_out"] == (cohort.n_visits - 1).sum()).all() and tables[0]["left_out"].max() > 0
    assert tables[0].query("k == 50")["recall"].tolist() == pytest.approx([1, 1, 1])
    one_list = evaluate_next_visit(own_history(rates), BatchLoader(cohort, transform=attach), ks=(3,), candidates="all").set_index("kind")
    hits = one_list["precision"] * one_list["visits"]
    assert hits["all"] == pytest.approx(hits["new"] + hits["repeated"])


def test_new_codes_are_ranked_among_those_not_had(cohort):
    "Scores of codes that the patient has had do not matter for new codes, and the other way round."
    batch = attach_next_visit(make_batch(cohort, range(60)), cohort)
    size, generator = len(cohort.vocabulary), torch.Generator().manual_seed(0)
    had, scores = codes_so_far(batch, size), torch.randn(int(batch["next_mask"].sum()), size, generator=generator)
    for kind, struck in (("new", had), ("repeated", ~had)):
        tables = [evaluate_next_visit(lambda _, s=s: s, [batch], ks=(1, 2), kinds=(kind,)) for s in (scores, torch.where(struck, torch.randn(scores.shape, generator=generator) * 9, scores))]
        assert tables[0].equals(tables[1])
        assert not evaluate_next_visit(lambda _: torch.where(struck, scores + 99, scores), [batch], ks=(1, 2), kinds=(kind,), candidates="all").equals(tables[0])


def test_special_tokens_are_never_listed(cohort):
    batch = attach_next_visit(make_batch(cohort, range(60)), cohort)
    scores = torch.rand(int(batch["next_mask"].sum()), len(cohort.vocabulary), generator=torch.Generator().manual_seed(0))
    high = scores.clone()
    high[:, :5] += 99
    for candidates in ("kind", "all"): assert evaluate_next_visit(lambda _: high, [batch], ks=(2,), candidates=candidates).equals(evaluate_next_visit(lambda _: scores, [batch], ks=(2,), candidates=candidates))


def test_pairs_take_little_memory():
    "Fifty patients with forty visits and a vocabulary of 20,000: a dense table of targets would take 40 MB at one byte an entry."
    patients = [[[f"X{(i * 40 + v) * 10 + c}" for c in range(10)] for v in range(40)] for i in range(50)]
    store = store_of(patients, vocabulary=Vocabulary([*SPECIAL_TOKENS, *(f"X{i}" for i in range(20_000))]))
    batch = make_batch(store, range(50), layout="flat")
    store.token_offsets  # computed at first use
    assert peak_memory(lambda: attach_next_visit(batch, store)) < 8e6


def model_of(kind, attention="visit_causal", size=14, seed=0, **options):
    torch.manual_seed(seed)
    model = kind(BEHRTConfig(size, 16, 32, 2, 4, dropout=0.1, attention=attention), **options)
    with torch.no_grad(): model.next_visit.project.weight.mul_(100)  # the start is near the base rates; here the input should matter
    return model


@pytest.mark.parametrize("kind", [BEHRTForNextVisitPrediction, BEHRTForPretraining])
def test_what_the_model_sees(cohort, kind):
    batch = attach_next_visit(make_batch(cohort, range(20)), cohort)
    model = model_of(kind)
    assert_no_future_leakage(model.visit_logits, batch)
    model.eval()
    logits = model.next_visit_logits(batch)
    torch.testing.assert_close(model.visit_logits(batch)[batch["next_mask"]], logits)
    alone = torch.cat([model.next_visit_logits(attach_next_visit(make_batch(cohort, [r]), cohort)) for r in range(20)])
    torch.testing.assert_close(alone, logits, atol=1e-4, rtol=1e-4)  # padding and company change nothing
    changed = batch | {k: torch.randint_like(batch[k], 5, 9) for k in ("history_codes", "history_counts")} | {"history_visits": batch["history_visits"].flip(1)}
    assert model.next_visit_logits(changed).equal(logits)  # the labels are no input
    model.train()
    evaluate_next_visit(model.next_visit_logits, [batch], kinds=("all",))
    assert model.training
    model.predict_next(batch)
    assert model.training


@pytest.mark.parametrize("kind", [BEHRTForNextVisitPrediction, BEHRTForPretraining])
def test_bidirectional_models_answer_at_the_end_only(cohort, kind):
    model = model_of(kind, "bidirectional").eval()
    batch = make_batch(cohort, range(20), np.minimum(cohort.n_visits[:20] - 1, 2))
    with pytest.raises(ValueError, match="whose next one is in the input"): model.next_visit_logits(attach_next_visit(batch, cohort))
    with pytest.raises(ValueError, match="sees every next visit"): model.visit_logits(batch)
    end = attach_next_visit(batch, cohort, "end")
    assert model.next_visit_logits(end).shape == (int(end["next_mask"].sum()), 14)
    mixed = end | {"next_mask": end["next_mask"] | (torch.arange(20) == 7).unsqueeze(1) & batch["sequence_mask"]}
    if batch["sequence_mask"][7].sum() > 1:
        with pytest.raises(ValueError, match="whose next one is in the input"): model.next_visit_logits(mixed)
    p = model.predict_next(batch)
    assert p.shape == (20, 14) and not p[:, :5].any() and (p[:, 5:] > 0).all()
    def leaking(inputs): return model.next_visit(pool_visits(model.behrt.encode(inputs), inputs["visit_ids"], inputs["sequence_mask"].shape[1]), model.behrt.embedding.code.weight)
    with pytest.raises(AssertionError, match="Future leakage"): assert_no_future_leakage(leaking, make_batch(cohort, range(20)))


def test_every_parameter_learns_and_low_precision_is_finite(cohort):
    batch = next(iter(BatchLoader(cohort, transform=Compose(partial(attach_next_visit, store=cohort), MaskCodes(14, 0.3)), layout="flat")))
    model = model_of(BEHRTForPretraining)
    loss, weight = model.loss(model(batch), batch)
    loss.backward()
    assert weight == int(batch["next_mask"].sum()) + int((batch["masked_labels"] >= 0).sum())
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still, still
    model.eval()
    model.mlm_weight, model.next_visit_weight = 0.7, 0.2
    outputs = model(batch)
    parts = model.losses(outputs, batch)
    loss = model.loss(outputs, batch)[0]
    torch.testing.assert_close(loss, 0.7 * parts["mlm"][0] + 0.2 * parts["next_visit"][0])
    with torch.autocast("cpu", dtype=torch.bfloat16): low = model.loss(model(batch), batch)[0]
    assert torch.isfinite(low) and low.item() == pytest.approx(loss.item(), rel=0.1)


def test_nothing_to_ask_is_no_error(cohort):
    single = store_of([["C1"], ["C2", "C3"][:1]])
    batch = MaskCodes(14, 0.001)(attach_next_visit(make_batch(single, [0, 1], layout="flat"), single))
    for model in (model_of(BEHRTForNextVisitPrediction), model_of(BEHRTForPretraining)):
        loss, weight = model.loss(model(batch), batch)
        loss.backward()
        assert loss.item() == 0 and weight == 0


def test_masking_hides_nothing_from_the_targets(cohort):
    attach, mask = partial(attach_next_visit, store=cohort), MaskCodes(14, 0.5, seed=3)
    for epoch in range(3):
        mask.set_epoch(epoch)
        a, b = (Compose(*order)(make_batch(cohort, range(60), layout="flat")) for order in ((attach, mask), (mask, attach)))
        assert all(a[k].equal(b[k]) for k in a) and set(a) == set(b)
        plain = attach(make_batch(cohort, range(60), layout="flat"))
        assert next_visit_targets(a, 14).equal(next_visit_targets(plain, 14)) and not a["codes"].equal(plain["codes"])


def test_training_starts_at_the_base_rates(cohort):
    torch.manual_seed(0)
    model, rates = BEHRTForNextVisitPrediction(BEHRTConfig.small(14)), next_visit_rates(cohort)
    batch = attach_next_visit(make_batch(cohort, range(60)), cohort)
    before = model.loss(model(batch), batch)[0].item()
    assert BEHRTForNextVisitPrediction(BEHRTConfig.small(1000)).next_visit.bias.sigmoid().sum().item() == pytest.approx(5)  # untold, a visit holds a few codes
    model.start_from(rates)
    start, share, r = model.loss(model(batch), batch)[0].item(), next_visit_targets(batch, 14).double().mean(0)[5:], rates[5:].double().clamp(1e-6)
    entropy = -(share * r.log() + (1 - share) * (1 - r).log()).sum().item()
    assert start == pytest.approx(entropy, rel=0.02) and before > start and torch.isfinite(model(batch)).all()
    torch.testing.assert_close(model.predict_next(batch), rates.expand(60, -1), atol=0.1, rtol=0.1)


def test_weights_move_to_another_vocabulary_by_code(cohort, tmp_path):
    model = model_of(BEHRTForPretraining, next_visit_weight=0.5)
    with torch.no_grad():
        for bias in (model.next_visit.bias, model.mlm.bias): bias.copy_(torch.arange(14.0))
    model.save_pretrained(tmp_path / "model", cohort.vocabulary)
    other = Vocabulary([*SPECIAL_TOKENS, "C3", "brand new", "C0", "FACT"])
    moved = BEHRTForPretraining.from_pretrained(tmp_path / "model", vocabulary=other)
    old = [cohort.vocabulary.index[t] if t in cohort.vocabulary.index else None for t in other.tokens]
    for i, j in enumerate(old):
        if j is None: continue
        for name in ("next_visit.bias", "mlm.bias", "behrt.embedding.code.weight"): assert moved.state_dict()[name][i].equal(model.state_dict()[name][j])
    assert moved.next_visit_weight == 0.5 and moved.loaded.codes_new == ["brand new"]
    encoder = BEHRTForNextVisitPrediction.from_pretrained(tmp_path / "model").behrt.state_dict()
    assert all(tensor.equal(model.behrt.state_dict()[name]) for name, tensor in encoder.items())


def test_errors_name_the_argument(cohort):
    batch = attach_next_visit(make_batch(cohort, [0, 1]), cohort)
    for call, message in ((lambda: attach_next_visit(batch, cohort, "all"), "at: expected"), (lambda: attach_next_visit(batch, cohort, targets=np.ones(14)), "targets: expected a mask"),
                          (lambda: next_visit_loss(torch.zeros(1, 14), batch), "logits: expected a row"), (lambda: own_history(torch.ones(14), -1.0), "prior_visits"),
                          (lambda: hits_at_k(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), 1.5), "k: expected"), (lambda: BEHRTForPretraining(BEHRTConfig(14), -1.0), "mlm_weight"),
                          (lambda: BEHRTForPretraining(BEHRTConfig(14), math.nan), "mlm_weight"), (lambda: target_codes(cohort.vocabulary, ["C*", "FACT"]), "exclude: leaves none"),
                          (lambda: next_visit_loss(torch.zeros(1, 14), {}), "batch: has no next_mask"), (lambda: evaluate_next_visit(most_frequent(torch.ones(14)), [make_batch(cohort, [0])]), "batch: has no next_mask"),
                          (lambda: BEHRTForPretraining(BEHRTConfig(14))(batch), "call `next_visit_logits`"), (lambda: draw_cuts(cohort, per_patient=1.5), "per_patient: expected a whole")):
        with pytest.raises(ValueError, match=message): call()
    assert UNK == 1 and not target_codes(cohort.vocabulary)[:5].any()
