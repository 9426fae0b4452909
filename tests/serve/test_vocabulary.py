"""The front's tokenizer, in a process without torch, is the one that everybody else has."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

TEXTS = [
    "the order desk takes 3 nuts today.",
    "  two spaces, a\ttab\nand a line ",
    "naïve café costs 3 €, 日本語 🙂",
    "<s>not a start</s>",
    "",
]
CHAT = [{"role": "user", "content": "two boxes, please"}, {"role": "assistant", "content": "ok"}]

# Run with `python -c` in a process as the front's: a folder a line in, a JSON object a line out.
_FRONT = """
import json, sys
from pathlib import Path
from quantgate_serve.imports import without
from quantgate_serve.vocabulary import Vocabulary
texts, chat, *folders = json.loads(sys.stdin.read())
with without("torch"):
    for folder in folders:
        vocabulary = Vocabulary.load(Path(folder))
        ids = [vocabulary.encode(text) for text in texts]
        plain = [vocabulary.encode(text, add_special_tokens=False) for text in texts]
        texts_again = [vocabulary.decode(row) for row in ids]
        tokens = [[vocabulary.token_text(id) for id in row] for row in ids]
        print(json.dumps([ids, plain, texts_again, tokens, vocabulary.render_chat(chat)]))
assert "torch" not in sys.modules
"""


def save_as(kind: str, model_type: str) -> Callable[[Path, Any], None]:
    """Saves the trained vocabulary as a tokenizer of class `kind` beside a config of its family."""

    def save(folder: Path, trained: Any) -> None:
        model = json.loads(trained.backend_tokenizer.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
        made = getattr(transformers, kind)(vocab=model["vocab"], merges=merges, **special)
        made.chat_template = trained.chat_template
        made.save_pretrained(folder)
        transformers.AutoConfig.for_model(model_type).save_pretrained(folder)

    return save


def save_plain(folder: Path, trained: Any) -> None:
    trained.save_pretrained(folder)
    transformers.AutoConfig.for_model("llama").save_pretrained(folder)


def save_without_json(folder: Path, trained: Any) -> None:
    """vocab.json and merges.txt, as older folders have them."""
    save_as("GPT2Tokenizer", "gpt2")(folder, trained)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


SAVED = {
    "plain": save_plain,
    "gpt2": save_as("GPT2Tokenizer", "gpt2"),
    "gpt-neox": save_as("GPTNeoXTokenizer", "gpt_neox"),
    "qwen2": save_as("Qwen2Tokenizer", "qwen2"),
    "llama": save_as("LlamaTokenizer", "llama"),
    "gemma": save_as("GemmaTokenizer", "gemma"),
    "no tokenizer.json": save_without_json,
}


@pytest.fixture(scope="module")
def in_the_front(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Any]:
    """By name: the folder, and what a process without torch makes of it."""
    folders = {}
    for name, save in SAVED.items():
        folders[name] = tmp_path_factory.mktemp("tokenizer")
        save(folders[name], tokenizer)
    found = subprocess.run(
        [sys.executable, "-c", _FRONT],
        input=json.dumps([TEXTS, CHAT, *map(str, folders.values())]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    answers = [json.loads(line) for line in found.stdout.splitlines()]
    return {name: (folders[name], answers[i]) for i, name in enumerate(folders)}


@pytest.mark.parametrize("name", SAVED)
def test_a_front_without_torch_tokenises_as_transformers_does(
    name: str, in_the_front: dict[str, Any]
) -> None:
    folder, (ids, plain, texts, tokens, chat) = in_the_front[name]
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    assert ids == [expected.encode(text) for text in TEXTS]
    assert plain == [expected.encode(text, add_special_tokens=False) for text in TEXTS]
    assert texts == [
        expected.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for row in ids
    ]
    assert tokens == [[expected.decode([id]) for id in row] for row in ids]
    assert chat == expected.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
