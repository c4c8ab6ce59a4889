"""Contrastive pre-training against plain loops on drawn batches: views that are never empty and depend on seed, epoch and rows alone; NT-Xent with patients
who are there twice; alignment, uniformity and retrieval; what the model does with one patient, with padding and with [CLS]."""
import datetime
import math

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from ehr_sequencing.batches import BatchLoader, make_batch
from ehr_sequencing.behrt import BEHRTConfig
from ehr_sequencing.classification import prepend_cls
from ehr_sequencing.contrastive import BEHRTForContrastive, TwoViews, alignment, drop_tokens, nt_xent_loss, two_views, uniformity, view_retrieval
from ehr_sequencing.events import EventTable, event_table
from ehr_sequencing.sequences import build_store
from ehr_sequencing.vocabulary import fit_vocabulary

many = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
KEYS = ("codes", "ages", "visit_ids", "times", "attention_mask")


def drawn_batch(seed, cls=False):
    "A flat batch: visits of one to three codes, ages and times that name their visit, padding, and `[CLS]` if asked for."
    generator = np.random.default_rng(seed)
    rows = [[v for v in range(generator.integers(1, 6)) for _ in range(generator.integers(1, 4))] for _ in range(generator.integers(1, 6))]
    width = max(map(len, rows)) + int(generator.integers(0, 3))
    visits = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    mask = visits >= 0
    batch = {"codes": torch.where(mask, torch.tensor(generator.integers(5, 30, visits.shape)), 0), "ages": torch.where(mask, 40 + visits, 0), "visit_ids": visits,
             "times": torch.where(mask, 10.0 * visits + 3, 0.0), "attention_mask": mask, "rows": torch.tensor(generator.permutation(100)[:len(rows)])}
    return prepend_cls(batch) if cls else batch


@many
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1), st.booleans())
def test_dropping_tokens_is_what_a_loop_does(seed, share, cls):
    batch = drawn_batch(seed, cls)
    keep = torch.rand(batch["codes"].shape, generator=torch.Generator().manual_seed(seed % 2**31)) < share
    if not (keep & batch["attention_mask"]).any(1).all():
        with pytest.raises(ValueError, match="keep no token"): drop_tokens(batch, keep)
        return
    view = drop_tokens(batch, keep)
    lengths = []
    for b in range(len(keep)):
        left = [i for i in range(keep.shape[1]) if keep[b, i] and batch["attention_mask"][b, i]]
        old = [batch["visit_ids"][b, i].item() for i in left]
        number = {v: n for n, v in enumerate(sorted(set(old) - {-1}))} | {-1: -1}
        n = len(left)
        lengths.append((n, len(number) - 1))
        assert view["visit_ids"][b, :n].tolist() == [number[v] for v in old]
        for name in ("codes", "ages", "times"): assert view[name][b, :n].tolist() == batch[name][b, left].tolist()
        assert view["attention_mask"][b].tolist() == [True] * n + [False] * (view["codes"].shape[1] - n)
        assert (view["visit_ids"][b, n:] == -1).all() and not view["codes"][b, n:].any() and not view["ages"][b, n:].any() and not view["times"][b, n:].any()
        assert int(view["sequence_mask"][b].sum()) == len(number) - 1
    assert view["codes"].shape[1] == max(n for n, _ in lengths) and view["sequence_mask"].shape[1] == max(1, max(v for _, v in lengths))
    assert all(view[name].dtype == batch[name].dtype for name in KEYS)


@many
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 0.2, 0.9, 0.999]), st.sampled_from([0, 0.3, 0.999]), st.booleans())
def test_views_are_parts_of_their_history_and_never_empty(seed, code_dropout, visit_dropout, cls):
    batch = drawn_batch(seed, cls)
    views, n = two_views(batch, np.random.default_rng(seed), code_dropout, visit_dropout), len(batch["codes"])
    assert len(views["codes"]) == 2 * n and views["rows"].tolist() == batch["rows"].tolist() * 2
    for i in range(2 * n):
        real = views["visit_ids"][i] >= 0
        assert real.any() and (views["codes"][i][real] >= 5).all()
        of = batch["visit_ids"][i % n] >= 0
        whole = list(zip(*(batch[k][i % n][of].tolist() for k in ("codes", "ages", "times"))))
        left = iter(whole)
        assert all(token in left for token in zip(*(views[k][i][real].tolist() for k in ("codes", "ages", "times"))))  # a subsequence, with its ages and days
        if code_dropout == visit_dropout == 0: assert real.sum() == of.sum()
        if cls: assert views["codes"][i, 0] == 3 and views["visit_ids"][i, 0] == -1


