"""The table of NVIDIA GPUs."""

import pytest
from tables import each_row

from dspo_jax.errors import UserError
from dspo_jax.monitoring.devices import peak_flops
from dspo_jax.monitoring.gpus import GPUS, REFUSED, find_gpu, gpu_of_kind


@pytest.mark.parametrize("name", GPUS)
def test_numbers_of_a_card_agree_with_each_other(name):
    gpu = GPUS[name]
    assert gpu_of_kind(gpu.kind) is gpu
    assert peak_flops(gpu.kind) == gpu.bfloat16
    assert gpu.tf32 == pytest.approx(gpu.bfloat16 / 2, rel=0.02)
    assert gpu.capability >= (8, 0)
    assert gpu.link < gpu.bandwidth
    assert gpu.source
    # FLOP of a multiprocessor in a cycle: 512 of a GeForce, 1,024 of a professional card, at the boost clock;
    # 2,048 of an A100, 4,096 of Hopper and 8,192 of a B200, which reach it at a lower one.
    a_cycle = gpu.bfloat16 / gpu.cores / gpu.clock
    assert min(abs(a_cycle / 2**power - 1) for power in range(9, 14)) < 0.1


def test_float32_without_tensor_cores():
    assert GPUS["h100"].float32 == pytest.approx(66.9e12, rel=0.001)  # NVIDIA's data sheet: 67
    assert GPUS["rtx4090"].float32 == pytest.approx(82.6e12, rel=0.001)  # and whitepaper


@each_row(
    ("kind", "name"),
    [
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx6000pro"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA A10G", None),
        ("TPU v5", None),
    ],
)
def test_a_card_by_its_kind(kind, name):
    assert gpu_of_kind(kind) is (GPUS[name] if name else None)


@pytest.mark.parametrize("name", REFUSED)
def test_cards_before_ampere_are_refused_with_the_reason(name):
    with pytest.raises(UserError, match=f"--gpu = '{name}': cannot be used: .* no bfloat16 .* no fused"):
        find_gpu("--gpu", name)


def test_an_unknown_card_is_refused_with_the_nearest_and_all():
    with pytest.raises(
        UserError, match=r"--topology = 'h10': unknown; did you mean 'h100'.*rtx3060, .*rtx5090"
    ):
        find_gpu("--topology", "h10")
