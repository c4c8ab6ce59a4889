"Visit encoders and the LSTM family: against plain loops, for any lengths, any company, any padding; labels at visits; what moves between heads; what is refused."
import copy
import datetime
import warnings

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ehr_sequencing.aggregation import assert_no_future_leakage
from ehr_sequencing.batches import BatchLoader, make_batch
from ehr_sequencing.classification import MISSING, ClassLabels, classification_loss
from ehr_sequencing.events import EventTable, event_table
from ehr_sequencing.lstm import LabelsAtVisits, LSTMBaseline, LSTMConfig, LSTMEncoder, LSTMProgressionModel, SurvivalLSTM
from ehr_sequencing.progression import Stages, attach_progression, label_progression
from ehr_sequencing.saved_models import SavedModel
from ehr_sequencing.sequences import build_store
from ehr_sequencing.synthetic import OUTCOME_CODE, simulate_cohort
from ehr_sequencing.training import Trainer
from ehr_sequencing.visit_encoders import VISIT_ENCODERS, make_visit_encoder
from ehr_sequencing.vocabulary import SPECIAL_TOKENS, Vocabulary, fit_vocabulary

N = 20 # tokens
KINDS = list(VISIT_ENCODERS)
many = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
few = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
sizes = dict(B=st.integers(1, 5), V=st.integers(1, 6), C=st.integers(1, 5), seed=st.integers(0, 9999))


def draw_batch(B, V, C, seed, empty=0.3):
    "Patients of 1 to V visits of 0 to C codes; what stands at padding is drawn too."
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, V + 1, (B,), generator=draw)
    sequence_mask = torch.arange(V) < lengths[:, None]
    counts = torch.randint(1, C + 1, (B, V), generator=draw) * (torch.rand(B, V, generator=draw) >= empty)
    visit_mask = (torch.arange(C) < counts[..., None]) & sequence_mask[..., None]
    return {"visit_codes": torch.randint(0, N, (B, V, C), generator=draw), "visit_mask": visit_mask, "sequence_mask": sequence_mask,
            "visit_ages": torch.randint(-1, 100, (B, V), generator=draw), "time_features": torch.rand(B, V, 2, generator=draw)}


def one_patient(batch, b):
    "A patient alone, without padding in visits."
    n = int(batch["sequence_mask"][b].sum())
    return {name: t[b:b + 1, :n] for name, t in batch.items() if t.ndim > 1}


def shaken(model, seed=0):
    "A model in evaluation mode, with weights that are none of the constructor's constants."
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def plain_summary(encoder, kind, vectors):
    "What a kind makes of the vectors of one visit, written out."
    if not len(vectors): return torch.zeros(encoder.code.embedding_dim)
    if kind == "mean": return sum(vectors) / len(vectors)
    if kind == "sum": return sum(vectors)
    if kind == "max": return torch.stack([max(v[i] for v in vectors) for i in range(len(vectors[0]))])
    if kind == "attention":
        weights = [torch.exp(v @ encoder.pooling.query / len(v) ** 0.5) for v in vectors]
        return sum(w * v for w, v in zip(weights, vectors)) / sum(weights)
    p, h, c = dict(encoder.lstm.named_parameters()), torch.zeros(len(vectors[0])), torch.zeros(len(vectors[0]))
    for v in vectors:
        i, f, g, o = (p["weight_ih_l0"] @ v + p["bias_ih_l0"] + p["weight_hh_l0"] @ h + p["bias_hh_l0"]).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


@pytest.mark.parametrize("kind", KINDS)
@few
@given(**sizes, use_time=st.booleans(), empty=st.sampled_from([0, 0.3, 1]))
def test_a_visit_is_what_a_plain_loop_says(kind, B, V, C, seed, use_time, empty):
    encoder, batch = shaken(make_visit_encoder(kind, N, 4, use_time=use_time), seed), draw_batch(B, V, C, seed, empty)
    encoder.code.weight.data[0] = 0
    out = encoder(batch)
    for b in range(B):
        for v in range(V):
            vectors = [encoder.code.weight[c] for c, real in zip(batch["visit_codes"][b, v], batch["visit_mask"][b, v]) if real]
            expected = plain_summary(encoder, kind, vectors) + encoder.age(batch["visit_ages"][b, v])
            if use_time: expected = expected + encoder.time.linear.weight @ batch["time_features"][b, v]
            assert torch.allclose(out[b, v], expected, atol=1e-5)
    out.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    unread = sorted(set(range(N)) - set(batch["visit_codes"][batch["visit_mask"]].tolist()))
    if encoder.code.weight.grad is not None: assert not encoder.code.weight.grad[unread].any()  # padding teaches nothing


