"""Speed, memory and false alarms of the quality stages on this machine.

    python benchmarks/quality.py [audit] [reruns] [lm-eval] [--quick] [--check] [--json FILE]

`audit` writes a sharded source of 1.2 GB (random weights, Llama of 12 layers) and one artifact per
scheme, and audits each in a process of its own with one thread. Bytes are the source's, seconds
the CPU time of the process, and peak memory its own, without files that the kernel has cached.

`reruns` asks a policy's source and its quantized variants (or `--models`) the golden sets again and
again at other batch sizes and orders, each judged against itself, and counts the gates that FAIL,
on the reruns and on 5,000 resamples of each model's. Per-item results stay in `--store`, so that a
second call only resamples.

`lm-eval` scores golden sets through the server and with lm-evaluation-harness (`--lm-eval-python`,
of an environment that has lm_eval[hf]).

`--check` exits with 1 and names each figure that is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantgate.candidates import build_candidates
from quantgate.drill.packing import pack_gptq, pack_int8, pack_nf4
from quantgate.files import read_json, write_json
from quantgate.plan import Plan, ReleaseRequest, make_plan
from quantgate.policy import SOURCE, load_policy
from quantgate.preflight import check_variants
from quantgate.progress import Silent
from quantgate.quality.stage import ServedModel
from quantgate.variants.source import demo_folder
from quantgate.verdict import Outcome

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("audit", "reruns", "lm-eval")
SCHEMES = ("bf16", "int8-bnb", "int8-gptq", "int4-nf4", "int4-gptq")
MIN_MB_PER_S = 150.0
MAX_BYTES = 2 * 2**30
_GROUP_SIZE = 128
_QUANTIZATION: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int8-bnb": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "int4-nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    },
    "int8-gptq": {"quant_method": "gptq", "bits": 8, "group_size": _GROUP_SIZE, "sym": True},
    "int4-gptq": {"quant_method": "gptq", "bits": 4, "group_size": _GROUP_SIZE, "sym": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="*", default=["audit"], help=", ".join(ARMS))
    parser.add_argument("--quick", action="store_true", help="less of everything, to try it out")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure is missed")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--policy", type=Path, default=ROOT / "gates/policies/demo.cpu.yaml")
    parser.add_argument("--models", help="source and variants; default: source and all quantized")
    parser.add_argument("--reruns", type=int, default=7, help="of each model")
    parser.add_argument("--store", type=Path, default=Path("runs/benchmark-quality"))
    parser.add_argument("--lm-eval-python", type=Path, help="of an environment that has lm_eval")
    options = parser.parse_args()
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"no such arm: {', '.join(sorted(unknown))}; expected {', '.join(ARMS)}")
    report: dict[str, Any] = {"machine": describe_machine()}
    missed: list[str] = []
    for arm in options.arms:
        rows, problems = {"audit": _audit, "reruns": _reruns, "lm-eval": _lm_eval}[arm](options)
        report[arm] = rows
        missed += problems
    if options.json:
        write_json(options.json, report)
    if options.check and missed:
        sys.exit("missed: " + "; ".join(missed))


def _audit(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    with tempfile.TemporaryDirectory(prefix="quantgate-bench-") as folder:
        rows = measure_audit(Path(folder), num_layers=2 if options.quick else 12)
    for row in rows:
        print(
            f"audit {row['scheme']:10} {row['mb_per_s_per_core']:6.0f} MB/s per core   "
            f"{row['seconds']:5.1f} s   peak {row['peak_bytes'] / 2**20:5.0f} MiB"
        )
    missed = [
        f"audit {row['scheme']} {row['mb_per_s_per_core']:.0f} MB/s, {row['peak_bytes'] >> 20} MiB "
        f"(wanted {MIN_MB_PER_S:.0f} MB/s, 2 GiB)"
        for row in rows
        if not (row["mb_per_s_per_core"] >= MIN_MB_PER_S and row["peak_bytes"] <= MAX_BYTES)
    ]
    return rows, missed


def _reruns(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    import quality_reruns

    plan = make_plan(
        ReleaseRequest(
            policy=load_policy(options.policy), runs=options.store, serving_config=Path("none")
        )
    )
    num_reruns = 2 if options.quick else options.reruns
    num_resamples = 200 if options.quick else quality_reruns.RESAMPLES
    rows, missed = [], []
    names = options.models.split(",") if options.models else _source_and_quantized(plan)
    if not options.quick and num_reruns * len(names) < quality_reruns.MIN_RERUNS:
        missed.append(f"{num_reruns * len(names)} reruns (wanted {quality_reruns.MIN_RERUNS})")
    for model in _models(plan, names):
        runs = quality_reruns.run_all(
            plan, model, quality_reruns.situations(num_reruns + 1), store=options.store / "results"
        )
        found = quality_reruns.judge_runs(plan, model.name, runs, num_resamples=num_resamples)
        rows.append(asdict(found) | {"situations": [str(run.situation) for run in runs[1:]]})
        num_failed = found.outcomes.get(Outcome.FAIL, 0)
        print(
            f"reruns {found.model}: {found.reruns} reruns, verdicts {dict(found.outcomes)}, "
            f"items flipped {found.flipped_items or 'none'}; {found.failed_resamples} of "
            f"{found.resamples:,} resamples FAIL; "
            f"{found.seconds_per_rerun:.0f} s a rerun"
        )
        if num_failed:
            missed.append(f"{found.model}: {num_failed} FAIL on reruns: {found.failing_gates}")
        if found.failed_resamples > quality_reruns.MAX_FAIL_SHARE * found.resamples:
            missed.append(f"{found.model}: {found.failed_resamples} resamples FAIL")
    return rows, missed


def _source_and_quantized(plan: Plan) -> list[str]:
    quantized = [name for name, spec in plan.policy.variants.items() if spec.scheme != "bf16"]
    return [SOURCE, *quantized]


def _models(plan: Plan, names: list[str]) -> list[ServedModel]:
    source = plan.source
    found = []
    variants = {}
    if names != [SOURCE]:
        variants, failures = build_candidates(plan, Silent(), check_variants(plan))
        if failures:
            raise RuntimeError(str(failures))
    for name in names:
        if name == SOURCE:
            folder, digest = source.folder, source.sha256
        else:
            folder, digest = variants[name].folder, variants[name].manifest.artifact_sha256
        found.append(ServedModel(name=name, folder=folder, artifact_sha256=digest))
    return found


def _lm_eval(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    import quality_lm_eval

    if options.lm_eval_python is None:
        sys.exit("lm-eval needs --lm-eval-python: the python of a venv that has lm_eval[hf]")
    sets = [ROOT / "golden_sets" / name for name in ("order-route", "order-extract")]
    with tempfile.TemporaryDirectory(prefix="quantgate-bench-") as folder:
        found = quality_lm_eval.compare(
            options.lm_eval_python, demo_folder(), sets, Path(folder),
            num_items=32 if options.quick else None,
        )  # fmt: skip
    for one in found.sets:
        print(
            f"lm-eval {one.golden_set:14} {one.items:5} items   ours {one.our_seconds:6.1f} s   "
            f"lm_eval {one.their_seconds:6.1f} s   {one.speedup:4.1f} x   accuracy "
            f"{one.our_accuracy:.4f} and {one.their_accuracy:.4f}   "
            f"{len(one.differing_items)} items differ"
        )
    print(f"lm-eval scoring {found.speedup:.1f} x, with both starts {found.whole_speedup:.1f} x")
    missed = [
        f"{one.golden_set}: {', '.join(one.differing_items)} scored differently"
        for one in found.sets
        if one.differing_items
    ]
    # Written so that NaN misses.
    if not found.speedup >= quality_lm_eval.MIN_SPEEDUP:
        missed.append(f"lm-eval {found.speedup:.1f} x (wanted {quality_lm_eval.MIN_SPEEDUP:.0f} x)")
    return asdict(found) | {"speedup": found.speedup, "whole_speedup": found.whole_speedup}, missed


def measure_audit(folder: Path, *, num_layers: int) -> list[dict[str, Any]]:
    """Seconds and peak memory of each scheme's audit, in the order of SCHEMES."""
    write_model(folder / "source", None, num_layers=num_layers)
    rows = []
    for scheme in SCHEMES:
        artifact = folder / "artifact"
        write_model(artifact, scheme, num_layers=num_layers)
        result = subprocess.run(
            [sys.executable, __file__, "--worker", str(folder / "source"), str(artifact), scheme],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        rows.append(json.loads(result.stdout.splitlines()[-1]))
        for path in artifact.iterdir():
            path.unlink()
    return rows


def write_model(folder: Path, scheme: str | None, *, num_layers: int) -> None:
    """A Llama with random BF16 weights, a shard per layer; packed by rounding for a scheme."""
    folder.mkdir(exist_ok=True)
    hidden, inner, vocabulary, kv = 2048, 5632, 32_000, 512
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    }
    settings = _QUANTIZATION[scheme] if scheme else None
    write_json(
        folder / "config.json", config | ({"quantization_config": settings} if settings else {})
    )
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(num_layers):
        generator = torch.Generator().manual_seed(layer)
        tensors = {}
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            module = f"model.layers.{layer}.{name}"
            tensors |= {f"{module}.{part}": t for part, t in _packed(weight, scheme).items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden).bfloat16()
        save_file(tensors, folder / f"model-{layer:05}.safetensors")
    generator = torch.Generator().manual_seed(num_layers)
    rest = {
        "model.embed_tokens.weight": torch.randn(vocabulary, hidden, generator=generator),
        "lm_head.weight": torch.randn(vocabulary, hidden, generator=generator),
        "model.norm.weight": torch.ones(hidden),
    }
    save_file({k: v.bfloat16() for k, v in rest.items()}, folder / "model-rest.safetensors")


