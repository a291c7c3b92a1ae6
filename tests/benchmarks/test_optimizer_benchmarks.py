"""Long runs go on where they were killed; the comparison of codes measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import long_run
import optimizer_state_codes as codes
import pytest
import torch
from long_run import ARMS, SEEDS, Cell, Settings, Text
from long_run_report import BEGIN, END, report
from optimizer_state_gradients import Sample, gradients_of

TINY = Settings(steps=12, batch=2, context=8, width=16, layers=1, warmup=3, evaluate_every=6, windows=4)
MINE = [arm for arm in ARMS if arm.package == "torch"]


def text() -> Text:
    generator = torch.Generator().manual_seed(0)
    train, validation = (torch.randint(256, (n,), generator=generator).byte() for n in (2000, 500))
    return Text(train, validation, "random")


@pytest.mark.parametrize("arm", MINE, ids=[arm.name for arm in MINE])
def test_a_killed_cell_ends_with_the_bits_of_an_undisturbed_one(arm: long_run.Arm, tmp_path: Path) -> None:
    whole = Cell(arm, 3, text(), TINY, tmp_path / "none")
    whole.run(12)
    killed = Cell(arm, 3, text(), TINY, tmp_path / "cell.safetensors")
    killed.run(7, save_every=0.0)  # after every step
    resumed = Cell(arm, 3, text(), TINY, tmp_path / "cell.safetensors")
    assert resumed.done == 7
    resumed.run(12)
    assert resumed.curve == whole.curve
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_arms_of_a_seed_start_alike_and_see_the_same_data(tmp_path: Path) -> None:
    cells = [Cell(arm, 0, text(), TINY, tmp_path / "none") for arm in MINE]
    for cell in cells:
        assert torch.equal(cell.starts, cells[0].starts)
        for p, q in zip(cell.model.parameters(), cells[0].model.parameters(), strict=True):
            assert torch.equal(p, q.to(p.dtype))
    assert not torch.equal(Cell(MINE[0], 1, text(), TINY, tmp_path / "none").starts, cells[0].starts)


def test_a_checkpoint_of_another_text_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "cell.safetensors"
    Cell(MINE[0], 0, text(), TINY, path).save()
    with pytest.raises(SystemExit, match="another Python's library"):
        Cell(MINE[0], 0, Text(text().train, text().validation, "other"), TINY, path)


def test_the_report_counts_cells_and_judges_by_the_spread_of_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seeds of the baseline end 0.25 apart; one arm is off by an eighth, the other by a half."""
    losses = {"torch": (1.0, 1.25), "pyeff-fp32": (1.125, 1.375), "pyeff-bf16-none": (1.5, 1.75)}
    for name, by_seed in losses.items():
        arm = next(arm for arm in ARMS if arm.name == name)
        for seed, loss in enumerate(by_seed):
            result = Cell(arm, seed, text(), TINY, tmp_path / "none")
            result.run(6)
            cell = result.result() | {"validation_loss": loss}
            cell["curve"].append([12, loss])
            (tmp_path / f"{name}-{seed}.json").write_text(json.dumps(cell))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    report(tmp_path, page, tmp_path / "figure.png")
    written = page.read_text()
    assert f"6 of {len(ARMS) * len(SEEDS)} cells" in written
    assert "end 0.2500 apart" in written
    assert "+0.1250 | yes |" in written
    assert "+0.5000 | **no** |" in written
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "old" not in written
    assert capsys.readouterr().out.strip() in written
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_exact_states_have_no_error_and_a_zero_code_makes_large_steps() -> None:
    linear = codes.Code("linear with zero", lambda r: (r * 255).round() / 255)
    pairs = [(codes.FP32, codes.FP32), (codes.FP32, linear), (codes.SHIPPED_M, codes.SHIPPED_V)]
    steps = 100
    gradients = codes.synthetic(steps=steps, blocks=1, seed=0)
    exact, zero, shipped = codes.compare(pairs, gradients, [codes.BLOCK] * len(codes.SECTIONS), steps)
    assert exact.error == (0.0,) * len(codes.SECTIONS)
    # What Cauchy and Schwarz allow any gradients.
    bound = (1 - codes.BETA1) / ((1 - codes.BETA2) * (1 - codes.BETA1**2 / codes.BETA2)) ** 0.5
    assert max(exact.largest) <= bound
    assert max(shipped.largest) <= bound
    assert zero.largest[codes.SECTIONS.index("spread 2")] > bound


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("zero", [True, False])
def test_the_dynamic_tree_fits_a_byte(signed: bool, zero: bool) -> None:
    levels = codes.dynamic_levels(signed=signed, zero=zero)
    assert len(levels.unique()) == len(levels) == 256 - (signed and not zero)
    assert (0.0 in levels) == zero


def test_gradients_of_kept_rows_are_those_of_the_whole_embedding() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 2, "vocab_size": 40}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=576, intermediate_size=1536, **sizes)).double()
    frequent, rare, unseen = torch.tensor([1, 5]), torch.tensor([2, 7]), torch.tensor([39])
    windows = torch.tensor([[[1, 5, 2, 1, 5], [5, 1, 7, 5, 1]]])
    _, found = next(gradients_of(model, Sample(windows, frequent, rare, unseen), range(1)))
    # Untied by hand, the two parts come apart.
    table = model.model.embed_tokens.weight.requires_grad_()
    model.lm_head.weight = torch.nn.Parameter(table.detach().clone())
    logits = model(input_ids=windows[0][:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[0][:, 1:].flatten()).backward()
    eps = torch.finfo(torch.float64).eps
    for name, rows in (("frequent", frequent), ("rare", rare), ("unseen", unseen)):
        exact = (table.grad + model.lm_head.weight.grad)[rows][:, :512].flatten()
        # Sums over 8 tokens and 576 features, in another order.
        assert (found[f"embedding, {name}"] - exact).abs().max() <= 584 * eps * exact.abs().max()
    assert torch.equal(found["untied, rare"] != 0, table.grad[rare][:, :512].flatten() != 0)
    assert not found["embedding, unseen"].eq(0).all()
