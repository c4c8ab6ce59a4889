"The hierarchical transformer: properties over drawn batches, which the chapter shows on an example each."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ehr_sequencing.aggregation import assert_no_future_leakage
from ehr_sequencing.transformers import HierarchicalConfig, HierarchicalEncoder, SurvivalTransformer, attention_by_class, visits_by_width

VOCABULARY = 40


@st.composite
def batches(draw):
    "One to five patients of one to nine visits of 0 to 40 codes, most of them few: visits without codes, and masks with holes, among them."
    seed, B, V, C = draw(st.integers(0, 10_000)), draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 5, 9, 40]))
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(*shape, generator=generator)
    real = torch.arange(V) < torch.randint(1, V + 1, (B, 1), generator=generator)
    widths = ((C + 1) * uniform(B, V) ** 3).long()
    mask = (torch.arange(C) < widths.unsqueeze(-1)) & real.unsqueeze(-1) & (uniform(B, V, C) < draw(st.sampled_from([0.7, 1.1])))
    days = (uniform(B, V) * 400).cumsum(1)
    return {"visit_codes": torch.where(mask, torch.randint(1, VOCABULARY, (B, V, C), generator=generator), 0), "visit_mask": mask, "sequence_mask": real,
            "visit_ages": torch.where(real, torch.randint(-1, 100, (B, V), generator=generator), -1), "time_features": torch.stack([days.diff(dim=1, prepend=days[:, :1]), days], -1).log1p() * real.unsqueeze(-1)}


SETTINGS = st.fixed_dictionaries({"code_layers": st.sampled_from([0, 1, 2]), "pooling": st.sampled_from(["mean", "sum", "max", "attention"]), "position": st.sampled_from(["sinusoidal", "learned"]), "use_time": st.booleans()})


def encoder(kind=HierarchicalEncoder, **changes):
    "A small model, the same for the same arguments."
    torch.manual_seed(0)
    model = kind(HierarchicalConfig(VOCABULARY, 16, 32, 3, 4, **changes)).eval()
    for name, p in model.named_parameters():
        if name.endswith("query"): torch.nn.init.normal_(p)  # learned pooling starts as the mean
    return model


def close(a, b): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(1, 50))
def test_every_visit_is_in_one_class(batch, narrowest):
    "Each visit with codes, and no other, stands in one class, whose rows hold its codes in their places and are less than twice as wide as its widest needs."
    mask = batch["visit_mask"].flatten(0, 1)
    classes = visits_by_width(batch["visit_mask"], narrowest)
    places = torch.cat([p for p, _ in classes]) if classes else torch.tensor([], dtype=torch.long)
    assert sorted(places.tolist()) == mask.any(1).nonzero().flatten().tolist()
    for p, rows in classes:
        assert torch.equal(rows, mask[p, :rows.shape[1]]) and int(rows.sum()) == int(mask[p].sum())
        ends = torch.tensor([int(r.nonzero().max()) + 1 for r in rows])
        assert rows.shape[1] == ends.max() and (ends.max() <= narrowest or 2 * ends.min() > ends.max())


@settings(max_examples=40, deadline=None)
@given(batches())
def test_classes_change_nothing(batch):
    "Attention among the codes of a visit is the same whatever the classes are, and that of each visit alone."
    torch.manual_seed(0)
    layer = encoder().code_blocks[0].attention
    x = torch.randn(*batch["visit_mask"].shape, 32).flatten(0, 1)
    found = []
    for narrowest in (1, 4, 64):
        classes = visits_by_width(batch["visit_mask"], narrowest)
        if not classes: return
        listed = torch.cat([x[p, :m.shape[1]][m] for p, m in classes])
        slots = torch.cat([p.repeat_interleave(m.sum(1)) for p, m in classes])
        out = attention_by_class([m for _, m in classes])(layer, listed, listed, listed)
        found.append(torch.cat([out[slots == s] for s in slots.unique()]))
    mask = batch["visit_mask"].flatten(0, 1)
    alone = [x[s, mask[s]][None] for s in mask.any(1).nonzero().flatten()]
    expected = torch.cat([layer.mix(a, a, a, torch.ones(1, 1, a.shape[1], a.shape[1], dtype=torch.bool))[0] for a in alone])
    for out in found: close(out, expected)