def test_what_is_dropped_depends_on_seed_epoch_and_rows_alone():
    batch = drawn_batch(3)
    def codes(seed=0, epoch=0, **changes):
        transform = TwoViews(0.3, 0.3, seed)
        transform.set_epoch(epoch)
        for _ in range(2): transform(drawn_batch(7))  # what came before leaves no trace
        return transform(batch | changes)["codes"].tolist()
    assert codes() == codes() and codes() == codes(ages=batch["ages"] + 1)
    others = [codes(seed=1), codes(epoch=1), codes(rows=batch["rows"] + 1)]
    assert all(o != codes() for o in others)
    halves = TwoViews(0.3, 0.3)(batch)["codes"]
    assert not halves[:len(batch["codes"])].equal(halves[len(batch["codes"]):])


def test_codes_and_visits_are_dropped_as_often_as_asked():
    "A visit goes as a whole; a code of a visit that stays goes alone."
    batch = {"codes": torch.arange(10, 34).repeat(500, 1), "ages": torch.full((500, 24), 50), "visit_ids": (torch.arange(24) // 3).repeat(500, 1), "times": torch.zeros(500, 24),
             "attention_mask": torch.ones(500, 24, dtype=torch.bool)}
    views = two_views(batch, np.random.default_rng(0), 0.1, 0.4)
    kept = torch.stack([(views["codes"] == c).any(1) for c in range(10, 34)], 1).view(1000, 8, 3)
    n = kept[..., 0].numel()
    assert abs(kept.float().mean().item() - 0.6 * 0.9) < 4 * math.sqrt(0.25 / n)
    both = (kept[..., 0] & kept[..., 1]).float().mean().item()
    assert abs(both - 0.6 * 0.9**2) < 4 * math.sqrt(0.25 / n)
    pair = (kept[:500, :, 0] & kept[500:, :, 0]).float().mean().item()  # the two views are drawn apart from one another
    assert abs(pair - (0.6 * 0.9) ** 2) < 4 * math.sqrt(0.25 / (n / 2))
    across = (kept[:, 0, 0] & kept[:, 1, 0]).float().mean().item()
    assert abs(across - (0.6 * 0.9) ** 2) < 4 * math.sqrt(0.25 / 1000)


@st.composite
def vectors(draw):
    "Vectors of views in float64, some of them equal, and patients, some of whom are there twice."
    n, p, seed = draw(st.integers(2, 8)), draw(st.integers(1, 6)), draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    z = generator.normal(size=(2 * n, p)) if draw(st.booleans()) else generator.integers(1, 3, (2 * n, p)).astype(float)
    patients = generator.integers(0, n, n) if draw(st.booleans()) else np.arange(n)
    if len(set(patients)) == 1: patients[0] += 1
    return torch.tensor(z), torch.tensor(np.tile(patients, 2)), draw(st.sampled_from([0.05, 0.5, 5.0]))


@many
@given(vectors())
def test_nt_xent_is_cross_entropy_view_by_view(drawn):
    z, patients, tau = drawn
    n = len(z) // 2
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    losses = []
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        among = [j, *(k for k in range(2 * n) if patients[k] != patients[i])]
        logits = torch.stack([theirs[i] @ theirs[k] / theirs[i].norm() / theirs[k].norm() / tau for k in among])
        losses.append(F.cross_entropy(logits.unsqueeze(0), torch.tensor([0])))
    loss, expected = nt_xent_loss(ours, patients, tau), torch.stack(losses).mean()
    loss.backward(); expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-8, rtol=1e-6)
    assert 0 <= loss.item() <= 2 / tau + math.log(2 * n - 1) + 1e-9
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    both = torch.cat([order, order + n])
    assert nt_xent_loss(z[both], patients[both], tau).item() == pytest.approx(loss.item())  # the order of patients
    swapped = torch.arange(2 * n).roll(n)
    assert nt_xent_loss(z[swapped], patients, tau).item() == pytest.approx(loss.item())  # which view comes first
    assert nt_xent_loss(z, patients, 1e9).item() == pytest.approx(np.mean([math.log(1 + (patients != p).sum().item()) for p in patients]))
    for dtype in (torch.float16, torch.bfloat16):  # rounded vectors, but no rounding after them
        low = nt_xent_loss(z.to(dtype), patients, tau)
        assert low.dtype == torch.float32 and low.item() == pytest.approx(nt_xent_loss(z.to(dtype).double(), patients, tau).item(), rel=1e-4, abs=1e-4)
        with torch.autocast("cpu", dtype=dtype): assert nt_xent_loss(z.to(dtype), patients, tau).equal(low)  # as a trainer calls it


@many
@given(vectors())
def test_measures_are_those_of_loops(drawn):
    z, patients, _ = drawn
    n, unit = len(z) // 2, F.normalize(z, dim=1).numpy()
    squared = cdist(unit, unit, "sqeuclidean")
    assert alignment(z) == pytest.approx(np.mean([squared[i, i + n] for i in range(n)]), abs=1e-9)
    different = patients.numpy()[:, None] != patients.numpy()
    assert uniformity(z, patients) == pytest.approx(math.log(np.exp(-2 * squared[different]).mean()), abs=1e-9)
    spread = torch.randn(2 * n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n))  # no ties
    unit, found = F.normalize(spread, dim=1).numpy(), []
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        found.append(all(unit[i] @ unit[k] < unit[i] @ unit[j] for k in range(2 * n) if patients[k] != patients[i]))
    assert view_retrieval(spread, patients) == pytest.approx(np.mean(found))
    assert view_retrieval(torch.ones(2 * n, 3)) == pytest.approx(1 / (2 * n - 1))


