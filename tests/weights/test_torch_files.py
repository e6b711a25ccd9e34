import re
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from tables import each_row

from dspo_jax.weights.torch_files import open_weights

torch = pytest.importorskip("torch")


class Evil:
    def __reduce__(self):
        return print, ("run",)


@each_row("wrap", [dict, lambda state: {"epoch": 3, "state_dict": state}])
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
        with pytest.raises(ValueError, match=re.escape(f"{name}.pt: no file of tensors alone")) as caught:
            open_weights(tmp_path / f"{name}.pt")
        assert str(caught.value).isprintable()
        assert "two options" not in str(caught.value)  # torch's advice to load it all the same
    with pytest.raises(ValueError, match=r"number\.pt: holds a dict, not a state dict of tensors"):
        open_weights(tmp_path / "number.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
        open_weights(tmp_path / "none.pt")
    assert "run" not in capsys.readouterr().out


def fp8():
    return torch.ones(3).to(torch.float8_e4m3fn)


def meta():
    return torch.empty(10**6, 10**6, device="meta")


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about kinds of tensors that it is to drop
@each_row(
    ("make", "fault"),
    [
        (lambda: torch.eye(3).to_sparse(), "is stored as torch.sparse_coo and not as an array"),
        (nested, "is stored as torch.strided (nested) and not as an array"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, "is stored as torch.strided and not"),
        (fp8, "is stored as float8_e4m3fn, which is not supported"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "is stored as qint8"),
        (lambda: torch.ones(3, dtype=torch.complex64), "is stored as complex64"),
        (meta, "has no values (device meta)"),
        (
            lambda: torch.zeros(1).expand(10**6, 10**6),
            "has shape (1000000, 1000000), of which the file holds 4 bytes",
        ),
    ],
)
def test_tensors_that_are_no_arrays_are_named(make, fault, tmp_path):
    torch.save({"a.weight": make()}, tmp_path / "w.pt")
    message = f"{tmp_path}/w.pt: tensor 'a.weight' {fault}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*; save float32, float16 or bfloat16"):
        open_weights(tmp_path / "w.pt")


def test_views_of_a_larger_tensor_are_read(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": whole.T, "b": whole[1:, ::2], "c": whole.to(torch.bfloat16).T}, tmp_path / "w.pt")
    opened = open_weights(tmp_path / "w.pt")
    np.testing.assert_array_equal(opened["a"].read(), whole.numpy().T)
    np.testing.assert_array_equal(opened["b"].read(), whole.numpy()[1:, ::2])
    np.testing.assert_array_equal(opened["c"].read().astype(np.float32), whole.numpy().T)


def test_the_published_aesthetic_head(test_data):
    opened = open_weights(test_data / "sac+logos+ava1-l14-linearMSE.pth")
    assert opened["layers.0.weight"].shape == (1024, 768)
    assert opened["layers.7.bias"].shape == (1,)
