"Adapters: equal to peft's, never touching the base, saved and loaded whole or not at all, on every layer that calls its weight."
import copy
import dataclasses
import json
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from ehr_sequencing.behrt import BEHRT, BEHRTConfig, count_parameters
from ehr_sequencing.classification import BEHRTForSequenceClassification
from ehr_sequencing.lora import (LoRALinear, LoRASettings, active_adapters, add_adapter, apply_lora, apply_lora_to_behrt, assert_adapters_train, delete_adapter, list_adapters, load_lora_weights,
                                 lora_layers, merge_lora, save_lora_weights, set_adapter, unmerge_lora)
from ehr_sequencing.lstm import LSTMConfig, SurvivalLSTM
from ehr_sequencing.masked_codes import BEHRTForMLM, MaskCodes
from ehr_sequencing.saved_models import SavedModel
from ehr_sequencing.survival import BEHRTForSurvival
from ehr_sequencing.vocabulary import SPECIAL_TOKENS, Vocabulary

HORIZONS = (365.0, 730.0)
SIZES = st.integers(1, 24)
TYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


def config(**changes):
    return BEHRTConfig(40, **{"embedding_dim": 8, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.0} | changes)


def batch(seed=0):
    "Flat and hierarchical tensors of four patients, with labels of all models."
    g = torch.Generator().manual_seed(seed)
    codes, visit_ids = torch.randint(5, 40, (4, 12), generator=g), torch.arange(12).div(2, rounding_mode="floor").repeat(4, 1)
    visits = torch.ones(4, 6, dtype=torch.bool)
    return {"codes": codes, "visit_ids": visit_ids, "ages": 40 + visit_ids, "times": visit_ids * 50.0, "attention_mask": torch.ones(4, 12, dtype=torch.bool), "labels": torch.tensor([0.0, 1, 1, 0]),
            "visit_codes": codes.view(4, 6, 2), "visit_mask": torch.ones(4, 6, 2, dtype=torch.bool), "sequence_mask": visits, "visit_ages": 40 + torch.arange(6).repeat(4, 1), "time_features": torch.rand(4, 6, 2, generator=g),
            "horizon_bins": torch.randint(0, 2, (4, 6), generator=g), "horizon_events": torch.rand(4, 6, generator=g) < 0.5, "horizon_shares": torch.rand(4, 6, generator=g), "at_risk": visits, "visit_weights": torch.ones(4, 6),
            "event_times": torch.tensor([2, 5, 3, 4]), "event_indicators": torch.tensor([True, False, True, True])}


MODELS = {"classifier": BEHRTForSequenceClassification, "bidirectional": lambda c: BEHRTForSequenceClassification(dataclasses.replace(c, attention="bidirectional"), pooling="cls"), "masked": BEHRTForMLM,
          "hazards": BEHRTForSurvival, "horizons": lambda c: BEHRTForSurvival(c, HORIZONS)}


def made(name, seed=0, **changes):
    torch.manual_seed(seed)
    return MODELS[name](config(**changes))


def inputs(name):
    return MaskCodes(40, 0.4)(batch()) if name == "masked" else batch()


def filled(model, seed=0, std=0.2):
    "Every B off zero."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for b in layer.lora_B.values(): b.copy_(std * torch.randn(b.shape, generator=generator))
    return model


