"""Code vectors: what is written is read, what is torn is refused, checkpoints as `transformers` saves them, and tables of which rows stay."""
import copy
import gzip
import io
import json
import pickle
import zipfile

import numpy as np
import pandas as pd
import polars as pl
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (BertConfig, BertForMaskedLM, BertModel, BertTokenizer, DistilBertConfig, DistilBertModel, ElectraConfig, ElectraModel, GPT2Config, GPT2Model, ModernBertConfig,
                          ModernBertModel)
from transformers.utils.logging import disable_progress_bar

from ehr_sequencing.behrt import BEHRT, BEHRTConfig
from ehr_sequencing.code_vectors import CEHRBERTWrapper, CodeVectors, read_code_vectors, vectors_from_npz, vectors_from_table, vectors_from_word2vec
from ehr_sequencing.embeddings import BEHRTEmbedding
from ehr_sequencing.initial_codes import concept_ids, freeze_codes, initialise_codes, match_codes, resize_vectors
from ehr_sequencing.lstm import LSTMConfig, SurvivalLSTM
from ehr_sequencing.omop import eunomia_path, read_omop
from ehr_sequencing.vocabulary import SPECIAL_TOKENS, Vocabulary, fit_vocabulary

disable_progress_bar()
many = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
some = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
LETTERS = st.characters(codec="utf-8", exclude_characters="\x00\t\r\n\x0b\x0c", exclude_categories=("Cs",))


def is_number(text):
    try: float(text)
    except ValueError: return False
    return True


@st.composite
def code_vectors(draw, letters=LETTERS):
    "Vectors of drawn codes that hold odd characters, spaces and numbers."
    dim = draw(st.integers(1, 5))
    text = st.text(letters, min_size=1, max_size=8).map(lambda t: " ".join(w for w in t.split(" ") if w)).filter(lambda t: t.strip() == t and t and not t.startswith("\ufeff"))
    codes = draw(st.lists(st.one_of(text, st.sampled_from(["ICD10CM//I50.9", "heart failure", "250", "a\u00a0b", "1 a", "</s>"])), min_size=1, max_size=6, unique=True))
    rows = draw(st.lists(st.lists(FINITE, min_size=dim, max_size=dim), min_size=len(codes), max_size=len(codes)))
    return CodeVectors(codes, np.array(rows, dtype=np.float32), "drawn")


def same(found, expected):
    assert found.codes == expected.codes
    np.testing.assert_array_equal(found.vectors, expected.vectors)


def lines_of(vectors, separator): return [code + separator + " ".join(map(repr, row.tolist())) for code, row in zip(vectors.codes, vectors.vectors)]


