"""Split among processes, a step has the bits it has in one, and a checkpoint goes on at any number of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sharded_runs import STEPS, everything, network, optimizer_of, take_steps
from torch import Tensor

WORLDS = (1, 2, 4)


def run(cases: str, world: int, folder: Path) -> None:
    program = Path(__file__).parents[1] / "sharded_runs.py"
    ran = subprocess.run(
        [sys.executable, str(program), cases, str(world), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases at all numbers of processes, each number in one start of them."""
    folder = tmp_path_factory.mktemp("runs")
    for world in WORLDS:
        cases = "steps,clipped,trained,offloaded,released" + (",replicated,refused" if world == 2 else "")
        run(cases + (",orthogonalised,factored" if world < 4 else ""), world, folder)
    for world in WORLDS:
        run("resumed" + (",orthogonalised_again" if world < 4 else ""), world, folder)
    return folder


@pytest.fixture(scope="module")
def unsplit() -> dict[str, Tensor]:
    model = network()
    optimizer = optimizer_of(model)
    take_steps(model, optimizer, range(STEPS))
    return everything(model, optimizer)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("world", WORLDS)
def test_steps_of_parts_have_the_bits_of_steps_of_the_whole(world: int, runs: Path, unsplit: dict[str, Tensor]) -> None:
    """Weights of both dtypes, codes, scales, counts and random bits, rows divided unevenly."""
    assert_same(load_file(runs / f"steps-{world}.safetensors"), unsplit)


@pytest.mark.parametrize("world", WORLDS)
def test_a_checkpoint_of_any_number_of_processes_goes_on_bit_for_bit(
    world: int, runs: Path, unsplit: dict[str, Tensor]
) -> None:
    found = load_file(runs / f"resumed-{world}.safetensors")
    assert_same(found, {f"{saved}.{name}": value for saved in WORLDS for name, value in unsplit.items()})


def test_gradients_are_clipped_by_the_norm_of_all_parts_and_skipped_together(runs: Path) -> None:
    model = network()
    optimizer = optimizer_of(model, clip_norm=0.5)
    take_steps(model, optimizer, range(1))
    squares = sum(p.grad.double().square().sum() for p in model.parameters())
    for world in WORLDS:
        found = load_file(runs / f"clipped-{world}.safetensors")
        assert found["skipped"] == 1
        # Squares are added in fp32 in chunks of 4096: sixteen in a lane, then eight halvings.
        assert abs(found["norm"] ** 2 - squares) <= 25 * torch.finfo(torch.float32).eps * squares
        for name, p in model.named_parameters():
            # The norm's last bits, and so at most a rounding of the clipping coefficient, depend on the split.
            step = 1e-2 if p.dtype == torch.float32 else 2**-7
            assert ((found[name].double() - p.double()).abs() <= step / 8).all(), name


def test_fsdp_and_ddp_train_as_one_process_does(runs: Path) -> None:
    one = load_file(runs / "trained-1.safetensors")
    for world in WORLDS[1:]:
        found = load_file(runs / f"trained-{world}.safetensors")
        for name, value in found.items():
            # Adam's first steps are lr times a sign; gradients differ by the order in which they were added up.
            far = (value - one[name]).abs() > 1e-2 / 8
            assert far.double().mean() < 0.01, name


@pytest.mark.parametrize("world", WORLDS)
def test_states_in_host_memory_are_split_saved_and_loaded_as_any(
    world: int, runs: Path, unsplit: dict[str, Tensor]
) -> None:
    found = load_file(runs / f"offloaded-{world}.safetensors")
    kinds = ("straight", "from a plain run", "in a plain run")
    assert_same(found, {f"{kind}.{name}": value for kind in kinds for name, value in unsplit.items()})


@pytest.mark.parametrize("world", WORLDS)
def test_steps_inside_fsdps_backward_are_those_after_it(world: int, runs: Path) -> None:
    """Bit for bit without clipping; with it, to the order in which the squares of parts are added."""
    found = load_file(runs / f"released-{world}.safetensors")
    names = [name.removeprefix("after-None.") for name in found if name.startswith("after-None.")]
    assert names
    for name in names:
        assert torch.equal(found[f"inside-None.{name}"], found[f"after-None.{name}"]), name
    norm = found["inside-0.5.norm"]
    assert norm > 0.5, "there must be something to clip"
    for name in names:
        if (
            name.count(".") == 1
        ):  # a weight: a step is at most about lr, and a norm's last bits move it by as much of it
            inside, after = found[f"inside-0.5.{name}"], found[f"after-0.5.{name}"]
            rounding = torch.finfo(torch.float32).eps * after.abs().clamp_min(1e-2)
            # A code may round the other way and then moves the next step by a sixteenth of it.
            assert ((inside - after).abs() <= 4 * rounding).double().mean() > 0.99, name
            assert ((inside - after).abs() <= 1e-2 / 8).all(), name


def test_muon_of_parts_has_the_bits_of_muon_of_the_whole_and_goes_on_from_any_checkpoint(runs: Path) -> None:
    one, two = (load_file(runs / f"orthogonalised-{world}.safetensors") for world in (1, 2))
    assert any(name.endswith("momentum_buffer_code") for name in one)
    assert not torch.equal(one["1.weight"], network()[1].weight)
    assert_same(two, one)
    for world in (1, 2):
        found = load_file(runs / f"orthogonalised_again-{world}.safetensors")
        assert_same(found, {f"{saved}.{name}": value for saved in (1, 2) for name, value in one.items()})


def test_adafactor_of_parts_is_adafactor_of_the_whole_to_the_rounding_of_its_sums(runs: Path) -> None:
    one, two = (load_file(runs / f"factored-{world}.safetensors") for world in (1, 2))
    assert any(name.endswith("col_var") for name in one)
    for name, value in one.items():
        kind, _, rest = name.partition(".")
        for found in (two[name], two[f"{kind} from one.{rest}"]):
            difference = (found.double() - value.double()).abs()
            if name.endswith("exp_avg_code"):
                assert (difference != 0).double().mean() < 0.01, name  # of those that lie between two levels
            elif kind == "momentum" and rest.count(".") < 2:
                assert (difference <= 1e-2 / 8).all(), name  # a code that rounds the other way is a sixteenth off
            else:
                # Sums of hundreds of squares, in another order; steps of about lr.
                bound = 16 * torch.finfo(torch.float32).eps * (value.double().abs() + 1e-2)
                assert (difference <= bound).all(), name


def test_splits_that_cut_blocks_are_refused_by_every_process(runs: Path) -> None:
    assert load_file(runs / "refused-2.safetensors")["done"] == 1


def test_release_of_replicas_is_refused_by_every_process(runs: Path) -> None:
    assert load_file(runs / "replicated-2.safetensors")["done"] == 1
