"Saved models: folders that hold what was saved, or say what is wrong with them; weights that move between heads and vocabularies."
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from ehr_sequencing.behrt import BEHRT, BEHRTConfig
from ehr_sequencing.classification import BEHRTForSequenceClassification
from ehr_sequencing.lstm import LSTMConfig, SurvivalLSTM
from ehr_sequencing.masked_codes import BEHRTForMLM
from ehr_sequencing.saved_models import SavedModel, vocabulary_moves
from ehr_sequencing.survival import BEHRTForSurvival, SurvivalModel
from ehr_sequencing.vocabulary import SPECIAL_TOKENS, Vocabulary

HORIZONS = (30.0, 365.0)
CODES = [f"C{i}" for i in range(30)]


WITH_EDGES = Vocabulary([*SPECIAL_TOKENS, *CODES], {"LAB": [1.5, 2.25]}, ["OUT*"], ["icd3"], {"C1": "a name"})


def vocabulary_of(codes):
    return Vocabulary([*SPECIAL_TOKENS, *codes])


def small(vocab_size, **changes):
    return BEHRTConfig(vocab_size, **{"embedding_dim": 8, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_visits": 20} | changes)


def build(name, vocab_size, seed=0):
    "One of each kind of model, with weights that are none of the constructor's constants."
    torch.manual_seed(seed)
    model = {"encoder": lambda: BEHRT(small(vocab_size, position="learned")), "mlm": lambda: BEHRTForMLM(small(vocab_size)),
             "binary": lambda: BEHRTForSequenceClassification(small(vocab_size), class_weights=3), "classes": lambda: BEHRTForSequenceClassification(small(vocab_size, attention="bidirectional"), 4, "multiclass", "cls", [1, 2, 3, 4]),
             "visits": lambda: BEHRTForSurvival(small(vocab_size)), "horizons": lambda: BEHRTForSurvival(small(vocab_size), HORIZONS), "lstm": lambda: SurvivalLSTM(LSTMConfig(vocab_size, 8, 16), HORIZONS)}[name]()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
    return model.eval()


KINDS = ("encoder", "mlm", "binary", "classes", "visits", "horizons", "lstm")


def make_inputs(vocab_size, seed=0, codes=None):
    "A batch with all tensors of the data contract; three patients of four visits of two codes."
    generator = torch.Generator().manual_seed(seed)
    if codes is None: codes = torch.randint(5, vocab_size, (3, 8), generator=generator)
    visit_ids = torch.arange(8).div(2, rounding_mode="floor").repeat(3, 1)
    return {"codes": codes, "ages": 50 + visit_ids, "visit_ids": visit_ids, "times": visit_ids * 40.0, "attention_mask": torch.ones(3, 8, dtype=torch.bool), "visit_codes": codes.view(3, 4, 2),
            "visit_mask": torch.ones(3, 4, 2, dtype=torch.bool), "sequence_mask": torch.ones(3, 4, dtype=torch.bool), "visit_ages": 50 + torch.arange(4).repeat(3, 1),
            "time_features": torch.ones(3, 4, 2), "rows": torch.arange(3), "first_visits": torch.zeros(3, dtype=torch.int64)}


@torch.no_grad()
def outputs(model, batch):
    if isinstance(model, BEHRT): return model.encode(batch)
    return model(batch | ({"masked_positions": torch.tensor([[0, 3], [1, -1], [7, 2]])} if isinstance(model, BEHRTForMLM) else {}))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved(kind, tmp_path):
    model, batch = build(kind, 35), make_inputs(35)
    model.save_pretrained(tmp_path / "model", vocabulary_of(CODES))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["config.json", "model.safetensors", "vocabulary.json"]
    for cls in (type(model), SavedModel):
        loaded = cls.from_pretrained(tmp_path / "model")
        assert type(loaded) is type(model) and same(loaded, model) and torch.equal(outputs(loaded, batch), outputs(model, batch))
        assert json.dumps(loaded.settings) == json.dumps(model.settings) and not loaded.training and loaded.vocabulary.tokens == [*SPECIAL_TOKENS, *CODES]
        assert loaded.loaded.fresh == loaded.loaded.left == loaded.loaded.codes_new == [] and loaded.loaded.codes_kept == CODES
    loaded.save_pretrained(tmp_path / "again")  # and so on: the second folder is the first, byte for byte
    for path in (tmp_path / "model").iterdir(): assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("source", [k for k in KINDS if k != "lstm"])
def test_the_encoder_moves_between_all_heads(source, tmp_path):
    model, batch = build(source, 35), make_inputs(35)
    model.save_pretrained(tmp_path / "model", vocabulary_of(CODES))
    encoder = model if source == "encoder" else model.behrt
    heads = {BEHRT: {}, BEHRTForMLM: {}, BEHRTForSequenceClassification: {"n_labels": 3, "problem": "multilabel", "pooling": "max", "class_weights": None}, BEHRTForSurvival: {"horizons": [10, 20, 30], "attention": "visit_causal"}}
    for cls, options in heads.items():
        loaded = cls.from_pretrained(tmp_path / "model", **options)
        moved = loaded if cls is BEHRT else loaded.behrt
        assert same(moved, encoder) and loaded.vocabulary.tokens == [*SPECIAL_TOKENS, *CODES]
        if moved.config == encoder.config: assert torch.equal(outputs(moved, batch), outputs(encoder, batch))
        head = [n for n in loaded.state_dict() if not n.startswith("behrt.")]
        assert loaded.loaded.fresh == ([] if cls in (BEHRT, type(model)) and not options else head)
        torch.manual_seed(5); first = cls.from_pretrained(tmp_path / "model", **options)
        torch.manual_seed(5); second = cls.from_pretrained(tmp_path / "model", **options)
        assert same(first, second)  # fresh parts come from torch's generator


def test_another_question_takes_a_fresh_head(tmp_path):
    model = build("horizons", 35)
    model.save_pretrained(tmp_path / "model")
    assert SurvivalModel.from_pretrained(tmp_path / "model", horizons=[30, 365]).loaded.fresh == []  # the same, written as integers
    other = SurvivalModel.from_pretrained(tmp_path / "model", horizons=[60, 730])  # of the same shape: the old numbers would fit
    assert same(other.behrt, model.behrt) and not torch.equal(other.head.layers[0].weight, model.head.layers[0].weight)
    assert len(other.loaded.fresh) == 4 and other.horizons == (60.0, 730.0)
    kept = SurvivalModel.from_pretrained(tmp_path / "model", dropout=0.4)
    assert same(kept, model) and kept.config.dropout == 0.4 and kept.behrt.config.dropout == 0.4
    build("classes", 35).save_pretrained(tmp_path / "classes")
    assert BEHRTForSequenceClassification.from_pretrained(tmp_path / "classes", pooling="mean", class_weights=None).loaded.fresh == []
    fresh = BEHRTForSequenceClassification.from_pretrained(tmp_path / "classes", n_labels=5, class_weights=None)
    assert fresh.loaded.fresh == ["head.weight", "head.bias"] and fresh.head.weight.shape == (5, 16)


@settings(max_examples=60, deadline=None)
@given(old=st.lists(st.sampled_from(CODES), unique=True, min_size=1), new=st.lists(st.sampled_from(CODES), unique=True, min_size=1), kind=st.sampled_from(["encoder", "mlm", "binary", "lstm"]), seed=st.integers(0, 99))
def test_rows_move_by_code_between_any_two_vocabularies(tmp_path_factory, old, new, kind, seed):
    folder, old, new = tmp_path_factory.mktemp("move"), vocabulary_of(old), vocabulary_of(new)
    model = build(kind, len(old), seed)
    model.save_pretrained(folder / "model", old)
    torch.manual_seed(seed + 1000)
    loaded = type(model).from_pretrained(folder / "model", vocabulary=new)
    torch.manual_seed(seed + 1000)
    plain = type(model).from_settings(loaded.settings).state_dict()
    by_token = {"encoder": ["embedding.code.weight"], "mlm": ["behrt.embedding.code.weight", "head.bias"], "binary": ["behrt.embedding.code.weight"], "lstm": ["lstm_encoder.visit_encoder.code.weight"]}[kind]
    for name, tensor in loaded.state_dict().items():
        theirs = model.state_dict()[name]
        if name not in by_token: assert torch.equal(tensor, theirs); continue
        for j, token in enumerate(new.tokens): assert torch.equal(tensor[j], theirs[old.index[token]] if token in old.index else plain[name][j])
    report, shared = loaded.loaded, set(old.tokens) & set(new.tokens)
    assert set(report.codes_kept) == shared - set(SPECIAL_TOKENS) and set(report.codes_new) == set(new.tokens) - shared and set(report.codes_dropped) == set(old.tokens) - shared
    assert "\n" not in repr(report) and f"{len(shared) - 5} of {len(new) - 5} codes known" in repr(report)
    common = sorted(shared - set(SPECIAL_TOKENS))
    if not common: return
    drawn = np.random.default_rng(seed).choice(common, (3, 8))  # records of shared codes mean the same to both
    theirs, ours = (outputs(m, make_inputs(0, codes=torch.tensor([v.encode(row) for row in drawn]))) for m, v in ((model, old), (loaded, new)))
    if kind == "mlm": theirs, ours = (x[:, vocabulary_moves(old, new)[i]] for i, x in enumerate((theirs, ours)))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_there_and_back_again(tmp_path):
    model, old = build("mlm", 35), vocabulary_of(CODES)
    model.save_pretrained(tmp_path / "a", old)
    wider = vocabulary_of([*reversed(CODES), "X", "Y"])
    BEHRTForMLM.from_pretrained(tmp_path / "a", vocabulary=wider).save_pretrained(tmp_path / "b")
    assert same(BEHRTForMLM.from_pretrained(tmp_path / "b", vocabulary=old), model)


def test_tied_weights_are_saved_once_and_tied_again(tmp_path):
    class TiedForCodes(SavedModel):
        config_class, encoder, vocabulary_rows = BEHRTConfig, "behrt", ("output.bias",)

        def __init__(self, config, tie=True):
            super().__init__(config, tie=tie)
            self.output, self.behrt = nn.Linear(config.embedding_dim, config.vocab_size), BEHRT(config)  # the tied name comes first
            if tie: self.output.weight = self.behrt.embedding.code.weight

    model = TiedForCodes(small(35))
    model.save_pretrained(tmp_path / "tied", vocabulary_of(CODES))
    untied = TiedForCodes(small(35), tie=False)
    untied.save_pretrained(tmp_path / "untied", vocabulary_of(CODES))
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("tied", "untied")]
    assert sizes[1] - sizes[0] > 35 * 8 * 4 * 0.9
    for vocabulary in (None, vocabulary_of(CODES[::-1])):
        loaded = TiedForCodes.from_pretrained(tmp_path / "tied", vocabulary=vocabulary)
        assert loaded.output.weight is loaded.behrt.embedding.code.weight and loaded.loaded.fresh == []
    assert torch.equal(loaded.output.weight[5:].flip(0), model.output.weight[5:]) and torch.equal(loaded.output.bias[5:].flip(0), model.output.bias[5:])
    assert same(BEHRT.from_pretrained(tmp_path / "tied"), model.behrt)
    apart = TiedForCodes.from_pretrained(tmp_path / "tied", tie=False)  # a tie that the model does not have: both get the numbers
    assert torch.equal(apart.output.weight, apart.behrt.embedding.code.weight) and apart.output.weight is not apart.behrt.embedding.code.weight
    with pytest.raises(ValueError, match="'output.weight' and 'behrt.embedding.code.weight' differ"): TiedForCodes.from_pretrained(tmp_path / "untied", tie=True)


def test_half_precision_keeps_its_numbers(tmp_path):
    model = build("binary", 35).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    loaded = BEHRTForSequenceClassification.from_pretrained(tmp_path / "model")
    assert loaded.head.weight.dtype == torch.float32 and all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    build("binary", 35).save_pretrained(folder, WITH_EDGES)
    return folder


def loads_as(model, folder):
    "Whether the folder loads as this model. Anything but the model itself must be an error that names a file in the folder."
    try: loaded = BEHRTForSequenceClassification.from_pretrained(folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error) and any(name in str(error) for name in ("config.json", "model.safetensors", "vocabulary.json")), error
        return False
    assert same(loaded, model) and loaded.settings == model.settings and loaded.vocabulary == WITH_EDGES
    return True


def spoil(saved, tmp_path_factory, name, change):
    folder = tmp_path_factory.mktemp("spoiled") / "model"
    shutil.copytree(saved, folder)
    (folder / name).write_bytes(change((saved / name).read_bytes()))
    return folder


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(["config.json", "model.safetensors", "vocabulary.json"]), where=st.floats(0, 1, exclude_max=True), in_header=st.booleans(), flip=st.integers(1, 255))
def test_a_changed_byte_is_an_error_or_changes_nothing(saved, tmp_path_factory, name, where, in_header, flip):
    def change(data):
        size = int.from_bytes(data[:8], "little") + 8 if in_header and name == "model.safetensors" else len(data)
        at = int(where * size)
        return data[:at] + bytes([data[at] ^ flip]) + data[at + 1:]
    folder = spoil(saved, tmp_path_factory, name, change)
    loads_as(build("binary", 35), folder)


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(["config.json", "model.safetensors", "vocabulary.json"]), where=st.floats(0, 1, exclude_max=True))
def test_a_file_that_ends_too_early_is_an_error(saved, tmp_path_factory, name, where):
    folder = spoil(saved, tmp_path_factory, name, lambda data: data[:int(where * len(data))])
    assert not loads_as(build("binary", 35), folder)


