"""States in the host's memory: the bits of those on the device, at the price of two slots, and every wait is needed."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from fake_transfers import QUEUES, pretend
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pyeff.optim import Adam8bit, AdamW8bit, GradientRelease, Lion8bit, Optimizer8bit, SGD8bit, offload
from pyeff.optim.offload import Slot
from pyeff.optim.pieces import row_pieces

ORDERS = list(itertools.permutations(QUEUES))
OPTIMIZERS = [Adam8bit, AdamW8bit, Lion8bit, SGD8bit]
# Larger than a bucket, in rows of whole blocks and not; a vector larger than one; small ones; nothing; a number.
SHAPES = [(70, 300), (33, 256), (5000,), (7,), (3, 3), (0, 4), (), (2, 5, 130)]


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    made = []
    for i, shape in enumerate(SHAPES):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        made.append(nn.Parameter(x.to(torch.bfloat16 if i % 2 else torch.float32).to(device)))
    return made


def gradients(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i + 1))
        p.grad = g.to(p.dtype).to(p.device)


def take_steps(params: list[nn.Parameter], optimizer: Optimizer8bit, steps: range) -> None:
    for step in steps:
        gradients(params, step)
        optimizer.step()


def everything(params: list[nn.Parameter], optimizer: Optimizer8bit) -> list[Tensor]:
    states = optimizer.state_dict()["state"]
    return [*(p.detach() for p in params), *(states[i][name] for i in sorted(states) for name in states[i])]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


def both(cls: Any, steps: int = 3, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What a run ends with, with its states in host memory and without."""
    found = []
    for offloaded in (True, False):
        params = parameters()
        optimizer = cls(params, lr=1e-2, offload=offloaded, **options)
        take_steps(params, optimizer, range(steps))
        found.append(everything(params, optimizer))
    return found[0], found[1]