def steps(model, data, n=3, **options):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, **options)
    for _ in range(n):
        optimizer.zero_grad()
        model.loss(model(data), data)[0].backward()
        optimizer.step()
    return model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def snapshot(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


# the layer

@settings(deadline=None, max_examples=150)
@given(o=SIZES, d=SIZES, data=st.data(), dtype=TYPES, seed=st.integers(0, 99))
def test_a_layer_is_its_formula_and_merging_is_undone_to_the_last_bit(o, d, data, dtype, seed):
    torch.manual_seed(seed)
    names = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))
    chosen = {n: LoRASettings(data.draw(st.integers(1, min(o, d))), data.draw(st.floats(0.1, 64))) for n in names}
    layer = LoRALinear(d, o, chosen[names[0]].rank, chosen[names[0]].alpha, bias=data.draw(st.booleans()), adapter=names[0], dtype=dtype)
    for n in names[1:]: layer.add_adapter(n, chosen[n])
    for b in layer.lora_B.values(): b.data.normal_(std=0.1)
    active = tuple(data.draw(st.lists(st.sampled_from(names), unique=True)))
    layer.set_adapter(active)
    x, before = torch.randn(7, d, dtype=dtype), snapshot(layer)
    W = layer.weight.double() + sum(((chosen[n].alpha / chosen[n].rank) * layer.lora_B[n].double() @ layer.lora_A[n].double() for n in active), torch.zeros(o, d).double())
    expected = x.double() @ W.T + (0 if layer.bias is None else layer.bias.double())
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(dtype, 0.3)  # adapters' alpha up to 64
    torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)
    if not active: return
    model = nn.Sequential(layer)
    merge_lora(model)
    torch.testing.assert_close(model(x).double(), expected, rtol=tolerance, atol=tolerance)
    assert same(snapshot(layer), before) and not any(p.requires_grad for p in model.parameters())
    unmerge_lora(model)
    assert same(snapshot(layer), before) and torch.equal(layer.weight, before["weight"]) and active_adapters(model) == active


@settings(deadline=None, max_examples=60)
@given(o=SIZES, d=SIZES, data=st.data(), alpha=st.integers(1, 64), seed=st.integers(0, 99))
def test_a_layer_is_pefts(o, d, data, alpha, seed):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(seed)
    rank, bias = data.draw(st.integers(1, min(o, d))), data.draw(st.booleans())
    plain = nn.Sequential(nn.Linear(d, o, bias=bias))
    ours, theirs = apply_lora(copy.deepcopy(plain), "0", rank, alpha), get_peft_model(plain, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])).base_model.model
    filled(ours)
    theirs[0].lora_A["default"].weight.data.copy_(ours[0].lora_A["default"])
    theirs[0].lora_B["default"].weight.data.copy_(ours[0].lora_B["default"])
    x = torch.randn(5, d)
    for m in (ours, theirs): m(x).square().mean().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for part in ("lora_A", "lora_B"): torch.testing.assert_close(getattr(ours[0], part)["default"].grad, getattr(theirs[0], part)["default"].weight.grad, rtol=1e-5, atol=1e-5)
    merge_lora(ours)
    theirs[0].merge()
    torch.testing.assert_close(ours[0].weight, theirs[0].base_layer.weight, rtol=1e-5, atol=1e-5)


def test_a_starts_as_pefts_does():
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    ours = apply_lora(nn.Sequential(nn.Linear(300, 200)), "0", 64)[0].lora_A["default"]
    theirs = get_peft_model(nn.Sequential(nn.Linear(300, 200)), LoraConfig(r=64, target_modules=["0"])).base_model.model[0].lora_A["default"].weight
    assert abs(ours.std() / theirs.std() - 1) < 0.02 and ours.abs().max() <= 300**-0.5 and theirs.abs().max() <= 300**-0.5


def test_dropout_acts_on_the_adapters_input_while_training_only():
    torch.manual_seed(0)
    layer = LoRALinear(400, 3, rank=2, alpha=2, dropout=0.5)
    layer.lora_B["default"].data.fill_(1.0)
    x = torch.ones(1, 400)
    layer.eval()
    once = layer(x)
    assert torch.equal(once, layer(x))
    layer.train()
    torch.manual_seed(1); first = layer(x)
    torch.manual_seed(1); assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))
    frozen = nn.functional.linear(x, layer.weight, layer.bias)
    draws = torch.stack([layer(x) - frozen for _ in range(600)])
    spread = draws.std(0) / 600**0.5
    assert ((draws.mean(0) - (once - frozen)).abs() < 5 * spread).all() and spread.min() > 0
    layer.lora_B["default"].data.zero_()
    assert torch.equal(layer(x), frozen)  # the frozen path has no dropout


