"""States are saved and go on bit for bit, and those of other libraries are read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_runs import PAIRS, assert_same_run, network, saved_by, through_safetensors, train
from torch import Tensor, nn

from pyeff.ops._optimizer_states import decode_moment
from pyeff.optim import Adam8bit, AdamW8bit, Lion8bit, SGD8bit
from pyeff.reference.optimizer_step import CODE, MASTERS
from pyeff.train.checkpoint import split_tensors

# ---------------------------------------------------------------------------------------------------------- foreign


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_states_of_torchs_optimizers_are_read(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """In fp32 nothing is lost: the next step is torch's to the rounding. In 8 bits, moments are rounded once."""
    model = network()
    optimizer = theirs(model.parameters(), **options)
    train(model, optimizer, range(5))
    for states in ("fp32", "8bit"):
        twin = copy.deepcopy(model)
        loaded = ours(twin.parameters(), states=states)
        loaded.load_state_dict(optimizer.state_dict())
        assert loaded.param_groups[0]["lr"] == options["lr"]
        peer_model = copy.deepcopy(model)
        peer = theirs(peer_model.parameters(), **options)
        peer.load_state_dict(optimizer.state_dict())
        train(peer_model, peer, range(5, 6))
        train(twin, loaded, range(5, 6))
        for before, p, q in zip(model.parameters(), twin.parameters(), peer_model.parameters(), strict=True):
            step = (q - before).abs().max()
            # Roundings of the weight and the step; a code is within 1/16 of a moment, a quotient of two within 1/8.
            bound = 16 * torch.finfo(torch.float32).eps * (q.abs() + step) if states == "fp32" else step / 8
            assert ((p - q).abs() <= bound).all()