@pytest.fixture(scope="module")
def store():
    generator, begin = np.random.default_rng(0), datetime.datetime(2010, 1, 1)
    rows = [(i, begin + datetime.timedelta(days=int(d)), f"C{c}") for i in range(50) for d in np.cumsum(generator.integers(1, 400, generator.integers(1, 8))) for c in generator.integers(0, 30, 3)]
    events = event_table(pl.DataFrame(rows, schema=["subject_id", "time", "code"], orient="row"))
    return build_store(EventTable(events), fit_vocabulary(events, min_patients=1))


def model_of(store, **options):
    torch.manual_seed(0)
    attention = options.pop("attention", "bidirectional")
    return BEHRTForContrastive(BEHRTConfig(len(store.vocabulary), 16, 32, 1, 2, attention=attention), projection_size=8, **options)


@pytest.mark.parametrize("pooling", ["mean", "max", "cls"])
def test_company_and_padding_change_nothing(store, pooling):
    model, batch = model_of(store, pooling=pooling).eval(), make_batch(store, range(10), layout="flat")
    together, alone = model.represent(batch), torch.cat([model.represent(make_batch(store, [r], layout="flat")) for r in range(10)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    if pooling == "cls": assert model.represent(prepend_cls(batch)).equal(together)  # put in front once


def test_the_loss_of_the_model(store, tmp_path):
    model, transform = model_of(store), TwoViews()
    batch = transform(make_batch(store, [0, 1, 2, 1], layout="flat"))
    outputs = model(batch)
    loss, weight = model.loss(outputs, batch)
    assert weight == 4 and loss.equal(nt_xent_loss(outputs, torch.tensor([0, 1, 2, 1] * 2), 0.1)) and not loss.equal(nt_xent_loss(outputs))
    loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still, still
    for rows in ([3], [3, 3]):
        one = transform(make_batch(store, rows, layout="flat"))
        loss, weight = model.loss(model(one), one)
        loss.backward()
        assert loss.item() == 0 and weight == 0
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.isfinite(model.loss(model(batch), batch)[0])
    model.save_pretrained(tmp_path / "model", store.vocabulary)
    again = BEHRTForContrastive.from_pretrained(tmp_path / "model", temperature=0.5)
    assert again(batch).equal(model.eval()(batch)) and again.loss(again(batch), batch)[0].equal(nt_xent_loss(again(batch), batch["rows"], 0.5))


def test_the_loader_makes_the_same_views_in_any_process(store):
    def codes(workers, epoch):
        loader = BatchLoader(store, token_budget=200, shuffle=True, transform=TwoViews(seed=2), layout="flat", num_workers=workers)
        loader.set_epoch(epoch)
        return [b["codes"].tolist() for b in loader]
    assert codes(0, 0) == codes(1, 0) and codes(0, 1) != codes(0, 0)


def test_errors_name_the_argument(store):
    z, batch = torch.randn(4, 3), make_batch(store, [0, 1])
    for call, message in ((lambda: nt_xent_loss(z[:2]), "patients: all views are of one patient"), (lambda: nt_xent_loss(z, torch.tensor([1, 1, 1, 1])), "patients: all views"),
                          (lambda: nt_xent_loss(z, torch.tensor([1, 2, 2, 1])), "patients: expected 4 ids"), (lambda: nt_xent_loss(z[0]), "z: expected shape"),
                          (lambda: nt_xent_loss(z, temperature=-1.0), "temperature"), (lambda: nt_xent_loss(z, temperature=math.nan), "temperature"), (lambda: TwoViews(visit_dropout=1), "visit_dropout"),
                          (lambda: two_views({k: v for k, v in batch.items() if k != "times"}, np.random.default_rng(0)), "batch: has no times"),
                          (lambda: model_of(store, pooling="sum"), "pooling: expected one of"), (lambda: model_of(store, pooling="cls", attention="visit_causal"), "pooling: 'cls' needs"),
                          (lambda: model_of(store, temperature=0.0), "temperature"), (lambda: BEHRTForContrastive(BEHRTConfig(9), 0), "projection_size: expected a positive"),
                          (lambda: TwoViews()({k: v for k, v in batch.items() if k != "rows"}), "batch: has no rows"), (lambda: BEHRTForContrastive(BEHRTConfig(9)).loss(z, {}), "batch: has no rows")):
        with pytest.raises(ValueError, match=message): call()