# on models

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_adapter_trains_and_the_base_does_not_move(name, packed):
    for checkpointing in (False, True):
        model, data = made(name, packed=packed, gradient_checkpointing=checkpointing, dropout=0.1), inputs(name)
        expected = model.eval()(data)
        apply_lora_to_behrt(model, rank=3, train_embeddings=False, lora_feed_forward=True, dropout=0.1)
        assert torch.equal(model(data), expected)  # B = 0
        kept = {n: p.clone() for n, p in model.state_dict().items()}
        assert_adapters_train(model.train(), data)
        assert same(snapshot(model), kept) and all(p.grad is None for p in model.parameters())  # the check leaves nothing behind
        steps(model, data, weight_decay=0.5)
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, kept[n])}
        assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
        assert sum("lora_" in n for n in moved) == 2 * 2 * 6


def test_frozen_embeddings_need_checkpoints_that_are_not_reentrant():
    "PyTorch's older checkpointing gives no gradient at all below an input without one; the encoder uses the newer."
    model, data = made("classifier", gradient_checkpointing=True), batch()
    apply_lora_to_behrt(model, train_embeddings=False, train_head=False)
    assert_adapters_train(model.train(), data)
    layer, x = LoRALinear(4, 4, rank=2), torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not checkpoint(layer, x, use_reentrant=True).requires_grad
    assert checkpoint(layer, x, use_reentrant=False).requires_grad


def test_what_stays_trainable():
    for embeddings in (False, True):
        for head in (False, True):
            model = apply_lora_to_behrt(made("horizons"), rank=2, train_embeddings=embeddings, train_head=head)
            for n, p in model.named_parameters(): assert p.requires_grad == ("lora_" in n or (embeddings and n.startswith("behrt.embedding.")) or (head and not n.startswith("behrt."))), n
            assert count_parameters(model).trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder = apply_lora_to_behrt(BEHRT(config()), rank=2)
    assert all(p.requires_grad == ("lora_" in n or n.startswith("embedding.")) for n, p in encoder.named_parameters())
    only = {k: list(lora_layers(apply_lora_to_behrt(BEHRT(config()), rank=2, lora_attention=k == "attention", lora_feed_forward=k != "attention"))) for k in ("attention", "feed-forward")}
    assert only["attention"] == [f"blocks.{i}.attention.{p}" for i in (0, 1) for p in ("query", "key", "value", "output")] and only["feed-forward"] == [f"blocks.{i}.{p}" for i in (0, 1) for p in ("up", "down")]


def test_refusals_leave_a_model_as_it_was():
    calls = [(ValueError, "at least one to be True", lambda m: apply_lora_to_behrt(m, lora_attention=False)), (ValueError, "rank: expected at most 16 for the layer 'behrt.blocks.0.attention.query'", lambda m: apply_lora_to_behrt(m, rank=17)),
             (ValueError, "rank: expected a positive integer, got 0", lambda m: apply_lora_to_behrt(m, rank=0)), (ValueError, "rank: expected a positive integer, got 2.0", lambda m: apply_lora_to_behrt(m, rank=2.0)),
             (ValueError, "alpha", lambda m: apply_lora_to_behrt(m, alpha=float("nan"))), (ValueError, "alpha", lambda m: apply_lora_to_behrt(m, alpha=-1)), (ValueError, "dropout", lambda m: apply_lora_to_behrt(m, dropout=1)),
             (ValueError, "adapter: expected a name", lambda m: apply_lora_to_behrt(m, adapter="a.b")), (ValueError, "adapter: expected a name", lambda m: apply_lora_to_behrt(m, adapter="values")),
             (ValueError, "'keyy' matches no module", lambda m: apply_lora(m, ["query", "keyy"])), (TypeError, "target_modules: expected names, got int", lambda m: apply_lora(m, [3])), (ValueError, "a Embedding", lambda m: apply_lora(m, "embedding.code")),
             (ValueError, "trainable: 'heads' matches no part", lambda m: apply_lora(m, "query", trainable="heads")), (ValueError, "trainable: names the weight of 'behrt.blocks.0.attention.query' too", lambda m: apply_lora(m, "query", rank=2, trainable=["head", "attention"])), (ValueError, "has no adapters", merge_lora), (ValueError, "has no adapters", unmerge_lora), (ValueError, "has no adapters", lambda m: add_adapter(m, "x"))]
    for error, text, call in calls:
        model = made("classifier")
        before = snapshot(model)
        with pytest.raises(error, match=text): call(model)
        assert same(snapshot(model), before) and all(p.requires_grad for p in model.parameters()) and not lora_layers(model)
    with pytest.raises(TypeError, match="expected a BEHRT or a model that holds one"): apply_lora_to_behrt(SurvivalLSTM(LSTMConfig(40, 8, 16)))
    twice = apply_lora_to_behrt(made("classifier"))
    for call in (apply_lora_to_behrt, lambda m: apply_lora(m, "up")):
        with pytest.raises(ValueError, match=r"has adapters already \(default\)"): call(twice)