@many
@given(code_vectors(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n", " \n"]))
def test_word2vec_text_is_read_as_written(tmp_path, vectors, header, tab, packed, end):
    plain = all(not all(map(is_number, code.split(" ")[1:])) or " " not in code for code in vectors.codes)
    first_is_plain = " " not in vectors.codes[0] or not is_number(vectors.codes[0].split(" ")[-1])
    separator = "\t" if tab or not plain or not (header or first_is_plain) else " "
    lines = ([f"{len(vectors)} {vectors.vectors.shape[1]}"] if header else []) + lines_of(vectors, separator)
    if not header and all(map(str.isdigit, lines[0].split(" "))): return  # a line that looks like a header, see below
    text = "".join(line + end for line in lines).encode()
    path = tmp_path / ("v.vec.gz" if packed else "v.vec")
    path.write_bytes(gzip.compress(text) if packed else text)
    same(vectors_from_word2vec(path), vectors)


@many
@given(code_vectors(), st.data())
def test_word2vec_text_with_something_missing_is_refused(tmp_path, vectors, data):
    "Any number or line lost or doubled, under a header."
    lines = [f"{len(vectors)} {vectors.vectors.shape[1]}", *lines_of(vectors, "\t")]
    at = data.draw(st.integers(1, len(vectors)))
    kind = data.draw(st.sampled_from(["line lost", "line doubled", "number lost", "number more", "no number", "not finite"]))
    code, numbers = lines[at].split("\t")[0], lines[at].split("\t")[1].split(" ")
    if kind == "line lost": del lines[at]
    if kind == "line doubled": lines.insert(at, lines[at])
    changed = {"number lost": numbers[1:], "number more": [*numbers, "1.0"], "no number": ["x", *numbers[1:]], "not finite": ["nan", *numbers[1:]]}
    if kind in changed: lines[at] = code + "\t" + " ".join(changed[kind])
    (tmp_path / "v.vec").write_bytes("\n".join(lines).encode())
    with pytest.raises(ValueError, match=r"v\.vec"): vectors_from_word2vec(tmp_path / "v.vec")


def test_a_line_with_a_number_too_many_is_never_a_code(tmp_path):
    for text, line in (("A 1 2\nB 7 3 4\n", 2), ("2 2\nA 1 2\nB 7 8 3 4\n", 3), ("A 1 2\n B\n", 2), ("A 1 2\n1 2\n", 2)):
        (tmp_path / "v.txt").write_text(text)
        with pytest.raises(ValueError, match=f"v.txt, line {line}: expected a code and 2 numbers.* Complete the line"): vectors_from_word2vec(tmp_path / "v.txt")
    (tmp_path / "v.txt").write_text("250 3\n251 4\n")  # one number a code and no header: the first line looks like one
    with pytest.raises(ValueError, match="line 2: expected a code and 3 numbers \\(line 1 says so\\), got 1"): vectors_from_word2vec(tmp_path / "v.txt")
    (tmp_path / "v.txt").write_text("250\t3\n251\t4\n")
    assert vectors_from_word2vec(tmp_path / "v.txt").codes == ["250", "251"]
    (tmp_path / "v.txt").write_bytes(b"\xef\xbb\xbfA 1 2\n")  # the mark that some programs of Windows begin with
    assert vectors_from_word2vec(tmp_path / "v.txt").codes == ["A"]
    (tmp_path / "v.txt").write_text("type 2\t1 2\nB 3 4\n")  # a tab settles it
    assert vectors_from_word2vec(tmp_path / "v.txt").codes == ["type 2", "B"]


@some
@given(code_vectors())
def test_npz_both_ways(tmp_path, vectors):
    vectors.save(tmp_path / "v.npz")
    same(vectors_from_npz(tmp_path / "v.npz"), vectors)
    if all(c.isascii() and c.isprintable() for c in vectors.codes) and not {"file", "codes"} & set(vectors.codes):
        np.savez(tmp_path / "w.npz", **{c: v for c, v in zip(vectors.codes, vectors.vectors)})
        same(vectors_from_npz(tmp_path / "w.npz"), vectors)


def test_every_truncation_of_an_npz_is_refused(tmp_path):
    CodeVectors([f"C{i}" for i in range(20)], np.random.default_rng(0).normal(size=(20, 4))).save(tmp_path / "v.npz")
    whole = (tmp_path / "v.npz").read_bytes()
    for cut in range(0, len(whole), 17):
        (tmp_path / "cut.npz").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut\.npz"): vectors_from_npz(tmp_path / "cut.npz")
    for cut in range(100, len(whole) - 400, 37):  # a byte of the contents flipped: the checksum says so
        (tmp_path / "flip.npz").write_bytes(whole[:cut] + bytes([whole[cut] ^ 0xFF]) + whole[cut + 1:])
        try: found = vectors_from_npz(tmp_path / "flip.npz")
        except ValueError: continue
        assert found.codes == [f"C{i}" for i in range(20)]  # a byte that nothing reads


def test_npz_never_unpickles(tmp_path):
    class Trap:
        def __reduce__(self): return print, ("ran",)
    array = np.empty(1, dtype=object); array[0] = Trap()
    buffer = io.BytesIO(); np.save(buffer, array, allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as z: z.writestr("codes.npy", buffer.getvalue()); z.writestr("vectors.npy", buffer.getvalue())
    with pytest.raises(ValueError, match="holds Python objects, which are not loaded"): vectors_from_npz(tmp_path / "v.npz")


@some
@given(code_vectors(st.characters(codec="ascii", exclude_characters="\x00\t\r\n\x0b\x0c\x1c\x1d\x1e\x1f\"'#,", exclude_categories=("Cc",))))
def test_tables_agree(tmp_path, vectors):
    columns = [f"d{j}" for j in range(vectors.vectors.shape[1])]
    frame = pl.DataFrame({"code": vectors.codes} | {c: vectors.vectors[:, j] for j, c in enumerate(columns)})
    frame.write_csv(tmp_path / "v.csv"); frame.write_parquet(tmp_path / "v.parquet"); frame.to_pandas().to_csv(tmp_path / "p.csv.gz", index=False)
    lists = pl.DataFrame({"code": vectors.codes, "vector": vectors.vectors.tolist()})
    for table in (frame, frame.to_pandas(), lists, frame.with_columns(pl.col("code").cast(pl.Categorical)), tmp_path / "v.csv", tmp_path / "v.parquet", tmp_path / "p.csv.gz"): same(read_code_vectors(table), vectors)
    same(vectors_from_table(frame.select(columns[::-1] + ["code"]), columns=columns), vectors)


def test_pandas_with_its_own_ways(tmp_path):
    with pytest.raises(ValueError, match="column 'd' is there more than once"): vectors_from_table(pd.DataFrame([["A", 1, 2]], columns=["code", "d", "d"]))
    with pytest.raises(ValueError, match="row 1: no number in column 'd'"): vectors_from_table(pd.DataFrame({"code": ["A", "B"], "d": [1.0, None]}))
    with pytest.raises(ValueError, match="row 1: expected a code as text, got nothing"): vectors_from_table(pd.DataFrame({"code": ["A", None], "d": [1.0, 2.0]}))
    with pytest.raises(ValueError, match="several types"): vectors_from_table(pd.DataFrame({"code": ["A", 7], "d": [1.0, 2.0]}))
    with pytest.raises(ValueError, match="column 'd' holds Boolean, not numbers"): vectors_from_table(pd.DataFrame({"code": ["A"], "d": [True]}))
    with pytest.raises(TypeError, match="expected a polars or pandas frame, or a path"): vectors_from_table([1, 2])


# checkpoints

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"{100 + i}" for i in range(30))]
SMALL = {"vocab_size": len(TOKENS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ARCHITECTURES = {"bert": lambda: BertModel(BertConfig(**SMALL)), "masked": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(vocab_size=len(TOKENS), dim=16, n_layers=1, n_heads=2, hidden_dim=32)), "electra": lambda: ElectraModel(ElectraConfig(**SMALL, embedding_size=8)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=len(TOKENS), n_embd=16, n_layer=1, n_head=2))}


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("form", ["whole", "shards", "bin", "bin shards", "bfloat16"])
def test_checkpoints_of_transformers(tmp_path, kind, form):
    "The vectors are the rows of the model's own input embeddings, however it was saved."
    torch.manual_seed(0)
    model = ARCHITECTURES[kind]()
    if form == "bfloat16": model = model.bfloat16()
    model.save_pretrained(tmp_path, **({"max_shard_size": "3KB"} if "shards" in form else {}))
    if form == "shards": assert (tmp_path / "model.safetensors.index.json").is_file()
    if "bin" in form:  # as older versions saved
        for file in list(tmp_path.glob("*.safetensors")): torch.save(load_file(file), tmp_path / file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")); file.unlink()
        if form == "bin shards":
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            index["weight_map"] = {k: v.replace("model", "pytorch_model").replace(".safetensors", ".bin") for k, v in index["weight_map"].items()}
            (tmp_path / "model.safetensors.index.json").unlink(); (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS))
    BertTokenizer(vocab={t: i for i, t in enumerate(TOKENS)}).save_pretrained(tmp_path)
    found = CEHRBERTWrapper.from_pretrained(tmp_path).get_code_embeddings()
    assert found.codes == TOKENS[5:]
    np.testing.assert_array_equal(found.vectors, model.get_input_embeddings().weight.detach().float().numpy()[5:])


def cehr_bert(folder, prefix="bert.", rows=40):
    "The files that CEHR-BERT saves: a word-level tokenizer trained on concept ids, the names of concepts, weights under its names."
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[OOV]", vocab={}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.train_from_iterator(["VS 320128 201826 W0 VE", "VS 320128 LT 8507 VE"], tokenizers.trainers.WordLevelTrainer(special_tokens=["[PAD]", "[MASK]", "[OOV]", "[CLS]", "[UNUSED]"], show_progress=False))
    words.save(str(folder / "tokenizer.json"))
    (folder / "concept_name_mapping.json").write_text(json.dumps({"320128": "Essential hypertension"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "cehrbert", "architectures": ["CehrBertForPreTraining"], "vocab_size": rows, "hidden_size": 12, "n_time_embd": 16}))
    table = torch.randn(rows, 12)
    save_file({prefix + "cehr_bert_embeddings.concept_embeddings.weight": table, prefix + "cehr_bert_embeddings.visit_segment_embeddings.weight": torch.randn(3, 12),
               prefix + "cehr_bert_embeddings.time_embedding_layer.w": torch.randn(1, 16), "cls.predictions.bias": torch.zeros(rows)}, folder / "model.safetensors")
    return words, table


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_cehr_bert(tmp_path, prefix):
    words, table = cehr_bert(tmp_path, prefix)
    wrapper = CEHRBERTWrapper.from_pretrained(tmp_path)
    found = wrapper.get_code_embeddings()
    assert set(found.codes) == {"VS", "VE", "320128", "201826", "W0", "LT", "8507"} and found.names == {"320128": "Essential hypertension"}
    for code in found.codes: np.testing.assert_array_equal(found[code], table[words.token_to_id(code)].numpy())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"443454": 20}))  # tokens added later
    (tmp_path / "vocab.txt").write_text("not\nread\n")
    np.testing.assert_array_equal(CEHRBERTWrapper.from_pretrained(tmp_path).get_code_embeddings()["443454"], table[20].numpy())


