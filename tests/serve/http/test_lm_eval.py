"""lm-evaluation-harness scores a local task through the server, as the model itself scores it.

Needs the program, in any environment: LM_EVAL=/path/to/lm_eval, or lm_eval on PATH.
"""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quantgate_serve import offline
from quantgate_serve.loading import LoadedModel

LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm_eval")
WORDS = ("boxes", "nuts", "bolts", "tea", "café", "naïve", "€", "order", "today")
TASK = """\
task: order_desk
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}]
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        LM_EVAL is None, reason="no lm_eval here: pip install 'lm_eval[api,hf]', see LM_EVAL"
    ),
]


def documents(count: int) -> list[dict[str, Any]]:
    source = random.Random(5)
    return [
        {
            "question": f"the order desk takes {source.randint(1, 40)} {source.choice(WORDS)}",
            "choices": [" ".join(source.choices(WORDS, k=2)) for _ in range(3)],
            "label": source.randrange(3),
        }
        for _ in range(count)
    ]


def score(loaded: LoadedModel, context: str, continuation: str) -> float:
    """Sum of the log-probabilities of the continuation's tokens."""
    before = loaded.tokenizer(context)["input_ids"]
    ids = loaded.tokenizer(context + continuation)["input_ids"]
    (logprobs,) = offline.log_probs(loaded, [ids])
    targets = range(len(before), len(ids))
    return sum(float(logprobs[at - 1, ids[at]]) for at in targets)


def test_local_completions_scores_as_the_model_does(
    shared_url: str, llama_folder: Path, tmp_path: Path
) -> None:
    docs = documents(40)
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(map(json.dumps, docs)) + "\n")
    (tmp_path / "order_desk.yaml").write_text(TASK.format(data=data))
    arguments = f"model=tiny,base_url={shared_url}/v1/completions,tokenizer={llama_folder}"
    subprocess.run(
        [
            *(str(LM_EVAL), "--model", "local-completions", "--tasks", "order_desk"),
            *("--model_args", f"{arguments},num_concurrent=4,max_length=256"),
            *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")),
            "--log_samples",
        ],
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    (log,) = (tmp_path / "out").rglob("samples_order_desk_*.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(samples) == len(docs)
    loaded = offline.load_model(llama_folder, device="cpu")
    hits = 0
    for sample in samples:
        doc = docs[sample["doc_id"]]
        found = [float(answer[0][0]) for answer in sample["resps"]]
        expected = [score(loaded, doc["question"], f" {choice}") for choice in doc["choices"]]
        assert found == pytest.approx(expected, abs=1e-3)
        hits += expected.index(max(expected)) == doc["label"]
    (result,) = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(result.read_text())["results"]["order_desk"]
    assert scores["acc,none"] == pytest.approx(hits / len(docs))