@settings(max_examples=60, deadline=None)
@given(batches(), SETTINGS, st.integers(0, 1000))
def test_nothing_leaks_in(batch, changes, seed):
    "Alone and in company, with other padding, with the codes of each visit in another order: the same vectors. Padding is zero."
    model, real, generator = encoder(**changes), batch["sequence_mask"], torch.Generator().manual_seed(seed)
    with torch.no_grad():
        whole = model(batch)
        assert whole.isfinite().all() and not whole[~real].any()
        for b in range(len(real)):
            n, used = int(real[b].sum()), batch["visit_mask"][b].any(0)
            width = max(1, int((used * torch.arange(1, len(used) + 1)).max()))
            alone = {name: x[b:b + 1, :n] for name, x in batch.items()}
            alone |= {name: alone[name][:, :, :width] for name in ("visit_codes", "visit_mask")}
            close(model(alone)[0], whole[b, :n])
        order = torch.rand(batch["visit_mask"].shape, generator=generator).argsort(2)
        close(model(batch | {name: batch[name].gather(2, order) for name in ("visit_codes", "visit_mask")}), whole)
        junk = batch | {"visit_codes": torch.where(batch["visit_mask"], batch["visit_codes"], torch.randint(0, 10**6, order.shape, generator=generator)),
                        "visit_ages": torch.where(real, batch["visit_ages"], 77), "time_features": batch["time_features"].masked_fill(~real.unsqueeze(-1), float("nan"))}
        assert torch.equal(model(junk), whole)


@settings(max_examples=25, deadline=None)
@given(batches(), SETTINGS)
def test_gradients(batch, changes):
    "Recomputed blocks have the gradients of kept ones; padding has none, whatever stands there."
    gradients = []
    junk = batch | {"visit_codes": torch.where(batch["visit_mask"], batch["visit_codes"], 7), "time_features": batch["time_features"].masked_fill(~batch["sequence_mask"].unsqueeze(-1), float("nan"))}
    for again, x in ((False, batch), (True, batch), (False, junk)):
        model = encoder(gradient_checkpointing=again, dropout=0.0, **changes).train()
        model(x).square().sum().backward()
        gradients.append(torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()]))
        assert gradients[-1].isfinite().all() and not (model.code.weight.grad is not None and model.code.weight.grad[0].any())
    for other in gradients[1:]: torch.testing.assert_close(other, gradients[0], atol=1e-5 * float(gradients[0].abs().max()), rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(batches(), SETTINGS)
def test_no_future(batch, changes):
    "The leak check passes, and fails where attention looks ahead."
    if not batch["sequence_mask"][:, 1:].any() or not batch["visit_mask"].any(): return  # nobody has a future, or a code
    assert_no_future_leakage(encoder(**changes), batch, max_checks=4)
    with pytest.raises(AssertionError, match="Future leakage"): assert_no_future_leakage(encoder(attention="bidirectional", **changes), batch, max_checks=4)


def test_one_code_in_another_visit_reaches_only_later_ones():
    "A change of one code moves its own visit and the later ones, of its own patient."
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1, VOCABULARY, (2, 5, 3), generator=generator)
    batch = {"visit_codes": codes, "visit_mask": torch.ones(2, 5, 3, dtype=torch.bool), "sequence_mask": torch.ones(2, 5, dtype=torch.bool), "visit_ages": torch.full((2, 5), 60), "time_features": torch.rand(2, 5, 2, generator=generator)}
    other = codes.clone()
    other[0, 2, 1] = other[0, 2, 1] % (VOCABULARY - 1) + 1
    model = encoder(SurvivalTransformer)
    moved = (model.encode_visits(batch) - model.encode_visits(batch | {"visit_codes": other})).abs().amax(-1) > 1e-6
    assert moved.tolist() == [[False, False, True, True, True], [False] * 5]