def test_torn_checkpoints(tmp_path):
    cehr_bert(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for cut in [*range(0, 200, 7), *range(200, len(whole), 211)]:
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="model.safetensors"): CEHRBERTWrapper.from_pretrained(tmp_path)
    file.unlink()
    for index, message in (({"weight_map": {"a.concept_embeddings.weight": "../../secret.safetensors"}}, "outside its folder"), ({"weight_map": {}}, "no weight_map"), ({}, "no weight_map")):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=message): CEHRBERTWrapper.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.concept_embeddings.weight": "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="the index names it"): CEHRBERTWrapper.from_pretrained(tmp_path)
    save_file({"b.weight": torch.ones(2, 2)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match="the index says so"): CEHRBERTWrapper.from_pretrained(tmp_path)


def test_tables_that_are_none_or_two(tmp_path):
    cehr_bert(tmp_path)
    table = torch.randn(40, 12)
    for tensors, options, message in (({"a.weight": table}, {}, "no table of code embeddings. Name one with tensor=; there are a.weight"),
            ({"a.word_embeddings.weight": table, "b.word_embeddings.weight": table.clone()}, {}, "2 tables of code embeddings"), ({"a.word_embeddings.weight": table[0]}, {}, "must be a table of numbers"),
            ({"a.word_embeddings.weight": table.long()}, {}, "must be a table of numbers, got torch.int64"), ({"a.word_embeddings.weight": table / 0}, {}, "not finite"),
            ({"sword_embeddings.weight": table}, {}, "no table of code embeddings")):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message): CEHRBERTWrapper.from_pretrained(tmp_path, **options).get_code_embeddings()
    save_file({"a.word_embeddings.weight": table, "b.word_embeddings.weight": table + 1, "c.weight": table + 2}, tmp_path / "model.safetensors")
    for name, more in (("b.word_embeddings.weight", 1), ("c.weight", 2)):
        assert CEHRBERTWrapper.from_pretrained(tmp_path, tensor=name).table[0, 0] == float(table[0, 0] + more)