def _packed(weight: torch.Tensor, scheme: str | None) -> dict[str, torch.Tensor]:
    if scheme in (None, "bf16"):
        return {"weight": weight}
    if scheme == "int8-bnb":
        return pack_int8(weight.float())
    if scheme == "int4-nf4":
        return pack_nf4(weight.float())
    return pack_gptq(weight.float(), bits=8 if "int8" in str(scheme) else 4, group_size=_GROUP_SIZE)


def run_worker(source: str, artifact: str, scheme: str) -> None:
    """Audits one artifact in this process and prints its numbers as JSON."""
    from quantgate.audit.declared import read_outline
    from quantgate.audit.weights import audit_artifact
    from quantgate.variants.manifest import VariantManifest
    from quantgate.variants.source import SourceModel

    torch.set_num_threads(1)
    folder = Path(source)
    model = SourceModel(
        name="synthetic", folder=folder, config=read_json(folder / "config.json"), files={}
    )
    outline = read_outline(model)
    manifest = VariantManifest(scheme=scheme, files={}, source_sha256=None)
    started, started_cpu = time.perf_counter(), time.process_time()
    report = audit_artifact(model, outline, Path(artifact), manifest)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    if not report.weights or any(weight.error_ratio is None for weight in report.weights):
        raise RuntimeError(f"{scheme}: the audit compared nothing, so its time means nothing")
    print(
        json.dumps(
            {
                "scheme": scheme,
                "source_bytes": report.source_bytes,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "mb_per_s_per_core": report.source_bytes / cpu_seconds / 1e6,
                "peak_bytes": _peak_bytes(),
                "worst_ratio": max(float(w.error_ratio or 0) for w in report.weights),
                "num_problems": len(report.coverage) + len(report.formats),
            }
        )
    )


def _peak_bytes() -> int:
    """VmHWM: the most memory this process has held."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def describe_machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    return {
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "system": platform.platform(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        run_worker(*sys.argv[2:5])
    else:
        main()
