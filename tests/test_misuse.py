"""What people do by mistake with a wrapper, and the message that says what was meant, whole."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks_zoo import DIM, PreNorm
from narrow import the
from torch import Tensor, nn
from torch.func import functional_call

import adadepth as ad
from adadepth.serving import DepthBatch

pytestmark = [
    pytest.mark.plain,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of attention under vmap
]

X = torch.randn(4, 4, DIM, generator=torch.Generator().manual_seed(0))
READS = (
    "RecurrentWrapper reads the data, which torch.vmap does not allow. Make the mapped axis a part of the batch, "
    "x.flatten(0, 1). If parameters are mapped, call one model after the other."
)
ORDER = "The order is block, steps, gate, rule, update."


def block() -> nn.Module:
    return PreNorm(DIM, True)


def loop(*pieces: Any, **options: Any) -> ad.RecurrentWrapper:
    return ad.RecurrentWrapper(block(), 3, *pieces, **options)


def model(layers: nn.Module) -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(5, DIM), "layers": layers})


class Says(ad.Gate):
    """Scores as told."""

    def __init__(self, score: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.score = score

    def forward(self, h: Tensor, previous: Tensor, step: int) -> Any:
        return self.score(h)


class NoView(nn.Module):
    takes_view = True

    def forward(self, x: Tensor) -> Tensor:
        return x


class OfState(ad.Gate):
    def forward(self, h: Tensor) -> Tensor:  # type: ignore[override]
        return h[..., 0].sigmoid()


class OfTwo(ad.Update):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
        return x + h


def newest(scores: Tensor) -> Tensor:
    return scores[..., -1]


class NoAxis(ad.Update):
    def forward(self, x: Tensor, h: Tensor, start: Tensor, scores: Tensor, step: int) -> Tensor:
        return x + h * scores[..., -1]


def forgets(scores: Tensor, remaining: Tensor, positions: Tensor) -> None:
    torch.where(scores[..., -1] > 0.5, remaining, 0)


def best(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    return torch.where(scores[..., -1] >= scores[..., -1].median(-1, keepdim=True).values, remaining, 0)


def assigned(name: str, piece: object) -> Callable[[], None]:
    return lambda: setattr(loop(), name, piece)


def with_cache(looped: ad.RecurrentWrapper, cache: object) -> None:
    with torch.no_grad():
        looped(X, cache=cache)  # type: ignore[arg-type]


def served(looped: ad.RecurrentWrapper) -> DepthBatch:
    return DepthBatch(looped.eval(), ad.KVReuseCache(capacity=8), 1, 8)


def with_the_cache_of_another() -> None:
    cache = ad.KVReuseCache()
    for looped in (loop(), loop()):
        with_cache(looped, cache)


class AddsBatch(PreNorm):
    """Adds what has the batch's shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + X[:, :1])


class Flex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q = x.unflatten(-1, (1, -1)).transpose(1, 2)
        return x + flex_attention(q, q, q).transpose(1, 2).flatten(2)


