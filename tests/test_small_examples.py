"""The small examples run, and what they print is what they claim."""

import inspect
import re

import pytest
import torch
from narrow import the

import adadepth as ad
from examples import a_gate_of_your_own, classify_sequences, diffusion, serve, soft_to_hard, wrap_a_block

WRAPPED = """\
check_block: nothing to say
iterations of each token:
tensor([[2, 4, 1, 2, 3, 2, 4, 2],
        [0, 0, 0, 2, 4, 1, 3, 3]])
work done: 63% of 4 iterations for all
all computed and selected: the same
decoded with a cache: the same
refused:
  Convolved mixes tokens outside its attention calls: in evaluation mode packed and dense execution
  differ by 4.6e-01 relative, first in conv (Conv1d). A looped block may mix tokens in attention only,
  and must read positions from adadepth.positions() or view.positions.
"""


def test_a_block_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    wrap_a_block.main()
    assert capsys.readouterr().out == WRAPPED


def test_what_differs_is_said() -> None:
    looped = ad.RecurrentWrapper(wrap_a_block.Block(16, 2, 1), 2)
    x = torch.randn(1, 3, 16)
    whole = looped(x)
    assert wrap_a_block.compare([whole], whole) == "the same"
    assert wrap_a_block.compare([looped(x + 1e-3)], whole) == "differs"
    assert wrap_a_block.compare([looped(x, max_depth=1)], whole) == "differs"


def test_the_rotary_positions_are_relative() -> None:
    q, k = torch.randn(2, 1, 1, 5, 8)
    near, far = (
        wrap_a_block.rotate(q, at) @ wrap_a_block.rotate(k, at).mT
        for at in (torch.arange(5)[None], torch.arange(7, 12)[None])
    )
    torch.testing.assert_close(near, far)


@pytest.mark.every
def test_harder_questions_run_deeper(capsys: pytest.CaptureFixture[str]) -> None:
    classify_sequences.main(["--quick"])
    head, *lines = capsys.readouterr().out.splitlines()
    table = {line[:22].strip(): [float(number) for number in line[22:].split()] for line in lines}
    assert head.split() == ["hops", "1", "2", "3", "all"]
    held = [f"right: held at {depth}" for depth in (1, 2, 3)]
    assert list(table) == ["right: one pass", *held, "right: free to leave", "iterations taken"]

    once, free, taken = table["right: one pass"], table["right: free to leave"], table["iterations taken"]
    assert once[0] > 0.95 and abs(once[2] - 0.5) < 0.1  # a guess between two
    for depth, name in enumerate(held, 1):
        for hops, share in enumerate(table[name][:3], 1):
            assert share > 0.9 if hops <= depth else share < 0.5
    assert free[2] > once[2] + 0.3 and free[-1] > table[held[-1]][-1] - 0.05  # depth pays, and leaving costs little
    assert taken[:3] == sorted(taken[:3]) and taken[2] > taken[0] + 0.5
    assert taken[-1] < 0.9 * 3


def test_questions_are_what_they_say() -> None:
    rows = classify_sequences.draw(200, 3, 5, torch.Generator().manual_seed(0))
    assert rows.hops.unique().tolist() == [1, 2, 3]
    assert rows.mask[:, 0].all() and (rows.mask.sum(1) % 2 == 1).all() and not rows.mask.all()
    for names, targets, mask, label, hops in zip(*rows, strict=True):
        nodes = dict(zip(names[mask].tolist(), targets[mask].tolist(), strict=True))
        assert len(nodes) == mask.sum()
        at = nodes.pop(14)  # where the class token points to, after ten names and four classes
        for _ in range(int(hops)):
            at = nodes[at]
        assert at == 10 + label
        assert sum(target >= 10 for target in nodes.values()) == 2  # the ends


def test_a_gate_a_rule_and_an_update_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    a_gate_of_your_own.main()
    out = capsys.readouterr().out
    number = r"(\d+\.\d+)"
    found = re.fullmatch(
        "gate, rule and update keep their contracts\n"
        rf"step 1: loss {number}, mean depth {number}\n"
        rf"step 20: loss {number}, mean depth {number}\n"
        rf"gate.scale: gradient {number}\n"
        rf"gate.bias: gradient {number}\n"
        rf"update.pull: gradient {number}\n"
        "decoded with a cache: the same\n"
        r"tensor\((\[\[[\d,\s\[\]]+\]\])\)\n",
        out,
    )
    assert found, out
    before, _, after, _, *gradients = (float(value) for value in found.groups()[:-1])
    assert after < before
    assert all(gradient > 0 for gradient in gradients)
    depths = set(re.findall(r"\d", found.groups()[-1]))
    assert len(depths) > 1 and "1" not in depths  # patience: nobody leaves after the first iteration


