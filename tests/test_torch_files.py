import re
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from dspo_jax.torch_files import open_weights

torch = pytest.importorskip("torch")


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("wrap", [dict, lambda state: {"epoch": 3, "state_dict": state}])
def test_state_dicts(tmp_path, wrap):
    half = torch.arange(6).reshape(2, 3).to(torch.bfloat16) / 8
    torch.save(wrap({"module.a.weight": half, "b": torch.tensor([1.5, 2.5])}), tmp_path / "w.pt")
    opened = open_weights(tmp_path / "w.pt")
    assert {name: (t.shape, t.dtype) for name, t in opened.items()} == {
        "a.weight": ((2, 3), jnp.bfloat16),
        "b": ((2,), np.float32),
    }
    np.testing.assert_array_equal(opened["a.weight"].read().astype(np.float32), half.float().numpy())
    np.testing.assert_array_equal(opened["b"].read(), [1.5, 2.5])


def test_the_format_before_torch_1_6(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(open_weights(tmp_path / "w.pth")["a"].read(), [1, 1])


def test_what_is_refused(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    torch.save({"a": 3}, tmp_path / "number.pt")
    (tmp_path / "text.pt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a", "b")
    for name in ("evil", "text", "zip"):
        with pytest.raises(ValueError, match=re.escape(f"{name}.pt: no file of tensors alone")):
            open_weights(tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match=r"number\.pt: holds a dict, not a state dict of tensors"):
        open_weights(tmp_path / "number.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
        open_weights(tmp_path / "none.pt")
    assert "run" not in capsys.readouterr().out


def test_the_published_aesthetic_head(test_data):
    opened = open_weights(test_data / "sac+logos+ava1-l14-linearMSE.pth")
    assert opened["layers.0.weight"].shape == (1024, 768)
    assert opened["layers.7.bias"].shape == (1,)