HALTS = loop(ad.LinearGate(DIM), ad.Threshold(0.5)).eval()
ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "steps first": (
        lambda: ad.RecurrentWrapper(4, block()),  # type: ignore[arg-type]
        f"RecurrentWrapper expected block to be an nn.Module, got int. {ORDER}",
    ),
    "steps as text": (
        lambda: ad.RecurrentWrapper(block(), "4"),  # type: ignore[arg-type]
        f"RecurrentWrapper expected steps to be an int, got '4'. {ORDER}",
    ),
    "steps as a float": (
        lambda: ad.RecurrentWrapper(block(), 4.0),  # type: ignore[arg-type]
        f"RecurrentWrapper expected steps to be an int, got 4.0. {ORDER}",
    ),
    "steps as a bool": (
        lambda: ad.RecurrentWrapper(block(), True),
        f"RecurrentWrapper expected steps to be an int, got True. {ORDER}",
    ),
    "assigned rule": (
        assigned("rule", "x"),
        f"RecurrentWrapper expected rule to be a function or a callable object, got str. {ORDER}",
    ),
    "assigned class": (
        assigned("rule", ad.Survival),
        "RecurrentWrapper expected rule to be a function or a callable object, got the class Survival; call it. "
        f"{ORDER}",
    ),
    "assigned gate": (
        assigned("gate", ad.Replace()),
        f"RecurrentWrapper expected gate to be an adadepth.Gate, got Replace. {ORDER}",
    ),
    "assigned update": (
        assigned("update", ad.Interpolate),
        f"RecurrentWrapper expected update to be an adadepth.Update, got the class Interpolate; call it. {ORDER}",
    ),
    "assigned block": (
        assigned("block", block),
        f"RecurrentWrapper expected block to be an nn.Module, got function. {ORDER}",
    ),
    "gate returns a tuple": (
        lambda: loop(Says(lambda h: (h, h)), ad.Threshold(0.5))(X),
        "Says expected to return one score per token, shape (4, 4), got a tuple at iteration 0. Return it alone.",
    ),
    "rule returns nothing": (
        lambda: loop(ad.LinearGate(DIM), forgets)(X),
        "forgets expected to return how much of each token continues, shape (4, 4), got a NoneType at iteration 0. "
        "Does it end without a return?",
    ),
    "update loses an axis": (
        lambda: loop(ad.LinearGate(DIM), ad.Threshold(0.5), NoAxis())(X),
        "NoAxis failed on x and h of shape (4, 4, 8): The size of tensor a (8) must match the size of tensor b (4) at "
        "non-singleton dimension 2. To scale by a score, keep its axis: write scores[..., -1:], not scores[..., -1].",
    ),
    "block of another dtype": (
        lambda: loop().double()(X),
        "PreNorm expected a state of its parameters' dtype and device, torch.float64 on cpu, but the loop runs in "
        "torch.float32 on cpu. Move it with the loop: looped.to(device, dtype).",
    ),
    "criterion that scales": (
        lambda: loop(ad.ConvergenceGate(), ad.Threshold(0.5), ad.Interpolate())(X),
        "ConvergenceGate is an exit criterion: its score is a measurement, not a factor, but Interpolate multiplies by "
        "it. Give the loop update=adadepth.Replace() or adadepth.Ungated(Interpolate(...)).",
    ),
    "a depth per row with one axis": (
        lambda: loop()(X, max_depth=torch.tensor([1, 2, 3, 1])),
        "max_depth expected an int or a tensor that broadcasts to (batch, seq) = (4, 4), got shape (4,). One depth per "
        "row has shape (batch, 1).",
    ),
    "cache as a dict": (
        lambda: with_cache(loop(), {}),
        "cache expected an adadepth.KVReuseCache, got dict. Begin with cache=adadepth.KVReuseCache().",
    ),
    "cache as a class": (
        lambda: with_cache(loop(), ad.KVReuseCache),
        "cache expected an adadepth.KVReuseCache, got the class KVReuseCache. Begin with cache=adadepth.KVReuseCache().",
    ),
    "cache of another wrapper": (
        with_the_cache_of_another,
        "The cache holds keys and values of another RecurrentWrapper. Each needs a cache of its own: begin with a new "
        "one, or call cache.reset().",
    ),
    "a rule for training with a cache": (
        lambda: with_cache(loop(ad.LinearGate(DIM), ad.TrainingOnly(best)), ad.KVReuseCache()),
        "The rule best is for training only: with a cache it gets the new tokens alone and would decide differently. "
        "Decode with a rule that treats each token on its own, such as adadepth.Threshold(tau).",
    ),
    "attention_mask": (
        lambda: loop()(X, attention_mask=torch.ones(4, 4)),  # type: ignore[call-arg]
        "RecurrentWrapper does not take attention_mask. Pass real tokens as mask=, (batch, seq) bool. It takes x, "
        "mask, start, min_depth, max_depth, block_kwargs, states, cache.",
    ),
    "src_key_padding_mask": (
        lambda: loop()(X, src_key_padding_mask=torch.ones(4, 4)),  # type: ignore[call-arg]
        "RecurrentWrapper does not take src_key_padding_mask. Pass real tokens as mask=, (batch, seq) bool, True for "
        "real tokens. It takes x, mask, start, min_depth, max_depth, block_kwargs, states, cache.",
    ),
    **{
        f"a rule that reads its row, {name}": (
            lambda call=call: call(ad.NotBefore(3, best)),  # type: ignore[misc]
            "The rule best decides differently about tokens without the others of their row, and with a cache it gets "
            "the new tokens alone. If it is for training only, say so: adadepth.TrainingOnly(rule). To decode, it must "
            "treat each token on its own, and read positions instead of columns.",
        )
        for name, call in {
            "with a cache": lambda rule: with_cache(loop(ad.LinearGate(DIM), rule).eval(), ad.KVReuseCache()),
            "in check_looped": lambda rule: ad.check_looped(loop(ad.LinearGate(DIM), rule), X),
            "served": lambda rule: served(loop(ad.LinearGate(DIM), rule)).begin([0], X[:1]),
            "served, for some rows": lambda rule: served(loop(ad.LinearGate(DIM))).begin([0], X[:1], rule=rule),
        }.items()
    },
    "past_key_values": (
        lambda: loop()(X, past_key_values=None),  # type: ignore[call-arg]
        "RecurrentWrapper does not take past_key_values. Pass a cache as cache=adadepth.KVReuseCache(). It takes x, "
        "mask, start, min_depth, max_depth, block_kwargs, states, cache.",
    ),
    "an argument of the block": (
        lambda: loop()(X, cos=X),  # type: ignore[call-arg]
        "RecurrentWrapper does not take cos. If it is for the block, pass block_kwargs={'cos': ...}: a tensor in it is "
        "packed as x is. It takes x, mask, start, min_depth, max_depth, block_kwargs, states, cache.",
    ),
    "mask by position": (
        lambda: loop()(X, torch.ones(4, 4).bool()),  # type: ignore[call-arg]
        "RecurrentWrapper takes x alone by position, got 2 arguments. Name the others: mask=, start=, min_depth=, "
        "max_depth=, block_kwargs=, states=, cache=.",
    ),
    "two loops in a row": (
        lambda: nn.Sequential(loop(), loop())(X),
        "RecurrentWrapper expected x of shape (batch, seq, dim), got the Output of another looped block. Pass its state: "
        "looped(x).hidden.",
    ),
    "a layer on an output": (
        lambda: nn.Linear(DIM, DIM)(loop()(X)),
        "linear expected a tensor, got the Output of a looped block. Pass its state: looped(x).hidden.",
    ),
    "a tensor of the batch's shape": (
        lambda: ad.RecurrentWrapper(AddsBatch(DIM, True), 3)(X, max_depth=torch.tensor([[1], [2], [3], [1]])),
        "Attention expected q of shape (1, heads, 8, head_dim), got (4, 2, 8, 4): queries, keys and values must be "
        "those of the block's own input, one per token. If the block reads a memory, or a condition (batch, dim) for "
        "each row, wrap it: adadepth.RowPerToken(block). Other keys of another length cannot be looped. Batch and "
        "heads must be separate axes. If the block adds a tensor of the batch's shape to its input, pass it as "
        "block_kwargs, so that it is packed.",
    ),
    "meta": (
        lambda: loop(ad.LinearGate(DIM), ad.Threshold(0.5)).to("meta")(X.to("meta")),
        "RecurrentWrapper with skip=True reads the data to skip tokens, but x is on the meta device, which has none. "
        "Set skip=False if you only need shapes, or put x on a real device.",
    ),
    "vmap": (
        lambda: torch.vmap(HALTS)(X[None]),
        READS,
    ),
    "vmap over parameters": (
        lambda: torch.vmap(lambda p: functional_call(HALTS, p, X).hidden)(
            {n: p[None] for n, p in HALTS.named_parameters()}
        ),
        READS,
    ),
    "vmap over a mask": (
        lambda: torch.vmap(lambda mask: HALTS(X, mask=mask).hidden)(torch.ones(1, 4, 4).bool()),
        READS,
    ),
    "vmap over a depth": (
        lambda: torch.vmap(lambda most: HALTS(X, max_depth=most).hidden)(torch.ones(1, 4, 1).long()),
        READS,
    ),
    "a block that takes the view, without it": (
        lambda: ad.RecurrentWrapper(NoView(), 3)(X),
        "NoView has takes_view = True, so it is called as block(x, view, **block_kwargs), but it takes (x). Write "
        "forward(self, x, view), and call view.attend(q, k, v) in it.",
    ),
    "check_block of a class": (
        lambda: ad.check_block(NoView, DIM),  # type: ignore[arg-type]
        "check_block expected block to be an nn.Module, got the class NoView. Call it: NoView().",
    ),
    "check_block of a loop": (
        lambda: ad.check_block(loop(), DIM),
        "check_block expected a block without its loop, got RecurrentWrapper. Pass looped.block, or use check_looped.",
    ),
    "check_looped of a block": (
        lambda: ad.check_looped(block(), X),  # type: ignore[arg-type]
        "check_looped expected an adadepth.RecurrentWrapper, got PreNorm. For a block without its loop, use "
        "check_block(block, dim).",
    ),
    "check_looped of an output": (
        lambda: ad.check_looped(loop(), loop()(X)),  # type: ignore[arg-type]
        "RecurrentWrapper expected x of shape (batch, seq, dim), got the Output of another looped block. Pass its state: "
        "looped(x).hidden.",
    ),
    "a gate of one argument": (
        lambda: loop(OfState()),
        "The loop calls its gate as gate(h, previous, step), but OfState takes (h). Let it take all of these, also those "
        "that it does not read.",
    ),
    "a rule of one argument": (
        lambda: loop(ad.LinearGate(DIM), newest),
        "The loop calls its rule as rule(scores, remaining, positions), but newest takes (scores). Let it take all of "
        "these, also those that it does not read.",
    ),
    "an update of two arguments": (
        lambda: loop(None, None, OfTwo()),
        "The loop calls its update as update(x, h, start, scores, step), but OfTwo takes (x, h). Let it take all of "
        "these, also those that it does not read.",
    ),
    "weights of the bare block": (
        lambda: loop().load_state_dict(block().state_dict()),
        "RecurrentWrapper.load_state_dict expected names that begin with 'block.', 'gate.' or 'update.', got those of the "
        "bare block. Load them into it: looped.block.load_state_dict(state).",
    ),
    "weights of a model without the wrapper": (
        lambda: model(loop()).load_state_dict(model(block()).state_dict(), strict=False),
        "RecurrentWrapper.load_state_dict expected names that begin with 'layers.block.', 'layers.gate.' or "
        "'layers.update.', got those of the bare block. Rename them, such as layers.mlp.0.bias to layers.block.mlp.0.bias.",
    ),
    "steps set to zero": (
        lambda: setattr(loop(), "steps", 0),
        "RecurrentWrapper needs steps >= 1, got steps=0.",
    ),
    "steps set to a float": (
        lambda: setattr(loop(), "steps", 2.5),
        f"RecurrentWrapper expected steps to be an int, got 2.5. {ORDER}",
    ),
    "steps set to text": (
        lambda: setattr(loop(), "steps", "4"),
        f"RecurrentWrapper expected steps to be an int, got '4'. {ORDER}",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_the_message(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


class Routed(PreNorm):
    """Has names of parameters that a wrapper has too."""

    def __init__(self) -> None:
        super().__init__(DIM, True)
        self.gate = nn.ModuleDict({"proj": nn.Linear(DIM, 1)})


def test_weights_of_a_part_are_loaded() -> None:
    for layers in (loop(ad.LinearGate(DIM)), ad.RecurrentWrapper(Routed(), 3, ad.LinearGate(DIM)), block()):
        whole = model(layers)
        state = whole.state_dict()
        for part in ("embed.", "layers.", "layers.gate.", "layers.block.mlp.", "layers.mlp.", "nowhere."):
            some = {name: torch.full_like(value, 7) for name, value in state.items() if name.startswith(part)}
            whole.load_state_dict(some, strict=False)
            assert all((value == 7).all() for name, value in whole.state_dict().items() if name.startswith(part))
            whole.load_state_dict(state)


def test_a_type_error_in_a_gate_is_not_taken_for_one_of_the_block() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        loop(Says(lambda h: h[..., 0] + "a"), ad.Threshold(0.5))(X)  # type: ignore[operator]


def test_a_gate_of_another_dtype() -> None:
    looped = loop(ad.SharedMLPGate(DIM), ad.Threshold(0.5))
    looped.gate = ad.SharedMLPGate(DIM).double()
    with pytest.raises(
        ValueError, match=r"^SharedMLPGate expected a state of its parameters' dtype and device, torch.float64"
    ):
        looped(X)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("compiled", [True, False])
def test_flex_attention_is_refused_in_a_sentence(compiled: bool) -> None:
    torch._dynamo.reset()
    flex: nn.Module = Flex()
    if compiled:
        flex = nn.Sequential(the(nn.Module, torch.compile(flex, backend="eager")))
    with pytest.raises(
        ValueError, match=r"calls flex_attention, which a loop cannot reach: only F.scaled_dot_product_"
    ):
        ad.RecurrentWrapper(flex, 2)(torch.randn(2, 16, 16))


WARNINGS: dict[str, tuple[Callable[[], object], str]] = {
    "rule without a gate": (
        lambda: loop(None, ad.Threshold(0.5)),
        "RecurrentWrapper has Threshold as its rule, which reads scores, but no gate: every score is 1. Give it a gate, "
        "or no rule.",
    ),
    "gate without a rule": (
        lambda: loop(ad.LinearGate(DIM)),
        "RecurrentWrapper has a gate, but no rule, and Replace does not use the score: the gate affects only "
        "trace.scores. Give it a rule, such as adadepth.Threshold(0.5).",
    ),
    "gate of more steps": (
        lambda: loop(ad.PerIterationMLPGate(DIM, 5), ad.Threshold(0.5)),
        "PerIterationMLPGate was made for 5 steps, but the loop has 3: its parameters for later iterations are not "
        "used.",
    ),
    "gate of fewer steps": (
        lambda: loop(ad.PerIterationMLPGate(DIM, 2), ad.Threshold(0.5)),
        "PerIterationMLPGate was made for 2 steps, but the loop has 3: it raises an error if a token reaches iteration "
        "1, counted from 0. Give both the same steps.",
    ),
    "logits that scale": (
        lambda: loop(Says(lambda h: h.sum(-1).abs() + 1.5), ad.Threshold(0.5), ad.Interpolate()).eval()(X * 0),
        "Says scored 1.67 at iteration 0, and Interpolate multiplies by it. End a learned gate in a sigmoid; for a "
        "score that is not in [0, 1], use adadepth.Replace() or adadepth.Ungated(...).",
    ),
    "logits as chances": (
        lambda: loop(Says(lambda h: h.sum(-1).abs() + 1.5), ad.NotBefore(2, ad.Survival())).eval()(X * 0),
        "Says scored 1.67 at iteration 0, and Survival reads it as a chance. End a learned gate in a sigmoid; for a "
        "score that is not in [0, 1], use adadepth.Threshold(tau).",
    ),
    **{
        f"criterion with {name}": (
            lambda rule=rule: loop(ad.ConvergenceGate(), rule),  # type: ignore[misc]
            f"RecurrentWrapper has an exit criterion, ConvergenceGate, whose score is a measurement, but {name} reads "
            "a score as a chance. Use adadepth.Threshold(tau), with tau in the unit of the measurement.",
        )
        for name, rule in {
            "Survival": ad.TrainingOnly(ad.Survival()),
            "ACT": ad.Lookahead(ad.NotBefore(2, ad.ACT())),
            "SurvivalThreshold": ad.SurvivalThreshold(0.5),
        }.items()
    },
    "dropout with a cache": (
        lambda: with_cache(ad.RecurrentWrapper(nn.Sequential(block(), nn.Dropout(0.1)), 2), ad.KVReuseCache()),
        "A cache is used in training mode, with dropout: what it holds is random. Call looped.eval() first.",
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_what_may_be_meant_is_warned_of(name: str) -> None:
    call, message = WARNINGS[name]
    with pytest.warns() as caught:
        call()
    texts = [str(warning.message) for warning in caught]
    if name.startswith("logits"):
        message = re.sub(r"scored \S+ at", "scored 1.5 at", message)
        texts = [re.sub(r"scored \S+ at", "scored 1.5 at", text) for text in texts]
    assert texts == [message]
    assert name.startswith("logits") or name == "dropout with a cache" or caught[0].filename == __file__


def test_a_score_of_any_unit_may_be_compared_with_a_threshold() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(Says(lambda h: h.sum(-1).abs() + 1.5), ad.Lookahead(ad.Threshold(2.0))).eval()(X)
        loop(ad.ConvergenceGate(), ad.NotBefore(2, ad.Threshold(0.1))).eval()(X)


def test_what_wraps_a_piece_may_be_assigned_in_its_place() -> None:
    looped = loop(ad.LinearGate(DIM), ad.Threshold(0.5))
    looped.gate = torch.compile(ad.LinearGate(DIM), backend="eager")  # type: ignore[assignment]
    looped.gate, looped.rule, looped.update = None, None, None  # type: ignore[assignment]
    assert isinstance(looped.update, ad.Replace)
    assert looped(X).trace.depth.eq(3).all()


class Linear(nn.Module):
    """A rule that learns from the scores of each token, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(4)), 0

    def forward(self, scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
        self.calls += 1
        return torch.where((scores @ self.weight[: scores.shape[-1]]).sigmoid() > 0.7, remaining, 0)


def early(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    """Reads where a token is."""
    return torch.where((scores[..., -1] > 0.5) | (positions % 3 == 0), remaining, 0)


def at_random(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
    return remaining * (torch.rand_like(remaining) > 0.5)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 4), (4, 4)])
def test_a_rule_that_treats_each_token_on_its_own_decodes(shape: tuple[int, int]) -> None:
    tau = torch.rand(shape, generator=torch.Generator().manual_seed(0))

    def own(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
        return torch.where(scores[..., -1] >= tau, remaining, 0)

    def by_position(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
        return torch.where(scores[..., -1] >= tau.flatten()[positions % tau.numel()], remaining, 0)

    for rule in (own, by_position, Linear(), early, at_random, ad.Lookahead(own), ad.NotBefore(2, early)):
        with_cache(loop(ad.LinearGate(DIM, bias=0.0), rule).eval(), ad.KVReuseCache())


def test_a_rule_that_draws_is_tried_without_a_trace() -> None:
    looped, drawn = loop(ad.LinearGate(DIM), None).eval(), list[Tensor]()

    def coin(scores: Tensor, remaining: Tensor, positions: Tensor) -> Tensor:
        drawn.append(torch.rand(()))
        return remaining

    looped.rule = coin
    torch.manual_seed(0)
    with_cache(looped, ad.KVReuseCache())
    before = len(drawn)
    assert before > 2  # the first times it was tried
    torch.manual_seed(0)
    with_cache(looped, ad.KVReuseCache())
    again = drawn[before:]
    assert len(again) == 2 and again == drawn[before - 2 : before]


def test_a_rule_is_tried_alone_once() -> None:
    looped, rule = loop(ad.LinearGate(DIM, bias=0.0)).eval(), Linear()
    counts = []
    for _ in range(3):
        looped.rule, rule.calls = rule, 0
        with_cache(looped, ad.KVReuseCache())
        counts.append(rule.calls)
    assert counts[0] > counts[1] == counts[2] <= 2


class RuleModule(nn.Module):
    def forward(self, scores: Any, remaining: Any, positions: Any) -> Any:
        return remaining


@pytest.mark.parametrize("between", [False, True])
def test_a_rule_that_is_a_module_may_be_replaced_by_one_that_is_not(between: bool) -> None:
    loop, plain, module = ad.RecurrentWrapper(PreNorm(8, True), 2, ad.LinearGate(8)), ad.Threshold(0.5), RuleModule()
    for rule in (plain, module, *[None] * between, plain, module):
        loop.rule = rule
        assert loop.rule is rule
    assert dict(loop.named_modules())["rule"] is module
