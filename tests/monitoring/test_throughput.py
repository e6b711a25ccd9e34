"""The clock, the count of FLOPs against counts by hand, the table of peaks, memory and traces."""

import json
import os
import types

import jax
import jax.numpy as jnp
import pytest
from fake_time import FakeTime
from tables import each_row

from dspo_jax.monitoring import devices
from dspo_jax.monitoring.clock import Clock, Profiler
from dspo_jax.monitoring.devices import count_flops, has_bfloat16, memory_of, memory_peaks, peak_flops
from dspo_jax.parallel.mesh import batch_sharding, make_mesh


def test_clock_leaves_out_compilation_and_pauses():
    time = FakeTime()
    clock = Clock(now=time)
    time.seconds += 50  # compiling
    clock.tick(8)
    assert (clock.seconds, clock.pairs, clock.mean(), clock.lap()) == (0.0, 0, 0.0, 0.0)
    for _ in range(4):
        time.seconds += 2
        clock.tick(8)
    assert clock.lap() == 4.0
    with clock.paused():
        time.seconds += 1000
    time.seconds += 1
    clock.tick(8)
    assert clock.lap() == 8.0
    assert clock.seconds == 9.0
    assert clock.mean() == 40 / 9


def test_clock_survives_a_restart():
    time = FakeTime()
    clock = Clock(now=time)
    clock.tick(8)
    time.seconds += 2
    clock.tick(8)
    restarted = Clock(**json.loads(json.dumps(clock.state())), now=time)
    time.seconds += 500
    restarted.tick(8)
    time.seconds += 6
    restarted.tick(8)
    assert restarted.mean() == 2.0
    assert restarted.lap() == 8 / 6


def test_clock_tells_how_much_of_a_lap_was_spent_waiting_for_data():
    time = FakeTime()
    clock = Clock(now=time)

    def step(wait, compute):
        with clock.waiting():
            time.seconds += wait
        time.seconds += compute
        clock.tick(8)

    step(wait=100, compute=50)  # before the clock runs
    for _ in range(3):
        step(wait=1, compute=3)
    with clock.paused():
        time.seconds += 1000
    assert clock.lap() == 2.0
    assert clock.data_wait == 0.25
    step(wait=0, compute=4)
    clock.lap()
    assert clock.data_wait == 0.0


def test_flops_of_a_matrix_product():
    a, b = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 32), jnp.float32)
    assert count_flops(jnp.matmul, a, b) == 2 * 8 * 16 * 32


def test_flops_of_a_convolution_leave_out_the_padding():
    image, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 8, 8, 4), (3, 3, 4, 16)))

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    taps = 3 * 8 - 2  # along one side: the outermost of the first and of the last position fall outside
    assert count_flops(convolve, image, kernel) == 2 * taps * taps * 2 * 4 * 16


def test_flops_of_a_gradient_are_three_times_those_of_the_loss():
    x, w = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((128, 128), jnp.float32)

    def loss(w, x):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    # Two products forwards; backwards two for the weights, and one for what lies between.
    assert count_flops(jax.grad(loss), w, x) == pytest.approx(5 * 2 * 64 * 128 * 128, rel=0.03)


def test_the_body_of_a_scan_counts_once():
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)

    def power(x):
        return jax.lax.scan(lambda product, _: (product @ x, None), x, None, length=7)[0]

    assert count_flops(power, x) == pytest.approx(2 * 16**3, rel=0.01)


def test_flops_do_not_depend_on_the_mesh():
    mesh = make_mesh({"data": 8})
    a = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=batch_sharding(mesh))
    b = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    assert count_flops(jnp.matmul, a, b) == 2 * 8 * 16 * 32


def test_without_a_backend_that_counts_there_is_no_number(monkeypatch):
    def refuse(*, backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", refuse)
    assert count_flops(jnp.sin, jax.ShapeDtypeStruct((2,), jnp.float32)) is None


@each_row(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        # Other devices than these, though their names begin alike.
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("TPU v4 lite", None),
        ("TPU v2", None),
        ("cpu", None),
    ],
)
def test_peaks_by_device(kind, teraflops):
    peak = peak_flops(kind)
    assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12))


@each_row(
    ("platform", "capability", "found"),
    [
        ("gpu", "7.5", False),
        ("gpu", "8.0", True),
        ("gpu", "12.0", True),
        ("cpu", None, True),
        ("tpu", None, True),
    ],
)
def test_cards_before_ampere_have_no_bfloat16(platform, capability, found):
    device = types.SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    assert has_bfloat16(device) is found


def test_a_cpus_devices_share_the_machines_memory(monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**21}.__getitem__)
    assert memory_of(jax.devices()[0]) == 2**33 // jax.local_device_count()
    of_gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 7})
    assert memory_of(of_gpu) == 7


def test_memory_peaks(monkeypatch):
    ballast = bytes(2**20)
    peaks = memory_peaks()  # a CPU's memory is the host's
    del ballast
    assert set(peaks) == {"host_memory_peak_gib"}
    assert 0.05 < peaks["host_memory_peak_gib"] < 1000

    devices = [
        types.SimpleNamespace(memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak * 2**30})
        for peak in (3, 5, 4)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_peaks()["device_memory_peak_gib"] == 5


def test_the_hosts_memory_peak_is_in_the_systems_unit(monkeypatch):
    usage = types.SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setattr(devices.resource, "getrusage", lambda who: usage)
    for platform, expected in (("linux", 3.0), ("darwin", 3 / 2**10)):
        monkeypatch.setattr(devices.sys, "platform", platform)
        assert memory_peaks()["host_memory_peak_gib"] == expected


class FakeTrace:
    """Takes the place of JAX's profiler and notes before which step it was started and stopped."""

    def __init__(self, monkeypatch, time):
        self.step, self.time, self.calls = 0, time, []
        monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: self._note("start"))
        monkeypatch.setattr(jax.profiler, "stop_trace", lambda: self._note("stop"))

    def _note(self, call):
        self.calls.append((call, self.step))
        self.time.seconds += 100

    def run(self, clock, *, first, count, steps=5):
        with Profiler("folder", first, count, clock) as profiler:
            for self.step in range(1, steps + 1):
                profiler.before(self.step, jnp.zeros(()))
                self.time.seconds += 2
                clock.tick(8)
        return self.calls


@each_row(
    ("first", "count", "calls"),
    [
        (2, 2, [("start", 2), ("stop", 4)]),
        (2, 0, []),
        (4, 9, [("start", 4), ("stop", 5)]),  # the run ends within the window
        (5, 1, [("start", 5), ("stop", 5)]),
        (9, 1, []),
    ],
)
def test_a_trace_covers_its_steps_and_is_no_training_time(monkeypatch, first, count, calls):
    time = FakeTime()
    clock = Clock(now=time)
    assert FakeTrace(monkeypatch, time).run(clock, first=first, count=count) == calls
    assert clock.seconds == 4 * 2


def test_a_trace_is_written_even_if_the_run_fails_within_it(tmp_path):
    def fail():
        with Profiler(tmp_path, 1, 5, Clock()) as profiler:
            profiler.before(1, None)
            jnp.ones(3).sum().block_until_ready()
            raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        fail()
    assert [path for path in tmp_path.rglob("*.xplane.pb") if path.stat().st_size]


@each_row(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1 KiB"),
        (1003 * 2**20, "1,003 MiB"),
        (1024**3, "1 GiB"),
        (3 * 2**29, "1.5 GiB"),
    ],
)
def test_bytes_as_people_read_them(size, text):
    assert devices.in_units(size) == text