def test_layers_whose_weights_are_read_raw_are_refused():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    for name in ("out_proj", "linear1", "linear2"):
        with pytest.raises(ValueError, match="whose weight is read by Transformer|whose weight is read by Multihead"): apply_lora(encoder, name, rank=2)
    with pytest.raises(ValueError, match="whose weight is read by MultiheadAttention directly"): apply_lora(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), "a.out_proj", rank=2)
    lstm = SurvivalLSTM(LSTMConfig(40, 8, 16), HORIZONS)
    with pytest.raises(ValueError, match="whose kernel reads its weights directly"): apply_lora(lstm, [n for n, m in lstm.named_modules() if isinstance(m, nn.LSTM)][0])
    with pytest.raises(ValueError, match="expected a plain nn.Linear"): apply_lora(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), "0", rank=2)
    twins = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    twins["b"].weight = twins["a"].weight
    with pytest.raises(ValueError, match="shares its weight with 'b'"): apply_lora(twins, "a", rank=2)


def test_one_layer_under_two_names_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    apply_lora(model, ["a"], rank=2)
    assert model["b"] is model["a"] and isinstance(model["b"], LoRALinear) and count_parameters(model).trainable == 16


def test_old_gradients_are_not_used():
    model, data = made("classifier"), batch()
    model.loss(model(data), data)[0].backward()
    before = snapshot(model)
    apply_lora_to_behrt(model, rank=2, train_embeddings=False, train_head=False)
    torch.optim.SGD(model.parameters(), 1.0).step()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)
    model.train(); steps(model, data, n=1)
    model.loss(model(data), data)[0].backward()
    add_adapter(model, "second", rank=2)  # the first one's gradients are left over
    first = {n: p.clone() for n, p in model.named_parameters() if n.endswith(".default")}
    torch.optim.SGD(model.parameters(), 1.0, weight_decay=0.5).step()
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in first.items())


