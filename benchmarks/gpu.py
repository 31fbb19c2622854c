"""The first minutes on a GPU: what is right, what it costs, and what of that was counted without one.

`python -m benchmarks.gpu` runs every part for itself: what fails is printed and the next part runs. Each line is a JSON
object; `--write` puts them as tables into RESULTS.md. `--small` runs small sizes, on a CPU too.
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import adadepth as ad
from adadepth import _vocabulary

from ._blocks import stack
from ._measure import machine, write_section

STEPS = 4
Row = dict[str, Any]


class Sizes(NamedTuple):
    """What is run: models `(layers, dim, heads, batch, seq)` to train and to decode, and how often."""

    device: str
    dtype: torch.dtype
    models: dict[str, tuple[int, int, int, int, int]]
    vocabulary: int
    batches: tuple[int, ...]
    times: int


SMALL = Sizes("cpu", torch.float32, {"tiny": (2, 32, 2, 2, 24)}, 300, (1, 3), 2)
LARGE = Sizes(
    "cuda",
    torch.bfloat16,
    {"70M": (6, 512, 8, 16, 2048), "410M": (24, 1024, 16, 4, 2048)},
    50304,
    (1, 8, 32, 128),
    5,
)


def synchronize(s: Sizes) -> None:
    if s.device == "cuda":
        torch.cuda.synchronize()


def milliseconds(s: Sizes, call: Callable[[], object]) -> float:
    """The median time of a call, after two."""
    for _ in range(2):
        call()
    seconds = []
    for _ in range(s.times):
        synchronize(s)
        start = time.perf_counter()
        call()
        synchronize(s)
        seconds.append(time.perf_counter() - start)
    return round(median(seconds) * 1e3, 3)


def memory(s: Sizes) -> float | None:
    """The most MiB that were allocated since this was last asked."""
    if s.device != "cuda":
        return None
    most = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return round(most, 1)


@contextmanager
def autocast(s: Sizes) -> Iterator[None]:
    with torch.autocast(s.device, s.dtype, enabled=s.dtype != torch.float32):
        yield


def depths(batch: int, seq: int, s: Sizes, mean: float = 2.5) -> Tensor:
    return ad.uniform_depths((batch, seq), STEPS, mean, torch.Generator().manual_seed(0)).to(s.device)


def looped(s: Sizes, model: str, **options: Any) -> tuple[ad.RecurrentWrapper, Tensor]:
    """A loop over the layers of a model, and an input for it."""
    layers, dim, heads, batch, seq = s.models[model]
    options = {"update": ad.Interpolate(), **options}
    loop = ad.RecurrentWrapper(stack(layers, dim, heads), STEPS, ad.LinearGate(dim), **options).to(s.device)
    loop.self_check = False
    x = torch.randn(batch, seq, dim, generator=torch.Generator().manual_seed(1)).to(s.device)
    return loop, x


def versions(s: Sizes) -> Iterator[Row]:
    """What runs here, and which kernel each kind of attention call takes."""
    yield {"machine": machine(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    q = torch.randn(2, 4, 32, 64, device=s.device, dtype=s.dtype)
    bias = torch.zeros(2, 1, 32, 32, device=s.device, dtype=s.dtype)
    for what, more in (("causal", {"is_causal": True}), ("a bias", {"attn_mask": bias})):
        takes = []
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            try:
                with sdpa_kernel(backend):
                    F.scaled_dot_product_attention(q, q, q, **more)
                takes.append(backend.name)
            except RuntimeError:
                pass
        yield {"attention with": what, "can be": takes}


def right(s: Sizes) -> Iterator[Row]:
    """Each execution in this precision against dense float64: how far off states and gradients are, of the largest."""
    name = next(iter(s.models))
    layers, dim, heads, *_ = s.models[name]
    x, depth = torch.randn(3, 40, dim, generator=torch.Generator().manual_seed(2)), depths(3, 40, s)
    mask = torch.arange(40) >= torch.tensor([[0], [7], [13]])

    def run(dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        flex = options.pop("flex", False)
        loop = ad.RecurrentWrapper(
            stack(layers, dim, heads), STEPS, ad.LinearGate(dim), update=ad.Interpolate(), **options
        )
        loop.to(s.device, torch.float64 if dtype == torch.float64 else torch.float32).self_check = False
        loop.one_call = flex
        given = x.to(s.device, next(loop.parameters()).dtype, copy=True).requires_grad_()
        with torch.autocast(s.device, dtype, enabled=dtype not in (torch.float64, torch.float32)):
            out = loop(given, mask=mask.to(s.device), max_depth=depth)
        out.hidden.float().square().sum().backward()
        assert given.grad is not None
        return out.hidden.detach(), out.trace.depth, given.grad

    want = run(torch.float64, skip=False)
    ways: dict[str, Row] = {"packed": {}, "dense": {"skip": False}, "packed, checkpointed": {"checkpoint": True}}
    if s.device == "cuda":
        ways["packed, flex"] = {"flex": True}
    for way, options in ways.items():
        got = run(s.dtype, **options)
        off = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got[::2], want[::2], strict=True)]
        yield {"execution": way, "state": off[0], "gradient": off[1], "depths equal": torch.equal(got[1], want[1])}


def fresh_shapes(s: Sizes) -> Iterator[Row]:
    """Steps whose shapes are all new, with cuDNN's attention and without."""
    name = next(iter(s.models))
    loop, x = looped(s, name)
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        seconds = []
        for i in range(2 + s.times):
            depth = ad.uniform_depths(tuple(x.shape[:2]), STEPS, 2.5, torch.Generator().manual_seed(10 + i)).to(
                s.device
            )
            synchronize(s)
            start = time.perf_counter()
            with autocast(s):
                loop(x, max_depth=depth.to(s.device)).hidden.sum().backward()
            synchronize(s)
            seconds.append(round((time.perf_counter() - start) * 1e3, 1))
        yield {"cuDNN attention": cudnn, "ms of each step": seconds}
    torch.backends.cuda.enable_cudnn_sdp(True)


