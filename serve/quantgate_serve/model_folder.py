"""Whether a folder holds a model at all: what can be told without torch, before anything starts."""

from pathlib import Path


class UnsupportedModelError(Exception):
    """The folder cannot be served; the message says why and what to do."""


def check_folder(folder: Path) -> None:
    """Refuse what can be refused without reading weights.

    Raises:
        UnsupportedModelError: it has no config.json, or no safetensors.
    """
    if not (folder / "config.json").is_file():
        raise UnsupportedModelError(
            f"{folder} has no config.json: it is not a model folder. "
            "Pass a folder written by save_pretrained."
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        if pickles:
            raise UnsupportedModelError(
                f"{folder} holds only pickle weights ({pickles[0]}), which can run code when "
                "loaded. Convert it with save_pretrained(..., safe_serialization=True)."
            )
        raise UnsupportedModelError(
            f"{folder} has no *.safetensors file. Pass a folder that holds the weights."
        )