@pytest.mark.parametrize(("piece", "lines"), [("TurnGate", 20), ("patience", 5), ("Anchored", 11)])
def test_a_piece_is_short(piece: str, lines: int) -> None:
    assert len(inspect.getsource(getattr(a_gate_of_your_own, piece)).splitlines()) <= lines


@pytest.mark.every
def test_soft_exits_become_hard_ones(capsys: pytest.CaptureFixture[str]) -> None:
    soft_to_hard.main([])
    lines = capsys.readouterr().out.splitlines()
    said = re.compile(r"(.+?): +loss (\d\.\d+), mean depth (\d\.\d+)")
    found = [the(re.Match, said.fullmatch(line)).groups() for line in lines]
    names, losses, depths = zip(*((name, float(loss), float(depth)) for name, loss, depth in found), strict=True)
    assert names == ("soft exits, all computed", "hard exits at once", "hard exits, trained with")
    assert all(abs(depth - soft_to_hard.MEAN_DEPTH) < 0.15 for depth in depths)
    soft, at_once, trained = losses
    assert soft < 0.1 and at_once > 2 * soft and trained < 0.5 * at_once


def test_decoding_by_hand_equals_one_pass() -> None:
    torch.manual_seed(0)
    model, (ids, answers) = soft_to_hard.Model().eval(), soft_to_hard.draw(8, torch.Generator().manual_seed(0))
    model.looped.rule = ad.SurvivalThreshold(0.5)
    with torch.inference_mode():
        hidden, cache = soft_to_hard.decode(model, ids)
        whole = model(ids)
    assert cache.depth.unique().numel() > 1 and torch.equal(cache.depth, whole.trace.depth)
    torch.testing.assert_close(hidden, whole.hidden)
    row = ids[0].tolist()
    for place, answer in enumerate(answers[0].tolist()):
        at = place
        for _ in range(3):
            at = min(row[at], at)
        assert row[at] == answer


def test_a_server_gives_each_request_what_it_gets_alone(capsys: pytest.CaptureFixture[str]) -> None:
    serve.main()
    assert capsys.readouterr().out.splitlines()[-1] == "40 of 40 texts are what they are alone"


def test_each_training_of_a_diffusion_model_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    diffusion.main(["--steps", "1"])
    lines = capsys.readouterr().out.splitlines()
    said = re.compile(r"(.+?) +distance \d\.\d+, mean depth (\d\.\d+)")
    found = [the(re.Match, said.fullmatch(line)).groups() for line in lines[::2]]
    assert [name for name, _ in found] == ["four iterations", "two iterations", "hard exits"]
    assert [float(depth) for _, depth in found[:2]] == [4, 2]
    assert all(len(line.split()) == 5 + 10 for line in lines[1::2])


@pytest.mark.every
def test_exits_of_a_diffusion_model_are_early_in_noise(capsys: pytest.CaptureFixture[str]) -> None:
    diffusion.main([])
    *_, last, depths = capsys.readouterr().out.splitlines()
    assert abs(float(last.split()[-1]) - diffusion.BUDGET) < 0.15
    noise, *_, points = (float(depth) for depth in depths.split()[5:])
    assert points > noise + 0.5


def test_its_loop_is_the_block_four_times_over_whole_rows() -> None:
    torch.manual_seed(0)
    looped = diffusion.Model().looped
    block = the(diffusion.DiTBlock, the(ad.RowPerToken, looped.block).block)
    torch.nn.init.normal_(block.modulation.weight, std=0.3)  # it begins as the identity
    x, c = torch.randn(3, 5, diffusion.DIM), torch.randn(3, diffusion.DIM)
    got, want = looped(x, block_kwargs={"c": c.unsqueeze(1)}).hidden, x
    for _ in range(diffusion.STEPS):
        want = block(want, c)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, x)


def test_points_lie_on_their_shapes() -> None:
    kind, points = diffusion.draw(60, torch.Generator().manual_seed(0))
    x, y = points.unbind(-1)
    radius, widest = points.norm(dim=-1), points.abs().amax(-1)
    assert kind.unique().tolist() == [0, 1, 2]
    torch.testing.assert_close(radius[kind == 0], torch.ones_like(radius[kind == 0]))
    torch.testing.assert_close(widest[kind == 1], torch.ones_like(widest[kind == 1]))
    turn = torch.atan2(y, x).remainder(2 * torch.pi) / (2 * torch.pi)
    torch.testing.assert_close(radius[kind == 2], turn[kind == 2], rtol=0, atol=1e-5)
    assert diffusion.distance(points, kind) < 0.01
