"""What each process of a distributed test does; started by test_sharding.py as `sharded_runs.py CASE WORLD FOLDER`.

Every case writes what it ended with, gathered to whole tensors, to FOLDER/CASE-WORLD.safetensors.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor, nn

from pyeff.optim import Adafactor8bit, AdamW8bit, GradientRelease, Muon8bit, Optimizer8bit

STEPS, MIDDLE = 4, 2


def network() -> nn.Module:
    """Rows of whole blocks, rows that end in a part of one, rows that no number of processes divides."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(13, 300), nn.Linear(300, 70), nn.Linear(70, 512), nn.Linear(512, 6))
    model[2].bfloat16()
    return model


def optimizer_of(model: nn.Module, **options: Any) -> Optimizer8bit:
    """Vectors in fp32, as the documentation says; weights of both dtypes, stochastic rounding among them."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
    vectors = [(name, p) for name, p in model.named_parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "states": "fp32", "master": "fp32", "weight_decay": 0.0}]
    return AdamW8bit(groups, lr=1e-2, **options)


def take_steps(model: nn.Module, optimizer: Optimizer8bit, steps: range) -> None:
    """Steps on gradients that depend on the step and the parameter's name alone."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for step in steps:
        for i, p in enumerate(model.parameters()):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p.dtype)
            g *= (10.0 ** (torch.arange(g.numel()) % 7 - 3)).view_as(g).to(p.dtype)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
        optimizer.step()