def test_states_of_bitsandbytes_are_read(tmp_path: Path) -> None:
    """Its layout written by hand: uint8 codes into a table of 256, times one absmax for each 256 elements."""
    torch.manual_seed(0)
    large, small = nn.Parameter(torch.randn(5, 1000)), nn.Parameter(torch.randn(10))
    signed, unsigned = torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)
    codes1, codes2 = (torch.randint(0, 256, (5, 1000), dtype=torch.uint8) for _ in range(2))
    absmax1, absmax2 = torch.rand(20), torch.rand(20)
    hidden = {
        "state1": codes1,
        "state2": codes2,
        "qmap1": signed,
        "qmap2": unsigned,
        "absmax1": absmax1,
        "absmax2": absmax2,
    }
    plain = {"state1": torch.randn(10), "state2": torch.rand(10)}
    group = {"params": [0, 1], "lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3, "alpha": 0.0}
    saved = {
        "state": {0: {"step": 7, "__bnb_optimizer_quant_state__": hidden}, 1: {"step": 7, **plain}},
        "param_groups": [group],
    }
    blocks = torch.arange(5000) // 256
    expected_m = (signed[codes1.long()].view(-1) * absmax1[blocks]).view(5, 1000)
    expected_v = (unsigned[codes2.long()].view(-1) * absmax2[blocks]).view(5, 1000)
    exact = AdamW8bit([large, small], states="fp32")
    exact.load_state_dict(saved)
    assert torch.equal(exact.state[large]["exp_avg"], expected_m)
    assert torch.equal(exact.state[large]["exp_avg_sq"], expected_v)
    assert torch.equal(exact.state[small]["exp_avg_sq"], plain["state2"])
    assert exact.state[large]["step"] == 7
    assert exact.state[large]["beta_powers"].tolist() == [0.8**7, 0.9**7]
    assert [exact.param_groups[0][name] for name in ("lr", "betas", "eps", "weight_decay")] == [
        0.5,
        (0.8, 0.9),
        1e-6,
        0.3,
    ]
    coded = AdamW8bit([large, small])
    coded.load_state_dict(saved)
    decoded = decode_moment(coded.state[large]["exp_avg_code"], coded.state[large]["exp_avg_scale"], 256)
    scale = coded.state[large]["exp_avg_scale"].repeat_interleave(256, dim=1)[:, :1000]
    assert ((decoded - expected_m).abs() <= scale / 16).all()
    del hidden["absmax2"]
    with pytest.raises(ValueError, match="qmap2 and absmax2"):
        AdamW8bit([large, small]).load_state_dict(saved)


def test_foreign_states_that_mean_something_else_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="amsgrad"):
        AdamW8bit(model.parameters()).load_state_dict(
            saved_by(torch.optim.AdamW(model.parameters(), amsgrad=True), model)
        )
    with pytest.raises(ValueError, match="weight decay in the gradient"):
        AdamW8bit(model.parameters()).load_state_dict(
            saved_by(torch.optim.Adam(model.parameters(), weight_decay=0.1), model)
        )
    with pytest.raises(ValueError, match="has no exp_avg"):
        AdamW8bit(model.parameters()).load_state_dict(
            saved_by(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
        )


# ---------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("states", ["8bit", "fp32"])
@pytest.mark.parametrize("cls", [Adam8bit, AdamW8bit, Lion8bit, SGD8bit])
def test_every_optimizer_resumes_bit_for_bit(cls: Any, states: str, master: str, tmp_path: Path) -> None:
    model = network().bfloat16()
    options = {"lr": 1e-2, "states": states, "master": master, "clip_norm": 0.5}
    optimizer = cls(model.parameters(), **options)

    def run(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).bfloat16()
            optimizer.step()

    run(model, optimizer, range(3))
    resumed = copy.deepcopy(model)
    fresh = cls(resumed.parameters(), **options | {"lr": 0.5})
    fresh.load_state_dict(through_safetensors(optimizer.state_dict(), tmp_path))
    run(model, optimizer, range(3, 6))
    run(resumed, fresh, range(3, 6))
    assert_same_run((model, optimizer), (resumed, fresh))


def test_resume_through_safetensors_is_bitwise(tmp_path: Path) -> None:
    model = network()
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    train(model, optimizer, range(5))
    resumed = copy.deepcopy(model)
    fresh = AdamW8bit(resumed.parameters(), lr=0.7)
    fresh.load_state_dict(through_safetensors(optimizer.state_dict(), tmp_path))
    assert fresh.param_groups[0]["lr"] == 1e-2
    assert fresh.param_groups[0]["betas"] == (0.9, 0.999)
    assert_same_run((model, optimizer), (resumed, fresh))
    train(model, optimizer, range(5, 10))
    train(resumed, fresh, range(5, 10))
    assert_same_run((model, optimizer), (resumed, fresh))


def test_resume_of_bf16_parameters_keeps_bytes_bytes() -> None:
    model = network().bfloat16()
    optimizer = AdamW8bit(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    other = copy.deepcopy(model)
    fresh = AdamW8bit(other.parameters())
    fresh.load_state_dict(optimizer.state_dict())
    assert_same_run((model, optimizer), (other, fresh))


def test_loaded_states_are_copies() -> None:
    model = network()
    optimizer = AdamW8bit(model.parameters())
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    fresh = AdamW8bit(copy.deepcopy(model).parameters())
    fresh.load_state_dict(saved)
    for p in fresh.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    fresh.step()
    assert all(
        torch.equal(value, kept["state"][i][name])
        for i, state in saved["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    )


def test_state_dict_names_its_code_and_holds_only_tensors_and_plain_values() -> None:
    model = network()
    optimizer = AdamW8bit(model.parameters())
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["code"] == CODE
    json.dumps(split_tensors(saved)[0])


def other_code(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["code"] = "another"


def other_shape(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg_code"] = torch.zeros(7, dtype=torch.uint8)


def other_dtype(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg_sq_scale"] = saved["state"][1]["exp_avg_sq_scale"].bfloat16()


def missing(saved: dict[str, Any]) -> None:
    del saved["state"][2]["beta_powers"]


def fewer_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"] = []


def fewer_parameters(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


def nonsense(path: str, value: Any) -> Any:
    """Damage by writing a value that has the right type and no meaning."""

    def damage(saved: dict[str, Any]) -> None:
        name, key = path.split(".")
        where = saved["param_groups"][0] if name == "group" else saved["state"][1]
        where[key] = value(where[key]) if callable(value) else value

    return damage


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (other_code, "in code 'another'"),
        (other_shape, "exp_avg_code must be"),
        (other_dtype, "exp_avg_sq_scale must be"),
        (missing, "lacks beta_powers"),
        (fewer_groups, "has 0 param_groups"),
        (fewer_parameters, "has 5 parameters"),
        (lambda saved: saved.pop("param_groups"), "must be a dict with the keys"),
        (lambda saved: saved["state"].update({99: saved["state"][0]}), "belongs to no parameter"),
        (nonsense("group.lr", -1.0), "lr must be >= 0"),
        (nonsense("group.lr", float("nan")), "lr must be >= 0"),
        (nonsense("group.betas", [0.9, 1.5]), "betas must be"),
        (nonsense("group.betas", 0.9), "betas must be"),
        (nonsense("group.eps", -1.0), "eps must be >= 0"),
        (nonsense("group.weight_decay", float("inf")), "weight_decay must be >= 0"),
        (nonsense("group.clip_norm", -2.0), "clip_norm must be > 0"),
        (nonsense("group.seed", "a"), "seed must be"),
        (nonsense("group.lr", "fast"), "lr must be a number"),
        (nonsense("group.lr", None), "lr must be a number"),
        (nonsense("group.weight_decay", "0.1"), "weight_decay must be a number"),
        (nonsense("group.skip_nonfinite", "yes"), "skip_nonfinite must be True or False"),
        (nonsense("group.skipped_steps", -1), "skipped_steps must be a whole number"),
        (nonsense("group.skipped_steps", "many"), "skipped_steps must be a whole number"),
        (lambda saved: saved.update(param_groups=[3]), "param_groups must be a list of dicts"),
        (lambda saved: saved["param_groups"][0].pop("params"), "param_groups must be a list of dicts"),
        (lambda saved: saved["state"].update({0: 5}), "state must be a dict of dicts"),
        (nonsense("group.master", "fp32"), "has master fp32"),
        (nonsense("group.states", "fp32"), "has states fp32"),
        (nonsense("state.step", lambda x: x - 100), "step must be a whole number"),
        (nonsense("state.step", lambda x: x + 0.5), "step must be a whole number"),
        (nonsense("state.step", lambda x: x * float("nan")), "step must be a whole number"),
        (nonsense("state.step", 3), "step must be torch.float64"),
        (nonsense("state.beta_powers", lambda x: x + 1), "beta_powers must be in"),
        (nonsense("state.exp_avg_scale", lambda x: x - 1), "exp_avg_scale must be finite and >= 0"),
        (nonsense("state.exp_avg_sq_scale", lambda x: x * float("inf")), "exp_avg_sq_scale must be finite"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(damage: Any, match: str) -> None:
    model = network()
    saved = saved_by(AdamW8bit(model.parameters()), model)
    damage(saved)
    optimizer = AdamW8bit(model.parameters(), lr=0.5)
    train(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=match) as error:
        optimizer.load_state_dict(saved)
    assert "\n" not in str(error.value)
    assert str(optimizer.state_dict()) == str(before)


def test_another_block_size_and_another_optimizer_are_refused() -> None:
    model = network()
    saved = saved_by(AdamW8bit(model.parameters(), block_size=64), model)
    with pytest.raises(ValueError, match="build it with block_size=64"):
        AdamW8bit(model.parameters()).load_state_dict(saved)
    saved = saved_by(SGD8bit(model.parameters()), model)
    with pytest.raises(ValueError, match="lacks betas"):
        AdamW8bit(model.parameters()).load_state_dict(saved)
    saved = saved_by(torch.optim.Adagrad(model.parameters()), model)
    with pytest.raises(ValueError, match="in code None"):
        AdamW8bit(model.parameters()).load_state_dict(saved)
