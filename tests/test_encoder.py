"The encoder and masked codes: properties over drawn batches, which the chapters show on an example each."
import datetime

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from ehr_sequencing.aggregation import assert_no_future_leakage, pool_visits
from ehr_sequencing.batches import BatchLoader, Compose
from ehr_sequencing.behrt import BEHRT, BEHRTConfig, TokenGrid, grid_attention, head_masks, packed_attention, visit_attention_mask
from ehr_sequencing.classification import pool_sequence, prepend_cls
from ehr_sequencing.events import EventTable, event_table
from ehr_sequencing.masked_codes import BEHRTForMLM, MaskCodes
from ehr_sequencing.sequences import build_store
from ehr_sequencing.vocabulary import CLS, MASK, SPECIAL_TOKENS, fit_vocabulary

VOCABULARY = 60


@st.composite
def batches(draw):
    "Batches of one to six rows of 1 to 40 tokens, visits of several sizes, some padding."
    seed, B, L = draw(st.integers(0, 10_000)), draw(st.integers(1, 6)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, L + 1, (B, 1), generator=generator)
    mask = torch.arange(L) < lengths
    visit_ids = (torch.rand(B, L, generator=generator) < 0.4).cumsum(1)
    visit_ids = visit_ids - visit_ids[:, :1]
    fill = lambda t, value: torch.where(mask, t, value)
    return {"codes": fill(torch.randint(1, VOCABULARY, (B, L), generator=generator), 0), "ages": fill(40 + visit_ids, 0), "visit_ids": fill(visit_ids, -1),
            "times": fill(visit_ids * 33.0, 0.0), "attention_mask": mask, "rows": torch.randperm(1000, generator=generator)[:B], "first_visits": torch.randint(0, 5, (B,), generator=generator)}


LAYOUTS = st.tuples(st.sampled_from(["visit_causal", "bidirectional"]), st.sampled_from([0, 2, 4]))


def encoder(attention, visit_heads=0, **changes):
    "A small encoder, the same for the same arguments."
    torch.manual_seed(0)
    changes["visit_heads"] = visit_heads
    return BEHRT(BEHRTConfig(VOCABULARY, 16, 32, 2, 4, attention=attention, **changes)).eval()


