"""What is no model folder is refused before anything starts."""

from pathlib import Path

import pytest

from quantgate_serve.model_folder import UnsupportedModelError, check_folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"has no config\.json"),
        (("model.safetensors",), r"has no config\.json"),
        (("config.json",), r"has no \*\.safetensors file"),
        (("config.json", "pytorch_model.bin"), r"only pickle weights \(pytorch_model\.bin\)"),
    ],
)
def test_a_folder_without_configuration_or_weights_is_refused(
    names: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UnsupportedModelError, match=message):
        check_folder(tmp_path)


def test_a_folder_with_both_is_left_to_the_engine(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    check_folder(tmp_path)