# ---- the same bits, whatever the order


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_steps_have_the_bits_of_states_on_the_device(
    cls: Any, order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pretend(monkeypatch, order=order)
    assert same(*both(cls, master="ecc8"))
    assert made[0].log.count("up") > 6, "there must be several buckets a step"


@pytest.mark.parametrize("options", [{"states": "fp32", "master": "fp32"}, {"block_size": 64, "clip_norm": 0.5}])
def test_other_layouts_and_clipping_have_them_too(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, order=("up", "step", "down"))
    assert same(*both(AdamW8bit, **options))


@pytest.mark.parametrize("wait", [("up", "down"), ("step", "up"), ("down", "step")], ids="-for-".join)
def test_no_wait_can_be_left_out(wait: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For each of them there is an order of the queues in which the states come out wrong."""
    outcomes = []
    for order in ORDERS:
        pretend(monkeypatch, order=order, ignored=frozenset({wait}))
        outcomes.append(same(*both(AdamW8bit, master="none")))
        monkeypatch.undo()
    assert not all(outcomes)


def test_a_slot_is_not_filled_before_it_was_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this wait alone, that is; the one for the states themselves is left."""
    pretend(monkeypatch, order=("up", "step", "down"))
    assert same(*both(AdamW8bit, master="none"))
    monkeypatch.setattr(Slot, "free", property(lambda self: None, lambda self, mark: None), raising=False)
    assert not same(*both(AdamW8bit, master="none"))


class _Forgetful(dict[int, Any]):
    def get(self, key: int, default: Any = None) -> Any:
        return None


@pytest.mark.parametrize("forgets", [False, True])
def test_states_are_not_fetched_before_they_were_returned(forgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of all parameters and of one alone use the same states through different slots."""
    pretend(monkeypatch, order=("up", "step", "down"), bucket_bytes=2**20)
    found = []
    for offloaded in (True, False):
        params = parameters()
        optimizer = AdamW8bit(params, lr=1e-2, offload=offloaded)
        take_steps(params, optimizer, range(1))
        for step in range(1, 5):
            gradients(params, step)
            optimizer.step_parameter(0, 0)
            if offloaded and forgets:
                optimizer._host_states.devices[torch.device("cpu")].written = _Forgetful()  # type: ignore[union-attr]
            optimizer.step()
        found.append(everything(params, optimizer))
    assert same(*found) != forgets


# ---- what it costs


def test_two_slots_are_all_that_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pretend(monkeypatch, bucket_bytes=4096)
    params = parameters()
    optimizer = AdamW8bit(params, offload=True)
    take_steps(params, optimizer, range(2))
    assert len(made) == 1
    assert made[0].device_bytes == 2 * 4096
    large = sum(t.nbytes for s in optimizer.state.values() for n, t in s.items() if n not in ("step", "beta_powers"))
    assert large > 10 * 4096
    for state in optimizer.state.values():
        for name, t in state.items():
            if t.numel() and name not in ("step", "beta_powers"):
                assert made[0].is_host_memory(t), name


def test_small_parameters_travel_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, bucket_bytes=2**20)
    params = [nn.Parameter(torch.ones(257)) for _ in range(100)]
    optimizer = AdamW8bit(params, offload=True)
    take_steps(params, optimizer, range(1))
    (plan,) = (cached.plan for cached in optimizer._plans.kept.values())
    assert [len(bucket.spans) for bucket in plan._buckets] == [1]


@given(
    rows=st.integers(1, 10_000),
    row_bytes=st.integers(1, 10_000),
    block_size=st.sampled_from([64, 256]),
    limit=st.integers(64, 100_000),
    vector=st.booleans(),
)
def test_pieces_cover_every_row_once_cut_no_block_and_keep_to_the_limit(
    rows: int, row_bytes: int, block_size: int, limit: int, vector: bool
) -> None:
    shape = (rows,) if vector else (rows, 3)
    pieces = row_pieces(shape, rows * row_bytes, block_size=block_size, limit=limit)
    assert [row for start, stop in pieces for row in range(start, stop)] == list(range(rows))
    unit = block_size if vector else 1
    assert all(start % unit == 0 for start, _ in pieces)
    assert all((stop - start) * row_bytes <= limit or stop - start <= unit for start, stop in pieces)


# ---- everything else an optimizer does


def test_saved_copied_and_pickled_runs_go_on_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, order=("up", "step", "down"))
    params = parameters()
    optimizer = AdamW8bit(params, lr=1e-2, offload=True, master="ecc8")
    take_steps(params, optimizer, range(2))
    expected_params = parameters()
    expected = AdamW8bit(expected_params, lr=1e-2, master="ecc8")
    take_steps(expected_params, expected, range(4))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(params)
    for way in ("offloaded", "on the device", "deepcopy", "pickle"):
        if way in ("offloaded", "on the device"):
            other = copy.deepcopy(weights)
            again = AdamW8bit(other, offload=way == "offloaded", master="ecc8")
            again.load_state_dict(saved)
            assert again.param_groups[0]["offload"] == (way == "offloaded")
        else:
            other, again = (copy.deepcopy if way == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x)))(
                (params, optimizer)
            )
        take_steps(other, again, range(2, 4))
        assert same(everything(other, again), everything(expected_params, expected)), way


def test_states_saved_before_there_was_offload_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    params = parameters()
    optimizer = AdamW8bit(params)
    take_steps(params, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["offload"]
    again = AdamW8bit(params, offload=True)
    again.load_state_dict(saved)
    assert same(everything(params, again), everything(params, optimizer))


def test_states_of_torch_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    found = []
    for offloaded in (True, False):
        params = parameters()
        theirs = torch.optim.AdamW(params, lr=1e-2)
        for step in range(2):
            gradients(params, step)
            theirs.step()
        ours = AdamW8bit(params, offload=offloaded)
        ours.load_state_dict(theirs.state_dict())
        take_steps(params, ours, range(2, 4))
        found.append(everything(params, ours))
    assert same(*found)


def test_a_skipped_step_changes_nothing_and_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, order=("up", "step", "down"))
    params = parameters()
    optimizer = AdamW8bit(params, offload=True, skip_nonfinite=True)
    take_steps(params, optimizer, range(1))
    before = [t.clone() for t in everything(params, optimizer)]
    gradients(params, 1)
    params[0].grad[3, 3] = torch.nan
    optimizer.step()
    assert same(everything(params, optimizer), before)
    assert optimizer.skipped_steps == 1


def test_parameters_without_gradients_groups_added_and_states_replaced_are_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, order=("up", "step", "down"))
    found = []
    for offloaded in (True, False):
        params = parameters()
        optimizer = AdamW8bit(params[:4], lr=1e-2, offload=offloaded)
        take_steps(params, optimizer, range(1))
        optimizer.add_param_group({"params": params[4:], "states": "fp32", "offload": offloaded})
        gradients(params, 1)
        params[1].grad = None
        optimizer.step()
        optimizer.state_dict()  # what is replaced must have come back
        optimizer.state[params[0]]["exp_avg_code"] = torch.zeros_like(optimizer.state[params[0]]["exp_avg_code"])
        take_steps(params, optimizer, range(2, 4))
        found.append(everything(params, optimizer))
    assert same(*found)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_steps_inside_the_backward_share_the_slots(clip_norm: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pretend(monkeypatch, order=("up", "step", "down"))
    found = []
    for offloaded in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 70), nn.Tanh(), nn.Linear(70, 3))
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, offload=offloaded)
        with GradientRelease(optimizer, clip_norm=clip_norm) as release:
            for step in range(3):
                x = torch.randn(5, 300, generator=torch.Generator().manual_seed(step))
                release.backward(lambda x=x, model=model: model(x).square().mean())
        found.append(everything(list(model.parameters()), optimizer))
    assert same(*found)
    assert len(made) == 1
    assert made[0].device_bytes == 2 * 4096


def test_on_a_cpu_nothing_is_moved_and_nothing_changes() -> None:
    params = parameters()
    optimizer = AdamW8bit(params, lr=1e-2, offload=True)
    take_steps(params, optimizer, range(2))
    assert optimizer._host_states.devices == {torch.device("cpu"): None}
    assert same(*both(AdamW8bit))


def test_offload_must_be_yes_or_no() -> None:
    with pytest.raises(TypeError, match="offload must be True or False"):
        AdamW8bit([nn.Parameter(torch.ones(3))], offload="cpu")  # type: ignore[arg-type]


# ---- the GPU


def on_gpu(offloaded: bool, cls: Any = AdamW8bit, **options: Any) -> tuple[list[nn.Parameter], Optimizer8bit]:
    params = parameters("cuda")
    return params, cls(params, lr=1e-2, offload=offloaded, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"master": "ecc8", "clip_norm": 0.5}, {"states": "fp32", "master": "fp32"}])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_gpu_steps_have_the_bits_of_states_on_the_device(
    cls: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BUCKET_BYTES", "_SMALLEST_BUCKET"):
        monkeypatch.setattr(offload, name, 4096)
    found = []
    for offloaded in (True, False):
        params, optimizer = on_gpu(offloaded, cls, **options)
        take_steps(params, optimizer, range(5))
        if offloaded:
            assert optimizer.state[params[0]][optimizer._names(optimizer.param_groups[0])[0]].is_pinned()
        found.append(everything(params, optimizer))
    assert same(*found)


@pytest.mark.gpu
def test_gpu_states_take_two_slots_of_the_device() -> None:
    """16 parameters of 8 Mi elements: 273 MB of states, of which 67 MB may be on the device."""
    params = [nn.Parameter(torch.zeros(4096, 2048, dtype=torch.bfloat16, device="cuda")) for _ in range(16)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = AdamW8bit(params, offload=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    tables = 2**20
    assert torch.cuda.max_memory_allocated() - before <= 2 * offload.BUCKET_BYTES + tables


@pytest.mark.gpu
def test_gpu_step_with_offload_does_not_wait() -> None:
    params, optimizer = on_gpu(True, clip_norm=1.0)
    take_steps(params, optimizer, range(1))
    gradients(params, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_capture_with_offload_is_refused() -> None:
    params, optimizer = on_gpu(True)
    take_steps(params, optimizer, range(1))
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.gpu
def test_gpu_steps_inside_the_backward_have_the_bits_too() -> None:
    found = []
    for offloaded in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 700), nn.Tanh(), nn.Linear(700, 3)).cuda()
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, offload=offloaded)
        with GradientRelease(optimizer, clip_norm=0.1) as release:
            for step in range(4):
                x = torch.randn(5, 300, generator=torch.Generator().manual_seed(step)).cuda()
                release.backward(lambda x=x, model=model: model(x).square().mean())
        found.append(everything(list(model.parameters()), optimizer))
    assert same(*found)


def test_a_part_in_host_memory_stays_there_beside_a_mesh_of_gpus() -> None:
    """No GPU is needed to lay it out."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pyeff.optim.sharding import as_part, local

    class Parameter:
        placements = (Shard(0),)

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        p: Any = Parameter()
        p.device_mesh = DeviceMesh("cuda", [0, 1], _init_backend=False)
        codes = torch.zeros(2, 300, dtype=torch.uint8)
        made = as_part(codes, p, (4, 300))
    finally:
        dist.destroy_process_group()
    assert made.shape == (4, 300)
    assert local(made).data_ptr() == codes.data_ptr()