@pytest.mark.parametrize("kind", KINDS)
@few
@given(**sizes)
def test_what_an_encoder_knows_of_order_and_number(kind, B, V, C, seed):
    encoder, batch = shaken(make_visit_encoder(kind, N, 4), seed), draw_batch(B, V, C, seed)
    draw = torch.Generator().manual_seed(seed)
    rank = torch.rand(batch["visit_mask"].shape, generator=draw).masked_fill(~batch["visit_mask"], 2).argsort(-1)  # real codes stay first
    shuffled = batch | {"visit_codes": batch["visit_codes"].gather(2, rank)}
    if kind != "lstm": assert torch.allclose(encoder(shuffled), encoder(batch), atol=1e-5)
    else:
        moved = (encoder(shuffled) - encoder(batch)).abs().amax(-1) > 1e-4
        other = ((shuffled["visit_codes"] != batch["visit_codes"]) & batch["visit_mask"]).any(-1)
        assert not moved[~other].any()
        assert not other.any() or moved[other].float().mean() > 0.5
    B, V, C = batch["visit_codes"].shape
    twice = torch.where(batch["visit_mask"], batch["visit_codes"], 0).repeat_interleave(2, 2), batch["visit_mask"].repeat_interleave(2, 2)
    doubled = batch | {"visit_codes": twice[0], "visit_mask": twice[1]}
    same = torch.allclose(encoder(doubled), encoder(batch), atol=1e-5)
    assert same if kind in ("mean", "max", "attention") or not batch["visit_mask"].any() else not same


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_never_read(kind):
    encoder, batch = shaken(make_visit_encoder(kind, N, 4)), draw_batch(4, 5, 4, 0)
    out = encoder(batch)
    other = batch | {"visit_codes": torch.where(batch["visit_mask"], batch["visit_codes"], 7), "visit_mask": nn.functional.pad(batch["visit_mask"], (0, 3))}
    other["visit_codes"] = nn.functional.pad(other["visit_codes"], (0, 3), value=9)
    assert torch.allclose(encoder(other), out, atol=1e-6)
    with pytest.raises(ValueError, match="visit_codes: 1 of 80 lie outside 0..19"): encoder(batch | {"visit_codes": batch["visit_codes"].index_put((torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(N))})


def test_a_gap_in_a_visit_is_refused_by_the_one_encoder_that_reads():
    batch = draw_batch(2, 3, 4, 0)
    batch["visit_mask"] = torch.tensor([True, False, True, False]).expand(2, 3, 4) & batch["sequence_mask"][..., None]
    n = int(batch["sequence_mask"].sum())
    with pytest.raises(ValueError, match=f"{n} of 6 visits have one after a gap"): make_visit_encoder("lstm", N, 4)(batch)
    for kind in KINDS[:4]: assert make_visit_encoder(kind, N, 4)(batch).isfinite().all()


@many
@given(**sizes, layers=st.integers(1, 2), both=st.booleans(), kind=st.sampled_from(KINDS))
def test_states_are_those_of_each_patient_alone(B, V, C, seed, layers, both, kind):
    "Packed or padded, the states and the final state are those of a run over the patient's own visits."
    encoder, batch = shaken(LSTMEncoder(LSTMConfig(N, 4, 3, layers, visit_encoder=kind, bidirectional=both)), seed), draw_batch(B, V, C, seed)
    with torch.no_grad():
        (states, final), plain = encoder.packed(batch), encoder(batch)
        assert states.shape == (B, V, encoder.hidden_size) == (B, V, 6 if both else 3) and final.shape == (B, encoder.hidden_size)
        assert not states[~batch["sequence_mask"]].any() and torch.allclose(states[batch["sequence_mask"]], plain[batch["sequence_mask"]], atol=1e-5)
        for b in range(B):
            alone = one_patient(batch, b)
            expected = encoder.lstm(encoder.visit_vectors(alone))[0][0]  # nothing is padded
            assert torch.allclose(plain[b, :len(expected)], expected, atol=1e-5)
            ends = torch.cat([expected[-1, :3], expected[0, 3:]])
            assert torch.allclose(final[b], ends, atol=1e-5)


def family(both=False, **changes):
    "Each head on one configuration."
    config = LSTMConfig(N, 4, 6, visit_encoder=changes.pop("visit_encoder", "mean"), bidirectional=both, **changes)
    leak = {"allow_future_leakage": True} if both else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"visit hazards": SurvivalLSTM(config, **leak), "horizons": SurvivalLSTM(config, (30, 365), **leak), "at visits": LSTMBaseline(config, 3, "multiclass", "visit", **leak),
                "progression": LSTMProgressionModel(config, 2, (30, 365), **leak), "patient": LSTMBaseline(config, 2, "multilabel")}