def test_a_pickle_that_does_more_is_not_loaded(tmp_path):
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path / "ran"), "w"))
    cehr_bert(tmp_path); (tmp_path / "model.safetensors").unlink()
    torch.save({"a.word_embeddings.weight": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors, and is not loaded"): CEHRBERTWrapper.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(ValueError, match="pytorch_model.bin"): CEHRBERTWrapper.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


# into a model

def vocabulary_of(n, bins=()): return Vocabulary([*SPECIAL_TOKENS, *(f"C{i}" for i in range(n)), *bins], value_edges={"LAB": [1.0, 2.0]} if bins else {})


def cosines(x):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


@some
@given(st.integers(2, 30), st.integers(1, 20), st.integers(1, 24), st.integers(0, 2**32 - 1), st.booleans())
def test_fitting_keeps_what_it_can(n, size, dim, seed, centre):
    "Zeros keep every product; components lose no more than any other map of the same size, scikit-learn's included; the scale is the model's."
    from sklearn.decomposition import TruncatedSVD
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, size)) * np.exp(rng.normal(size=size)) + rng.normal(size=size)
    moved, kept = resize_vectors(x, dim, centre)
    base = x - x.mean(0) if centre else x
    assert moved.shape == (n, dim) and 0 <= kept <= 1 + 1e-12
    if dim >= size: np.testing.assert_allclose(moved @ moved.T, base @ base.T, atol=1e-9)
    else:
        np.testing.assert_allclose((moved**2).sum(), kept * (base**2).sum(), rtol=1e-9)
        if size > 1 and dim < min(n, size): assert (moved**2).sum() >= (TruncatedSVD(dim, random_state=0, algorithm="arpack").fit_transform(base)**2).sum() * (1 - 1e-9)