def test_damage_in_the_weights_names_the_tensor(saved, tmp_path_factory):
    data = (saved / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:8 + length]).items():
        if name == "__metadata__": continue
        at = 8 + length + entry["data_offsets"][0]
        for change, text in ((lambda d: d[:at] + bytes([d[at] ^ 64]) + d[at + 1:], f"'{name}' is not the one that was written"), (lambda d: d[:at + 1], f"it ends in the tensor '{name}'")):
            folder = spoil(saved, tmp_path_factory, "model.safetensors", change)
            with pytest.raises(ValueError, match=f"model.safetensors: damaged, .*{text}"): BEHRTForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("notes", ["[]", "3", "null", "{", '{"tied": [3]}', '{"sha256": [3]}', '{"tied": {"a": "b"}}', '{"sha256": {"a": "b"}}'])
def test_notes_that_are_none_are_damage(saved, tmp_path, notes):
    shutil.copytree(saved, tmp_path / "model")
    save_file(load_file(saved / "model.safetensors"), tmp_path / "model" / "model.safetensors", metadata={"ehr_sequencing": notes})
    with pytest.raises(ValueError, match="model.safetensors: damaged"): BEHRTForSequenceClassification.from_pretrained(tmp_path / "model")


def test_files_of_two_models_are_not_mixed(tmp_path):
    "Settings that do not show in the shapes, weights and codes of another run: each pair fits, and is refused."
    for name, heads, codes in (("a", 2, CODES), ("b", 4, CODES[::-1])):
        torch.manual_seed(0)
        BEHRTForSurvival(small(35, num_heads=heads), HORIZONS).save_pretrained(tmp_path / name, vocabulary_of(codes))
    for mixed in ("config.json", "vocabulary.json", "model.safetensors"):
        shutil.copytree(tmp_path / "a", tmp_path / mixed)
        shutil.copy(tmp_path / "b" / mixed, tmp_path / mixed / mixed)
        with pytest.raises(ValueError, match="is not the one that was saved with the weights|is not the vocabulary"): BEHRTForSurvival.from_pretrained(tmp_path / mixed)


