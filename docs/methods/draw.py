"""Draws the figures of the methods' pages, from training runs of the compositions that the tests hold.

From the root of a clone: `python docs/methods/draw.py`, for all of them, or with the names of some. It takes
about four minutes on one thread; `--quick` trains hardly at all, to see that every figure can be drawn.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from panels import BLUE, GREEN, GREY, ORANGE, SKY, STYLE, answers, axes, bars, curves, depths, legend, losses, means
from torch import Tensor

import adadepth as ad

# Some gates learn from a loss on their scores alone.
warnings.filterwarnings("ignore", "RecurrentWrapper has a gate, but no rule")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests" / "compositions"), str(ROOT / "tests"), str(ROOT)]
toy: Any = import_module("toy")

SEEDS = range(3)
IDS, LABELS = toy.batch(toy.HELD_OUT, rows=512)
FIRST = torch.minimum(IDS, torch.arange(toy.LENGTH))  # the place that a token points at
TWO_HOPS = torch.minimum(IDS.gather(1, FIRST), FIRST) != FIRST  # the token there points on
GROUPS = {"one hop is enough": ~TWO_HOPS, "needs two hops": TWO_HOPS}


def act(m: ModuleType, steps: int) -> Figure:
    """Depth and answers by the time penalty."""
    penalties, right, depth = (0.0, 0.01, 0.02, 0.04, 0.08), [], {name: [] for name in GROUPS}
    for penalty in penalties:
        loss = partial(m.act_loss, time_penalty=penalty)
        models = [trained(lambda: m.UniversalTransformer(4), loss, 2 * steps // 3, seed) for seed in SEEDS]
        outs = [model(IDS) for model in models]
        right.append([share_right(model.head(out.hidden)) for model, out in zip(models, outs, strict=True)])
        for name, among in GROUPS.items():
            depth[name].append([mean_depth(out, among) for out in outs])
    fig, (top, bottom) = axes(2, height=4.6)
    means(top, right, GREY)
    for (name, values), color in zip(depth.items(), (BLUE, ORANGE), strict=True):
        means(bottom, values, color, name)
    answers(top)
    depths(bottom, "time penalty (nats per iteration)")
    bottom.set_xticks(range(len(penalties)), [f"{penalty:g}" for penalty in penalties])
    return fig


def pondernet(m: ModuleType, steps: int) -> Figure:
    """Where tokens exit, against the prior."""
    prior = ad.depth_prior("geometric", 4, rate=0.5)
    model = trained(lambda: m.PonderNet(4), partial(m.ponder_loss, prior=prior, beta=0.05), steps)
    exits = model(IDS).trace.exit_probs
    fig, ax = axes()
    shares = {"prior": prior.tolist()} | {name: exits[among].mean(0).tolist() for name, among in GROUPS.items()}
    bars(ax, shares, (GREY, BLUE, ORANGE))
    ax.set(xlabel="iteration", ylabel="share that exits after it")
    ax.set_xticks(range(4), range(1, 5))
    return fig


def loop_transformer(m: ModuleType, steps: int) -> Figure:
    """Loss by the iterations run, of models trained at 1, 2, 3 and 4."""
    make = partial(m.LoopTransformer, 6, ad.InputInjection())
    fig, ax = axes(height=3.8)
    for depth, color in zip(range(1, 5), (GREY, BLUE, ORANGE, GREEN), strict=True):
        models = [trained(make, m.answer_loss, steps, seed, max_depth=depth) for seed in SEEDS]
        each = [fmean(nats(model, model(IDS, max_depth=d)) for model in models) for d in range(1, 7)]
        ax.plot(range(1, 7), each, color=color, label=depth)
        ax.plot(depth, each[depth - 1], color=color, markersize=10)
    ax.set_xlabel("iterations run")
    losses(ax)
    legend(ax, "trained at")
    return fig


def ponder_lm(m: ModuleType, steps: int) -> Figure:
    """What a token that needs two hops predicts after each iteration, and so adds to its input."""
    models = [trained(lambda: m.PonderLM(3), m.answer_loss, steps, seed) for seed in SEEDS]
    there = IDS.gather(1, FIRST)
    among = TWO_HOPS & (there != LABELS)
    p = torch.stack([model.head(model(IDS, states=True).states).softmax(-1) for model in models]).mean(0)[among]
    fig, ax = axes()
    for name, numbers in (("the number at the first place", there), ("the answer", LABELS)):
        ax.plot(range(1, 4), p[torch.arange(len(p)), :, numbers[among]].mean(0).tolist(), label=name)
    ax.set(xlabel="iteration", ylabel="mean probability", ylim=(0, 1), xticks=range(1, 4))
    legend(ax)
    return fig


def huginn(m: ModuleType, steps: int) -> Figure:
    """Loss by the iterations at inference: all tokens at one depth, or each until its prediction settles."""
    torch.manual_seed(0)
    model = m.Huginn(16, keep=4)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return m.answer_loss(model, model(ids, m.make_noise(ids), m.draw_depth(mean=4, steps=12)), labels)

    toy.train(loss, [model], 2 * steps)
    model.eval().requires_grad_(False)
    noise, settled = m.make_noise(IDS), []
    forced = [(depth, nats(model, model(IDS, noise, depth))) for depth in range(1, 17)]
    for threshold in (0.2, 0.05, 0.01, 0.002, 1e-4, 1e-5):
        model.exit_when_settled(threshold)
        out = model(IDS, noise, 16)
        settled.append((mean_depth(out), nats(model, out)))
    fig, ax = axes()
    curves(ax, {"every token as often": forced, "each until it settles": settled}, (GREY, ORANGE))
    ax.set_xlabel("mean depth (iterations)")
    return fig


def ouro(m: ModuleType, steps: int) -> Figure:
    """Depth and answers by the threshold on the cumulative exit probability."""
    model = trained(lambda: m.Ouro(4), partial(m.ouro_loss, beta=0.1), steps)
    thresholds, outs = [i / 20 for i in range(1, 20)], []
    for threshold in thresholds:
        model.exit_at(threshold)
        outs.append(model(IDS))
    fig, (top, bottom) = axes(2, height=4.6)
    top.plot(thresholds, [share_right(model.head(out.hidden)) for out in outs], color=GREY)
    for name, among in GROUPS.items():
        bottom.plot(thresholds, [mean_depth(out, among) for out in outs], label=name)
    answers(top)
    depths(bottom, "cumulative exit probability at which tokens exit")
    return fig


def mixture_of_recursions(m: ModuleType, steps: int) -> Figure:
    """The depth that the router chooses for every number at every place, which is all that it sees."""
    torch.manual_seed(0)
    model = m.MixtureOfRecursions(3)
    toy.train(lambda i, y: m.mor_loss(model, i, model(i), y, 0.1), [model], steps)
    ids = torch.arange(toy.NUMBERS)[:, None].expand(-1, toy.LENGTH)
    depth = 1 + model.looped.gate.probabilities(model.embed(ids)).argmax(-1)
    fig, ax = axes(height=3.8)
    shades = ["#deebf7", "#9ecae1", "#3182bd"]
    ax.pcolormesh(depth.tolist(), cmap=ListedColormap(shades), vmin=1, vmax=3, edgecolor="white")
    ax.stairs([min(place, toy.NUMBERS) for place in range(toy.LENGTH)], baseline=None, color=ORANGE, linewidth=2)
    ax.set(xlabel="place", ylabel="number")
    ax.set_xticks([place + 0.5 for place in range(toy.LENGTH)], range(toy.LENGTH))
    ax.set_yticks([number + 0.5 for number in range(toy.NUMBERS)], range(toy.NUMBERS))
    legend(ax, "chosen depth", handles=[Patch(color=shade, label=1 + i) for i, shade in enumerate(shades)])
    return fig


def think_at_hard(m: ModuleType, steps: int) -> Figure:
    """Right answers by which tokens are thought over, of those whose first answer is right and of the others."""
    torch.manual_seed(0)
    model = m.ThinkAtHard()

    def answer_loss(ids: Tensor, labels: Tensor, **call: Any) -> Tensor:
        return m.answer_loss(model, model(ids, **call), labels)

    toy.train(partial(answer_loss, max_depth=1), [model], steps)
    toy.train(lambda i, y: answer_loss(i, y, max_depth=1 + model.find_hard(i, y).long()), m.low_rank(model), steps)
    toy.train(lambda i, y: m.decider_loss(model(i), model.find_hard(i, y)), [model.looped.gate], steps)
    model.eval().requires_grad_(False)
    wrong = model.find_hard(IDS, LABELS)
    outs = {"none": model(IDS, max_depth=1), "all": model(IDS), "the oracle's": model(IDS, max_depth=1 + wrong.long())}
    model.looped.rule = ad.Threshold(0.5)
    outs["the decider's"] = model(IDS)
    groups = {"all tokens": torch.ones_like(wrong), "first answer\nright": ~wrong, "first answer\nwrong": wrong}
    fig, ax = axes(height=3.8)
    right = {name: [share_right(model.head(out.hidden), g) for g in groups.values()] for name, out in outs.items()}
    bars(ax, right, (GREY, ORANGE, GREEN, BLUE), "thought over")
    answers(ax)
    ax.set_xticks(range(3), groups)
    return fig


def tiny_recursive_models(m: ModuleType, steps: int) -> Figure:
    """Solved Sudoku by segments: all puzzles at one number, or each until its score falls below a threshold."""
    task, solver, sudoku = (import_module(f"examples.puzzles.{name}") for name in ("task", "model", "train"))
    puzzles = task.make(4, (6, 8, 10), 20 * steps + 1000, seed=0)
    held_out, others = puzzles.at(slice(1000)), puzzles.at(slice(1000, None))
    torch.manual_seed(0)
    model = solver.Solver(4, segments=6)
    stream = sudoku.Stream(model, others, partial(sudoku.explore, 6), seed=0)
    sudoku.train(model, stream, most=6, steps=3 * steps)
    model.eval().requires_grad_(False)

    def point(least: int, most: int) -> tuple[float, float]:
        out = model(held_out.clues, model.start(1000), least, most)
        solved = (model.logits(out).argmax(-1) + 1 == held_out.answers).all(1)
        return mean_depth(out), solved.double().mean().item()

    lines = {"every puzzle as often": [point(depth, depth) for depth in range(1, 7)], "each until it halts": []}
    for tau in (0.5, 0.3, 0.2, 0.1, 0.05, 0.03):
        model.looped.rule = lambda scores, *rest, tau=tau: m.first_token_decides(scores + 0.5 - tau, *rest)
        lines["each until it halts"].append(point(1, 6))
    fig, ax = axes()
    for (name, points), color in zip(lines.items(), (GREY, ORANGE), strict=True):
        ax.plot(*zip(*points, strict=True), color=color, label=name)
    answers(ax)
    ax.set(xlabel="mean segments", ylabel="solved puzzles")
    legend(ax)
    return fig


def fixed_prior(m: ModuleType, steps: int) -> Figure:
    """Loss by mean depth of one frozen trajectory, for exits of five kinds."""
    model = trained(lambda: m.Looped(4), partial(m.prior_loss, rate=0.2), steps)

    def point(**call: Any) -> tuple[float, float]:
        out = model(IDS, **call)
        return mean_depth(out), nats(model, out)

    def points(gate: ad.Gate, thresholds: tuple[float, ...], **call: Any) -> list[tuple[float, float]]:
        model.looped.gate, found = gate, []
        for threshold in thresholds:
            model.looped.rule = ad.Threshold(threshold)
            found.append(point(**call))
        return found

    lines = {"forced": [point(max_depth=depth) for depth in range(1, 5)]}
    drawn = [ad.uniform_depths(IDS.shape, 4, mean, torch.Generator().manual_seed(0)) for mean in (1.5, 2, 2.5, 3, 3.5)]
    lines["random"] = [point(min_depth=depth, max_depth=depth) for depth in drawn]
    lines["KL"] = points(ad.KLGate(model.head), (2.0, 1.0, 0.3, 0.1, 0.05, 0.02, 0.001))
    model.looped.gate, model.looped.rule = (gate := m.Gain()), None
    toy.train(lambda i, y: m.gain_loss(model, model(i), y), [gate], steps)
    gate.requires_grad_(False)
    lines["gate"] = points(gate, (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.0))
    lines["gate, ≥ 2"] = points(gate, (1.0, 0.3, 0.1, 0.05, 0.02, 0.01, 0.0), min_depth=2)
    fig, ax = axes(height=3.8)
    curves(ax, lines, (GREY, GREEN, ORANGE, SKY, BLUE))
    ax.set_xlabel("mean depth (iterations)")
    return fig


def trained(make: Callable[[], Any], loss: Callable[..., Tensor], steps: int, seed: int = 0, **call: Any) -> Any:
    """A model trained on `loss(model, out, labels)`."""
    torch.manual_seed(seed)
    model = make()
    toy.train(lambda ids, labels: loss(model, model(ids, **call), labels), [model], steps)
    return model.eval().requires_grad_(False)


def share_right(logits: Tensor, among: Tensor | None = None) -> float:
    """Of the held-out tokens, or of some, how many are answered right."""
    right = (logits.argmax(-1) == LABELS).double()
    return (right if among is None else right[among]).mean().item()


def mean_depth(out: ad.Output, among: Tensor | None = None) -> float:
    """Of the held-out tokens, or of some."""
    depth = out.trace.depth.double()
    return (depth if among is None else depth[among]).mean().item()


def nats(model: Any, out: ad.Output) -> float:
    """The held-out loss."""
    return toy.losses(model.head(out.hidden), LABELS).mean().item()


METHODS = (
    *(act, pondernet, loop_transformer, ponder_lm, huginn, ouro, mixture_of_recursions, think_at_hard, fixed_prior),
    tiny_recursive_models,
)
FIGURES = {method.__name__.replace("_", "-"): method for method in METHODS}


def main() -> None:
    """Draw the figures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--quick", action="store_true", help="train hardly at all")
    parser.add_argument("--out", type=Path, default=HERE / "figures", help="a folder (default: beside this file)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(FIGURES):
        parser.error(f"no figure is called {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or FIGURES:
        method = FIGURES[name]
        with mpl.rc_context(STYLE):
            figure = method(import_module(f"test_{method.__name__}"), 2 if args.quick else 300)
            figure.savefig(args.out / f"{name}.svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