def whole(x: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def everything(model: nn.Module, optimizer: Optimizer8bit) -> dict[str, Tensor]:
    optimizer.state_dict()  # waits until states are where they belong
    found = {}
    for name, p in model.named_parameters():
        found[name] = whole(p)
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{name}.{key}"] = whole(value)
    return found


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def checkpoint(model: nn.Module, optimizer: Optimizer8bit, folder: Path, *, load: bool = False) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, states = get_state_dict(model, optimizer)
    tree = {"model": weights, "optimizer": states}
    if not load:
        dcp.save(tree, checkpoint_id=folder)
        return
    dcp.load(tree, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=tree["model"], optim_state_dict=tree["optimizer"])


def steps(world: int, folder: Path) -> dict[str, Tensor]:
    """FSDP2; saves a checkpoint in the middle."""
    model = sharded(network())
    optimizer = optimizer_of(model)
    take_steps(model, optimizer, range(MIDDLE))
    checkpoint(model, optimizer, folder / f"checkpoint-{world}")
    take_steps(model, optimizer, range(MIDDLE, STEPS))
    return everything(model, optimizer)


def resumed(world: int, folder: Path) -> dict[str, Tensor]:
    """Goes on from the checkpoint of every world size and ends alike, whatever its own."""
    found = {}
    for saved in (1, 2, 4):
        model = sharded(network())
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        optimizer = optimizer_of(model, seed=0)
        checkpoint(model, optimizer, folder / f"checkpoint-{saved}", load=True)
        take_steps(model, optimizer, range(MIDDLE, STEPS))
        found |= {f"{saved}.{name}": value for name, value in everything(model, optimizer).items()}
    return found


def clipped(world: int, folder: Path) -> dict[str, Tensor]:
    """The norm is that of all parts; a NaN in one process's part skips the step in every process."""
    model = sharded(network())
    optimizer = optimizer_of(model, clip_norm=0.5)
    take_steps(model, optimizer, range(1))
    found = everything(model, optimizer)
    norm = optimizer._norms([c for i, g in enumerate(optimizer.param_groups) for c in optimizer._plans.calls(i, g)])
    found["norm"] = next(iter(norm.values()))
    if dist.get_rank() == 0:
        next(model.parameters()).grad.to_local()[0, 0] = torch.nan
    optimizer.step()
    for name, value in everything(model, optimizer).items():
        assert torch.equal(value, found[name]), name
    skipped = torch.tensor([optimizer.skipped_steps])
    dist.all_reduce(skipped)
    found["skipped"] = skipped // world
    return found


def trained(world: int, folder: Path) -> dict[str, Tensor]:
    """A backward through FSDP2 and one through DDP, each on its share of one batch."""
    from torch.nn.parallel import DistributedDataParallel

    rank, found = dist.get_rank(), {}
    for kind in ("fsdp", "ddp"):
        model = network().float()
        names = [name for name, _ in model.named_parameters()]
        wrapped = sharded(model) if kind == "fsdp" else DistributedDataParallel(model)
        optimizer = optimizer_of(model)
        for step in range(2):
            tokens = torch.randint(0, 13, (8,), generator=torch.Generator().manual_seed(step))
            wrapped(tokens[rank :: dist.get_world_size()]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, value in everything(model, optimizer).items():
            if name in names:
                found[f"{kind}.{name}"] = value
                if kind == "ddp":
                    same = value.clone()
                    dist.broadcast(same, 0)
                    assert torch.equal(same, value), name
    return found


def offloaded(world: int, folder: Path) -> dict[str, Tensor]:
    """States in memory that the device is not to see; goes on from the checkpoint of a run without."""
    from fake_transfers import pretend

    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, order=("up", "step", "down"))
        model = sharded(network())
        optimizer = optimizer_of(model, offload=True)
        take_steps(model, optimizer, range(MIDDLE))
        checkpoint(model, optimizer, folder / f"offloaded-{world}")
        take_steps(model, optimizer, range(MIDDLE, STEPS))
        found = {f"straight.{name}": value for name, value in everything(model, optimizer).items()}
        again = sharded(network())
        optimizer = optimizer_of(again, offload=True)
        checkpoint(again, optimizer, folder / f"checkpoint-{world}", load=True)
        take_steps(again, optimizer, range(MIDDLE, STEPS))
        found |= {f"from a plain run.{name}": value for name, value in everything(again, optimizer).items()}
    plain = sharded(network())
    optimizer = optimizer_of(plain)
    checkpoint(plain, optimizer, folder / f"offloaded-{world}", load=True)
    take_steps(plain, optimizer, range(MIDDLE, STEPS))
    return found | {f"in a plain run.{name}": value for name, value in everything(plain, optimizer).items()}


def released(world: int, folder: Path) -> dict[str, Tensor]:
    """Steps inside FSDP2's backward and after it, clipped by the norm of all parts and not."""
    found = {}
    for clip_norm in (None, 0.5):
        for inside in (True, False):
            model = sharded(network().float())
            optimizer = optimizer_of(model, clip_norm=None if inside else clip_norm)
            release = GradientRelease(optimizer, clip_norm=clip_norm) if inside else None
            for step in range(2):
                tokens = torch.randint(0, 13, (8,), generator=torch.Generator().manual_seed(step))
                mine = tokens[dist.get_rank() :: world]

                def loss(mine: Tensor = mine, model: nn.Module = model) -> Tensor:
                    return 10 * model(mine).square().mean()

                if release is not None:
                    release.backward(loss)
                    assert all(p.grad is None for p in model.parameters())
                else:
                    loss().backward()
                    optimizer.step()
                    optimizer.zero_grad()
            kind = f"{'inside' if inside else 'after'}-{clip_norm}"
            found |= {f"{kind}.{name}": value for name, value in everything(model, optimizer).items()}
            if release is not None and clip_norm is not None:
                found[f"{kind}.norm"] = release.norm
    return found


def muon_of(model: nn.Module, **options: Any) -> Muon8bit:
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
    return Muon8bit(matrices, lr=1e-2, adjust_lr_fn="match_rms_adamw", **options)


def frozen_vectors(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.requires_grad_(p.ndim > 1)
    return model


def orthogonalised(world: int, folder: Path) -> dict[str, Tensor]:
    """Muon on rows that no number of processes divides; clipped, and saved in the middle."""
    model = sharded(frozen_vectors(network()))
    optimizer = muon_of(model, clip_norm=1e9)  # asks for the norm and does not depend on its last bits
    take_steps(model, optimizer, range(MIDDLE))
    checkpoint(model, optimizer, folder / f"orthogonalised-{world}")
    take_steps(model, optimizer, range(MIDDLE, STEPS))
    found = everything(model, optimizer)
    if dist.get_rank() == 0:
        next(model.parameters()).grad.to_local()[0, 0] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for name, value in everything(model, optimizer).items():
        assert torch.equal(value, found[name]), name
    # Inside FSDP2's backward the bits are those of a step after it.
    ends = []
    for inside in (True, False):
        model = sharded(frozen_vectors(network().float()))
        optimizer = muon_of(model)
        tokens = torch.arange(8) + dist.get_rank()
        if inside:
            with GradientRelease(optimizer) as release:
                release.backward(lambda model=model, tokens=tokens: model(tokens).square().mean())
        else:
            model(tokens).square().mean().backward()
            optimizer.step()
        ends.append(everything(model, optimizer))
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    return found


def orthogonalised_again(world: int, folder: Path) -> dict[str, Tensor]:
    """Goes on from the checkpoint of every number of processes."""
    found = {}
    for saved in (1, 2):
        model = sharded(frozen_vectors(network()))
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        optimizer = muon_of(model, clip_norm=1e9)
        checkpoint(model, optimizer, folder / f"orthogonalised-{saved}", load=True)
        take_steps(model, optimizer, range(MIDDLE, STEPS))
        found |= {f"{saved}.{name}": value for name, value in everything(model, optimizer).items()}
    return found


def factored(world: int, folder: Path) -> dict[str, Tensor]:
    """Adafactor, with a first moment and without; goes on from its checkpoint as if there had been no stop."""

    def started(beta1: float | None) -> tuple[nn.Module, Adafactor8bit]:
        model = sharded(network().float())
        model.register_parameter("cube", cube())
        groups = [{"params": [], "states": states} for states in ("8bit", "fp32")]
        for name, p in model.named_parameters():
            groups[p.ndim == 1]["params"].append((name, p))
        return model, Adafactor8bit(groups, lr=1e-2, beta1=beta1)

    found = {}
    for beta1 in (None, 0.9):
        kind, path = "plain" if beta1 is None else "momentum", folder / f"factored-{beta1}-{world}"
        model, optimizer = started(beta1)
        take_steps(model, optimizer, range(MIDDLE))
        checkpoint(model, optimizer, path)
        take_steps(model, optimizer, range(MIDDLE, STEPS))
        found |= {f"{kind}.{name}": value for name, value in everything(model, optimizer).items()}
        model, optimizer = started(beta1)
        checkpoint(model, optimizer, path, load=True)
        take_steps(model, optimizer, range(MIDDLE, STEPS))
        for name, value in everything(model, optimizer).items():
            assert torch.equal(value, found[f"{kind}.{name}"]), name
        if world == 2 and (folder / f"factored-{beta1}-1").exists():
            model, optimizer = started(beta1)
            checkpoint(model, optimizer, folder / f"factored-{beta1}-1", load=True)
            take_steps(model, optimizer, range(MIDDLE, STEPS))
            found |= {f"{kind} from one.{name}": value for name, value in everything(model, optimizer).items()}
    return found


def cube() -> nn.Parameter:
    """Rows of matrices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    start = torch.randn(5, 8, 9, generator=torch.Generator().manual_seed(1))
    return nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))


def replicated(world: int, folder: Path) -> dict[str, Tensor]:
    """Release under DDP is refused before a step, whoever finds it out, and works again when DDP is gone."""
    from torch.nn.parallel import DistributedDataParallel

    def loss_of(model: nn.Module) -> Tensor:
        return 10 * model(torch.tensor([dist.get_rank(), 5])).square().mean()

    for clip_norm in (None, 0.5):
        model, before = network().float(), network().float()
        wrapped = DistributedDataParallel(model)
        release = GradientRelease(optimizer_of(model), clip_norm=clip_norm)
        with pytest.raises(
            ValueError, match="belongs to a DistributedDataParallel, which reduces gradients only after"
        ):
            release.backward(lambda wrapped=wrapped: loss_of(wrapped))
        for p, q in zip(model.parameters(), before.parameters(), strict=True):
            assert p.grad is None
            assert torch.equal(p, q)
        wrapped.cycle = [wrapped]  # only a collection finds it
        del wrapped
        release.backward(lambda model=model: loss_of(model))
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))

        model = network().float()
        wrapped = DistributedDataParallel(model)
        gc.freeze()  # hides the module, as from a run that freezes what it has before it trains
        release = GradientRelease(optimizer_of(model), clip_norm=clip_norm)
        with pytest.raises(RuntimeError, match="left with a gradient after the backward"):
            release.backward(lambda wrapped=wrapped: loss_of(wrapped))
        gc.unfreeze()
        if clip_norm is not None:
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    return {"done": torch.ones(())}


def refused(world: int, folder: Path) -> dict[str, Tensor]:
    """A split that cuts a block, and one between columns, raise on every process before anything is changed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    for shape, dim, options, match in (
        ((300,), 0, {}, "cuts its blocks of 256"),
        ((300,), 0, {"states": "fp32"}, "states='fp32' and master='fp32'"),
        ((300,), 0, {"states": "fp32", "master": "ecc8"}, "states='fp32' and master='fp32'"),
        ((8, 512), 1, {}, "along dimension 0 only"),
    ):
        p = nn.Parameter(distribute_tensor(torch.zeros(shape, dtype=torch.bfloat16), mesh, [Shard(dim)]))
        with pytest.raises(ValueError, match=match):
            AdamW8bit([p], **options)
    vector = nn.Parameter(distribute_tensor(torch.zeros(512 * world), mesh, [Shard(0)]))
    AdamW8bit([vector])
    matrix = nn.Parameter(distribute_tensor(torch.zeros(8, 300), mesh, [Shard(0)]))
    optimizer = AdamW8bit([matrix])
    saved = AdamW8bit([nn.Parameter(torch.zeros(8, 300))])
    plain = saved.param_groups[0]["params"][0]
    plain.grad = torch.ones(8, 300)
    saved.step()
    optimizer.load_state_dict(saved.state_dict())
    assert torch.equal(whole(optimizer.state[matrix]["exp_avg_code"]), saved.state[plain]["exp_avg_code"])
    with pytest.raises(ValueError, match="full_tensor"):
        saved.load_state_dict(optimizer.state_dict())
    return {"done": torch.ones(())}


CASES = {
    case.__name__: case
    for case in (
        *(steps, resumed, clipped, trained, offloaded, released, replicated, refused),
        *(orthogonalised, orthogonalised_again, factored),
    )
}


def process(rank: int, cases: list[str], world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store-{os.getppid()}", world), rank=rank,
                            world_size=world)  # fmt: skip
    for case in cases:
        found = CASES[case](world, Path(folder))
        if rank == 0:
            save_file({k: v.contiguous() for k, v in found.items()}, Path(folder) / f"{case}-{world}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(
        process,
        args=(sys.argv[1].split(","), int(sys.argv[2]), sys.argv[3]),
        nprocs=int(sys.argv[2]),
        start_method="fork",
    )