class Trap:
    "An object whose unpickling would be noticed."
    def __reduce__(self): return (exec, ("import builtins; builtins.sprung = True",))


def test_no_pickle_is_read(saved, tmp_path_factory):
    import builtins
    for name in ("model.safetensors", "config.json", "vocabulary.json"):
        folder = spoil(saved, tmp_path_factory, name, lambda data: pickle.dumps(Trap()))
        with pytest.raises(ValueError): BEHRTForSequenceClassification.from_pretrained(folder)
    folder = spoil(saved, tmp_path_factory, "model.safetensors", lambda data: data)
    (folder / "model.safetensors").unlink()
    torch.save({"head.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only safetensors are read"): BEHRTForSequenceClassification.from_pretrained(folder)
    assert not hasattr(builtins, "sprung")
    pickle.loads(pickle.dumps(Trap()))  # the trap itself works
    assert builtins.sprung; del builtins.sprung


def test_a_folder_of_transformers_is_refused_by_name(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.BertModel(transformers.BertConfig(vocab_size=35, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="config.json: expected 'model' and 'settings'.*Is .*bert a model of this library"): BEHRT.from_pretrained(tmp_path / "bert")
    files = {p.name: p.read_bytes() for p in (tmp_path / "bert").iterdir()}
    with pytest.raises(FileExistsError, match="not just a model of this library, so it is left as it is"): build("encoder", 35).save_pretrained(tmp_path / "bert")
    assert {p.name: p.read_bytes() for p in (tmp_path / "bert").iterdir()} == files


def test_what_lies_in_the_folder_decides_whether_it_is_used(tmp_path):
    model = build("visits", 35)
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    model.save_pretrained(tmp_path / "deep" / "er" / "model", vocabulary_of(CODES))
    model.save_pretrained(tmp_path / "deep" / "er" / "model")  # replaced as a whole: the old vocabulary does not stay behind
    assert not (tmp_path / "deep" / "er" / "model" / "vocabulary.json").exists()
    for name in ("notes.txt", "checkpoints"):
        other = tmp_path / name.replace(".", "_")
        model.save_pretrained(other)
        (other / name).mkdir() if name == "checkpoints" else (other / name).write_text("mine")
        before = (other / "model.safetensors").read_bytes()
        with pytest.raises(FileExistsError, match=f"'{name}'.*left as it is"): build("horizons", 35).save_pretrained(other)
        assert (other / "model.safetensors").read_bytes() == before
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="'config.json' and not just a model"): model.save_pretrained(tmp_path / "half")
    (tmp_path / "link").symlink_to(tmp_path / "empty", target_is_directory=True)
    model.save_pretrained(tmp_path / "link", vocabulary_of(CODES))  # a link stays a link, and its folder has the model
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "vocabulary.json").is_file()
    assert [p.name for p in tmp_path.rglob("*") if "partial" in p.name or ".old" in p.name] == []


KILL_WHILE_SAVING = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from ehr_sequencing.behrt import BEHRT, BEHRTConfig
torch.set_num_threads(1)
models, folder = [BEHRT(BEHRTConfig(1000, 32, 32, 1, 2)) for _ in range(2)], Path(sys.argv[1])
for i, m in enumerate(models): torch.nn.init.constant_(m.norm.weight, i)
models[0].save_pretrained(folder)
random.seed(0)
for _ in range(25):
    child = os.fork()
    if child == 0:
        for i in range(10**9): models[i % 2].save_pretrained(folder)
    time.sleep(random.uniform(0.01, 0.12))
    os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
    whole = [folder] if folder.exists() else list(folder.parent.glob(".model.old-*"))  # between two renames the old model has another name
    assert len(whole) == 1, sorted(folder.parent.iterdir())
    assert BEHRT.from_pretrained(whole[0]).norm.weight.unique().numel() == 1
models[0].save_pretrained(folder)
assert [p.name for p in folder.parent.iterdir()] == ["model"]  # nothing that the killed ones left
print("whole")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_save_that_is_killed_leaves_a_whole_model(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILL_WHILE_SAVING, str(tmp_path / "model")], capture_output=True, text=True)
    assert done.stdout == "whole\n", done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_diverged_is_not_saved(kind, tmp_path):
    "Any tensor, any such number; the folder is as it was, to the byte."
    good, bad = build(kind, 35), build(kind, 35)
    good.save_pretrained(tmp_path / "model")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for i, (name, tensor) in enumerate(bad.named_parameters()):
        was = tensor.detach().clone()
        with torch.no_grad(): tensor.reshape(-1)[i % tensor.numel()] = (torch.nan, torch.inf, -torch.inf)[i % 3]
        with pytest.raises(ValueError, match=f"1 of .* numbers of the tensor '{name}' are NaN or infinite"): bad.save_pretrained(tmp_path / "model")
        with torch.no_grad(): tensor.copy_(was)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    bad.save_pretrained(tmp_path / "model")


def test_unknown_and_missing_settings_are_named(saved):
    load = BEHRTForSequenceClassification.from_pretrained
    with pytest.raises(TypeError, match="n_label: .* has no such setting; expected one of n_labels, problem"): load(saved, n_label=2)
    with pytest.raises(TypeError, match="config: .* has no such setting"): load(saved, config=small(35))
    with pytest.raises(ValueError, match="^num_heads: 5 does not divide"): load(saved, num_heads=5)
    with pytest.raises(ValueError, match=r"tensor 'behrt.project.weight' has shape \(16, 8\).*needs \(32, 8\)"): load(saved, hidden_size=32)
    with pytest.raises(ValueError, match="has no tensor 'behrt.blocks.2.attention.query.weight'"): load(saved, num_layers=3)
    with pytest.raises(ValueError, match="has the tensor 'behrt.blocks.1.attention.key.bias', for which .* has no place"): load(saved, num_layers=1)
    with pytest.raises(ValueError, match="vocab_size is 40, and vocabulary.json has 35"): load(saved, vocab_size=40)
    with pytest.raises(ValueError, match="they share no encoder"): SurvivalLSTM.from_pretrained(saved, horizons=[1])