@pytest.fixture(scope="module")
def made():
    cohort = simulate_cohort(80, seed=3)
    store = build_store(cohort.table, fit_vocabulary(cohort.table.events, exclude=[OUTCOME_CODE]))
    return cohort, store


def in_range(batch): return batch | {name: batch[name] % N for name in ("codes", "visit_codes")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_leak_check_passes_forward_and_raises_both_ways(made, kind):
    batch = in_range(make_batch(made[1], range(6), max_tokens=30))
    for use_time in (True, False) if kind == "mean" else (True,):
        for name, model in family(visit_encoder=kind, use_time=use_time).items():
            if name != "patient": assert_no_future_leakage(shaken(model), batch)
    for name, model in family(both=True, visit_encoder=kind).items():
        if name == "patient": continue
        with pytest.raises(AssertionError, match="Future leakage"): assert_no_future_leakage(shaken(model), batch)


def test_reading_both_ways_must_be_asked_for_by_name():
    config = LSTMConfig(N, 4, 6, bidirectional=True)
    for build in (lambda **k: SurvivalLSTM(config, **k), lambda **k: SurvivalLSTM(config, (30,), **k), lambda **k: LSTMBaseline(config, level="visit", **k), lambda **k: LSTMProgressionModel(config, 2, (30,), **k)):
        with pytest.raises(ValueError, match="bidirectional=True lets the prediction at each visit see later visits"): build()
        with pytest.warns(UserWarning, match="leaks the future"): build(allow_future_leakage=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LSTMBaseline(config)  # a cut history may be read from both ends


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_company_and_wider_padding_change_nothing(kind, both):
    batch = draw_batch(5, 6, 4, 1)
    for name, model in family(both=both, visit_encoder=kind).items():
        read = shaken(model)
        def outputs(b): return [x.detach() for x in out] if isinstance(out := read(b), tuple) else [out.detach()]
        together = outputs(batch)
        for b in range(5):
            for whole, alone in zip(together, outputs(one_patient(batch, b))):
                assert torch.allclose(whole[b] if name == "patient" else whole[b, :alone.shape[1]], alone[0], atol=1e-5)


def test_patients_without_a_visit_and_masks_that_say_nothing():
    batch = draw_batch(4, 5, 3, 2)
    nobody = batch | {"sequence_mask": batch["sequence_mask"] & torch.tensor([True, False, True, False])[:, None]}
    for both in (False, True):
        for model in family(both=both).values():
            with pytest.raises(ValueError, match=r"2 of 4.*rows \[1, 3\]"): model(nobody)
            with pytest.raises(TypeError, match="sequence_mask: expected.*bool"): model(batch | {"sequence_mask": batch["sequence_mask"].long()})
            with pytest.raises(TypeError, match="visit_mask: expected torch.bool"): model(batch | {"visit_mask": batch["visit_mask"].float()})
            with pytest.raises(ValueError, match="Real visits must come first"): model(batch | {"sequence_mask": torch.tensor([False, True, True, True, True]).expand(4, 5)})


# labels and losses

@many
@given(seed=st.integers(0, 999), n=st.integers(1, 12), kind=st.sampled_from(["float", "int", "many"]), limit=st.sampled_from([20, 60, 512]))
def test_labels_at_visits_are_a_plain_lookup(made, seed, n, kind, limit):
    store, draw = made[1], np.random.default_rng(seed)
    rows, visits = zip(*sorted({(r, int(draw.integers(store.n_visits[r]))) for r in draw.integers(0, 6, n)}))
    labels = {"float": draw.integers(0, 2, len(rows)).astype(float), "int": draw.integers(0, 5, len(rows)), "many": draw.random((len(rows), 2)).round()}[kind]
    cut = draw.integers(0, store.n_visits[:6])  # labels after the end of a history are not shown
    order = draw.permutation(6)
    batch = LabelsAtVisits(rows, visits, labels)(make_batch(store, order, cut[order], max_tokens=limit))
    where = {(r, v): y for r, v, y in zip(rows, visits, labels)}
    missing = MISSING if kind == "int" else np.full(2, np.nan) if kind == "many" else np.nan
    for b, (row, first) in enumerate(zip(batch["rows"].tolist(), batch["first_visits"].tolist())):
        for v, real in enumerate(batch["sequence_mask"][b]):
            np.testing.assert_array_equal(batch["labels"][b, v].numpy(), np.asarray(where.get((row, first + v), missing) if real else missing))


@many
@given(**sizes, problem=st.sampled_from(["binary", "multiclass", "multilabel"]), weighted=st.booleans())
def test_the_loss_at_visits_is_that_of_the_visits_one_by_one(B, V, C, seed, problem, weighted):
    draw, k = torch.Generator().manual_seed(seed), 1 if problem == "binary" else 3
    weights = None if not weighted else 2.0 if k == 1 else [1.0, 2.0, 5.0]
    model, batch = shaken(LSTMBaseline(LSTMConfig(N, 4, 6), k, problem, "visit", weights), seed), draw_batch(B, V, C, seed)
    if problem == "multiclass": labels = torch.where(torch.rand(B, V, generator=draw) < 0.4, MISSING, torch.randint(0, 3, (B, V), generator=draw))
    else:
        shape = (B, V) if k == 1 else (B, V, k)
        labels = torch.where(torch.rand(shape, generator=draw) < 0.4, torch.nan, torch.randint(0, 2, shape, generator=draw).float())
    logits = model(batch)
    loss, n = model.loss(logits, batch | {"labels": labels})
    parts = [classification_loss(logits[b, v:v + 1], labels[b, v:v + 1], problem, weights) for b in range(B) for v in range(V) if batch["sequence_mask"][b, v]]
    assert int(n) == sum(int(m) for _, m in parts)
    if n: assert torch.isclose(loss, sum(a * m for a, m in parts) / n, atol=1e-6)
    loss.backward()
    probabilities = model.predict_probabilities(batch)
    assert probabilities.shape == logits.shape and ((probabilities >= 0) & (probabilities <= 1)).all()
    if problem == "multiclass": assert torch.allclose(probabilities.sum(-1), torch.ones(B, V), atol=1e-6)


def loaders(store, rows, labels, **more):
    return (BatchLoader(store, part, shuffle=shuffle, layout="hierarchical", transform=labels, **more) for part, shuffle in ((rows[:30], True), (rows[30:40], False)))


def test_the_trainer_trains_each_of_them(made):
    "Answers at patients and at visits, and stages, in the same words as all other models."
    cohort, store = made
    size, rows, last = len(store.vocabulary), np.arange(len(store)), store.n_visits - 1
    place = np.repeat(rows, store.n_visits), np.concatenate([np.arange(n) for n in store.n_visits])
    cases = [(LSTMBaseline(LSTMConfig(size, 8, 8, bidirectional=True, visit_encoder="attention")), ClassLabels(rows, last, (last > np.median(last)).astype(float))),
             (LSTMBaseline(LSTMConfig(size, 8, 8, visit_encoder="lstm"), level="visit"), LabelsAtVisits(*place, (place[1] % 2).astype(float)))]
    for model, labels in cases:
        trainer = Trainer(model, *loaders(store, rows, labels, max_tokens=80), epochs=4, learning_rate=1e-2, patients_per_step=8, device="cpu", show_progress=False)
        trainer.fit()
        losses = [epoch["train_loss"] for epoch in trainer.history]
        assert losses[-1] < losses[0] and np.isfinite(losses).all()


def test_stages_are_learned():
    "The one code that tells comes two visits before the moment of the question."
    start, rows, draw = datetime.datetime(2010, 1, 1), [], np.random.default_rng(0)
    for i in range(80):
        worse = i % 2
        visits = [(0, "N18.3"), (0, "R80" if worse else "Z00"), (100, "J00"), (150, "J06"), (1500, "Z00")] + ([(250 + int(draw.integers(50)), "N18.4")] if worse else [])
        rows += [(i, start + datetime.timedelta(days=d), code) for d, code in visits]
    table = EventTable(event_table(pl.DataFrame(rows, schema=["subject_id", "time", "code"], orient="row")))
    store = build_store(table, fit_vocabulary(table.events))
    labels = label_progression(store, table, Stages({"N18.3": 1, "N18.4": 2}), horizons=(180, 730))
    batch = attach_progression(make_batch(store, range(80), layout="hierarchical"), store, labels)
    for kind in ("mean", "lstm"):
        torch.manual_seed(0)
        model = LSTMProgressionModel(LSTMConfig(len(store.vocabulary), 8, 8, dropout=0.0, visit_encoder=kind), 2, labels.horizons)
        optimizer = torch.optim.Adam(model.parameters(), 4e-2)
        for step in range(30):
            loss, n = model.loss(model(batch), batch)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
        risk = model.predict_risk(batch, 730, visits=torch.full((80,), 2))[:, 0]
        assert n == 80 and risk[1::2].min() > 0.8 and risk[::2].max() < 0.2


# saved models

def heads(size):
    return {SurvivalLSTM: {"horizons": [30, 60]}, LSTMBaseline: {"n_labels": 2, "problem": "multilabel"}, LSTMProgressionModel: {"n_stages": 2, "horizons": [30, 60]}, LSTMEncoder: {}}


@pytest.mark.parametrize("source", [SurvivalLSTM, LSTMBaseline, LSTMProgressionModel, LSTMEncoder])
@pytest.mark.parametrize("kind", ["mean", "lstm"])
def test_the_encoder_moves_between_all_heads_and_rows_by_code(tmp_path, source, kind):
    codes = [f"C{i}" for i in range(15)]
    old, new = Vocabulary([*SPECIAL_TOKENS, *codes]), Vocabulary([*SPECIAL_TOKENS, "other", *codes[::-1][:12]])
    config, batch = LSTMConfig(N, 4, 6, 2, visit_encoder=kind), draw_batch(3, 4, 3, 0)
    model = shaken(source(config, **heads(N)[source]))
    model.save_pretrained(tmp_path / "model", old)
    assert type(SavedModel.from_pretrained(tmp_path / "model")) is source
    mine = model if source is LSTMEncoder else model.lstm_encoder
    for target, options in heads(N).items():
        loaded = target.from_pretrained(tmp_path / "model", **options)
        theirs = loaded if target is LSTMEncoder else loaded.lstm_encoder
        assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True))
        fresh = [n for n in loaded.state_dict() if not n.startswith("lstm_encoder.")]
        assert loaded.loaded.fresh == ([] if target in (source, LSTMEncoder) else fresh) and loaded.config == config
        moved = target.from_pretrained(tmp_path / "model", vocabulary=new, **options)
        rows = (moved if target is LSTMEncoder else moved.lstm_encoder).visit_encoder.code.weight
        for j, token in enumerate(new.tokens):
            if token in old.index: assert torch.equal(rows[j], mine.visit_encoder.code.weight[old.index[token]])
        assert moved.loaded.codes_new == ["other"] and len(moved.loaded.codes_dropped) == 3
        if target is source:
            known = batch | {"visit_codes": torch.tensor(old.encode(new.tokens))[torch.tensor([5 + 1 + i % 12 for i in range(36)]).view(3, 4, 3)]}
            there = known | {"visit_codes": torch.tensor([5 + 1 + i % 12 for i in range(36)]).view(3, 4, 3)}
            flat = lambda out: torch.cat([x.flatten() for x in out]) if isinstance(out, tuple) else out.flatten()
            assert torch.allclose(flat(moved.eval()(there)), flat(model(known)), atol=1e-6)
    if source is not LSTMEncoder:
        with pytest.raises(ValueError, match="another architecture"): source.from_pretrained(tmp_path / "model", num_layers=1)


def test_a_model_is_the_same_after_it_was_saved(tmp_path):
    batch = draw_batch(4, 5, 3, 0)
    for both in (False, True):
        for name, model in family(both=both, visit_encoder="attention").items():
            shaken(model).save_pretrained(tmp_path / "model")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                again = type(model).from_pretrained(tmp_path / "model")
            for a, b in zip(*(out if isinstance(out := m(batch), tuple) else (out,) for m in (model, again))): assert torch.equal(a, b)
            assert again.settings == copy.deepcopy(model.settings)
