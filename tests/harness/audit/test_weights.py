"""Whole artifacts: healthy ones have nothing to say, and each damage shows where it should."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantgate.audit.report import AuditReport, reduce_audit
from quantgate.drill.packing import pack_gptq
from quantgate.files import read_json, write_json
from quantgate.measure import Missing
from quantgate.variants.source import SourceModel, open_source

from .conftest import GROUP_SIZE, PACKERS, SETTINGS, Artifact

LAYER = "model.layers.1.mlp.down_proj"
Change = Callable[[dict[str, Tensor]], object]


def values(report: AuditReport) -> dict[str, float | None]:
    return {
        m.metric: None if isinstance(m, Missing) else m.value  # type: ignore[union-attr]
        for m in reduce_audit(report, source="audit.json")
    }


@pytest.mark.parametrize("scheme", SETTINGS)
def test_a_healthy_artifact_is_as_good_as_rounding_and_differs_in_nothing(
    source: SourceModel, build: Callable[..., Artifact], scheme: str
) -> None:
    found = values(build(source, scheme).audit())
    assert found["audit/weight_error.ratio"] == pytest.approx(1, abs=0.03)
    assert found["audit/group_error.ratio"] < 1.6  # type: ignore[operator]
    assert found["audit/group_gain.ratio"] < 1.15  # type: ignore[operator]
    assert found["audit/weight_cosine.min"] > 0.99  # type: ignore[operator]
    counts = {m: v for m, v in found.items() if m.endswith(".count") and "cal" not in m}
    counts.pop("audit/rounded_module.count", None)
    assert set(counts.values()) == {0}, counts


@pytest.mark.parametrize(
    ("scheme", "bits"),
    # 4 bits and a scale and a zero point per 32 weights, and 32 bits of g_idx for each input.
    [("bf16", 16), ("int8-bnb", 8.5), ("int4-gptq", 5.2), ("int8-gptq", 9.4)],
)
def test_bits_per_weight_count_everything_stored(
    untied_source: SourceModel, build: Callable[..., Artifact], scheme: str, bits: float
) -> None:
    found = build(untied_source, scheme).audit().bits_per_weight
    assert found == pytest.approx(bits, abs=0.35)


def one(part: str, change: Callable[[Tensor], Tensor], layer: str = LAYER) -> Change:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"{layer}.{part}"] = change(tensors[f"{layer}.{part}"])

    return edit


def first_times(factor: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] *= factor
        return tensor

    return change


def swap_rows(tensor: Tensor) -> Tensor:
    tensor[[10, 20]] = tensor[[20, 10]]
    return tensor


@pytest.mark.parametrize(
    ("scheme", "change", "metric", "at_least"),
    [
        ("int4-gptq", one("qzeros", lambda t: t + 0x11111111), "weight_error.ratio", 3),
        ("int4-gptq", one("scales", lambda t: t.roll(1, 0)), "weight_error.ratio", 1.5),
        ("int4-gptq", one("scales", lambda t: t.roll(1, 1)), "weight_error.ratio", 1.5),
        ("int4-gptq", one("scales", first_times(16)), "group_gain.ratio", 10),
        ("int4-gptq", one("scales", first_times(2)), "group_gain.ratio", 1.8),
        ("int4-gptq", one("scales", first_times(2)), "group_error.ratio", 4),
        ("int4-gptq", one("qweight", lambda t: t * 0 - 0x77777778), "constant_block.count", 64),
        ("int4-gptq", one("scales", first_times(float("inf"))), "non_finite.count", 1),
        ("int8-gptq", one("scales", first_times(2)), "group_gain.ratio", 1.9),
        ("int8-bnb", one("SCB", first_times(2)), "group_gain.ratio", 1.9),
        ("int8-bnb", one("SCB", lambda t: t.roll(1)), "weight_error.ratio", 4),
        ("int8-bnb", one("weight", lambda t: t * 0), "constant_block.count", 64),
        ("int4-nf4", one("weight", lambda t: t >> 4 | t << 4), "weight_error.ratio", 8),
        ("int4-nf4", one("weight.absmax", lambda t: t.roll(1)), "group_error.ratio", 1.3),
        ("bf16", one("weight", swap_rows), "group_error.ratio", 100),
        ("bf16", one("weight", swap_rows, "lm_head"), "group_error.ratio", 100),
        ("int4-gptq", one("weight", swap_rows, "lm_head"), "group_error.ratio", 20),
    ],
)
def test_damaged_weights_show_in_their_metric(
    untied_source: SourceModel,
    build: Callable[..., Artifact],
    scheme: str,
    change: Change,
    metric: str,
    at_least: float,
) -> None:
    artifact = build(untied_source, scheme)
    artifact.edit(change)
    found = values(artifact.audit())[f"audit/{metric}"]
    assert found is not None
    assert found >= at_least


def test_weights_that_are_not_finite_leave_no_ratio_to_pass_with(
    untied_source: SourceModel, build: Callable[..., Artifact]
) -> None:
    artifact = build(untied_source, "int4-gptq")
    artifact.edit(one("scales", first_times(float("nan"))))
    found = values(artifact.audit())
    assert found["audit/non_finite.count"] == 1
    assert found["audit/weight_error.ratio"] is None
    assert found["audit/group_gain.ratio"] is None
    assert found["audit/weight_cosine.min"] is None


def test_the_worst_weight_and_group_are_named(
    untied_source: SourceModel, build: Callable[..., Artifact]
) -> None:
    artifact = build(untied_source, "int4-gptq")
    # Row 3 of four groups: scales are [group, row].
    artifact.edit(
        one("scales", lambda t: t.index_put((torch.tensor(2), torch.tensor(3)), t[2, 3] * 2))
    )
    gain = {m.metric: m for m in reduce_audit(artifact.audit(), source="x")}
    note = gain["audit/group_gain.ratio"].note  # type: ignore[union-attr]
    assert note == f"worst: {LAYER}.weight, group {3 * 4 + 2} of 256"


@pytest.mark.parametrize("bits", [4, 8])
def test_activation_order_is_followed_and_a_dropped_one_shows(
    untied_source: SourceModel, build: Callable[..., Artifact], bits: int
) -> None:
    artifact = build(untied_source, f"int{bits}-gptq", pack=pack_shuffled(bits), desc_act=True)
    healthy = values(artifact.audit())
    assert healthy["audit/weight_error.ratio"] == pytest.approx(1, abs=0.05)
    assert healthy["audit/format_difference.count"] == 0
    artifact.edit(one("g_idx", lambda t: torch.arange(len(t), dtype=torch.int32) // GROUP_SIZE))
    assert values(artifact.audit())["audit/weight_error.ratio"] > 1.4  # type: ignore[operator]
    artifact.edit(one("g_idx", lambda t: t * 0))
    assert values(artifact.audit())["audit/format_difference.count"] == 1


def pack_shuffled(bits: int) -> Callable[[Tensor], dict[str, Tensor]]:
    def pack(weight: Tensor) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        group_of = torch.arange(weight.shape[1]) // GROUP_SIZE
        group_of = group_of[torch.randperm(len(group_of), generator=generator)]
        return pack_gptq(weight, bits=bits, group_size=GROUP_SIZE, group_of=group_of)

    return pack


def test_format_version_2_read_as_version_1_shows(
    untied_source: SourceModel, build: Callable[..., Artifact]
) -> None:
    def pack(weight: Tensor) -> dict[str, Tensor]:
        return pack_gptq(weight, bits=4, group_size=GROUP_SIZE, zero_offset=0)

    artifact = build(untied_source, "int4-gptq", pack=pack, checkpoint_format="gptq_v2")
    assert values(artifact.audit())["audit/weight_error.ratio"] == pytest.approx(1, abs=0.03)
    artifact.configure(checkpoint_format="gptq")
    found = values(artifact.audit())
    assert found["audit/weight_error.ratio"] > 3  # type: ignore[operator]
    assert found["audit/format_difference.count"] == 14


def test_rounding_alone_is_told_from_calibration(
    untied_source: SourceModel, build: Callable[..., Artifact]
) -> None:
    artifact = build(untied_source, "int4-gptq")
    assert values(artifact.audit())["audit/rounded_module.count"] == 14

    def nudge(tensor: Tensor) -> Tensor:
        # Another code in every eighth weight, as compensated errors leave behind.
        return tensor ^ 1

    artifact.edit(lambda t: t.update({k: nudge(v) for k, v in t.items() if k.endswith("qweight")}))
    assert values(artifact.audit())["audit/rounded_module.count"] == 0


def plain(layer: str, source: SourceModel) -> Change:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{layer}.")]:
            del tensors[name]
        tensors[f"{layer}.weight"] = load_file(source.weight_files[0])[f"{layer}.weight"].bfloat16()

    return edit


@pytest.mark.parametrize("scheme", ["int8-bnb", "int4-nf4", "int4-gptq"])
def test_a_module_left_unquantized_is_a_difference_unless_declared(
    untied_source: SourceModel, build: Callable[..., Artifact], scheme: str
) -> None:
    artifact = build(untied_source, scheme)
    healthy = artifact.audit()
    artifact.edit(plain(LAYER, untied_source))
    report = artifact.audit()
    assert report.coverage == (f"{LAYER} is not quantized",)
    assert (report.bits_per_weight or 0) > (healthy.bits_per_weight or 99)
    artifact.configure(modules_to_not_convert=["down_proj"])
    assert artifact.audit().coverage == ()


def test_nothing_quantized_at_all_is_a_difference_in_every_module(
    source: SourceModel, build: Callable[..., Artifact]
) -> None:
    artifact = build(source, "bf16")
    artifact = Artifact(artifact.folder, "int4-gptq", artifact.source, artifact.outline)
    report = artifact.audit()
    assert len(report.coverage) == 14
    assert report.bits_per_weight == 16
    assert report.formats == ("config.json says none; scheme int4-gptq is gptq-4bit",)


@pytest.mark.parametrize("scheme", ["int8-bnb", "int4-nf4", "int4-gptq"])
def test_a_quantized_output_head_is_a_difference(
    source: SourceModel, build: Callable[..., Artifact], scheme: str
) -> None:
    artifact = build(source, scheme)

    def quantize_head(tensors: dict[str, Tensor]) -> None:
        weight = tensors.pop("lm_head.weight", tensors["model.embed_tokens.weight"])
        parts = PACKERS[scheme](weight.float())
        tensors.update({f"lm_head.{part}": tensor for part, tensor in parts.items()})

    artifact.edit(quantize_head)
    assert artifact.audit().coverage == ("lm_head is quantized, and should have been left alone",)


def test_missing_and_unknown_tensors_are_differences(
    untied_source: SourceModel, build: Callable[..., Artifact]
) -> None:
    artifact = build(untied_source, "int8-bnb")

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["model.last_norm.weight"] = tensors.pop("model.norm.weight")

    artifact.edit(rename)
    assert artifact.audit().coverage == (
        "model.norm.weight is missing",
        "model.last_norm.weight is in the artifact and not in the source",
    )


def test_a_neighbours_weights_show(
    untied_source: SourceModel, build: Callable[..., Artifact]
) -> None:
    artifact = build(untied_source, "int4-gptq")
    other = LAYER.replace("layers.1", "layers.0")

    def copy(tensors: dict[str, Tensor]) -> None:
        parts = [name for name in tensors if name.startswith(f"{other}.")]
        tensors.update({n.replace("layers.0", "layers.1"): tensors[n].clone() for n in parts})

    artifact.edit(copy)
    found = values(artifact.audit())
    assert found["audit/weight_error.ratio"] > 8  # type: ignore[operator]
    assert found["audit/weight_cosine.min"] < 0.2  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_cast_at_least_as_fine_as_bf16_is_healthy(
    untied_source: SourceModel, build: Callable[..., Artifact], dtype: torch.dtype
) -> None:
    artifact = build(untied_source, "bf16")
    exact = load_file(untied_source.weight_files[0])
    artifact.edit(lambda t: t.update({name: exact[name].to(dtype) for name in t}))
    report = artifact.audit()
    assert values(report)["audit/weight_error.ratio"] <= 1  # type: ignore[operator]
    assert report.bits_per_weight == 8 * dtype.itemsize


@pytest.mark.parametrize(
    ("scheme", "steps", "is_tolerated"),
    [
        ("int4-gptq", 254, True), ("int4-nf4", 254, True), ("int8-bnb", 254, False),
        ("int8-gptq", 254, False), ("bf16", 254, False), ("int4-gptq", 15, False),
    ],
)  # fmt: skip
def test_an_8_bit_embedding_is_tolerated_in_a_4_bit_variant_alone(
    source: SourceModel, build: Callable[..., Artifact], scheme: str, steps: int, is_tolerated: bool
) -> None:
    artifact = build(source, scheme)

    def round_embedding(tensors: dict[str, Tensor]) -> None:
        weight = tensors["model.embed_tokens.weight"].float()
        step = weight.abs().amax(dim=1, keepdim=True) * 2 / steps
        tensors["model.embed_tokens.weight"] = (weight / step).round().mul(step).bfloat16()

    assert values(artifact.audit())["audit/weight_error.ratio"] <= 1.1  # type: ignore[operator]
    artifact.edit(round_embedding)
    ratio = values(artifact.audit())["audit/weight_error.ratio"]
    assert ratio < 1.1 if is_tolerated else ratio > 2  # type: ignore[operator]


def test_rotary_frequencies_stored_in_half_precision_show(
    untied_source: SourceModel, build: Callable[..., Artifact], tmp_path: Path
) -> None:
    # Older checkpoints store the table.
    folder = tmp_path / "source"
    shutil.copytree(untied_source.folder, folder)
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = load_file(folder / "model.safetensors") | {table: torch.rand(16)}
    save_file(tensors, folder / "model.safetensors")
    artifact = build(open_source(str(folder)), "bf16")
    artifact.edit(lambda t: t.update({table: tensors[table]}))
    assert artifact.audit().formats == ()
    artifact.edit(lambda t: t.update({table: tensors[table].bfloat16()}))
    assert f"{table} is stored as torch.bfloat16" in artifact.audit().formats[0]


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("tokenizer.json", "edit", "tokenizer.json differs"),
        ("tokenizer.json", "delete", "tokenizer.json is missing"),
        ("chat_template.jinja", "delete", "chat_template.jinja is missing"),
        ("generation_config.json", "edit", "generation_config.json differs"),
        ("merges.txt", "edit", "merges.txt is added"),
    ],
)
def test_changed_files_beside_the_weights_are_named(
    untied_source: SourceModel,
    build: Callable[..., Artifact],
    name: str,
    change: str,
    expected: str,
) -> None:
    artifact = build(untied_source, "int8-bnb")
    path = artifact.folder / name
    if change == "delete":
        path.unlink()
    else:
        path.write_text((path.read_text("utf-8") if path.exists() else "") + "\n", "utf-8")
    assert artifact.audit().files == (expected,)


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 1e-3), ("eos_token_id", 7), ("num_key_value_heads", 2)]
)
def test_a_changed_config_is_named(
    untied_source: SourceModel, build: Callable[..., Artifact], key: str, value: object
) -> None:
    artifact = build(untied_source, "int4-nf4")
    config = read_json(artifact.folder / "config.json")
    write_json(artifact.folder / "config.json", config | {key: value})
    [problem] = artifact.audit().configs
    assert problem.startswith(f"config.json: {key} is {value!r}; the source has")


def test_two_configs_that_disagree_are_named(
    untied_source: SourceModel, build: Callable[..., Artifact]
) -> None:
    artifact = build(untied_source, "int4-gptq")
    write_json(artifact.folder / "quantize_config.json", {"bits": 4, "group_size": 64})
    assert artifact.audit().formats == ("quantize_config.json says group_size 64, config.json 32",)


def test_a_vocabulary_cut_short_shows(source: SourceModel, build: Callable[..., Artifact]) -> None:
    artifact = build(source, "int4-gptq")
    name = "lm_head.weight" if "lm_head" in source.files else "model.embed_tokens.weight"
    artifact.edit(lambda t: t.update({name: t[name][:-16].contiguous()}))
    report = artifact.audit()
    assert report.vocabulary == (f"{name} has 240 rows; the vocabulary has 256",)
    assert len(report.formats) == 1


def test_a_tokenizer_with_more_ids_than_logits_shows(
    untied_source: SourceModel, build: Callable[..., Artifact]
) -> None:
    artifact = build(untied_source, "int4-gptq")
    path = artifact.folder / "tokenizer.json"
    value = read_json(path)
    value["added_tokens"] = [{"id": 256, "content": "<x>"}]
    write_json(path, value)
    assert artifact.audit().vocabulary == ("the tokenizer has id 256; logits have 256 columns",)