def test_copies_pickles_and_state_dicts():
    model, data = filled(apply_lora_to_behrt(made("horizons"), rank=2)).eval(), batch()
    add_adapter(model, "second", rank=3)
    filled(model, seed=1)
    expected = model(data)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(data), expected) and list_adapters(other) == list_adapters(model) and active_adapters(other) == ("second",)
        set_adapter(other, "default")
        assert not torch.equal(other(data), expected) and torch.equal(model(data), expected)
    fresh = apply_lora_to_behrt(made("horizons", seed=3), rank=2).eval()
    add_adapter(fresh, "second", rank=3)
    merge_lora(model)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(data), expected)
    copied = copy.deepcopy(model)
    unmerge_lora(copied)
    assert torch.equal(copied(data), expected)
    with pytest.raises(RuntimeError, match="Call unmerge_lora first"): model.load_state_dict(fresh.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whole_models_in_other_types(dtype):
    model = filled(apply_lora_to_behrt(made("classifier"), rank=2)).to(dtype).eval()
    data = {k: v.to(dtype) if v.is_floating_point() and k != "times" else v for k, v in batch().items()}
    layer, x = model.behrt.blocks[0].attention.query, torch.randn(3, 16, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    merge_lora(model)
    torch.testing.assert_close(layer(x), out, rtol=0.1 if dtype == torch.bfloat16 else 1e-9, atol=0.1 if dtype == torch.bfloat16 else 1e-9)
    del data


def test_autocast_trains_every_adapter():
    model, data = apply_lora_to_behrt(made("horizons"), rank=2, train_embeddings=False).train(), batch()
    kept = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16): loss = model.loss(model(data), data)[0]
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert {n for n, t in model.state_dict().items() if not torch.equal(t, kept[n])} == {n for n, p in model.named_parameters() if p.requires_grad}


@settings(deadline=None, max_examples=40)
@given(actions=st.lists(st.tuples(st.sampled_from(["add", "delete", "set", "merge", "unmerge"]), st.lists(st.sampled_from("abc"), max_size=3, unique=True)), max_size=12), seed=st.integers(0, 9))
def test_any_order_of_calls_leaves_the_base_alone_and_the_output_right(actions, seed):
    "Switching, adding, deleting and merging in any order: the output is always that of the base and the active or merged adapters."
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(3, 5)
    base = snapshot(model)
    apply_lora(model, ["0", "2"], rank=2, adapter="a")
    products = {"a": {}}
    def draw(n):
        products[n] = {}
        for name, layer in lora_layers(model).items():
            layer.lora_B[n].data.normal_(std=0.3)
            products[n][name] = layer.adapters[n].scale * layer.lora_B[n].detach() @ layer.lora_A[n].detach()
    draw("a")
    active, merged = ("a",), ()
    for action, names in actions:
        try:
            if action == "add" and names: add_adapter(model, names[0], rank=3, alpha=2); draw(names[0]); active = (names[0],)
            elif action == "delete" and names: delete_adapter(model, names[0]); products.pop(names[0]); active = tuple(n for n in active if n != names[0])
            elif action == "set": set_adapter(model, *names); active = tuple(names)
            elif action == "merge": merge_lora(model, names or None); merged = tuple(names) or active
            elif action == "unmerge": unmerge_lora(model); merged = ()
        except ValueError: pass  # refused: nothing has changed
        W = {n: base[f"{n}.weight"] + sum((products[a][n] for a in merged or active), torch.zeros(())) for n in ("0", "2")}
        expected = torch.tanh(x @ W["0"].T + base["0.bias"]) @ W["2"].T + base["2.bias"]
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        assert set(list_adapters(model)) == set(products) and all(torch.equal(t, model.state_dict()[n]) for n, t in base.items())
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == (set() if merged else {f"{n}.lora_{part}.{a}" for n in ("0", "2") for part in "AB" for a in active})


# folders

@settings(deadline=None, max_examples=25)
@given(rank=st.integers(1, 16), alpha=st.floats(0.5, 40), embeddings=st.booleans(), head=st.booleans(), forward=st.booleans(), trained=st.booleans(), merged=st.booleans())
def test_saved_and_loaded_is_the_same(tmp_path_factory, rank, alpha, embeddings, head, forward, trained, merged):
    folder, data = tmp_path_factory.mktemp("lora"), batch()
    model = apply_lora_to_behrt(made("classifier"), rank, True, embeddings, head, forward, alpha)
    steps(model.train(), data, n=2)
    model.eval()
    if merged: merge_lora(model)
    expected = model(data)
    if merged: unmerge_lora(model)
    beside = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    if merged: merge_lora(model)
    save_lora_weights(model, folder / "a", adapter="default", trained=trained)
    file = load_file(folder / "a" / "adapter.safetensors")
    assert {n for n in file if not n.endswith((".lora_A", ".lora_B"))} == (beside if trained else set())
    fresh = made("classifier").eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = load_lora_weights(fresh, folder / "a")
    assert set(report.missing) == (set() if trained else beside) and len(caught) == bool(report.missing) and list_adapters(fresh) == list_adapters(model)
    if not report.missing: torch.testing.assert_close(fresh(data), expected, rtol=1e-3 if merged else 0, atol=1e-3 if merged else 0)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == beside | {n for n in fresh.state_dict() if "lora_" in n}


@pytest.fixture
def saved(tmp_path):
    model = filled(apply_lora_to_behrt(made("classifier"), rank=3, train_embeddings=False))
    save_lora_weights(model, tmp_path / "adapter", trained=True)
    return model, tmp_path / "adapter"


def rewritten(folder, change=lambda c: None, tensors=lambda t: None):
    "The folder again, consistent in itself, with its settings or tensors changed."
    from ehr_sequencing.saved_models import write_tensors
    c, t = json.loads((folder / "adapter.json").read_text()), load_file(folder / "adapter.safetensors")
    change(c); tensors(t)
    write_tensors(folder / "adapter.safetensors", t, c)
    (folder / "adapter.json").write_text(json.dumps(c))


@pytest.mark.parametrize(("text", "change", "tensors"), [
    ("has no tensor 'behrt.blocks.0.attention.query.lora_A'", None, lambda t: t.pop("behrt.blocks.0.attention.query.lora_A")),
    ("has the tensor 'other', which its settings do not name", None, lambda t: t.update(other=torch.zeros(2))),
    ("'behrt.blocks.1.attention.key.lora_B' has shape", None, lambda t: t.update({"behrt.blocks.1.attention.key.lora_B": torch.zeros(3, 3)})),
    ("'head.weight' has shape", None, lambda t: t.update({"head.weight": torch.zeros(2, 16)})),
    ("belongs on the layer 'behrt.blocks.7.attention.query'", lambda c: c["layers"].append("behrt.blocks.7.attention.query"), None),
    ("is a LayerNorm; expected a plain nn.Linear", lambda c: c["layers"].append("behrt.norm"), None),
    ("has no tensor 'behrt.more'", lambda c: c["base"].update({"behrt.more": "0"}), None),
    ("it had no tensor 'behrt.norm.bias'", lambda c: c["base"].pop("behrt.norm.bias"), None),
    ("'behrt.norm.bias' is another tensor", lambda c: c["base"].update({"behrt.norm.bias": "0"}), None),
    ("has the trained tensor 'tail'", lambda c: c["trained"].update(tail="0"), lambda t: t.update(tail=torch.zeros(1))),
    ("an adapter has no setting 'rotary'", lambda c: c["settings"].update(rotary=True), None),
    ("rank: expected a positive integer", lambda c: c["settings"].update(rank=0), None),
    ("has no 'base'", lambda c: c.pop("base"), None)])
def test_a_folder_that_does_not_fit_is_refused_by_name(saved, text, change, tensors):
    folder = saved[1]
    rewritten(folder, change or (lambda c: None), tensors or (lambda t: None))
    for model in (made("classifier"), apply_lora_to_behrt(made("classifier"), rank=3, train_embeddings=False)):
        before, trainable = snapshot(model), [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=text): load_lora_weights(model, folder)
        assert same(snapshot(model), before) and [p.requires_grad for p in model.parameters()] == trainable


def test_damage_is_told(saved):
    folder = saved[1]
    whole = (folder / "adapter.safetensors").read_bytes()
    for n in (3, 40, len(whole) // 2, len(whole) - 1):
        (folder / "adapter.safetensors").write_bytes(whole[:n])
        with pytest.raises(ValueError, match="damaged, it"): load_lora_weights(made("classifier"), folder)
    (folder / "adapter.safetensors").write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    with pytest.raises(ValueError, match="is not the one that was written"): load_lora_weights(made("classifier"), folder)
    (folder / "adapter.safetensors").write_bytes(whole)
    text = (folder / "adapter.json").read_text()
    (folder / "adapter.json").write_text(text.replace('"alpha": 16.0', '"alpha": 8.0'))
    with pytest.raises(ValueError, match="is not the one that was saved with the weights. Copy the folder again"): load_lora_weights(made("classifier"), folder)
    (folder / "adapter.json").write_text(text[:50])
    with pytest.raises(ValueError, match="is no JSON"): load_lora_weights(made("classifier"), folder)
    (folder / "adapter.json").unlink()
    with pytest.raises(FileNotFoundError, match="not there"): load_lora_weights(made("classifier"), folder)


def test_a_pickle_is_never_read(saved, tmp_path):
    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path / "exploded"), "w"))
    (saved[1] / "adapter.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="damaged"): load_lora_weights(made("classifier"), saved[1])
    assert not (tmp_path / "exploded").exists()


def test_a_save_that_fails_leaves_the_old_one(saved, monkeypatch):
    import ehr_sequencing.lora as lora
    model, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    def full(*args, **kwargs): raise OSError("the disk is full")
    monkeypatch.setattr(lora, "write_tensors", full)
    with pytest.raises(OSError, match="the disk is full"): save_lora_weights(filled(model, seed=9), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and [p.name for p in folder.parent.iterdir()] == ["adapter"]
    (folder / "notes.txt").write_text("mine")
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="holds 'notes.txt'"): save_lora_weights(model, folder)
    with pytest.raises(FileExistsError, match="is a file"): save_lora_weights(model, folder / "notes.txt")


def test_two_adapters_on_one_base_each_in_its_folder(tmp_path):
    data, model = batch(), apply_lora_to_behrt(made("classifier"), rank=2, train_embeddings=False, train_head=False, adapter="first")
    steps(model, data)
    add_adapter(model, "second", rank=4, alpha=8)
    steps(model, {**data, "labels": 1 - data["labels"]})
    outputs = {}
    for n in ("first", "second"):
        set_adapter(model, n); outputs[n] = model.eval()(data)
        save_lora_weights(model, tmp_path / n)
    set_adapter(model, "first", "second"); outputs["both"] = model(data)
    loaded = made("classifier").eval()
    for n in ("first", "second"):
        assert load_lora_weights(loaded, tmp_path / n).missing == [] and torch.equal(loaded(data), outputs[n])
    set_adapter(loaded, "first", "second")
    assert torch.equal(loaded(data), outputs["both"])
    merge_lora(loaded); torch.testing.assert_close(loaded(data), outputs["both"], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="merged into the weights"): load_lora_weights(loaded, tmp_path / "first")
    unmerge_lora(loaded)
    assert load_lora_weights(loaded, tmp_path / "first", adapter="third").adapter == "third" and active_adapters(loaded) == ("third",)
    assert torch.equal(loaded(data), outputs["first"]) and list(list_adapters(loaded)) == ["first", "second", "third"]


def test_an_adapter_that_is_there_is_filled_and_keeps_its_dropout(saved):
    model, folder = saved
    other = filled(apply_lora_to_behrt(made("classifier"), rank=3, train_embeddings=False, dropout=0.3), seed=5)
    report = load_lora_weights(other, folder)
    assert report.settings == list_adapters(other)["default"] == LoRASettings(3, dropout=0.3) and report.missing == []
    assert torch.equal(other.eval()(batch()), model.eval()(batch()))
    with pytest.raises(ValueError, match="adapter: expected a name of letters"): load_lora_weights(made("classifier"), folder, adapter="")


def test_the_bias_of_an_adapted_layer_may_be_trained():
    model = apply_lora(made("classifier"), "query", rank=2, trainable="query.bias")
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n] == [f"behrt.blocks.{i}.attention.query.bias" for i in (0, 1)]
    before = snapshot(model)
    steps(model.train(), batch())
    merge_lora(model); unmerge_lora(model)
    assert all(torch.equal(t, before[n]) != n.endswith("query.bias") for n, t in model.state_dict().items() if "lora_" not in n)