@settings(max_examples=60, deadline=None)
@given(batches(), LAYOUTS)
def test_layouts_agree(batch, layout):
    "Padded and packed, whole and read in places, alone and in company: the same vectors."
    model, packed, mask = encoder(*layout), encoder(*layout, packed=True), batch["attention_mask"]
    with torch.no_grad():
        whole = model.encode(batch)
        torch.testing.assert_close(packed.encode(batch)[mask], whole[mask], atol=1e-5, rtol=0)
        for b in range(len(mask)):
            alone = {k: v[b:b + 1, :int(mask[b].sum())] if v.ndim == 2 else v[b:b + 1] for k, v in batch.items()}
            torch.testing.assert_close(model.encode(alone)[0], whole[b, mask[b]], atol=1e-5, rtol=0)
        positions = torch.where(mask & (torch.rand(mask.shape) < 0.5), torch.arange(mask.shape[1]), -1)
        for m in (model, packed): torch.testing.assert_close(m.encode(batch, positions=positions), whole[positions >= 0], atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(batches(), LAYOUTS)
def test_packed_gradients(batch, layout):
    "Packing changes no gradient, and neither does reading in places."
    gradients = []
    mask = batch["attention_mask"]
    positions = torch.where(mask, torch.arange(mask.shape[1]), -1)
    for packed, read in ((False, None), (True, None), (False, positions), (True, positions)):
        model = encoder(*layout, packed=packed, dropout=0.0).train()
        out = model.encode(batch, positions=read)
        (out if read is not None else out[mask]).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other in gradients[1:]: torch.testing.assert_close(other, gradients[0], atol=1e-5 * float(gradients[0].abs().max()), rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(batches(), LAYOUTS)
@pytest.mark.filterwarnings("ignore")
def test_rule_of_the_block_mask(batch, layout):
    "Flex attention over rows end to end gives what the grid gives."
    grid = TokenGrid(batch["attention_mask"])
    attention, visit_heads = layout
    layer, n = encoder(*layout).blocks[0].attention, len(grid.index)
    q, k, v = torch.randn(3, n, 32)
    with torch.no_grad():
        allowed = head_masks(visit_attention_mask(batch["visit_ids"], batch["attention_mask"], attention), batch["visit_ids"], visit_heads, 4)
        expected = grid_attention(grid, allowed)(layer, q, k, v)
        torch.testing.assert_close(packed_attention(grid, batch["visit_ids"], attention, None, visit_heads, 4)(layer, q, k, v), expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention, visit_heads", [("visit_causal", 0), ("visit_causal", 2), ("bidirectional", 0), ("bidirectional", 2)])
def test_packed_on_a_gpu(attention, visit_heads):
    "Compiled flex attention: outputs and gradients as padded, in single precision."
    torch.backends.cuda.matmul.allow_tf32 = False
    for B, L, probability in ((3, 40, 0.15), (7, 130, 0.15), (2, 20, 1e-9)):  # nothing is masked in the last
        visit_ids = torch.arange(L).div(3, rounding_mode="floor").expand(B, -1)
        real = torch.arange(L) < torch.randint(5, L + 1, (B, 1))
        batch = MaskCodes(VOCABULARY, probability)({"codes": torch.where(real, torch.randint(5, VOCABULARY, (B, L)), 0), "ages": 50 + visit_ids, "visit_ids": torch.where(real, visit_ids, -1), "times": visit_ids * 9.0, "attention_mask": real})
        batch, results = {k: v.cuda() for k, v in batch.items()}, []
        for packed in (False, True):
            torch.manual_seed(0)
            model = BEHRTForMLM(BEHRTConfig(VOCABULARY, 32, 64, 2, 4, attention=attention, visit_heads=visit_heads, packed=packed, dropout=0.0)).cuda()
            logits = model(batch)
            model.loss(logits, batch)[0].backward()
            results.append((logits, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
        for ours, theirs in zip(*results): torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(batches())
def test_visit_causal_looks_back_only(batch):
    "The leak check on visits pooled from the encoder, in each layout; bidirectional attention fails it."
    if int(batch["visit_ids"].max()) < 1: return
    for packed, visit_heads in ((False, 0), (True, 0), (False, 2)):
        model = encoder("visit_causal", visit_heads, packed=packed)
        assert_no_future_leakage(lambda b: pool_visits(model.encode(b), b["visit_ids"]), batch)
    looks_ahead = encoder("bidirectional")
    with pytest.raises(AssertionError, match="Future leakage"): assert_no_future_leakage(lambda b: pool_visits(looks_ahead.encode(b), b["visit_ids"]), batch)


@settings(max_examples=80, deadline=None)
@given(batches(), st.integers(0, 3), st.integers(0, 5), st.booleans(), st.sampled_from([0.05, 0.15, 0.5, 0.9]))
def test_masking(batch, seed, epoch, whole_visit, probability):
    "What is chosen is real, no special token, and told truly; what is not chosen stays; copies go together; order and company of the rows do not matter."
    mask = MaskCodes(VOCABULARY, probability, whole_visit, seed)
    mask.set_epoch(epoch)
    out, codes, rows = mask(batch), batch["codes"], torch.arange(len(batch["codes"])).unsqueeze(1)
    at, labels = out["masked_positions"], out["masked_labels"]
    assert ((at >= 0) == (labels >= 0)).all() and (labels[at < 0] == -100).all()
    chosen = torch.zeros_like(codes, dtype=torch.bool)
    chosen[rows.expand_as(at)[at >= 0], at[at >= 0]] = True
    assert int(chosen.sum()) == int((at >= 0).sum())
    assert (codes[chosen] >= len(SPECIAL_TOKENS)).all() and batch["attention_mask"][chosen].all()
    assert out["codes"][~chosen].equal(codes[~chosen])
    assert ((out["codes"][chosen] == MASK) | (out["codes"][chosen] >= len(SPECIAL_TOKENS))).all() and int(out["codes"].max()) < VOCABULARY
    assert labels[at >= 0].equal(codes[rows.expand_as(at)[at >= 0], at[at >= 0]])
    if whole_visit:
        for b in range(len(codes)):
            group = {}
            for visit, code, new in zip(batch["visit_ids"][b].tolist(), codes[b].tolist(), zip(out["codes"][b].tolist(), chosen[b].tolist())): group.setdefault((visit, code), set()).add(new)
            assert all(len(fates) == 1 for fates in group.values())
    order = torch.randperm(len(codes))
    assert mask({k: v[order] for k, v in batch.items()})["codes"].equal(out["codes"][order])


def test_epochs_reach_transforms_in_worker_processes():
    "The loader tells `Compose`, which tells `MaskCodes`; batches made in another process are the same, and change with the epoch."
    begin = datetime.datetime(2010, 1, 1)
    events = event_table(pl.DataFrame([(i, begin + datetime.timedelta(days=30 * v), f"C{(i * v + k) % 9}") for i in range(30) for v in range(4) for k in range(3)], schema=["subject_id", "time", "code"], orient="row"))
    store = build_store(EventTable(events), fit_vocabulary(events, min_patients=1))
    def codes(workers, epoch):
        loader = BatchLoader(store, token_budget=100, transform=Compose(prepend_cls, MaskCodes(len(store.vocabulary), 0.4)), layout="flat", num_workers=workers)
        loader.set_epoch(epoch)
        return [b["codes"].tolist() for b in loader]
    assert codes(0, 0) == codes(1, 0) and codes(0, 1) == codes(1, 1) != codes(0, 0)
    assert all(row[0] == CLS for batch in codes(1, 1) for row in batch)


def test_masking_spreads_over_seeds_and_epochs():
    "Over 300 epochs every code of a record is chosen 15 % of the time, and pairs of codes independently of one another."
    batch = {"codes": torch.arange(5, 45).unsqueeze(0), "visit_ids": torch.arange(40).div(4, rounding_mode="floor").unsqueeze(0), "attention_mask": torch.ones(1, 40, dtype=torch.bool)}
    mask, chosen = MaskCodes(VOCABULARY), np.zeros((3000, 40))
    for epoch in range(3000):
        mask.set_epoch(epoch)
        at = mask(batch)["masked_positions"][0]
        chosen[epoch, at[at >= 0]] = 1
    assert np.abs(chosen.mean(0) - 0.15).max() < 5 * (0.15 * 0.85 / 3000) ** 0.5
    correlation = np.corrcoef(chosen.T) - np.eye(40)
    assert np.abs(correlation).max() < 5 / 3000**0.5
    assert abs(chosen.sum(1).var() / (40 * 0.15 * 0.85) - 1) < 0.15  # the number chosen varies as a binomial does


@pytest.mark.parametrize("arguments", [{"hidden_size": 30}, {"num_layers": 0}, {"dropout": -0.1}, {"attention_dropout": 1.0}, {"attention": "causal"}, {"position": "rotary"}, {"embedding_dim": 2.5}, {"visit_heads": 1.5}, {"visit_heads": 9}])
def test_configurations_that_make_no_sense(arguments):
    "Each is refused by name."
    with pytest.raises(ValueError, match=next(iter(arguments)) if "hidden_size" not in arguments else "num_heads"): BEHRTConfig(VOCABULARY, **arguments)


def test_pooling_ignores_padding():
    "What padding holds changes no pooled vector; [CLS] is read from the front."
    hidden, mask = torch.randn(4, 9, 8), torch.arange(9) < torch.tensor([[9], [4], [1], [6]])
    other = torch.where(mask.unsqueeze(-1), hidden, torch.full_like(hidden, float("nan")))
    for pooling in ("mean", "max", "cls"): assert pool_sequence(other, mask, pooling).equal(pool_sequence(hidden, mask, pooling))
    with pytest.raises(ValueError, match="1 of 4 rows have no token, first row 2"): pool_sequence(hidden, mask & (torch.arange(4) != 2).unsqueeze(1))


def test_cls_in_front_changes_neither_gaps_nor_the_past():
    "With visit-causal attention [CLS] sees itself alone, and time features are those of the row without it."
    batch = {"codes": torch.tensor([[7, 8, 9]]), "ages": torch.tensor([[60, 60, 61]]), "visit_ids": torch.tensor([[0, 0, 1]]), "times": torch.tensor([[500., 500., 800.]]), "attention_mask": torch.ones(1, 3, dtype=torch.bool)}
    longer = prepend_cls(batch)
    assert longer["codes"][0, 0] == CLS
    model = encoder("visit_causal")
    gaps = model.embedding.terms(*(longer[k] for k in ("codes", "ages", "visit_ids", "times")))["time"][:, 1:]
    torch.testing.assert_close(gaps, model.embedding.terms(*(batch[k] for k in ("codes", "ages", "visit_ids", "times")))["time"])
    with torch.no_grad():
        alone = model.encode({k: v[:, :1] for k, v in longer.items()})
        torch.testing.assert_close(model.encode(longer)[:, :1], alone, atol=1e-6, rtol=0)


def rows_through(model, work):
    "Rows that each block's feed-forward layer sees while something is done, call by call."
    seen = []
    hooks = [block.up.register_forward_hook(lambda layer, inputs, output: seen.append(len(inputs[0]))) for block in model.blocks]
    work()
    for hook in hooks: hook.remove()
    return seen


def test_work_that_is_saved():
    "Packing drops padding, reading in places spares the last block the rest, checkpointing runs the blocks again and keeps no second set of weights."
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    batch = {"codes": torch.where(mask, 7, 0), "ages": torch.full((3, 9), 50), "visit_ids": torch.where(mask, torch.arange(9), -1), "attention_mask": mask}
    places = torch.tensor([[0, 3], [2, -1], [-1, -1]])
    for packed, n in ((False, 27), (True, 14)):
        model = encoder("visit_causal", packed=packed)
        assert rows_through(model, lambda: model.encode(batch)) == [n, n]
        assert rows_through(model, lambda: model.encode(batch, positions=places)) == [n, 3]
    again = encoder("visit_causal", gradient_checkpointing=True).train()
    assert len(rows_through(again, lambda: again.encode(batch)[mask].sum().backward())) == 4
    assert len(rows_through(again.eval(), lambda: again.encode(batch))) == 2
    out, attentions = again.train().encode(batch, return_attention=True)
    out[mask].sum().backward()
    assert len(attentions) == 2


@pytest.mark.parametrize("of", ["attention", "down"])
def test_dropout_of_the_blocks(of):
    "It acts on what attention adds and on what the feed-forward layer adds, while training."
    batch = {"codes": torch.arange(5, 15).unsqueeze(0), "ages": torch.full((1, 10), 50), "visit_ids": torch.arange(10).unsqueeze(0), "attention_mask": torch.ones(1, 10, dtype=torch.bool)}
    for rate in (0.0, 0.5):
        model = encoder("bidirectional", dropout=rate)
        model.embedding.dropout.p = 0.0
        with torch.no_grad():  # the other branch adds nothing
            for block in model.blocks:
                for p in (block.down if of == "attention" else block.attention.output).parameters(): p.zero_()
        assert torch.allclose(model.encode(batch), model.train().encode(batch), atol=1e-5) == (rate == 0)


def test_attention_dropout():
    "It acts while training, and in evaluation not."
    batch = {"codes": torch.arange(5, 15).unsqueeze(0), "ages": torch.full((1, 10), 50), "visit_ids": torch.arange(10).unsqueeze(0), "attention_mask": torch.ones(1, 10, dtype=torch.bool)}
    for rate in (0.0, 0.5):
        model = encoder("bidirectional", dropout=0.0, attention_dropout=rate)
        still, moving = model.encode(batch), model.train().encode(batch)
        assert torch.allclose(still, moving, atol=1e-5) == (rate == 0)


@pytest.mark.parametrize("packed", [False, True])
def test_places_without_a_token_are_refused(packed):
    "Padding, beyond the row, another number of rows: never another token's vector."
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    batch = {"codes": torch.where(mask, 7, 0), "ages": torch.full((2, 6), 50), "visit_ids": torch.where(mask, 0, -1), "attention_mask": mask}
    model = encoder("bidirectional", packed=packed)
    assert model.encode(batch, positions=torch.tensor([[5, -1], [1, -1]])).shape == (2, 32)
    assert model.encode(batch, positions=torch.full((2, 0), 0)).shape == (0, 32)
    for places, wrong in (([[5], [2]], "1 of 2"), ([[6], [-1]], "1 of 1"), ([[5, 99], [5, 0]], "2 of 4")):
        with pytest.raises(ValueError, match=f"positions: {wrong} are places without a token"): model.encode(batch, positions=torch.tensor(places))
    with pytest.raises(ValueError, match="positions: expected shape"): model.encode(batch, positions=torch.tensor([[0]]))
    with pytest.raises(TypeError, match="attention_mask: expected torch.bool"): model.encode(batch | {"attention_mask": mask.long()})
    with pytest.raises(ValueError, match="has no ages"): model.encode({k: v for k, v in batch.items() if k != "ages"})
    assert prepend_cls(batch)["codes"].shape == (2, 7)  # without times, which are optional


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision(dtype, packed):
    "Autocast with padding, a row of one token, an empty row: finite outputs and gradients, near those of single precision. Weights in bfloat16 too."
    mask = torch.arange(12) < torch.tensor([[12], [1], [0], [5]])
    batch = {"codes": torch.where(mask, torch.randint(5, VOCABULARY, (4, 12)), 0), "ages": torch.where(mask, 50, 0), "visit_ids": torch.where(mask, torch.arange(12) // 2, -1), "times": torch.zeros(4, 12), "attention_mask": mask}
    torch.manual_seed(0)
    masked, model = MaskCodes(VOCABULARY, 0.5)(batch), BEHRTForMLM(BEHRTConfig(VOCABULARY, 16, 32, 2, 4, visit_heads=2, packed=packed, dropout=0.1))
    single = model.eval().loss(model(masked), masked)[0].item()
    with torch.autocast("cpu", dtype): low = model.loss(model(masked), masked)[0]
    assert low.item() == pytest.approx(single, rel=0.02)
    with torch.autocast("cpu", dtype): model.train().loss(model(masked), masked)[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if dtype == torch.bfloat16: assert model.to(dtype).behrt.encode(batch).dtype == dtype


def test_every_projection_learns():
    "Each weight of each block receives a gradient through the projections as modules, so that an adapter put in their place would train."
    class Doubled(nn.Linear):
        "A projection that somebody put in place of another."
        def forward(self, x): return 2 * super().forward(x)
    model = encoder("visit_causal", dropout=0.0).train()
    for block in model.blocks:
        for name in ("query", "key", "value", "output"): setattr(block.attention, name, Doubled(32, 32))
    batch = {"codes": torch.randint(5, VOCABULARY, (2, 12)), "ages": torch.full((2, 12), 50), "visit_ids": torch.arange(12).expand(2, -1), "attention_mask": torch.ones(2, 12, dtype=torch.bool)}
    (model.encode(batch) * torch.randn(2, 12, 32)).sum().backward()
    for block in model.blocks:
        for name in ("query", "key", "value", "output"): assert getattr(block.attention, name).weight.grad.abs().max() > 0, name