def ponder(s: Sizes) -> Iterator[Row]:
    """A call of Ponder, forward and backward, by how many logits are held."""
    _, dim, _, batch, seq = next(iter(s.models.values()))
    update = ad.Ponder(nn.Embedding(s.vocabulary, dim), nn.Linear(dim, s.vocabulary)).to(s.device)
    h = torch.randn(1, batch * seq, dim, device=s.device, requires_grad=True)

    def call() -> None:
        with autocast(s):
            update(h, h, h, torch.ones(1, batch * seq, 1, device=s.device), 0).sum().backward()

    before = _vocabulary.ON_CPU, _vocabulary.ELSEWHERE
    for held in (2**21, 2**25, 2**28):
        _vocabulary.ON_CPU = _vocabulary.ELSEWHERE = held
        memory(s)
        yield {"logits held": held, "ms": milliseconds(s, call), "MiB": memory(s)}
    _vocabulary.ON_CPU, _vocabulary.ELSEWHERE = before


def training(s: Sizes) -> Iterator[Row]:
    """A forward and backward pass: packed, flex, dense and a plain loop at full depth."""
    for name, (layers, dim, heads, *_) in s.models.items():
        plain, x = stack(layers, dim, heads).to(s.device), looped(s, name)[1]
        live = ad.live_share(ad.depth_mask(depths(x.shape[0], x.shape[1], s), STEPS))

        def hand(block: nn.Module = plain, x: Tensor = x) -> None:
            with autocast(s):
                by_hand(block, x).sum().backward()

        def ours(loop: ad.RecurrentWrapper, x: Tensor = x) -> None:
            with autocast(s):
                loop(x, max_depth=depths(x.shape[0], x.shape[1], s)).hidden.sum().backward()

        memory(s)
        full = milliseconds(s, hand)
        yield {"model": name, "execution": "plain loop", "ms": full, "MiB": memory(s)}
        for way in ("packed", "dense", *(("flex",) if s.device == "cuda" else ())):
            loop, _ = looped(s, name, skip=way != "dense")
            loop.one_call = way == "flex"
            took = milliseconds(s, partial(ours, loop))
            yield {
                "model": name,
                "execution": way,
                "ms": took,
                "of plain": round(took / full, 3),
                "live": round(float(live), 3),
                "tokens/s": round(x.shape[0] * x.shape[1] / took * 1e3),
                "MiB": memory(s),
            }


def next_token(loop: ad.RecurrentWrapper, new: Tensor, cache: ad.KVReuseCache, depth: Tensor | None) -> None:
    held = int(cache.lengths[0])
    loop(new, cache=cache, max_depth=depth)
    cache.crop(held)


def by_hand(block: nn.Module, x: Tensor) -> Tensor:
    for _ in range(STEPS):
        x = block(x)
    return x