@some
@given(st.integers(2, 12), st.integers(0, 12), st.integers(1, 10), st.integers(2, 10), st.integers(0, 2**32 - 1), st.booleans())
def test_rows_go_where_their_codes_are(n, others, size, dim, seed, freeze):
    "The order of the given vectors, and vectors of other codes, change nothing; special tokens and unmatched codes stay; the table has the size that it had."
    rng = np.random.default_rng(seed)
    vocabulary, x = vocabulary_of(n + 3), rng.normal(size=(n + others, size))
    codes = [f"C{i}" for i in rng.permutation(n + 3)[:n]] + [f"X{i}" for i in range(others)]
    order = rng.permutation(n + others)
    torch.manual_seed(seed)
    one = BEHRTEmbedding(len(vocabulary), 2 * dim); two = copy.deepcopy(one)
    before = one.code.weight.detach().clone()
    report = initialise_codes(one, vocabulary, CodeVectors(codes, x), freeze=freeze)
    initialise_codes(two, vocabulary, CodeVectors([codes[i] for i in order], x[order]))
    torch.testing.assert_close(one.code.weight, two.code.weight)
    rows = [vocabulary.index[c] for c in codes[:n]]
    rest = [i for i in range(len(vocabulary)) if i not in rows]
    assert torch.equal(one.code.weight[rest], before[rest])
    np.testing.assert_allclose(one.code.weight[rows].detach().double().square().mean().sqrt(), before[5:].double().square().mean().sqrt(), rtol=1e-4)
    if 2 * dim >= size and size > 1: np.testing.assert_allclose(cosines(one.code.weight[rows].detach().double().numpy()), cosines(x[:n] - x[:n].mean(0)), atol=2e-4)
    assert report.unused == others and sorted(report.unmatched) == sorted(vocabulary.tokens[i] for i in rest[5:]) and report.matched == {"exact": n} and len(report.frozen) == n * freeze


def test_an_error_changes_nothing():
    vocabulary = vocabulary_of(4)
    model = BEHRTEmbedding(9, 6)
    initialise_codes(model, vocabulary, CodeVectors(["C0", "C1"], np.eye(2)), freeze=True)
    before, state = model.code.weight.detach().clone(), model.code.frozen_rows
    for vectors, options in ((CodeVectors(["Z"], [[1.0]]), {}), (CodeVectors(["C2", "C3"], np.ones((2, 2))), {}), (CodeVectors(["C2"], [[1.0, 2.0]]), {}), (CodeVectors(["C2", "C3"], np.eye(2)), {"match": "icd4"})):
        with pytest.raises(ValueError): initialise_codes(model, vocabulary, vectors, **options)
        assert torch.equal(model.code.weight, before) and model.code.frozen_rows is state


def test_two_sources_one_after_the_other():
    "The second leaves the rows of the first, frozen or not; what it writes is frozen only if it asks."
    rng, vocabulary = np.random.default_rng(0), vocabulary_of(9)
    model = BEHRTEmbedding(len(vocabulary), 6)
    initialise_codes(model, vocabulary, CodeVectors(["C0", "C1", "C2"], rng.normal(size=(3, 6))), freeze=True)
    first = model.code.weight.detach().clone()
    initialise_codes(model, vocabulary, CodeVectors(["C2", "C3", "C4"], rng.normal(size=(3, 6))))
    assert model.code.frozen_rows.rows.tolist() == [5, 6] and torch.equal(model.code.weight[5:7], first[5:7]) and not torch.equal(model.code.weight[7], first[7])
    initialise_codes(model, vocabulary, CodeVectors(["C5", "C6"], rng.normal(size=(2, 6))), freeze=True)
    assert model.code.frozen_rows.rows.tolist() == [5, 6, 10, 11]