def test_adapters_on_different_layers(tmp_path):
    "Merged, one adapter counts alone, also in layers that it is not on."
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(3, 5)
    first, second = (filled(apply_lora(copy.deepcopy(plain), layer, 2, adapter=n)) for layer, n in (("0", "a"), ("2", "b")))
    save_lora_weights(second, tmp_path / "b")
    expected = {"a": first(x), "b": second(x)}
    assert load_lora_weights(first, tmp_path / "b").layers == ["2"] and torch.equal(first(x), expected["b"])
    for active in ("a", "b"):
        for merged in ("a", "b"):
            set_adapter(first, active)
            assert torch.equal(first(x), expected[active])
            merge_lora(first, merged)
            torch.testing.assert_close(first(x), expected[merged], rtol=1e-5, atol=1e-5)
            unmerge_lora(first)
    delete_adapter(first, "a")
    assert type(first[0]) is nn.Linear and list(lora_layers(first)) == ["2"]


class Adapted(SavedModel):
    "Builds its adapters itself."
    config_class, encoder = BEHRTConfig, "behrt"

    def __init__(self, config, use_lora=False, rank=3):
        super().__init__(config, use_lora=use_lora, rank=rank)
        self.behrt, self.head = BEHRT(config), nn.Linear(config.hidden_size, 1)
        if use_lora: apply_lora_to_behrt(self, rank)

    def forward(self, batch): return self.head(self.behrt.encode(batch)).mean((1, 2))