@torch.no_grad()
def decoding(s: Sizes) -> Iterator[Row]:
    """A token with a cache: at fixed depth, at mean depth 2, and without a cache's attention at all."""
    for name, (layers, dim, heads, *_) in s.models.items():
        block = stack(layers, dim, heads).to(s.device, s.dtype)
        loop = ad.RecurrentWrapper(block, STEPS).eval()
        loop.self_check = False
        for batch in s.batches:
            x = torch.randn(batch, 129, dim, device=s.device, dtype=s.dtype)
            mean2 = torch.arange(batch, device=s.device).view(-1, 1) % 3 + 1
            took: Row = {}
            for way in ("", ", compact", *([", one call"] if s.device == "cuda" else [])):
                loop.one_call = way == ", one call"
                cache = ad.KVReuseCache("compact" if way == ", compact" else "filled", 256)
                loop(x[:, :128], cache=cache, max_depth=depths(batch, 128, s, 2.0))
                for what, depth in (("fixed", None), ("mean 2", mean2)):
                    took[what + way] = milliseconds(s, partial(next_token, loop, x[:, 128:], cache, depth))
            alone = milliseconds(s, partial(by_hand, block, x[:, 128:]))
            yield {"model": name, "batch": batch, **took, "layers alone": alone}


def launches(s: Sizes) -> Iterator[Row]:
    """Operators and kernels of a packed training pass, and waits for the device."""
    name = next(iter(s.models))
    loop, x = looped(s, name, rule=ad.Threshold(0.5))
    for way in ("packed", *(("flex",) if s.device == "cuda" else ())):
        loop.one_call = way == "flex"
        with autocast(s):
            loop(x).hidden.sum().backward()
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if s.device == "cuda" else [])]
            with profile(activities=activities) as seen:
                loop(x).hidden.sum().backward()
        events = seen.events() or []
        yield {
            "execution": way,
            "operators": sum(event.name.startswith("aten::") for event in events),
            "kernels": sum(event.device_type == DeviceType.CUDA for event in events),
            "waits": sum(event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for event in events),
        }


def padded(s: Sizes) -> Iterator[Row]:
    """Padded rows of an odd and of an aligned width."""
    name = next(iter(s.models))
    loop, x = looped(s, name)
    for seq in (x.shape[1] - 1, x.shape[1] // 16 * 16):
        row = x[:, :seq]
        mask = torch.arange(seq, device=s.device) >= torch.arange(len(x), device=s.device).unsqueeze(1)
        depth = depths(len(x), seq, s)

        def call(row: Tensor = row, mask: Tensor = mask, depth: Tensor = depth) -> None:
            with autocast(s):
                loop(row, mask=mask, max_depth=depth).hidden.sum().backward()

        yield {"width": seq, "ms": milliseconds(s, call)}


PARTS: tuple[Callable[[Sizes], Iterator[Row]], ...] = (
    versions,
    right,
    training,
    decoding,
    ponder,
    launches,
    fresh_shapes,
    padded,
)


def run(s: Sizes, parts: tuple[Callable[[Sizes], Iterator[Row]], ...] = PARTS) -> dict[str, list[Row]]:
    """The rows of every part, printed as they come; a part that fails ends with what it raised."""
    found: dict[str, list[Row]] = {}
    for part in parts:
        rows = found[part.__name__] = []
        start = time.perf_counter()
        try:
            for row in part(s):
                rows.append(row)
                print(json.dumps({"part": part.__name__, **row}), flush=True)
        except Exception as error:
            rows.append({"failed": f"{type(error).__name__}: {error}"[:300]})
            print(json.dumps({"part": part.__name__, **rows[-1]}), flush=True)
            traceback.print_exc()
        print(json.dumps({"part": part.__name__, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
        if s.device == "cuda":
            torch.cuda.empty_cache()
    return found


def tables(found: dict[str, list[Row]]) -> str:
    """The rows of each part as a table."""
    lines = list[str]()
    for part in PARTS:
        rows = found.get(part.__name__, [])
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines += [f"**{part.__name__}.** {part.__doc__}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(str(row.get(name, '')) for name in columns)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    arguments = parser.parse_args()
    if not arguments.small and not torch.cuda.is_available():
        parser.error("no GPU is seen by torch; --small runs small sizes on the CPU")
    found = run(SMALL if arguments.small else LARGE)
    if arguments.write:
        write_section("gpu", f"{machine()}\n\n{tables(found)}")


if __name__ == "__main__":
    main()
