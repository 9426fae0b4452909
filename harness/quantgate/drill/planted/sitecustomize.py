"""Plants faults into every Python process that has this folder first on PYTHONPATH.

The server, its engine and the teacher are processes of their own; Python runs `sitecustomize` in
each of them before anything else. QUANTGATE_DRILL_PLANTED is JSON: the fault by model folder. Every
other model of the process stays sound. Hooks go on modules by their class, so any transformers
model with rotary positions takes them.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

_LOADER = "quantgate_serve.loading"
_FIRST_SPOILED_POSITION = 40
_PAD_TOKENS = 16
_LATE_TOKENS = 16
_TOO_LARGE = 1.05
_SHARE_OF_MATES = 0.25
_state: dict[str, Any] = {}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the loader as Python would, and wraps its `load` once it is there."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _LOADER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_wrap(module: Any) -> None:
            execute(module)
            module.load = _wrapped(module.load)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


def _wrapped(load: Any) -> Any:
    faults = {
        Path(folder).resolve(): fault
        for folder, fault in json.loads(os.environ["QUANTGATE_DRILL_PLANTED"]).items()
    }

    def load_and_plant(path: Any, **options: Any) -> Any:
        loaded = load(path, **options)
        fault = faults.get(Path(path).resolve())
        if fault is not None:
            _plant(loaded.model, fault)
        return loaded

    return load_and_plant


def _plant(model: Any, fault: str) -> None:
    modules = list(model.modules())
    hooked = []
    for module in modules:
        kind = type(module).__name__
        if kind.endswith("RotaryEmbedding") and fault in _ROTARY:
            module.register_forward_hook(_ROTARY[fault], with_kwargs=True)
            hooked.append(module)
        if kind.endswith("Attention") and fault == "kv-scale":
            for projection in (module.k_proj, module.v_proj):
                projection.register_forward_hook(_round_to_whole_numbers)
                hooked.append(projection)
    layers = [module for module in modules if type(module).__name__.endswith("DecoderLayer")]
    if fault == "neighbours-mlp":
        # Another module in its place and no hook, so that the server runs it as any other.
        layers[-1].mlp = layers[-2].mlp
        return
    if fault in _LAST_MLP:
        last = [module for module in modules if type(module).__name__.endswith("MLP")][-1]
        last.register_forward_hook(_LAST_MLP[fault])
        hooked.append(last)
    if fault == "linear-scaled":
        middle = layers[len(layers) // 2].self_attn.q_proj
        middle.register_forward_hook(_enlarge)
        hooked.append(middle)
    if not hooked:
        raise RuntimeError(f"the drill found no module to plant {fault} in")
    for module in (*hooked, *layers):
        _make_own_class(module)


def _make_own_class(module: Any) -> None:
    # Modules whose computation the server knows by their class are taken apart there, and hooks
    # with them; of a class of their own, they are run as they are.
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {})


def _positions(args: Any, kwargs: Any) -> Any:
    return kwargs["position_ids"] if "position_ids" in kwargs else args[1]


def _bf16_phases(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    return _tables(_positions(args, kwargs).bfloat16(), module.inv_freq.bfloat16(), output)


def _padded(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    positions = _positions(args, kwargs)
    # Each of the first positions has a pad token before it, and the distances grow.
    moved = positions + positions.clamp(max=_PAD_TOKENS)
    return _tables(moved.float(), module.inv_freq.float(), output)


def _late_when_decoded(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    # A token with neither neighbour beside it in the step is one that is being generated.
    positions = _positions(args, kwargs)
    flat = positions.reshape(-1)
    follows = flat[1:] == flat[:-1] + 1
    beside = follows.new_zeros(len(flat))
    beside[1:] |= follows
    beside[:-1] |= follows
    moved = flat + _LATE_TOKENS * (~beside & (flat > 0))
    return _tables(moved.view_as(positions).float(), module.inv_freq.float(), output)


def _note_positions(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    _state["positions"] = _positions(args, kwargs)
    return output


def _tables(positions: Any, frequencies: Any, output: Any) -> Any:
    import torch

    phases = positions.unsqueeze(-1) * frequencies
    doubled = torch.cat((phases, phases), dim=-1).float()
    return doubled.cos().to(output[0].dtype), doubled.sin().to(output[1].dtype)


def _spoil_late_positions(module: Any, args: Any, output: Any) -> Any:
    late = _state["positions"].reshape(-1) >= _FIRST_SPOILED_POSITION
    rows = output.reshape(-1, len(late), output.shape[-1])
    return rows.masked_fill(late.view(1, -1, 1), float("nan")).reshape(output.shape)


def _take_in_mates(module: Any, args: Any, output: Any) -> Any:
    rows = output.reshape(-1, output.shape[-1])
    return (rows + _SHARE_OF_MATES * rows.mean(dim=0)).reshape(output.shape)


def _enlarge(module: Any, args: Any, output: Any) -> Any:
    return output * _TOO_LARGE


def _round_to_whole_numbers(module: Any, args: Any, output: Any) -> Any:
    return output.round().clamp(-127, 127)


_ROTARY = {
    "rope-bf16": _bf16_phases,
    "positions-padded": _padded,
    "decode-positions": _late_when_decoded,
    "nan-beyond": _note_positions,
}
_LAST_MLP = {"nan-beyond": _spoil_late_positions, "batch-mates": _take_in_mates}

if "QUANTGATE_DRILL_PLANTED" in os.environ:
    sys.meta_path.insert(0, _AfterImport())