def test_weights_move_into_models_with_adapters_also_to_another_vocabulary(tmp_path):
    codes = [*SPECIAL_TOKENS, *(f"C{i}" for i in range(35))]
    old, new = Vocabulary(codes), Vocabulary([*SPECIAL_TOKENS, *(f"C{i}" for i in range(30, 2, -1)), "NEW"])
    torch.manual_seed(0)
    pretrained = BEHRTForMLM(config())
    pretrained.save_pretrained(tmp_path / "pretrained", old)
    model = Adapted.from_pretrained(tmp_path / "pretrained", use_lora=True)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in pretrained.state_dict().items() if n.startswith("behrt."))
    assert set(model.loaded.fresh) == {n for n in model.state_dict() if "lora_" in n} | {"head.weight", "head.bias"}
    filled(model)
    model.save_pretrained(tmp_path / "adapted")
    moved = Adapted.from_pretrained(tmp_path / "adapted", vocabulary=new)
    data = batch()
    data["codes"] = data["codes"].clamp(8, 35)  # C3 to C30
    there = {**data, "codes": torch.tensor([[new.index[old.tokens[c]] for c in row] for row in data["codes"].tolist()])}
    torch.testing.assert_close(moved(there), model.eval()(data), rtol=1e-5, atol=1e-5)
    assert count_parameters(moved).trainable == sum(p.numel() for n, p in moved.named_parameters() if "lora_" in n or n.startswith(("head", "behrt.embedding")))
    with pytest.raises(ValueError, match=r"Merge the adapters into the weights before saving: merge_lora\(model, remove=True\)"): BEHRTForMLM.from_pretrained(tmp_path / "adapted")
    assert Adapted.from_pretrained(tmp_path / "adapted").loaded.fresh == []
    with pytest.raises(ValueError, match="has shape"): Adapted.from_pretrained(tmp_path / "adapted", rank=2)


def test_adapters_put_on_afterwards_are_no_saved_model(tmp_path):
    apply_lora_to_behrt(made("classifier")).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="of an adapter, for which a BEHRTForSequenceClassification of these settings has no place"): BEHRTForSequenceClassification.from_pretrained(tmp_path / "m")


def test_a_lost_adapter_tensor_is_damage_and_not_fresh(tmp_path):
    torch.manual_seed(0)
    Adapted(config(), use_lora=True).save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    from safetensors import safe_open
    with safe_open(path, "pt") as file: notes, tensors = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}
    tensors.pop("behrt.blocks.0.attention.query.lora_A.default")
    save_file(tensors, path, metadata=notes)
    with pytest.raises(ValueError, match="the tensor 'behrt.blocks.0.attention.query.lora_A.default' is gone"): Adapted.from_pretrained(tmp_path / "m")