def test_a_folder_of_this_library(tmp_path):
    "Vectors move from one of our models to another by code."
    vocabulary, model = vocabulary_of(6), BEHRT(BEHRTConfig.small(11))
    save_file({"behrt." + k: v for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}"); (tmp_path / "vocabulary.json").write_text(vocabulary.to_json())
    found = read_code_vectors(tmp_path)
    assert found.codes == vocabulary.tokens[5:]
    np.testing.assert_array_equal(found.vectors, model.embedding.code.weight[5:].detach())


def test_vectors_find_the_table_of_every_model():
    vocabulary, vectors = vocabulary_of(6), CodeVectors([f"C{i}" for i in range(6)], np.random.default_rng(0).normal(size=(6, 4)))
    models = [BEHRT(BEHRTConfig.small(11)), SurvivalLSTM(LSTMConfig.small(11)), BEHRTEmbedding(11, 8), nn.Embedding(11, 8)]
    for model in models: assert initialise_codes(model, vocabulary, vectors).share == 1
    assert torch.equal(models[0].embedding.code.weight[0], torch.zeros(64))


class Tied(nn.Module):
    "A table that is also the output layer."
    def __init__(self, n):
        super().__init__()
        self.code = nn.Embedding(n, 8, padding_idx=0)

    def forward(self, codes): return F.linear(self.code(codes).tanh(), self.code.weight)


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.3), lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.3), lambda p: torch.optim.RMSprop(p, 0.05)])
@pytest.mark.parametrize("compiled", [False, True])
def test_frozen_rows_stay(optimizer, compiled):
    "Under decay and momentum, in two forwards before one backward, in a copy, after saving and loading, and compiled."
    torch.manual_seed(0)
    vocabulary = vocabulary_of(8, ["LAB//Q1", "LAB//Q2"])
    model = Tied(len(vocabulary))
    report = initialise_codes(model, vocabulary, CodeVectors([*(f"C{i}" for i in range(5)), "LAB"], np.random.default_rng(1).normal(size=(6, 3))), value_bins=True, freeze=True)
    assert report.frozen == [f"C{i}" for i in range(5)]
    frozen, free = list(range(5, 10)), [1, 2, 3, 4, 10, 11, 12, 13, 14]
    run = torch.compile(model, backend="eager") if compiled else model
    def steps(model, run, n=4):
        update = optimizer(model.parameters())
        for _ in range(n):
            codes = torch.randint(1, len(vocabulary), (40,))
            update.zero_grad()
            (F.cross_entropy(run(codes), codes.flip(0)) + F.cross_entropy(run(codes.flip(0)), codes)).backward()
            assert not model.code.weight.grad[frozen].any() and model.code.weight.grad[free].any(1).all()
            update.step()
    start = model.code.weight.detach().clone()
    steps(model, run)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(saved["code.weight"][frozen], start[frozen]) and (saved["code.weight"][free] != start[free]).any(1).all()
    if compiled: return
    twin = copy.deepcopy(model)
    steps(twin, twin)
    assert torch.equal(twin.state_dict()["code.weight"][frozen], start[frozen]) and not torch.equal(twin.state_dict()["code.weight"][free], saved["code.weight"][free])
    fresh = Tied(len(vocabulary)); fresh.load_state_dict(saved)
    assert torch.equal(fresh.code.weight, saved["code.weight"]) and getattr(fresh.code, "frozen_rows", None) is None
    restored = pickle.loads(pickle.dumps(model)); steps(restored, restored, 1)
    assert torch.equal(restored.state_dict()["code.weight"][frozen], start[frozen])
    freeze_codes(model, []); optimizer_of_all = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.tensor(frozen)).sum().backward(); optimizer_of_all.step()
    assert (model.state_dict()["code.weight"][frozen] != start[frozen]).any(1).all()


def test_matching_with_concept_ids_of_a_real_database():
    "Every code of Eunomia's vocabulary that has a concept id finds the vector of that id."
    events = read_omop(eunomia_path())
    vocabulary = fit_vocabulary(events.events, names=events.names)
    ids = concept_ids(eunomia_path(), vocabulary)
    assert len(ids) > 0.9 * (len({t.partition("//Q")[0] for t in vocabulary.tokens}) - 20) and all(i.isdigit() for i in ids.values())
    vectors = CodeVectors(sorted(set(ids.values())), np.random.default_rng(0).normal(size=(len(set(ids.values())), 5)))
    found = match_codes(vocabulary, vectors, ids)
    assert {vocabulary.tokens[row]: codes for row, (_, codes) in found.items()} == {t: [ids[t]] for t in vocabulary.tokens if t in ids}
